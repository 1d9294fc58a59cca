"""Presets: published configurations under a file's own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import TopologyError
from cluster.topology import loader, presets
from cluster.topology.schema import PoolModelSpec, PoolSpec, ServingSpec

FILE = """\
cluster_name: t
max_workers: 0
provider: {{type: local, head_ip: 127.0.0.1, worker_ips: []}}
metadata:
  serving:
    model: {{id: m{model}}}
    pools:
      - name: pool
        role: mixed
        preset: {preset}
{pool}
    islands: [{{name: one, pools: [pool]}}]
"""


def serving(
    tmp_path: Path, pool: str = "", preset: str = "glm-5.2-a3-w8a8", model: str = ""
) -> ServingSpec:
    lines = "\n".join(f"        {line}" for line in pool.splitlines())
    file = tmp_path / "t.yaml"
    file.write_text(FILE.format(preset=preset, pool=lines, model=model))
    return loader.load(file).serving


def test_a_preset_gives_what_the_file_leaves_out(tmp_path: Path):
    pool = serving(tmp_path).pools[0]
    assert (pool.engine, pool.hardware) == ("vllm_ascend", "atlas_a3")
    assert (pool.parallel.tensor, pool.parallel.data, pool.max_num_seqs) == (8, 2, 48)
    assert pool.placement.resources == {"NPU": 16}


def test_the_file_overrides_every_key_and_keeps_the_rest(tmp_path: Path):
    stated = "max_num_seqs: 7\nparallel: {data: 1}\nspeculative: {num_speculative_tokens: 1}"
    pool = serving(tmp_path, stated).pools[0]
    assert pool.max_num_seqs == 7
    assert (pool.parallel.data, pool.parallel.tensor, pool.parallel.expert) == (1, 8, True)
    assert pool.speculative == {
        "num_speculative_tokens": 1,
        "method": "deepseek_mtp",
        "enforce_eager": True,
    }


def paths(value: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested mappings that holds something else than a mapping."""
    if not isinstance(value, dict):
        return [before]
    return [path for key, part in value.items() for path in paths(part, (*before, key))]


@pytest.mark.parametrize("name", presets.names())
def test_every_key_of_every_preset_can_be_overridden_alone(name: str):
    def merged(stated: dict[str, Any]) -> Any:
        pool = {"name": "pool", "preset": name, **stated}
        return presets.applied({"model": {"id": "m"}, "pools": [pool]})[0]["pools"][0]

    def at(value: Any, path: tuple[str, ...]) -> Any:
        for key in path:
            value = value[key]
        return value

    known = paths(dict(presets.preset(name).pool))
    before = merged({})
    assert len(known) > 3
    for path in known:
        stated: Any = "mine"
        for key in reversed(path):
            stated = {key: stated}
        after = merged(stated)
        assert at(after, path) == "mine", path
        assert all(at(after, other) == at(before, other) for other in known if other != path), path


def test_a_flag_that_takes_json_keeps_what_the_file_leaves_of_it(tmp_path: Path):
    stated = "engine_args: {additional_config: {mine: 1}, compilation-config: null}"
    args = serving(tmp_path, stated).pools[0].engine_args
    assert args["additional_config"] == {"multistream_overlap_shared_expert": True, "mine": 1}
    assert "additional-config" not in args
    assert args["compilation-config"] is None


@pytest.mark.parametrize(
    ("key", "left"),
    [("max_num_seqs: null", "max_num_seqs"), ("speculative: null", "speculative")],
)
def test_null_takes_a_key_out(tmp_path: Path, key: str, left: str):
    assert getattr(serving(tmp_path, key).pools[0], left) is None


def test_null_takes_a_variable_out_and_leaves_its_neighbours(tmp_path: Path):
    env = serving(tmp_path, "env: {HCCL_BUFFSIZE: null}").pools[0].env
    assert "HCCL_BUFFSIZE" not in env
    assert env["OMP_NUM_THREADS"] == "1"


