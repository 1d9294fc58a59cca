"""The ASGI application of one gateway replica.

Raw ASGI, no framework: what a framework does per request costs more than all the gateway does
(measured: 2 to 5 times the throughput). `create_app` is the one way to make it; uvicorn or
Ray Serve runs it (`hosting`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from time import monotonic

import orjson

from cluster.errors import ClusterError, EngineFailed, NoCapacity
from cluster.gateway import course, errors, recovery, requests, wire
from cluster.gateway.admission import Admission
from cluster.gateway.auth import Authenticator
from cluster.gateway.config import GatewayConfig
from cluster.gateway.cutoff import Cutoff, DeadlinePassed
from cluster.gateway.engines import Engines
from cluster.gateway.errors import ApiError
from cluster.gateway.exchange import Exchange
from cluster.gateway.fleet import Fleet
from cluster.gateway.journal import Journal
from cluster.gateway.metaserver import Metaserver
from cluster.gateway.metrics_port import MetricsPort
from cluster.gateway.parts import Parts
from cluster.gateway.quarantine import Quarantine
from cluster.gateway.render import Renderer
from cluster.gateway.reports import NoSink, ReportSink, keep_reporting
from cluster.gateway.requests import Endpoint
from cluster.gateway.route import can_route
from cluster.gateway.source import SnapshotSource
from cluster.gateway.story import Story
from cluster.gateway.tally import Tally
from cluster.gateway.trace_context import NoTracing, Tracing
from cluster.gateway.upstream import Upstream
from cluster.gateway.wire import ClientGone, Receive, RequestIds, Responder, Scope, Send
from cluster.kv.coordinator import Coordinator, Releaser
from cluster.kv.events import KvEvents
from cluster.kv.index import BlockIndex
from cluster.observe.gateway_metrics import CONTENT_TYPE, GatewayMetrics, Now
from cluster.observe.kv_metrics import KvMetrics
from cluster.request_records import RequestRecord, pack
from cluster.traffic import GatewayReport

log = logging.getLogger(__name__)

_JSON: errors.Headers = [(b"content-type", b"application/json")]
_CLIENT_GONE = 499
_RENDER_CHECK_EVERY_S = 1.0
# Without a controller for so long: to be there and say so is better than not to be there.
_FIRST_SNAPSHOT_WITHIN_S = 20.0

Handler = Callable[["Call"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, as handlers get it."""

    path: str
    headers: Mapping[bytes, bytes]
    receive: Receive
    responder: Responder
    story: Story


def create_app(
    config: GatewayConfig,
    source: SnapshotSource,
    releaser: Releaser,
    node_address: str = "127.0.0.1",
    sink: ReportSink | None = None,
    replica: str = "",
) -> Gateway:
    """An ASGI 3 callable with lifespan. Nothing runs before its lifespan starts.

    `node_address`: where engines reach this node, for connectors whose decode engine calls back.
    `sink`: who hears of its traffic, and of its port for metrics; None: nobody. `replica`: its id
    for its life, the same that `source` tells; "": one is made up.
    """
    tally = Tally(replica or uuid.uuid4().hex, time.time)
    return Gateway(config, source, releaser, node_address, sink or NoSink(), tally)


