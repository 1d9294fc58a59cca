"""What a node is, told from its device files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.engines.base import Platform
from cluster.engines.host import devices_of, host_facts, interface_of, platform_of
from cluster.engines.packages import installed
from cluster.identity import Role
from cluster.topology.schema import HardwareName, PlacementSpec, PoolSpec

ADDRESSES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["10.0.0.5", "fe80::1%eth0"],
    "bond0.7": ["192.168.7.5", "2001:db8::5", "52:54:00:12:34:56"],
}


@pytest.mark.parametrize(
    ("device", "platform"),
    [("nvidia0", "cuda"), ("davinci0", "npu"), ("null", "cpu"), ("davinci_manager", "cpu")],
)
def test_platform_follows_the_device_files(tmp_path: Path, device: str, platform: str):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / device).touch()
    assert host_facts(tmp_path).platform == platform


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])
def test_cpu_flags_of_x86_and_arm(tmp_path: Path, name: str):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor : 0\n{name}: fpu avx2 bf16\n")
    facts = host_facts(tmp_path)
    assert facts.cpu_flags == {"fpu", "avx2", "bf16"}
    assert facts.cores >= 1


def test_a_node_without_cpuinfo_has_no_flags(tmp_path: Path):
    assert host_facts(tmp_path).cpu_flags == frozenset()


def test_packages_of_another_interpreter_are_read_without_running_it(tmp_path: Path):
    info = tmp_path / "lib/python3.11/site-packages/nixl_cu12-1.5.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nixl-cu12\nVersion: 1.5.1\n")
    python = str(tmp_path / "bin/python")
    assert installed(python, ("nixl", "nixl-cu12")) == "1.5.1"
    assert installed(python, ("mooncake",)) is None
    assert installed(sys.executable, ("pytest",)) == pytest.__version__


def pool(**keys: Any) -> PoolSpec:
    return PoolSpec(name="p", role=Role.MIXED, **keys)


def asks(**resources: float) -> PlacementSpec:
    return PlacementSpec(resources=resources)


@pytest.mark.parametrize(
    ("keys", "platform"),
    [
        ({}, "cuda"),
        ({"placement": asks(CPU=8)}, "cuda"),
        ({"placement": asks(CPU=8, NPU=16)}, "npu"),
        ({"placement": asks(GPU=0.5)}, "cuda"),
        ({"hardware": "cpu"}, "cpu"),
        ({"hardware": "atlas_a3", "placement": asks(NPU=16)}, "npu"),
        # A pool's own word goes before what its resources are called.
        ({"hardware": "cpu", "placement": asks(GPU=1)}, "cpu"),
    ],
)
def test_what_the_pool_states_goes_before_what_its_node_shows(keys: dict[str, Any], platform: str):
    assert platform_of(pool(**keys), found="cuda") == platform


@pytest.mark.parametrize("hardware", get_args(HardwareName))
def test_every_hardware_name_has_a_platform(hardware: HardwareName):
    assert platform_of(pool(hardware=hardware), "cpu") in get_args(Platform)


def test_devices_are_those_that_ray_shows_to_the_worker_of_that_platform():
    shown = {"CUDA_VISIBLE_DEVICES": "0,3", "ASCEND_RT_VISIBLE_DEVICES": "8, 9,10"}
    assert devices_of("cuda", shown) == ("0", "3")
    assert devices_of("npu", shown) == ("8", "9", "10")
    assert devices_of("cpu", shown) == ()
    assert devices_of("npu", {}) == devices_of("cuda", {"CUDA_VISIBLE_DEVICES": ""}) == ()


@pytest.mark.parametrize(
    ("host", "interface"),
    [
        ("10.0.0.5", "eth0"),
        ("192.168.7.5", "bond0.7"),
        ("2001:DB8:0::5", "bond0.7"),
        ("fe80::1", "eth0"),
        ("127.0.0.1", "lo"),
        ("127.0.0.2", "lo"),
        ("10.0.0.6", ""),
        ("node7.example.org", ""),
    ],
)
def test_the_interface_is_the_one_that_has_the_address(host: str, interface: str):
    assert interface_of(host, ADDRESSES) == interface