def test_a_flag_is_the_same_in_either_spelling(tmp_path: Path):
    args = serving(tmp_path, "engine_args: {gpu_memory_utilization: 0.5, seed: null}").pools[0]
    assert args.engine_args["gpu_memory_utilization"] == 0.5
    assert "gpu-memory-utilization" not in args.engine_args
    # null tells the adapter to leave the flag out, whoever would set it.
    assert args.engine_args["seed"] is None
    assert args.engine_args["async-scheduling"] is True


def test_what_engines_are_told_of_the_model_goes_to_the_pool_and_parsers_to_all(tmp_path: Path):
    found = serving(tmp_path)
    assert found.model.quantization is None
    assert found.model_of("pool").quantization == "ascend"
    assert (found.model.tool_call_parser, found.model.reasoning_parser) == ("glm47", "glm45")


def test_the_model_s_own_keys_override_a_preset_s(tmp_path: Path):
    found = serving(tmp_path, model=", quantization: mine, reasoning_parser: null")
    assert found.model_of("pool").quantization == "mine"
    assert found.model.reasoning_parser is None
    found = serving(tmp_path, "model: {quantization: pools}", model=", kv_cache_dtype: fp8")
    assert found.model_of("pool").quantization == "pools"
    assert found.model_of("pool").kv_cache_dtype == "fp8"


def test_clients_see_one_name_whatever_a_pool_loads(tmp_path: Path):
    found = serving(tmp_path, "model: {id: org/quantised}", model=", served_name: glm")
    own = found.model_of("pool")
    assert (own.id, own.public_name) == ("org/quantised", "glm")


def test_an_unknown_preset_is_named_with_the_nearest_known_one(tmp_path: Path):
    with pytest.raises(TopologyError) as caught:
        serving(tmp_path, preset="glm-5.2-a3-w8a9")
    (fault,) = caught.value.faults
    assert str(fault).endswith(
        'metadata.serving.pools[0].preset: found "glm-5.2-a3-w8a9"; did you mean `glm-5.2-a3-w8a8`?'
    )
    assert fault.line == 10


def test_a_fault_in_a_key_of_the_preset_is_shown_at_the_pool(tmp_path: Path):
    with pytest.raises(TopologyError) as caught:
        serving(tmp_path, "parallel: {tensor: 32}")
    assert "pools[0]" in caught.value.faults[0].key
    assert caught.value.faults[0].line >= 8


@pytest.mark.parametrize(
    "value", [{}, {"pools": 3}, {"pools": [3, {"preset": 4}]}, {"pools": None}]
)
def test_any_shape_is_borne(value: dict[str, Any]):
    merged, findings = presets.applied(value)
    assert merged == value
    assert findings == ()


def test_what_is_read_is_not_changed():
    value = {"model": {"id": "m"}, "pools": [{"name": "p", "preset": "glm-5.2-a3-w8a8"}]}
    presets.applied(value)
    assert value["pools"] == [{"name": "p", "preset": "glm-5.2-a3-w8a8"}]
    assert value["model"] == {"id": "m"}


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_valid_and_says_its_source(name: str):
    preset = presets.preset(name)
    PoolSpec.model_validate({"name": "p", "role": "mixed", **preset.pool})
    own = {k: v for k, v in preset.model.items() if not k.endswith("_parser")}
    PoolModelSpec.model_validate(own)
    assert len(preset.source) > 80
    # GLM-5.2's own, whatever the engine; pools of one file share them.
    assert preset.model["tool_call_parser"] == "glm47"
    assert preset.model["reasoning_parser"] == "glm45"


@pytest.mark.parametrize("name", [name for name in presets.names() if "bf16" in name])
def test_what_no_vendor_publishes_is_marked_as_derived(name: str):
    source = presets.preset(name).source
    assert "Derived" in source
    assert "adjust_weight.py" in source
