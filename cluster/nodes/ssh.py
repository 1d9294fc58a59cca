"""Run a command on a host over ssh: one host, or many at once.

    Host ─▶ run ─▶ Answer (it answered, whatever the command's exit code)
                 └▶ Unreachable (ssh itself failed; says why, in ssh's own words)

Options are those of Ray's own command runner: no questions asked, and host keys not checked, since
`ray up` does not check them either. `login_shell` runs a command as Ray runs its own: with the
PATH that the user's ~/.bashrc sets. Called by: nodes.provider, nodes.head, nodes.operator_lock.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.errors import ClusterError

CONNECT_BOUND_S = 5
_MOST_AT_ONCE = 64
_SSH_FAILED = 255  # ssh's own exit code; a remote command that ends so cannot be told apart
# What bash says when it is interactive without a terminal, and ssh about a key that is new to it.
_NOISE = re.compile(
    r"bash: (cannot set terminal process group|no job control)|Warning: Permanently added"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Host:
    """Where a host is and how to get in. `key`, `proxy_command`: None leaves it to ssh."""

    address: str
    user: str
    port: int = 22
    key: str | None = None
    proxy_command: str | None = None

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command on a host came to."""

    exit_code: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line that says something, of either stream."""
        lines = [line.strip() for line in (self.out + "\n" + self.err).splitlines()]
        said = [line for line in lines if line and not _NOISE.search(line)]
        return said[-1] if said else f"exit code {self.exit_code}"


class Unreachable(ClusterError):
    """A host does not let us in. `why` is what ssh said."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(host, why)
        self.host = host
        self.why = why

    def __str__(self) -> str:
        return f"{self.host} does not answer: {self.why}"


# How a command gets to a host; tests give another.
Runner = Callable[[Host, str, float], Answer]


def command(host: Host, remote: str) -> list[str]:
    """The ssh command line that runs `remote` on `host`."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(CONNECT_BOUND_S),
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "IdentitiesOnly": "yes" if host.key else "no",
        # A host that is cut off in mid-command is noticed after 15 s.
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "Port": str(host.port),
    }
    if host.proxy_command:
        options["ProxyCommand"] = host.proxy_command
    argv = ["ssh", "-T"]
    if host.key:
        argv += ["-i", str(Path(host.key).expanduser())]
    for name, value in options.items():
        argv += ["-o", f"{name}={value}"]
    return [*argv, f"{host.user}@{host.address}", remote]


def login_shell(remote: str) -> str:
    """`remote` as the user's own shell would run it: many systems end ~/.bashrc at once for a
    shell that is not interactive, and PATH is set there."""
    return f"bash --login -i -c {shlex.quote(f'source ~/.bashrc; {remote}')}"


def run(host: Host, remote: str, bound_s: float) -> Answer:
    """Run `remote` on `host` and wait up to `bound_s` seconds.

    Raises: Unreachable: no connection, no access, or no end in time."""
    try:
        done = subprocess.run(
            command(host, remote),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=bound_s,
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(host.address, f"no answer within {bound_s:g} s") from error
    except FileNotFoundError as error:
        raise ClusterError("ssh is not installed on this machine; install it") from error
    if done.returncode == _SSH_FAILED:
        raise Unreachable(host.address, Answer(255, "", done.stderr).last_words)
    return Answer(done.returncode, done.stdout, done.stderr)


def why_unreachable(host: Host, runner: Runner = run) -> str:
    """ "" if the host lets us in, else the reason."""
    try:
        runner(host, "true", 2.0 * CONNECT_BOUND_S)
    except Unreachable as error:
        return error.why
    return ""


def each(hosts: Iterable[Host], do: Callable[[Host], T]) -> dict[str, T]:
    """`do` for every host, many at once. Returns results by address.

    Raises: whatever `do` raises for the first host in order, after all have ended."""
    listed = list(hosts)
    if not listed:
        return {}
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(listed)), thread_name_prefix="ssh") as pool:
        asked = [(host, pool.submit(do, host)) for host in listed]
        return {host.address: answer.result() for host, answer in asked}
