"""Is one host fit for what the topology asks of it? HostPlan, Facts ─▶ findings. Pure.

One function per check; each bound stands beside its reason. What a host did not tell is not held
against it, except that it did not (`_not_known`). Called by: nodes.doctor.report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.nodes.doctor.expect import HostPlan
from cluster.nodes.doctor.facts import Facts, Port
from cluster.nodes.doctor.findings import HostFinding, Severity, listed, size
from cluster.nodes.doctor.judge_models import models
from cluster.nodes.doctor.needs import NPUS, Packages
from cluster.nodes.marks import ray_owner
from cluster.workers.ports import DEFAULT_WINDOW, window_outside

# Ray's own: it gives three tenths of memory, at most 200 GB, to its object store unless it is told
# otherwise, and warns and goes to /tmp if /dev/shm has no room for that (ray_constants.py).
_STORE_SHARE, _STORE_MOST = 0.3, 200 * 10**9
# Each rank of a vLLM engine maps one ring of 10 x 24 MiB and shares one of 10 x 16 MiB
# (shm_broadcast.py, VLLM_MQ_MAX_CHUNK_BYTES_MB); the rest is for NCCL's and HCCL's own segments.
_SHM_PER_RANK = 512 * 2**20
# What Ray's cluster files ask for (`ulimit -n 65536`), and where Ray says that it is too low.
_OPEN_FILES_WANTED, _OPEN_FILES_NEEDED = 65_536, 4_096
_GPU_NAMES = {"h200": "H200"}
_DEVICE_FILES = {"GPU": "/dev/nvidia*", "NPU": "/dev/davinci*"}
# Logs, keys and snapshots of the cluster; Ray's session folder with its logs.
_ROOM_NEEDED = {"state": 2**30, "runtime": 64 * 2**20, "ray": 5 * 2**30}

_ENGINES = "an engine"

Check = Callable[[HostPlan, Facts, str], Iterator[HostFinding]]


def judge(plan: HostPlan, facts: Facts, cluster: str) -> list[HostFinding]:
    """All that is wrong with one host by itself. `cluster`: whose own processes may hold ports."""
    return [finding for check in CHECKS for finding in check(plan, facts, cluster)]


def _said(
    plan: HostPlan, severity: Severity, check: str, found: str, expected: str, fix: str
) -> HostFinding:
    return HostFinding(severity, plan.address, check, found, expected, fix)


def programs(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Programs that Ray and the provider call, and the container's."""
    for name, is_there in facts.commands.items():
        if not is_there:
            package = {"flock": "util-linux", "ssh": "openssh-client"}.get(name, name)
            yield _said(
                plan, "error", "programs", f"no command {name}", f"{name} on the PATH",
                f"apt-get install {package}",
            )  # fmt: skip
    if plan.container is None or facts.container is None:
        return
    image, there = plan.container.image, facts.container
    if there.error:
        fix = f"install {plan.container.command} and let the ssh user run it (group docker)"
        if there.runs:
            fix = f"{plan.container.command} rm -f {plan.container.name}; `ray up` starts it anew"
        yield _said(plan, "error", "container", there.error, "a container can be started", fix)
    elif there.has_image is False:
        fix = f"{plan.container.command} pull {image}, or wait for `ray up` to do so"
        yield _said(plan, "warning", "container", f"no image {image}", "the image on the host", fix)


