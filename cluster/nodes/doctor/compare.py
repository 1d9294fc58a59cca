"""Hosts beside each other, and beside the operator's machine: what must be alike. Pure.

    of all hosts      Python, Ray, pdcluster, PYTHONHASHSEED, clocks
    of one island     drivers, CANN, engines and their connectors
    of one model      the folder: names, sizes, config.json
    between hosts     who reaches whom

The head is what others are held against; within an island, what most of its hosts have.
Called by: nodes.doctor.report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cluster.nodes.doctor.examine import Examination
from cluster.nodes.doctor.expect import HostPlan, Survey
from cluster.nodes.doctor.facts import Clock, Facts, Model
from cluster.nodes.doctor.findings import HostFinding, Severity, listed, size
from cluster.workers.ports import DEFAULT_WINDOW

HERE = "this machine"
_NVIDIA = "NVIDIA driver"
_WINDOW = f"{DEFAULT_WINDOW.start}-{DEFAULT_WINDOW.stop - 1}"
# Times in logs and transfer records are laid side by side; a second is what people notice.
_SKEW_NOTICED_S = 1.0


@dataclass(frozen=True, slots=True)
class Versions:
    """What the operator's machine has."""

    python: str
    ray: str
    pdcluster: str


def compare(survey: Survey, seen: Examination, here: Versions) -> list[HostFinding]:
    """All that is wrong between hosts that were reached, and those that were not."""
    plans = [plan for plan in survey.hosts if plan.address in seen.facts]
    found = list(_unreachable(seen))
    found += _software(survey, plans, seen.facts, here)
    found += _hash_seeds(plans, seen.facts)
    found += _clocks(survey, seen.clocks)
    for island in survey.serving.islands:
        members = [p for p in plans if {pool.name for pool in p.pools} & {*island.pools}]
        found += _island(island.name, members, seen.facts)
    found += _models(plans, seen.facts)
    found += _reach(seen)
    return found


def _unreachable(seen: Examination) -> Iterator[HostFinding]:
    for host, why in seen.failed.items():
        yield HostFinding(
            "error", host, "ssh", why, "the host answers over ssh and runs Python",
            "check the address, sshd, auth.ssh_user and auth.ssh_private_key: ssh USER@HOST",
        )  # fmt: skip


# Software of all hosts


def _software(
    survey: Survey, plans: list[HostPlan], facts: Mapping[str, Facts], here: Versions
) -> Iterator[HostFinding]:
    pythons = {p.address: _python(p, facts[p.address]) for p in plans}
    yield from _pythons(survey.head, pythons, plans, facts, here)
    for name, ours in (("ray", here.ray), ("pdcluster", here.pdcluster)):
        versions = {p.address: _packages(p, facts[p.address]).get(name, "") for p in plans}
        expected = versions.get(survey.head) or _most(versions.values())
        fix = f"install {name}=={expected} there"
        for host, version in versions.items():
            if version and expected and version != expected:
                wanted = f"{name} {expected}, as on {_who_has(versions, expected)}"
                yield HostFinding("error", host, "versions", f"{name} {version}", wanted, fix)
        if expected and ours and ours != expected:
            wanted = f"{name} {expected}, as on the hosts"
            fix = f"install {name}=={expected} on this machine, or {ours} on the hosts"
            yield HostFinding("error", HERE, "versions", f"{name} {ours}", wanted, fix)


