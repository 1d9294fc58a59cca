"""vLLM's NIXL pull connector with records and early release, and a quiet form of it for CPUs.

Loaded by the engine: `"kv_connector_module_path": "cluster.kv.connectors.nixl"`.

    RecordingNixlConnector   CUDA: stock behaviour plus `recording`
    QuietNixlConnector       CPU: the same without the progress thread, with affinity left alone
                             and UCX on the network device that has the engine's address only

On CPU with the progress thread off, UCX advances when the engine steps. Between engines of one
machine blocks move through shared memory and nobody waits; between machines (TCP) a pull waits
for the step that the prefill engine is in.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.util
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.kv.connectors.recording import RecordingConnector, SendLog
from cluster.kv.connectors.silence import SilenceBound
from cluster.transfers import TransferReporter

# vLLM sets this itself (a UCX memory leak), but only before the first import of `nixl`.
os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")


def _alias_nixl() -> None:
    """Make `import nixl` find `nixl_cu12` where only that is installed.

    vLLM imports `nixl`, which is in a meta package that pulls in the CUDA 12 and the CUDA 13
    build; a CPU machine needs neither twice."""
    if "nixl" in sys.modules or importlib.util.find_spec("nixl") is not None:
        return
    with contextlib.suppress(ModuleNotFoundError):
        sys.modules["nixl"] = importlib.import_module("nixl_cu12")
        for name in ("_api", "_bindings", "_utils", "logging"):
            sys.modules[f"nixl.{name}"] = importlib.import_module(f"nixl_cu12.{name}")


_alias_nixl()

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (  # noqa: E402
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (  # noqa: E402
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import (  # noqa: E402
    NixlPullConnectorWorker,
)
from vllm.platforms import current_platform  # noqa: E402

from cluster.kv.connectors import cpu_sampling  # noqa: E402

NOW = float("-inf")  # a lease that ended before any clock started


class _RecordingPullWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """Tells taken from expired from released, ends leases on request, and does not wait for ever
    for a peer that fell silent."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        speaks = self.tp_rank == 0 and self.pcp_rank == 0
        self._sends = SendLog(TransferReporter() if speaks else None)
        self._silence = SilenceBound()

    def start_load_kv(self, metadata: Any) -> None:
        super().start_load_kv(metadata)
        self._sends.pinned(id_ for id_ in metadata.reqs_to_send if id_ in self._reqs_to_send)

    def release(self, request_ids: Iterable[str]) -> None:
        """End these requests' leases at the next reaping, which follows in the same step."""
        self._sends.release_asked(id_ for id_ in request_ids if id_ in self._reqs_to_send)

    def _get_new_notifs(self) -> set[str]:
        # On both sides: prefill, too, must learn that its way to a peer is dead, or it answers the
        # peer's next connection on the old one.
        self._silence.look()
        taken: set[str] = super()._get_new_notifs()
        self._sends.taken(taken)
        return taken

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        # Here and not in release(): a heartbeat handled in between would extend the lease again.
        for request_id in self._sends.releasing:
            if request_id in self._reqs_to_send:
                self._reqs_to_send[request_id] = NOW
        before = set(done_sending)
        super()._reap_expired_send_leases(done_sending)
        self._sends.let_go(done_sending - before)


class _QuietPullWorker(_RecordingPullWorker):
    """For CPUs; on any other platform the same as its base."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        if current_platform.device_type != "cpu":
            super().__init__(vllm_config, engine_id, kv_cache_config)
            return
        device = network_device(_own_address())
        if device is not None:
            # Without it UCX listens on every network device of the machine.
            os.environ.setdefault("UCX_NET_DEVICES", device)
        # The stock constructor pins the main thread to the last core of each NUMA node. With two
        # engines on two cores, decoding 24 tokens then took 30-45 s instead of 1.4 s.
        affinity = os.sched_getaffinity(0)
        try:
            with _no_progress_thread():
                super().__init__(vllm_config, engine_id, kv_cache_config)
        finally:
            os.sched_setaffinity(0, affinity)
        cpu_sampling.repair()


@contextlib.contextmanager
def _no_progress_thread() -> Iterator[None]:
    """NIXL agents made inside have no progress thread, which spins: 100 % of a core per engine.

    The stock constructor offers no way to say so; its module's name for the agent's configuration
    is exchanged for the length of the constructor."""
    stock = base_worker.nixl_agent_config
    base_worker.nixl_agent_config = functools.partial(stock, enable_prog_thread=False)
    try:
        yield
    finally:
        base_worker.nixl_agent_config = stock


def _own_address() -> str:
    return os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST") or os.environ.get("VLLM_HOST_IP") or ""


def network_device(address: str) -> str | None:
    """The network device that has this IPv4 address; None if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # no IPv4 address on this one
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


class RecordingNixlConnector(RecordingConnector, NixlPullConnector):  # type: ignore[misc]
    """The stock pull connector; see `recording` for what is added."""

    _worker_class: type[_RecordingPullWorker] = _RecordingPullWorker

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # Past NixlPullConnector's constructor, which makes the stock worker.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = NixlPullConnectorScheduler(
                vllm_config, self.engine_id, kv_cache_config
            )
        else:
            self.connector_worker = self._worker_class(vllm_config, self.engine_id, kv_cache_config)
        self._record(vllm_config, kv_cache_config)


class QuietNixlConnector(RecordingNixlConnector):
    """For CPU engines: no spinning thread, no pinning, no socket beyond the engine's address."""

    _worker_class = _QuietPullWorker
