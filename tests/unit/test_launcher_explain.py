"""`pdcluster render --explain`: where each argument and variable came from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli.main import run

FILE = """\
cluster_name: t
max_workers: 1
provider: {type: external, module: cluster.nodes.BareHostProvider}
metadata:
  serving:
    model:
      id: org/glm
      max_model_len_tokens: 20480
    pools:
      - name: atlas
        role: mixed
        preset: glm-5.2-a3-w8a8
        max_num_seqs: 7
        engine_args: {seed: 1}
        speculative: {num_speculative_tokens: 1}
        env: {HCCL_BUFFSIZE: "300"}
        interpreter: /opt/py
    islands:
      - {name: one, pools: [atlas], connector: ascend_mooncake}
"""

# As people read it, less the columns' padding and the file's name.
GOLDEN = """\
# atlas/0 (mixed) on a node with NPU: 16
  /opt/py -m vllm.entrypoints.cli.main serve  FILE:17 pools[0].interpreter
  org/glm  FILE:7 model.id
  --host NODE_IP  pdcluster: each engine binds its node's own address
  --port 10000  pdcluster: reserved on the node at each start
  --served-model-name glm  FILE:7 model.id
  --quantization ascend  preset glm-5.2-a3-w8a8
  --dtype auto  default of model.dtype
  --max-model-len 20480  preset glm-5.2-a3-w8a8
  --trust-remote-code  preset glm-5.2-a3-w8a8
  --enable-auto-tool-choice  preset glm-5.2-a3-w8a8
  --tool-call-parser glm47  preset glm-5.2-a3-w8a8
  --reasoning-parser glm45  preset glm-5.2-a3-w8a8
  --max-num-seqs 7  FILE:13 pools[0].max_num_seqs
  --max-num-batched-tokens 4096  preset glm-5.2-a3-w8a8
  --prefix-caching-hash-algo sha256_cbor  pdcluster: blocks get the same name in every engine
  --speculative-config {"num_speculative_tokens":1,"method":"deepseek_mtp","enforce_eager":true}
  FILE:15 pools[0].speculative over preset glm-5.2-a3-w8a8
  --tensor-parallel-size 8  preset glm-5.2-a3-w8a8
  --data-parallel-size 2  preset glm-5.2-a3-w8a8
  --enable-expert-parallel  preset glm-5.2-a3-w8a8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def rendered(file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def render(*words: str) -> str:
        assert run(["render", str(file), *words]) == 0
        return capsys.readouterr().out

    return render


def test_the_text_that_people_read(file: Path, rendered: Callable[..., str]):
    text = rendered("--explain").replace(str(file), "FILE")
    shown = re.sub(r" {2,}", "  ", text).splitlines()
    wanted = GOLDEN.splitlines()
    assert shown[: len(wanted)] == wanted
    assert "\n  HCCL_BUFFSIZE=300 " in text
    assert "  FILE:16 pools[0].env.HCCL_BUFFSIZE\n" in text
    assert "  VLLM_API_KEY=*** " in text
    assert "preset glm-5.2-a3-w8a8\n    vllm-project/vllm-ascend at b19127c7" in text


def test_origins_stand_below_each_other(rendered: Callable[..., str]):
    text = rendered("--explain")
    marks = (" pdcluster: ", " preset glm", " default of ")
    text = text.replace(" over preset", "")
    rows = [line for line in text.splitlines() if any(m in line for m in marks)]
    columns = {next(line.index(m) for m in marks if m in line) for line in rows}
    assert len(rows) > 20
    assert len(columns) == 1


def test_json_has_a_row_per_argument_and_the_presets_sources(
    file: Path, rendered: Callable[..., str]
):
    found = json.loads(rendered("--explain", "--json"))
    (worker,) = found["workers"]
    rows = {row["name"]: row for row in worker["arguments"] + worker["variables"]}
    assert rows["--seed"] == {
        "name": "--seed",
        "value": "1",
        "origin": f"{file}:14 pools[0].engine_args.seed",
    }
    assert rows["OMP_NUM_THREADS"]["origin"] == "preset glm-5.2-a3-w8a8"
    assert rows["VLLM_API_KEY"]["value"] == "***"
    assert found["presets"]["glm-5.2-a3-w8a8"].startswith("vllm-project/vllm-ascend at b19127c7")


def test_without_an_interpreter_of_its_own_the_command_is_ours(
    file: Path, rendered: Callable[..., str]
):
    file.write_text(FILE.replace("        interpreter: /opt/py\n", ""))
    first = next(line for line in rendered("--explain").splitlines() if sys.executable in line)
    assert first.split() == [sys.executable, *["-m", "vllm.entrypoints.cli.main", "serve"]]


def test_files_that_hold_a_secret_are_named_and_not_shown(file: Path, rendered: Callable[..., str]):
    stated = FILE.replace("preset: glm-5.2-a3-w8a8", "preset: glm-5.2-h200-sglang")
    stated = stated.replace(
        "speculative: {num_speculative_tokens: 1}", "speculative: {num-steps: 2}"
    )
    file.write_text(stated)
    text = rendered("--explain")
    assert "file sglang.yaml" in text
    assert "api-key" not in text
