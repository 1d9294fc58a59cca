"""Hosts beside each other: what must be alike, and whose fault it is when it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from doctor_facts import (
    GIB,
    GPU_1,
    GPU_2,
    HEAD,
    NPU_1,
    NPU_2,
    at,
    examination,
    plan_of,
    rack,
    sound,
)
from hypothesis import given
from hypothesis import strategies as st

from cluster.nodes.doctor.compare import HERE, Versions, compare
from cluster.nodes.doctor.examine import Reached
from cluster.nodes.doctor.facts import Clock, Facts
from cluster.nodes.doctor.findings import HostFinding
from cluster.nodes.doctor.report import report

RACK = rack()
OURS = Versions(python="3.12.11", ray="2.60.0", pdcluster="0.1.0")


def compared(here: Versions = OURS, **told: dict[str, Any]) -> list[HostFinding]:
    return compare(RACK, examination(RACK, **told), here)


def told(address: str, part: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """Keywords of `examination`: one part of one host's facts with changes."""
    return {at(address): {part: {**sound(plan_of(RACK, address))[part], **changes}}}


def brief(findings: list[HostFinding]) -> list[tuple[str, str, str]]:
    return [(f.severity, f.host, f.check) for f in findings]


def test_a_sound_rack_has_no_findings():
    assert compared() == []


@pytest.mark.parametrize("name", ["ray", "pdcluster"])
def test_a_host_with_another_version_than_the_head_is_an_error(name):
    findings = compared(**told(GPU_2, "packages", **{name: "9.9"}))
    assert brief(findings) == [("error", GPU_2, "versions")]
    assert f"{name} 9.9" in findings[0].found


def test_a_head_that_differs_puts_the_others_in_the_wrong():
    findings = compared(**told(HEAD, "packages", ray="9.9"))
    assert {f.host for f in findings} == {GPU_1, GPU_2, NPU_1, NPU_2, HERE}


def test_this_machine_is_held_against_the_hosts():
    assert brief(compared(replace(OURS, ray="9.9"))) == [("error", HERE, "versions")]
    assert brief(compared(replace(OURS, python="3.11.7"))) == [("warning", HERE, "versions")]
    assert compared(replace(OURS, python="3.12.1")) == []


def test_pythons_differ_by_their_last_number_unless_ray_is_told_to_bear_it():
    assert brief(compared(**told(NPU_1, "system", python="3.12.3"))) == [
        ("error", NPU_1, "versions")
    ]
    assert compared(**told(NPU_1, "system", python="3.12.3", match_level="minor")) == []
    other = compared(**told(NPU_1, "system", python="3.11.3", match_level="minor"))
    assert brief(other) == [("error", NPU_1, "versions")]


def test_hash_seeds_are_alike():
    findings = compared(**told(GPU_1, "system", hash_seed="7"))
    assert brief(findings) == [("warning", GPU_1, "PYTHONHASHSEED")]


def clocks(**offsets: float) -> list[HostFinding]:
    seen = examination(RACK)
    changed = {
        address: Clock(offset_s=offsets.get(at(address), 0.0), error_s=0.01)
        for address in seen.clocks
    }
    return compare(RACK, replace(seen, clocks=changed), OURS)


def test_a_clock_that_is_off_is_a_warning_and_an_error_beyond_half_a_lease():
    assert brief(clocks(**{at(GPU_1): 2.0})) == [("warning", GPU_1, "clock")]
    assert brief(clocks(**{at(GPU_1): -16.0})) == [("error", GPU_1, "clock")]


def test_hosts_that_agree_put_this_machines_clock_in_the_wrong():
    assert brief(clocks(**{at(plan.address): 40.0 for plan in RACK.hosts})) == [
        ("warning", HERE, "clock")
    ]


def test_a_slow_answer_is_not_a_clock_that_is_off():
    seen = examination(RACK)
    slow = {address: Clock(offset_s=2.0, error_s=2.5) for address in seen.clocks}
    assert compare(RACK, replace(seen, clocks=slow), OURS) == []


def test_drivers_are_alike_within_an_island_only():
    assert brief(compared(**told(NPU_2, "npu", cann="8.5.0"))) == [("error", NPU_2, "island")]
    assert brief(compared(**told(NPU_2, "npu", driver="25.2"))) == [("error", NPU_2, "island")]
    assert brief(compared(**told(GPU_2, "gpu", driver="570.1"))) == [("warning", GPU_2, "island")]


