"""Check a whole topology file: our half, Ray's half with Ray's own validator, and both together.

    path ─ topology.loader.examine ─ Document and ServingSpec, with our faults
               └ Document ─ Ray's JSON Schema ─ what `ray up` reads ─ Ray's own validator ─ Offer
                                              ServingSpec and Offer ─ topology.agreement ┘
All faults come at once, each with its line. Ray is imported when a file is checked (0.4 s on two
cores), never started; nothing is sent anywhere and no provider's cloud is asked.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.errors import Fault
from cluster.nodes import config as bare_hosts
from cluster.topology.agreement import NodeType, Offer, disagreements
from cluster.topology.findings import SERVING, Finding, KeyPath, did_you_mean, nearest, quote
from cluster.topology.loader import Examined, examine
from cluster.topology.schema import ServingSpec, Topology

# Ray takes these out itself before it looks at its schema, if they are empty or its own.
_TAKEN_OUT_BY_RAY = ("min_workers", "head_node", "worker_nodes")
# `ray up` reads these without asking whether they are there; only Ray's own providers' defaults
# supply them (Ray 2.60: KeyError in merge_setup_commands and later).
_READ_BY_RAY = {
    "max_workers": "max_workers: N",
    "file_mounts": "file_mounts: {}",
    "cluster_synced_files": "cluster_synced_files: []",
    "initialization_commands": "initialization_commands: []",
    "setup_commands": "setup_commands: []",
    "head_setup_commands": "head_setup_commands: []",
    "worker_setup_commands": "worker_setup_commands: []",
    "head_start_ray_commands": "head_start_ray_commands: [ray stop, ray start --head --port=6379 "
    "--autoscaling-config=~/ray_bootstrap_config.yaml]",
    "worker_start_ray_commands": "worker_start_ray_commands: [ray stop, ray start "
    '"--address=$RAY_HEAD_IP:6379"]',
}
# `ray up` asks these clouds what an instance type has where a node type does not say it.
_CLOUDS_THAT_KNOW_RESOURCES = ("aws", "gcp")
_STATED_AT_START = re.compile(r"--(?:labels|labels-file|resources|num-[cg]pus)\b")
_HEAD_PORT = re.compile(
    r"(--(?:port|dashboard-port|metrics-export-port|ray-client-server-port))[= ](\d+)"
)
_JSON_TYPES = {
    "object": "a mapping (key: value)",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


def validate(path: Path) -> Topology:
    """The Topology of a file that has no fault in either half.

    Raises: TopologyError with all faults, in the order of lines."""
    examined = examine(path)
    findings = [*_label_findings(examined)]
    ray_findings, prepared = _ray_half(examined.document.value)
    findings += ray_findings
    if prepared is not None and examined.serving is not None:
        offer = _offer(examined.document.value, prepared)
        if offer is not None:
            findings += disagreements(examined.serving, offer)
        findings += _port_clash(examined.serving, examined.document.value, prepared)
    ours = {fault.key for fault in examined.faults}
    theirs: dict[str, Fault] = {}
    for fault in examined.locate(findings):
        theirs.setdefault(fault.key, fault)  # what is said of a key later mostly follows from it
    return examined.topology(fault for key, fault in theirs.items() if key not in ours)


def _ray_half(value: dict[str, Any]) -> tuple[tuple[Finding, ...], dict[str, Any] | None]:
    """What is wrong with Ray's half; if nothing, the config as `ray up` would complete it."""
    config = copy.deepcopy(value)
    config["metadata"] = {}  # free to Ray; ours is judged elsewhere
    for key in _TAKEN_OUT_BY_RAY:
        if key == "min_workers" or not config.get(key, True):
            config.pop(key, None)
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind in _CLOUDS_THAT_KNOW_RESOURCES:
        _fill_resources(config)
    findings = tuple(_schema_findings(config))
    if not findings:
        findings = tuple(_needs(config))
    if findings:
        return findings, None
    try:
        return (), _by_ray(config)
    except Exception as error:  # whatever Ray's code makes of a file that its schema takes
        return (_from_ray(config, error),), None


def _fill_resources(config: dict[str, Any]) -> None:
    types = config.get("available_node_types")
    for node_type in types.values() if isinstance(types, dict) else ():
        if isinstance(node_type, dict):
            node_type.setdefault("resources", {})


def _schema_findings(config: dict[str, Any]) -> Iterator[Finding]:
    """All that Ray's JSON Schema refuses; Ray's validator itself stops at the first."""
    import jsonschema
    import ray.autoscaler

    schema_file = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    schema = json.loads(schema_file.read_text(encoding="utf-8"))
    for error in jsonschema.Draft7Validator(schema).iter_errors(config):
        yield from _from_schema(error)


