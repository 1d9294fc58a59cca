"""Workers that let go of their requests while they live: drains past grace, hangs, role changes."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import Any

import pytest
from told_streams import CHAT, COMPLETIONS, Told, body, same, tell

from cluster.identity import Role, WorkerState
from cluster.snapshot import Link

pytestmark = pytest.mark.integration

STREAMS = 10
RECOVERIES = "pdcluster_gateway_recoveries_total"


def requests(path: str = CHAT, tokens: int = 60) -> list[dict[str, Any]]:
    return [body(path, user=str(n), max_tokens=tokens + n) for n in range(STREAMS)]


async def undisturbed(gateway: Any, path: str, asked: list[dict[str, Any]]) -> list[Told]:
    return list(await asyncio.gather(*(tell(gateway, path, request) for request in asked)))


def draining(view: Any, *, lets_go: bool) -> Any:
    return replace(view, state=WorkerState.DRAINING, lets_go=lets_go)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_streams_of_a_drained_decode_go_on_elsewhere(
    path, start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.02) for _ in range(2)]
    fed = tools.view(prefill)
    one, two = (tools.view(decode, index) for index, decode in enumerate(decodes))
    async with start_gateway(fed, one, two) as gateway:
        asked = requests(path)
        wanted = await undisturbed(gateway, path, asked)
        streams = [asyncio.create_task(tell(gateway, path, request)) for request in asked]
        await asyncio.sleep(0.5)
        at_work = await decodes[0].running()
        assert at_work >= 3
        # New ones stay away; those there have their time.
        gateway.publish(fed, draining(one, lets_go=False), two)
        await asyncio.sleep(0.1)
        assert await decodes[0].running() == at_work
        gateway.publish(fed, draining(one, lets_go=True), two)

        async def is_free() -> bool:
            return await decodes[0].running() == 0

        await tools.eventually(is_free, 2.0)
        for told, want in zip(await asyncio.gather(*streams), wanted, strict=True):
            assert same(told, want)
        assert await gateway.metric(RECOVERIES, 'cause="drained"') == at_work
        # Nobody failed.
        assert await gateway.metric(RECOVERIES, 'cause="failed"') == 0
        assert await gateway.metric("pdcluster_gateway_engine_failures_total") == 0
        assert gateway.is_idle
        notes = gateway.parts.tally.report(0, 0, 0, 0).notes
        assert [(note.kind, note.subject) for note in notes] == [("AnswerContinued", "decode/0")]
        assert notes[0].text == f"{at_work:.0f} answers went on elsewhere (drained)"


async def test_streams_move_more_often_than_attempts_allow(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.02) for _ in range(2)]
    fed = tools.view(prefill)
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(fed, *views) as gateway:
        asked = requests(tokens=100)
        wanted = await undisturbed(gateway, CHAT, asked)
        streams = [asyncio.create_task(tell(gateway, CHAT, request)) for request in asked]
        for turn in range(6):
            await asyncio.sleep(0.25)
            now = list(views)
            now[turn % 2] = draining(views[turn % 2], lets_go=True)
            gateway.publish(fed, *now)
        for told, want in zip(await asyncio.gather(*streams), wanted, strict=True):
            assert same(told, want)
        assert await gateway.metric(RECOVERIES, 'cause="drained"') > 2 * STREAMS


async def test_what_cannot_go_on_stays_with_a_drained_worker_to_its_end(
    start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.02) for _ in range(2)]
    fed = tools.view(prefill)
    one, two = (tools.view(decode, index) for index, decode in enumerate(decodes))
    sampled = {"temperature": 0.7, "response_format": {"type": "json_object"}}
    async with start_gateway(fed, one) as gateway:
        stream = asyncio.create_task(tell(gateway, CHAT, body(CHAT, **sampled)))
        await asyncio.sleep(0.4)
        gateway.publish(fed, draining(one, lets_go=True), two)
        told = await stream
        assert (told.error, told.finishes, told.is_done) == (None, ["length"], True)
        assert told.usage["completion_tokens"] == 60
        assert await gateway.metric(RECOVERIES) == 0


async def test_an_answer_stays_where_nobody_else_can_go_on_and_leaves_once_there_is(
    start_engine, start_gateway, tools
):
    """The last worker of a revision drains: the new revision must not finish its sentences."""
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.02) for _ in range(3)]
    views = [
        replace(tools.view(decode, index), model_revision=revision)
        for index, (decode, revision) in enumerate(zip(decodes, ("old", "new", "old"), strict=True))
    ]
    fed = replace(tools.view(prefill), model_revision="old")
    feeds_new = replace(tools.view(prefill, 1), model_revision="new")
    async with start_gateway(fed, views[0]) as gateway:
        request = body(CHAT, max_tokens=80)
        wanted = await tell(gateway, CHAT, request)
        stream = asyncio.create_task(tell(gateway, CHAT, request))
        await asyncio.sleep(0.4)
        leaving = draining(views[0], lets_go=True)
        gateway.publish(fed, feeds_new, leaving, views[1])
        await asyncio.sleep(0.3)
        assert await decodes[0].running() == 1
        gateway.publish(fed, feeds_new, leaving, views[1], views[2])

        async def has_moved() -> bool:
            return await decodes[2].running() == 1

        await tools.eventually(has_moved, 3.0)
        assert same(await stream, wanted)


async def test_an_answer_never_goes_on_with_another_revision(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.02) for _ in range(2)]
    old = [replace(tools.view(prefill), model_revision="old")]
    old.append(replace(tools.view(decodes[0]), model_revision="old"))
    new = [replace(tools.view(prefill, 1), model_revision="new")]
    new.append(replace(tools.view(decodes[1], 1), model_revision="new"))
    async with start_gateway(*old) as gateway:

        async def kill(name: str) -> None:
            gateway.publish(*old, *new)
            await asyncio.sleep(0.1)
            decodes[0].kill()

        told = await tell(gateway, CHAT, body(CHAT), 10, kill)
        assert told.error is not None
        why = "every worker that can decode and has the model revision 'old' that it was begun with"
        assert why in told.error["message"]
        assert (told.finishes, told.is_done) == ([], False)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_requests_leave_a_worker_that_hangs(role, start_engine, start_gateway, tools):
    """Its port is open and its kernel answers: only the watchdog's word tells that it hangs."""
    slow = {"prefill_tokens_per_s": 300.0} if role is Role.PREFILL else {"decode_step_s": 0.02}
    prefills = [start_engine(Role.PREFILL, **(slow if role is Role.PREFILL else {}))]
    decodes = [start_engine(Role.DECODE, **(slow if role is Role.DECODE else {}))]
    hung = (prefills if role is Role.PREFILL else decodes)[0]
    (prefills if role is Role.PREFILL else decodes).append(start_engine(role))
    views = [tools.view(engine, index) for index, engine in enumerate(prefills)]
    views += [tools.view(engine, index) for index, engine in enumerate(decodes)]
    stopped = next(view for view in views if view.url == hung.url)
    async with start_gateway(*(view for view in views if view is not stopped)) as gateway:
        asked = requests()
        wanted = await undisturbed(gateway, CHAT, asked)
        gateway.publish(*views)
        await asyncio.sleep(0.1)
        streams = [asyncio.create_task(tell(gateway, CHAT, request)) for request in asked]
        await asyncio.sleep(0.3)
        hung.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(0.5)
            seen = [
                replace(view, state=WorkerState.HUNG) if view is stopped else view for view in views
            ]
            gateway.publish(*seen)
            told = await asyncio.wait_for(asyncio.gather(*streams), 60)
        finally:
            hung.process.send_signal(signal.SIGCONT)
        for one, want in zip(told, wanted, strict=True):
            assert same(one, want)
        why = "pdcluster_gateway_retries_total" if role is Role.PREFILL else RECOVERIES
        assert await gateway.metric(why, '"hung"') >= 2
        assert await gateway.metric("pdcluster_gateway_poisonous_total") == 0
        assert gateway.is_idle


