"""A Ray of several nodes on this machine, for tests that are about nodes, and what a worker on one
of them is told. All on loopback."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.identity import Role, WorkerId
from cluster.models.store import resolve
from cluster.settings import ray_namespace
from cluster.topology.schema import HealthSpec, IslandSpec, ModelSpec, PoolSpec
from cluster.workers import tree
from cluster.workers.spec import WorkerSpec

_NODE = {
    "num_cpus": 1,
    "object_store_memory": 100 << 20,
    "node_ip_address": "127.0.0.1",
    "include_dashboard": False,
}


@contextlib.contextmanager
def ray_of(cluster: str, nodes: Sequence[dict[str, Any]]) -> Iterator[Cluster]:
    """One node for each of `nodes`, which says how it differs (arguments of `ray start` as Ray's
    own tests have them); the first is the head. The driver is connected, in the namespace of
    `cluster`; whatever has that cluster's mark is ended afterwards, passed or not."""
    home = Path(tempfile.mkdtemp(prefix="pdn-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(variable, str(home))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        # Ray notes its address in this folder, and elsewhere only if it is told so by this name.
        patch.setenv("RAY_TMPDIR", str(home))
        (home / "ray").mkdir()
        # Else a driver that is told 127.0.0.1 looks for Ray at the machine's outward address.
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        racked = Cluster(initialize_head=True, head_node_args={**_NODE, **nodes[0]})
        try:
            for node in nodes[1:]:
                racked.add_node(**{**_NODE, **node})
            ray.init(address=racked.address, namespace=ray_namespace(cluster), log_to_driver=False)
            yield racked
        finally:
            ray.shutdown()
            racked.shutdown()
            for process in tree.marked(f"{cluster}/"):
                tree.send(process, signal.SIGKILL)
            shutil.rmtree(home, ignore_errors=True)


def simulated_worker(cluster: str, index: int, pool: dict[str, Any], **more: Any) -> WorkerSpec:
    """`pool`: keys of a mixed pool of simulated engines."""
    model = ModelSpec(id="simulated")
    found = resolve(model, lambda _what, _part: None)
    return WorkerSpec(
        cluster=cluster,
        id=WorkerId("pool", index, 1),
        role=Role.MIXED,
        model=model,
        model_path=found.path,
        model_digest=found.digest,
        max_model_len_tokens=4096,
        kv_bytes_per_token=1024,
        pool=PoolSpec(name="pool", role=Role.MIXED, engine="simulated", **pool),
        island=IslandSpec(name="here", pools=["pool"]),
        health=HealthSpec(),
        engine_key="worker-test-secret",
        host="127.0.0.1",
        **more,
    )
