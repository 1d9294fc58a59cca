"""The CLI's surface: exit codes, messages, speed of --help, and what status shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import status_view
from cluster.cli.main import COMMANDS, run
from cluster.cli.output import bytes_text, span_text
from cluster.cli.ttft import ttft_s
from cluster.control.events import Recorded, WorkerMoved
from cluster.control.state import ClusterStatus, FailedSlot, LinkStatus, PoolStatus
from cluster.errors import ClusterError
from cluster.identity import Role, WorkerId, WorkerState
from cluster.launcher.running import Running
from cluster.launcher.target import of_running
from cluster.snapshot import Link
from cluster.workers.report import Counters, WorkerReport

ROOT = Path(__file__).parents[2]
VALID = str(ROOT / "topologies/local-simulated.yaml")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("STATE_HOME", "RUNTIME_DIR", "CACHE_HOME"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def invalid(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(Path(VALID).read_text().replace("role: prefill", "role: prefil"))
    return str(path)


def test_help_names_every_command_and_does_not_wait_for_ray():
    begun_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cluster.cli", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    took_s = time.monotonic() - begun_s
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"ray", "aiohttp", "vllm", "torch", "uvicorn"}
    # 0.3 s measured alone on two cores; this bound also holds on a busy machine.
    assert took_s < 5
    for command in COMMANDS:
        assert command.__name__ in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_has_a_help_with_an_example(command, capsys):
    name = command.__name__
    assert run([name, "--help"]) == 0
    assert name in capsys.readouterr().out
    assert name == "version" or f"Example: pdcluster {name}" in command.__doc__


def test_a_valid_file_is_said_to_be_valid(capsys):
    assert run(["validate", VALID]) == 0
    assert "is valid: cluster local-simulated" in capsys.readouterr().out


def test_a_faulty_file_exits_2_with_line_key_and_fix(invalid, capsys):
    assert run(["validate", invalid]) == 2
    said = capsys.readouterr().err
    assert f"{invalid}:" in said
    assert "metadata.serving.pools[0].role" in said


@pytest.mark.parametrize("command", ["validate", "render", "up", "status", "doctor"])
def test_faults_come_as_json_too(invalid, capsys, command):
    assert run([command, invalid, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["valid"], told["error"]["type"]) == (False, "TopologyError")
    faults = told["faults"]
    assert faults[0]["key"] == "metadata.serving.pools[0].role"
    assert set(faults[0]) == {"file", "line", "key", "found", "fix"}


@pytest.mark.parametrize(
    "words",
    [
        ["up"],
        ["no-such-command"],
        ["validate", "--no-such-flag", VALID],
        ["down", VALID, "--cluster", "x"],
        ["chat", "--json"],
        ["logs", "decode/0", "--topology", VALID, "--cluster", "x"],
    ],
)
def test_a_wrong_command_line_exits_2(words):
    assert run(words) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "a b"], "request_id: found 'a b'"),
        (["explain", "x" * 97], "1 to 96 letters"),
        (["logs", "decode"], "'decode' is not a worker; write POOL/INDEX"),
        (["role", "decode", "prefill"], "'decode' is not a worker; write POOL/INDEX"),
        (["role", "decode/0", "mixed"], "role: found mixed; write prefill or decode"),
        (["drain", "decode/x"], "'decode/x' is not a worker"),
        (["drain", "a b"], "drain: found 'a b'"),
        (["drain", "decode/0", "--grace", "nan"], "--grace: found nan"),
        (["scale", "decode", "2", "--grace", "-1"], "--grace: found -1"),
        (["scale", "decode", "2", "--why", "two\nlines"], "--why: found 9 characters"),
        (["events", "--since", "soon"], "--since: found soon"),
        (["dashboards", "verify", "--window", "soon"], "--window: found soon"),
    ],
)
def test_a_wrong_value_is_named_and_exits_2_before_a_cluster_is_looked_for(words, said, capsys):
    assert run(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["status", VALID],
        ["logs", "decode/0"],
        ["transfers", "r"],
        ["transfers", "r", "--topology", VALID],
        ["scale", "decode", "2"],
        ["drain", "decode/0", "--topology", VALID],
        ["apply", VALID, "--yes"],
        ["events"],
        ["changes"],
        ["chat", "x"],
    ],
)
def test_a_command_that_needs_a_cluster_exits_1_and_says_how_to_start_one(words, capsys):
    assert run(words) == 1
    assert "pdcluster up FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["logs", "decode/0"],
        ["transfers", "r"],
        ["scale", "decode", "2"],
        ["role", "decode/0", "prefill"],
        ["drain", "decode/0"],
        ["changes"],
        ["events"],
    ],
)
def test_commands_that_ask_the_control_api_import_neither_ray_nor_a_server(words, home):
    script = "import sys; from cluster.cli.main import run; run(sys.argv[1:]); print(*sys.modules)"
    env = {
        **os.environ,
        "PDCLUSTER_CONTROL_URL": "http://127.0.0.1:9",
        "PDCLUSTER_CONTROL_TOKEN": "t",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert "the control API at http://127.0.0.1:9 does not answer" in done.stderr
    assert not {"ray", "aiohttp", "uvicorn", "fastapi", "torch"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["scale", "decode"], "'N'"),
        (["scale", "decode", "many"], "'N'"),
        (["scale", "decode", "2", "--grcae", "1"], "--grcae"),
        (["nonsense"], "'nonsense'"),
        (["dashboards", "nonsense"], "'nonsense'"),
        (["events", "--cluster"], "--cluster"),
    ],
)
def test_words_that_make_no_sense_are_an_error_of_2_also_in_json(words, named, capsys):
    assert run(words) == 2
    assert capsys.readouterr().out == ""
    # First, or an option before it would take it for its value.
    at = 2 if words[0] == "dashboards" else 1
    assert run([*words[:at], "--json", *words[at:]]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["type"] == "InvalidInput"
    assert named in error["message"]
    assert error["message"] in " ".join(said.err.split())


def test_down_without_a_cluster_is_no_error(capsys):
    assert run(["down"]) == 0
    assert "nothing runs here" in capsys.readouterr().out
    assert run(["down", VALID, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "cluster": "local-simulated",
        "was_running": False,
    }


def test_a_missing_file_exits_2(capsys):
    assert run(["up", "/no/such.yaml"]) == 2
    assert "/no/such.yaml" in capsys.readouterr().err


def test_schema_and_version_print_json(capsys):
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == [
        "cluster_name",
        "provider",
        "metadata",
    ]
    assert run(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pdcluster"] == "0.1.0"


def test_render_prints_every_workers_command(capsys):
    assert run(["render", VALID, "--json"]) == 0
    workers = json.loads(capsys.readouterr().out)["workers"]
    assert [w["worker"] for w in workers] == ["prefill/0", "decode/0"]
    assert run(["render", VALID]) == 0
    assert "# decode/0 (decode) on 127.0.0.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClusterError("it broke"), 1),
        (RuntimeError("oops"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_follow_the_class_of_the_error(monkeypatch, capsys, error, code):
    def broken(_path):
        raise error

    monkeypatch.setattr("cluster.launcher.validate.validate", broken)
    assert run(["validate", VALID]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert run(["validate", VALID, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_has_an_exit_code_of_its_own(monkeypatch):
    from cluster.launcher.up import Terminated

    def terminated(_path):
        raise Terminated

    monkeypatch.setattr("cluster.launcher.validate.validate", terminated)
    assert run(["validate", VALID]) == 143


EXPOSITION = """\
# HELP pdcluster_gateway_ttft_seconds x
pdcluster_gateway_ttft_seconds_bucket{le="0.01"} 2.0
pdcluster_gateway_ttft_seconds_bucket{le="0.05"} 8.0
pdcluster_gateway_ttft_seconds_bucket{le="+Inf"} 10.0
pdcluster_gateway_ttft_seconds_count 10.0
"""


def test_ttft_quantiles_are_interpolated_as_prometheus_does():
    assert ttft_s(EXPOSITION, 0.5) == pytest.approx(0.01 + 0.04 * 3 / 6)
    assert ttft_s(EXPOSITION, 0.1) == pytest.approx(0.005)
    # Beyond the last bound nothing more is known.
    assert ttft_s(EXPOSITION, 0.95) == 0.05


def test_without_streams_there_is_no_ttft():
    assert ttft_s("", 0.5) is None
    assert (
        ttft_s(EXPOSITION.replace("2.0", "0.0").replace("8.0", "0.0").replace("10.0", "0.0"), 0.5)
        is None
    )


def test_the_gateways_own_metrics_are_understood():
    from cluster.observe.gateway_metrics import GatewayMetrics, Now
    from cluster.traffic import PairTraffic, SpreadCounter

    counted = SpreadCounter()
    counted.add(0.03)
    metrics = GatewayMetrics()
    metrics.watch(lambda: Now(0, 0, {}, 1, [PairTraffic("p", "d", ttft_s=counted.spread())]))
    assert 0.01 < ttft_s(metrics.exposition().decode(), 0.5) <= 0.05


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_bytes_are_shown_in_binary_units(count, text):
    assert bytes_text(count) == text


def test_spans_are_shown_in_the_unit_that_fits():
    assert [span_text(s) for s in (1.23, 75, 3700)] == ["1.2 s", "1 min 15 s", "1 h 01 min"]


def at():
    return Running(
        cluster="c",
        phase="up",
        topology_file="/t.yaml",
        topology_digest="d",
        started_at_s=100.0,
        model="m",
        endpoint="http://127.0.0.1:8000",
        key_file=None,
        ingress="direct",
    )


def status():
    worker = WorkerId("decode", 0, 2)
    report = WorkerReport(
        id=worker,
        role=Role.DECODE,
        state=WorkerState.LOADING,
        message="reading weights",
        node_ip="127.0.0.1",
        url="http://127.0.0.1:20001",
        started_at_s=150.0,
        counters=Counters(
            spec_drafts=10,
            spec_accepted=15,
            spec_accepted_per_position=(9, 6),
            tokens_pulled=37,
            bytes_pulled=4096,
        ),
    )
    moved = WorkerMoved(worker, WorkerState.STARTING, WorkerState.LOADING, "")
    link = Link("prefill", "decode", "nixl", 30.0, "recompute")
    return ClusterStatus(
        cluster="c",
        model="m",
        version=7,
        controller_started_at_s=120.0,
        pools=(PoolStatus("decode", Role.DECODE, "vllm", desired=1, present=1, ready=0),),
        workers=(report,),
        failed=(FailedSlot("decode/0", 2, 3.0, "exit code 1"),),
        links=(LinkStatus(link, False, ("prefill/0 cannot feed decode/0: [KV] block size",)),),
        events=(Recorded(1, 150.0, moved).told(),),
    )


def test_status_is_json_with_the_keys_that_scripts_read():
    view = status_view.of(of_running(at()), status(), EXPOSITION, 200.0)
    parsed = json.loads(json.dumps(view))
    worker = parsed["workers"][0]
    assert (worker["name"], worker["generation"], worker["state"]) == ("decode/0", 2, "loading")
    for part in (worker, parsed["pools"][0]):
        assert part["acceptance_length"] == 2.5
        assert part["acceptance_per_position"] == [0.9, 0.6]
    assert worker["url"] == "http://127.0.0.1:20001"
    assert parsed["links"][0]["is_open"] is False
    assert parsed["up_for_s"] == 100.0
    assert parsed["ttft_s"]["p50"] == pytest.approx(0.03)


def test_status_draws_what_is_not_well_and_why(capsys):
    status_view.draw(status_view.of(of_running(at()), status(), EXPOSITION, 200.0))
    said = capsys.readouterr().out
    for part in (
        "0/1",
        "decode/0: reading weights",
        "decode/0 failed 2 times in a row: exit code 1; restarts in 3 s",
        "prefill/0 cannot feed decode/0: [KV] block size",
        "TTFT p50 30 ms",
        "4.0 KiB",
        "2.50 (90% 60%)",
    ):
        assert part in said
