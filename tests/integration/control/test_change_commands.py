"""`scale`, `role`, `drain`, `apply`, `events`, `changes` on a running cluster, as an operator types
them, while requests run."""

from __future__ import annotations

import getpass
import json
import signal
from dataclasses import replace
from typing import Any

import pytest
import yaml
from streaming_clients import Clients

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

# Decode steps of 20 ms, each of three tokens on average: 10 s, most of which the engines wait.
STEP_S, LONG = 0.02, 1_500


class Operator:
    """The commands, about one cluster, and clients of it."""

    def __init__(self, cluster):
        self.cluster, self.home = cluster, cluster.home

    def run(self, *words, exit_code=0):
        return self.home.run(*words, "--cluster", self.cluster.name, exit_code=exit_code)

    def json(self, *words) -> Any:
        return self.home.json(*words, "--cluster", self.cluster.name)

    def clients(self, count=8, max_tokens=LONG):
        key = (self.home.state(self.cluster.name) / "api-key").read_text().strip()
        status = self.cluster.status()
        prompts = [f"{n} " + " ".join(f"word{n}x{k}" for k in range(60)) for n in range(count)]
        return Clients(status["endpoint"], key, status["model"], prompts, max_tokens)

    def ready(self):
        """Engines of ready workers by their names."""
        return {
            w["name"]: w["engine_pid"]
            for w in self.cluster.status()["workers"]
            if w["state"] == "ready"
        }

    def back_to_one_each(self):
        self.run("apply", str(self.cluster.topology), "--yes", "--grace", "0")
        self.cluster.wait_for(
            lambda s: (
                [(w["name"], w["state"]) for w in s["workers"]]
                == [("decode/0", "ready"), ("prefill/0", "ready")]
            )
        )


@pytest.fixture(scope="module")
def changing(home):
    """A cluster of this module's own: others count on the generations of the shared one."""

    def edit(serving):
        for pool in serving["pools"]:
            pool["placement"] = {"resources": {"CPU": 0.5}}
        serving["pools"][1]["simulated"]["decode_step_s"] = STEP_S

    changing = home.bring_up("it-changes", edit)
    yield changing
    home.run("down", str(changing.topology))
    assert home.leftovers(changing.name) == []


@pytest.fixture
def operator(changing):
    operator = Operator(changing)
    yield operator
    operator.back_to_one_each()


@pytest.fixture(scope="module")
def undisturbed():
    """Answers by their prompt, as they are when nothing happens."""
    return {}


def assert_whole(clients, undisturbed, operator):
    """Every answer came, as long as asked for, and as if nothing had happened."""
    assert clients.faults() == []
    if not undisturbed:
        with operator.clients() as alone:
            pass
        assert alone.faults() == []
        undisturbed.update({stream.prompt: stream.text for stream in alone.streams})
    for stream in clients.streams:
        assert stream.text == undisturbed[stream.prompt]


def test_up_and_down_while_requests_run(operator, undisturbed):
    before = operator.ready()
    with operator.clients() as clients:
        up = operator.run("scale", "decode", "2", "--why", "a busy hour")
        more = operator.ready()
        assert more.items() > before.items()
        assert set(more) == {*before, "decode/1"}
        assert "decode/1" in up.stderr  # its steps
        assert "done: scale decode from 1 to 2 after" in up.stdout
        effect = next(line for line in up.stdout.splitlines() if "ready to decode" in line)
        assert effect.split()[-2:] == ["1", "2"]
        assert clients.still_running == 8
    with operator.clients() as during:
        down = operator.json("scale", "decode", "1", "--grace", "0.5")
        assert (down["state"], down["what"]) == ("done", "scale decode from 2 to 1")
        assert operator.ready() == before
    assert_whole(clients, undisturbed, operator)
    assert_whole(during, undisturbed, operator)
    # Nothing of the second worker is left.
    assert len(operator.home.actor(operator.cluster.name, "WorkerActor")) == 2
    told = operator.json("changes")[-2:]
    assert [(c["what"], c["state"]) for c in told] == [
        ("scale decode from 1 to 2", "done"),
        ("scale decode from 2 to 1", "done"),
    ]
    assert told[0]["asked_by"].startswith(f"{getpass.getuser()}@")
    events = [json.loads(line) for line in operator.run("events", "--json").stdout.splitlines()]
    (asked,) = [e for e in events if e["fields"].get("why") == "a busy hour"]
    assert (asked["kind"], asked["fields"]["change"]) == ("ChangeAsked", told[0]["id"])
    (ended,) = [
        e for e in events if e["kind"] == "ChangeEnded" and e["fields"]["change"] == told[0]["id"]
    ]
    assert ended["fields"]["took_s"] == pytest.approx(told[0]["took_s"], abs=0.01)


