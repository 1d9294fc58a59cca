"""What a topology says to the bare-host provider: its keys, and what is wrong with them.

    provider: {type: external, module: cluster.nodes.BareHostProvider}
    available_node_types.TYPE.node_config: {hosts: [ADDRESS, ...], ssh_user: USER, ssh_port: PORT}

Resources, labels, min_workers and max_workers are Ray's own keys beside `node_config`. `findings`
is for `pdcluster validate` and the provider alike; `Hosts.of` reads a config without fault.
Pure. Called by: launcher.validate, nodes.provider, nodes.head.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from cluster.nodes.ssh import Host
from cluster.topology.findings import Finding, KeyPath, nearest, quote

MODULE = "cluster.nodes.BareHostProvider"
START_COMMAND = "python3 -m cluster.nodes.start ray start"
# Where `ray up` puts what the provider must know besides its own section, for itself on the head.
INJECTED = "_bare_hosts"
TOKEN_FILE = "~/.ray/auth_token"
_TYPES = "available_node_types"
_EXAMPLE_HOSTS = "hosts: [10.0.0.11, 10.0.0.12]"
_HEAD_START = f"{START_COMMAND} --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml"
_WORKER_START = f"{START_COMMAND} --address=$RAY_HEAD_IP:6379"


def _is_address(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError(
            f"found {quote(text)}; write the host's IPv4 address: Ray knows nodes by it"
        ) from None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProviderSection(_Section):
    """`provider`."""

    type: Literal["external"]
    module: str


class NodeConfig(_Section):
    """`available_node_types.TYPE.node_config`: hosts that are alike."""

    hosts: list[Annotated[str, AfterValidator(_is_address)]] = Field(min_length=1)
    ssh_user: str | None = Field(default=None, min_length=1)
    ssh_port: int = Field(default=22, ge=1, le=65535)


class Access(_Section):
    """How to get into every host, by Ray's `auth` section."""

    ssh_user: str
    ssh_private_key: str | None = None
    ssh_proxy_command: str | None = None

    @classmethod
    def of(cls, auth: Mapping[str, Any]) -> Access:
        return cls(**{name: auth[name] for name in cls.model_fields if name in auth})


class Hosts(_Section):
    """All hosts of a cluster by node type, and how to get into them."""

    head_type: str
    types: dict[str, NodeConfig]
    access: Access
    on_head: bool = False  # whether this copy of the config is the one that `ray up` gave the head
    has_token: bool = False  # whether the file gives Ray's token to its nodes
    launch_hash: str = ""  # Ray's own digest of the head's node_config and `auth`

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Hosts:
        """From Ray's half of a file that has no findings."""
        return cls(
            head_type=config["head_node_type"],
            types={
                name: NodeConfig.model_validate(entry["node_config"])
                for name, entry in config[_TYPES].items()
            },
            access=Access.of(config["auth"]),
            has_token=TOKEN_FILE in config.get("file_mounts", {}),
        )

    @property
    def head(self) -> str:
        return self.types[self.head_type].hosts[0]

    @property
    def workers(self) -> tuple[str, ...]:
        """Every host but the head, in the order of the file."""
        return tuple(
            host for name, entry in self.types.items() if name != self.head_type
            for host in entry.hosts
        )  # fmt: skip

    def host(self, address: str) -> Host:
        """How to reach a host; one that is in no node type any more as the file says in general."""
        own = next((entry for entry in self.types.values() if address in entry.hosts), None)
        return Host(
            address,
            user=(own.ssh_user if own is not None else None) or self.access.ssh_user,
            port=own.ssh_port if own is not None else 22,
            key=self.access.ssh_private_key,
            proxy_command=self.access.ssh_proxy_command,
        )


def uses_bare_hosts(config: Mapping[str, Any]) -> bool:
    provider = config.get("provider")
    return isinstance(provider, dict) and provider.get("module") == MODULE


def findings(config: Mapping[str, Any]) -> tuple[Finding, ...]:
    """All that is wrong with a config whose shape Ray's own schema has accepted."""
    provider = {k: v for k, v in config["provider"].items() if not k.startswith("_")}
    found = [*_of_section(ProviderSection, provider, ("provider",))]
    types = {k: v for k, v in config.get(_TYPES, {}).items() if isinstance(v, dict)}
    read: dict[str, NodeConfig] = {}
    for name, entry in types.items():
        at: KeyPath = (_TYPES, name, "node_config")
        wrong = tuple(_of_section(NodeConfig, entry.get("node_config", {}), at))
        found += wrong
        if not wrong:
            read[name] = NodeConfig.model_validate(entry["node_config"])
    found += _twice(read)
    found += _counts(config, types, read)
    if "ssh_user" not in config.get("auth", {}):
        found.append(
            Finding(("auth", "ssh_user"), "missing", "add `auth: {ssh_user: USER}`: hosts are "
                    "reached by ssh")
        )  # fmt: skip
    found += _start_commands(config)
    return tuple(found)


