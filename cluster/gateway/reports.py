"""Tell the controller of this replica's traffic, about once a second.

Beside the requests, never before them: one report is under way at a time, a lost one is made up for
by the next (`traffic`), and while the controller does not answer it is asked less and less often.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from cluster.settings import CONTROLLER_ACTOR, ray_namespace
from cluster.traffic import GatewayReport

log = logging.getLogger(__name__)

EVERY_S = 1.0
_ANSWER_BOUND_S = 5.0
_BACKOFF_S = 1.0
_BACKOFF_MAX_S = 10.0


class ReportSink(Protocol):
    """Who hears of this replica's traffic."""

    async def send(self, report: GatewayReport) -> int:
        """Number of the newest record that it has of this replica; 0: none, or it did not answer.

        Never raises on its own account. Cancel: safe; the report may have arrived."""
        ...


class NoSink:
    """Nobody: tests, benchmarks, engines that nobody manages."""

    async def send(self, report: GatewayReport) -> int:
        return report.records_to


class ControllerSink:
    """The cluster's controller. To be used inside a process that Ray runs."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._controller: Any = None
        self._backoff_s = 0.0

    async def send(self, report: GatewayReport) -> int:
        import ray

        try:
            if self._controller is None:
                # By name: a restarted controller is another actor with the same name.
                self._controller = await asyncio.to_thread(
                    ray.get_actor, CONTROLLER_ACTOR, namespace=ray_namespace(self._cluster)
                )
            async with asyncio.timeout(_ANSWER_BOUND_S):
                known: int = await self._controller.gateway_report.remote(report)
            self._backoff_s = 0.0
            return known
        except (ValueError, TimeoutError, ray.exceptions.RayError) as error:
            self._controller = None
            if not self._backoff_s:
                log.info("controller did not take a report why=%s", type(error).__name__)
            self._backoff_s = min(max(self._backoff_s * 2, _BACKOFF_S), _BACKOFF_MAX_S)
        await asyncio.sleep(self._backoff_s)
        return 0


async def keep_reporting(
    sink: ReportSink, report: Callable[[], GatewayReport], known: Callable[[int], None]
) -> None:
    """Until it is cancelled. `known`: is told up to which number the controller has records."""
    while True:
        await asyncio.sleep(EVERY_S)
        known(await sink.send(report()))
