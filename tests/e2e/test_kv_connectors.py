"""What our connectors add to vLLM's, over real engines on the CPU: records that agree with the
engine's own counters, early release, leases that end on an idle engine, sockets on the engine's
address only, quiet when idle, sound sampling with drafts, a dead peer noticed at once.

That blocks arrive whole is the contract suite's and test_correctness's business.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import os
import random
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from contract.engine_pair import (
    KEY,
    Engine,
    eventually,
    running_engine,
    sample_of,
    session,
    wait_ready,
)
from processes import cmdline
from prometheus_client import CollectorRegistry

from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.coordinator import Coordinator
from cluster.models import store
from cluster.observe.kv_metrics import KvMetrics
from cluster.snapshot import Fingerprint, Link, WorkerView
from cluster.topology.schema import IslandSpec, ModelSpec, PoolSpec

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LEASE_S = 6.0
BLOCK_TOKENS = 32
# 30 layers x (K + V) x 3 heads x 64 x 4 bytes, see SmolLM2-135M's config, in float32.
BYTES_PER_TOKEN = 46_080
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
PRINT = Fingerprint("m", "none", "float32", BLOCK_TOKENS, "c", "c 1", "vllm", "0", "0")


@dataclass
class Pair:
    prefill: Engine
    decode: Engine
    connector: str
    model: str
    coordinator: Coordinator

    async def transfer(self, prompt: list[int], request_id: str, **decode: Any) -> Any:
        """Prefill on one, decode on the other; decode's answer."""
        transfer = self.coordinator.begin(
            request_id, prompt, self.view(self.prefill), self.view(self.decode), self.link
        )
        params = (await transfer.prefill_fields())["kv_transfer_params"]
        transfer.prefilled(await self.ask(self.prefill, prompt, request_id, params, max_tokens=1))
        params = (await transfer.decode_fields())["kv_transfer_params"]
        answer = await self.ask(self.decode, prompt, request_id, params, **decode)
        transfer.finish()
        return answer

    async def pin(self, prompt: list[int], request_id: str) -> None:
        """Prefill, and let nobody pull."""
        transfer = self.coordinator.begin(
            request_id, prompt, self.view(self.prefill), self.view(self.decode), self.link
        )
        params = (await transfer.prefill_fields())["kv_transfer_params"]
        transfer.prefilled(await self.ask(self.prefill, prompt, request_id, params, max_tokens=1))

    async def ask(
        self,
        engine: Engine,
        prompt: list[int] | list[list[int]],
        request_id: str,
        params: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        } | more
        if params is not None:
            body["kv_transfer_params"] = params
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": request_id}
        async with (
            session() as http,
            http.post(f"{engine.url}/v1/completions", json=body, headers=headers) as response,
        ):
            answer: dict[str, Any] = await response.json()
            return answer

    @property
    def link(self) -> Link:
        return Link("prefill", "decode", self.connector, LEASE_S, "fail")

    @staticmethod
    def view(engine: Engine) -> WorkerView:
        return WorkerView(
            WorkerId(engine.role.value, 0, 1),
            engine.role,
            "i",
            WorkerState.READY,
            engine.url,
            PRINT,
            2048,
            BYTES_PER_TOKEN,
            kv=engine.kv,
        )


class NoReleaser:
    async def release(self, worker: WorkerId, request_ids: list[str]) -> None:
        raise AssertionError("these tests release by hand")


