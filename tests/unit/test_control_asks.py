"""What is asked of a running cluster: scaling, roles, drains, rollouts; against fake workers."""

from __future__ import annotations

import asyncio

import pytest
from control_world import World, desired, serving

from cluster.control.changes import (
    Apply,
    ChangeRole,
    ChangeState,
    DrainNode,
    DrainWorker,
    ReturnNode,
    Scale,
)
from cluster.control.events import ChangeAsked, PoolsRolledBack, RoleChanged, WorkerLetGo
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.traffic import GatewayNote, GatewayReport


@pytest.fixture
async def world():
    world = World()
    await world.controller.step()
    await world.controller.apply(desired(prefill=1, decode=2))
    await world.steps(8)
    return world


async def settle(world, change, within_steps=80):
    """Steps until the change has ended."""
    for _ in range(within_steps):
        found = await world.controller.change(change.id)
        if found.state is not ChangeState.RUNNING:
            return found
        await world.steps(1)
    raise AssertionError(f"still running: {found.waits_for}")


def names(world):
    return sorted(str(worker) for worker in world.workers.alive)


async def views(world):
    return {view.id.name: view for view in (await world.snapshot()).workers}


def with_args(prefill=1, decode=2, **args):
    spec = serving(prefill=prefill, decode=decode)
    pools = [
        pool.model_copy(update={"engine_args": args}) if pool.name == "d" else pool
        for pool in spec.pools
    ]
    return spec.model_copy(update={"pools": pools})


# Scale


async def test_a_pool_grows_and_the_change_says_what_came_of_it(world):
    change = await world.controller.ask(Scale("d", 3), "ada@ops", "more load")
    assert (change.what, change.asked_by) == ("scale d from 2 to 3", "ada@ops")
    done = await settle(world, change)
    assert done.state is ChangeState.DONE
    assert "d/2#1" in names(world)
    assert any("d/2#1 started" in step.text for step in done.steps)
    ready = next(m for m in done.measures if m.what == "ready to decode")
    assert (ready.before, ready.after) == (2, 3)
    (asked,) = await world.events(ChangeAsked)
    assert (asked.asked_by, asked.why) == ("ada@ops", "more load")


async def test_a_pool_shrinks_by_draining_and_what_outlasts_its_grace_is_let_go(world):
    last = world.workers["d/1#1"]
    release = asyncio.Event()

    async def stop(grace_s):
        last.stopped_with_s = grace_s
        last.state = WorkerState.DRAINING
        await release.wait()
        last.state = WorkerState.STOPPED

    last.stop = stop
    change = await world.controller.ask(Scale("d", 1, grace_s=0.01), "ada@ops")
    await world.steps(1)
    await asyncio.sleep(0.05)
    await world.steps(1)
    assert (await views(world))["d/1"].lets_go
    assert [event.subject for event in await world.events(WorkerLetGo)] == ["d/1#1"]
    assert last.stopped_with_s > 0.01
    waiting = await world.controller.change(change.id)
    assert "d/1 (draining" in waiting.waits_for
    release.set()
    assert (await settle(world, change)).state is ChangeState.DONE
    assert names(world) == ["d/0#1", "p/0#1"]


async def test_a_report_that_was_on_its_way_does_not_bring_a_stopped_worker_back(world):
    last = world.workers["d/1#1"]
    report, answer = last.report, asyncio.Event()

    async def late_report():
        told = await report()
        await answer.wait()
        return told

    await world.controller.ask(Scale("d", 1), "ada@ops")
    last.report = late_report
    stop = last.stop

    async def slow_stop(grace_s):
        await asyncio.sleep(0.02)
        await stop(grace_s)

    last.stop = slow_stop
    looking = asyncio.create_task(world.steps(1))
    await asyncio.sleep(0.01)
    answer.set()
    await looking
    answer.clear()
    looking = asyncio.create_task(world.steps(1))
    await asyncio.sleep(0.05)
    answer.set()
    await looking
    await world.steps(4)
    assert names(world) == ["d/0#1", "p/0#1"]


