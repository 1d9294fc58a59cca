"""Are the models that engines on a host load whole, and is there room for what is not there? Pure.

Called by: nodes.doctor.judge.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.nodes.doctor.expect import HostPlan
from cluster.nodes.doctor.facts import Facts, Model
from cluster.nodes.doctor.findings import HostFinding, Severity, listed, size
from cluster.nodes.doctor.needs import ModelNeed


def models(plan: HostPlan, facts: Facts, cluster: str) -> Iterator[HostFinding]:
    """Folders that the file names, models that pdcluster makes, models of a hub."""
    if plan.container is not None:
        return  # paths inside the container
    by_id = {model.id: model for model in facts.models}
    for need in plan.models:
        found = by_id.get(need.id)
        if found is None or found.exists is None:
            continue
        if found.exists:
            yield from _whole(plan, found)
        else:
            yield from _absent(plan, need, found)


def _said(plan: HostPlan, severity: Severity, found: str, expected: str, fix: str) -> HostFinding:
    return HostFinding(severity, plan.address, "model", found, expected, fix)


def _whole(plan: HostPlan, found: Model) -> Iterator[HostFinding]:
    if not found.config:
        fix = "give the folder that holds config.json, tokenizer and weights, or copy it anew"
        yield _said(plan, "error", f"{found.path} has no config.json", "a model's folder", fix)
    elif found.missing:
        names = listed(list(found.missing), 2)
        yield _said(
            plan, "error", f"{found.path} lacks {len(found.missing)} weight files: {names}",
            "every file that model.safetensors.index.json names", "copy them in",
        )  # fmt: skip


def _absent(plan: HostPlan, need: ModelNeed, found: Model) -> Iterator[HostFinding]:
    if need.kind == "folder":
        fix = f"copy the model there (rsync -a), or mount it, or correct model.id ({need.id})"
        yield _said(plan, "error", f"no folder {found.path}", "the model, on every node", fix)
    elif need.kind == "hub":
        room = f", {size(found.free_bytes)} free" if found.free_bytes is not None else ""
        yield _said(
            plan, "warning", f"{need.id} is not in the hub's cache ({found.path}){room}",
            "the model, before engines start", f"hf download {need.id}, or copy the cache of a "
            "host that has it; else each engine's start waits for the download",
        )  # fmt: skip
    elif found.free_bytes is not None and found.free_bytes < need.needed_bytes:
        fix = "free some, or set XDG_CACHE_HOME to a folder on a larger disk"
        at = f"{found.path} can have {size(found.free_bytes)}"
        yield _said(plan, "error", at, f"{size(need.needed_bytes)} while {need.id} is made", fix)
