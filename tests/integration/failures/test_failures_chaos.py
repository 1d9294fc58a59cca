"""scripts/chaos.py: twenty faults of any kind under mixed traffic, from `up` to `down`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import environ

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts/chaos.py"


def test_twenty_random_faults_fail_no_request_change_no_answer_and_leave_nothing(tmp_path):
    file = tmp_path / "chaos.json"
    argv = [sys.executable, str(SCRIPT), "--faults", "20", "--rate", "1", "--clients", "8"]
    argv += ["--seed", "1941"]  # nearly every kind is among them
    done = subprocess.run([*argv, "--json", str(file)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    found = json.loads(file.read_text())
    assert found["faults"] == 20
    assert found["failed"] == found["wrong_answers"] == 0
    assert found["requests"] > 50
    done_kinds = {row["kind"] for row in found["by_kind"]}
    # Its disk takes a mount namespace of its own, and so root.
    assert "disk full under the logs, an engine killed" in done_kinds or found["left_out"]
    assert f"seed {found['seed']}" in done.stderr


@pytest.mark.parametrize("moment", ["up:", "undisturbed traffic"])
def test_ctrl_c_ends_a_run_and_leaves_nothing(moment):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--faults", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    folder = ""
    for line in process.stderr:
        folder = folder or line.partition("logs in ")[2].partition("/state/")[0]
        if moment in line:
            break
    assert folder
    time.sleep(3.0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert not os.path.exists(folder)
    assert not [p for p in psutil.process_iter() if folder in str(environ(p))]
    assert folder not in Path("/proc/mounts").read_text()
