"""The engine contract over real vLLM engines on the CPU, once per dialect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("contract.engine_contract")

from contract.engine_contract import *  # noqa: E402, F403
from contract.engine_pair import Pair, running_pair  # noqa: E402

from cluster.identity import Role  # noqa: E402
from cluster.models import store  # noqa: E402
from cluster.topology.schema import ModelSpec  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# 30 layers x (K + V) x 3 heads x 64 x 4 bytes: 46,080 bytes per token in float32.
KV_CACHE_GIB = 0.2
CAPACITY_TOKENS = int(KV_CACHE_GIB * 2**30) // 46_080
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}


@pytest.fixture(scope="module", params=["nixl", "mooncake"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    # float32: with bfloat16 the same text computed in other batches may round to another token.
    model = ModelSpec(id="smollm2-135m-instruct", max_model_len_tokens=2048, dtype="float32")
    path = store.resolve(model, lambda what, fraction: None).path
    common = {"kv_cache_gib": KV_CACHE_GIB, "max_num_seqs": 8, "block_size_tokens": 32}
    pools = {Role.PREFILL: common, Role.DECODE: {**common, "speculative": DRAFTS}}
    with running_pair(
        "vllm", request.param, model, path, folder, pools, 300.0, CAPACITY_TOKENS
    ) as running:
        yield running
