"""An sshd of the test's own on loopback, with a key that opens it. Nothing of the user's ssh is
read or written; it ends with the context.

    with running(tmp_path, ["127.0.0.2", "127.0.0.3"]) as door:
        ...  # ssh -i door.key -p door.port door.user@127.0.0.2

Both addresses are this machine. tests/hosts/netns makes hosts that are not. Called by:
integration/test_doctor_ssh.py.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ports import free_port

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
SSHD = shutil.which("sshd", path=_PATH)
_START_BOUND_S = 20


@dataclass(frozen=True)
class Door:
    key: Path
    port: int
    user: str


@contextlib.contextmanager
def running(
    folder: Path, addresses: Sequence[str], environment: Sequence[str] = ()
) -> Iterator[Door]:
    """`environment`: NAME=VALUE of every session. Raises: AssertionError: sshd does not start."""
    assert SSHD is not None, "install openssh-server"
    folder.chmod(0o700)
    door = Door(folder / "key", free_port(), getpass.getuser())
    for name in ("key", "host_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True)
    options = {
        "Port": door.port,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "key.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
    }
    lines = [f"{name} {value}" for name, value in options.items()]
    lines += [f"ListenAddress {address}" for address in addresses]
    if environment:
        lines.append(f"SetEnv {' '.join(environment)}")
    (folder / "config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants an empty folder of root's
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "config")],
        stderr=(folder / "log").open("wb"),
        stdin=subprocess.DEVNULL,
    )
    try:
        _await(addresses[0], door.port, server, folder / "log")
        yield door
    finally:
        server.terminate()
        server.wait()


def _await(address: str, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _START_BOUND_S
    while time.monotonic() < deadline_s and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"sshd did not start: {log.read_text()}")
