"""topologies/local-mixed.yaml with real engines: two unlike islands behind one endpoint.

One cluster for the module, which no other test uses. The tests depend on their order: what has been
asked before is part of the proof that no block crossed, and engines are killed last.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from e2e.harness import MODEL, Cluster, filler, metric, running_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OTHER = {"h200": "atlas", "atlas": "h200"}
ATLAS_TOKENS, H200_TOKENS = 2048, 4096
RESTARTED_WITHIN_S = 240.0
STREAM_BEGUN_CHUNKS = 5


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    id: str
    prefill: str
    decode: str
    route: str
    prompt_tokens: int
    token_ids: tuple[int, ...]

    @property
    def island(self) -> str:
        return island_of(self.decode)


def island_of(worker: str) -> str:
    """`decode-atlas/0` is in atlas."""
    return worker.partition("/")[0].partition("-")[2]


class Mixed:
    """The cluster, and everything it has answered so far."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.answers: list[Answer] = []
        self.streaming = {island: threading.Event() for island in OTHER}

    def ask(self, text: str, **more: Any) -> Answer:
        raw = self.cluster.ask([{"role": "user", "content": text}], **more)
        body = json.loads(raw.text)
        answer = Answer(
            raw.headers["x-request-id"],
            raw.headers["x-pdcluster-prefill"],
            raw.headers["x-pdcluster-decode"],
            raw.headers["x-pdcluster-route"],
            body["usage"]["prompt_tokens"],
            tuple(body["choices"][0]["token_ids"]),
        )
        self.answers.append(answer)
        return answer

    def stream(self, text: str, **more: Any) -> tuple[int, ...]:
        """The token ids of a streamed answer."""
        stream = self.cluster.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True} | more.pop("extra_body", {}),
            **more,
        )
        island = island_of(stream.response.headers["x-pdcluster-decode"])
        chunks = []
        for chunk in stream:
            chunks += [chunk] if chunk.choices else []
            if len(chunks) == STREAM_BEGUN_CHUNKS:
                self.streaming[island].set()
        assert chunks[-1].choices[0].finish_reason == "length"
        return tuple(
            token
            for chunk in chunks
            for token in getattr(chunk.choices[0], "token_ids", None) or ()
        )

    def ask_at_once(self, texts: Sequence[str], **more: Any) -> list[Answer]:
        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(lambda text: self.ask(text, **more), texts))

    def workers(self, island: str) -> dict[str, dict[str, Any]]:
        status = self.cluster.status()["workers"]
        return {worker["name"]: worker for worker in status if island_of(worker["name"]) == island}


def metrics_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


