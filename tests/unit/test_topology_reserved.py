"""Flags that pdcluster sets itself, by engine: refused in `engine_args`, with the key to use."""

from __future__ import annotations

import pytest
from commands import flags, launch

from cluster.topology.reserved import instead_of_flag, instead_of_variable
from cluster.topology.schema import EngineName

# Flags of ours that an operator may give as well; the pool's word then counts.
_BOTH = {
    "prefix-caching-hash-algo",
    "enable-prompt-tokens-details",
    "enable-scale-out",
    "disable-uvicorn-access-log",
    "enable-auto-tool-choice",
    "enforce-eager",
    "distributed-executor-backend",
    "enable-cache-report",
    "device",
    "attention-backend",
    "kt-weight-path",
    "ep-size",
    "count",
    "first-rank",
    "first-port",
}


@pytest.mark.parametrize(
    ("engine", "flag", "says"),
    [
        ("vllm", "max_model_len", "max_model_len_tokens"),
        ("vllm", "no-enable-expert-parallel", "parallel.expert"),
        ("vllm_ascend", "kv-transfer-config", "connector"),
        ("sglang", "model-path", "model.id"),
        ("sglang", "tp", "parallel.tensor"),
        ("sglang", "tensor_parallel_size", "parallel.tensor"),
        ("sglang", "dp-size", "attn-dp-size"),
        ("sglang", "api_key", "take it out"),
        ("ktransformers", "context-length", "max_model_len_tokens"),
        ("xllm", "enable_disagg_pd", "not this gateway"),
        ("xllm", "node_rank", "parallel"),
        ("xllm", "devices", "take it out"),
    ],
)
def test_a_reserved_flag_names_the_key_to_use(engine: EngineName, flag: str, says: str):
    assert says in (instead_of_flag(flag, engine) or "")


@pytest.mark.parametrize(
    ("engine", "flag"),
    [
        ("vllm", "tp-size"),
        ("sglang", "max-model-len"),
        ("sglang", "attn-dp-size"),
        ("ktransformers", "kt-cpuinfer"),
        ("xllm", "ep_size"),
        ("xllm", "rank_tablefile"),
    ],
)
def test_what_an_engine_does_not_share_with_vllm_is_the_operator_s(engine: EngineName, flag: str):
    assert instead_of_flag(flag, engine) is None


@pytest.mark.parametrize(
    ("engine", "preset", "connector"),
    [
        ("vllm", "glm-5.2-h200-fp8-prefill", "nixl"),
        ("vllm_ascend", "glm-5.2-a3-w8a8-prefill", "ascend_mooncake"),
        ("sglang", "glm-5.2-h200-sglang-prefill", "sglang_nixl"),
        ("ktransformers", "glm-5.2-h200-ktransformers", "nixl"),
        ("xllm", "glm-5.2-a3-xllm", "nixl"),
    ],
)
def test_what_pdcluster_sets_cannot_be_set_again(engine: EngineName, preset: str, connector: str):
    """Every flag of a command is either reserved, the pool's own, or one that both may give."""
    role = "prefill" if preset.endswith("prefill") else "mixed"
    pools = [{"name": "a", "role": role, "preset": preset}]
    if role == "prefill":
        pools.append({"name": "b", "role": "decode", "preset": preset})
    launched = launch(pools, connector=connector)
    own = {k.removeprefix("--") for k, v in launched.origins.items() if "engine_args" in v}
    for flag in flags(launched.argv):
        name = flag.removeprefix("--")
        if name in own or name.replace("-", "_") in own or name in _BOTH:
            continue
        assert instead_of_flag(name, engine), f"{engine}: --{name} can be given twice"


@pytest.mark.parametrize("name", ["HCCL_IF_IP", "SGLANG_HOST_IP", "ASCEND_RT_VISIBLE_DEVICES"])
def test_variables_of_a_host_are_not_the_pool_s_to_say(name: str):
    assert instead_of_variable(name) is not None
