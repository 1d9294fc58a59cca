"""The Dockerfile, as far as it can be judged without a container engine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENGINES = ("cpu", "cuda", "ascend")
INSTALL = ROOT / "docker" / "install"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text on one line), without comments."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (match[1], match[2].strip()) for match in re.finditer(r"^([A-Z]+)\s+(.*)$", joined, re.M)
    ]


TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = instructions()


def texts(name: str) -> list[str]:
    return [text for instruction, text in INSTRUCTIONS if instruction == name]


def arguments() -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts("ARG") if "=" in text)


def test_there_is_a_base_for_every_engine_and_every_one_is_pinned():
    stages = dict(text.split(" AS ")[::-1] for text in texts("FROM") if " AS " in text)
    assert set(stages) == {f"base-{engine}" for engine in ENGINES}
    assert set(ENGINES) <= set(PROJECT["optional-dependencies"])
    for image in stages.values():
        assert re.search(r":\d+\.\d+\.\d+-", image), image


def test_all_images_have_the_same_python_and_pdcluster_takes_it():
    bases = [text for text in texts("FROM") if " AS " in text]
    # Ubuntu 24.04's own Python is 3.12.
    assert all("3.12" in base or "ubuntu24.04" in base for base in bases)
    low, high = re.findall(r"\d+\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= 12 < int(high)
    assert "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor" in " ".join(texts("ENV"))


def test_engines_have_the_versions_of_the_projects_extras():
    """They are installed by extra, so nothing but what an extra leaves open is pinned here."""
    script = INSTALL.read_text()
    for engine in ENGINES:
        assert f'".[{engine}]"' in script
    (ascend,) = PROJECT["optional-dependencies"]["ascend"]
    version = ascend.removeprefix("vllm-ascend==")
    assert arguments()["ASCEND_VLLM"] == re.sub(r"\.post\d+$", "", version)
    named = set(re.findall(r"[\w-]+==\S+", script))
    assert {pin.strip('"') for pin in named} == {
        "vllm==$ASCEND_VLLM",
        "mooncake-transfer-engine-npu==$ASCEND_MOONCAKE",
        "triton-ascend==$ASCEND_TRITON",
    }


def test_what_is_copied_exists_and_is_not_ignored():
    *_, ignored = (ROOT / ".dockerignore").read_text().partition("*\n")
    kept = [line[1:] for line in ignored.splitlines() if line.startswith("!")]
    for text in texts("COPY"):
        *sources, _ = text.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source, k) or source.startswith(f"{k}/") for k in kept), source
    assert all((ROOT / name).exists() for name in kept)


def test_whoever_runs_in_the_container_is_not_root():
    names = [name for name, _ in INSTRUCTIONS]
    assert texts("USER") == ["${USER_ID}"]
    assert arguments()["USER_ID"] == "1000"
    # What needs root comes before.
    assert names.index("USER") > max(i for i, n in enumerate(names) if n in ("RUN", "COPY"))


def test_its_health_is_checked_and_its_start_command_exists():
    (check,) = texts("HEALTHCHECK")
    assert "--start-period" in check
    assert "PDCLUSTER_HEALTH_URL" in check
    (command,) = texts("CMD")
    path = re.search(r"/opt/pdcluster/(\S+?)\"", command)
    assert path is not None
    assert (ROOT / path[1]).stat().st_mode & 0o111
    topology = re.search(r"PDCLUSTER_TOPOLOGY=/opt/pdcluster/(\S+)", " ".join(texts("ENV")))
    assert topology is not None
    assert (ROOT / topology[1]).exists()


def test_ray_finds_what_it_calls_in_the_container():
    """`docker run IMAGE bash`, then `docker exec` of login shells, and rsync; `~` by HOME."""
    run = " ".join(texts("RUN"))
    for package in ("rsync", "openssh-client"):
        assert package in run
    assert "HOME=/home/pdcluster" in " ".join(texts("ENV"))
    assert texts("ENTRYPOINT") == ["[]"]
    profile = ROOT / "docker" / "profile.sh"
    command = f"PATH=/usr/bin:/bin; . {profile}; echo $PATH"
    done = subprocess.run(["sh", "-euc", command], capture_output=True, text=True, check=True)
    assert done.stdout == "/opt/venv/bin:/usr/bin:/bin\n"


def test_libraries_that_mooncake_needs_are_in_the_image():
    from cluster.nodes.doctor.needs import MOONCAKE_LIBRARIES

    run = " ".join(texts("RUN"))
    assert all(package in run for package in MOONCAKE_LIBRARIES.values())


@pytest.mark.parametrize("path", [ROOT / "Dockerfile", INSTALL], ids=lambda path: path.name)
def test_it_names_no_package_index(path):
    assert not re.search(r"https?://(?!127\.0\.0\.1)|--(extra-)?index-url", path.read_text())


def test_the_install_script_refuses_an_engine_that_it_does_not_know():
    done = subprocess.run([INSTALL, "rocm"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "write cpu, cuda or ascend" in done.stderr
