"""cluster.control.controller against fake workers, a fake store and a clock that is set by hand."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from control_world import PRINT, World, desired

from cluster.control.events import (
    DesiredChanged,
    LinkRefused,
    WorkerFoundIll,
    WorkerMoved,
    WorkerRemoved,
    WorkerUnanswering,
)
from cluster.errors import PeerGone
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Load
from cluster.traffic import Failure, GatewayReport, Standing
from cluster.transfers import TransferRecord


@pytest.fixture
async def world():
    world = World()
    await world.controller.step()
    await world.controller.apply(desired())
    await world.steps(3)
    return world


async def test_it_starts_what_is_desired_and_says_so_in_a_snapshot(world):
    assert sorted(world.workers.alive) == [WorkerId("d", 0, 1), WorkerId("p", 0, 1)]
    snapshot = await world.snapshot()
    assert {v.id.name: v.state for v in snapshot.workers} == {
        "p/0": WorkerState.READY,
        "d/0": WorkerState.READY,
    }
    assert [(link.prefill_pool, link.decode_pool) for link in snapshot.links] == [("p", "d")]
    assert snapshot.model == "simulated"


async def test_workers_are_told_the_engines_key_and_nobody_else_is(world):
    assert {spec.engine_key for spec in world.workers.spawned} == {"the engines' key"}
    assert "the engines' key" not in repr(await world.controller.status())
    assert "the engines' key" not in repr(world.workers.spawned)


async def test_a_dead_worker_is_replaced_by_the_next_generation_after_a_pause(world):
    world.workers["d/0#1"].is_dead = True
    await world.steps(2)
    assert WorkerId("d", 0, 1) not in world.workers.alive
    status = await world.controller.status()
    (failed,) = status.failed
    assert failed.worker == "d/0"
    assert failed.why == "d/0#1 is gone: the actor died"
    assert 0 < failed.restart_in_s <= 2.0
    assert WorkerId("d", 0, 2) not in world.workers.alive
    await world.steps(5)
    assert world.workers["d/0#2"].spec.role is Role.DECODE
    assert (await world.events(WorkerRemoved))[0].restart_in_s == 2.0


async def test_pauses_grow_while_a_worker_fails_again_and_again(world):
    pauses = []
    for generation in (1, 2, 3):
        world.workers[f"d/0#{generation}"].state = WorkerState.FAILED
        await world.steps(2)
        pauses.append((await world.events(WorkerRemoved))[-1].restart_in_s)
        await world.steps(40)
    assert pauses == [2.0, 4.0, 8.0]


async def test_the_last_words_of_a_failed_engine_outlive_it(world):
    handle = world.workers["p/0#1"]
    handle.state, handle.message = WorkerState.FAILED, "exit code 1"
    handle.last_words = ("ValueError: no such model",)
    await world.steps(2)
    (failed,) = (await world.controller.status()).failed
    assert failed.last_words == ("ValueError: no such model",)


async def test_a_worker_that_does_not_answer_is_not_yet_dead(world):
    world.workers["d/0#1"].is_mute = True
    await world.steps(4)
    assert WorkerId("d", 0, 1) in world.workers.alive
    assert (await world.snapshot()).worker(WorkerId("d", 0, 1)).state is WorkerState.READY
    assert len(await world.events(WorkerUnanswering)) == 1


async def test_a_worker_that_does_not_answer_for_too_long_is_replaced(world):
    world.workers["d/0#1"].is_mute = True
    await world.steps(3, each_s=31.0)
    assert WorkerId("d", 0, 1) not in world.workers.alive
    await world.steps(10)
    assert WorkerId("d", 0, 2) in world.workers.alive


async def test_a_hung_worker_is_replaced(world):
    world.workers["d/0#1"].state = WorkerState.HUNG
    await world.steps(10)
    assert sorted(world.workers.alive) == [WorkerId("d", 0, 2), WorkerId("p", 0, 1)]


async def test_every_change_of_state_is_an_event(world):
    world.workers["d/0#1"].state = WorkerState.HUNG
    await world.steps(1)
    moved = await world.events(WorkerMoved)
    assert (moved[-1].was, moved[-1].now) == (WorkerState.READY, WorkerState.HUNG)


async def test_a_new_controller_tells_of_nothing_before_it_has_looked(world):
    world.controller = world.new_controller()
    status = await world.controller.status()
    assert [report.id.name for report in status.workers] == ["d/0", "p/0"]
    assert await world.new_controller().desired() == desired()


async def test_the_same_state_again_is_no_change(world):
    before = await world.events(DesiredChanged)
    await world.controller.apply(desired())
    assert await world.events(DesiredChanged) == before


async def test_a_new_controller_adopts_the_workers_it_finds(world):
    before = await world.snapshot()
    spawned = len(world.workers.spawned)
    world.controller = world.new_controller()
    await world.steps(3)
    assert len(world.workers.spawned) == spawned
    after = await world.snapshot()
    assert [v.id for v in after.workers] == [v.id for v in before.workers]
    assert all(v.state is WorkerState.READY for v in after.workers)


async def test_the_first_snapshot_of_a_new_controller_has_the_adopted_workers(world):
    world.controller = world.new_controller()
    waiting = asyncio.create_task(world.controller.next_snapshot(0, 5.0))
    await world.steps(1)
    assert len((await waiting).workers) == 2


async def test_versions_go_on_growing_over_a_restart(world):
    before = (await world.snapshot()).version
    world.controller = world.new_controller()
    await world.steps(2)
    assert (await world.snapshot()).version > before


async def test_generations_go_on_over_a_restart(world):
    world.workers["d/0#1"].is_dead = True
    world.controller = world.new_controller()
    await world.steps(12)
    assert WorkerId("d", 0, 2) in world.workers.alive


async def test_a_restarted_controller_has_not_forgotten_that_a_slot_fails_again_and_again(world):
    for generation in (1, 2):
        world.workers[f"d/0#{generation}"].state = WorkerState.FAILED
        await world.steps(40)
    world.controller = world.new_controller()
    await world.steps(2)
    world.workers["d/0#3"].state = WorkerState.FAILED
    await world.steps(2)
    assert (await world.events(WorkerRemoved))[-1].restart_in_s == 8.0


async def test_a_change_wakes_whoever_waits_for_a_snapshot(world):
    version = (await world.snapshot()).version
    waiting = [asyncio.create_task(world.controller.next_snapshot(version, 30.0)) for _ in range(3)]
    await asyncio.sleep(0)
    world.workers["d/0#1"].state = WorkerState.DRAINING
    await world.steps(1)
    assert {s.version for s in await asyncio.gather(*waiting)} == {version + 1}


async def test_without_a_change_the_current_snapshot_comes_at_the_timeout(world):
    now = await world.snapshot()
    assert await world.controller.next_snapshot(now.version, 0.01) == now


async def test_load_alone_is_published_at_most_every_second(world):
    version = (await world.snapshot()).version
    await world.steps(4)
    for running in range(1, 9):
        world.workers["d/0#1"].load = Load(running=running)
        await world.steps(1, each_s=0.25)
    grown = (await world.snapshot()).version - version
    assert grown == 2
    assert (await world.snapshot()).worker(WorkerId("d", 0, 1)).load.running >= 5


async def test_nothing_is_published_when_nothing_changes(world):
    version = (await world.snapshot()).version
    await world.steps(20)
    assert (await world.snapshot()).version == version


async def test_fewer_replicas_drain_the_highest_first(world):
    await world.controller.apply(desired(decode=3))
    await world.steps(3)
    last = world.workers["d/2#1"]
    await world.controller.apply(desired(decode=2))
    await world.steps(4)
    assert last.stopped_with_s is not None
    assert sorted(w.name for w in world.workers.alive) == ["d/0", "d/1", "p/0"]


async def test_a_link_between_unlike_workers_is_closed_with_a_sentence():
    world = World()
    world.workers.prints = {"d": replace(PRINT, kv_dtype="bfloat16")}
    await world.controller.step()
    await world.controller.apply(desired())
    await world.steps(3)
    assert (await world.snapshot()).links == ()
    (link,) = (await world.controller.status()).links
    assert link.mismatches == (
        "p/0 cannot feed d/0: KV cache dtype is 'float32' on prefill and 'bfloat16' on decode",
    )
    assert [event.subject for event in await world.events(LinkRefused)] == ["p->d"]


async def test_transfers_are_those_of_the_request_by_time(world):
    def record(request_id, at_s):
        return TransferRecord(request_id=request_id, side="decode", outcome="pulled", at_s=at_s)

    world.workers["d/0#1"].records = [record("chat-abc-1", 2.0), record("chat-xyz-1", 1.0)]
    world.workers["p/0#1"].records = [record("chat-abc-2", 1.0)]
    found = await world.controller.transfers("abc")
    assert [r.at_s for r in found] == [1.0, 2.0]


async def test_the_log_is_that_of_the_present_generation(world):
    world.workers["d/0#1"].is_dead = True
    await world.steps(12)
    window = await world.controller.read_log("d/0", -10, 100)
    assert (window.data, window.generation) == (b"the log of d/0#2:0", 2)
    assert (await world.controller.read_log("d/0", -10, 100, 1)).data == b"the log of d/0#2:1"
    with pytest.raises(PeerGone):
        await world.controller.read_log("d/7", 0, 100)


async def test_shutdown_stops_all_workers_and_forgets_the_cluster(world):
    handles = list(world.workers.alive.values())
    await world.controller.shutdown(7.0)
    assert world.workers.alive == {}
    assert [handle.stopped_with_s for handle in handles] == [7.0, 7.0]
    assert world.store.desired() is None
    assert world.store.engine_key() == ""


async def test_nothing_starts_after_shutdown(world):
    await world.controller.shutdown(0.0)
    await world.steps(5)
    assert world.workers.alive == {}
    await asyncio.wait_for(world.controller.run(), 5)


async def test_a_state_that_comes_while_a_new_controller_reads_the_old_one_wins():
    world = World()
    world.store.put_desired(desired(decode=1))
    read = world.store.desired
    waits = threading.Event()

    def slow_read():
        found = read()
        waits.wait(5)
        return found

    world.store.desired = slow_read
    step = asyncio.create_task(world.controller.step())
    await asyncio.sleep(0.05)
    applied = asyncio.create_task(world.controller.apply(desired(decode=3)))
    await asyncio.sleep(0.05)
    waits.set()
    await asyncio.gather(step, applied)
    await world.steps(3)
    assert sum(spec.id.pool == "d" for spec in world.workers.spawned) == 3


async def test_a_new_controller_stops_with_grace_the_workers_that_it_finds(world):
    handles = list(world.workers.alive.values())
    await world.new_controller().shutdown(7.0)
    assert [handle.stopped_with_s for handle in handles] == [7.0, 7.0]
    assert world.workers.alive == {}


async def test_another_clusters_state_is_refused(world):
    other = desired().model_copy(update={"cluster": "other"})
    with pytest.raises(ValueError, match="controller of c, not other"):
        await world.controller.apply(other)


async def test_a_spawn_that_fails_is_tried_again_after_a_pause(world):
    real = world.workers.spawn

    async def broken(spec):
        raise RuntimeError("no such node")

    world.workers.spawn = broken
    await world.controller.apply(desired(decode=2))
    await world.steps(3)
    (failed,) = (await world.controller.status()).failed
    assert "no such node" in failed.why
    world.workers.spawn = real
    await world.steps(12)
    assert WorkerId("d", 1, 2) in world.workers.alive or WorkerId("d", 1, 3) in world.workers.alive


async def test_a_worker_that_fails_what_others_answer_drains_and_its_place_pauses():
    world = World()
    await world.controller.step()
    await world.controller.apply(desired(decode=2))
    await world.steps(3)

    async def two_rounds(worker: str) -> None:
        now_s = world.clock.wall_s()
        failures = tuple(
            Failure(number, "", now_s - 30.0 + number, now_s - number, True, "500: oh no")
            for number in range(5)
        )
        standings = (Standing(worker, failures=failures), Standing("d/1#1", now_s, now_s))
        await world.controller.gateway_report(
            GatewayReport("g", now_s, 1, 0, 0, standings=standings)
        )
        await world.steps(2)

    ill = world.workers["d/0#1"]
    await two_rounds("d/0#1")
    assert ill.stopped_with_s is not None
    assert WorkerId("d", 0, 1) not in world.workers.alive
    (event,) = await world.events(WorkerFoundIll)
    assert event.subject == "d/0#1"
    assert event.why.endswith("said last: 500: oh no")
    (failed,) = (await world.controller.status()).failed
    assert (failed.worker, failed.failures, failed.why) == ("d/0", 1, event.why)
    await world.steps(10)
    assert WorkerId("d", 0, 2) in world.workers.alive
    # It takes longer to find the next one ill, and its place pauses for longer.
    await two_rounds("d/0#2")
    assert [event.failures for event in await world.events(WorkerFoundIll)] == [1, 2]
    assert [event.restart_in_s for event in await world.events(WorkerRemoved)] == [1.5, 3.5]
