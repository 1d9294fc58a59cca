"""What `pdcluster doctor` prints and how it ends."""

from __future__ import annotations

import json

import pytest
from topology_text import BASE

from cluster.cli import doctor, output
from cluster.cli.main import run
from cluster.nodes.doctor.findings import HostFinding
from cluster.nodes.doctor.report import HostRow, Report

WARNING = HostFinding("warning", "10.0.0.1", "limits", "nofile 20000", "65536", "raise it")
ERROR = HostFinding("error", "10.0.0.2", "ssh", "refused", "it answers", "start sshd")
SEEN = {"python": "3.12.11", "ray": "2.60.0", "memory": "500 GiB", "driver": "25.5.0, CANN 9.1.0"}


@pytest.fixture
def topology(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(BASE)
    return str(path)


@pytest.fixture
def told(monkeypatch):
    """Makes the doctor find these things, whatever there is."""

    def told(*findings: HostFinding) -> None:
        rows = (
            HostRow("10.0.0.1", "head", 0, findings.count(WARNING), SEEN),
            HostRow("10.0.0.2", "a3", findings.count(ERROR), 0, {} if ERROR in findings else SEEN),
        )
        found = Report("rack", rows, findings)
        monkeypatch.setattr("cluster.nodes.doctor.report.report", lambda *_: found)

    return told


@pytest.mark.parametrize(
    ("findings", "code"), [((), 0), ((WARNING,), 0), ((ERROR, WARNING), 1), ((ERROR,), 1)]
)
def test_errors_end_it_with_1_and_warnings_alone_with_0(findings, code, told, topology, capsys):
    told(*findings)
    assert run(["doctor", topology]) == code
    said = capsys.readouterr().out
    for finding in findings:
        assert f"{finding.severity} {finding.host} {finding.check}" in said
        assert f"mend      {finding.fix}" in said
    assert ("nothing is wrong" in said) is (not findings)
    assert ("not reached" in said) is (ERROR in findings)


def test_a_file_that_is_wrong_ends_it_with_2(topology, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(BASE.replace("role: prefill", "role: prefil"))
    assert run(["doctor", str(path)]) == 2
    assert "metadata.serving.pools[0].role" in capsys.readouterr().err


def test_a_host_that_the_file_does_not_have_ends_it_with_2(topology, capsys):
    assert run(["doctor", topology, "--host", "10.9.9.9"]) == 2
    assert "found 10.9.9.9; the file has 127.0.0.1" in capsys.readouterr().err


def test_json_is_all_that_is_printed(told, topology, capsys):
    told(ERROR, WARNING)
    assert run(["doctor", topology, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["fit"] is False
    assert [row["host"] for row in said["rows"]] == ["10.0.0.1", "10.0.0.2"]
    assert said["findings"][0] == {
        "severity": "error",
        "host": "10.0.0.2",
        "check": "ssh",
        "found": "refused",
        "expected": "it answers",
        "fix": "start sshd",
    }


@pytest.mark.parametrize("width", [60, 200])
def test_nothing_is_cut_off_however_narrow_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr(output.out, "_width", width)
    doctor._show(Report("rack", (HostRow("10.0.0.1", "head", 0, 0, SEEN),), ()))
    said = capsys.readouterr().out
    assert "…" not in said
    words = " ".join(said.split())
    for value in SEEN.values():
        assert value in words
