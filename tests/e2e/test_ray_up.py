"""Ray's own `ray up` and `ray down` over unlike hosts, made of namespaces: first Ray alone, then
with real engines that hand KV from host to host.

The tests of each part run in their order on one cluster, as its life goes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.hosts_rack import (
    ATLAS,
    CLUSTER,
    CPU,
    H200,
    HEAD,
    OPERATOR,
    OTHER_SPARE,
    SPARE,
    Hosts,
    Rack,
    address,
    hosts_up,
    rack,
    wait_for,
)
from e2e.streams import Crowd, Told, asks, compare, pauses

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ALL = (OPERATOR, HEAD, H200, ATLAS, CPU, SPARE, OTHER_SPARE)
BARE = {"h200": [H200], "atlas-a3": [ATLAS], "spare": [SPARE]}
SERVING = {"h200": [H200], "atlas-a3": [ATLAS], "cpu": [CPU], "spare": [SPARE]}


def nothing_left(hosts: Hosts) -> dict[int, list[str]]:
    return {host: left for host in ALL if (left := hosts.left(host))}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    # Not pytest's own folder: every host sees this one under the same short name.
    shared = Path("/tmp/pdcluster-e2e-hosts")
    shared.mkdir(mode=0o755, exist_ok=True)
    for file in shared.iterdir():
        file.unlink()
    with hosts_up("pde2e", shared, len(ALL)) as made:
        yield made
    for file in shared.iterdir():
        file.unlink()
    shared.rmdir()


# Ray alone: hosts that fail, operators that collide, a head that dies


@pytest.fixture(scope="module")
def bare(hosts: Hosts) -> Rack:
    made = Rack(hosts, hosts.shared / "bare.yaml")
    made.write(rack(BARE, serving=False))
    return made


def test_up_after_an_up_that_was_killed_half_way_names_a_silent_host_and_brings_up_the_rest(
    bare: Rack,
) -> None:
    bare.hosts.tool("deaf", str(ATLAS))
    first = subprocess.Popen(
        bare.hosts.command(OPERATOR, "ray", "up", "-y", str(bare.file)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: bare.hosts.pids(HEAD, "gcs_server") or None, 60, "Ray begins on the head")
    bare.hosts.run(OPERATOR, "pkill", "-KILL", "-f", "ray up -y")
    first.wait(10)
    said = bare.ray_up()
    assert f"host {address(ATLAS)} does not answer: ssh: connect to host" in said
    assert "Connection refused" in said
    nodes = bare.await_nodes(HEAD, H200, SPARE)
    assert nodes[address(H200)]["Resources"]["GPU"] == 8


def test_a_host_that_answers_later_joins_by_itself(bare: Rack) -> None:
    bare.hosts.tool("sshd", str(ATLAS))
    nodes = bare.await_nodes(HEAD, H200, ATLAS, SPARE)
    assert nodes[address(ATLAS)]["Resources"]["NPU"] == 16
    assert nodes[address(ATLAS)]["Labels"]["ray.io/accelerator-type"] == "Ascend910_93"
    assert nodes[address(H200)]["Labels"]["ray.io/accelerator-type"] == "H200"


def test_a_second_operator_is_told_who_is_at_work(bare: Rack) -> None:
    code = (
        "import sys; from cluster.nodes.operator_lock import OperatorLock; "
        "from cluster.nodes.ssh import Host; "
        f"OperatorLock(Host('{address(HEAD)}', 'root', key='~/.ssh/id_ed25519'), '{CLUSTER}')"
        ".acquire(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        bare.hosts.command(OPERATOR, "python3", "-c", code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for said in (bare.ray_up(check=False), bare.ray_down(check=False).stderr):
            assert f"Error: another operator is at work on cluster {CLUSTER}: root on host0" in said
            assert "Traceback" not in said
        assert len(bare.nodes()) == 4
        holder.stdin.close()


def test_down_ends_every_host_also_when_the_head_is_dead(bare: Rack) -> None:
    bare.hosts.run(HEAD, "pkill", "-KILL", "-x", "gcs_server|raylet")
    # Somebody else's, on one of the hosts: it stays, and nothing else.
    bare.hosts.run(H200, "sh", "-c", "sleep 300 >/dev/null 2>&1 &")
    bare.ray_down()
    assert nothing_left(bare.hosts) == {H200: ["sleep 300"]}
    bare.hosts.run(H200, "pkill", "-x", "sleep")


# with engines


@pytest.fixture(scope="module")
def up(hosts: Hosts) -> Rack:
    """The rack, up, and its three engines ready. `hosts` ends it with its hosts."""
    made = Rack(hosts, hosts.shared / "rack.yaml")
    made.write(rack(SERVING, serving=True))
    made.ray_up()

    def ready() -> bool | None:
        states = [worker["state"] for worker in made.workers().values()]
        if "failed" in states:
            pytest.fail(f"a worker failed: {made.status()}")
        return True if states == ["ready"] * 3 else None

    wait_for(ready, 240, "three engines ready")
    return made


def test_requests_are_answered_across_hosts_with_kv_moving_between_them(up: Rack) -> None:
    workers = up.workers()
    assert workers["prefill/0"]["node_ip"] == address(H200)
    assert workers["decode-atlas/0"]["node_ip"] == address(ATLAS)
    assert workers["decode-cpu/0"]["node_ip"] == address(CPU)
    answers = [up.chat("What is the capital of France?")]
    answers += [up.chat(f"Name {number} rivers, please.") for number in (2, 3)]
    assert "Paris" in answers[0]["text"]
    assert {answer["route"] for answer in answers} == {"disaggregated"}
    assert {answer["prefill"] for answer in answers} == {"prefill/0"}
    for answer in answers:
        done = up.pdcluster("transfers", answer["request_id"], "--topology", str(up.file), "--json")
        (pulled,) = [r for r in json.loads(done.stdout) if r["outcome"] == "pulled"]
        assert pulled["tokens_pulled"] == answer["usage"]["prompt_tokens"]
        assert pulled["bytes_pulled"] > 0


def test_status_logs_and_chat_work_from_the_operators_host(up: Rack) -> None:
    assert up.status()["cluster"] == CLUSTER
    log = up.pdcluster("logs", "decode-cpu/0", "--topology", str(up.file), "-n", "2000").stdout
    assert "Application startup complete" in log
    refused = up.hosts.run(OPERATOR, "pdcluster", "status", str(up.file), check=False)
    assert refused.returncode != 0
    assert "PDCLUSTER_CONTROL_TOKEN" in refused.stderr


def test_up_again_and_a_changed_file_leave_alone_what_has_not_changed(up: Rack) -> None:
    def standing() -> dict[str, Any]:
        raylets = {host: up.hosts.pids(host, "raylet") for host in (HEAD, H200, ATLAS, CPU)}
        return raylets | {n: (w["generation"], w["engine_pid"]) for n, w in up.workers().items()}

    before = standing()
    spare = up.hosts.pids(SPARE, "raylet")
    assert "nothing to do" in up.ray_up()
    assert standing() == before
    assert up.hosts.pids(SPARE, "raylet") == spare != []
    up.write(rack({**SERVING, "spare": [OTHER_SPARE]}, serving=True))
    said = up.ray_up()
    assert f"{address(SPARE)} leaves: it is no host of spare any more" in said
    up.await_nodes(HEAD, H200, ATLAS, CPU, OTHER_SPARE)
    assert up.hosts.left(SPARE) == []
    assert standing() == before
    assert up.chat("Say yes.")["route"] == "disaggregated"


# hosts and networks that fail under requests; `crowd` sends ten of them from the operator's host


@pytest.fixture(scope="module")
def crowd(up: Rack) -> Callable[[], Crowd]:
    key = up.hosts.run(HEAD, "cat", f".local/state/pdcluster/{CLUSTER}/api-key").stdout.strip()
    salts = itertools.count()

    def send() -> Crowd:
        salt = f"rack{next(salts)}"
        return Crowd(lambda: up.hosts.connect(OPERATOR, HEAD, 8000), key, asks(tokens=40), salt)

    return send


@pytest.fixture(scope="module")
def undisturbed(crowd: Callable[[], Crowd]) -> list[Told]:
    """What the ten are answered when nothing is wrong."""
    with crowd() as sent:
        told = sent.told()
    assert {one.decode for one in told} == {"decode-atlas/0", "decode-cpu/0"}
    assert not [one.failure for one in told if one.failure]
    return told


def gone(up: Rack, worker: str) -> bool | None:
    return up.workers().get(worker, {}).get("state") != "ready" or None


def test_hosts_that_cannot_pull_from_prefill_lose_no_request_and_pull_again_by_themselves(
    up: Rack, crowd: Callable[[], Crowd], undisturbed: list[Told]
) -> None:
    # Packets from decode arrive at prefill's host, and nothing comes back: a link cut without a
    # word. Both hosts and the head still hear each other.
    cut = ("ip", "route", "add", "blackhole", address(ATLAS))
    with crowd() as sent:
        sent.begun()
        up.hosts.run(H200, *cut)
        try:
            with crowd() as later:
                compare(later, undisturbed)
            compare(sent, undisturbed)
        finally:
            up.hosts.run(H200, *(word.replace("add", "del") for word in cut))
    healed_s = time.monotonic()
    print(f"while it was cut: {_routes(later.live)}")

    def pull_again() -> bool | None:
        """An engine that cannot is replaced by itself; requests go on meanwhile."""
        with crowd() as sent:
            told = compare(sent, undisturbed)
        print(f"{time.monotonic() - healed_s:.0f} s after: {_routes(told)}")
        are_whole = {one.route for one in told} == {"disaggregated"}
        both = {one.decode for one in told} == {"decode-atlas/0", "decode-cpu/0"}
        return (are_whole and both) or None

    try:
        wait_for(pull_again, 200, "both decode engines pull again")
    finally:
        lost = ("WorkerFoundIll", "WorkerRemoved")
        print([event["text"] for event in up.status()["events"] if event["kind"] in lost])
        print({name: worker["generation"] for name, worker in up.workers().items()})

    def nothing_pinned() -> bool | None:
        workers = up.workers().values()
        pinned = [(w["counters"]["leases_open"], w["load"]["kv_usage"]) for w in workers]
        return all(pair == (0, 0) for pair in pinned) or None

    wait_for(nothing_pinned, 90, "no block is pinned")


def _routes(told: list[Told]) -> str:
    routes = Counter(f"{one.decode} {one.route}" for one in told)
    longest_s = max(one.came_s[-1] - one.sent_s for one in told)
    return f"{dict(routes)}, the longest took {longest_s:.1f} s"


def test_a_host_killed_in_mid_traffic_loses_no_request_and_serves_again_once_it_is_back(
    up: Rack, crowd: Callable[[], Crowd], undisturbed: list[Told]
) -> None:
    with crowd() as sent:
        broken = sent.streaming("decode-cpu/0")
        killed_s = time.monotonic()
        up.hosts.tool("kill", str(CPU))
        compare(sent, undisturbed)
    print(pauses(sent, broken, killed_s))
    wait_for(lambda: gone(up, "decode-cpu/0"), 60, "its worker is missed")

    def is_silent() -> bool:
        return address(CPU) in {host["address"] for host in up.status()["silent_hosts"]}

    wait_for(lambda: is_silent() or None, 60, "status shows that the host is silent")
    up.hosts.tool("boot", str(CPU))

    def serves() -> bool | None:
        return up.workers().get("decode-cpu/0", {}).get("state") == "ready" or None

    wait_for(serves, 150, "the host serves again")
    assert not is_silent()
    with crowd() as sent:
        told = compare(sent, undisturbed)
    assert {one.decode for one in told} == {"decode-atlas/0", "decode-cpu/0"}


def test_a_host_cut_off_in_mid_traffic_leaves_and_its_streams_go_on_with_those_that_remain(
    up: Rack, crowd: Callable[[], Crowd], undisturbed: list[Told]
) -> None:
    with crowd() as sent:
        broken = sent.streaming("decode-cpu/0")
        cut_s = time.monotonic()
        up.hosts.tool("cut", str(CPU))
        wait_for(lambda: gone(up, "decode-cpu/0"), 90, "its worker leaves the snapshot")
        gone_s = time.monotonic()
        compare(sent, undisturbed)
        with crowd() as later:
            told = compare(later, undisturbed)
    assert {one.decode for one in told} == {"decode-atlas/0"}
    print(f"gone after {gone_s - cut_s:.1f} s; {pauses(sent, broken, cut_s)}")


def test_down_leaves_nothing_on_any_host_also_on_one_that_was_cut_off(up: Rack) -> None:
    refused = up.ray_down(check=False)
    assert refused.returncode != 0
    assert f"{address(CPU)}: ssh: connect to host" in refused.stderr
    up.hosts.tool("join", str(CPU))
    up.ray_down()
    assert nothing_left(up.hosts) == {}