def _of_section(model: type[_Section], value: Any, at: KeyPath) -> Iterator[Finding]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            yield _finding(model, detail, at)


def _finding(model: type[_Section], detail: ErrorDetails, at: KeyPath) -> Finding:
    key, kind = (*at, *detail["loc"]), detail["type"]
    name = str(detail["loc"][0]) if detail["loc"] else ""
    found = f"found {quote(detail['input'], under=name)}"
    if kind == "missing":
        fix = _EXAMPLE_HOSTS if name == "hosts" else f"{name}: ..."
        return Finding(key, "missing", f"add `{fix}`")
    if kind == "extra_forbidden":
        known = sorted(model.model_fields)
        near = nearest(name, known)
        fix = f"did you mean `{near}`?" if near else f"take it out; known: {', '.join(known)}"
        return Finding(key, f'the bare-host provider knows no key "{name}"', fix)
    if kind == "value_error":
        said, _, fix = str(detail["ctx"]["error"]).partition("; ")
        return Finding(key, said, fix)
    if name == "ssh_port":
        return Finding(key, found, "write a port number from 1 to 65535")
    if name == "hosts":
        return Finding(key, found, f"write a list of addresses: `{_EXAMPLE_HOSTS}`")
    return Finding(key, found, "write a text")


def _twice(types: Mapping[str, NodeConfig]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for name, entry in types.items():
        for index, host in enumerate(entry.hosts):
            if host in seen:
                at = (_TYPES, name, "node_config", "hosts", index)
                fix = "name every host once: one Ray node runs on each"
                yield Finding(at, f"{host} stands in {seen[host]} already", fix)
            seen.setdefault(host, name)


def _counts(
    config: Mapping[str, Any], types: Mapping[str, Any], read: Mapping[str, NodeConfig]
) -> Iterator[Finding]:
    head = config.get("head_node_type") or (next(iter(types)) if len(types) == 1 else None)
    for name, entry in read.items():
        hosts = len(entry.hosts)
        if name == head:
            if hosts != 1:
                at: KeyPath = (_TYPES, name, "node_config", "hosts")
                yield Finding(at, f"{hosts} hosts for the head", "write one; Ray has one head")
            most_workers = types[name].get("max_workers", 0)
            if most_workers or types[name].get("min_workers", 0):
                key = "max_workers" if most_workers else "min_workers"
                fix = "take it out: the head is one host; workers are another node type"
                yield Finding((_TYPES, name, key), f"found {types[name][key]} for the head", fix)
            continue
        least, most = types[name].get("min_workers"), types[name].get("max_workers")
        if least is None:
            found = "missing, and then none of its hosts is started"
            fix = f"add `min_workers: {hosts}`, one for each host"
            yield Finding((_TYPES, name, "min_workers"), found, fix)
        elif least > hosts:
            found, fix = f"found {least}; it has {_hosts(hosts)}", "lower it, or add hosts"
            yield Finding((_TYPES, name, "min_workers"), found, fix)
        if most is not None and most > hosts:
            found, fix = f"found {most}; it has {_hosts(hosts)}", "lower it, or add hosts"
            yield Finding((_TYPES, name, "max_workers"), found, fix)


def _start_commands(config: Mapping[str, Any]) -> Iterator[Finding]:
    """A plain `ray start` is preceded by `ray stop`, and then each `ray up` restarts everything."""
    for key, example in (
        ("head_start_ray_commands", _HEAD_START),
        ("worker_start_ray_commands", _WORKER_START),
    ):
        commands = [text for text in config.get(key, []) if isinstance(text, str)]
        if commands and not any("cluster.nodes.start" in text for text in commands):
            found = "Ray is not started by way of cluster.nodes.start, which lets alone what runs"
            yield Finding((key,), found, f"write `{example}` in place of `ray stop`, `ray start`")


def _hosts(count: int) -> str:
    return f"{count} host{'' if count == 1 else 's'}"