async def test_what_has_no_room_is_named_and_the_wish_stays(world):
    real = world.workers.spawn

    async def unplaced(spec):
        handle = await real(spec)
        handle.state, handle.node_ip = WorkerState.STARTING, ""
        handle.message = "needs a node with CPU 4; on 10.0.0.1: CPU 1 of 8 free"
        return handle

    world.workers.spawn = unplaced
    change = await world.controller.ask(Scale("p", 3), "ada@ops")
    failed = await settle(world, change)
    assert failed.state is ChangeState.FAILED
    assert "no room for p/1, p/2: needs a node with CPU 4" in failed.why
    for name in ("p/1#1", "p/2#1"):
        world.workers[name].state, world.workers[name].node_ip = WorkerState.READY, "127.0.0.1"
    await world.steps(2)
    assert (await views(world))["p/2"].state is WorkerState.READY


async def test_an_engine_that_fails_again_and_again_ends_the_change_with_its_last_words(world):
    real = world.workers.spawn

    async def failing(spec):
        handle = await real(spec)
        handle.state, handle.message = WorkerState.FAILED, "exit code 1"
        handle.last_words = ("ValueError: bad flag",)
        return handle

    world.workers.spawn = failing
    failed = await settle(world, await world.controller.ask(Scale("p", 2), "ada@ops"))
    assert failed.state is ChangeState.FAILED
    assert "p/1 failed 2 times in a row: exit code 1; its last words: ValueError" in failed.why


@pytest.mark.parametrize("ask", [Scale("d", 3), ChangeRole("d/1", Role.PREFILL)])
async def test_failures_from_before_are_not_held_against_a_change(world, ask):
    for generation in (1, 2):
        world.workers[f"d/1#{generation}"].state = WorkerState.FAILED
        await world.steps(12)
    assert (await world.controller.status()).failed[0].failures == 2
    real = world.workers.spawn

    async def slow(spec):
        handle = await real(spec)
        handle.state = WorkerState.LOADING
        return handle

    world.workers.spawn = slow
    change = await world.controller.ask(ask, "ada@ops")
    await world.steps(3)
    for handle in world.workers.alive.values():
        handle.state = WorkerState.READY
    done = await settle(world, change)
    assert done.state is ChangeState.DONE, done.why


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (Scale("dd", 2), "pool: found dd; did you mean `d`?"),
        (Scale("d", 100), "at most 64 (replicas.max)"),
        (Scale("d", 0), "no other pool decodes"),
        (Scale("d", 1, grace_s=float("nan")), "grace_s: found nan"),
        (ChangeRole("d/7", Role.PREFILL), "there is none of this name, but: d/0, d/1, p/0"),
        (ChangeRole("d0", Role.PREFILL), "write POOL/INDEX"),
        (ChangeRole("d/0", Role.MIXED), "write prefill or decode"),
        (DrainNode("nowhere"), "Nodes with workers, or drained: 127.0.0.1, node-a"),
        (ReturnNode("node-a"), "is not drained"),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(world, ask, words):
    before = await world.controller.desired()
    with pytest.raises(InvalidInput, match=words.replace("(", r"\(").replace(")", r"\)")):
        await world.controller.ask(ask, "ada@ops")
    assert await world.controller.desired() == before
    assert await world.controller.changes() == ()


async def test_a_later_number_takes_the_place_of_an_earlier_one(world):
    first = await world.controller.ask(Scale("d", 5), "ada@ops")
    second = await world.controller.ask(Scale("d", 2), "bob@ops")
    assert (await settle(world, first)).state is ChangeState.REPLACED
    assert (await settle(world, second)).state is ChangeState.DONE


async def test_a_restarted_controller_goes_on_with_a_change(world):
    change = await world.controller.ask(Scale("d", 4), "ada@ops")
    world.controller = world.new_controller()
    await world.steps(1)
    done = await settle(world, change)
    assert done.state is ChangeState.DONE
    assert len([name for name in names(world) if name.startswith("d/")]) == 4


# Roles


async def test_a_loaded_worker_changes_its_role_without_a_new_start(world):
    worker = world.workers["d/1#1"]
    spawned = len(world.workers.spawned)
    worker.quiet.clear()
    change = await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops")
    await world.steps(2)
    between = (await views(world))["d/1"]
    assert (between.state, between.role) == (WorkerState.CHANGING, Role.DECODE)
    worker.quiet.set()
    done = await settle(world, change)
    assert done.state is ChangeState.DONE
    after = (await views(world))["d/1"]
    assert (after.state, after.role) == (WorkerState.READY, Role.PREFILL)
    assert after.epoch > between.epoch
    assert len(world.workers.spawned) == spawned
    links = {(link.prefill_pool, link.decode_pool) for link in (await world.snapshot()).links}
    assert links == {("p", "d"), ("d", "d")}
    (changed,) = await world.events(RoleChanged)
    assert (changed.was, changed.now) == (Role.DECODE, Role.PREFILL)


