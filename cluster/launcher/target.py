"""How a command reaches a cluster: on the machine where it was brought up, or from elsewhere.

    environment   PDCLUSTER_CONTROL_URL, PDCLUSTER_ENDPOINT_URL: whatever else is known
    running.json  on the machine where `pdcluster up` ran: addresses, files of the secrets
    topology      from elsewhere: the head's address, the ports, names of the secrets

The token: PDCLUSTER_CONTROL_TOKEN, else the variable that `control.token_env` names, else the file
of `control.token_file` or the one that `up` made. The API key: PDCLUSTER_API_KEY, else likewise by
`gateway.auth`. Nothing is asked over the network and no Ray is needed. Called by: cli.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import socket
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.control.client import Access, ControlClient
from cluster.errors import ClusterError, InvalidInput
from cluster.launcher import keys, local_ray, plan, running
from cluster.launcher.endpoint import Endpoint
from cluster.launcher.running import NotRunning, Running
from cluster.nodes.config import uses_bare_hosts
from cluster.settings import ClusterPaths
from cluster.topology import loader
from cluster.topology.schema import Topology

CONTROL_URL_ENV = "PDCLUSTER_CONTROL_URL"
ENDPOINT_URL_ENV = "PDCLUSTER_ENDPOINT_URL"
TOKEN_ENV = "PDCLUSTER_CONTROL_TOKEN"
API_KEY_ENV = "PDCLUSTER_API_KEY"

# A controller that was killed answers again after this, on a machine whose Ray lives.
_RESTART_S = 20.0
_REMOTE_PATIENCE_S = 3.0


@dataclass(frozen=True, slots=True)
class SecretPlaces:
    """Where a secret may be, in this order. `is_asked`: False if the server wants none."""

    own_env: str
    named_env: str | None = None
    file: Path | str | None = None
    is_asked: bool = True

    def read(self, environ: Mapping[str, str]) -> tuple[str | None, str]:
        """The secret, and where it was found. Raises: InvalidInput: nowhere."""
        if value := environ.get(self.own_env, "").strip():
            return value, self.own_env
        if not self.is_asked:
            return None, ""
        if self.named_env is not None:
            if value := environ.get(self.named_env, "").replace(",", " ").strip():
                return value.split()[0], self.named_env
            raise InvalidInput(
                f"{self.named_env} is not set here, nor is {self.own_env}; set one of them"
            )
        if self.file is None:
            raise InvalidInput(f"set {self.own_env}: nothing here says where the secret is")
        try:
            return keys.first_key(str(self.file), None), str(self.file)
        except InvalidInput as error:
            raise InvalidInput(
                f"{error}; on another machine than the head, set {self.own_env} to what that "
                "file on the head holds"
            ) from error


@dataclass(frozen=True, slots=True)
class Target:
    """One cluster as a command sees it. `here`: what `up` noted down, on the machine where it ran;
    `cluster` and `model` are "" where only an address is known."""

    cluster: str
    model: str
    control_url: str | ClusterError
    endpoint_url: str | ClusterError
    token: SecretPlaces
    api_key: SecretPlaces
    here: Running | None
    environ: Mapping[str, str]

    def control(self) -> ControlClient:
        """Raises: ClusterError: its address or token is not known, or it is not up yet."""
        url = _known(self.control_url)
        token, source = self.token.read(self.environ)
        return ControlClient(
            Access(
                url=url,
                token=token or "",
                check=self._check(),
                token_advice=f"it came from {source}; "
                f"set {TOKEN_ENV} to the one that the head's control API was started with",
                patience_s=self._patience_s(),
                asked_by=_caller(),
            )
        )

    def endpoint(self) -> Endpoint:
        """Raises: ClusterError: its address or key is not known."""
        url = _known(self.endpoint_url)
        key, source = self.api_key.read(self.environ)
        advice = f"It came from {source}; set {API_KEY_ENV} to one that is." if source else ""
        return Endpoint(url, key, advice or f"Set {API_KEY_ENV}.")

    def endpoint_or_none(self) -> Endpoint | None:
        """The same, for what can be done without."""
        try:
            return self.endpoint()
        except ClusterError:
            return None

    def _check(self) -> str:
        at = self.here
        if CONTROL_URL_ENV in self.environ:
            return f"{CONTROL_URL_ENV} says that it is there"
        if at is None:
            return (
                f"is cluster {self.cluster} up on that machine, and its serving.control.port open "
                f"to this one? If it is elsewhere, set {CONTROL_URL_ENV}"
            )
        if at.phase == "starting":
            return f"cluster {at.cluster} is starting, or its `up` was killed"
        return f"if its Ray has ended: pdcluster down --cluster {at.cluster}"

    def _patience_s(self) -> float:
        if self.here is None or CONTROL_URL_ENV in self.environ:
            return _REMOTE_PATIENCE_S
        return _RESTART_S if self.here.phase == "up" and self.here.is_alive() else 0.0


def resolve(
    file: Path | None, cluster: str | None, environ: Mapping[str, str] | None = None
) -> Target:
    """The cluster of `file`, or called `cluster`, or the only one that is known here.

    Raises: NotRunning, ClusterError: several run here; TopologyError."""
    environ = os.environ if environ is None else environ
    topology = loader.load(file) if file is not None else None
    name = topology.cluster_name if topology is not None else cluster
    has_address = bool(environ.get(CONTROL_URL_ENV))
    here: Running | None = None
    if name is not None:
        here = running.read(ClusterPaths(name))
    elif not has_address:
        here = running.choose(None)
    if here is not None:
        return _overridden(of_running(here, environ))
    if topology is not None and not local_ray.is_local(topology):
        return _overridden(_from_elsewhere(topology, environ))
    if has_address:
        nowhere = NotRunning(f"set {ENDPOINT_URL_ENV}, or give the cluster's topology file")
        return _overridden(
            Target(
                cluster=name or "",
                model="",
                control_url="",
                endpoint_url=nowhere,
                token=SecretPlaces(TOKEN_ENV),
                api_key=SecretPlaces(API_KEY_ENV),
                here=None,
                environ=environ,
            )
        )
    running.choose(name)  # says what runs here instead
    raise AssertionError("unreachable: there is no such cluster")


def of_running(at: Running, environ: Mapping[str, str] | None = None) -> Target:
    """A cluster that was brought up on this machine."""
    return Target(
        cluster=at.cluster,
        model=at.model,
        control_url=at.control_url,
        endpoint_url=at.endpoint,
        token=SecretPlaces(TOKEN_ENV, at.token_env, at.token_file),
        api_key=SecretPlaces(
            API_KEY_ENV, at.key_env, at.key_file, is_asked=bool(at.key_env or at.key_file)
        ),
        here=at,
        environ=os.environ if environ is None else environ,
    )


def head_address(topology: Topology) -> str | None:
    """The head as other machines reach it; None where only its cloud knows."""
    ray = topology.ray
    provider = ray.get("provider") or {}
    if uses_bare_hosts(ray):
        types = ray.get("available_node_types") or {}
        head = types.get(ray.get("head_node_type") or next(iter(types), None)) or {}
        hosts = (head.get("node_config") or {}).get("hosts") or []
        return str(hosts[0]) if hosts else None
    if provider.get("type") == "local" and provider.get("head_ip"):
        return str(provider["head_ip"])
    return None


def _from_elsewhere(topology: Topology, environ: Mapping[str, str]) -> Target:
    serving = topology.serving
    control, auth = serving.control, serving.gateway.auth
    paths = ClusterPaths(topology.cluster_name)
    return Target(
        cluster=topology.cluster_name,
        model=serving.model.public_name,
        control_url=_address(topology, "control", control.host, control.port, CONTROL_URL_ENV),
        endpoint_url=_address(
            topology, "gateway", serving.gateway.host, serving.gateway.port, ENDPOINT_URL_ENV
        ),
        token=SecretPlaces(TOKEN_ENV, control.token_env, keys.token_file(control, paths)),
        api_key=SecretPlaces(
            API_KEY_ENV,
            auth.keys_env if auth is not None else None,
            keys.api_key_file(auth, paths) if auth is not None else None,
            is_asked=auth is not None,
        ),
        here=None,
        environ=environ,
    )


def _address(
    topology: Topology, section: str, host: str, port: int, variable: str
) -> str | ClusterError:
    """Where `metadata.serving.SECTION` is reached from another machine, or why that is unknown."""
    head = head_address(topology)
    if _is_loopback(host):
        return ClusterError(
            f"{topology.path} serving.{section}.host: {host} answers on the head alone; write the "
            f"head's own address there, or forward the port "
            f"(ssh -N -L {port}:{host}:{port} {head or 'HEAD'}) and set "
            f"{variable}=http://127.0.0.1:{port}"
        )
    if head is None and plan.is_wildcard(host):
        return ClusterError(
            f"{topology.path} does not say where its head is; set {variable}=http://HEAD:{port} "
            f"(`ray get-head-ip {topology.path}` prints HEAD)"
        )
    return plan.url(host, port, head or "")


def _overridden(target: Target) -> Target:
    """With the addresses that the environment gives."""
    control = _given(CONTROL_URL_ENV, target.environ)
    endpoint = _given(ENDPOINT_URL_ENV, target.environ)
    return replace(
        target,
        control_url=control or target.control_url,
        endpoint_url=endpoint or target.endpoint_url,
    )


def _given(variable: str, environ: Mapping[str, str]) -> str | None:
    """Raises: InvalidInput."""
    url = environ.get(variable, "").strip().rstrip("/")
    if not url:
        return None
    parsed = urllib.parse.urlsplit(url)
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        raise InvalidInput(f"{variable}: found {url!r}; write http://HOST:PORT")
    return url


def _known(url: str | ClusterError) -> str:
    if isinstance(url, ClusterError):
        raise url
    return url


def _caller() -> str:
    """USER@HOST, as the cluster notes down who changed something."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = f"uid-{os.getuid()}"
    said = f"{user}@{socket.gethostname()}".encode("ascii", "replace").decode()
    return "".join(char if char.isprintable() and char != " " else "?" for char in said)[:128]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