def test_a_role_there_and_back_without_a_new_start(operator, undisturbed):
    operator.run("scale", "decode", "2")
    engines = operator.ready()
    with operator.clients() as clients:
        there = operator.json("role", "decode/1", "prefill", "--grace", "1")
        assert (there["state"], there["what"]) == ("done", "have decode/1 serve as prefill")
        assert operator.cluster.worker("decode/1")["role"] == "prefill"
        # Both kinds of work are done by what is there now.
        assert operator.cluster.ask(" ".join(f"new{n}" for n in range(60)))["decode"] == "decode/0"
    back = operator.run("role", "decode/1", "decode")
    assert operator.cluster.worker("decode/1")["role"] == "decode"
    assert "done: have decode/1 serve as decode after" in back.stdout
    assert operator.ready() == engines
    assert_whole(clients, undisturbed, operator)
    events = [json.loads(line) for line in operator.run("events", "--json").stdout.splitlines()]
    changed = [e["fields"] for e in events if e["kind"] == "RoleChanged"][-2:]
    assert [(c["was"], c["now"]) for c in changed] == [("decode", "prefill"), ("prefill", "decode")]
    for fields in changed:
        # The promise: a second beyond the drain.
        assert fields["took_s"] - fields["drained_s"] < 1.0


def test_a_role_that_would_leave_nobody_to_answer_is_refused_beforehand(operator):
    before = operator.ready()
    refused = operator.run("role", "decode/0", "prefill", exit_code=2)
    assert "nobody would answer" in refused.stderr
    assert operator.ready() == before


def test_a_drained_worker_is_replaced_and_no_answer_is_lost(operator, undisturbed):
    operator.run("scale", "decode", "2")
    before = operator.ready()
    generation = operator.cluster.worker("decode/0")["generation"]
    with operator.clients() as clients:
        drained = operator.json("drain", f"decode/0#{generation}", "--grace", "0.5")
        assert drained["state"] == "done"
        after = operator.ready()
        assert clients.still_running
    assert set(after) == set(before)
    assert after["decode/0"] != before["decode/0"]
    assert after["decode/1"] == before["decode/1"]
    assert operator.cluster.worker("decode/0")["generation"] > generation
    assert_whole(clients, undisturbed, operator)
    again = operator.run("drain", f"decode/0#{generation}", exit_code=2)
    assert f"decode/0#{generation} is gone; it is decode/0#" in again.stderr


@pytest.fixture
def edited(changing, tmp_path):
    def write(edit):
        parsed = yaml.safe_load(changing.topology.read_text())
        edit(parsed["metadata"]["serving"])
        changed = tmp_path / "changed.yaml"
        changed.write_text(yaml.safe_dump(parsed))
        return str(changed)

    return write


def test_a_changed_file_is_planned_and_then_rolled_out_while_requests_run(
    operator, edited, undisturbed
):
    def edit(serving):
        serving["pools"][1]["engine_args"] = {"fault-endpoint": True}

    before, path = operator.ready(), edited(edit)
    key = "pools[decode].engine_args"
    planned = operator.run("apply", path, "--dry-run", exit_code=3)
    assert "replace 1 worker of decode, one at a time" in planned.stdout
    assert key in planned.stdout
    assert operator.ready() == before
    with operator.clients() as clients:
        done = operator.json("apply", path, "--yes", "--grace", "0.5")
        assert [step["keys"] for step in done["plan"]["steps"]] == [[f"{key}.fault-endpoint"]]
        assert done["change"]["state"] == "done"
        after = operator.ready()
    assert len(after) == 2
    assert after["prefill/0"] == before["prefill/0"]
    assert set(after.values()) - set(before.values())
    assert_whole(clients, undisturbed, operator)
    assert "nothing to change" in operator.run("apply", path, "--dry-run").stdout