def _from_schema(error: Any) -> Iterator[Finding]:
    at: KeyPath = tuple(error.absolute_path)
    found = f"found {quote(error.instance, under=str(at[-1]) if at else '')}"
    wanted = error.validator_value
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in sorted(set(error.instance) - set(known)):
            fix = f"did you mean `{near}`?" if (near := nearest(key, known)) else "take it out"
            if not at and not near:
                fix = "move it below `metadata`, which is free, or take it out"
            yield Finding((*at, key), f'Ray knows no key "{key}" here', fix)
    elif error.validator == "required":
        for key in sorted(set(wanted) - set(error.instance)):
            yield Finding((*at, key), "missing, and Ray requires it", _add(key))
    elif error.validator == "type":
        kinds = [wanted] if isinstance(wanted, str) else wanted
        yield Finding(at, found, "write " + " or ".join(_JSON_TYPES.get(k, k) for k in kinds))
    elif error.validator == "minimum":
        yield Finding(at, found, f"write a number of at least {wanted}")
    elif error.validator == "enum":
        yield Finding(at, found, did_you_mean(str(error.instance), map(str, wanted)))
    # Anything else that a later schema may ask for is left to Ray's validator, which has the last
    # word anyhow.


def _add(key: str) -> str:
    examples = {
        "cluster_name": "cluster_name: NAME",
        "provider": "provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}",
        "resources": "resources: {CPU: N}",
        "node_config": "node_config: {}",
        "type": "type: local",
    }
    return f"add `{examples.get(key, f'{key}: ...')}`"


def _needs(config: dict[str, Any]) -> Iterator[Finding]:
    """What `ray up` needs beyond its schema, and would abort or crash without."""
    from ray.autoscaler._private.providers import _NODE_PROVIDERS, _get_default_config

    provider, kind = config["provider"], config["provider"]["type"]
    if kind not in _NODE_PROVIDERS:
        yield Finding(
            ("provider", "type"), f"found {quote(kind)}", did_you_mean(kind, _NODE_PROVIDERS)
        )
        return
    if kind == "local":
        yield from _local_needs(config)
    if kind == "external":
        yield from _external_needs(config)
    yield from _docker_needs(config)
    if kind in ("local", "kuberay"):
        return
    merged = {**_get_default_config(provider), **config}
    for key, example in _READ_BY_RAY.items():
        if key not in merged:
            yield Finding((key,), "missing, and `ray up` reads it", f"add `{example}`")
    if "available_node_types" in config:
        yield from _head_and_workers(merged, stated="head_node_type" in config)
    elif kind == "external":
        found = "missing, and without it no node has any resource"
        fix = "add it, with one entry per kind of node; docs/topologies.md has one to copy"
        yield Finding(("available_node_types",), found, fix)


def _local_needs(config: dict[str, Any]) -> Iterator[Finding]:
    provider = config["provider"]
    for key in ("available_node_types", "head_node", "worker_nodes"):
        if config.get(key):
            found = "Ray's provider `local` knows one node type only and refuses this key"
            yield Finding((key,), found, "take it out, or write `provider: {type: external, ...}`")
    if "coordinator_address" in provider:
        if "max_workers" not in config:
            fix = f"add `{_READ_BY_RAY['max_workers']}`"
            yield Finding(("max_workers",), "missing, and `ray up` reads it", fix)
        return
    for key, example in (("head_ip", "head_ip: 127.0.0.1"), ("worker_ips", "worker_ips: []")):
        if key not in provider:
            found = "missing, and Ray's provider `local` requires it"
            yield Finding(("provider", key), found, f"add `{example}`")


def _external_needs(config: dict[str, Any]) -> Iterator[Finding]:
    at = ("provider", "module")
    module = config["provider"].get("module")
    if module is None:
        fix = "add `module: PACKAGE.MODULE.CLASS`, the node provider's class"
        yield Finding(at, "missing, and Ray requires it", fix)
    elif bare_hosts.uses_bare_hosts(config):
        yield from bare_hosts.findings(config)
    elif why := _why_not_importable(module):
        fix = f"write a class that Python finds here and on the head, such as {bare_hosts.MODULE}"
        yield Finding(at, f"found {quote(module)}, which cannot be imported ({why})", fix)


def _why_not_importable(path: str) -> str:
    """ "" if `path` names something in a module that can be imported, as Ray would import it."""
    package, _, name = path.rpartition(".")
    try:
        if hasattr(importlib.import_module(package or path), name):
            return ""
    except Exception as error:  # whatever a stranger's module does when it is imported
        return _one_line(str(error)) or type(error).__name__
    return f"{package or path} has no {name}"


def _docker_needs(config: dict[str, Any]) -> Iterator[Finding]:
    docker = config.get("docker", {})
    image = "image" in docker or {"head_image", "worker_image"} <= docker.keys()
    if "container_name" in docker and not image:
        yield Finding(("docker", "image"), "missing beside container_name", "add `image: IMAGE`")
    if image and "container_name" not in docker:
        yield Finding(("docker", "container_name"), "missing", "add `container_name: pdcluster`")


