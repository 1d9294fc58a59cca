import contextlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys

import pytest

from cluster.engines.base import PortNeed
from cluster.errors import NoCapacity
from cluster.workers.ports import DEFAULT_WINDOW, node_window, reserve, window_outside

HOST = "127.0.0.1"
HTTP = [PortNeed("http")]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "ports"


def reserve_here(folder, needs=HTTP, window=None, seed=1):
    return reserve(needs, HOST, random.Random(seed), folder=folder, window=window)


def test_a_span_is_consecutive_and_every_name_has_its_own_ports(folder):
    with reserve_here(folder, [PortNeed("http"), PortNeed("side", span=8)]) as lease:
        side = range(lease.ports["side"], lease.ports["side"] + 8)
        assert lease.ports["http"] not in side
        assert set(side) <= set(node_window())


def test_a_need_with_a_window_of_its_own_stays_in_it(folder):
    own = free_window(4)
    with reserve_here(folder, [PortNeed("http"), PortNeed("kv", 4, own)]) as lease:
        assert lease.ports["kv"] == own.start
        assert lease.ports["http"] in node_window()


def test_a_held_port_is_not_given_again_and_a_closed_one_is(folder):
    window = free_window(2)
    first = reserve_here(folder, window=window)
    second = reserve_here(folder, window=window)
    assert {first.ports["http"], second.ports["http"]} == set(window)
    with pytest.raises(NoCapacity):
        reserve_here(folder, window=window)
    first.close()
    first.close()
    with reserve_here(folder, window=window) as again:
        assert again.ports == first.ports
    second.close()


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_a_port_somebody_listens_on_is_passed_over(folder, bound):
    window = free_window(2)
    with listening(bound, window[0]), reserve_here(folder, window=window) as lease:
        assert lease.ports["http"] == window[1]


def test_a_span_goes_round_a_used_port_in_its_middle(folder):
    window = free_window(8)
    with (
        listening(HOST, window[3]),
        reserve_here(folder, [PortNeed("side", span=4)], window=window) as lease,
    ):
        assert lease.ports["side"] == window[4]


def test_when_nothing_is_free_the_error_says_what_where_and_what_to_do(folder):
    window = free_window(3)
    with pytest.raises(
        NoCapacity, match=r"4 consecutive ports are free for 'side' on 127\.0\.0\.1"
    ):
        reserve_here(folder, [PortNeed("side", span=4)], window=window)


def test_a_failed_reservation_gives_back_what_it_already_had(folder):
    window = free_window(3)
    with pytest.raises(NoCapacity):
        reserve_here(folder, [PortNeed("http"), PortNeed("side", span=3)], window=window)
    with reserve_here(folder, [PortNeed("side", span=3)], window=window) as lease:
        assert lease.ports["side"] == window.start


def test_starts_are_spread_so_that_a_restart_does_not_get_its_old_port(folder):
    ports = set()
    for seed in range(10):
        with reserve_here(folder, seed=seed) as lease:
            ports.add(lease.ports["http"])
    assert len(ports) >= 9


def _take(folder, window, barrier, results):
    barrier.wait()
    lease = reserve(
        [PortNeed("a", span=2), PortNeed("b")],
        HOST,
        random.Random(7),
        folder=folder,
        window=window,
    )
    results.put(dict(lease.ports))
    barrier.wait()  # all hold theirs at the same time


def test_processes_that_race_never_get_the_same_port(folder):
    count = 6
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.Queue()
    window = DEFAULT_WINDOW[5_000:5_100]
    takers = [
        context.Process(target=_take, args=(folder, window, barrier, results), daemon=True)
        for _ in range(count)
    ]
    for taker in takers:
        taker.start()
    taken = [results.get(timeout=30) for _ in takers]
    for taker in takers:
        taker.join(30)
    ports = [port for ports in taken for port in (ports["a"], ports["a"] + 1, ports["b"])]
    assert len(set(ports)) == 3 * count


def test_a_killed_holder_frees_its_port_and_a_child_does_not_keep_it(folder):
    window = free_window(1)
    code = (
        "import os, random, subprocess, sys, time; from pathlib import Path\n"
        "from cluster.workers.ports import reserve; from cluster.engines.base import PortNeed\n"
        f"reserve([PortNeed('http')], {HOST!r}, random.Random(), folder=Path({str(folder)!r}),"
        f" window=range({window.start}, {window.stop}))\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child_pid = int(holder.stdout.readline())
    try:
        with pytest.raises(NoCapacity):
            reserve_here(folder, window=window)
        holder.kill()
        holder.wait()
        os.kill(child_pid, 0)  # it lives, and has no share in the lock
        reserve_here(folder, window=window).close()
    finally:
        os.kill(child_pid, 9)


@pytest.mark.parametrize(
    ("ephemeral", "window"),
    [
        (range(32_768, 61_000), DEFAULT_WINDOW),
        (range(25_000, 61_000), range(20_000, 25_000)),
        (range(10_000, 19_000), DEFAULT_WINDOW),
        (range(1_024, 30_001), range(30_001, 65_536)),
        (range(16_384, 65_536), range(1_024, 16_384)),
        (range(1_024, 65_536), DEFAULT_WINDOW),
    ],
)
def test_the_window_keeps_out_of_the_ephemeral_range_where_it_can(ephemeral, window):
    assert window_outside(ephemeral) == window


@contextlib.contextmanager
def listening(host, port):
    with contextlib.closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        yield


def free_window(size):
    """A run of ports that nobody uses, for tests that need an exact window."""
    for start in range(DEFAULT_WINDOW.start + os.getpid() % 5_000, DEFAULT_WINDOW.stop, size):
        window = range(start, start + size)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in window:
                stack.enter_context(listening("0.0.0.0", port))
            return window
    raise AssertionError("no free ports at all")