@pytest.fixture(scope="module", params=["nixl", "mooncake"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp(f"kv-{request.param}")
    model = ModelSpec(id="smollm2-135m-instruct", max_model_len_tokens=2048, dtype="float32")
    path = store.resolve(model, lambda what, fraction: None).path
    island = IslandSpec(
        name="i", pools=["prefill", "decode"], connector=request.param, lease_s=LEASE_S
    )
    common = {"kv_cache_gib": 0.2, "max_num_seqs": 8, "block_size_tokens": BLOCK_TOKENS}
    pools = {Role.PREFILL: common, Role.DECODE: {**common, "speculative": DRAFTS}}
    with ExitStack() as stack:
        engines = {
            role: stack.enter_context(
                running_engine(
                    PoolSpec(name=role.value, role=role, **more), island, model, path, folder
                )
            )
            for role, more in pools.items()
        }
        for engine in engines.values():
            asyncio.run(wait_ready(engine, model.public_name, 300))
        coordinator = Coordinator(NoReleaser(), KvMetrics(CollectorRegistry()), lambda: 0.0)
        yield Pair(
            engines[Role.PREFILL],
            engines[Role.DECODE],
            request.param,
            model.public_name,
            coordinator,
        )


@pytest.fixture(autouse=True)
async def forget_loop_bound_state(pair: Pair):
    """Each test has its own event loop: what the coordinator keeps of one must not reach the
    next."""
    pair.coordinator = Coordinator(NoReleaser(), KvMetrics(CollectorRegistry()), lambda: 0.0)
    yield
    if pair.coordinator._session is not None:
        await pair.coordinator._session.close()


def prompt_of(tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(tokens)]


def unique() -> str:
    return uuid.uuid4().hex


def ids_of(answer: dict[str, Any], index: int = 0) -> list[int]:
    assert "choices" in answer, answer
    ids: list[int] = answer["choices"][index]["token_ids"]
    return ids


def tree(engine: Engine) -> list[psutil.Process]:
    root = psutil.Process(engine.process.pid)
    return [root, *root.children(recursive=True)]


async def nixl_bytes(engine: Engine) -> float:
    async with session() as http, http.get(f"{engine.url}/metrics") as response:
        text = await response.text()
    (total,) = re.findall(r"^vllm:nixl_bytes_transferred_sum\{.*\} (\S+)$", text, re.MULTILINE)
    return float(total)


def records_of(engine: Engine, request_id: str) -> list[Any]:
    engine.recorded(request_id)
    return [record for record in engine.records if request_id in record.request_id]


# -- records -------------------------------------------------------------------------------------


async def test_records_agree_with_the_engines_own_counters(pair: Pair) -> None:
    bytes_before = await nixl_bytes(pair.decode) if pair.connector == "nixl" else 0.0
    before = await sample_of(pair.decode)
    requests = {unique(): prompt_of(tokens, tokens) for tokens in (31, 32, 33, 500)}
    for request_id, prompt in requests.items():
        await pair.transfer(prompt, request_id, max_tokens=4)
    records = {key: records_of(pair.decode, key) for key in requests}
    for request_id, prompt in requests.items():
        (record,) = records[request_id]
        blocks = -(-len(prompt) // BLOCK_TOKENS)
        assert (record.side, record.outcome) == ("decode", "pulled")
        assert (record.prompt_tokens, record.tokens_held) == (len(prompt), 0)
        assert (record.tokens_pulled, record.blocks_pulled) == (len(prompt), blocks)
        assert record.bytes_pulled == blocks * BLOCK_TOKENS * BYTES_PER_TOKEN
        assert 0 < record.took_s < 30
        sides = pair.prefill.recorded(request_id)
        assert sides == ["granted", "taken"]
    after = await sample_of(pair.decode)
    moved = [record for (record,) in records.values()]
    assert after.external_tokens - before.external_tokens == sum(r.tokens_pulled for r in moved)
    if pair.connector == "nixl":
        assert await nixl_bytes(pair.decode) - bytes_before == sum(r.bytes_pulled for r in moved)


async def test_what_decode_holds_is_told_and_not_moved(pair: Pair) -> None:
    first = prompt_of(10 * BLOCK_TOKENS, seed=1)
    await pair.transfer(first, unique(), max_tokens=1)
    request_id = unique()
    await pair.transfer(first + prompt_of(40, seed=2), request_id, max_tokens=1)
    (record,) = records_of(pair.decode, request_id)
    assert (record.tokens_held, record.tokens_pulled) == (10 * BLOCK_TOKENS, 40)
    assert record.blocks_pulled == 2


# -- release and leases --------------------------------------------------------------------------


async def test_a_release_frees_the_blocks_of_an_idle_engine_and_no_others(pair: Pair) -> None:
    released, kept = unique(), unique()
    await pair.pin(prompt_of(640, seed=3), released)
    await pair.pin(prompt_of(320, seed=4), kept)
    pinned = (await sample_of(pair.prefill)).kv_usage
    pair.prefill.release(released)
    assert await eventually(lambda: "released" in pair.prefill.recorded(released), within_s=2.0)
    left = (await sample_of(pair.prefill)).kv_usage
    assert 0 < left < pinned
    pair.prefill.release(kept)
    assert await eventually(lambda: "released" in pair.prefill.recorded(kept), within_s=2.0)
    assert (await sample_of(pair.prefill)).kv_usage == 0
    assert pair.prefill.recorded(released) == ["granted", "released"]


async def test_a_lease_ends_by_itself_on_an_idle_engine(pair: Pair) -> None:
    request_id = unique()
    await pair.pin(prompt_of(320, seed=5), request_id)
    assert await eventually(
        lambda: "expired" in pair.prefill.recorded(request_id), within_s=LEASE_S + 5
    )
    (granted, expired) = records_of(pair.prefill, request_id)
    assert (granted.outcome, expired.outcome) == ("granted", "expired")
    assert expired.took_s >= LEASE_S - 0.5
    assert (await sample_of(pair.prefill)).kv_usage == 0


# -- one transfer, one request -------------------------------------------------------------------


async def test_prompts_of_one_call_do_not_get_each_others_blocks(pair: Pair) -> None:
    """The gateway stages such calls; whoever does not must still get the right text, here and
    from the prefix cache later."""
    prompts = [prompt_of(200, seed=21), prompt_of(300, seed=22)]
    right = [ids_of(await pair.ask(pair.prefill, one, unique(), max_tokens=8)) for one in prompts]
    request_id = unique()
    transfer = pair.coordinator.begin(
        request_id, prompts[0], pair.view(pair.prefill), pair.view(pair.decode), pair.link
    )
    params = (await transfer.prefill_fields())["kv_transfer_params"]
    transfer.prefilled(await pair.ask(pair.prefill, prompts[0], request_id, params, max_tokens=1))
    params = (await transfer.decode_fields())["kv_transfer_params"]
    async with asyncio.timeout(60):
        answer = await pair.ask(pair.decode, prompts, request_id, params, max_tokens=8)
    assert [ids_of(answer, index) for index in range(2)] == right
    assert ids_of(await pair.ask(pair.decode, prompts[1], unique(), max_tokens=8)) == right[1]
    transfer.finish()


# -- a good neighbour ----------------------------------------------------------------------------


async def test_engines_listen_on_their_own_address_only(pair: Pair) -> None:
    """After a transfer, so that every socket a pull needs is open."""
    if shutil.which("ss") is None:
        pytest.skip("needs ss (iproute2)")
    await pair.transfer(prompt_of(64, seed=6), unique(), max_tokens=1)
    listing = _listening_sockets()
    pids = {process.pid for engine in (pair.prefill, pair.decode) for process in tree(engine)}
    ours = [
        line.split()[3]
        for line in listing.splitlines()
        if any(int(pid) in pids for pid in re.findall(r"pid=(\d+)", line))
    ]
    assert len(ours) > 2
    assert not [address for address in ours if not _is_loopback(address)]


def _listening_sockets() -> str:
    return subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    host, _, device = host.partition("%")
    if device:
        return device == "lo"
    return host != "*" and (
        ipaddress.ip_address(host).is_loopback
        or ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback
    )


async def test_an_idle_engine_is_quiet_and_may_use_every_core(pair: Pair) -> None:
    def cpu_s() -> float:
        times = [
            process.cpu_times() for one in (pair.prefill, pair.decode) for process in tree(one)
        ]
        return sum(one.user + one.system for one in times)

    assert await eventually(lambda: _is_idle(pair), within_s=10)
    began = cpu_s()
    await asyncio.sleep(4)
    # A spinning progress thread would burn 4 s per engine.
    assert cpu_s() - began < 1.0
    for engine in (pair.prefill, pair.decode):
        for process in tree(engine):
            assert os.sched_getaffinity(process.pid) == os.sched_getaffinity(0)


async def _is_idle(pair: Pair) -> bool:
    samples = [await sample_of(engine) for engine in (pair.prefill, pair.decode)]
    return all(sample.running == 0 and sample.kv_usage == 0 for sample in samples)


# -- drafts --------------------------------------------------------------------------------------


async def test_sampling_with_drafts_keeps_to_top_k(pair: Pair) -> None:
    """top_k 1 leaves one token to choose: whatever the temperature, the greedy answer. A stock
    CPU engine dies of it."""
    prompt = prompt_of(24, seed=7) * 8
    greedy = ids_of(await pair.transfer(prompt, unique(), max_tokens=24))
    before = await sample_of(pair.decode)
    sampled = await pair.ask(
        pair.decode, prompt, unique(), max_tokens=24, temperature=1.0, top_k=1, n=3
    )
    assert [ids_of(sampled, index) for index in range(3)] == [greedy] * 3
    assert (await sample_of(pair.decode)).spec_drafts > before.spec_drafts


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 40, "top_p": 0.8},
    ],
)
async def test_seeded_sampling_with_drafts_can_be_repeated(pair: Pair, how: dict) -> None:
    prompt = prompt_of(24, seed=8) * 8
    await pair.transfer(prompt, unique(), max_tokens=1)
    answers = [
        ids_of(await pair.ask(pair.decode, prompt, unique(), max_tokens=24, seed=11, **how))
        for _ in range(2)
    ]
    assert answers[0] == answers[1]


