"""A replica's own port for its metrics: `GET /metrics`, and nothing else.

Replicas share the endpoint's port, and whoever asks there for metrics gets those of the replica
that happened to take the connection. Prometheus needs each one's: it learns this port from the
controller, which hears of it with the replica's reports (traffic.GatewayReport.metrics_url).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web

from cluster.observe.gateway_metrics import CONTENT_TYPE

log = logging.getLogger(__name__)

_PATH = "/metrics"


class MetricsPort:
    """`host`: the address of this node that Prometheus reaches: where engines are reached, too."""

    def __init__(self, host: str, exposition: Callable[[], bytes]) -> None:
        self._host = host
        self._exposition = exposition
        self._runner: web.AppRunner | None = None
        self.url = ""  # once it listens

    async def start(self) -> None:
        """Listen, on a port that the kernel chooses. Where that cannot be, the replica serves
        without."""
        app = web.Application()
        app.router.add_get(_PATH, self._show)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, 0).start()
        except OSError as error:
            await runner.cleanup()
            log.warning("metrics not served host=%s why=%s", self._host, error)
            return
        self._runner = runner
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{runner.addresses[0][1]}{_PATH}"

    async def close(self) -> None:
        """May be called twice."""
        runner, self._runner, self.url = self._runner, None, ""
        if runner is not None:
            await runner.cleanup()

    async def _show(self, _request: web.Request) -> web.Response:
        headers = {"content-type": CONTENT_TYPE.decode()}
        return web.Response(body=self._exposition(), headers=headers)