def _pythons(
    head: str,
    pythons: Mapping[str, str],
    plans: list[HostPlan],
    facts: Mapping[str, Facts],
    here: Versions,
) -> Iterator[HostFinding]:
    """Ray refuses a Python that differs by its last number, too, unless it is told otherwise
    (RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor)."""
    expected = pythons.get(head) or _most(pythons.values())
    levels = {p.address: facts[p.address].system.match_level for p in plans}
    for host, python in pythons.items():
        if not python or not expected or python == expected:
            continue
        is_minor = _minor(python) != _minor(expected)
        if not is_minor and levels[host] == "minor":
            continue
        wanted = f"Python {expected}, as on {_who_has(pythons, expected)}"
        fix = f"start Ray with Python {expected} there"
        if not is_minor:
            fix += ", or set RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor on all hosts"
        yield HostFinding("error", host, "versions", f"Python {python}", wanted, fix)
    if expected and _minor(here.python) != _minor(expected):
        wanted, fix = f"Python {_minor(expected)}, as on the hosts", "use that Python here, too"
        yield HostFinding("warning", HERE, "versions", f"Python {here.python}", wanted, fix)


def _python(plan: HostPlan, facts: Facts) -> str:
    if plan.container is None:
        return facts.system.python
    return facts.container.python if facts.container is not None else ""


def _packages(plan: HostPlan, facts: Facts) -> Mapping[str, str]:
    if plan.container is None:
        return facts.packages
    return facts.container.packages if facts.container is not None else {}


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _hash_seeds(plans: list[HostPlan], facts: Mapping[str, Facts]) -> Iterator[HostFinding]:
    """Engines get one from pdcluster; what is set by hand for a shell reaches Ray's own Python."""
    told = {p.address: facts[p.address].system for p in plans if p.container is None}
    seeds = {host: system.hash_seed or "not set" for host, system in told.items() if system.python}
    expected = _most(seeds.values())
    for host, seed in seeds.items():
        if seed != expected:
            yield HostFinding(
                "warning", host, "PYTHONHASHSEED", seed, f"{expected}, as on "
                f"{_who_has(seeds, expected)}", "set the same in every host's ~/.bashrc, or none",
            )  # fmt: skip


# Clocks


def _clocks(survey: Survey, clocks: Mapping[str, Clock]) -> Iterator[HostFinding]:
    """Against this machine's; if all hosts agree and this one does not, it is this one's fault."""
    lease_s = min(island.lease_s for island in survey.serving.islands)
    off = {host: clock for host, clock in clocks.items() if _skew_s(clock) > _SKEW_NOTICED_S}
    offsets = [clock.offset_s for clock in clocks.values()]
    if len(off) == len(clocks) > 1 and max(offsets) - min(offsets) <= _SKEW_NOTICED_S:
        found = f"its clock is {-offsets[0]:+.1f} s beside the hosts', which agree"
        fix = "set it by NTP (timedatectl set-ntp true)"
        yield HostFinding("warning", HERE, "clock", found, "the same time", fix)
        return
    for host, clock in off.items():
        is_fatal = _skew_s(clock) > lease_s / 2
        severity: Severity = "error" if is_fatal else "warning"
        wanted = f"within {_SKEW_NOTICED_S:g} s; leases of {lease_s:g} s are told in clock times"
        found = f"{clock.offset_s:+.1f} s (give or take {clock.error_s:.2f} s) beside this machine"
        fix = "set it by NTP (timedatectl set-ntp true; chronyc tracking)"
        yield HostFinding(severity, host, "clock", found, wanted, fix)


def _skew_s(clock: Clock) -> float:
    """What is certain of it."""
    return abs(clock.offset_s) - clock.error_s


# Islands


def _island(
    island: str, members: list[HostPlan], facts: Mapping[str, Facts]
) -> Iterator[HostFinding]:
    """Drivers and engines of hosts whose pools exchange KV blocks, or share one engine."""
    has = {plan.address: _island_versions(plan, facts[plan.address]) for plan in members}
    for what in sorted({name for versions in has.values() for name in versions}):
        # NVIDIA's libraries talk to each other across drivers; HCCL does not across CANNs.
        severity: Severity = "warning" if what == _NVIDIA else "error"
        values = {host: versions.get(what, "") for host, versions in has.items()}
        expected = _most(value for value in values.values() if value)
        for host, value in values.items():
            if value and value != expected:
                wanted = f"{what} {expected}, as on {_who_has(values, expected)}"
                fix = f"install the same on all hosts of island {island}"
                yield HostFinding(severity, host, "island", f"{what} {value}", wanted, fix)


