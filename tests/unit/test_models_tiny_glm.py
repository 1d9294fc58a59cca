"""The tiny GLM that comes with pdcluster: its files agree with each other and with their script."""

from __future__ import annotations

import ast
import hashlib
import json
import struct
import tomllib
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from cluster.models import tiny_glm
from cluster.models.store import resolve
from cluster.topology.schema import ModelSpec

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_tiny_glm.py"
BFLOAT16_BYTES = 2


def quiet(what: str, part: float | None) -> None:
    pass


@pytest.fixture(scope="module")
def config():
    return json.loads((tiny_glm.FILES / "config.json").read_bytes())


@pytest.fixture(scope="module")
def header():
    with (tiny_glm.FILES / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(tiny_glm.FILES / "tokenizer.json"))


def shapes_of(config) -> dict[str, list[int]]:
    """Every tensor that a checkpoint with this config has, in GLM's published layout."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    experts, expert = config["n_routed_experts"], config["moe_intermediate_size"]
    vocabulary, body = config["vocab_size"], config["num_hidden_layers"]
    found = {
        "model.embed_tokens.weight": [vocabulary, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocabulary, hidden],
    }

    def feed_forward(prefix: str, inner: int) -> None:
        for name in ("gate_proj", "up_proj"):
            found[f"{prefix}.{name}.weight"] = [inner, hidden]
        found[f"{prefix}.down_proj.weight"] = [hidden, inner]

    for index in range(body + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = [hidden]
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = [count * head, hidden]
        found[f"{layer}.self_attn.o_proj.weight"] = [hidden, heads * head]
        for name in ("q_norm", "k_norm"):
            found[f"{layer}.self_attn.{name}.weight"] = [head]
        if index < config["first_k_dense_replace"]:
            feed_forward(f"{layer}.mlp", config["intermediate_size"])
        else:
            found[f"{layer}.mlp.gate.weight"] = [experts, hidden]
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = [experts]
            feed_forward(f"{layer}.mlp.shared_experts", config["n_shared_experts"] * expert)
            for number in range(experts):
                feed_forward(f"{layer}.mlp.experts.{number}", expert)
        if index >= body:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                found[f"{layer}.{name}.weight"] = [hidden]
            found[f"{layer}.eh_proj.weight"] = [hidden, 2 * hidden]
    return found


def test_the_weights_have_the_tensors_and_shapes_of_the_config(config, header):
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    assert {name: about["shape"] for name, about in tensors.items()} == shapes_of(config)
    assert {about["dtype"] for about in tensors.values()} == {"BF16"}
    parameters = sum(_product(shape) for shape in shapes_of(config).values())
    header_bytes = (tiny_glm.FILES / "model.safetensors").stat().st_size - (
        parameters * BFLOAT16_BYTES
    )
    assert 0 < header_bytes < 40_000


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_it_is_a_glm_with_one_layer_that_drafts(config):
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    assert config["n_routed_experts"] > config["num_experts_per_tok"] > 0


@pytest.mark.parametrize(
    "text", ["Return a new list.", "naïve 東京 🙂\n\ttabs", "".join(map(chr, range(1, 0x250)))]
)
def test_the_tokenizer_gives_any_text_back(tokenizer, config, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < config["vocab_size"] == tokenizer.get_vocab_size()


def test_a_chat_is_written_with_tokens_of_its_own(tokenizer, config):
    about = json.loads((tiny_glm.FILES / "tokenizer_config.json").read_bytes())
    chat = jinja2.Template(about["chat_template"]).render(
        messages=[{"role": "user", "content": "Return a"}], add_generation_prompt=True
    )
    ids = tokenizer.encode(chat).ids
    assert (ids[0], ids[-1]) == (
        tokenizer.token_to_id("<|user|>"),
        tokenizer.token_to_id("<|assistant|>"),
    )
    assert tokenizer.token_to_id(about["eos_token"]) == config["eos_token_id"]


def test_other_weights_are_another_revision():
    digest = hashlib.sha256((tiny_glm.FILES / "model.safetensors").read_bytes()).hexdigest()
    assert tiny_glm.REVISION.partition("-")[2] == digest[:8]


def test_it_is_copied_into_the_cache_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = resolve(ModelSpec(id=tiny_glm.ID), quiet)
    names = {path.name for path in tiny_glm.FILES.iterdir()}
    assert "model.safetensors" in names
    for name in names:
        assert (Path(found.path) / name).read_bytes() == (tiny_glm.FILES / name).read_bytes()
    size = sum((Path(found.path) / name).stat().st_size for name in names)
    assert size < tiny_glm.NEEDED_BYTES


def test_the_weights_say_what_made_them_and_the_script_still_makes_their_shapes(header, config):
    """Training itself takes minutes and torch; the sizes stand in the script."""
    made_with = header["__metadata__"]
    assert {"python", "torch", "transformers", "steps"} <= set(made_with)
    assert f'"--steps", type=int, default={made_with["steps"]},' in SCRIPT.read_text()
    tree = ast.parse(SCRIPT.read_text())
    (made,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Glm4MoeConfig"
    )
    sizes = {
        part.arg: part.value.value for part in made.keywords if isinstance(part.value, ast.Constant)
    }
    del sizes["num_mtp_layers"], sizes["partial_rotary_factor"]  # written otherwise
    assert {name: config[name] for name in sizes} == sizes


def test_an_installation_has_the_files():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = tiny_glm.FILES.relative_to(ROOT / "cluster")
    assert f"{folder}/*" in settings["package-data"]["cluster"]
