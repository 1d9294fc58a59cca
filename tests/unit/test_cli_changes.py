"""`scale`, `role`, `drain`, `apply`, `changes`, `events`, against the control API of a controller
that notes what is asked of it; and what all commands say of wrong input."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from changing_cluster import DONE, ROOT, SERVING, TOPOLOGY, ChangingCluster
from ports import free_port
from served_api import InPlaceOf, Served

from cluster.cli.main import run
from cluster.control.changes import (
    Apply,
    ChangeRole,
    ChangeState,
    DrainNode,
    DrainWorker,
    Measure,
    Plan,
    PlanStep,
    ReturnNode,
    Scale,
    Step,
)
from cluster.control.events import ChangeAsked, Recorded
from cluster.identity import Role

TOKEN = "pdctl-a-token"
STARTED = Step(101.25, "decode/2#1 started [cause]")
PLAN = Plan((PlanStep("replace 1 worker of decode", ("pools[decode].engine_args",)),))
REFUSED = Plan(refused=(PlanStep("`pdcluster down`, then `up`", ("gateway.port",)),))


@pytest.fixture(scope="module")
def in_place():
    return InPlaceOf()


@pytest.fixture(scope="module")
def url(in_place):
    port = free_port()
    served = Served(in_place, port, TOKEN)
    served.wait_until(lambda: not served.server.problem)
    yield f"http://127.0.0.1:{port}"
    served.end()


@pytest.fixture
def cluster(in_place, url, tmp_path, monkeypatch):
    for name in ("STATE_HOME", "RUNTIME_DIR", "CACHE_HOME"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path / name))
    monkeypatch.setenv("PDCLUSTER_CONTROL_URL", url)
    monkeypatch.setenv("PDCLUSTER_CONTROL_TOKEN", TOKEN)
    monkeypatch.setattr("cluster.cli.follow._POLL_S", 0.01)
    in_place.controller = ChangingCluster()
    return in_place.controller


def asks(cluster):
    return [ask for ask, _, _ in cluster.asked]


@pytest.mark.parametrize(
    ("words", "ask"),
    [
        ("scale decode 3", Scale("decode", 3)),
        ("scale decode 0 --grace 0", Scale("decode", 0, 0.0)),
        ("role decode/0 prefill", ChangeRole("decode/0", Role.PREFILL)),
        (
            "role decode/0#2 prefill --restart --grace 2.5",
            ChangeRole("decode/0", Role.PREFILL, 2.5, may_restart=True),
        ),
        ("drain decode/1", DrainWorker("decode/1")),
        ("drain 10.0.0.7 --grace 9", DrainNode("10.0.0.7", 9.0)),
        ("drain fd00::7", DrainNode("fd00::7")),
        ("drain fd00::7 --force", DrainNode("fd00::7", may_end_service=True)),
        ("drain 10.0.0.7 --return", ReturnNode("10.0.0.7")),
        (f"apply {TOPOLOGY} --yes", Apply(SERVING)),
        (f"apply {TOPOLOGY} -y --no-surge --grace 1", Apply(SERVING, 1.0, surge=False)),
    ],
)
def test_a_command_asks_for_what_it_says_in_its_callers_name(cluster, words, ask, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    cluster.answers = PLAN
    cluster.course = [DONE]
    assert run([*words.split(), "--why", "it rains"]) == 0
    ((asked, asked_by, why),) = cluster.asked
    assert (asked, why) == (ask, "it rains")
    assert re.fullmatch(r"ada@\S+", asked_by)


def test_a_command_waits_and_shows_steps_what_is_waited_for_and_the_effect(cluster, capsys):
    cluster.course = [
        {"waits_for": "decode/2 loads, 8 s"},
        {"waits_for": "decode/2 loads, 7 s"},
        {"waits_for": "decode/2 warms", "steps": (STARTED,)},
        {
            **DONE,
            "measures": (
                Measure("ready to decode", "", 1.0, 3.0),
                Measure("TTFT p95", "s", None, 0.1234),
            ),
        },
    ]
    assert run(["scale", "decode", "3"]) == 0
    said = capsys.readouterr()
    lines = [line.strip() for line in said.err.splitlines()]
    assert lines == [
        "waits for: decode/2 loads, 8 s",
        "1.2 s  decode/2#1 started [cause]",
        "waits for: decode/2 warms",
    ]
    assert re.search(r"ready to decode +1 +3", said.out)
    assert re.search(r"TTFT p95 +- +0.123 s", said.out)
    assert "done: scale it after 2.5 s" in said.out


@pytest.mark.parametrize("state", [ChangeState.FAILED, ChangeState.REPLACED])
@pytest.mark.parametrize("words", ["scale decode 3", f"apply {TOPOLOGY} --yes"])
def test_a_change_that_did_not_come_about_is_exit_1_with_why(cluster, capsys, words, state):
    cluster.answers = PLAN
    ended = {"state": state, "ended_at_s": 130.0, "why": "no room for decode/2 [CPU]"}
    cluster.course = [ended]
    assert run(words.split()) == 1
    assert f"{state.value}: " in (said := capsys.readouterr().out)
    assert "after 30.0 s; no room for decode/2 [CPU]" in said
    cluster.course = [ended]
    assert run([*words.split(), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    told = told.get("change", told)
    assert (told["state"], told["why"]) == (state.value, "no room for decode/2 [CPU]")


def test_json_is_the_change_as_it_ended_and_nothing_else(cluster, capsys):
    cluster.course = [{"steps": (STARTED,), "waits_for": "x"}, DONE]
    assert run(["scale", "decode", "3", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    told = json.loads(said.out)
    assert (told["id"], told["kind"], told["state"], told["took_s"]) == (1, "scale", "done", 2.5)
    assert told["steps"] == [{"at_s": 101.25, "text": STARTED.text}]


def test_without_waiting_the_change_is_shown_as_it_began(cluster, capsys):
    cluster.course = [DONE]
    assert run(["drain", "decode/0", "--no-wait"]) == 0
    said = capsys.readouterr().out
    assert "running: drain-worker it" in said
    assert "`pdcluster changes 1` shows how far it is" in said
    assert cluster.course == [DONE]
    assert run(["drain", "decode/0", "--no-wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scale decode -1", "-1"),
        ("scale decode many", "valid integer"),
        ("scale decode 3 --grace -1", "--grace: found -1"),
        ("scale decode 3 --grace nan", "--grace: found nan"),
        ("scale decode 3 --grace inf", "--grace: found inf"),
        ("scale decod 3", "no pool decod; did you mean `decode`?"),
        ("role decode prefill", "write POOL/INDEX"),
        ("role decode/7 prefill", "no worker decode/7"),
        ("role decode/0#1 prefill", "decode/0#1 is gone; it is decode/0#2 now"),
        ("role decode/0 mixed", "role: found mixed; write prefill or decode"),
        ("drain decode/0 --return", "--return is for nodes"),
        ("drain decode/0 --force", "--force is for nodes"),
        ("drain prefill/0#1", "prefill/0#1 is gone; there is none now"),
        ("drain x --why a\nb", "--why: found 3 characters, or several lines; write one line of"),
        (f"drain x --why {'y' * 501}", "--why: found 501 characters"),
        ("drain a,b", "drain: found 'a,b'; write POOL/INDEX"),
        ("drain ", "drain: found ''; write POOL/INDEX"),
        ("changes 9", "no change 9 is known, or not any more; `pdcluster changes` lists"),
        ("logs decode/0#1", "decode/0#1 is gone; it is decode/0#2 now"),
        ("changes -1", "-1"),
        ("events --since 10", "--since: found 10; write a span"),
        ("events --since -5m", "--since"),
        (f"apply {TOPOLOGY}", "give --yes, or --dry-run"),
        (f"apply {TOPOLOGY} --json", "give --yes, or --dry-run"),
        ("apply /no/such.yaml --yes", "/no/such.yaml"),
    ],
)
def test_wrong_input_is_exit_2_and_nothing_is_asked(cluster, capsys, words, said):
    assert run(words.split(" ")) == 2
    assert said in capsys.readouterr().err
    assert cluster.asked == []


def test_what_the_controller_refuses_is_exit_2_in_its_words(cluster, capsys):
    cluster.refuses = "replicas of decode: found 99; write at most 64"
    assert run(["scale", "decode", "99"]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == f"error: {cluster.refuses}"
    assert said.out == ""
    assert run(["scale", "decode", "99", "--json"]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == f"error: {cluster.refuses}"
    error = {"message": cluster.refuses, "type": "InvalidInput"}
    assert json.loads(said.out) == {"error": error}


def test_a_change_that_a_restarted_controller_forgot_is_told(cluster, capsys, monkeypatch):
    async def forgotten(_id):
        raise KeyError

    monkeypatch.setattr(cluster, "change", forgotten, raising=False)
    assert run(["scale", "decode", "3"]) == 1
    assert "does not know change 1 (scale it) any more" in capsys.readouterr().err


# apply


def test_a_dry_run_shows_the_plan_and_asks_for_nothing(cluster, capsys):
    assert run(["apply", str(TOPOLOGY), "--dry-run"]) == 0
    assert "serves that already; nothing to change" in capsys.readouterr().out
    cluster.answers = PLAN
    assert run(["apply", str(TOPOLOGY), "--dry-run"]) == 3
    assert "~ replace 1 worker of decode  (pools[decode].engine_args)" in capsys.readouterr().out
    assert run(["apply", str(TOPOLOGY), "--dry-run", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["steps"][0]["what"] == "replace 1 worker of decode"
    assert told["change"] is None
    assert cluster.planned == [SERVING] * 3
    assert cluster.asked == []


@pytest.mark.parametrize("option", ["--dry-run", "--yes"])
def test_a_plan_that_cannot_be_carried_out_is_exit_2_with_what_to_do(cluster, capsys, option):
    cluster.answers = REFUSED
    assert run(["apply", str(TOPOLOGY), option]) == 2
    said = capsys.readouterr()
    assert "x `pdcluster down`, then `up`  (gateway.port)" in said.out
    assert "gateway.port: `pdcluster down`, then `up`" in said.err
    assert run(["apply", str(TOPOLOGY), option, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["message"] == said.err.strip().removeprefix("error: ")
    assert told["plan"]["refused"][0]["keys"] == ["gateway.port"]
    assert told["change"] is None
    assert cluster.asked == []


def test_when_nothing_differs_nothing_is_asked(cluster, capsys):
    assert run(["apply", str(TOPOLOGY), "--yes"]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert run(["apply", str(TOPOLOGY), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "plan": {"steps": [], "refused": []},
        "change": None,
    }
    assert cluster.asked == []


def edited(tmp_path, edit):
    parsed = yaml.safe_load(TOPOLOGY.read_text())
    edit(parsed)
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(parsed))
    return str(path)


def test_a_file_of_another_cluster_is_not_applied(cluster, capsys, tmp_path):
    path = edited(tmp_path, lambda parsed: parsed.update(cluster_name="other"))
    for options in ([], ["--cluster", "local-simulated"]):
        assert run(["apply", path, "--yes", *options]) == 2
        said = capsys.readouterr().err
        assert "cluster_name: found other; the cluster that answers is local-simulated" in said
    assert cluster.planned == []


def test_a_faulty_file_is_not_even_planned(cluster, capsys, tmp_path):
    def two_faults(parsed):
        parsed["metadata"]["serving"]["pools"][0]["replicas"] = -1
        # What pools ask for and what nodes have must agree, too.
        parsed["metadata"]["serving"]["pools"][1]["placement"]["resources"] = {"NPU": 16}

    assert run(["apply", edited(tmp_path, two_faults), "--yes"]) == 2
    said = capsys.readouterr().err
    assert "metadata.serving.pools[0].replicas" in said
    assert cluster.planned == []


def test_faults_of_rays_half_alone_are_warnings(cluster, capsys, tmp_path):
    path = edited(tmp_path, lambda parsed: parsed.update(made_by_ray=True))
    assert run(["apply", path, "--dry-run"]) == 0
    assert "warning:" in (said := capsys.readouterr().err)
    assert "made_by_ray" in said
    assert cluster.planned == [SERVING]


def at_a_terminal(words, answer, env):
    """Exit code and all that was said by a command whose terminal says `answer`."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(sys.executable, [sys.executable, "-m", "cluster.cli", *words], env)
    said = b""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            said += os.read(fd, 4096)
        except OSError:  # it has ended
            break
        if b"[y/N]" in said and answer:
            os.write(fd, answer)
            answer = b""
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


