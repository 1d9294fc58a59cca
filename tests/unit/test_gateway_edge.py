"""Keys, admission, ids and bodies at the edge."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from cluster.errors import EngineFailed, InvalidInput, KvMismatch, NoCapacity, PeerGone
from cluster.gateway import errors
from cluster.gateway.admission import Admission
from cluster.gateway.auth import Authenticator, hash_key, key_hashes
from cluster.gateway.config import GatewayConfig
from cluster.gateway.cutoff import Cutoff, DeadlinePassed
from cluster.gateway.errors import ApiError
from cluster.gateway.wire import ClientGone, Message, RequestIds, Responder, read_body
from cluster.topology.schema import AuthSpec, LimitsSpec


def test_keys_come_from_the_file_or_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n# a comment\n two \n")
    assert key_hashes(AuthSpec(keys_file=file), tmp_path) == (hash_key("one"), hash_key("two"))
    from_env = key_hashes(AuthSpec(keys_env="KEYS"), tmp_path, {"KEYS": "one, two"})
    assert from_env == (hash_key("one"), hash_key("two"))
    assert key_hashes(AuthSpec(), file) == (hash_key("one"), hash_key("two"))
    assert key_hashes(None, file) is None


@pytest.mark.parametrize("text", [None, "", "# only a comment\n"])
def test_no_keys_where_keys_are_asked_for_is_refused(tmp_path, text):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidInput, match=str(file)):
        key_hashes(AuthSpec(keys_file=file), tmp_path)
    with pytest.raises(InvalidInput, match="KEYS"):
        key_hashes(AuthSpec(keys_env="KEYS"), tmp_path, {})


def test_only_configured_keys_open_the_door():
    authenticator = Authenticator([hash_key("one"), hash_key("two")])
    authenticator.check(b"Bearer two")
    authenticator.check(b"bearer one")
    for header in (None, b"", b"Bearer", b"Bearer ", b"Basic one", b"Bearer on", b"Bearer one two"):
        with pytest.raises(ApiError) as caught:
            authenticator.check(header)
        assert caught.value.status == 401
    Authenticator(None).check(None)


def test_secrets_are_not_in_the_configs_repr():
    config = GatewayConfig("c", "m", "/m", key_hashes=(b"hash",), engine_key="engine-secret")
    assert "hash'" not in repr(config)
    assert "engine-secret" not in repr(config)
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoCapacity("none", 3.0), 503),
        (EngineFailed("w", 500, "x"), 502),
        (PeerGone("w", "x"), 502),
        (KvMismatch("p", "d", ("x",)), 503),
        (InvalidInput("x"), 500),
        (errors.overloaded("x", 0.2), 429),
    ],
)
def test_every_error_of_ours_has_a_status(error, status):
    told = errors.from_cluster(error)
    assert told.status == status
    assert pickle.loads(pickle.dumps(told)).body() == told.body()
    if status in (429, 503):
        assert int(dict(told.headers())[b"retry-after"]) >= 1


async def test_admission_bounds_both_places_and_queue():
    gate = Admission(
        LimitsSpec(max_concurrent_requests=1, max_queued_requests=1, queue_timeout_s=5)
    )
    order = []
    go = asyncio.Event()

    async def work(name: str) -> None:
        async with gate.place():
            order.append(name)
            await go.wait()

    first = asyncio.create_task(work("first"))
    await asyncio.sleep(0)
    second = asyncio.create_task(work("second"))
    await asyncio.sleep(0)
    assert (gate.running, gate.queued) == (1, 1)
    with pytest.raises(ApiError) as caught:
        await work("third")
    assert caught.value.status == 429
    go.set()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]
    assert (gate.running, gate.queued) == (0, 0)


async def test_client_that_leaves_the_queue_gives_up_its_seat():
    gate = Admission(
        LimitsSpec(max_concurrent_requests=1, max_queued_requests=1, queue_timeout_s=5)
    )
    go = asyncio.Event()

    async def work() -> None:
        async with gate.place():
            await go.wait()

    first = asyncio.create_task(work())
    await asyncio.sleep(0)
    for _ in range(3):
        waiting = asyncio.create_task(work())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert gate.queued == 0
    # A place that is handed to somebody who leaves in the same moment goes on to the next.
    leaving = asyncio.create_task(work())
    await asyncio.sleep(0)
    go.set()
    await first
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert gate.running == 0


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_cutoff_ends_the_work_when_time_is_up_or_the_client_leaves():
    loop = asyncio.get_running_loop()
    with pytest.raises(DeadlinePassed):
        async with Cutoff(loop.time() + 0.01):
            await asyncio.sleep(10)

    async def leaves() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def work() -> None:
        async with Cutoff(loop.time() + 10) as cutoff:
            cutoff.watch_client(leaves)
            await asyncio.sleep(10)

    with pytest.raises(ClientGone):
        await work()
    async with Cutoff(loop.time() + 10) as cutoff:
        cutoff.watch_client(never)


async def test_a_client_that_has_its_whole_answer_may_leave_and_the_request_ends_by_itself():
    async def leaves() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        pass

    responder = Responder(send, "r")
    await responder.begin_events(200, [])
    await responder.piece(b'data: {"choices": []}\n\n')
    assert not responder.has_all
    await responder.piece(b'data: {"choices": []}\n\ndata: [DONE]\n\n')
    async with Cutoff(asyncio.get_running_loop().time() + 10) as cutoff:
        cutoff.watch_client(leaves, lambda: responder.has_all)
        await asyncio.sleep(0.1)


async def test_cutoff_lets_a_foreign_cancellation_through():
    async def work() -> None:
        async with Cutoff(asyncio.get_running_loop().time() + 10):
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def receiving(*bodies: bytes):
    messages = [
        {"type": "http.request", "body": body, "more_body": index + 1 < len(bodies)}
        for index, body in enumerate(bodies)
    ]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


async def test_body_is_read_up_to_its_limit():
    assert await read_body({}, receiving(b"ab", b"c"), 3) == b"abc"
    for bodies in ((b"abcd",), (b"ab", b"cd"), (b"ab", b"cd", b"e")):
        with pytest.raises(ApiError) as caught:
            await read_body({}, receiving(*bodies), 3)
        assert caught.value.status == 413
    with pytest.raises(ApiError):
        await read_body({b"content-length": b"4"}, receiving(b"a"), 3)


async def test_client_that_leaves_while_it_sends_is_gone():
    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        await read_body({}, receive, 10)


def test_request_ids_are_unique_and_fit_for_headers():
    ids = RequestIds()
    assert ids.new() != ids.new()
    assert ids.new()[:20] != RequestIds().new()[:20]
    assert ids.for_client({b"x-request-id": b"abc-1.2:3_4"}) == "abc-1.2:3_4"
    for hostile in (b"", b"a\r\nb", b"a b", b"\xff", b"x" * 97):
        assert ids.for_client({b"x-request-id": hostile}) != hostile.decode("latin-1")


async def test_error_after_the_stream_began_is_its_last_event():
    sent = []

    async def send(message):
        sent.append(message)

    responder = Responder(send, "id")
    await responder.begin_events(200, [])
    await responder.error(errors.engine_failed("it broke"))
    assert sent[-1]["body"].startswith(b'data: {"error":{"message":"it broke"')
    assert not sent[-1].get("more_body")
    await responder.error(errors.internal())
    assert len(sent) == 2
