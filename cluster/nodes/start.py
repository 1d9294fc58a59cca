"""Start a cluster's Ray on this host, unless it runs: what `ray up` calls on every host.

    python3 -m cluster.nodes.start ray start --head --port=6379 --autoscaling-config=FILE
    python3 -m cluster.nodes.start ray start --address=$RAY_HEAD_IP:6379

What follows `ray start` is Ray's own; `--node-ip-address` is added. A node that was started by the
same words, with the same resources and labels, and whose head answers, is left alone; any other
node of this cluster on this host is ended first. Other Rays on the host are not touched.
On the head, `nodes.head` first takes in what has changed in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError, InvalidInput
from cluster.nodes import marks
from cluster.nodes.assignment import address_of
from cluster.nodes.end import end_cluster
from cluster.nodes.marks import START_ENV, RayProcess, named, ray_processes
from cluster.settings import OWNER_ENV

_NODE_ENV = "RAY_CLOUD_INSTANCE_ID"
_STATED_ENV = ("RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_LABELS", "RAY_NODE_TYPE_NAME")
_CONFIG_FLAG = "--autoscaling-config"
_DEFAULT_PORT = "6379"
_CONNECT_BOUND_S = 5.0
# As Ray's own cluster files ask for with `ulimit -n 65536`.
_OPEN_FILES = 65_536
# What a rack wants otherwise than Ray's defaults; each can be set in front of the command.
_DEFAULT_ENV = {
    # Ray looks for hosts to start every 5 s; nothing here costs money per call.
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # A host that is cut off is noticed after 3 x 5 s, in place of 5 x 10 s.
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One `ray start` for this host. `head_address`: HOST:PORT of the head's GCS."""

    cluster: str
    node_id: str
    argv: tuple[str, ...]
    is_head: bool
    head_address: str
    config: Path | None  # the head's: the file that `ray up` has put here
    digest: str

    @property
    def address(self) -> str:
        return address_of(self.node_id)


def read_request(
    argv: Sequence[str], environ: Mapping[str, str], stated: Sequence[str] = ()
) -> Request:
    """`stated`: how the file itself words the head's start, with what stands before `ray start`.

    Raises: InvalidInput: this is no such command, or `ray up` did not run it."""
    owner, node_id = environ.get(OWNER_ENV, ""), environ.get(_NODE_ENV, "")
    cluster = owner.partition("@")[0]
    if owner != marks.ray_owner(cluster) or not node_id:
        raise InvalidInput(
            "cluster.nodes.start is for head_start_ray_commands and worker_start_ray_commands of "
            "a file whose provider is cluster.nodes.BareHostProvider: `ray up` runs it"
        )
    if tuple(argv[:2]) != ("ray", "start"):
        raise InvalidInput(f"found {' '.join(argv[:2]) or 'nothing'!r}; write `ray start ...`")
    is_head = "--head" in argv
    config = _value(argv, _CONFIG_FLAG)
    if is_head and config is None:
        fix = f"add {_CONFIG_FLAG}=~/ray_bootstrap_config.yaml: without it no worker is started"
        raise InvalidInput(f"`ray start --head`: {fix}")
    head_address = _value(argv, "--address") or ""
    if is_head:
        head_address = f"{address_of(node_id)}:{_value(argv, '--port') or _DEFAULT_PORT}"
    if ":" not in head_address:
        raise InvalidInput("`ray start`: add --address=$RAY_HEAD_IP:6379, the head's")
    given = [environ.get(name, "") for name in _STATED_ENV]
    # A worker that is started under a new id belongs to a head that does not know the former one.
    said = json.dumps([list(argv), list(stated), given, "" if is_head else node_id])
    return Request(
        cluster=cluster,
        node_id=node_id,
        argv=tuple(argv),
        is_head=is_head,
        head_address=head_address,
        config=Path(config).expanduser() if config is not None else None,
        digest=hashlib.sha256(said.encode()).hexdigest()[:16],
    )


def why_start(request: Request, found: Sequence[RayProcess], head_answers: bool) -> str:
    """ "" if the node runs as asked, else what is the matter. Pure."""
    raylets = named(list(found), "raylet")
    if not raylets:
        return "it does not run"
    if any(raylet.start != request.digest for raylet in raylets):
        return "it was started in another way"
    if request.is_head and not named(list(found), "gcs_server"):
        return "its head process has ended"
    return "" if head_answers else f"{request.head_address} does not answer"