# -- a dead peer; last, for it ends the prefill engine ---------------------------------------------


async def test_decode_notices_a_dead_prefill_engine_at_once_and_lives_on(pair: Pair) -> None:
    prompt = prompt_of(200, seed=9)
    request_id = unique()
    transfer = pair.coordinator.begin(
        request_id, prompt, pair.view(pair.prefill), pair.view(pair.decode), pair.link
    )
    params = (await transfer.prefill_fields())["kv_transfer_params"]
    transfer.prefilled(await pair.ask(pair.prefill, prompt, request_id, params, max_tokens=1))
    params = (await transfer.decode_fields())["kv_transfer_params"]
    for process in tree(pair.prefill):
        # Python's resource tracker outlives the rest to unlink their semaphores in /dev/shm.
        if "resource_tracker" not in cmdline(process):
            process.kill()
    async with asyncio.timeout(LEASE_S + 15):
        answer = await pair.ask(pair.decode, prompt, request_id, params, max_tokens=4)
    assert "choices" not in answer
    (record,) = records_of(pair.decode, request_id)
    assert dataclasses.asdict(record) | {"at_s": 0, "took_s": 0, "request_id": ""} == {
        "request_id": "",
        "side": "decode",
        "outcome": "failed",
        "at_s": 0,
        "prompt_tokens": 200,
        "tokens_held": 0,
        "tokens_pulled": 0,
        "blocks_pulled": 0,
        "bytes_pulled": 0,
        "took_s": 0,
    }
    assert (await sample_of(pair.decode)).kv_usage == 0
    assert len(ids_of(await pair.ask(pair.decode, prompt, unique(), max_tokens=4))) == 4
