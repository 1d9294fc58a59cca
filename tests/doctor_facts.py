"""A rack that is sound, and what each of its hosts tells: tests change one thing and look.

survey = rack(pools=[...], islands=[...])      pools as a file has them
told = sound(plan)                             what the probe would tell on a sound host
"""

from __future__ import annotations

from typing import Any

from cluster.nodes.doctor.examine import Examination, Reached
from cluster.nodes.doctor.expect import HostPlan, Survey, survey
from cluster.nodes.doctor.facts import Clock, Facts
from cluster.topology.schema import ServingSpec, Topology

GIB = 2**30
NPU_POOL = {
    "engine": "vllm_ascend",
    "hardware": "atlas_a3",
    "placement": {"resources": {"NPU": 16}},
    "parallel": {"tensor": 16},
}
GPU_POOL = {
    "engine": "vllm",
    "hardware": "h200",
    "placement": {"resources": {"GPU": 8}},
    "parallel": {"tensor": 8},
}
HEAD, GPU_1, GPU_2, NPU_1, NPU_2 = (f"10.0.0.{n}" for n in range(1, 6))
_PACKAGES = {
    "ray": "2.60.0",
    "pdcluster": "0.1.0",
    "vllm": "0.33.0",
    "vllm-ascend": "0.23.0.post1",
    "nixl-cu12": "1.5.1",
    "mooncake-transfer-engine-npu": "0.3.11.post1",
}


def ray_half(**changes: Any) -> dict[str, Any]:
    """A head, two H200 hosts and two Atlas A3 hosts."""
    value: dict[str, Any] = {
        "cluster_name": "rack",
        "provider": {"type": "external", "module": "cluster.nodes.BareHostProvider"},
        "auth": {"ssh_user": "ops", "ssh_private_key": "~/.ssh/rack"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"node_config": {"hosts": [HEAD]}, "resources": {"CPU": 8}},
            "h200": {
                "node_config": {"hosts": [GPU_1, GPU_2]},
                "resources": {"CPU": 64, "GPU": 8},
                "min_workers": 2,
            },
            "a3": {
                "node_config": {"hosts": [NPU_1, NPU_2], "ssh_user": "npu", "ssh_port": 2222},
                "resources": {"CPU": 64, "NPU": 16},
                "min_workers": 2,
            },
        },
        "head_start_ray_commands": ["python3 -m cluster.nodes.start ray start --head --port=6379"],
        "worker_start_ray_commands": [
            "python3 -m cluster.nodes.start ray start --address=$RAY_HEAD_IP:6379"
        ],
    }
    return {**value, **changes}


def serving_half(**changes: Any) -> dict[str, Any]:
    """An island over NIXL on H200, one over vLLM-Ascend's Mooncake on A3."""
    value: dict[str, Any] = {
        "model": {"id": "/models/glm", "max_model_len_tokens": 8192},
        "pools": [
            {"name": "prefill-gpu", "role": "prefill", **GPU_POOL},
            {"name": "decode-gpu", "role": "decode", **GPU_POOL},
            {"name": "prefill-npu", "role": "prefill", **NPU_POOL},
            {"name": "decode-npu", "role": "decode", **NPU_POOL},
        ],
        "islands": [
            {"name": "gpu", "pools": ["prefill-gpu", "decode-gpu"], "connector": "nixl"},
            {
                "name": "npu",
                "pools": ["prefill-npu", "decode-npu"],
                "connector": "ascend_mooncake",
            },
        ],
        "gateway": {"host": "0.0.0.0", "port": 8000, "ingress": "direct"},
        "control": {"host": HEAD, "port": 8001},
    }
    return {**value, **changes}


def rack(ray: dict[str, Any] | None = None, **serving: Any) -> Survey:
    topology = Topology(
        path="rack.yaml",
        cluster_name="rack",
        ray=ray or ray_half(),
        serving=ServingSpec.model_validate(serving_half(**serving)),
    )
    return survey(topology, is_this_machine=False)


def plan_of(of: Survey, address: str) -> HostPlan:
    return next(plan for plan in of.hosts if plan.address == address)


def sound(plan: HostPlan) -> dict[str, Any]:
    """What the probe tells on a host that is all it should be."""
    folder = {"writable": True, "owner": "ops", "free_bytes": 900 * GIB}
    return {
        "system": {"hostname": plan.address, "python": "3.12.11", "executable": "/usr/bin/python3"},
        "packages": dict(_PACKAGES),
        "interpreters": {},
        "commands": dict.fromkeys(plan.commands, True),
        "libraries": dict.fromkeys(plan.needs.libraries, ""),
        "devices": {
            "nvidia": int(plan.resources.get("GPU", 0)),
            "davinci": int(plan.resources.get("NPU", 0)),
        },
        "gpu": {"names": ["NVIDIA H200"], "driver": "580.95.05"}
        if "GPU" in plan.needs.accelerators
        else None,
        "npu": {"driver": "25.5.0", "cann": "9.1.0"} if "NPU" in plan.needs.accelerators else None,
        "rdma_devices": ["mlx5_0"],
        "memory_bytes": 500 * GIB,
        "shm": {"total_bytes": 250 * GIB, "free_bytes": 250 * GIB},
        "limits": {"open_files": 1_048_576, "locked_bytes": -1},
        "ephemeral": [40_000, 60_999],
        "ports": [{"port": port.port, "address": port.address} for port in plan.ports],
        "folders": {name: {**folder, "path": f"/{name}"} for name in ("state", "runtime", "ray")},
        "models": [
            {
                "id": need.id,
                "path": need.id,
                "exists": True,
                "files": 100,
                "bytes": 744 * 10**9,
                "digest": "d",
                "config": "c",
                "free_bytes": 900 * GIB,
            }
            for need in plan.models
        ],
        "container": None,
        "errors": {},
    }


def examination(of: Survey, **told: dict[str, Any]) -> Examination:
    """Of a sound rack. `told`: by `at(address)`, those of a host's facts that differ."""
    facts = {}
    for plan in of.hosts:
        own = told.get(at(plan.address), {})
        facts[plan.address] = Facts.of({**sound(plan), **own})
    return Examination(
        facts=facts,
        clocks={address: Clock(offset_s=0.01, error_s=0.005) for address in facts},
        reached=tuple(Reached(source, target, 20_001, "") for source, target in of.pairs),
    )


def at(address: str) -> str:
    """The keyword of `examination` for a host."""
    return f"host_{address.replace('.', '_')}"