def other_head(request: Request, found: Sequence[RayProcess]) -> str | None:
    """The address of another head that this host's node of the same cluster belongs to."""
    for raylet in named(list(found), "raylet"):
        address = raylet.flag("gcs-address")
        # On another port of the same host it is this head's former self, which gives way.
        if address and _host(address) != _host(request.head_address):
            return address
    return None


def start(request: Request) -> None:
    """Make the node run as asked.

    Raises: ClusterError: another living head of the same name owns the host, a process would not
        end, or `ray start` failed."""
    found = ray_processes(request.cluster)
    former = other_head(request, found)
    if former is not None and _answers(former):
        raise ClusterError(
            f"{request.address} belongs to cluster {request.cluster} of the head at {former}, "
            "which still runs; end that one first: `ray down` with its file"
        )
    why = why_start(request, found, _answers(request.head_address))
    os.environ.update(environment(os.environ, request.digest))
    if request.config is not None:
        from cluster.nodes import head  # imports Ray

        copy = head.take_in(request.cluster, request.config, is_new_head=bool(why))
        if not why:
            head.ensure_monitor(request.cluster, found, copy)
    if not why:
        print(f"{request.address}: Ray of cluster {request.cluster} runs already; nothing to do")
    else:
        _begin(request, why)
    if request.config is not None:
        from cluster.nodes import head

        head.report_silent(request.cluster)


def _begin(request: Request, why: str) -> None:
    print(f"{request.address}: starting Ray of cluster {request.cluster}: {why}")
    ended = end_cluster(request.cluster)
    if ended.left:
        raise ClusterError(f"processes of the former start do not end: {ended.left}")
    argv = list(request.argv)
    if _value(argv, "--node-ip-address") is None:
        argv.append(f"--node-ip-address={request.address}")
    if request.config is not None:
        from cluster.nodes import head

        argv = _without(argv, _CONFIG_FLAG)
        argv.append(f"{_CONFIG_FLAG}={head.installed_config(request.cluster)}")
    _raise_open_files()
    from cluster.gateway.hosting import SERVE_ENV  # imports more than all the rest

    # Serve reads them wherever it starts a process, which may be on any host.
    os.environ.update({**SERVE_ENV, **os.environ})
    program = Path(sys.executable).with_name("ray")
    argv[0] = str(program) if program.exists() else argv[0]
    done = subprocess.run(argv)
    marks.note_session(request.cluster)
    if done.returncode != 0:
        raise ClusterError(f"`ray start` ended with exit code {done.returncode}")


def environment(inherited: Mapping[str, str], digest: str) -> dict[str, str]:
    """What Ray's processes of a node get. Whatever is set in front of the command wins."""
    return {**_DEFAULT_ENV, **inherited, START_ENV: digest}


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of `--flag=value` or `--flag value`."""
    for index, arg in enumerate(argv):
        if arg == flag and index + 1 < len(argv):
            return argv[index + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _without(argv: Sequence[str], flag: str) -> list[str]:
    kept = []
    skip = False
    for arg in argv:
        if skip:
            skip = False
        elif arg == flag:
            skip = True
        elif not arg.startswith(f"{flag}="):
            kept.append(arg)
    return kept


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _answers(address: str) -> bool:
    port = address.rpartition(":")[2]
    try:
        socket.create_connection((_host(address), int(port)), timeout=_CONNECT_BOUND_S).close()
    except (OSError, ValueError):
        return False
    return True


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _stated_start(argv: Sequence[str]) -> list[str]:
    """The head's own start commands in the file that `ray up` has put here."""
    config = _value(argv, _CONFIG_FLAG)
    if config is None:
        return []
    try:
        read = json.loads(Path(config).expanduser().read_text(encoding="utf-8"))
        commands = read["head_start_ray_commands"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nodes.head says what is wrong with it
    return [command for command in commands if "cluster.nodes.start" in command]


def main() -> None:
    argv = sys.argv[1:]
    try:
        start(read_request(argv, os.environ, _stated_start(argv)))
    except ClusterError as error:
        sys.exit(f"cluster.nodes.start: {error}")


if __name__ == "__main__":
    main()
