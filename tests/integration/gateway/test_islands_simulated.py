"""Two unlike islands of simulated engines behind one gateway: where requests go, and that no block
ever crosses. What real engines do is in tests/e2e/test_islands.py."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from cluster.identity import Role, WorkerId
from cluster.snapshot import Link

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

COMPLETIONS = "/v1/completions"
LONGEST = {"h200": 4096, "atlas": 1024}
LINKS = (
    Link("prefill-h200", "decode-h200", "nixl", 20.0, "recompute"),
    Link("prefill-atlas", "decode-atlas", "mooncake", 20.0, "recompute"),
)


@dataclass
class Islands:
    engines: dict[str, object]  # by pool/index
    views: tuple

    def of(self, island: str) -> list:
        return [engine for name, engine in self.engines.items() if island in name]


def start_islands(start_engine, tools, **timings) -> Islands:
    """`h200`: NIXL, one prefill and two decode engines, blocks of 16. `atlas`: Mooncake, one and
    one, blocks of 64, a quarter of the context."""
    shapes = [
        ("h200", Role.PREFILL, 0, "nixl", 16),
        ("h200", Role.DECODE, 0, "nixl", 16),
        ("h200", Role.DECODE, 1, "nixl", 16),
        ("atlas", Role.PREFILL, 0, "mooncake", 64),
        ("atlas", Role.DECODE, 0, "mooncake", 64),
    ]
    engines, views = {}, []
    for island, role, index, dialect, block in shapes:
        engine = start_engine(
            role,
            dialect,
            events=True,
            block_size_tokens=block,
            max_model_len_tokens=LONGEST[island],
            **timings,
        )
        seen = tools.view(engine, dialect=dialect)
        assert seen.fingerprint is not None
        worker = WorkerId(f"{role}-{island}", index, 1)
        engines[worker.name] = engine
        views.append(
            replace(
                seen,
                id=worker,
                island=island,
                max_model_len_tokens=LONGEST[island],
                fingerprint=replace(seen.fingerprint, block_size_tokens=block),
            )
        )
    return Islands(engines, tuple(views))


@pytest.fixture(scope="module")
def islands(start_shared_engine, tools) -> Islands:
    return start_islands(start_shared_engine, tools, decode_step_s=0.01)


@pytest.fixture
def start_over(start_gateway, tools):
    """A gateway over islands: `async with start_over(islands) as gateway`."""

    @asynccontextmanager
    async def start(islands: Islands, **settings):
        async with start_gateway(*islands.views, wait_ready=False, **settings) as gateway:
            gateway.snapshot = replace(gateway.snapshot, links=LINKS, longest_tokens=4096)
            await publish(gateway, tools, islands.views)
            yield gateway

    return start


async def publish(gateway, tools, views, island: str = "") -> None:
    """Have the gateway know `views`, or those of one island, and wait until it does."""
    gateway.publish(*(view for view in views if island in view.island))

    async def is_known() -> bool:
        known = await gateway.metric("pdcluster_gateway_snapshot_version")
        return known == gateway.snapshot.version

    await tools.eventually(is_known)


def body(prompt: str, max_tokens: int = 8, **more):
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}


def streamed_body(number: int):
    prompt = f"Stream {number} " * 20
    return {"prompt": prompt, "max_tokens": 80, "extra_body": {"ignore_eos": True}}


def island_of(worker: str) -> str:
    """`decode-atlas/0` is in atlas."""
    return worker.partition("/")[0].partition("-")[2]


async def crossings(gateway) -> Counter:
    """Transfers that ended, by (prefill's island, decode's island)."""
    found: Counter = Counter()
    async with gateway.session.get("/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("pdcluster_kv_transfers_total{"):
                ends = re.findall(r'(?:prefill|decode)_pool="\w+-(\w+)"', line)
                ended = float(line.rpartition(" ")[2])
                if ended:  # a link's series are there from its beginning
                    found[tuple(ends)] += ended
    return found


async def test_no_block_ever_crosses_whatever_is_asked(islands, start_over):
    seed = 20261124
    rng = random.Random(seed)
    async with start_over(islands) as gateway:

        async def one(number: int) -> tuple[int, str, str, int]:
            await asyncio.sleep(rng.random())
            size = rng.choice([20, 200, 900, 1500, 3000])
            prompt = f"{number} " + "".join(rng.choices("abcdefgh ", k=size))
            status, headers, _ = await gateway.post(COMPLETIONS, body(prompt, rng.randint(1, 60)))
            return status, headers["x-pdcluster-prefill"], headers["x-pdcluster-decode"], size

        answers = await asyncio.gather(*(one(number) for number in range(120)))
        crossed = await crossings(gateway)
    assert {status for status, *_ in answers} == {200}, f"seed={seed}"
    used = Counter()
    for _, prefill, decode, size in answers:
        used[island_of(decode)] += 1
        assert prefill == "none" or island_of(prefill) == island_of(decode)
        assert size < LONGEST["atlas"] or island_of(decode) == "h200"
    assert min(used["h200"], used["atlas"]) > 10, used
    assert set(crossed) == {("h200", "h200"), ("atlas", "atlas")}
    assert crossed.total() == 120


async def test_islands_share_the_load_and_one_takes_all_when_the_other_leaves(
    islands, start_over, tools
):
    async with start_over(islands) as gateway:

        async def used_by(requests: int) -> Counter:
            answers = await asyncio.gather(
                *(gateway.post(COMPLETIONS, body(f"{n} " * 40, 100)) for n in range(requests))
            )
            assert {status for status, *_ in answers} == {200}
            return Counter(island_of(headers["x-pdcluster-decode"]) for _, headers, _ in answers)

        used = await used_by(9)
        assert used["h200"] >= 4
        assert used["atlas"] >= 2
        await publish(gateway, tools, islands.views, "h200")
        assert await used_by(6) == {"h200": 6}


async def test_slower_islands_get_less(islands, start_over):
    slow = replace(
        islands,
        views=tuple(
            replace(view, relative_speed=0.25) if view.island == "atlas" else view
            for view in islands.views
        ),
    )
    async with start_over(slow) as gateway:
        answers = await asyncio.gather(
            *(gateway.post(COMPLETIONS, body(f"{n} " * 40, 100)) for n in range(18))
        )
        used = Counter(island_of(headers["x-pdcluster-decode"]) for _, headers, _ in answers)
    assert 1 <= used["atlas"] <= 4, used


async def test_what_is_too_long_for_one_island_goes_to_the_other(islands, start_over):
    async with start_over(islands) as gateway:
        for number in range(6):
            status, headers, _ = await gateway.post(COMPLETIONS, body(f"{number}" * 2000))
            assert status == 200
            assert island_of(headers["x-pdcluster-decode"]) == "h200"
            assert headers["x-pdcluster-route"] == "disaggregated"


async def test_only_what_is_too_long_for_all_is_refused_as_too_long(islands, start_over, tools):
    async with start_over(islands) as gateway:
        status, _, answer = await gateway.post(COMPLETIONS, body("x" * 5000))
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"
        assert "4096" in answer["error"]["message"]
        # While the long island is away its requests are not wrong, only early.
        await publish(gateway, tools, islands.views, "atlas")
        status, headers, answer = await gateway.post(COMPLETIONS, body("x" * 2000))
        assert status == 503, answer
        assert "retry-after" in headers
        assert (await gateway.post(COMPLETIONS, body("x" * 500)))[0] == 200


async def test_a_conversation_stays_in_the_island_that_holds_its_prefix(islands, start_over):
    async with start_over(islands) as gateway:
        await asyncio.sleep(0.5)  # subscriptions
        homes = {}
        for name in ("red", "green", "blue", "black"):
            _, headers, _ = await gateway.post(COMPLETIONS, body(name * 100))
            homes[name] = headers["x-pdcluster-decode"]
        assert len({island_of(home) for home in homes.values()}) == 2
        await asyncio.sleep(0.5)  # events of what was stored
        for turn in range(1, 4):
            for name, home in homes.items():
                _, headers, _ = await gateway.post(COMPLETIONS, body(name * 100 + "more" * turn))
                assert headers["x-pdcluster-decode"] == home


async def test_both_islands_answer_alike(islands, start_over, tools):
    async with start_over(islands) as gateway:
        said: dict[str, set[str]] = {}
        for _ in range(2):
            for island in ("h200", "atlas"):
                await publish(gateway, tools, islands.views, island)
                _, headers, answer = await gateway.post(COMPLETIONS, body("Who are you?", 30))
                assert island_of(headers["x-pdcluster-decode"]) == island
                said.setdefault(island, set()).add(answer["choices"][0]["text"])
        assert said["h200"] == said["atlas"]
        assert len(said["h200"]) == 1


@pytest.mark.parametrize("lost", ["h200", "atlas"])
async def test_a_lost_island_loses_no_request(start_engine, start_over, tools, lost):
    """The snapshot still shows it: what it had in hand and what is sent to it goes elsewhere."""
    islands = start_islands(start_engine, tools, decode_step_s=0.01)
    other = {"h200": "atlas", "atlas": "h200"}[lost]
    async with start_over(islands) as gateway:

        async def stream(number: int) -> str:
            text = ""
            async for chunk in await gateway.openai.completions.create(
                model="simulated", stream=True, **streamed_body(number)
            ):
                text += chunk.choices[0].text
            return text

        undisturbed = [await stream(number) for number in range(8)]
        requests = [
            asyncio.create_task(gateway.post(COMPLETIONS, body(f"{number} " * 30, 80)))
            for number in range(12)
        ]
        streams = [asyncio.create_task(stream(number)) for number in range(8)]

        async def is_busy() -> bool:
            return sum([await engine.running() for engine in islands.of(lost)]) >= 2

        await tools.eventually(is_busy)
        for engine in islands.of(lost):
            engine.kill()
        texts = await asyncio.gather(*streams)
        assert texts == undisturbed
        requests += [
            asyncio.create_task(gateway.post(COMPLETIONS, body(f"{number} " * 30, 8)))
            for number in range(12, 24)
        ]
        answers = await asyncio.gather(*requests)
        assert {status for status, *_ in answers} == {200}
        after = [await gateway.post(COMPLETIONS, body(f"after {n}")) for n in range(4)]
        assert {island_of(headers["x-pdcluster-decode"]) for _, headers, _ in after} == {other}
        assert set(await crossings(gateway)) <= {("h200", "h200"), ("atlas", "atlas")}
