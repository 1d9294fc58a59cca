"""Every panel of every board against a real Prometheus beside real engines.

One cluster of topologies/local-glm-mtp.yaml: chats of several turns, streams, a request that is
refused, a scale, two changes of role, an engine killed in mid stream, a scale back. What `pdcluster
dashboards verify` then says is held against what has happened. Nothing may be without data.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from e2e.faults import wait_until
from e2e.harness import Cluster, filler, pdcluster, running_cluster
from live_prometheus import Prometheus
from ports import free_port

from cluster.launcher.prometheus import PROGRAM
from cluster.models.tiny_glm import ID
from cluster.observe import catalogue
from cluster.observe.dashboards.files import BOARDS
from cluster.observe.dashboards.panel import Unit
from cluster.observe.dashboards.variables import EVENTS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which(PROGRAM) is None,
        reason=f"the program {PROGRAM} is not installed (Debian's package: prometheus)",
    ),
]

DRAFTS = 3  # as the topology has it
CHATS, TURNS = 3, 3
STREAMS = 6
STREAM_TOKENS = 1200
BEGUN_PIECES = 5
STARTED_WITHIN_S = 180
# Scrapes and rules are 5 s apart, each.
SEEN_WITHIN_S = 60
ROUNDING = 1e-6
ANSWERS = f'{catalogue.REQUESTS.name}{{endpoint=~"/v1/.*completions"}}'
CHANGES = catalogue.CHANGES.name
ANSWERED = 3 * CHATS * TURNS + STREAMS
# One more is ready than wanted while it drains.
MAY_BE_NEGATIVE = {"How many replicas are missing?"}
EXPECTED = [
    ("How much of the TTFT target is used?", 0.0, 60.0),
    ("How much of the TPOT target is used?", 0.0, 60.0),
    ("Are requests answered?", 0.99, 1.0),
    ("What share of prompts does decode hold already?", 0.05, 1.0),
    ("How many tokens go in and come out?", 1.0, 1e5),
    ("How many answers went on elsewhere?", 0.0, STREAMS),
    ("What goes wrong?", 0.0, STREAMS),
    ("How many bytes move per second?", 1000.0, 1e9),
    ("How many bytes does each link carry?", 1000.0, 1e9),
    ("What share of blocks need not move?", 0.05, 1.0),
    ("How many blocks are pulled, and how many skipped?", 0.0, 1e4),
    ("Do transfers end well?", 0.5, 1.0),
    ("How many tokens does a draft propose?", DRAFTS - 0.1, DRAFTS + 0.1),
    ("How many replicas are missing?", 0.9, 2.0),
    ("How many workers failed in the time shown?", 0.9, 2.0),
    ("How often do workers change their role?", 0.9, 2.5),
    ("Do changes succeed?", 0.9, 4.0),
    ("How long did a worker take to become ready?", 1.0, STARTED_WITHIN_S),
    ("Does a worker's memory grow?", 2e8, 2e10),
]


def converse(client: openai.OpenAI, number: int) -> None:
    """A streamed chat whose turns begin as the ones before: decode holds their blocks."""
    messages: list[Any] = []
    for turn in range(TURNS):
        text = filler(80, seed=10 * number + turn)
        messages.append({"role": "user", "content": text})
        said = client.chat.completions.create(
            model=ID, messages=messages, max_tokens=48, temperature=0, stream=True
        )
        answer = "".join(part.choices[0].delta.content or "" for part in said if part.choices)
        messages.append({"role": "assistant", "content": answer})


def converse_all(client: openai.OpenAI, first: int) -> None:
    with ThreadPoolExecutor(CHATS) as pool:
        list(pool.map(lambda n: converse(client, n), range(first, first + CHATS)))


def kill_in_mid_stream(glm: Cluster, worker: str) -> None:
    """Kill the engine while it is among those that answer `STREAMS` long requests, and wait for
    the answers: they go on elsewhere."""
    begun = [0] * STREAMS

    def stream(number: int) -> int:
        pieces = glm.client.completions.create(
            model=ID,
            prompt=filler(60, seed=900 + number),
            max_tokens=STREAM_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        tokens = 0
        for piece in pieces:
            begun[number] += 1
            tokens = piece.usage.completion_tokens if piece.usage else tokens
        return tokens

    victim = psutil.Process(glm.workers()[worker]["engine_pid"])
    with ThreadPoolExecutor(STREAMS) as pool:
        told = [pool.submit(stream, number) for number in range(STREAMS)]
        wait_until(lambda: min(begun) >= BEGUN_PIECES, 120, "all streams have begun")
        victim.kill()
        assert [one.result() for one in told] == [STREAM_TOKENS] * STREAMS


def is_ready(glm: Cluster, worker: str, generation: int = 0) -> bool:
    found = glm.workers().get(worker)
    is_new = found is not None and found["id"]["generation"] > generation
    return is_new and found is not None and found["state"] == "ready"


@pytest.fixture(scope="module")
def glm(private_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    def edit(serving: dict[str, Any]) -> None:
        serving["observability"] = {"prometheus": {"mode": "auto", "port": free_port()}}
        for pool in serving["pools"]:
            # On a machine of two cores: room for a third engine.
            pool["placement"] = {"resources": {"CPU": 0.5}}

    with running_cluster("local-glm-mtp.yaml", tmp_path_factory.mktemp("proof"), edit) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(glm: Cluster) -> Prometheus:
    return Prometheus(glm.status()["prometheus"])


@pytest.fixture(scope="module")
def shown(glm: Cluster, prometheus: Prometheus) -> dict[str, list[dict[str, Any]]]:
    """What verify says after all that has happened: queries by their panel's question."""
    began_s = time.monotonic()
    file = str(glm.topology)
    converse_all(glm.client, 0)
    with pytest.raises(openai.BadRequestError):
        glm.client.completions.create(model=ID, prompt="a", max_tokens=-1)
    pdcluster("scale", "decode", "2", "--topology", file)
    pdcluster("role", "decode/1", "prefill", "--topology", file)
    converse_all(glm.client, 10)
    pdcluster("role", "decode/1", "decode", "--topology", file)
    generation = glm.workers()["decode/0"]["id"]["generation"]
    kill_in_mid_stream(glm, "decode/0")
    wait_until(
        lambda: is_ready(glm, "decode/0", generation), STARTED_WITHIN_S, "decode/0 is replaced"
    )
    pdcluster("scale", "decode", "1", "--topology", file)
    converse_all(glm.client, 20)
    prometheus.wait_for(f"sum by (status) ({ANSWERS}) == {ANSWERED}", SEEN_WITHIN_S)
    prometheus.wait_for(f'{CHANGES}{{kind="scale", state="done"}} >= 2', SEEN_WITHIN_S)
    span_s = time.monotonic() - began_s
    window = ("--window", f"{round(span_s) + 10}s")
    # Exit code 1 where a panel has no data: the tests say which.
    done = pdcluster("dashboards", "verify", "--topology", file, *window, "--json", check=False)
    said = json.loads(done.stdout)
    print(f"{span_s:.0f} s of traffic and changes; {said['failed']} queries failed")
    found: dict[str, list[dict[str, Any]]] = {}
    for query in said["queries"]:
        found.setdefault(query["panel"], []).append(query)
        print(f"{query['series']:3d} {query['least']} .. {query['most']}  {query['panel']}")
    return found


