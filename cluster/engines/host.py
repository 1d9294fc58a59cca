"""What a node is, as far as an engine's command line depends on it.

    host_facts      from device files and /proc: importing torch to ask costs seconds and memory
    platform_of     what the pool states of its nodes goes before what is found there
    devices_of      the accelerators that Ray gave this process
    interface_of    the network interface that has an address

Called by: workers.preparation, launcher. All but `host_facts` are pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cluster.engines.base import HostFacts, Platform
from cluster.topology.schema import HardwareName, PoolSpec

_PLATFORMS: Mapping[HardwareName, Platform] = {
    "cpu": "cpu",
    "h200": "cuda",
    "atlas_a2": "npu",
    "atlas_a3": "npu",
}
_ACCELERATORS: Mapping[str, Platform] = {"GPU": "cuda", "NPU": "npu"}
# Ray sets these for an actor that takes GPU or NPU; on an Atlas A3 each number is one die, two to
# a card (ray/_private/accelerators/npu.py counts /dev/davinciN).
_VISIBLE_DEVICES: Mapping[Platform, str] = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
}


def host_facts(root: Path = Path("/")) -> HostFacts:
    """Facts of the node this runs on. `root`: where /dev and /proc are (tests)."""
    return HostFacts(
        platform=_platform(root / "dev"),
        cpu_flags=_cpu_flags(root / "proc/cpuinfo"),
        cores=len(os.sched_getaffinity(0)),
    )


def platform_of(pool: PoolSpec, found: Platform) -> Platform:
    """What the pool's engines run on: its `hardware`, else the accelerator that its placement
    asks for, else what was `found` on the node (a container may hide the device files)."""
    if pool.hardware is not None:
        return _PLATFORMS[pool.hardware]
    resources = pool.placement.resources
    return next((kind for name, kind in _ACCELERATORS.items() if name in resources), found)


def devices_of(platform: Platform, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Numbers of the visible accelerators; empty if the node decides or has none."""
    variable = _VISIBLE_DEVICES.get(platform)
    stated = environ.get(variable, "") if variable is not None else ""
    return tuple(number.strip() for number in stated.split(",") if number.strip())


def interface_of(host: str, addresses: Mapping[str, Iterable[str]]) -> str:
    """The interface in `addresses` (name -> its addresses) that has the address `host`, or ""
    when none has it. Loopback is one network: 127.0.0.2 is on the interface of 127.0.0.1."""
    wanted = _address(host)
    if wanted is None:
        return ""
    loopback = ""
    for name, texts in addresses.items():
        for own in map(_address, texts):
            if own == wanted:
                return name
            if own is not None and own.is_loopback:
                loopback = loopback or name
    return loopback if wanted.is_loopback else ""


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """None: a name, or the address of another family (MAC)."""
    try:
        # psutil writes a link-local address with its interface: fe80::1%eth0.
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _platform(dev: Path) -> Platform:
    if any(dev.glob("davinci[0-9]*")):
        return "npu"
    if any(dev.glob("nvidia[0-9]*")):
        return "cuda"
    return "cpu"


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(value.split())
    return frozenset()
