"""`watch`: what it shows in a terminal of any size, and how it leaves the terminal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace

import pytest
from ports import free_port
from rich.cells import cell_len
from rich.console import Console, Group
from served_api import Served
from watched_cluster import POOLS, WatchedCluster

from cluster.cli import watch_view
from cluster.cli.live_feed import Feed
from cluster.cli.main import run
from cluster.cli.watch_view import amount, number, seconds, sparkline
from cluster.control import wire
from cluster.control.changes import ChangeRole, Scale
from cluster.control.state import FailedSlot
from cluster.identity import Role

TOKEN = "pdctl-a-token"


def feed_of(cluster, **more):
    looked = wire.Looked(asyncio.run(cluster.live(0, 0)), asyncio.run(cluster.scaling()))
    feed = Feed()
    feed.take(replace(looked, live=replace(looked.live, **more)))
    return feed


def shown(feed, width=80, height=24, notice=""):
    """As the terminal has it."""
    console = Console(width=width, height=height or 100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(Group(*watch_view.frame(feed, width, height, notice)))
    return console.export_text()


@pytest.fixture(scope="module")
def cluster():
    found = WatchedCluster()
    found.pass_time(300)
    asyncio.run(found.ask(Scale("decode-h200", 4), "ada@ops"))
    found.pass_time(2)
    return found


@pytest.fixture(scope="module")
def feed(cluster):
    return feed_of(cluster)


def test_eighty_by_twenty_four_hold_all_that_matters(feed):
    text = shown(feed)
    lines = text.splitlines()
    assert len(lines) == 24
    assert max(cell_len(line) for line in lines) <= 80
    last = feed.last
    for figure in (
        f"p50 {seconds(last('traffic.ttft_p50_s'))}  p95 {seconds(last('traffic.ttft_p95_s'))}",
        f"p95 {seconds(last('traffic.tpot_p95_s'))}",
        f"{number(last('traffic.requests_per_s'))}/s, {number(last('gateways.running'))} running",
        f"{number(last('engines.generation_tokens_per_s'))}/s out",
        f"{amount(last('engines.bytes_per_s'))}/s, ",
        f"{number(last('engines.transfers_per_s'))} transfers/s, ",
        f"{last('engines.acceptance_length'):.2f} tokens per step",
        "12 of 13 ready",
        "decode-h200/3 loading",
        "running  scale decode-h200 from 3 to 4",
        "scale decode-h200 from 3 to 4 asked",
        "q quit",
    ):
        assert figure in text
    # Nothing of a figure was cut off.
    assert "…" not in "".join(lines[:16])


def test_every_pool_has_a_line_with_all_of_its_figures(feed):
    lines = shown(feed).splitlines()
    for name, role, _, count in POOLS:
        line = next(line.split() for line in lines if line.startswith(name) and "/" in line)
        point = feed.group(f"pool.{name}")
        wanted = 4 if name == "decode-h200" else count
        assert line[:5] == [
            *(name, role.value, f"{count}/{wanted}"),
            *(number(point["running"]), number(point["waiting"])),
        ]
        if role is Role.DECODE:
            size, unit = amount(point["bytes_per_s"]).split()
            length = f"{point['acceptance_length']:.2f}"
            held = f"{point['held_share']:.0%}"
            assert line[7:] == [length, number(point["transfers_per_s"]), size, unit, held]


@pytest.mark.parametrize(("width", "height"), [(60, 15), (80, 24), (100, 30), (200, 60), (30, 8)])
def test_any_size_is_kept_to(feed, width, height):
    lines = watch_view.frame(feed, width, height)
    assert len(lines) <= max(height, 15)
    assert all(line.cell_len <= max(width, watch_view.NARROWEST) for line in lines)


def test_more_pools_than_there_is_room_for_are_counted():
    many = tuple((f"pool-{number}", Role.DECODE, f"island-{number}", 1) for number in range(30))
    cluster = WatchedCluster(many)
    cluster.pass_time(10)
    text = shown(feed_of(cluster))
    drawn = sum(line.startswith("pool-") for line in text.splitlines())
    assert drawn >= 5
    assert f"and {30 - drawn} more pools" in text
    assert len(text.splitlines()) == 24


def test_a_wide_terminal_has_a_course_for_each_pool(feed):
    line = next(line for line in shown(feed, 130).splitlines() if line.startswith("decode-h200 "))
    assert sum(char in "▁▂▃▄▅▆▇█" for char in line) == 18


def test_what_is_not_as_wanted_is_said():
    cluster = WatchedCluster()
    cluster.pass_time(10)
    asyncio.run(cluster.ask(ChangeRole("decode-h200/0", Role.PREFILL), "ada"))
    cluster.pass_time(10)
    link = replace(
        asyncio.run(cluster.live(0, 0)).links[0], is_open=False, mismatches=("unlike KV dtypes",)
    )
    text = shown(
        feed_of(
            cluster,
            links=(link,),
            failed=(FailedSlot("decode-atlas/1", 2, 3.0, "exit code 1"),),
        )
    )
    assert "decode-h200/0 serves as prefill" in text
    assert "link prefill-h200 -> decode-h200 is closed: unlike KV dtypes" in text
    assert "decode-atlas/1 failed: exit code 1" in text
    assert "no answer" in shown(feed_of(cluster), notice="no answer; trying again").splitlines()[0]


def test_a_cluster_of_which_nothing_is_known_yet_is_drawn(feed):
    cluster = WatchedCluster()
    text = shown(feed_of(cluster))
    assert "p50 -  p95 -" in text
    assert "prefill-h200  prefill   2/2" in text


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([None, None, 1, 1], "  ██"),
        ([0, 0, 0], "▁▁▁"),
        ([], ""),
        ([None, 5, None, None], " █  "),
    ],
)
def test_a_sparkline_follows_its_values(values, drawn):
    assert sparkline(values, len(values)) == drawn


def test_a_sparkline_of_many_values_shows_the_highest_of_each_part():
    assert sparkline([0] * 50 + [8] + [0] * 49, 10) == "▁▁▁▁▁█▁▁▁▁"
    assert sparkline([1.0, 1.5, 2.0], 3, least=1.0) == "▁▅█"


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (number, 0, "0"),
        (number, 999, "999"),
        (number, 1234.0, "1.23k"),
        (number, 999_600, "1.00M"),
        (number, 0.5, "0.50"),
        (number, None, "-"),
        (seconds, 0.0384, "38.4 ms"),
        (seconds, 42.0, "42.0 s"),
        (amount, 0, "0 B"),
        (amount, 1023 * 1024, "1.00 MiB"),
        (amount, 3 * 2**40, "3072 GiB"),
    ],
)
def test_numbers_are_three_digits_and_a_unit(write, value, text):
    assert write(value) == text
    assert len(text) <= 8


# The command


def hear_ctrl_c():
    """Also where the tests run in a shell's background, whose jobs ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Ticking:
    """Time passes in the cluster while it is looked at."""

    def __init__(self, cluster):
        self.cluster = cluster

    def __getattr__(self, name):
        return getattr(self.cluster, name)

    async def live(self, since, events_after):
        self.cluster.pass_time(2)
        return await self.cluster.live(since, events_after)