def _island_versions(plan: HostPlan, told: Facts) -> dict[str, str]:
    """Versions of drivers, and of what the host's pools need, by name."""
    found = {}
    if told.gpu is not None:
        found[_NVIDIA] = told.gpu.driver
    if told.npu is not None:
        found["Ascend driver"] = told.npu.driver
        if plan.container is None:
            found["CANN"] = told.npu.cann
    for need in plan.needs.packages:
        there = told.interpreters.get(need.python)
        has = there.packages if there is not None else {}
        if not need.python:
            has = dict(_packages(plan, told))
        for choice in need.wanted:
            found.update({name: has[name] for name in choice if name in has})
    return found


# Models


def _models(plans: list[HostPlan], facts: Mapping[str, Facts]) -> Iterator[HostFinding]:
    there: dict[str, dict[str, Model]] = {}
    for plan in plans:
        for model in facts[plan.address].models if plan.container is None else ():
            there.setdefault(model.id, {})[plan.address] = model
    for name, by_host in there.items():
        yield from _alike(name, {h: m for h, m in by_host.items() if m.exists and m.config})
        yield from _room(name, by_host)


def _alike(name: str, by_host: Mapping[str, Model]) -> Iterator[HostFinding]:
    prints = {host: f"{model.digest} {model.config}" for host, model in by_host.items()}
    expected = _most(prints.values())
    for host, mark in prints.items():
        if mark != expected:
            model = by_host[host]
            other = next(by_host[h] for h, value in prints.items() if value == expected)
            is_config = model.digest == other.digest
            what = "config.json differs" if is_config else "files differ in name or size"
            yield HostFinding(
                "error", host, "model",
                f"{model.path}: {what} ({model.files} files, {size(model.bytes)})",
                f"as on {_who_has(prints, expected)} ({other.files} files, {size(other.bytes)})",
                f"copy {name} anew: rsync -a --checksum",
            )  # fmt: skip


def _room(name: str, by_host: Mapping[str, Model]) -> Iterator[HostFinding]:
    """Hosts that lack a model which another one has, so that its size is known."""
    whole = max((m.bytes for m in by_host.values() if m.exists), default=0)
    for host, model in by_host.items():
        missing = whole - (model.bytes if model.exists else 0)
        is_partial = model.exists is False or bool(model.missing)
        if is_partial and model.free_bytes is not None and model.free_bytes < missing:
            found = f"{size(model.free_bytes)} free for {model.path}"
            fix = "free some, or put the model on a larger disk"
            yield HostFinding("error", host, "disk", found, f"{size(missing)} for {name}", fix)


# Connections


def _reach(seen: Examination) -> Iterator[HostFinding]:
    for host, why in seen.unbound.items():
        yield HostFinding(
            "error", host, "network", f"nothing can listen there: {why}",
            "the address in the file is one of the host's own; engines bind it",
            "write the address that `ip address` shows on the host",
        )  # fmt: skip
    refused: dict[tuple[str, str], list[str]] = {}
    ports = {one.target: one.port for one in seen.reached}
    for one in seen.reached:
        if one.why:
            refused.setdefault((one.target, one.why), []).append(one.source)
    for (target, why), sources in refused.items():
        yield HostFinding(
            "error", target, "network", f"port {ports[target]} from {listed(sources)}: {why}",
            "hosts of linked pools and the head reach each other's engine ports",
            f"let {_WINDOW}/tcp through between them (nft list ruleset; ip route get)",
        )  # fmt: skip


# Words


def _most(values: Iterable[str]) -> str:
    """The commonest; of equals the first. "" if there is none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else ""


def _who_has(values: Mapping[str, str], value: str) -> str:
    return listed([host for host, own in values.items() if own == value], 3)
