"""vLLM's Mooncake connector with records, early release and a bound bootstrap server.

Loaded by the engine: `"kv_connector_module_path": "cluster.kv.connectors.mooncake"`.

    RecordingMooncakeConnector   stock transfers, plus
                                 - `recording`
                                 - a bootstrap server on the engine's address (stock: all of them)
                                 - a dead prefill engine fails a pull at once; stock waits for
                                   VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT + 60 s
    CpuMooncakeConnector         the same on CPU, over TCP

Mooncake's transfer engine listens on two ports of all interfaces, chosen by itself between 15000
and 17000, and offers no way to say otherwise (0.3.13; MC_TCP_BIND_ADDRESS sets what it announces).
With a loopback address as the engine's own, those sockets are confined to the loopback device;
with any other they stay open, and a firewall has to guard them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    KVConnectorBase_V1,
    MooncakeConnector,
    MooncakeConnectorScheduler,
    MooncakeConnectorWorker,
    get_mooncake_bootstrap_addr,
    should_launch_bootstrap_server,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_utils import (
    MooncakeBootstrapServer,
)
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_ip, split_zmq_path

from cluster.kv.connectors import cpu_sampling
from cluster.kv.connectors.recording import RecordingConnector, SendLog
from cluster.transfers import TransferReporter

NOW = float("-inf")  # a lease that ended before any clock started
CONNECT_TIMEOUT_S = 5.0


class _RecordingWorker(MooncakeConnectorWorker):  # type: ignore[misc]
    """Tells taken from expired from released, ends leases on request, notices a dead peer."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        own_server = _bootstrap_on_own_address(vllm_config)
        with listeners_confined(get_ip()):
            super().__init__(vllm_config, engine_id, kv_cache_config)
        self._own_bootstrap = own_server
        if own_server is not None:
            own_server.start()
        speaks = self.tp_rank == 0 and self.pp_rank == 0
        self._sends = SendLog(TransferReporter() if speaks else None)

    def shutdown(self) -> None:
        super().shutdown()
        if (server := getattr(self, "_own_bootstrap", None)) is not None:
            server.shutdown()

    def release(self, request_ids: Iterable[str]) -> None:
        """End these requests' leases. Runs on the sender's loop, after this step's grants."""
        if not self.is_kv_consumer:
            asyncio.run_coroutine_threadsafe(self._expire(frozenset(request_ids)), self.sender_loop)

    async def _expire(self, request_ids: frozenset[str]) -> None:
        for pinned in self.reqs_need_send.values():
            if pinned.p_req_id in request_ids:
                self._sends.release_asked((pinned.p_req_id,))
                pinned.expire_time = NOW

    async def record_send_reqs(self, metadata: Any) -> None:
        await super().record_send_reqs(metadata)
        self._sends.pinned(
            id_ for id_, (_, block_ids) in metadata.reqs_to_send.items() if block_ids
        )

    async def fetch_finished_sending_reqs(self) -> set[str]:
        taken = set(self.finished_sending_reqs)
        finished: set[str] = await super().fetch_finished_sending_reqs()
        self._sends.taken(taken)
        self._sends.let_go(finished - taken)
        return finished

    async def receive_kv_from_single_worker(
        self, worker_addr: str, pull_metas: dict[str, Any]
    ) -> None:
        pull = asyncio.ensure_future(super().receive_kv_from_single_worker(worker_addr, pull_metas))
        watch = asyncio.ensure_future(_until_gone(worker_addr))
        try:
            await asyncio.wait((pull, watch), return_when=asyncio.FIRST_COMPLETED)
            if not pull.done():
                pull.cancel()
                await asyncio.wait((pull,))
                self._handle_failed_recv(
                    pull_metas, set(pull_metas), f"the prefill engine at {worker_addr} is gone"
                )
        finally:
            watch.cancel()


