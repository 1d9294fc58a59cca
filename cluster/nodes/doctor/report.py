"""What the doctor has to say of all hosts: every finding, and a line per host. Pure.

Called by: cli.doctor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.nodes.doctor.compare import HERE, Versions, compare
from cluster.nodes.doctor.examine import Examination
from cluster.nodes.doctor.expect import HostPlan, Survey
from cluster.nodes.doctor.facts import Facts
from cluster.nodes.doctor.findings import HostFinding, size
from cluster.nodes.doctor.judge import judge


@dataclass(frozen=True, slots=True)
class HostRow:
    """One host in a table. `seen`: what there is to see, by name; empty if it was not reached."""

    host: str
    node_type: str
    errors: int
    warnings: int
    seen: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """`findings`: errors first, then in the order of the hosts."""

    cluster: str
    rows: tuple[HostRow, ...]
    findings: tuple[HostFinding, ...]

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"fit": not self.has_errors, **asdict(self)}


def report(survey: Survey, seen: Examination, here: Versions) -> Report:
    """Everything that is wrong, and what each host is."""
    found = compare(survey, seen, here)
    for plan in survey.hosts:
        if plan.address in seen.facts:
            found += judge(plan, seen.facts[plan.address], survey.cluster)
    order = {HERE: -1, **{plan.address: n for n, plan in enumerate(survey.hosts)}}
    found.sort(key=lambda one: (one.severity != "error", order.get(one.host, len(order))))
    rows = tuple(_row(plan, seen, found) for plan in survey.hosts)
    return Report(survey.cluster, rows, tuple(found))


def _row(plan: HostPlan, seen: Examination, found: list[HostFinding]) -> HostRow:
    own = [finding.severity for finding in found if finding.host == plan.address]
    facts = seen.facts.get(plan.address)
    shown = _shown(plan, facts) if facts is not None else {}
    clock = seen.clocks.get(plan.address)
    if shown and clock is not None and plan.access is not None:
        shown["clock"] = f"{clock.offset_s:+.2f} s"
    return HostRow(plan.address, plan.node_type, own.count("error"), own.count("warning"), shown)


def _shown(plan: HostPlan, facts: Facts) -> dict[str, str]:
    where = facts.container if plan.container is not None else None
    packages = facts.packages if plan.container is None else where.packages if where else {}
    python = facts.system.python if plan.container is None else where.python if where else ""
    shown = {"python": python or "?", "ray": packages.get("ray", "?")}
    if facts.devices is not None:
        counts = {"GPU": facts.devices.nvidia, "NPU": facts.devices.davinci}
        shown["devices"] = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "none"
    if facts.gpu is not None or facts.npu is not None:
        npu = f"{facts.npu.driver}, CANN {facts.npu.cann}" if facts.npu is not None else ""
        shown["driver"] = (facts.gpu.driver if facts.gpu is not None else npu) or "?"
    if facts.memory_bytes:
        shown["memory"] = size(facts.memory_bytes)
    if facts.shm.total_bytes is not None:
        shown["/dev/shm"] = size(facts.shm.total_bytes)
    models = [model for model in facts.models if model.exists]
    shown["model"] = size(sum(model.bytes for model in models)) if models else "none"
    return shown
