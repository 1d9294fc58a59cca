"""Prometheus beside the cluster: start it where it is installed, end it, say what another needs.

    want ─▶ config, rules, token's file in STATE/prometheus ─▶ a supervisor that outlives `up`

It listens on loopback, finds its targets through the control API, and keeps its samples in the
cluster's state folder until `down`. The cluster serves without it: whatever stands against it is
said, and `up` goes on. Measured (2.42, three workers, two gateways): 56 MiB after half a minute,
less than 3 % of a core.

Called by: launcher.up, launcher.down, the dashboards' commands.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import time
from pathlib import Path

import yaml

from cluster.control.store import ApiAccess
from cluster.launcher import plan, running, supervised
from cluster.launcher.progress import Watcher
from cluster.launcher.running import OwnPrometheus, Running
from cluster.observe import rules, scraping
from cluster.settings import ClusterPaths
from cluster.topology.schema import PrometheusSpec, Topology
from cluster.workers.logs import last_words

PROGRAM = "prometheus"
_HOST = "127.0.0.1"
_START_BOUND_S = 10.0


class NotStarted(Exception):
    """Why there is no Prometheus, in words for people."""


def as_wanted(
    topology: Topology, paths: ClusterPaths, state: Running, access: ApiAccess, watcher: Watcher
) -> Running:
    """Have metrics scraped as the file says, and note down by whom. What stands against it is told
    to `watcher`."""
    spec, own = topology.serving.observability.prometheus, state.own_prometheus
    if spec.mode != "auto":
        return state.model_copy(update={"prometheus_url": spec.url or ""})
    if own is not None and supervised.is_running(own):
        return state
    try:
        own = start(paths, spec, access)
    except NotStarted as why:
        watcher.warn(str(why))
        own = None
    found = {"own_prometheus": own, "prometheus_url": own.url if own is not None else ""}
    state = state.model_copy(update=found)
    running.write(paths, state)
    return state


def without(state: Running, paths: ClusterPaths) -> Running:
    """End the one that `up` has started, if there is one."""
    if state.own_prometheus is not None:
        end(state.own_prometheus, paths)
    return state.model_copy(update={"own_prometheus": None, "prometheus_url": ""})


def start(paths: ClusterPaths, spec: PrometheusSpec, access: ApiAccess) -> OwnPrometheus:
    """Start one for the cluster whose control API is at `access`; return when it answers.

    Raises: NotStarted: and nothing of it is left."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise NotStarted(
            "the program `prometheus` is not installed (Debian's package: prometheus); there will "
            "be no history of metrics. Another one can scrape the cluster: "
            "observability.prometheus.mode: external"
        )
    _refuse_taken(spec.port)
    folder = _folder(paths)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    _write_files(folder, access)
    own = _launch(paths, folder, program, spec)
    try:
        _await_ready(own, paths)
    except BaseException:
        end(own, paths)
        raise
    return own


def end(own: OwnPrometheus, paths: ClusterPaths) -> None:
    """End it, with all it has kept. Idempotent."""
    supervised.end(own, _owner(paths.cluster), 2 * supervised.END_GRACE_S)
    remove_files(paths)


def remove_files(paths: ClusterPaths) -> None:
    """What it keeps, once it has ended."""
    shutil.rmtree(_folder(paths), ignore_errors=True)


def scrape_config(control_url: str, token_file: str) -> str:
    """YAML for another Prometheus: to be put into its prometheus.yml. `token_file`: as it sees
    it."""
    said = {"scrape_configs": scraping.jobs(control_url, token_file)}
    return yaml.safe_dump(said, sort_keys=False)


def _write_files(folder: Path, access: ApiAccess) -> None:
    for name, text in rules.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    token = folder / "control-token"
    handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(access.token)
    control_url = plan.url(access.host, access.port)
    config = scraping.config(
        control_url, str(token), [str(folder / name) for name in rules.files()]
    )
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")


def _launch(paths: ClusterPaths, folder: Path, program: str, spec: PrometheusSpec) -> OwnPrometheus:
    process = supervised.launch(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--storage.tsdb.retention.time={round(spec.retention_h * 3600)}s",
            f"--web.listen-address={_HOST}:{spec.port}",
            "--log.level=warn",
        ],
        _log(paths),
        os.environ,
        _owner(paths.cluster),
    )
    return OwnPrometheus(**supervised.known_by(process), url=plan.url(_HOST, spec.port))


def _await_ready(own: OwnPrometheus, paths: ClusterPaths) -> None:
    deadline_s = time.monotonic() + _START_BOUND_S
    while not _is_ready(own.url):
        if not supervised.is_running(own):
            words = "; ".join(last_words(_log(paths))[-2:])
            raise NotStarted(f"Prometheus ended at once: {words or 'it said nothing'}")
        if time.monotonic() > deadline_s:
            raise NotStarted(f"Prometheus does not answer at {own.url} after {_START_BOUND_S:g} s")
        time.sleep(0.05)


def _is_ready(url: str) -> bool:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=2)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _refuse_taken(port: int) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise NotStarted(
                f"Prometheus cannot listen on {_HOST}:{port} ({why}); there will be no history of "
                "metrics. Write another observability.prometheus.port"
            ) from error


def _folder(paths: ClusterPaths) -> Path:
    return paths.state / "prometheus"


def _log(paths: ClusterPaths) -> Path:
    return paths.logs / "prometheus.log"


def _owner(cluster: str) -> str:
    return f"{cluster}/prometheus"