@contextlib.contextmanager
def listeners_confined(address: str) -> Iterator[None]:
    """TCP listeners opened inside on all interfaces accept from the loopback device only, if
    `address` is a loopback address. The kernel shows them as `0.0.0.0%lo`.

    Anywhere else there is no device to bind to: a peer on the same machine comes through the
    loopback device, one on another machine through the network's."""
    before = _wildcard_listeners()
    yield
    if not ipaddress.ip_address(address).is_loopback:
        return
    for descriptor in _wildcard_listeners() - before:
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")


def _wildcard_listeners() -> set[int]:
    """File descriptors of this process that are TCP listeners on all interfaces."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as probe:
                if (
                    probe.family in (socket.AF_INET, socket.AF_INET6)
                    and probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    and probe.getsockname()[0] in ("0.0.0.0", "::")
                ):
                    found.add(int(name))
    return found


def _bootstrap_on_own_address(vllm_config: Any) -> Any | None:
    """A bootstrap server for the engine's own address, to be started, if this rank is the one.

    The stock worker binds 0.0.0.0, unless the configuration names a server elsewhere: so name
    ours. None on decode engines and on ranks that only register."""
    transfer = vllm_config.kv_transfer_config
    if transfer.kv_role == "kv_consumer":
        return None
    if transfer.get_from_extra_config("bootstrap_server_address", None) is not None:
        return None
    launches = should_launch_bootstrap_server(vllm_config)
    host, port = get_mooncake_bootstrap_addr(vllm_config)
    if vllm_config.parallel_config.nnodes_within_dp == 1:
        host = get_ip()
    transfer.kv_connector_extra_config["bootstrap_server_address"] = f"{host}:{port}"
    return MooncakeBootstrapServer(host, port) if launches else None


async def _until_gone(worker_addr: str) -> None:
    """Return when nothing listens at `tcp://host:port` any more. Cancel: safe.

    A plain TCP connection tells: it ends with the process. The peer's ZeroMQ ends one that never
    greets after 30 s; then it is made again. A host that vanishes without a word is noticed only
    by the pull's own timeout."""
    _, host, port = split_zmq_path(worker_addr)
    while True:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError):
            return
        try:
            with contextlib.suppress(OSError):
                while await reader.read(1024):
                    pass
        finally:
            writer.close()


class _CpuWorker(_RecordingWorker):
    """For CPUs; on any other platform the same as its base."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        if current_platform.device_type != "cpu":
            super().__init__(vllm_config, engine_id, kv_cache_config)
            return
        vllm_config.kv_transfer_config.kv_connector_extra_config.setdefault(
            "mooncake_protocol", "tcp"
        )
        with _no_accelerator_needed():
            super().__init__(vllm_config, engine_id, kv_cache_config)
        cpu_sampling.repair()

    def _bind_sender_thread_device(self) -> None:
        if current_platform.device_type != "cpu":
            super()._bind_sender_thread_device()


@contextlib.contextmanager
def _no_accelerator_needed() -> Iterator[None]:
    """The stock constructor asks torch for the current accelerator and raises where there is
    none. For its length on a CPU, the answer is device 0 and selecting it does nothing."""
    accelerator, platform = torch.accelerator, type(current_platform)
    stock_index, stock_select = accelerator.current_device_index, platform.__dict__["set_device"]
    accelerator.current_device_index = lambda: 0
    platform.set_device = classmethod(lambda cls, device: None)
    try:
        yield
    finally:
        accelerator.current_device_index = stock_index
        platform.set_device = stock_select


class RecordingMooncakeConnector(RecordingConnector, MooncakeConnector):  # type: ignore[misc]
    """The stock connector; see the module for what is added."""

    _worker_class: type[_RecordingWorker] = _RecordingWorker

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # Past MooncakeConnector's constructor, which makes the stock worker.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        self.engine_id = vllm_config.kv_transfer_config.engine_id
        self.connector_scheduler = None
        self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = MooncakeConnectorScheduler(
                vllm_config, self.engine_id, kv_cache_config
            )
        else:
            self.connector_worker = self._worker_class(vllm_config, self.engine_id, kv_cache_config)
        self._record(vllm_config, kv_cache_config)


class CpuMooncakeConnector(RecordingMooncakeConnector):
    """For CPU engines, over TCP."""

    _worker_class = _CpuWorker