def _head_and_workers(config: dict[str, Any], stated: bool) -> Iterator[Finding]:
    types, head = config["available_node_types"], config.get("head_node_type")
    if head not in types:
        found = f"{quote(head)} is no entry of available_node_types" if stated else "missing"
        fix = did_you_mean(str(head), types) if stated else f"write one of: {', '.join(types)}"
        yield Finding(("head_node_type",), found, fix)
    least = {name: entry.get("min_workers", 0) for name, entry in types.items()}
    most = config.get("max_workers")
    if most is not None and sum(least.values()) > most:
        parts = ", ".join(f"{name}: {count}" for name, count in least.items() if count)
        found = f"found {most}, less than all min_workers together ({parts})"
        yield Finding(("max_workers",), found, f"write {sum(least.values())} or more")


def _by_ray(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own code, as `ray up` runs it before it asks a cloud. Raises what it raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    # Ray prints and logs advice on the way, which is not this command's output.
    log = logging.getLogger("ray.autoscaler._private.util")
    was_disabled, log.disabled = log.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepared: dict[str, Any] = prepare_config(config)
            validate_config(prepared)
    finally:
        log.disabled = was_disabled
    return prepared


def _from_ray(config: dict[str, Any], error: Exception) -> Finding:
    """A complaint of Ray's code that we did not foresee, at the key that it names, if it does."""
    said = _one_line(str(error)) or type(error).__name__
    named = next((key for key in re.findall(r"[`'\"](\w+)[`'\"]", said) if key in config), None)
    return Finding(
        (named or "provider",), f"Ray refuses the file: {said}", "correct what Ray names"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _label_findings(examined: Examined) -> Iterator[Finding]:
    """Labels and label selectors, as Ray judges them when a node or a replica is started."""
    from ray._private.label_utils import (
        validate_label_key,
        validate_label_selector_value,
        validate_label_value,
    )

    key_rule = (
        "write letters, digits, '-', '_' and '.', at most 63, with an optional `domain/` before it"
    )
    serving = examined.serving
    for index, pool in enumerate(serving.pools if serving is not None else ()):
        for key, selector in pool.placement.labels.items():
            at = (*SERVING, "pools", index, "placement", "labels", key)
            if validate_label_key(key):
                yield Finding(at, "this is no label name to Ray", key_rule)
            if validate_label_selector_value(selector):
                fix = "write VALUE, !VALUE, in(A, B) or !in(A, B)"
                yield Finding(at, f"found {quote(selector)}, no label selector to Ray", fix)
    for path, key, value in _node_labels(examined.document.value):
        if validate_label_key(key):
            yield Finding(path, "this is no label name to Ray", key_rule)
        try:
            validate_label_value(value)
        except ValueError:
            fix = "write letters, digits, '-', '_' and '.', at most 63"
            yield Finding(path, f"found {quote(value)}, no label value to Ray", fix)


def _node_labels(config: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
    types = config.get("available_node_types")
    for name, entry in types.items() if isinstance(types, dict) else ():
        labels = entry.get("labels") if isinstance(entry, dict) else None
        for key, value in labels.items() if isinstance(labels, dict) else ():
            if isinstance(value, str):
                yield ("available_node_types", name, "labels", key), key, value


def _offer(value: dict[str, Any], prepared: dict[str, Any]) -> Offer | None:
    """What the nodes of a prepared config offer; None if Ray's half does not say."""
    kind = prepared["provider"]["type"]
    if kind == "kuberay":
        return None
    types, head = prepared["available_node_types"], prepared["head_node_type"]
    # Not stated here, yet there: found by Ray on the host, or given to `ray start`.
    elsewhere = kind == "local" or any(map(_STATED_AT_START.search, _start_commands(prepared)))
    known_by_cloud = {
        name
        for name, entry in value.get("available_node_types", {}).items()
        if kind in _CLOUDS_THAT_KNOW_RESOURCES and "resources" not in entry
    }
    return Offer(
        tuple(
            NodeType(
                name,
                most_workers=entry["max_workers"],
                is_head=name == head,
                resources=entry.get("resources", {}),
                labels=entry.get("labels", {}),
                open_ended=elsewhere or name in known_by_cloud,
            )
            for name, entry in types.items()
        ),
        prepared["max_workers"],
    )


def _start_commands(prepared: dict[str, Any]) -> Iterable[str]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        yield from prepared.get(key, [])


def _port_clash(
    serving: ServingSpec, value: dict[str, Any], prepared: dict[str, Any]
) -> Iterator[Finding]:
    """The gateway on a port that the head's own `ray start` is told to take."""
    if prepared["provider"]["type"] == "local" and "head_start_ray_commands" not in value:
        return  # `pdcluster up` starts Ray on this machine itself, on ports it chooses
    for command in prepared.get("head_start_ray_commands", []):
        for flag, port in _HEAD_PORT.findall(command):
            if int(port) == serving.gateway.port:
                yield Finding(
                    (*SERVING, "gateway", "port"),
                    f"port {port} is taken by Ray on the head (head_start_ray_commands: {flag})",
                    "write another port, such as 8000",
                )
