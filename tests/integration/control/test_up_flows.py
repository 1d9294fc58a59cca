"""Islands that stand for vLLM-Ascend and SGLang, one of each flow, behind one endpoint: workers
become ready, and blocks move as each connector wants it."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kv.dialects import ORDERS, Order

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

CONNECTORS = {
    Order.PREFILL_FIRST: "ascend_mooncake",
    Order.DECODE_FIRST: "ascend_layerwise",
    Order.TOGETHER: "sglang_ascend",
}


def one_island_per_order(serving: dict[str, Any]) -> None:
    serving["pools"], serving["islands"] = [], []
    for connector in CONNECTORS.values():
        short = connector.replace("_", "-")
        pools = [f"prefill-{short}", f"decode-{short}"]
        serving["islands"].append({"name": short, "pools": pools, "connector": connector})
        serving["pools"] += [
            {
                "name": name,
                "role": name.partition("-")[0],
                "engine": "simulated",
                "placement": {"resources": {"CPU": 0.1}},
            }
            for name in pools
        ]


def test_every_flow_serves_in_a_cluster(home):
    name = "it-flows"
    assert {ORDERS[connector] for connector in CONNECTORS.values()} == set(Order)
    home.run("up", str(home.topology(name, one_island_per_order)))
    try:
        seen = set()
        # Islands take turns. Another text each time: nobody holds a part of it yet.
        for number in range(12):
            text = " ".join(f"word{number}-{n}" for n in range(60))
            answer = home.json("chat", text, "--max-tokens", "8", "--cluster", name)
            assert answer["text"]
            island = answer["decode"].removeprefix("decode-")
            assert answer["prefill"] == f"prefill-{island}"
            seen.add(island)
        assert seen == {f"{connector.replace('_', '-')}/0" for connector in CONNECTORS.values()}
    finally:
        home.run("down", "--cluster", name)
    assert home.leftovers(name) == []
