"""Ctrl-C before and as a command begins, in the process that the console script makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Python runs it before anything of ours: whoever comes to FILE:FUNCTION stays there.
HOLD = """
import atexit, os, sys, time

path, name = os.environ["HOLD_AT"].split(":")

def hold(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_name == name and code.co_filename.endswith(path):
        print("held", flush=True)
        time.sleep(600)

sys.setprofile(hold)
if "CRASH" in os.environ:
    atexit.register(os.abort)
"""


def console_script():
    """What an installed `pdcluster` says."""
    parsed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = parsed["project"]["scripts"]["pdcluster"].partition(":")
    return f"from {module} import {function}; {function}()"


def interrupted_at(place, tmp_path, **env):
    """Exit code and output of a `status` that gets SIGINT there."""
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    process = subprocess.Popen(
        [sys.executable, "-c", console_script(), "status"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HOLD_AT": place} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests may be a background job, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
        return process.returncode, *said
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("cluster/cli/main.py:<module>", ""),
        ("typer/main.py:<module>", ""),
        ("cluster/cli/watch.py:<module>", ""),
        ("cluster/cli/main.py:build", ""),
        ("cluster/cli/main.py:root", ""),  # click has begun to read the words
        ("cluster/cli/status.py:status", "interrupted\n"),
    ],
)
def test_ctrl_c_ends_with_130_and_without_a_traceback_from_the_first_import_on(
    place, said, tmp_path
):
    assert interrupted_at(place, tmp_path) == (130, "", said)


def test_what_crashes_as_python_ends_does_not_change_the_exit_code_of_ctrl_c(tmp_path):
    # As Ray does that was interrupted while it connected.
    found = interrupted_at("cluster/cli/status.py:status", tmp_path, CRASH="1")
    assert found == (130, "", "interrupted\n")


def test_a_job_in_the_background_of_a_shell_goes_on_ignoring_ctrl_c():
    script = (
        "import signal; from cluster.cli import interrupt; interrupt.ends_at_once(); "
        "signal.raise_signal(signal.SIGINT); interrupt.raises(); "
        "signal.raise_signal(signal.SIGINT); print('goes on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.stdout == "goes on\n"