async def test_a_gateway_that_has_not_seen_it_yet_holds_the_flip_back(world):
    version = (await world.snapshot()).version
    await world.controller.next_snapshot(version - 1, 0.01, "gateway-1")
    await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops")
    await world.steps(3)
    shown = await world.snapshot()
    assert shown.worker(WorkerId("d", 1, 1)).state is WorkerState.CHANGING
    waiting = asyncio.create_task(world.controller.next_snapshot(shown.version, 5.0, "gateway-1"))
    await world.steps(3)
    assert (await waiting).worker(WorkerId("d", 1, 1)).role is Role.PREFILL


async def test_what_a_flip_cannot_wait_for_is_let_go(world):
    world.workers["d/1#1"].quiet.clear()
    change = await world.controller.ask(ChangeRole("d/1", Role.PREFILL, grace_s=0.02), "ada@ops")
    await world.steps(1)
    await asyncio.sleep(0.1)
    await world.steps(1)
    assert (await views(world))["d/1"].lets_go
    world.workers["d/1#1"].quiet.set()
    assert (await settle(world, change)).state is ChangeState.DONE
    assert not (await views(world))["d/1"].lets_go


async def test_a_worker_that_dies_on_its_way_is_replaced_and_serves_in_the_new_role(world):
    world.workers["d/1#1"].quiet.clear()
    change = await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops")
    await world.steps(1)
    world.workers["d/1#1"].is_dead = True
    world.workers["d/1#1"].quiet.set()
    done = await settle(world, change)
    assert done.state is ChangeState.DONE
    assert (await views(world))["d/1"].role is Role.PREFILL
    assert world.workers["d/1#2"].spec.role is Role.PREFILL


