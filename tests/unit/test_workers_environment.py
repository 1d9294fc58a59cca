import subprocess
import sys
from pathlib import Path

from cluster.engines.base import Launch
from cluster.settings import OWNER_ENV
from cluster.workers import tree
from cluster.workers.environment import engine_environment, link_package

INHERITED = {
    "PATH": "/usr/bin",
    "HOME": "/root",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "ASCEND_RT_VISIBLE_DEVICES": "4",
    "OMP_NUM_THREADS": "1",
    "RAY_JOB_ID": "01000000",
    "RAY_CLIENT_MODE": "0",
    OWNER_ENV: "somebody/else",
}


def environment(launch, inherited=INHERITED):
    r = Path("/r")
    return engine_environment(
        inherited, launch, "c/decode/0#1:0", r / "transfers", r / "release", r / "python"
    )


def test_devices_are_inherited_and_rays_own_variables_are_not():
    env = environment(Launch(argv=("engine",)))
    assert env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert env["ASCEND_RT_VISIBLE_DEVICES"] == "4"
    assert env["PATH"] == "/usr/bin"
    assert not [name for name in env if name.startswith("RAY_")]


def test_rays_thread_count_does_not_bind_the_engine_and_the_adapters_does():
    assert "OMP_NUM_THREADS" not in environment(Launch(argv=("engine",)))
    env = environment(Launch(argv=("engine",), env={"OMP_NUM_THREADS": "2"}))
    assert env["OMP_NUM_THREADS"] == "2"


def test_every_engine_process_carries_the_mark_of_its_own_worker():
    assert environment(Launch(argv=("engine",)))[OWNER_ENV] == "c/decode/0#1:0"


def test_the_supervisor_looks_for_the_same_mark_without_importing_settings():
    assert tree.OWNER_ENV == OWNER_ENV


def test_sockets_and_secrets_reach_the_engine_by_environment():
    env = environment(Launch(argv=("engine",), secret_env={"VLLM_API_KEY": "k"}))
    assert env["VLLM_API_KEY"] == "k"
    assert env["PDCLUSTER_TRANSFER_SOCKET"] == "/r/transfers"
    assert env["PDCLUSTER_RELEASE_SOCKET"] == "/r/release"


def test_our_package_comes_first_on_the_path_and_keeps_what_was_there():
    launch = Launch(argv=("engine",), env={"PYTHONPATH": "/mine"})
    assert environment(launch)["PYTHONPATH"] == "/r/python:/mine"
    assert environment(Launch(argv=("e",)))["PYTHONPATH"] == "/r/python"


# What an engine loads of ours before it is asked for anything of vLLM's.
LOADED_BY_ENGINES = """
import importlib.util, sys
for name in ("transfers", "kv.connectors.recording", "engines.vllm_headless", "workers.supervisor"):
    importlib.import_module(f"cluster.{name}")
print(sys.modules["cluster.transfers"].__file__)
for name in ("nixl", "mooncake"):
    assert importlib.util.find_spec(f"cluster.kv.connectors.{name}") is not None
print([name for name in FOREIGN if importlib.util.find_spec(name) is not None])
"""


def test_an_interpreter_without_our_packages_finds_the_connectors_and_nothing_else(tmp_path):
    folder = link_package(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["cluster"]
    foreign = ("ray", "vllm", "pydantic", "aiohttp", "tests", "pytest")
    # Without `site` an interpreter has the standard library and PYTHONPATH only, as a bare venv.
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"FOREIGN = {foreign!r}{LOADED_BY_ENGINES}"],
        env={"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()
    assert where == str(folder / "cluster/transfers.py")
    assert found == "[]"
