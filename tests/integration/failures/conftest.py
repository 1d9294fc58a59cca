"""One cluster for the folder: two prefill and three decode engines behind two gateway replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import pytest_asyncio
from torn_cluster import (
    CONTEXT_TOKENS,
    PREFILL_TOKENS_PER_S,
    Home,
    OwnEngine,
    Torn,
    Traffic,
    clusters,
    log_disk,
)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A running cluster of its own, whatever becomes of it taken away at the end."""
    topology = clusters.simulated("torn", 2, 3, PREFILL_TOKENS_PER_S)
    home = Home(tmp_path_factory.mktemp("torn"), "torn", topology)
    with log_disk.mounted(home):
        try:
            home.up()
            yield home
            home.down()
            left = [str(process) for process in home.processes()]
            assert not left
        finally:
            home.close()


@pytest.fixture
def full_log_disk(home: Home) -> Iterator[None]:
    """No byte more fits under the logs while it lasts."""
    if not home.logs.is_mount():
        pytest.skip("a disk of its own under the logs needs root")
    log_disk.fill(home)
    yield
    log_disk.make_room(home)


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def reference(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OwnEngine]:
    folder = tmp_path_factory.mktemp("reference")
    async with OwnEngine(folder, clusters.MODEL, CONTEXT_TOKENS) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def torn(home: Home, reference: OwnEngine) -> AsyncIterator[Torn]:
    headers = {"authorization": f"Bearer {home.api_key}"}
    # A connection of its own for each request: the kernel spreads them over the replicas.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        home.endpoint, connector=connector, headers=headers
    ) as session:
        yield Torn(home, reference, session, Traffic(home.endpoint, home.api_key, reference))


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(torn: Torn) -> AsyncIterator[Torn]:
    """The cluster, whole before the test and after it."""
    await torn.whole()
    yield torn
    await torn.whole()
