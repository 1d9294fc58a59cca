"""The metaserver: a secret path per request, one message, and gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from cluster.gateway.metaserver import Metaserver


@pytest.fixture
async def metaserver() -> AsyncIterator[Metaserver]:
    server = Metaserver("127.0.0.1")
    await server.start()
    yield server
    await server.close()


async def post(url: str, data: bytes = b'{"a": 1}') -> int:
    async with aiohttp.ClientSession() as session, session.post(url, data=data) as answer:
        return answer.status


async def test_what_is_posted_reaches_the_one_who_waits(metaserver: Metaserver) -> None:
    with metaserver.expect() as first, metaserver.expect() as second:
        assert first.url != second.url
        assert await post(second.url, b'{"n": 2}') == 200
        assert await post(first.url, b'{"n": 1}') == 200
        assert (await first.message(), await second.message()) == ({"n": 1}, {"n": 2})


async def test_a_path_is_gone_with_its_request(metaserver: Metaserver) -> None:
    with metaserver.expect() as expected:
        pass
    assert await post(expected.url) == 404
    assert metaserver.waiting == 0


async def test_an_engine_that_says_it_twice_is_heard_once(metaserver: Metaserver) -> None:
    with metaserver.expect() as expected:
        assert await post(expected.url, b'{"n": 1}') == 200
        assert await post(expected.url, b'{"n": 2}') == 200
        assert await expected.message() == {"n": 1}


@pytest.mark.parametrize(
    ("data", "status"), [(b"{", 400), (b"\xff", 400), (b'"' + b"x" * 5 * 2**20 + b'"', 413)]
)
async def test_what_is_no_message_does_not_use_up_the_place(
    metaserver: Metaserver, data: bytes, status: int
) -> None:
    with metaserver.expect() as expected:
        assert await post(expected.url, data) == status
        assert await post(expected.url, b"{}") == 200
        assert await expected.message() == {}


async def test_paths_cannot_be_guessed(metaserver: Metaserver) -> None:
    with metaserver.expect() as expected, metaserver.expect() as other:
        token = expected.url.rpartition("/")[2]
        assert len(token) >= 32
        assert token != other.url.rpartition("/")[2]
        assert await post(expected.url[:-1]) == 404


async def test_who_stops_waiting_may_wait_again(metaserver: Metaserver) -> None:
    with metaserver.expect() as expected:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(expected.message(), 0.01)
        assert await post(expected.url) == 200
        assert await expected.message() == {"a": 1}


async def test_it_listens_once_however_often_it_is_started() -> None:
    server = Metaserver("127.0.0.1")
    assert server.address is None
    await asyncio.gather(*(server.start() for _ in range(5)))
    address = server.address
    await server.start()
    assert server.address == address
    await server.close()
    await server.close()
    assert server.address is None
