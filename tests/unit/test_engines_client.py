"""Metrics text to EngineSample, and what a client makes of bad answers."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web

from cluster.engines.base import MetricNames, Probes
from cluster.engines.client import EngineClient, parse_sample
from cluster.engines.registry import adapter
from cluster.errors import EngineFailed

NAMES = adapter("vllm").metrics
TEXT = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="m"} 10.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:external_prefix_cache_hits counter
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 99.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 4.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="m"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 7.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 70.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",position="2"} 1.7e+09
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0"} 1.0
"""


def test_ranks_are_summed_and_the_fullest_cache_counts():
    sample = parse_sample(TEXT, NAMES)
    assert sample.running == 5
    assert sample.kv_usage == 0.75
    assert sample.kv_usage_sum == 1.0
    assert sample.generation_tokens == 10
    assert sample.external_tokens == 99
    assert sample.steps == 7
    assert sample.spec_accepted_per_position == (8, 5)
    assert (sample.block_size_tokens, sample.cache_dtype) == (128, "auto")


def test_series_that_are_absent_count_as_nothing():
    sample = parse_sample("", NAMES)
    assert sample.running == sample.spec_drafts == sample.block_size_tokens == 0
    assert sample.cache_dtype == ""
    assert sample.spec_accepted_per_position == ()


async def ask(handler, call, probes=None):
    """Run `call(client)` against a server that answers everything with `handler`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as session:
            return await call(EngineClient(url, "key", session, probes))
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (500, "oops", "oops"),
        (200, "<html>", "broke off"),
        (200, "[]", "without usage"),
        (200, '{"usage":{"completion_tokens":0}}', "asked for 1 token, got 0"),
    ],
)
async def test_no_token_is_an_engine_failure(status: int, body: str, says: str):
    async def handler(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer key"
        return web.Response(status=status, text=body)

    with pytest.raises(EngineFailed, match=says):
        await ask(handler, lambda client: client.generate_one("m"))


async def test_metrics_that_are_no_metrics_are_an_engine_failure():
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text='x{ "')

    with pytest.raises(EngineFailed, match="not Prometheus text"):
        await ask(handler, lambda client: client.sample(NAMES))


async def test_a_version_without_version_is_an_engine_failure():
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({})

    with pytest.raises(EngineFailed, match="/version"):
        await ask(handler, lambda client: client.version())


async def test_nobody_there_is_not_up():
    async with aiohttp.ClientSession() as session:
        client = EngineClient("http://127.0.0.1:1", "", session)
        assert not await client.is_up()
        with pytest.raises(EngineFailed) as caught:
            await client.generate_one("m")
        assert caught.value.status is None


async def test_an_engine_is_asked_where_its_adapter_says():
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.method == "POST":
            assert (await request.json())["bootstrap_room"] == 0
            return web.json_response({"usage": {"completion_tokens": 1}})
        if request.path == "/numbers":
            return web.Response(text="running 3.0\npage 64.0\n")
        return web.json_response({"version": "9"})

    probes = Probes("/alive", "/numbers", "/who", one_token={"bootstrap_room": 0})
    names = MetricNames("running", "", "", "", "", cache_info="", block_size="page")

    async def all_of_it(client: EngineClient) -> None:
        assert await client.is_up()
        await client.generate_one("m")
        sample = await client.sample(names)
        assert (sample.running, sample.block_size_tokens) == (3, 64)
        assert await client.version() == "9"

    await ask(handler, all_of_it, probes)
    assert asked == ["/alive", "/v1/completions", "/numbers", "/who"]


async def test_an_engine_that_tells_no_version_is_not_asked():
    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("asked")

    assert await ask(handler, lambda client: client.version(), Probes(version="")) == ""


@pytest.mark.parametrize("engine", ["vllm", "vllm_ascend", "sglang", "xllm", "ktransformers"])
def test_every_engine_shows_load_and_progress(engine: str):
    names = adapter(engine).metrics
    assert all((names.running, names.waiting, names.kv_usage))
    assert all((names.prompt_tokens, names.generation_tokens, names.steps))


@pytest.mark.parametrize(
    ("status", "is_dead"), [(200, False), (404, False), (500, True), (503, True)]
)
async def test_only_a_server_error_where_it_is_defined_means_dead(status, is_dead):
    async def handler(request):
        return web.Response(status=status if request.path == "/alive" else 503)

    async def check(client):
        return await client.check_alive()

    if is_dead:
        with pytest.raises(EngineFailed, match=f"answered {status}: its /alive says it is dead"):
            await ask(handler, check, Probes(death="/alive"))
    else:
        await ask(handler, check, Probes(death="/alive"))
    await ask(handler, check, Probes())


async def test_an_engine_that_does_not_answer_has_not_said_that_it_is_dead():
    async with aiohttp.ClientSession() as session:
        await EngineClient("http://127.0.0.1:1", "", session, Probes(death="/x")).check_alive()
