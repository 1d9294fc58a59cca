"""The engine contract over simulated engines, once per connector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

pytest.register_assert_rewrite("contract.engine_contract")

from contract.engine_contract import *  # noqa: E402, F403
from contract.engine_pair import Pair, running_pair  # noqa: E402

from cluster.identity import Role  # noqa: E402
from cluster.models import store  # noqa: E402
from cluster.topology.schema import ConnectorName, ModelSpec  # noqa: E402

pytestmark = pytest.mark.integration

CAPACITY_TOKENS = 8192
TIMINGS = {
    "prefill_tokens_per_s": 200_000.0,
    "decode_step_s": 0.001,
    "kv_capacity_tokens": CAPACITY_TOKENS,
    "accepted_per_draft": 1.5,
}


@pytest.fixture(scope="module", params=get_args(ConnectorName))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = ModelSpec(id="simulated", max_model_len_tokens=4096)
    path = store.resolve(model, lambda what, fraction: None).path
    pools = {
        Role.PREFILL: {"simulated": TIMINGS},
        Role.DECODE: {"simulated": TIMINGS, "speculative": {"num_speculative_tokens": 4}},
    }
    with running_pair(
        "simulated", request.param, model, path, folder, pools, 60.0, CAPACITY_TOKENS
    ) as running:
        yield running
