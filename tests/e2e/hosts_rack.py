"""Hosts of namespaces (tests/hosts/netns) as tests see them, and a rack of unlike ones on them.

Host 0 is the operator's, 1 the head. The rack's file is made from topologies/rack-cpu.yaml, which
is what people copy: other addresses, and node types that say what H200 and Atlas hosts say.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from cluster.settings import cache_dir

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
NETNS = ROOT / "tests/hosts/netns"
OPERATOR, HEAD, H200, ATLAS, CPU, SPARE, OTHER_SPARE = range(7)
CLUSTER = "rack-e2e"
# What is not a host's own: its first process, sshd and its sessions, and who looks. An ssh that
# Ray keeps open for its next command ends by itself after ten seconds.
_NOT_OURS = re.compile(r"_init \d+$|sshd|^ps |ray_ssh_")
_CLONE_NEWNET = 0x40000000


def address(host: int) -> str:
    return f"10.77.0.{10 + host}"


class Hosts:
    """A set of hosts that is up. `shared`: a folder that all of them see."""

    def __init__(self, name: str, shared: Path) -> None:
        self.name = name
        self.shared = shared

    def tool(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [NETNS, "--name", self.name, *args], capture_output=True, text=True, timeout=120
        )
        if check and done.returncode != 0:
            pytest.fail(f"netns {' '.join(args)}: {done.stdout}{done.stderr}")
        return done

    def run(
        self, host: int, *argv: str, check: bool = True, timeout_s: float = 200
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, by a shell as a user has it there."""
        done = subprocess.run(
            self.command(host, *argv),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"host {host}: {' '.join(argv)} exited {done.returncode}\n"
                f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
            )
        return done

    def command(self, host: int, *argv: str) -> list[str]:
        return [str(NETNS), "--name", self.name, "exec", str(host), *argv]

    def pids(self, host: int, program: str) -> list[int]:
        """Processes by the very name of their program."""
        found = self.run(host, "pgrep", "-x", program, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def connect(self, host: int, to: int, port: int) -> socket.socket:
        """A TCP connection from one host to another, in this process's hands."""
        made: list[socket.socket | OSError] = []

        def enter_and_connect() -> None:
            # The network namespace is the thread's own; a socket stays in the one it was made in.
            space = os.open(f"/run/netns/{self.name}n{host}", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(space, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                made.append(socket.create_connection((address(to), port), timeout=240))
            except OSError as error:
                made.append(error)
            finally:
                os.close(space)

        thread = threading.Thread(target=enter_and_connect)
        thread.start()
        thread.join()
        (found,) = made
        if isinstance(found, OSError):
            raise found
        return found

    def left(self, host: int) -> list[str]:
        """What is on a host that it did not have when it was made: processes, ports that are
        listened on, shared memory."""
        said = self.run(host, "ps", "-ewwo", "stat=,args=").stdout.splitlines()
        states = [line.split(maxsplit=1) for line in said]
        processes = [
            args.strip()[:160]
            for state, args in states
            if not state.startswith("Z") and not _NOT_OURS.search(args.strip())
        ]
        sockets = self.run(host, "ss", "-Hltun").stdout.splitlines()
        ports = [line.split()[4] for line in sockets if not line.split()[4].endswith(":22")]
        memory = self.run(host, "ls", "-A", "/dev/shm").stdout.split()
        return processes + ports + memory


@contextlib.contextmanager
def hosts_up(name: str, shared: Path, count: int) -> Iterator[Hosts]:
    """`count` hosts, the operator's included. Skips the test where they cannot be made."""
    missing = subprocess.run([NETNS, "check"], capture_output=True, text=True)
    if missing.returncode:
        pytest.skip(f"no hosts of namespaces here: {missing.stderr.strip()}")
    hosts = Hosts(name, shared)
    hosts.tool("down")
    try:
        hosts.tool(
            *("up", "--hosts", str(count), "--keep", str(shared)),
            # Engines read the model from the cache that all tests share.
            *("--env", f"XDG_CACHE_HOME={cache_dir().parent}"),
            # The tree under test, wherever the virtual environment's own install points.
            *("--env", f"PYTHONPATH={ROOT}"),
        )
        hosts.run(OPERATOR, "ray", "get-auth-token", "--generate")
        yield hosts
    finally:
        hosts.tool("down", check=False)


def rack(types: dict[str, list[int]], *, serving: bool) -> dict[str, Any]:
    """The rack's file: these hosts by node type. Without `serving`: Ray alone, no engines."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "topologies/rack-cpu.yaml").read_text())
    config["cluster_name"] = CLUSTER
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    offers: dict[str, dict[str, Any]] = {
        "h200": {"resources": {"CPU": 8, "GPU": 8}, "labels": {"ray.io/accelerator-type": "H200"}},
        "atlas-a3": {
            "resources": {"CPU": 8, "NPU": 16},
            "labels": {"ray.io/accelerator-type": "Ascend910_93"},
        },
        "cpu": {"resources": {"CPU": 8}, "labels": {"hardware": "cpu"}},
        "spare": {"resources": {"CPU": 2}},
    }
    config["available_node_types"] = {
        "head": {"resources": {"CPU": 2}, "node_config": {"hosts": [address(HEAD)]}}
    } | {
        kind: {
            **offers[kind],
            "min_workers": len(members),
            "max_workers": len(members),
            "node_config": {"hosts": [address(host) for host in members]},
        }
        for kind, members in types.items()
    }
    config["max_workers"] = sum(len(members) for members in types.values())
    if serving:
        config["metadata"]["serving"] = _serving(config["metadata"]["serving"])
    else:
        del config["metadata"]
        config["head_start_ray_commands"].pop()
    return config


def _serving(serving: dict[str, Any]) -> dict[str, Any]:
    """One real engine on each kind of host: they stand for the engines that belong there. Their
    devices are asked for by label, since a CPU engine that asks for a GPU is refused."""
    labels = {
        "prefill": {"ray.io/accelerator-type": "H200"},
        "decode-atlas": {"ray.io/accelerator-type": "Ascend910_93"},
        "decode-cpu": {"hardware": "cpu"},
    }
    serving["pools"] = [
        {
            "name": name,
            "role": name.partition("-")[0],
            "hardware": "cpu",
            "placement": {"resources": {"CPU": 8}, "labels": wanted},
            "kv_cache_gib": 0.25,
        }
        for name, wanted in labels.items()
    ]
    serving["islands"] = [{"name": "cpu", "pools": list(labels), "connector": "nixl"}]
    serving["model"] |= {"dtype": "float32", "max_model_len_tokens": 2048}
    serving["model"]["tool_call_parser"] = "hermes"
    for section in ("gateway", "control"):
        serving[section]["host"] = address(HEAD)
    serving["observability"] = {"prometheus": {"mode": "off"}}
    return serving


@dataclass
class Rack:
    """A cluster on hosts, as its operator sees it from host 0."""

    hosts: Hosts
    file: Path

    def write(self, config: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))

    def ray_up(self, check: bool = True) -> str:
        done = self.hosts.run(OPERATOR, "ray", "up", "-y", str(self.file), check=check)
        return done.stdout + done.stderr

    def ray_down(self, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.hosts.run(OPERATOR, "ray", "down", "-y", str(self.file), check=check)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Ray's living nodes by address, asked on the head."""
        code = (
            "import json, ray; ray.init('auto', logging_level='error'); "
            "print('nodes:' + json.dumps(ray.nodes()))"
        )
        done = self.hosts.run(HEAD, "python3", "-c", code)
        # Ray prints what it heard of nodes that died among it, before or after.
        (said,) = [line for line in done.stdout.splitlines() if line.startswith("nodes:")]
        listed = json.loads(said.removeprefix("nodes:"))
        return {node["NodeManagerAddress"]: node for node in listed if node["Alive"]}

    def await_nodes(self, *hosts: int) -> dict[str, dict[str, Any]]:
        """Wait until just these hosts are nodes."""
        wanted = {address(host) for host in hosts}

        def probe() -> dict[str, dict[str, Any]] | None:
            now = self.nodes()
            return now if set(now) == wanted else None

        return wait_for(probe, 90, f"nodes {sorted(wanted)}")

    def pdcluster(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Our own command on the operator's host, with key and token in its environment."""
        secrets = {"PDCLUSTER_API_KEY": "api-key", "PDCLUSTER_CONTROL_TOKEN": "control-token"}
        script = "".join(
            f"export {name}=$(ssh -q -o StrictHostKeyChecking=no {address(HEAD)} "
            f"cat .local/state/pdcluster/{CLUSTER}/{file}); "
            for name, file in secrets.items()
        )
        return self.hosts.run(
            OPERATOR, "bash", "-c", f'{script} exec pdcluster "$@"', "bash", *args, check=check
        )

    def status(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(
            self.pdcluster("status", str(self.file), "--json").stdout
        )
        return parsed

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["name"]: worker for worker in self.status()["workers"]}

    def chat(self, question: str, max_tokens: int = 24) -> dict[str, Any]:
        done = self.pdcluster(
            *("chat", question, "--topology", str(self.file), "--json"),
            *("--max-tokens", str(max_tokens), "--temperature", "0"),
        )
        parsed: dict[str, Any] = json.loads(done.stdout)
        return parsed


def wait_for(probe: Callable[[], T | None], bound_s: float, what: str) -> T:
    """The first answer of `probe` that is not None."""
    deadline_s = time.monotonic() + bound_s
    while (found := probe()) is None:
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what}: not within {bound_s:g} s")
        time.sleep(0.5)
    return found
