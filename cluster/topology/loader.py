"""Read a topology file: YAML, then presets, schema, and what must agree between keys.

    path ─ source.read ─ Document ─ presets.applied ─ ServingSpec ─ checks.cross_faults ─ Topology
                │                          └ wording.findings ┘         │
                └───────────────── Fault (file, line, key, found, fix) ─ TopologyError

`load` is for everyone. `examine` is for launcher.validate, which adds Ray's half and wants all
faults of both at once. Reads the file and nothing else; no Ray import.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import Fault, TopologyError
from cluster.topology import presets, source, wording
from cluster.topology.checks import cross_faults
from cluster.topology.findings import SERVING, Finding, KeyPath, dotted, nearest, quote
from cluster.topology.schema import ServingSpec, Topology
from cluster.topology.shape import model_at
from cluster.topology.source import Document

_CLUSTER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Examined:
    """What can be said of a file that may have faults.

    `serving` is None if so much is wrong that nothing can be concluded from the rest. If only some
    keys are wrong, it holds defaults in their place, and `doubtful` names them."""

    document: Document
    serving: ServingSpec | None
    faults: tuple[Fault, ...]
    doubtful: tuple[KeyPath, ...] = ()

    def locate(self, findings: Iterable[Finding]) -> tuple[Fault, ...]:
        """Findings (keys from the top of the file) as Faults, without those that rest on a key
        which is itself at fault."""
        return tuple(
            Fault(
                self.document.file,
                self.document.line(finding.key),
                dotted(finding.key),
                finding.found,
                finding.fix,
            )
            for finding in findings
            if not any(
                _touch(key, bad)
                for key in finding.rests_on or (finding.key,)
                for bad in self.doubtful
            )
        )

    def topology(self, further: Iterable[Fault] = ()) -> Topology:
        """The Topology. Raises: TopologyError with all faults, `further` ones too, by line."""
        faults = _ordered((*self.faults, *further))
        if faults or self.serving is None:
            raise TopologyError(faults)
        ray = copy.copy(self.document.value)
        ray["metadata"] = {k: v for k, v in ray["metadata"].items() if k != "serving"}
        return Topology(
            path=self.document.file,
            cluster_name=ray["cluster_name"],
            ray=ray,
            serving=self.serving,
        )


def load(path: Path) -> Topology:
    """Read and check our half of a topology file. `Topology.ray` is the rest of it, unchecked.

    Raises: TopologyError with every fault found, in the order of lines."""
    return examine(path).topology()


def examine(path: Path) -> Examined:
    """As `load`, but hands back the faults. Raises: TopologyError if nothing can be read at all."""
    document = source.read(path)
    value, findings = _serving_value(document)
    if value is None:
        return Examined(document, None, _all_faults(document, findings))
    value, unknown = presets.applied(value)
    serving, errors, doubtful = _parse(value)
    faults = _all_faults(document, (*findings, *_from_top((*unknown, *errors))))
    # What an unknown preset would have said of its pool is not known either.
    doubtful = (*doubtful, *(finding.key[:-1] for finding in unknown))
    examined = Examined(document, serving, faults, tuple(SERVING + key for key in doubtful))
    if serving is None:
        return examined
    further = examined.locate(_from_top(cross_faults(serving)))
    return replace(examined, faults=_ordered((*faults, *further)))


def _all_faults(document: Document, findings: Iterable[Finding]) -> tuple[Fault, ...]:
    return _ordered((*document.faults, *Examined(document, None, ()).locate(findings)))


def _serving_value(document: Document) -> tuple[dict[str, Any] | None, tuple[Finding, ...]]:
    """Our half as read, and what is wrong around it."""
    problems = []
    name = document.value.get("cluster_name")
    if "cluster_name" not in document.value:
        problems.append(Finding(("cluster_name",), "missing", "add `cluster_name: NAME`"))
    elif not isinstance(name, str) or not _CLUSTER_NAME.fullmatch(name):
        found = f"found {quote(name)}"
        problems.append(Finding(("cluster_name",), found, wording.NAME_RULE))
    metadata = document.value.get("metadata")
    serving = metadata.get("serving") if isinstance(metadata, dict) else None
    if isinstance(serving, dict):
        return serving, tuple(problems)
    if isinstance(metadata, dict) and "serving" in metadata:
        found, fix = f"found {quote(serving)}", "write a mapping with keys model, pools, islands"
    elif "metadata" in document.value and not isinstance(metadata, dict):
        found, fix = f"`metadata` is {quote(metadata)}", "write `serving:` below `metadata:`"
    elif "serving" in document.value:
        found, fix = "missing, but `serving` stands at the top", "move it below `metadata:`"
    else:
        found = "missing"
        fix = "add it, with keys model, pools, islands; docs/topologies.md has one to copy"
    problems.append(Finding(SERVING, found, fix))
    return None, tuple(problems)


def _parse(
    value: dict[str, Any],
) -> tuple[ServingSpec | None, tuple[Finding, ...], tuple[KeyPath, ...]]:
    """The spec as far as it can be had, what is wrong with it, and which keys are in doubt."""
    try:
        return ServingSpec.model_validate(value), (), ()
    except ValidationError as error:
        findings = wording.findings(error, value)
    serving, doubtful = _without(value, [finding.key for finding in findings])
    return serving, findings, doubtful


def _without(
    value: dict[str, Any], bad: list[KeyPath]
) -> tuple[ServingSpec | None, tuple[KeyPath, ...]]:
    """The spec with defaults for bad keys, if that works, and the keys that cannot be trusted: the
    bad ones, and those that a misspelt one was meant to be."""
    copied = copy.deepcopy(value)
    doubtful: list[KeyPath] = []
    for key in bad:
        if not isinstance(key[-1] if key else None, str):
            return None, ()  # an item of a list: without it, the others' indices are wrong
        parent: Any = copied
        for part in key[:-1]:
            parent = parent[part]
        if not isinstance(parent, dict) or parent.pop(key[-1], parent) is parent:
            return None, ()  # missing, and it has no default
        doubtful.append(key)
        model = model_at(key[:-1])
        meant = nearest(str(key[-1]), model.model_fields) if model is not None else None
        if meant is not None:
            doubtful.append((*key[:-1], meant))
    try:
        return ServingSpec.model_validate(copied), tuple(doubtful)
    except ValidationError:
        return None, ()


def _from_top(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            SERVING + finding.key,
            finding.found,
            finding.fix,
            tuple(SERVING + key for key in finding.rests_on),
        )
        for finding in findings
    )


def _touch(one: KeyPath, other: KeyPath) -> bool:
    """Is one of the two keys the other, or above it?"""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _ordered(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """By line; of several faults of one key with the same words, one."""
    return tuple(sorted(dict.fromkeys(faults), key=lambda fault: (fault.line, fault.key)))
