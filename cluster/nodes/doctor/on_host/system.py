"""What a host is: Python, devices, drivers, memory, limits, ports, its container. Reads only."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.nodes.doctor.on_host.commands import last_line, run

# Reads versions in another interpreter, without importing what it has.
_VERSIONS = (
    "import json,platform;from importlib import metadata as m;"
    "print(json.dumps({'python':platform.python_version(),'packages':"
    "{d.metadata['Name'].lower().replace('_','-'):d.version "
    "for d in m.distributions() if d.metadata['Name']}}))"
)
# Below it, by machine: ARCH-linux/ascend_toolkit_install.info (vLLM-Ascend's collect_env.py).
_CANN_HOME = "/usr/local/Ascend/ascend-toolkit/latest"
_NPU_DRIVER = "/usr/local/Ascend/driver/version.info"


# Software


def python() -> dict[str, str]:
    """The Python that runs this, and the variables that matter to Ray's and the engines'."""
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "match_level": os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", ""),
        "hash_seed": os.environ.get("PYTHONHASHSEED", ""),
    }


def packages() -> dict[str, str]:
    """Versions of all distributions that this Python has."""
    named = ((found.metadata["Name"], found.version) for found in metadata.distributions())
    return {name.lower().replace("_", "-"): version for name, version in named if name}


def interpreter(name: str) -> dict[str, Any]:
    """Another interpreter's Python and packages; of another program, whether it exists."""
    path = shutil.which(os.path.expanduser(name))
    if path is None:
        return {"exists": False}
    if "python" not in os.path.basename(path):
        return {"exists": True}
    code, out, err = run([path, "-B", "-c", _VERSIONS])
    if code != 0:
        return {"exists": True, "error": last_line(err) or f"exit code {code}"}
    return {"exists": True, **json.loads(out)}


def commands(names: list[str]) -> dict[str, bool]:
    return {name: shutil.which(name) is not None for name in names}


def library(name: str) -> str:
    """Nothing if the dynamic linker finds it, else what it says."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return ""


def container(command: str, name: str, image: str) -> dict[str, Any]:
    """The container that Ray's `docker` section names, as far as it is there already."""
    if shutil.which(command) is None:
        return {"error": f"no command {command}"}
    code, _, err = run([command, "version"])
    if code != 0:
        return {"error": last_line(err) or f"{command} version: exit code {code}"}
    found: dict[str, Any] = {"has_image": run([command, "image", "inspect", image])[0] == 0}
    code, out, _ = run([command, "inspect", "-f", "{{.State.Running}}", name])
    found["runs"] = code == 0 and out.strip() == "true"
    if not found["runs"]:
        return found
    code, out, err = run([command, "exec", "-i", name, "python3", "-B", "-c", _VERSIONS])
    if code != 0:
        return {**found, "error": f"python3 in container {name}: {last_line(err)}"}
    return {**found, **json.loads(out)}


# Accelerators and network cards


def devices() -> dict[str, int]:
    """Device files by kind: /dev/nvidia0, /dev/davinci0 and so on, not /dev/nvidiactl."""
    names = os.listdir("/dev")
    return {
        kind: sum(1 for name in names if re.fullmatch(kind + r"\d+", name))
        for kind in ("nvidia", "davinci")
    }


def gpu() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        return {"error": "no command nvidia-smi"}
    query = "--query-gpu=name,driver_version"
    code, out, err = run(["nvidia-smi", query, "--format=csv,noheader"])
    if code != 0:
        return {"error": last_line(out + "\n" + err) or f"nvidia-smi: exit code {code}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if "," in line]
    return {"names": sorted({row[0] for row in rows}), "driver": rows[0][1] if rows else ""}


def npu() -> dict[str, Any]:
    """Driver and CANN versions by the files that their installers write."""
    found: dict[str, Any] = {"driver": _value(_NPU_DRIVER, "Version"), "cann": _cann()}
    if shutil.which("npu-smi") is None:
        return {**found, "error": "no command npu-smi"}
    code, out, err = run(["npu-smi", "info"])
    if code != 0:
        found["error"] = last_line(out + "\n" + err) or f"npu-smi info: exit code {code}"
    return found


def rdma_devices() -> list[str]:
    folder = "/sys/class/infiniband"
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _cann() -> str:
    home = os.environ.get("ASCEND_TOOLKIT_HOME", _CANN_HOME)
    files = sorted(Path(home).glob("*-linux/ascend_toolkit_install.info"))
    versions = (_value(str(path), "version") for path in files)
    return next((version for version in versions if version), "")


def _value(path: str, name: str) -> str:
    """What a small text file says after NAME=; nothing if it does not."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^{name}\s*=\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return match[1].strip('"') if match else ""


# Memory and limits


def memory_bytes() -> int:
    match = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if match is None:
        raise ValueError("/proc/meminfo has no MemTotal")
    return int(match[1]) * 1024


def shm() -> dict[str, int]:
    found = os.statvfs("/dev/shm")
    return {
        "total_bytes": found.f_blocks * found.f_frsize,
        "free_bytes": found.f_bavail * found.f_frsize,
    }


def limits() -> dict[str, int]:
    """What a process of this user may raise its limits to; -1: as far as it likes."""
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[1],
    }


# Ports


def ephemeral() -> list[int]:
    """First and last port that the kernel gives to outgoing connections."""
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    return [int(word) for word in text.split()]


def port(number: int, address: str) -> dict[str, Any]:
    """Whether the port can be bound now; if not, who holds it, where that can be seen."""
    found: dict[str, Any] = {"port": number, "address": address, "error": "", "by": "", "owner": ""}
    try:
        family, _, _, _, place = socket.getaddrinfo(address, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: connections that linger after a restart are not in their way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        found["error"] = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            found["by"], found["owner"] = _listener(number)
    return found


def _listener(number: int) -> tuple[str, str]:
    """(name and pid, PDCLUSTER_OWNER) of the process that listens; empty where we may not see."""
    inodes = set(_listening(number))
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.readlink(str(fd)) in inodes for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                return f"{name} (pid {process.name})", _owner(process)
        except OSError:
            continue
    return "", ""


def _owner(process: Path) -> str:
    """The mark of a process or of the nearest ancestor that has one: Ray's actors write their
    title over their environment."""
    mark = b"PDCLUSTER_OWNER="
    while process.name not in ("0", "1"):
        try:
            for entry in (process / "environ").read_bytes().split(b"\0"):
                if entry.startswith(mark):
                    return entry[len(mark) :].decode(errors="replace")
            # After the name, which may hold anything but ends with the last bracket: state, ppid.
            stat = (process / "stat").read_text(errors="replace")
            process = Path("/proc") / stat.rpartition(")")[2].split()[1]
        except OSError:
            break
    return ""


def _listening(number: int) -> list[str]:
    """What the descriptors of sockets that listen on the port link to."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == number:
                found.append(f"socket:[{words[9]}]")
    return found