@pytest.fixture(scope="module")
def url():
    cluster = WatchedCluster()
    cluster.pass_time(30)
    port = free_port()
    served = Served(Ticking(cluster), port, TOKEN)
    served.wait_until(lambda: not served.server.problem)
    yield f"http://127.0.0.1:{port}"
    served.end()


@pytest.fixture
def there(url, tmp_path, monkeypatch):
    for name in ("STATE_HOME", "RUNTIME_DIR", "CACHE_HOME"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path))
    monkeypatch.setenv("PDCLUSTER_CONTROL_URL", url)
    monkeypatch.setenv("PDCLUSTER_CONTROL_TOKEN", TOKEN)


def test_once_prints_one_plain_frame(there, capsys):
    assert run(["watch", "--once"]) == 0
    said = capsys.readouterr().out
    assert said.count("glm-5.2") == 1
    assert "decode-atlas" in said
    assert "\x1b" not in said
    assert "q quit" not in said


def test_json_has_the_newest_figures_of_pools_links_and_traffic(there, capsys):
    assert run(["watch", "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"] == "rack-1"
    assert found["traffic"]["ttft_p95_s"] > 0
    assert {pool["name"]: pool["ready"] for pool in found["pools"]} == {
        name: count for name, _, _, count in POOLS
    }
    decode = found["pools"][1]
    assert 1 < decode["acceptance_length"] <= 5
    assert 0 < decode["held_share"] < 1
    assert found["links"][0]["bytes_per_s"] > 0
    assert len(found["workers"]) == 12


def test_without_a_terminal_there_is_a_frame_each_interval_until_it_is_ended(there):
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "watch", "--interval", "0.3", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    try:
        frames = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [frame["at_s"] for frame in frames] == sorted({frame["at_s"] for frame in frames})
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (0, "")


def test_an_address_where_nobody_answers_is_an_error(there, monkeypatch, capsys):
    monkeypatch.setenv("PDCLUSTER_CONTROL_URL", f"http://127.0.0.1:{free_port()}")
    assert run(["watch", "--once"]) == 1
    assert "does not answer" in capsys.readouterr().err


class Terminal:
    """A pseudo-terminal with `watch` on it."""

    def __init__(self, width=80, height=24):
        self.process, self.fd = None, None
        self.fd, child = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(child)
        self.child = child
        self.said = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "watch", "--interval", "0.3"],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=self._take_terminal,
        )

    @staticmethod
    def _take_terminal():
        """As its controlling one: Ctrl-C there is a signal."""
        hear_ctrl_c()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, width, height):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def until(self, is_so, within_s=20.0):
        give_up_s = time.monotonic() + within_s
        while not is_so(self.said):
            assert time.monotonic() < give_up_s, self.said[-2000:]
            if select.select([self.fd], [], [], 0.2)[0]:
                self.said += os.read(self.fd, 1 << 16).decode(errors="replace")

    def press(self, key):
        os.write(self.fd, key.encode())

    def end(self):
        """Its exit code, and whether the terminal is as it was."""
        reading = threading.Event()

        def read():
            while not reading.is_set():
                if select.select([self.fd], [], [], 0.05)[0]:
                    self.said += os.read(self.fd, 1 << 16).decode(errors="replace")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            code = self.process.wait(20)
        finally:
            time.sleep(0.2)
            reading.set()
            reader.join()
            self.process.kill()
        return code, termios.tcgetattr(self.child) == self.before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self.child)


@pytest.fixture
def terminal(there):
    found = Terminal()
    yield found
    found.close()


ENTERS, LEAVES, SHOWS_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_it_leaves_the_terminal_as_it_found_it(terminal, key):
    terminal.until(lambda said: "rack-1" in said and "q quit" in said)
    assert ENTERS in terminal.said
    terminal.press(key)
    assert terminal.end() == (0, True)
    assert terminal.said.rindex(LEAVES) > terminal.said.rindex(ENTERS)
    assert SHOWS_CURSOR in terminal.said
    assert "Traceback" not in terminal.said


def test_it_draws_anew_by_itself_and_when_the_terminal_changes_its_size(terminal):
    terminal.until(lambda said: said.count("q quit") >= 3)
    terminal.said = ""
    terminal.resize(130, 40)
    terminal.until(lambda said: max(map(len, said.splitlines()), default=0) > 100)
    terminal.press("q")
    assert terminal.end() == (0, True)
