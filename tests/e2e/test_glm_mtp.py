"""topologies/local-glm-mtp.yaml with real engines: a GLM mixture of experts, prefilled and decoded
apart, that drafts with its own multi-token-prediction layer.

The answers of a plain engine without drafts come first, and it is gone before the cluster starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e.harness import Cluster, filler, metric, plain_vllm, running_cluster

from cluster.models.tiny_glm import FILES, ID

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

DRAFTS = 3  # as the topology has it
BLOCK_TOKENS = 32
LENGTH_TOKENS = 2048
ANSWER_TOKENS = 64
BEGINNINGS = (
    "Return a new list containing all items from",
    "Open the file and return",
    "This class implements",
    "The optional argument",
    "If the key is not found,",
    "Create a new thread that",
    "Raised when the connection is closed by",
    "Convert a string to",
    "Return True if the object is",
    "This method is called when",
)
TEXTS = (*BEGINNINGS, *(f"{filler(words, seed=words)} {BEGINNINGS[0]}" for words in (40, 150, 500)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt; `headers` of pdcluster's own, empty from a bare engine."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    headers: dict[str, str]


def ask(client: openai.OpenAI, text: str) -> Answer:
    raw = client.completions.with_raw_response.create(
        model=ID,
        prompt=text,
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    body = json.loads(raw.text)
    return Answer(
        body["usage"]["prompt_tokens"],
        tuple(body["choices"][0]["token_ids"]),
        {name: value for name, value in raw.headers.items() if name.startswith("x-")},
    )


@pytest.fixture(scope="module")
def undrafted(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    log = tmp_path_factory.mktemp("undrafted") / "vllm.log"
    with plain_vllm(ID, LENGTH_TOKENS, log) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        return [ask(client, text) for text in TEXTS]


@pytest.fixture(scope="module")
def glm(
    undrafted: list[Answer], private_state: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with running_cluster("local-glm-mtp.yaml", tmp_path_factory.mktemp("glm")) as running:
        yield running


@pytest.fixture(scope="module")
def answers(glm: Cluster) -> list[Answer]:
    """One after the other, then all at once: drafts of several sequences in one step."""
    alone = [ask(glm.client, text) for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        return alone + list(pool.map(lambda text: ask(glm.client, text), TEXTS))


def test_answers_equal_those_of_an_engine_without_drafts_token_by_token(
    answers: list[Answer], undrafted: list[Answer]
) -> None:
    assert [answer.token_ids for answer in answers] == [plain.token_ids for plain in undrafted * 2]
    assert {len(answer.token_ids) for answer in answers} == {ANSWER_TOKENS}
    lengths = sorted(answer.prompt_tokens for answer in undrafted)
    assert lengths[0] < BLOCK_TOKENS
    assert lengths[-1] > 30 * BLOCK_TOKENS


def test_blocks_of_every_layer_move_the_drafting_one_too(
    glm: Cluster, answers: list[Answer]
) -> None:
    config = json.loads((FILES / "config.json").read_text())
    layers = config["num_hidden_layers"] + config["num_nextn_predict_layers"]
    token_bytes = layers * config["num_key_value_heads"] * config["head_dim"] * 2 * 4
    answer = max(answers[: len(TEXTS)], key=lambda answer: answer.prompt_tokens)
    assert answer.headers["x-pdcluster-prefill"] == "prefill/0"
    assert answer.headers["x-pdcluster-decode"] == "decode/0"
    pulled = _pulled(glm, answer.headers["x-request-id"])
    assert pulled["tokens_held"] + pulled["tokens_pulled"] == answer.prompt_tokens
    assert pulled["blocks_pulled"] > 30
    assert pulled["bytes_pulled"] == pulled["blocks_pulled"] * BLOCK_TOKENS * token_bytes


def test_acceptance_length_is_reported_by_pool_and_by_position(
    glm: Cluster, answers: list[Answer]
) -> None:
    decode = _settled(glm)
    shares = decode["acceptance_per_position"]
    assert 1.3 < decode["acceptance_length"] <= 1 + DRAFTS
    assert len(shares) == DRAFTS
    # A draft counts only if those before it were accepted.
    assert 1 > shares[0] >= shares[1] >= shares[2] > 0
    assert decode["acceptance_length"] == pytest.approx(1 + sum(shares))
    # Prefill writes first tokens only: nothing to draft for.
    (prefill,) = (pool for pool in glm.status()["pools"] if pool["name"] == "prefill")
    assert prefill["acceptance_length"] is None
    assert prefill["acceptance_per_position"] == []

    exposed = glm.engine_metrics("decode/0")
    drafts = metric(exposed, "vllm:spec_decode_num_drafts_total")
    at = [
        metric(exposed, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position=str(place))
        for place in range(DRAFTS)
    ]
    assert shares == pytest.approx([count / drafts for count in at])


def _settled(glm: Cluster) -> dict[str, Any]:
    """The decode pool once its report, a second old at most, has all the tokens."""
    deadline = time.monotonic() + 15
    before: dict[str, Any] = {}
    while time.monotonic() < deadline:
        (pool,) = (pool for pool in glm.status()["pools"] if pool["name"] == "decode")
        if pool["acceptance_length"] is not None and pool == before:
            return before
        before = pool
        time.sleep(2)
    raise AssertionError(f"the decode pool still drafts: {before}")


def _pulled(glm: Cluster, request_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for record in glm.transfers(request_id):
            if record["outcome"] == "pulled":
                return record
        time.sleep(0.3)
    raise AssertionError(f"no blocks pulled for {request_id}")