async def test_a_drained_prefill_gives_its_prompts_to_another(start_engine, start_gateway, tools):
    prefills = [start_engine(Role.PREFILL, prefill_tokens_per_s=100.0)]
    prefills.append(start_engine(Role.PREFILL))
    decode = tools.view(start_engine(Role.DECODE))
    slow, quick = (tools.view(engine, index) for index, engine in enumerate(prefills))
    async with start_gateway(slow, decode) as gateway:
        waiting = asyncio.create_task(gateway.post(CHAT, body(CHAT, max_tokens=8)))

        async def is_busy() -> bool:
            return await prefills[0].running() == 1

        await tools.eventually(is_busy)
        gateway.publish(quick, draining(slow, lets_go=True), decode)
        status, headers, _ = await waiting
        assert (status, headers["x-pdcluster-prefill"]) == (200, "prefill/1")
        assert headers["x-pdcluster-route"] == "disaggregated"
        assert await gateway.metric("pdcluster_gateway_retries_total", "drained") == 1
        assert await gateway.metric("pdcluster_gateway_engine_failures_total") == 0


async def test_a_call_that_meets_a_worker_in_its_other_role_is_answered(
    start_engine, start_gateway, tools
):
    """Two gateways, one of which has not heard yet that decode/1 is a prefill worker now: the
    engine takes both kinds of calls at any time."""
    prefill = tools.view(start_engine(Role.PREFILL))
    kept, flipped = start_engine(Role.DECODE), start_engine(Role.DECODE)
    before = (prefill, tools.view(flipped, 1))
    after = (tools.view(kept, 0), replace(tools.view(flipped, 1), role=Role.PREFILL, epoch=2))
    links = (
        Link("prefill", "decode", "nixl", 20.0, "fail"),
        Link("decode", "decode", "nixl", 20.0, "fail"),
    )
    async with start_gateway(*before) as late, start_gateway(*before) as early:
        for gateway, views in ((late, before), (early, after)):
            gateway.snapshot = replace(gateway.snapshot, links=links)
            gateway.publish(*views)

        async def is_known() -> bool:
            return await early.metric("pdcluster_gateway_snapshot_version") == 2

        await tools.eventually(is_known)
        asked = requests()
        both = await asyncio.gather(
            *(tell(late, CHAT, request) for request in asked),
            *(tell(early, CHAT, request) for request in asked),
        )
        for old, new in zip(both[:STREAMS], both[STREAMS:], strict=True):
            assert (old.decode, new.decode) == ("decode/1", "decode/0")
            assert same(new, old)
        assert await flipped.pulled_tokens() > 0
        assert await kept.pulled_tokens() > 0