class Gateway:
    """See `create_app`."""

    def __init__(
        self,
        config: GatewayConfig,
        source: SnapshotSource,
        releaser: Releaser,
        node_address: str,
        sink: ReportSink,
        tally: Tally,
    ) -> None:
        self._config = config
        self._source = source
        self._sink = sink
        self._metrics = GatewayMetrics()
        self._metrics_port = MetricsPort(node_address, self._metrics.exposition)
        self._upstream = Upstream(f"Bearer {config.engine_key}" if config.engine_key else "")
        self._index = BlockIndex()
        self._fleet = Fleet(
            self._index,
            config.local_prefill_below_tokens,
            monotonic,
            # Replicas that saw the same snapshot must not all begin with the same worker.
            first_turn=random.randrange(1 << 16),
        )
        engines = Engines(self._upstream, self._fleet, config.model)
        self._parts = Parts(
            config=config,
            fleet=self._fleet,
            renderer=Renderer(
                config.model_path, engines, lambda why: self._metrics.render_asks.labels(why).inc()
            ),
            engines=engines,
            coordinator=Coordinator(releaser, KvMetrics(self._metrics.registry), monotonic),
            metaserver=Metaserver(node_address),
            quarantine=Quarantine(),
            metrics=self._metrics,
            tally=tally,
        )
        self._journal = Journal()
        self._tracing = _tracing(config, tally.gateway)
        self._ids = RequestIds()
        self._authenticator = Authenticator(config.key_hashes)
        self._admission = Admission(config.limits, self._metrics.queue_s.observe)
        self._metrics.watch(self._now)
        self._metrics.know(
            answers=product((Endpoint.CHAT.value, Endpoint.COMPLETIONS.value), errors.STATUSES),
            retries=recovery.WHYS,
            recoveries=product(course.WAYS, [cause.value for cause in recovery.Cause]),
        )
        self._routes: dict[str, dict[str, Handler]] = {
            Endpoint.CHAT.value: {"POST": self._chat},
            Endpoint.COMPLETIONS.value: {"POST": self._completions},
            "/tokenize": {"POST": self._ask_engine},
            "/detokenize": {"POST": self._ask_engine},
            "/v1/models": {"GET": self._models},
            f"/v1/models/{config.model}": {"GET": self._model},
            "/health": {"GET": self._health, "HEAD": self._health},
            "/ready": {"GET": self._ready, "HEAD": self._ready},
            "/metrics": {"GET": self._show_metrics},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    # One request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = monotonic()
        path: str = scope["path"]
        headers = dict(scope["headers"])
        responder = Responder(send, self._ids.for_client(headers))
        story = Story(responder.request_id)
        status = 0
        try:
            call = Call(path, headers, receive, responder, story)
            await self._handler(path, scope["method"])(call)
        except (ClientGone, asyncio.CancelledError) as left:
            status = _CLIENT_GONE
            if isinstance(left, asyncio.CancelledError):
                raise
        except errors.Rejected as rejected:
            if responder.is_started:  # an engine does not want to go on with another's answer
                await self._fail(errors.engine_failed(str(rejected)), responder, story)
            else:
                await responder.rejected(rejected)
        except DeadlinePassed:
            passed = errors.deadline_passed(self._config.limits.request_deadline_s)
            await self._fail(passed, responder, story)
        except ClusterError as error:
            await self._fail(errors.from_cluster(error), responder, story)
        except Exception:
            log.exception("request %s failed path=%.200r", story.request_id, path)
            await self._fail(errors.internal(), responder, story)
        finally:
            took_s = monotonic() - began_s
            endpoint = path if path in self._routes else "other"
            self._metrics.answered(endpoint, status or responder.status)
            if path in (Endpoint.CHAT, Endpoint.COMPLETIONS):
                self._metrics.took(path, took_s)
            line = story.line(path, status or responder.status, took_s)
            if line is not None:
                log.log(*line)
            record = story.end(status or responder.status, took_s)
            if record is not None:
                self._journal.add(pack(record))
                self._tracing.end(record, story.trace)

    async def _fail(self, error: ApiError, responder: Responder, story: Story) -> None:
        story.failed(error)
        await responder.error(error)

    def _handler(self, path: str, method: str) -> Handler:
        methods = self._routes.get(path)
        if methods is None:
            if path.startswith("/v1/models/"):
                raise errors.unknown_model(path.removeprefix("/v1/models/"), self._config.model)
            raise errors.unknown_path(path)
        handler = methods.get(method)
        if handler is None:
            raise errors.wrong_method(path, method, methods)
        return handler

    async def _chat(self, call: Call) -> None:
        await self._generate(Endpoint.CHAT, call)

    async def _completions(self, call: Call) -> None:
        await self._generate(Endpoint.COMPLETIONS, call)

    async def _generate(self, endpoint: Endpoint, call: Call) -> None:
        self._authenticate(call)
        story, engine_id = call.story, self._engine_id(call)
        record = RequestRecord(
            story.request_id,
            engine_id,
            self._parts.tally.gateway,
            endpoint.value,
            time.time() - story.now_s(),
        )
        story.keep(record, self._tracing.begin(call.headers))
        deadline_at = self._deadline_at()
        async with Cutoff(deadline_at) as cutoff:
            raw = await wire.read_body(call.headers, call.receive, self._config.max_body_bytes)
            request = requests.parse(endpoint, raw, self._config.model)
            began_at = asyncio.get_running_loop().time()
            record.is_stream, record.read_s = request.is_stream, story.now_s()
            cutoff.watch_client(call.receive, lambda: call.responder.has_all)
            async with self._admission.place():
                record.placed_s = story.now_s()
                await Exchange(
                    self._parts,
                    request,
                    call.responder,
                    story,
                    engine_id,
                    began_at,
                    deadline_at,
                ).run()

    async def _ask_engine(self, call: Call) -> None:
        """/tokenize and /detokenize: an engine's own answer, from whichever is least busy."""
        self._authenticate(call)
        async with Cutoff(self._deadline_at()) as cutoff:
            raw = await wire.read_body(call.headers, call.receive, self._config.max_body_bytes)
            requests.check_model(requests.load_json(raw), self._config.model)
            cutoff.watch_client(call.receive)
            async with self._admission.place():
                trace = NoTracing().begin(call.headers).lines(0)
                answer = await self._parts.engines.ask_any(
                    call.path, raw, self._engine_id(call), trace
                )
                await call.responder.whole(200, answer, _JSON)

    def _authenticate(self, call: Call) -> None:
        self._authenticator.check(call.headers.get(b"authorization"))

    def _deadline_at(self) -> float:
        return asyncio.get_running_loop().time() + self._config.limits.request_deadline_s

    def _engine_id(self, call: Call) -> str:
        """Contains the id the client knows, and is unique even where clients' ids are not."""
        if b"x-request-id" not in call.headers:
            return call.responder.request_id
        return f"{call.responder.request_id}-{self._ids.new()}"

    # The endpoint about itself

    async def _models(self, call: Call) -> None:
        self._authenticate(call)
        body = {"object": "list", "data": [self._describe_model()]}
        await call.responder.whole(200, orjson.dumps(body), _JSON)

    async def _model(self, call: Call) -> None:
        self._authenticate(call)
        await call.responder.whole(200, orjson.dumps(self._describe_model()), _JSON)

    def _describe_model(self) -> dict[str, object]:
        return {
            "id": self._config.model,
            "object": "model",
            "created": 0,
            "owned_by": "pdcluster",
            "max_model_len": self._fleet.table.longest_tokens or None,
        }

    async def _health(self, call: Call) -> None:
        await call.responder.whole(200, b'{"status":"alive"}', _JSON)

    async def _ready(self, call: Call) -> None:
        if can_route(self._fleet.table):
            await call.responder.whole(200, b'{"status":"ready"}', _JSON)
            return
        raise NoCapacity("no pair of workers can serve a request now", 2.0)

    async def _show_metrics(self, call: Call) -> None:
        headers = [(b"content-type", CONTENT_TYPE)]
        await call.responder.whole(200, self._metrics.exposition(), headers)

    # Life

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()  # startup
        kv_events = KvEvents(self._index)
        if not isinstance(self._sink, NoSink):  # else nobody would hear of the port
            await self._metrics_port.start()
        tasks = [
            asyncio.create_task(self._follow_snapshots(kv_events), name="follow snapshots"),
            asyncio.create_task(self._check_renderer(), name="check renderer"),
            asyncio.create_task(
                keep_reporting(self._sink, self._report, self._journal.known), name="report"
            ),
        ]
        await self._first_snapshot()
        await send({"type": "lifespan.startup.complete"})
        await receive()  # shutdown: the server has waited for requests in flight
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await kv_events.close()
        await self._metrics_port.close()
        await self._parts.metaserver.close()
        await self._parts.coordinator.close()
        await self._upstream.close()
        await self._tracing.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _first_snapshot(self) -> None:
        """A replica that knows no worker would refuse what its neighbours can serve."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_SNAPSHOT_WITHIN_S):
                while not self._fleet.snapshot.version:
                    await self._fleet.changed()

    async def _follow_snapshots(self, kv_events: KvEvents) -> None:
        while True:
            snapshot = await self._source.next(self._fleet.snapshot.version)
            for url in self._fleet.update(snapshot):
                self._upstream.drop(url)
            self._parts.coordinator.observe(snapshot)
            pools = {worker.id.pool for worker in snapshot.workers}
            self._metrics.know(failures=product(pools, [stage.value for stage in recovery.Stage]))
            kv_events.observe(snapshot)
            log.debug("snapshot %d taken workers=%d", snapshot.version, len(snapshot.workers))

    def _report(self) -> GatewayReport:
        gate, snapshot = self._admission, self._fleet.snapshot
        present = {view.id for view in snapshot.workers}
        report = self._parts.tally.report(
            snapshot.version, gate.running, gate.queued, gate.refused, present
        )
        journal = self._journal
        return replace(
            report,
            metrics_url=self._metrics_port.url,
            records_to=journal.number,
            records=journal.unknown(),
        )

    def _now(self) -> Now:
        gate, snapshot = self._admission, self._fleet.snapshot
        pairs = {(link.prefill_pool, link.decode_pool) for link in snapshot.links}
        return Now(
            gate.running,
            gate.queued,
            gate.refused_by_reason,
            snapshot.version,
            self._parts.tally.pairs(besides=pairs),
        )

    async def _check_renderer(self) -> None:
        """Ask an engine as soon as there is one."""
        while True:
            while not self._fleet.table.longest_ready_tokens:
                await self._fleet.changed()
            try:
                await self._parts.renderer.check()
                return
            except (EngineFailed, NoCapacity) as error:
                log.info("rendering not checked yet why=%s", error)
            await asyncio.sleep(_RENDER_CHECK_EVERY_S)


def _tracing(config: GatewayConfig, replica: str) -> Tracing:
    if config.tracing is None:
        return NoTracing()
    # Only now: whoever does not trace need not wait for its imports, nor have them in memory.
    from cluster.gateway.tracing import OtlpTracing

    return OtlpTracing.start(config.tracing, config.cluster, replica)