def test_a_rollout_whose_new_engines_do_not_start_goes_back_by_itself(
    operator, edited, undisturbed
):
    def edit(serving):
        serving["pools"][1]["interpreter"] = "/bin/false"

    before, path = operator.ready(), edited(edit)
    with operator.clients() as clients:
        failed = operator.run("apply", path, "--yes", exit_code=1)
    assert "failed: apply a topology: replace 1 worker of decode" in failed.stdout
    assert "the engine ended while starting: exit code 1" in failed.stdout
    assert "all is as it was before" in failed.stdout
    assert operator.ready() == before
    assert_whole(clients, undisturbed, operator)
    # What it went back to is what a restarted controller would follow, too.
    assert operator.run("apply", path, "--dry-run", exit_code=3)
    assert (
        "nothing to change"
        in operator.run("apply", str(operator.cluster.topology), "--dry-run").stdout
    )


def test_a_node_without_which_nobody_would_answer_is_drained_by_force_and_returned(operator):
    before = operator.ready()
    refused = operator.run("drain", "127.0.0.1", exit_code=2)
    assert "nobody would" in refused.stderr
    assert "--force" in refused.stderr
    assert operator.ready() == before
    drained = operator.json("drain", "127.0.0.1", "--force", "--grace", "0", "--why", "new disk")
    assert drained["state"] == "done"
    assert operator.ready() == {}
    assert operator.home.actor(operator.cluster.name, "WorkerActor") == []
    returned = operator.json("drain", "127.0.0.1", "--return")
    assert returned["state"] == "done"
    operator.cluster.wait_for(lambda status: len(operator.ready()) == len(before))
    after = operator.ready()
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_what_a_running_cluster_cannot_be_given_is_named_with_what_to_do(operator, edited):
    def edit(serving):
        serving["gateway"]["port"] += 1

    before = operator.ready()
    for options in (["--dry-run"], ["--yes"]):
        refused = operator.run("apply", edited(edit), *options, exit_code=2)
        assert "gateway.port" in refused.stderr
        assert "pdcluster down" in refused.stderr
    assert operator.ready() == before


def test_more_than_there_is_room_for_ends_with_what_is_missing_and_where(operator):
    failed = operator.run("scale", "decode", "9", exit_code=1)
    assert "failed: scale decode from 1 to 9" in failed.stdout
    assert "no room for" in failed.stdout
    assert "CPU" in failed.stdout
    assert "127.0.0.1" in failed.stdout
    less = operator.json("scale", "decode", "1")
    assert less["state"] == "done"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scale decod 2", "no pool decod; did you mean `decode`?"),
        ("scale decode 65", "at most 64 (replicas.max)"),
        ("scale decode 0", "no other pool decodes"),
        ("role decode/7 prefill", "no worker decode/7"),
        ("drain decode/7", "no worker decode/7"),
        ("drain 10.9.9.9", "found 10.9.9.9; no worker is on it"),
        ("drain 127.0.0.1 --return", "which is not drained"),
        ("changes 999", "no change 999"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(operator, words, said):
    before = operator.json("changes")
    assert said in operator.run(*words.split(), exit_code=2).stderr
    assert operator.json("changes") == before


def test_a_command_goes_on_waiting_over_a_restart_of_the_controller(operator):
    scaling = operator.home.start("scale", "decode", "2", "--cluster", operator.cluster.name)
    assert scaling.stderr is not None
    assert scaling.stderr.readline()  # it has begun
    (process,) = operator.home.actor(operator.cluster.name, "ControllerActor")
    process.send_signal(signal.SIGKILL)
    said, problems = scaling.communicate(timeout=60)
    assert scaling.returncode == 0, problems
    assert "done: scale decode from 1 to 2 after" in said
    assert len(operator.ready()) == 3


def test_from_another_machine_by_the_address_and_the_token(operator, tmp_path):
    name, home = operator.cluster.name, operator.home
    control = yaml.safe_load(operator.cluster.topology.read_text())["metadata"]["serving"][
        "control"
    ]
    token = (home.state(name) / "control-token").read_text().strip()
    far = replace(
        home,
        folder=tmp_path,
        extra_env={
            "PDCLUSTER_CONTROL_URL": f"http://127.0.0.1:{control['port']}",
            "PDCLUSTER_CONTROL_TOKEN": token,
        },
    )
    assert far.json("scale", "prefill", "2")["state"] == "done"
    assert far.json("apply", str(operator.cluster.topology), "--yes")["change"]["state"] == "done"
    following = far.start("events", "-f")
    assert following.stdout is not None
    assert far.json("drain", "decode/0")["state"] == "done"
    seen = ""
    while "drain decode/0 ended" not in seen:
        line = following.stdout.readline()
        assert line, f"events ended: {seen}"
        seen += line
    following.send_signal(signal.SIGINT)
    assert following.wait(10) == 130
