"""What a node is, told from its device files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.engines.host import host_facts
from cluster.engines.packages import installed


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
