"""Real engines that are killed, stopped and starved while requests run: clients notice nothing.

One cluster for the module: a prefill and two decode engines on one machine, two gateway replicas.
Ten greedy requests run during each fault and are compared, token by token, with what the same
requests got undisturbed; what stays behind is looked at last. The tests are ordered so that an
engine that one of them has killed starts again while the next one runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

import psutil
import pytest
from e2e import faults
from e2e.faults import Footprint, engine_core, family, frozen, wait_until
from e2e.harness import Cluster, http_json, metric, pdcluster, running_cluster
from e2e.streams import Ask, Crowd, Told, asks, compare, pauses, to_port

from cluster.workers.health import detection_bound_s

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HUNG_AFTER_S, STOPPED_S, LEASE_S = 20.0, 5.0, 15.0
PREFILL, DECODE, OTHER = ENGINES = ("prefill/0", "decode/0", "decode/1")
STARTED_WITHIN_S = 150.0
# How long the cluster's controller takes to see what a worker says of itself, and a test to see
# it there.
SEEN_WITHIN_S = 4.0


def edit(serving: dict[str, Any]) -> None:
    for pool in serving["pools"]:
        pool["max_batched_tokens"] = 256  # a step of a long prefill takes about a second
    serving["pools"][1]["replicas"] = 2
    serving["islands"][0]["lease_s"] = LEASE_S
    serving["gateway"]["replicas"] = 2
    serving["health"] = {"hung_after_s": HUNG_AFTER_S}


@dataclass
class Arena:
    """The cluster, what it answers when nothing is wrong, and what it holds then."""

    cluster: Cluster
    undisturbed: list[Told] = field(default_factory=list)
    long_undisturbed: list[Told] = field(default_factory=list)
    at_rest: Footprint | None = None
    _salts: Iterator[int] = field(default_factory=itertools.count)

    def crowd(self, asked: Sequence[Ask]) -> Crowd:
        connect = to_port(int(self.cluster.base_url.rpartition(":")[2]))
        return Crowd(connect, self.cluster.key, asked, f"crowd{next(self._salts)}")

    def worker(self, name: str) -> dict[str, Any]:
        return self.cluster.workers()[name]

    def has_gone(self, victim: dict[str, Any]) -> bool:
        """Whether it is there no more; the next one comes after a pause."""
        return victim["id"] not in [now["id"] for now in self.cluster.workers().values()]

    def is_ready(self, *names: str) -> bool:
        workers = self.cluster.workers()
        return all(name in workers and workers[name]["state"] == "ready" for name in names)

    def await_ready(self, *names: str) -> None:
        wait_until(lambda: self.is_ready(*names), STARTED_WITHIN_S, f"{names} are ready")

    def kept(self, crowd: Crowd) -> list[int]:
        """Requests whose blocks prefill has ready and decode has not taken."""
        found = []
        for index in range(len(crowd.asked)):
            query = f"transfers?request_id={crowd.request_id(index)}"
            records = self.cluster.control(query)["transfers"]
            outcomes = {record["outcome"] for record in records}
            if "granted" in outcomes and not outcomes & {"taken", "pulled", "held"}:
                found.append(index)
        return found

    def compare(self, crowd: Crowd, undisturbed: Sequence[Told] | None = None) -> list[Told]:
        """The answers, every one as it was undisturbed."""
        return compare(crowd, self.undisturbed if undisturbed is None else undisturbed)

    def takers(self) -> tuple[set[str], set[str]]:
        """Who prefills and who decodes, over several crowds: a gateway gives the first requests
        after a change to whoever was least loaded when it last heard."""
        told = []
        for _ in range(3):
            with self.crowd(asks(tokens=8)) as crowd:
                told += crowd.told()
        assert not [one.failure for one in told if one.failure]
        return {one.prefill for one in told}, {one.decode for one in told}

    def gateway_metric(self, name: str) -> float:
        """Of whichever replica takes the connection."""
        with faults.opened(f"{self.cluster.base_url}/metrics") as answer:
            return metric(answer.read().decode(), name)


def engine_metric(worker: dict[str, Any], name: str) -> float:
    with faults.opened(f"{worker['url']}/metrics") as answer:
        return metric(answer.read().decode(), name)


def long_asks() -> list[Ask]:
    """The first three requests, with prompts that take seconds to prefill."""
    return asks(words=400, tokens=24)[:3]


@pytest.fixture(scope="module")
def arena(private_state: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with running_cluster("local-cpu.yaml", tmp_path_factory.mktemp("failures"), edit) as cluster:
        made = Arena(cluster)
        made.await_ready(*ENGINES)
        with made.crowd(asks()) as crowd, made.crowd(long_asks()) as long:
            made.undisturbed, made.long_undisturbed = crowd.told(), long.told()
        told = made.undisturbed
        assert not [one.failure for one in (*told, *made.long_undisturbed) if one.failure]
        assert {one.prefill for one in told} == {PREFILL}
        assert [one.usages[0][1] for one in told] == [64] * 10
        assert [len(one.token_ids) for one in told if one.token_ids] == [64] * 6
        assert len({one.text for one in told}) == 10
        made.at_rest = faults.footprint(cluster.name)
        yield made


def test_one_process_within_an_engine_killed_is_seen_and_the_engine_replaced(arena: Arena) -> None:
    with arena.crowd(asks()) as crowd:
        name = crowd.busiest(DECODE, OTHER)
        victim = arena.worker(name)
        broken = crowd.streaming(name)
        fault_s = time.monotonic()
        engine_core(victim["engine_pid"]).kill()
        arena.compare(crowd)
    print(pauses(crowd, broken, fault_s))
    wait_until(lambda: arena.has_gone(victim), 30, "it is gone")
    arena.await_ready(name)


def test_the_controller_killed_in_mid_traffic_is_missed_by_nobody_and_finds_its_workers_again(
    arena: Arena,
) -> None:
    before = arena.cluster.workers()
    with arena.crowd(asks()) as crowd:
        crowd.begun()
        (controller,) = faults.listeners(arena.cluster.control_port)
        psutil.Process(controller).kill()
        with arena.crowd(asks()[:4]) as later:  # nobody is there to tell of the cluster
            arena.compare(later)
        arena.compare(crowd)

    def has_adopted() -> bool:
        if faults.listeners(arena.cluster.control_port) in ([], [controller]):
            return False
        after = arena.cluster.workers()
        return {n: w["id"] for n, w in after.items()} == {n: w["id"] for n, w in before.items()}

    wait_until(has_adopted, 60, "another controller has the same workers, the starting one too")
    after = arena.cluster.workers()
    for name in (PREFILL, DECODE):
        assert after[name]["engine_pid"] == before[name]["engine_pid"]


def test_a_gateway_replica_killed_takes_its_own_streams_only_and_comes_back(arena: Arena) -> None:
    port = int(arena.cluster.base_url.rpartition(":")[2])
    replicas = faults.listeners(port)
    assert len(replicas) == 2
    with arena.crowd(asks()) as crowd:
        crowd.begun()
        held = faults.holders(port)
        served = [held.get(own_port) for own_port in crowd.ports]
        victim = min(replicas, key=served.count)
        assert served.count(victim) < len(served)
        psutil.Process(victim).kill()
        # Until its socket is closed the kernel gives it connections, and breaks them then.
        wait_until(lambda: victim not in faults.listeners(port), 30, "it listens no more")
        with arena.crowd(asks()[:4]) as later:
            arena.compare(later)
        told = crowd.told()
    for one, wanted, pid in zip(told, arena.undisturbed, served, strict=True):
        if pid != victim:
            assert not one.unlike(wanted)
        elif one.failure:
            # What came of it was right, and that it is not all is plain to see.
            assert wanted.text.startswith(one.text)
            assert not one.is_done
            assert not one.finishes
    print(f"of {len(told)} requests the killed replica had {served.count(victim)}")
    wait_until(lambda: len(faults.listeners(port)) == 2, 60, "two replicas again")
    with arena.crowd(asks()) as crowd:
        arena.compare(crowd)


def test_a_decode_engine_killed_before_the_first_token_and_in_mid_stream_loses_nothing(
    arena: Arena,
) -> None:
    arena.await_ready(*ENGINES)
    with arena.crowd(asks()) as crowd:
        name = crowd.busiest(DECODE, OTHER)
        (other,) = {DECODE, OTHER} - {name}
        processes = family(arena.worker(name)["engine_pid"])
        broken = crowd.streaming(name, at_least=1)
        with frozen(processes):
            # As many again, so that some go to the stopped engine however loads are.
            with arena.crowd(asks()) as early:
                # What is to go to the stopped engine is prefilled, and waits to be pulled.
                wait_until(lambda: arena.kept(early), 60, f"a request waits for {name}")
                waiting = arena.kept(early)
                fault_s = time.monotonic()
                processes[0].kill()
                told = arena.compare(early)
            arena.compare(crowd)
    assert {told[index].decode for index in waiting} == {other}
    firsts = [told[index].came_s[0] - fault_s for index in waiting]
    print(
        f"{pauses(crowd, broken, fault_s)}; {len(waiting)} that had not begun did after "
        f"{', '.join(f'{first_s:.2f}' for first_s in firsts)} s"
    )


def test_a_prefill_engine_killed_before_during_and_after_its_prefill_loses_nothing(
    arena: Arena,
) -> None:
    arena.await_ready(PREFILL, OTHER)
    victim = arena.worker(PREFILL)
    with contextlib.ExitStack() as stopped:
        stopped.enter_context(frozen(family(arena.worker(OTHER)["engine_pid"])))
        with arena.crowd(asks()) as crowd:
            wait_until(lambda: len(arena.kept(crowd)) >= 2, 60, "prefilled, not pulled")
            with arena.crowd(long_asks()) as long:
                running = "vllm:num_requests_running"
                wait_until(lambda: engine_metric(victim, running) > 0, 30, "it prefills")
                after = arena.kept(crowd)
                assert not any(one.came_s for one in long.live)
                psutil.Process(victim["engine_pid"]).kill()
                with arena.crowd(asks()[:3]) as before:  # the cluster does not know yet
                    stopped.close()
                    arena.compare(before)
                arena.compare(long, arena.long_undisturbed)
            told = arena.compare(crowd)
    assert after
    routes = {told[index].route for index in after}
    print(f"prefilled and not pulled: {len(after)}, then answered by way of {routes}")


def test_an_engine_that_hangs_behind_a_server_that_answers_is_found_and_its_streams_move(
    arena: Arena,
) -> None:
    arena.await_ready(DECODE, OTHER)
    with arena.crowd(asks()) as crowd:
        name = crowd.busiest(DECODE, OTHER)
        victim = arena.worker(name)
        stuck = crowd.streaming(name)
        with frozen([engine_core(victim["engine_pid"])]):
            fault_s = time.monotonic()
            faults.opened(f"{victim['url']}/metrics").close()  # its server answers
            bound_s = detection_bound_s(HUNG_AFTER_S) + SEEN_WITHIN_S

            def is_found() -> bool:
                return arena.has_gone(victim) or arena.worker(name)["state"] == "hung"

            wait_until(is_found, bound_s, "the hung engine is found")
            found_s = time.monotonic()
            arena.compare(crowd)
    print(f"found after {found_s - fault_s:.1f} s; then {pauses(crowd, stuck, found_s)}")
    events = arena.cluster.control("status")["events"]
    assert any(e["kind"] == "WorkerMoved" and "hung" in json.dumps(e) for e in events)


def test_an_engine_that_is_stopped_for_a_while_is_left_alone_and_its_streams_finish(
    arena: Arena,
) -> None:
    arena.await_ready(DECODE)
    with arena.crowd(asks()) as crowd:
        name = crowd.busiest(DECODE, OTHER)
        before = arena.worker(name)
        stopped = crowd.streaming(name)
        with frozen(family(before["engine_pid"])):
            time.sleep(STOPPED_S)
        arena.compare(crowd)
    assert any(one.longest_gap_s() > STOPPED_S - 1 for one in stopped)
    after = arena.worker(name)
    assert (after["id"], after["state"]) == (before["id"], "ready")


def test_an_engine_without_memory_is_killed_by_the_kernel_and_loses_nothing(arena: Arena) -> None:
    arena.await_ready(DECODE, OTHER)
    with arena.crowd(asks()) as crowd:
        name = crowd.busiest(DECODE, OTHER)
        victim = arena.worker(name)
        broken = crowd.streaming(name)
        processes = family(victim["engine_pid"])
        with faults.memory_limit([process.pid for process in processes], 1 << 20):
            fault_s = time.monotonic()
            with contextlib.suppress(
                OSError, HTTPException
            ):  # more than it may have: nobody answers
                url, key = f"{victim['url']}/v1/completions", arena.cluster.engine_key
                http_json(url, {"prompt": "much " * (1 << 22)}, key, timeout_s=30)
        arena.compare(crowd)
    wait_until(lambda: arena.has_gone(victim), 30, "it is gone")
    print(pauses(crowd, broken, fault_s))
    (said,) = [
        slot["why"] for slot in arena.cluster.control("status")["failed"] if slot["worker"] == name
    ]
    assert "out of memory" in said, said
    print(said)


def test_a_loaded_engine_changes_its_role_and_back_under_traffic(arena: Arena) -> None:
    arena.await_ready(*ENGINES)
    before = arena.worker(DECODE)
    for role in ("prefill", "decode"):
        with arena.crowd(asks()) as crowd:
            crowd.begun()
            said = json.loads(
                pdcluster("role", DECODE, role, "--cluster", arena.cluster.name, "--json").stdout
            )
            arena.compare(crowd)
        assert said["state"] == "done", said
        if role == "prefill":
            assert arena.takers() == ({PREFILL, DECODE}, {OTHER})
        else:
            assert arena.takers() == ({PREFILL}, {DECODE, OTHER})
        after = arena.worker(DECODE)
        assert (after["id"], after["engine_pid"]) == (before["id"], before["engine_pid"])
        print(f"to {role}: {said['took_s']:.2f} s; {said['measures']}")


def test_decode_scaled_down_and_up_again_under_traffic_fails_no_request(arena: Arena) -> None:
    for replicas in (1, 2):
        with arena.crowd(asks()) as crowd:
            crowd.begun()
            said = json.loads(
                pdcluster(
                    *("scale", "decode", str(replicas), "--cluster", arena.cluster.name),
                    *("--grace", "2", "--json"),
                ).stdout
            )
            arena.compare(crowd)
        assert said["state"] == "done", said
        print(f"to {replicas}: {said['took_s']:.1f} s")
    arena.await_ready(*ENGINES)
    assert arena.takers() == ({PREFILL}, {DECODE, OTHER})


def test_nothing_stays_behind_of_all_that(arena: Arena) -> None:
    arena.await_ready(*ENGINES)

    def is_idle() -> bool:
        workers = arena.cluster.workers()
        return all(
            engine_metric(worker, "vllm:kv_cache_usage_perc") == 0
            and engine_metric(worker, "vllm:num_requests_running") == 0
            and worker["counters"]["leases_open"] == 0
            for worker in workers.values()
        )

    wait_until(is_idle, 2 * LEASE_S, "no block is pinned")
    # Whichever replica answers.
    for _ in range(8):
        assert arena.gateway_metric("pdcluster_gateway_requests_running") == 0
        assert arena.gateway_metric("pdcluster_kv_leases_open") == 0
    wait_until(
        lambda: faults.footprint(arena.cluster.name) == arena.at_rest, 30, "all is as it was"
    )
