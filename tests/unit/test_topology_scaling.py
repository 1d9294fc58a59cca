"""`metadata.serving.scaling`: its defaults, and what is wrong with a file that has it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from topology_text import BASE, GATEWAY

from cluster.errors import TopologyError
from cluster.topology.loader import load
from cluster.topology.schema import ServingSpec

GOOD = "{prefill: prefill, decode: decode, ttft_s: 2, tpot_s: 0.05}"


def read(tmp_path: Path, scaling: str) -> ServingSpec:
    path = tmp_path / "t.yaml"
    path.write_text(BASE.replace(GATEWAY, f"{GATEWAY}    scaling: {scaling}\n"))
    return load(path).serving


def test_without_the_section_the_operator_decides(tmp_path):
    scaling = read(tmp_path, "{}").scaling
    assert scaling.mode == "manual"
    assert not scaling.dry_run


def test_targets_are_read(tmp_path):
    scaling = read(tmp_path, f"{{mode: slo, dry_run: true, targets: [{GOOD}]}}").scaling
    (target,) = scaling.targets
    assert (target.ttft_s, target.tpot_s, target.percentile) == (2, 0.05, 95)


@pytest.mark.parametrize(
    ("scaling", "key", "found", "fix"),
    [
        ("{mode: slo}", "", "no targets", "write targets: [{prefill: POOL"),
        ("{mode: auto}", ".mode", '"auto"', "manual | slo"),
        (
            "{targets: [{prefill: prefill, decode: decode}]}",
            ".targets[0]",
            "neither",
            "one or both",
        ),
        (
            f"{{targets: [{GOOD}, {GOOD}]}}",
            ".targets[1]",
            "the same pair as targets[0]",
            "keep one",
        ),
        (
            f"{{targets: [{GOOD.replace(': prefill', ': prefil')}]}}",
            ".targets[0].prefill",
            'no pool is called "prefil"',
            "did you mean `prefill`?",
        ),
        (
            f"{{targets: [{GOOD.replace('decode: decode', 'decode: prefill')}]}}",
            ".targets[0].decode",
            'pool "prefill" has role prefill',
            "role: decode",
        ),
        (
            f"{{targets: [{GOOD[:-1]}, percentile: 100}}]}}",
            ".targets[0].percentile",
            "100",
            "at most 99.9",
        ),
        ("{headroom: true}", ".headroom", "true", "a number"),
    ],
)
def test_a_fault_names_its_key_what_was_found_and_the_fix(tmp_path, scaling, key, found, fix):
    with pytest.raises(TopologyError) as caught:
        read(tmp_path, scaling)
    (fault,) = caught.value.faults
    assert fault.key == f"metadata.serving.scaling{key}"
    assert found in fault.found
    assert fix in fault.fix


def test_the_example_in_the_docs_loads(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs/autoscaling.md"
    path = tmp_path / "t.yaml"
    path.write_text(page.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0])
    assert load(path).serving.scaling.mode == "slo"


def test_a_target_wants_a_pair_that_is_linked(tmp_path):
    path = tmp_path / "t.yaml"
    second = "      - {name: late, role: decode, engine: simulated}\n    islands:\n"
    text = BASE.replace("    islands:\n", second).replace(
        "[prefill, decode]", "[prefill, decode, late]"
    )
    links = "    links: [{prefill: prefill, decode: decode}, {prefill: prefill, decode: late}]\n"
    target = GOOD.replace("decode: decode", "decode: late")
    path.write_text(f"{text}{links}    scaling: {{mode: slo, targets: [{target}]}}\n")
    assert load(path).serving.scaling.targets[0].decode == "late"
    path.write_text(
        f"{text}{links.replace(', {prefill: prefill, decode: late}', '')}"
        f"    scaling: {{mode: slo, targets: [{target}]}}\n"
    )
    with pytest.raises(TopologyError, match='"prefill" does not feed "late"'):
        load(path)