def test_every_panel_of_every_board_has_data(shown: dict[str, list[dict[str, Any]]]) -> None:
    questions = {panel.asks for board in BOARDS for panel in board.panels()}
    assert questions <= set(shown)
    without = [query for queries in shown.values() for query in queries if not query["has_data"]]
    assert without == []


def test_no_number_is_one_that_cannot_be(shown: dict[str, list[dict[str, Any]]]) -> None:
    for board in BOARDS:
        for panel in board.panels():
            for query in shown[panel.asks]:
                assert query["least"] > -ROUNDING or panel.asks in MAY_BE_NEGATIVE, query
                if panel.unit is Unit.SHARE and panel.at_most is not None:
                    assert query["most"] < panel.at_most + ROUNDING, query


@pytest.mark.parametrize(("asks", "above", "at_most"), EXPECTED)
def test_what_has_happened_is_seen(
    shown: dict[str, list[dict[str, Any]]], asks: str, above: float, at_most: float
) -> None:
    """The largest number of any of the panel's queries."""
    assert above < max(query["most"] for query in shown[asks]) <= at_most, shown[asks]


def test_acceptance_length_and_latency_are_plausible_all_the_time(
    shown: dict[str, list[dict[str, Any]]],
) -> None:
    for asks in (
        "How many tokens does a decode step give?",
        "How long are accepted runs in each pool?",
    ):
        (length,) = shown[asks]
        assert 1 < length["least"] <= length["most"] <= 1 + DRAFTS
    (position,) = shown["At which position do drafts stop being right?"]
    assert position["series"] == DRAFTS
    for asks in (
        "Is time to first token within its target?",
        "Is time per output token within its target?",
    ):
        assert all(0 < query["least"] <= query["most"] < 120 for query in shown[asks])


def test_the_bad_request_is_counted_as_one_of_the_clients(
    shown: dict[str, list[dict[str, Any]]], prometheus: Prometheus
) -> None:
    counted = prometheus.query(f"sum by (status) ({ANSWERS})")
    by_status = {labels["status"]: count for labels, count in counted}
    assert by_status["400"] == 1
    assert by_status["200"] == ANSWERED
    assert not any(count for status, count in by_status.items() if status.startswith("5"))


def test_scale_role_change_and_failure_are_marked_on_every_panel(
    shown: dict[str, list[dict[str, Any]]],
) -> None:
    for mark in EVENTS:
        (query,) = shown[mark.name]
        assert query["most"] is not None, mark.name