@pytest.mark.parametrize(("answer", "code", "asked"), [(b"y\n", 0, 1), (b"\n", 1, 0)])
def test_at_a_terminal_apply_asks_first(cluster, answer, code, asked):
    cluster.answers = PLAN
    cluster.course = [{"waits_for": "decode/0 to drain"}, DONE]
    words = ["apply", str(TOPOLOGY)]
    found, said = at_a_terminal(words, answer, dict(os.environ))
    assert found == code, said
    assert said.index("replace 1 worker of decode") < said.index("carry it out? [y/N]")
    assert ("nothing was changed" in said) == (not asked)
    assert len(cluster.asked) == asked


def test_ctrl_c_ends_the_waiting_and_not_the_change(cluster):
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "scale", "decode", "3"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    cluster.course = [{"waits_for": "decode/1 loads"}] * 1000
    assert process.stderr is not None
    assert "decode/1 loads" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "change 1 goes on; `pdcluster changes 1` shows how far it is" in said
    assert cluster.known[1].state is ChangeState.RUNNING


# changes, events


def test_changes_are_listed_and_shown_one_by_one(cluster, capsys):
    assert run(["changes"]) == 0
    assert "nothing has been changed" in capsys.readouterr().out
    for pool in ("prefill", "decode"):
        run(["scale", pool, "2", "--no-wait"])
    cluster.course = [{**DONE, "steps": (STARTED,)}]
    capsys.readouterr()
    assert run(["changes", "2"]) == 0
    said = capsys.readouterr().out
    assert "change 2: scale it; asked for by " in said
    assert "1.2 s  decode/2#1 started [cause]" in said
    assert "done: scale it after 2.5 s" in said
    assert run(["changes"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert re.match(r"1 .* running +- +scale it", rows[0])
    assert re.match(r"2 .* done +2.5 s +scale it", rows[1])
    assert run(["changes", "--json"]) == 0
    assert [c["id"] for c in json.loads(capsys.readouterr().out)] == [1, 2]
    assert run(["changes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["took_s"] == 2.5


def happened(seq, ago_s, what):
    return Recorded(seq, time.time() - ago_s, ChangeAsked(what, seq, "a@b", "")).told()


def test_events_are_a_line_each(cluster, capsys):
    cluster.happened = [happened(1, 7200, "scale [x]"), happened(2, 5, "drain y")]
    assert run(["events"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  scale \[x\] asked change=1", lines[0])
    assert run(["events", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(t["seq"], t["kind"], t["subject"]) for t in told] == [
        (1, "ChangeAsked", "scale [x]"),
        (2, "ChangeAsked", "drain y"),
    ]


@pytest.mark.parametrize(("since", "seen"), [("10s", 1), ("1h", 1), ("1.5h", 1), ("1d", 2)])
def test_events_since_a_span(cluster, capsys, since, seen):
    cluster.happened = [happened(1, 7200, "scale x"), happened(2, 5, "drain y")]
    assert run(["events", "--since", since]) == 0
    assert len(capsys.readouterr().out.splitlines()) == seen


def test_events_are_followed(cluster):
    cluster.happened = [happened(1, 5, "one")]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "events", "-f", "--json"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["seq"] == 1
    cluster.happened.append(happened(2, 0, "two"))
    assert json.loads(process.stdout.readline())["seq"] == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