def packages(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Ray and pdcluster in Ray's Python, each pool's engine in its own."""
    there = _ray_packages(plan, facts)
    if there is None:
        return
    for name in ("ray", "pdcluster"):
        if name not in there:
            where = facts.system.executable or plan.python
            yield _said(
                plan, "error", "packages", f"{where} has no {name}", f"{name} beside Ray's Python",
                f"install {name} there, or start Ray with the Python that has it",
            )  # fmt: skip
    for need in plan.needs.packages:
        yield from _engine(plan, facts, need, there)


def _ray_packages(plan: HostPlan, facts: Facts) -> dict[str, str] | None:
    """What Ray's Python has; None: not known, as for a container that does not run yet."""
    if plan.container is None:
        return None if "packages" in facts.errors else facts.packages
    return facts.container.packages if facts.container and facts.container.runs else None


def _engine(
    plan: HostPlan, facts: Facts, need: Packages, ray_has: dict[str, str]
) -> Iterator[HostFinding]:
    pools, python = f"pools {', '.join(need.for_pools)}", need.python or "Ray's Python"
    if plan.container is not None and need.python:
        return  # an interpreter inside the container
    has = ray_has if plan.container else facts.packages
    if need.python:
        there = facts.interpreters.get(need.python)
        if there is None or there.exists is None:
            return
        if not there.exists:
            fix = f"install it, or correct `interpreter` of {pools}"
            yield _said(plan, "error", "engine", f"no {need.python}", f"it runs {pools}", fix)
            return
        if there.error:
            fix = f"run `{need.python} -c 'import importlib.metadata'` and mend what it says"
            yield _said(plan, "error", "engine", f"{need.python}: {there.error}", "it runs", fix)
            return
        has = there.packages
    if need.is_program:
        return
    for choice in need.wanted:
        if not any(name in has for name in choice):
            yield _said(
                plan, "error", "engine", f"{python} has no {' or '.join(choice)}",
                f"what {pools} need", f"install {choice[0]} there, or give the pool an "
                "`interpreter` that has it",
            )  # fmt: skip


def libraries(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """What Mooncake's wheel links against."""
    if plan.container is not None:
        return
    missing = [name for name, why in facts.libraries.items() if why]
    if missing:
        known = [plan.needs.libraries[name] for name in missing if name in plan.needs.libraries]
        fix = f"apt-get install {' '.join(known)}"
        yield _said(plan, "error", "libraries", f"no {listed(missing)}", "Mooncake loads them", fix)


def devices(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Device files against the resources of the node type, and against what the hardware is."""
    if facts.devices is None:
        return
    counts = {"GPU": facts.devices.nvidia, "NPU": facts.devices.davinci}
    for name, files in _DEVICE_FILES.items():
        stated, found = plan.resources.get(name, 0), counts[name]
        if stated > found:
            yield _said(
                plan, "error", "devices", f"{found} {files}", f"{name}: {stated:g}, as "
                f"{plan.node_type} states",
                "mend the driver (dmesg names a card that is lost), or lower the resource",
            )  # fmt: skip
        elif found > stated and (stated or name in plan.needs.accelerators) and plan.resources:
            yield _said(
                plan, "warning", "devices", f"{found} {files}", f"{name}: {stated:g}, as "
                f"{plan.node_type} states", f"write {name}: {found}, or the others stay idle",
            )  # fmt: skip
    for hardware in plan.needs.hardware:
        most = NPUS.get(hardware)
        if most is not None and 0 < counts["NPU"] < most:
            yield _said(
                plan, "warning", "devices", f"{counts['NPU']} /dev/davinci*", f"{most} on a node "
                f"of {hardware}" + (", two dies to a card" if hardware == "atlas_a3" else ""),
                "correct `hardware`, or mend the driver (npu-smi info names the cards)",
            )  # fmt: skip
        wanted = _GPU_NAMES.get(hardware)
        names = facts.gpu.names if facts.gpu is not None else ()
        if wanted and names and not any(wanted in name for name in names):
            fix = "correct `hardware`, or the pool's labels so that it goes elsewhere"
            yield _said(plan, "error", "devices", listed(list(names)), f"hardware {hardware}", fix)


def drivers(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Drivers that answer, and their versions. Inside a container the toolkit is the image's."""
    if "GPU" in plan.needs.accelerators and facts.gpu is not None and facts.gpu.error:
        fix = "install or mend the NVIDIA driver; `nvidia-smi` must list the cards"
        yield _said(plan, "error", "drivers", facts.gpu.error, "nvidia-smi answers", fix)
    if "NPU" not in plan.needs.accelerators or facts.npu is None:
        return
    if facts.npu.error:
        fix = "install or mend the Ascend driver; `npu-smi info` must list the cards"
        yield _said(plan, "error", "drivers", facts.npu.error, "npu-smi answers", fix)
    if not facts.npu.driver:
        found = "no version in /usr/local/Ascend/driver/version.info"
        fix = "install the Ascend driver, or make the file readable to the ssh user"
        yield _said(plan, "error", "drivers", found, "an Ascend driver", fix)
    if not facts.npu.cann and plan.container is None:
        found = "no CANN toolkit in $ASCEND_TOOLKIT_HOME or /usr/local/Ascend/ascend-toolkit/latest"
        fix = "install CANN, and source its set_env.sh in ~/.bashrc or before `ray start`"
        yield _said(plan, "error", "drivers", found, "a CANN toolkit", fix)


def shared_memory(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """/dev/shm against what engines with several ranks and Ray's object store put there."""
    total = facts.shm.total_bytes
    if total is None or (plan.container is not None and not plan.container.is_ipc_shared):
        return  # Ray sizes a container's by itself
    ranks = plan.needs.ranks
    engines = ranks * _SHM_PER_RANK if ranks > 1 else 0
    memory = facts.memory_bytes or 0
    store = plan.object_store_bytes
    if store is None:
        # For this machine alone, `pdcluster up` tells Ray its smallest.
        is_here = plan.access is None
        store = 80 * 2**20 if is_here else int(min(memory * _STORE_SHARE, _STORE_MOST))
    fix = (
        f"mount -o remount,size={-(-(engines + store) // 2**30)}g /dev/shm (and the same in "
        "/etc/fstab), or give `ray start` a smaller --object-store-memory"
    )
    if total < engines:
        yield _said(
            plan, "error", "shared memory", f"/dev/shm has {size(total)}",
            f"{size(engines)}: {size(_SHM_PER_RANK)} for each of {ranks} ranks of an engine", fix,
        )  # fmt: skip
    elif total < engines + store:
        yield _said(
            plan, "warning", "shared memory", f"/dev/shm has {size(total)}",
            f"{size(engines + store)}: {size(store)} for Ray's object store"
            + (f", {size(engines)} for engines" if engines else "")
            + "; Ray takes the disk instead", fix,
        )  # fmt: skip


def limits(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Open files and locked memory, as far as Ray's processes may raise them."""
    if plan.container is not None:
        return  # the container's own, by its run options
    files = facts.limits.open_files
    fix = "raise `nofile` in /etc/security/limits.conf (hard), or `ulimit` before `ray start`"
    if files is not None and 0 <= files < _OPEN_FILES_WANTED:
        severity: Severity = "error" if files < _OPEN_FILES_NEEDED else "warning"
        found, wanted = f"nofile {files}", f"{_OPEN_FILES_WANTED}: each stream and peer takes some"
        yield _said(plan, severity, "limits", found, wanted, fix)
    locked, cards = facts.limits.locked_bytes, facts.rdma_devices
    if not plan.needs.registers_memory or cards is None:
        return
    if not cards:
        yield _said(
            plan, "warning", "network", "no RDMA device in /sys/class/infiniband",
            "one: KV blocks go over TCP without", "install the network card's driver (rdma link)",
        )  # fmt: skip
    elif locked is not None and locked >= 0:
        yield _said(
            plan, "error", "limits", f"memlock {size(locked)}", "unlimited: KV blocks are "
            "registered with the network card", "set `memlock unlimited` in "
            "/etc/security/limits.conf, and log in anew",
        )  # fmt: skip


def ports(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Fixed ports: free (or this cluster's own), and not among those that the kernel hands out."""
    who = {port.port: port.who for port in plan.ports}
    for port in facts.ports:
        name = f"{who.get(port.port, 'port')} {port.port}"
        if port.error and not port.owner.startswith((ray_owner(cluster), f"{cluster}/")):
            found = f"{name} on {port.address}: {_why(port)}"
            fix = "end what listens there, or write another port"
            if not _is_held(port):
                fix = "write an address that `ip address` shows on the host, or 0.0.0.0"
            yield _said(plan, "error", "ports", found, "it can be bound", fix)
    if facts.ephemeral is None:
        return
    kernel = range(facts.ephemeral[0], facts.ephemeral[1] + 1)
    windows = {_ENGINES: DEFAULT_WINDOW, **plan.needs.windows}
    # Above all of ours, and no lower than where the kernel begins of itself.
    first = max(32_768, *(window.stop for window in windows.values()))
    fix = f"sysctl -w net.ipv4.ip_local_port_range='{first} 60999' (and in /etc/sysctl.d)"
    for number, name in who.items():
        if number in kernel:
            found = f"{name} {number} is among the kernel's own ports ({_ends(kernel)})"
            wanted = "a port that no outgoing connection can have by chance"
            yield _said(plan, "warning", "ports", found, wanted, f"{fix}, or write another port")
    for name, window in windows.items():
        if max(kernel.start, window.start) < min(kernel.stop, window.stop):
            found = f"the kernel's own ports ({_ends(kernel)}) reach into {_ends(window)}"
            wanted = f"none there: {name} listens there"
            if name == _ENGINES:
                wanted += f" (as it is, in {_ends(window_outside(kernel))})"
            yield _said(plan, "warning", "ports", found, wanted, fix)


def _is_held(port: Port) -> bool:
    return bool(port.by) or "in use" in port.error


def _why(port: Port) -> str:
    return f"{port.error}, held by {port.by}" if port.by else port.error


def _ends(window: range) -> str:
    return f"{window.start}-{window.stop - 1}"


def folders(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Where state, sockets and Ray's session go: writable, with some room."""
    if plan.container is not None:
        return
    for name, needed in _ROOM_NEEDED.items():
        folder = facts.folders.get(name)
        if folder is None:
            continue
        if folder.writable is False:
            owner = f", which belongs to {folder.owner}" if folder.owner else ""
            yield _said(
                plan, "error", "folders", f"{folder.path} cannot be written{owner}",
                f"the ssh user can make its {name} folder there",
                "change its owner, or set XDG_STATE_HOME, XDG_RUNTIME_DIR, RAY_TMPDIR",
            )  # fmt: skip
        elif folder.free_bytes is not None and folder.free_bytes < needed:
            found = f"{folder.path} has {size(folder.free_bytes)} free"
            yield _said(plan, "warning", "folders", found, size(needed), "free some")


def not_known(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """What could not be looked at."""
    for part, why in facts.errors.items():
        found = f"{part} could not be looked at: {why}"
        yield _said(plan, "warning", "doctor", found, "it can be read", "look by hand")


CHECKS: tuple[Check, ...] = (
    programs,
    packages,
    libraries,
    devices,
    drivers,
    shared_memory,
    limits,
    ports,
    folders,
    models,
    not_known,
)