def test_engines_and_connectors_are_alike_within_an_island_only():
    assert brief(compared(**told(GPU_2, "packages", vllm="0.32.0"))) == [("error", GPU_2, "island")]
    # vLLM on H200 and below vLLM-Ascend need not be the same.
    both = told(NPU_1, "packages", vllm="0.23.0") | told(NPU_2, "packages", vllm="0.23.0")
    assert compared(**both) == []


def models(address: str, **changes: Any) -> dict[str, dict[str, Any]]:
    (model,) = sound(plan_of(RACK, address))["models"]
    return {at(address): {"models": [{**model, **changes}]}}


def test_a_model_that_differs_is_told_by_what_differs():
    (files,) = compared(**models(NPU_2, digest="other", files=99))
    assert (files.host, files.check) == (NPU_2, "model")
    assert "files differ in name or size" in files.found
    (config,) = compared(**models(NPU_2, config="other"))
    assert "config.json differs" in config.found


def test_room_is_judged_by_the_size_that_another_host_has():
    absent = {"exists": False, "free_bytes": 100 * GIB, "bytes": 0}
    assert brief(compared(**models(NPU_2, **absent))) == [("error", NPU_2, "disk")]
    assert compared(**models(NPU_2, **{**absent, "free_bytes": 800 * GIB})) == []


def test_a_host_that_cannot_be_reached_by_others_is_told_once_with_who_tried():
    seen = examination(RACK)
    reached = tuple(
        Reached(one.source, one.target, one.port, "no answer within 3 s")
        if one.target == NPU_2
        else one
        for one in seen.reached
    )
    (finding,) = compare(RACK, replace(seen, reached=reached), OURS)
    assert (finding.severity, finding.host, finding.check) == ("error", NPU_2, "network")
    assert HEAD in finding.found
    assert NPU_1 in finding.found
    assert GPU_1 not in finding.found


def test_hosts_of_linked_pools_and_the_head_must_reach_each_other():
    assert (NPU_1, NPU_2) in RACK.pairs
    assert (HEAD, GPU_1) in RACK.pairs
    assert (GPU_1, HEAD) in RACK.pairs
    assert (GPU_1, NPU_1) not in RACK.pairs


def test_an_address_that_a_host_cannot_bind_is_an_error():
    seen = replace(examination(RACK), unbound={GPU_1: "OSError: Cannot assign requested address"})
    assert brief(compare(RACK, seen, OURS)) == [("error", GPU_1, "network")]


def test_a_report_has_a_row_for_a_host_that_was_not_reached_and_errors_first():
    seen = examination(RACK, **told(HEAD, "limits", open_files=20_000))
    facts = {address: facts for address, facts in seen.facts.items() if address != GPU_1}
    said = report(RACK, replace(seen, facts=facts, failed={GPU_1: "Connection refused"}), OURS)
    assert [row.host for row in said.rows] == [HEAD, GPU_1, GPU_2, NPU_1, NPU_2]
    assert said.rows[1].seen == {}
    assert brief(list(said.findings)) == [("error", GPU_1, "ssh"), ("warning", HEAD, "limits")]
    assert said.has_errors
    assert said.as_json()["fit"] is False


def test_a_report_shows_what_each_host_has():
    row = report(RACK, examination(RACK), OURS).rows[3]
    assert (row.errors, row.warnings) == (0, 0)
    assert row.seen == {
        "python": "3.12.11",
        "ray": "2.60.0",
        "devices": "16 NPU",
        "driver": "25.5.0, CANN 9.1.0",
        "memory": "500 GiB",
        "/dev/shm": "250 GiB",
        "model": "693 GiB",
        "clock": "+0.01 s",
    }


@given(st.sets(st.sampled_from([p.address for p in RACK.hosts])), st.floats(-1e6, 1e6))
def test_hosts_that_told_nothing_keep_nobody_from_comparing(silent, offset_s):
    seen = examination(RACK)
    facts = {**seen.facts, **dict.fromkeys(silent, Facts())}
    clock = dict.fromkeys(silent, Clock(offset_s=offset_s, error_s=0.1))
    said = report(RACK, replace(seen, facts=facts, clocks=clock), OURS)
    assert len(said.rows) == len(RACK.hosts)
