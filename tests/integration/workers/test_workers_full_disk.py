"""A disk that takes no more costs log lines, counted, and never the engine."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parent / "full_disk.py"
ROOT = Path(__file__).parents[3]


def test_an_engine_whose_log_finds_no_room_is_ready_serves_and_says_what_is_lost(
    make_spec, environment, tmp_path, remains
):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace of its own takes root")
    spec = tmp_path / "spec"
    spec.write_bytes(pickle.dumps(make_spec(engine_args={"fault-endpoint": True})))
    state = Path(os.environ["XDG_STATE_HOME"])
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, str(SCRIPT), str(state), str(spec)],
        env={**environment, **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    said = json.loads(done.stdout)
    assert (said["state"], said["message"]) == ("ready", "")
    assert said["lost"] >= 1
    assert said["is_whole"]
    # With room again it is written to, and says first what is missing.
    first, *rest = said["written"].splitlines()
    assert first.startswith("pdcluster: ")
    assert first.endswith("lines lost here: No space left on device")
    assert any("failed" in line for line in rest)
    assert "lines of the log are lost: No space left on device" in said["last_words"][-1]
    remains.assert_gone()
