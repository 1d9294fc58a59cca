"""Engines that live and answer their watchdog, and fail requests: they are replaced by themselves,
and no client notices."""

from __future__ import annotations

import asyncio
import time

import pytest
from torn_cluster import Torn

from cluster.control.events import Told
from cluster.control.state import ClusterStatus

pytestmark = [
    pytest.mark.integration,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
]

# Ten seconds of failures, found a second or two later, on a machine that has other things to do.
REPLACED_WITHIN_S = 45.0


def generations(status: ClusterStatus) -> dict[str, int]:
    return {report.id.name: report.id.generation for report in status.workers}


async def found_ill(cluster: Torn, *victims: str, **fault: object) -> list[Told]:
    """Break the workers, send requests until the first of them is found ill, and see that none
    fails and that all else stays. The events that say so."""
    before = generations(await cluster.status())
    since_seq = (await cluster.status()).events[-1].seq
    for name in victims:
        await cluster.fault(await cluster.worker(name), **fault)
    deadline_s = time.monotonic() + REPLACED_WITHIN_S
    found: list[Told] = []
    while not found:
        assert time.monotonic() < deadline_s, "nobody was found ill"
        assert await (await cluster.streams(tokens=5)).ended() == []
        await asyncio.sleep(0.3)
        events = (await cluster.status()).events
        found = [e for e in events if e.kind == "WorkerFoundIll" and e.seq > since_seq]
    await cluster.whole()
    after = generations(await cluster.status())
    assert {name for name in after if after[name] != before[name]} == {
        event.subject.partition("#")[0] for event in found
    }
    return found


@pytest.mark.parametrize("victim", ["decode/0", "prefill/1"])
async def test_an_engine_that_answers_500_again_and_again_is_replaced(cluster, victim):
    (event,) = await found_ill(cluster, victim, fail_above_tokens=20)
    assert event.subject.startswith(f"{victim}#")
    assert "others answered them; said last: 500: " in event.text
    assert "simulated server error" in event.text
    shown = await asyncio.to_thread(cluster.home.command, "status", "--cluster", "torn")
    assert f"{victim} failed" in shown


async def test_a_decode_engine_that_can_pull_from_nobody_is_replaced(cluster):
    (event,) = await found_ill(cluster, "decode/1", fail_transfers=True)
    assert event.subject.startswith("decode/1#")
    assert "for want of blocks (prefill/0#" in event.text


async def test_of_a_prefill_engine_that_nobody_can_pull_from_only_that_is_replaced(cluster):
    (event,) = await found_ill(cluster, "prefill/0", fail_transfers=True)
    assert event.subject.startswith("prefill/0#")
    assert "for want of blocks (decode/" in event.text
