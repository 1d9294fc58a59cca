"""KV block sizes that vLLM on a CPU does not take are refused before an engine loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from topology_text import BASE

from cluster.errors import TopologyError
from cluster.topology.loader import load

VLLM = BASE.replace("engine: simulated", "engine: vllm").replace("id: simulated", "id: org/model")


def with_blocks(tmp_path: Path, size: int, more: str = "") -> Path:
    file = tmp_path / "t.yaml"
    line = f"engine: vllm\n        block_size_tokens: {size}\n{more}"
    file.write_text(VLLM.replace("engine: vllm\n", line))
    return file


@pytest.mark.parametrize("more", ["", "        hardware: cpu\n"])
@pytest.mark.parametrize(("size", "instead"), [(16, 32), (33, 64)])
def test_a_cpu_takes_multiples_of_32_and_the_message_says_which(tmp_path, size, instead, more):
    with pytest.raises(TopologyError) as refused:
        load(with_blocks(tmp_path, size, more))
    said = str(refused.value)
    assert f"t.yaml:11 metadata.serving.pools[0].block_size_tokens: found {size}" in said
    assert "vLLM on a CPU takes multiples of 32" in said
    assert f"write {instead}, or leave it out" in said


def test_other_sizes_and_other_devices_are_none_of_its_business(tmp_path):
    load(with_blocks(tmp_path, 64))
    load(with_blocks(tmp_path, 16, "        placement: {resources: {CPU: 1, GPU: 1}}\n"))
    h200 = "        hardware: h200\n        placement: {resources: {CPU: 1, GPU: 1}}\n"
    load(with_blocks(tmp_path, 16, h200))
    simulated = with_blocks(tmp_path, 16)
    simulated.write_text(simulated.read_text().replace("engine: vllm", "engine: simulated"))
    load(simulated)
