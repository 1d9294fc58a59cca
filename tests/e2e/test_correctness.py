"""Prefill and decode apart give what one engine gives, because the moved KV blocks are the right
ones and are really used. Over NIXL (with n-gram drafts on decode) and over Mooncake."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import pytest
from e2e.harness import ANSWER_TOKENS, MODEL, Cluster, Prompt, http_json, metric

pytestmark = pytest.mark.e2e


def _transfer(cluster: Cluster, request_id: str) -> dict[str, Any]:
    """What the decode worker recorded for this request."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        records = cluster.transfers(request_id)
        done = [r for r in records if r["side"] == "decode"]
        if done:
            return done[-1]
        time.sleep(0.3)
    raise AssertionError(f"no transfer recorded for {request_id}")


def test_greedy_output_equals_a_single_engines_token_by_token(
    cluster: Cluster, references: list[Prompt]
) -> None:
    assert len(references) >= 20
    lengths = sorted(r.prompt_tokens for r in references)
    assert lengths[0] <= 40
    assert lengths[-1] >= 2500

    before = cluster.engine_metrics("decode/0")
    unlike = []
    for reference in references:
        raw = cluster.ask(reference.messages)
        answer = json.loads(raw.text)
        assert raw.headers["x-pdcluster-prefill"] == "prefill/0"
        assert raw.headers["x-pdcluster-decode"] == "decode/0"
        ids = tuple(answer["choices"][0]["token_ids"])
        if ids != reference.token_ids:
            unlike.append((reference.name, reference.text, answer["choices"][0]["message"]))
        assert answer["usage"]["prompt_tokens"] == reference.prompt_tokens
    assert not unlike

    # vLLM's own counters: the prompt tokens came over the wire and were not computed again.
    after = cluster.engine_metrics("decode/0")
    series = "vllm:prompt_tokens_by_source_total"
    external = metric(after, series, source="external_kv_transfer") - metric(
        before, series, source="external_kv_transfer"
    )
    computed = metric(after, series, source="local_compute") - metric(
        before, series, source="local_compute"
    )
    total = sum(r.prompt_tokens for r in references)
    # What neither moved nor was computed decode already held (the shared system message).
    assert external > 0.9 * total
    assert computed <= 2 * len(references)
    hits = "vllm:external_prefix_cache_hits_total"
    assert metric(after, hits) > metric(before, hits)


def test_every_transfer_is_recorded_with_blocks_bytes_and_tokens(cluster: Cluster) -> None:
    text = f"{uuid.uuid4().hex} " * 12
    raw = cluster.ask([{"role": "user", "content": text}], max_tokens=4)
    record = _transfer(cluster, raw.headers["x-request-id"])
    prompt_tokens = json.loads(raw.text)["usage"]["prompt_tokens"]
    assert record["outcome"] == "pulled"
    assert record["prompt_tokens"] == prompt_tokens
    assert record["tokens_pulled"] + record["tokens_held"] in (prompt_tokens, prompt_tokens - 1)
    assert record["blocks_pulled"] > 0
    assert record["bytes_pulled"] > 0
    assert record["took_s"] > 0


def test_a_second_turn_moves_only_the_new_blocks(cluster: Cluster) -> None:
    messages = [{"role": "user", "content": f"{uuid.uuid4().hex} tells a story. " * 48}]
    first = cluster.ask(messages)
    first_record = _transfer(cluster, first.headers["x-request-id"])
    answer = json.loads(first.text)
    messages += [
        {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
        # More than one block: less would not be worth fetching, decode computes it by itself.
        {"role": "user", "content": f"{uuid.uuid4().hex} goes on. " * 8},
    ]
    second = cluster.ask(messages)
    assert second.headers["x-pdcluster-route"] == "disaggregated"
    second_record = _transfer(cluster, second.headers["x-request-id"])

    first_tokens = answer["usage"]["prompt_tokens"]
    second_tokens = json.loads(second.text)["usage"]["prompt_tokens"]
    assert first_record["tokens_pulled"] > 0.9 * (first_tokens - first_record["tokens_held"]) - 1
    # Decode holds turn one whole, but for the last, partly filled block.
    assert second_record["tokens_held"] >= first_tokens - 2 * _block_size(cluster)
    assert second_record["tokens_pulled"] <= second_tokens - second_record["tokens_held"]
    assert 0 < second_record["tokens_pulled"] < first_tokens / 2


def _block_size(cluster: Cluster) -> int:
    return int(cluster.worker("decode/0")["fingerprint"]["block_size_tokens"])


def test_prefill_frees_its_blocks_after_every_pull(cluster: Cluster) -> None:
    cluster.ask([{"role": "user", "content": uuid.uuid4().hex}], max_tokens=2)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        prefill = cluster.worker("prefill/0")
        if prefill["counters"]["leases_open"] == 0 and prefill["load"]["kv_usage"] == 0:
            return
        time.sleep(0.5)
    raise AssertionError(f"prefill still pins blocks: {cluster.worker('prefill/0')}")


@pytest.mark.parametrize("cluster", ["nixl"], indirect=True)
def test_wrong_kv_is_noticed(cluster: Cluster, references: list[Prompt]) -> None:
    """A control: decode given another prompt's blocks must not give the reference answer.
    If it did, the tests above would prove nothing."""
    right = max(references, key=lambda r: r.prompt_tokens if r.prompt_tokens < 900 else 0)
    tokenized = http_json(
        cluster.base_url + "/tokenize",
        {"model": MODEL, "messages": right.messages, "add_generation_prompt": True},
        cluster.key,
    )["tokens"]
    # Same length, same first token, unlike content; salted so that no cache answers for it.
    wrong = [tokenized[0]] + [(token + 7) % 40_000 + 100 for token in tokenized[1:]]
    salt = uuid.uuid4().hex
    kept = http_json(
        cluster.worker("prefill/0")["url"] + "/v1/completions",
        {
            "model": MODEL,
            "prompt": wrong,
            "max_tokens": 1,
            "ignore_eos": True,
            "cache_salt": salt,
            "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
        },
        cluster.engine_key,
    )["kv_transfer_params"]
    answer = http_json(
        cluster.worker("decode/0")["url"] + "/v1/completions",
        {
            "model": MODEL,
            "prompt": tokenized,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "cache_salt": salt,
            "return_token_ids": True,
            "kv_transfer_params": kept,
        },
        cluster.engine_key,
    )
    ids = tuple(answer["choices"][0]["token_ids"])
    agreeing = sum(a == b for a, b in zip(ids, right.token_ids, strict=False))
    assert agreeing < len(right.token_ids) / 2