@pytest.fixture(scope="module")
def mixed(private_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    with running_cluster("local-mixed.yaml", tmp_path_factory.mktemp("mixed")) as cluster:
        yield Mixed(cluster)


def test_greedy_answers_are_equal_in_both_islands(mixed: Mixed) -> None:
    both = 0
    for seed in range(6):
        text = f"{filler(15 * seed + 10, seed)} Summarise the text above."
        # Two at once: the second goes where the first is not.
        answers = mixed.ask_at_once([text, text])
        both += {answer.island for answer in answers} == {"h200", "atlas"}
        assert len({answer.token_ids for answer in answers}) == 1
        assert len(answers[0].token_ids) > 4
    assert both >= 4, mixed.answers


def test_load_spills_to_the_other_island(mixed: Mixed) -> None:
    texts = [f"{filler(40, seed)} Say it in other words." for seed in range(100, 108)]
    used = Counter(answer.island for answer in mixed.ask_at_once(texts))
    assert min(used["h200"], used["atlas"]) >= 3, used


def test_a_prompt_too_long_for_one_island_goes_to_the_other(mixed: Mixed) -> None:
    text = f"{filler(1700, 1)} Summarise the text above."
    answer = mixed.ask(text, max_tokens=4)
    assert ATLAS_TOKENS < answer.prompt_tokens < H200_TOKENS
    assert (answer.island, answer.route) == ("h200", "disaggregated")
    # What fits by itself may be too long with its answer.
    answer = mixed.ask(f"{filler(600, 2)} Go on.", max_tokens=1400, stop=[" "])
    assert answer.prompt_tokens < ATLAS_TOKENS
    assert answer.island == "h200"


def test_a_prompt_too_long_for_all_is_refused_and_says_what_fits(mixed: Mixed) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        mixed.ask(f"{filler(3600, 3)} Summarise the text above.")
    assert refused.value.code == "context_length_exceeded"
    assert str(H200_TOKENS) in str(refused.value)


def test_no_block_has_crossed(mixed: Mixed) -> None:
    pulled: Counter[str] = Counter()
    for answer in mixed.answers:
        records = mixed.cluster.transfers(answer.id)
        if answer.prefill == "none":
            assert answer.route == "local-prefill"
            assert records == []
            continue
        assert island_of(answer.prefill) == answer.island
        assert {record["outcome"] for record in records if record["side"] == "prefill"} == {
            "granted",
            "taken",
        }
        (arrived,) = [record for record in records if record["side"] == "decode"]
        assert arrived["outcome"] in ("pulled", "held")
        pulled[answer.decode] += arrived["tokens_pulled"]
    assert set(pulled) == {"decode-h200/0", "decode-atlas/0"}
    assert min(pulled.values()) > 300
    # The engines' own counts know of no token beyond those.
    for decode, tokens in pulled.items():
        text = mixed.cluster.engine_metrics(decode)
        source = {"source": "external_kv_transfer"}
        assert metric(text, "vllm:prompt_tokens_by_source_total", **source) == pytest.approx(
            tokens, abs=len(mixed.answers)
        )
    text = metrics_of(mixed.cluster.base_url)
    total = metric(text, "pdcluster_kv_transfers_total")
    within = sum(
        metric(
            text,
            "pdcluster_kv_transfers_total",
            prefill_pool=f"prefill-{island}",
            decode_pool=f"decode-{island}",
            connector=connector,
        )
        for island, connector in (("h200", "nixl"), ("atlas", "mooncake"))
    )
    assert total == within > 10


@pytest.mark.parametrize("lost", ["atlas", "h200"])
def test_a_lost_island_loses_no_request_and_comes_back(mixed: Mixed, lost: str) -> None:
    before = mixed.workers(lost)
    recovered_before = metric(
        metrics_of(mixed.cluster.base_url), "pdcluster_gateway_recoveries_total"
    )
    texts = [f"{lost} {filler(30, seed)} Tell a story about it." for seed in range(200, 206)]
    mixed.streaming[lost].clear()
    with ThreadPoolExecutor(2 * len(texts)) as pool:
        long = {"max_tokens": 96, "extra_body": {"ignore_eos": True}}
        in_hand = [pool.submit(mixed.ask, text, **long) for text in texts]
        streams = [pool.submit(mixed.stream, text, **long) for text in texts]
        assert mixed.streaming[lost].wait(120), "the island streams nothing"
        for worker in before.values():
            psutil.Process(worker["engine_pid"]).kill()
        answers = [request.result(300) for request in in_hand]
        streamed = [stream.result(300) for stream in streams]
    # A stream that was broken off went on where it was; an answer not begun was begun anew.
    assert streamed == [answer.token_ids for answer in answers]
    recoveries = metric(metrics_of(mixed.cluster.base_url), "pdcluster_gateway_recoveries_total")
    assert recoveries > recovered_before

    deadline = time.monotonic() + RESTARTED_WITHIN_S
    meanwhile = 0
    while True:
        now = mixed.workers(lost)
        if len(now) == len(before) and all(
            worker["state"] == "ready" and worker["generation"] > before[name]["generation"]
            for name, worker in now.items()
        ):
            break
        assert time.monotonic() < deadline, now
        answer = mixed.ask(f"Round {meanwhile}: say yes.", max_tokens=4)
        if not any(worker["state"] == "ready" for worker in now.values()):
            meanwhile += answer.island == OTHER[lost]
    assert meanwhile > 2
    texts = [f"{filler(20, seed)} Say it in other words." for seed in range(300, 306)]
    assert {answer.island for answer in mixed.ask_at_once(texts)} == {"h200", "atlas"}


def test_while_the_long_island_is_away_long_requests_are_early_and_not_wrong(
    mixed: Mixed,
) -> None:
    for worker in mixed.workers("h200").values():
        psutil.Process(worker["engine_pid"]).kill()
    with pytest.raises(openai.InternalServerError) as refused:
        mixed.ask(f"{filler(1700, 4)} Summarise the text above.", max_tokens=4)
    assert refused.value.status_code == 503
    assert "retry-after" in refused.value.response.headers
    assert mixed.ask("Say yes.", max_tokens=2).island == "atlas"
