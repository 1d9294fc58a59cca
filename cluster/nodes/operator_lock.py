"""One operator at a time: a lock on the head, held for as long as `ray up` or `ray down` runs.

The lock is an flock on the head, held by a shell whose input is this process's end of an ssh
connection, so that it is given back however the operator's side dies. If the network does, the
shell misses the beats and gives it back after 20 s. Operators on different machines meet there.
Called by: nodes.operator.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import select
import shlex
import socket
import subprocess
import threading
import time

from cluster.errors import ClusterError
from cluster.nodes import ssh
from cluster.nodes.ssh import Host, Unreachable

_BEAT_S = 5.0
_MISSED_S = 20
_ANSWER_BOUND_S = 15.0

# $1: the state folder's last part; $2: who holds it.
_SCRIPT = f"""
umask 077
folder="${{XDG_STATE_HOME:-$HOME/.local/state}}/pdcluster/$1"
mkdir -p "$folder" || exit 1
command -v flock >/dev/null || {{ echo "no flock"; exit 1; }}
exec 9>>"$folder/operator.lock"
if ! flock --nonblock 9; then echo "busy $(cat "$folder/operator.who" 2>/dev/null)"; exit 0; fi
echo "$2" >"$folder/operator.who"
echo held
while IFS= read -r -t {_MISSED_S} _; do :; done
"""


class OperatorBusy(ClusterError):
    """Another operator is at work on this cluster."""


class OperatorLock:
    """Held from `acquire` until `release` or the end of this process."""

    def __init__(self, head: Host, cluster: str) -> None:
        self._head = head
        self._cluster = cluster
        self._shell: subprocess.Popen[str] | None = None
        self._guard = threading.Lock()

    def acquire(self) -> None:
        """Take the lock; nothing if it is held by us already.

        Raises: OperatorBusy: names who holds it. Unreachable: the head does not answer."""
        with self._guard:
            if self._shell is not None:
                return
            shell = self._begin()
            said = self._first_line(shell)
            if said == "held":
                self._shell = shell
                threading.Thread(target=_beat, args=(shell,), name="lock", daemon=True).start()
                return
        error = shell.communicate()[1]
        if said.startswith("busy"):
            holder = said.removeprefix("busy").strip() or "unknown"
            raise OperatorBusy(
                f"another operator is at work on cluster {self._cluster}: {holder}; wait until "
                "that `ray up` or `ray down` has ended"
            )
        if said == "no flock":
            raise ClusterError(f"{self._head} has no command `flock`; install util-linux there")
        raise Unreachable(self._head.address, ssh.Answer(255, said, error).last_words)

    def release(self) -> None:
        """Give it back. May be called twice."""
        with self._guard:
            shell, self._shell = self._shell, None
        if shell is not None and shell.stdin is not None:
            with contextlib.suppress(OSError):
                shell.stdin.close()
            shell.wait()

    def _begin(self) -> subprocess.Popen[str]:
        script = ["bash", "-c", _SCRIPT, "bash", self._cluster, _who()]
        try:
            return subprocess.Popen(
                ssh.command(self._head, shlex.join(script)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Ctrl-C is for `ray up`; the lock goes with the process, not before it.
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise ClusterError("ssh is not installed on this machine; install it") from error

    def _first_line(self, shell: subprocess.Popen[str]) -> str:
        assert shell.stdout is not None
        ready, _, _ = select.select([shell.stdout], [], [], _ANSWER_BOUND_S)
        if not ready:
            shell.kill()
            return f"no answer within {_ANSWER_BOUND_S:g} s"
        return shell.stdout.readline().strip()


def _beat(shell: subprocess.Popen[str]) -> None:
    """Tell the head that we live, until the connection is gone or closed."""
    assert shell.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        while True:
            shell.stdin.write("\n")
            shell.stdin.flush()
            time.sleep(_BEAT_S)


def _who() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{getpass.getuser()} on {socket.gethostname()}, pid {os.getpid()}, since {since}"