async def test_the_last_that_decodes_keeps_its_role(world):
    await settle(world, await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops"))
    with pytest.raises(InvalidInput, match="the only one ready that decodes"):
        await world.controller.ask(ChangeRole("d/0", Role.PREFILL), "ada@ops")


async def test_a_role_survives_a_restart_of_the_controller(world):
    await settle(world, await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops"))
    before = (await views(world))["d/1"]
    world.controller = world.new_controller()
    await world.steps(3)
    after = (await views(world))["d/1"]
    assert (after.role, after.state) == (Role.PREFILL, WorkerState.READY)
    assert after.epoch >= before.epoch


async def test_a_lent_worker_is_not_the_first_to_go_when_its_pool_shrinks(world):
    await settle(world, await world.controller.ask(Scale("d", 3), "ada@ops"))
    await settle(world, await world.controller.ask(ChangeRole("d/2", Role.PREFILL), "ada@ops"))
    await settle(world, await world.controller.ask(Scale("d", 2), "ada@ops"))
    assert names(world) == ["d/0#1", "d/2#1", "p/0#1"]


@pytest.mark.parametrize("ask", [Scale("d", 1), Apply(serving(prefill=1, decode=1))])
async def test_a_lent_worker_returns_where_nobody_would_decode(world, ask):
    await settle(world, await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops"))
    await settle(world, await world.controller.ask(ask, "ada@ops"))
    await world.steps(4)
    decoding = [v for v in (await world.snapshot()).workers if v.role is Role.DECODE]
    assert [view.state for view in decoding] == [WorkerState.READY]


async def test_where_engines_have_one_role_it_is_said_beforehand_and_done_by_a_new_start():
    world = World()
    await world.controller.step()
    islands = [{"name": "i", "pools": ["p", "d"], "connector": "mooncake"}]
    await world.controller.apply(desired(prefill=1, decode=2, islands=islands))
    await world.steps(8)
    with pytest.raises(InvalidInput, match="takes a new start of its engine"):
        await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada@ops")
    ask = ChangeRole("d/1", Role.PREFILL, may_restart=True)
    done = await settle(world, await world.controller.ask(ask, "ada@ops"))
    assert done.state is ChangeState.DONE
    assert names(world) == ["d/0#1", "d/1#2", "p/0#1"]
    assert world.workers["d/1#2"].spec.role is Role.PREFILL


# Drains


async def test_a_drained_worker_ends_and_its_pool_gets_another(world):
    change = await world.controller.ask(DrainWorker("d/0", grace_s=7), "ada@ops")
    old = world.workers["d/0#1"]
    assert (await settle(world, change)).state is ChangeState.DONE
    assert old.stopped_with_s >= 7
    assert names(world) == ["d/0#2", "d/1#1", "p/0#1"]


async def test_a_drained_node_is_left_one_worker_at_a_time_and_takes_none_until_returned(world):
    real = world.workers.spawn

    async def elsewhere(spec):
        handle = await real(spec)
        if "node-a" in spec.avoided_nodes:
            handle.node_id, handle.node_ip = "node-b", "127.0.0.2"
        return handle

    world.workers.spawn = elsewhere
    change = await world.controller.ask(DrainNode("127.0.0.1"), "ada@ops")
    fewest = 9
    while (found := await world.controller.change(change.id)).state is ChangeState.RUNNING:
        await world.steps(1)
        ready = [v for v in (await world.snapshot()).workers if v.takes_work]
        fewest = min(fewest, sum(view.role is Role.DECODE for view in ready))
    assert found.state is ChangeState.DONE
    assert fewest >= 2
    assert {handle.node_id for handle in world.workers.alive.values()} == {"node-b"}
    # It can be called as before, though no worker tells its address any more.
    await settle(world, await world.controller.ask(ReturnNode("127.0.0.1"), "ada@ops"))
    assert (await world.controller.desired()).drained_nodes == {}


async def test_what_found_no_room_beside_a_drained_node_starts_on_it_once_it_is_returned(world):
    real = world.workers.spawn

    async def on_node_a_only(spec):
        handle = await real(spec)
        if "node-a" in spec.avoided_nodes:
            handle.state, handle.node_id, handle.node_ip = WorkerState.STARTING, "", ""
        return handle

    world.workers.spawn = on_node_a_only
    await settle(world, await world.controller.ask(Scale("d", 1), "ada@ops"))
    await settle(world, await world.controller.ask(DrainNode("node-a"), "ada@ops"))
    assert {handle.node_id for handle in world.workers.alive.values()} == {""}
    await world.controller.ask(ReturnNode("node-a"), "ada@ops")
    await world.steps(10)
    assert [handle.node_id for handle in world.workers.alive.values()] == ["node-a"] * 2
    assert {handle.state for handle in world.workers.alive.values()} == {WorkerState.READY}


# Rollouts


async def test_new_engine_arguments_replace_the_workers_one_at_a_time(world):
    change = await world.controller.ask(Apply(with_args(x=7)), "ada@ops")
    ready_at_least = 9
    while (found := await world.controller.change(change.id)).state is ChangeState.RUNNING:
        await world.steps(1)
        states = [v.state for v in (await world.snapshot()).workers if v.id.pool == "d"]
        ready_at_least = min(ready_at_least, states.count(WorkerState.READY))
        assert len(states) <= 3
    assert found.state is ChangeState.DONE, found.why
    assert ready_at_least >= 2
    assert names(world) == ["d/0#2", "d/1#2", "p/0#1"]
    assert (await world.controller.desired()).rollout is None


async def test_without_a_surge_an_old_worker_ends_before_the_next_one_starts(world):
    ask = Apply(with_args(x=7), surge=False)
    change = await world.controller.ask(ask, "ada@ops")
    while (found := await world.controller.change(change.id)).state is ChangeState.RUNNING:
        await world.steps(1)
        assert len([name for name in names(world) if name.startswith("d/")]) <= 2
    assert found.state is ChangeState.DONE, found.why
    assert names(world) == ["d/0#2", "d/1#2", "p/0#1"]


async def test_a_rollout_whose_new_workers_fail_goes_back_by_itself(world):
    real = world.workers.spawn
    before = await world.controller.desired()

    async def failing(spec):
        handle = await real(spec)
        if spec.pool.engine_args:
            handle.state, handle.message = WorkerState.FAILED, "exit code 2"
            handle.last_words = ("error: unrecognized arguments",)
        return handle

    world.workers.spawn = failing
    change = await world.controller.ask(Apply(with_args(bad=1)), "ada@ops")
    failed = await settle(world, change)
    assert failed.state is ChangeState.FAILED
    assert "exit code 2; its last words: error: unrecognized arguments" in failed.why
    assert "all is as it was before" in failed.why
    await world.steps(10)
    assert names(world) == ["d/0#1", "d/1#1", "p/0#1"]
    assert (await world.controller.desired()).serving == before.serving
    assert len(await world.events(PoolsRolledBack)) == 1


async def test_pools_rolled_out_together_each_keep_one_of_the_old_until_each_has_a_new_one(world):
    spec = serving(prefill=1, decode=2, model={"id": "simulated", "revision": "v2"})
    slow = []
    real = world.workers.spawn

    async def slow_prefill(handle_spec):
        handle = await real(handle_spec)
        if handle_spec.id.pool == "p":
            handle.state = WorkerState.LOADING
            slow.append(handle)
        return handle

    world.workers.spawn = slow_prefill
    change = await world.controller.ask(Apply(spec), "ada@ops")
    await world.steps(25)
    assert {"d/0#1", "d/1#1", "p/0#1"} <= set(names(world))
    slow[0].state = WorkerState.READY
    done = await settle(world, change)
    assert done.state is ChangeState.DONE, done.why
    assert names(world) == ["d/0#2", "d/1#2", "p/0#2"]
    assert {view.model_revision for view in (await views(world)).values()} == {"v2"}


async def test_the_old_file_applied_in_the_middle_takes_it_back(world):
    old = (await world.controller.desired()).serving
    first = await world.controller.ask(Apply(with_args(x=7)), "ada@ops")
    await world.steps(4)
    second = await world.controller.ask(Apply(old), "ada@ops")
    done = await settle(world, second)
    assert done.state is ChangeState.DONE, done.why
    assert (await world.controller.change(first.id)).state is ChangeState.REPLACED
    assert all(not h.spec.pool.engine_args for h in world.workers.alive.values())


async def test_a_plan_says_what_would_be_done_and_what_is_refused(world):
    plan = await world.controller.plan(with_args(decode=3, x=7))
    assert [step.what for step in plan.steps] == [
        "replace 3 workers of d, one at a time",
        "scale d from 2 to 3",
    ]
    assert plan.steps[0].keys == ("pools[d].engine_args.x",)
    refused = await world.controller.plan(serving(decode=2, gateway={"port": 9000}))
    assert refused.refused[0].keys == ("gateway.port",)
    assert (await world.controller.plan(serving(decode=2))).is_empty
    longer = serving(decode=2)
    longer.pools[0] = longer.pools[0].model_copy(update={"max_model_len_tokens": 5000})
    (too_long,) = (await world.controller.plan(longer)).refused
    assert too_long.keys == ("pools[p].max_model_len_tokens",)
    with pytest.raises(InvalidInput, match=r"gateway.port: .*pdcluster up FILE"):
        await world.controller.ask(Apply(serving(decode=2, gateway={"port": 9000})), "ada@ops")


async def test_pools_come_and_go_with_a_topology(world):
    spec = serving(prefill=1, decode=2)
    extra = spec.pools[1].model_copy(update={"name": "e"})
    wider = spec.model_copy(
        update={
            "pools": [*spec.pools, extra],
            "islands": [spec.islands[0].model_copy(update={"pools": ["p", "d", "e"]})],
        }
    )
    await settle(world, await world.controller.ask(Apply(wider), "ada@ops"))
    assert "e/1#1" in names(world)
    await settle(world, await world.controller.ask(Apply(spec), "ada@ops"))
    assert names(world) == ["d/0#1", "d/1#1", "p/0#1"]


# What is told


async def test_events_are_waited_for(world):
    (last,) = (await world.controller.events(0, 0))[-1:]
    waiting = asyncio.create_task(world.controller.events(last.seq, 5.0))
    await asyncio.sleep(0)
    await world.controller.ask(Scale("d", 3), "ada@ops")
    assert next(told.kind for told in await waiting) == "ChangeAsked"
    assert await world.controller.events(10**18, 0.01) == ()


async def test_a_gateways_notes_become_events_once(world):
    note = GatewayNote(1, 0.0, "RequestPoisonous", "req-1", "two workers died of it", "req-1")
    for version in (1, 2):
        report = GatewayReport("g1", 0.0, version, running=1, queued=0, notes=(note,))
        await world.controller.gateway_report(report)
    told = [t for t in await world.controller.events(0, 0) if t.kind == "GatewayNoted"]
    assert [(t.subject, t.fields["what"]) for t in told] == [("req-1", "RequestPoisonous")]
    assert [r.snapshot_version for r in await world.controller.gateways()] == [2]
