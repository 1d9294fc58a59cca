"""`up`, `down` and what is between them, as an operator types it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from processes import cmdline

from cluster.launcher.running import lock
from cluster.settings import ClusterPaths

pytestmark = pytest.mark.integration


def key_of(cluster):
    return (cluster.home.state(cluster.name) / "api-key").read_text().strip()


def wait_until(is_so, within_s=120.0):
    deadline_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_up_prints_the_endpoint_and_a_line_to_paste_that_works(cluster):
    said = cluster.up.stdout
    curl = next(line for line in said.splitlines() if line.startswith("curl "))
    assert "$(cat " in curl
    answer = subprocess.run(
        ["bash", "-c", f"{curl} --silent --max-time 20"], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
    for stage in ("validate", "model", "Ray", "controller", "workers", "gateway", "ready"):
        assert stage in cluster.up.stderr


def test_no_secret_is_printed_logged_or_in_any_command_line(cluster):
    state = cluster.home.state(cluster.name)
    names = ("api-key", "engine-key", "ray-token", "control-token")
    secrets = [(state / name).read_text().strip() for name in names]
    places = [cluster.up.said, json.dumps(cluster.status())]
    places += [cmdline(p) for p in cluster.home.processes(cluster.name)]
    places += [p.read_text(errors="replace") for p in (state / "logs").iterdir()]
    for secret in secrets:
        assert len(secret) > 20
        assert not any(secret in place for place in places)
    for name in names:
        assert (state / name).stat().st_mode & 0o077 == 0


def test_status_shows_pools_workers_links_and_events(cluster):
    status = cluster.status()
    assert {p["name"]: (p["ready"], p["desired"]) for p in status["pools"]} == {
        "prefill": (1, 1),
        "decode": (1, 1),
    }
    assert [(k["prefill_pool"], k["decode_pool"], k["is_open"]) for k in status["links"]] == [
        ("prefill", "decode", True)
    ]
    assert any(e["kind"] == "WorkerStarted" for e in status["events"])
    drawn = cluster.home.run("status").stdout
    assert "prefill/0#" in drawn
    assert "ready" in drawn


def test_chat_goes_through_both_workers_and_its_transfer_can_be_seen(cluster):
    text = " ".join(f"word{n}" for n in range(60))
    answer = cluster.ask(text)
    assert answer["text"]
    assert (answer["prefill"], answer["decode"]) == ("prefill/0", "decode/0")

    def records():
        return cluster.home.json("transfers", answer["request_id"], "--cluster", cluster.name)

    wait_until(lambda: any(r["side"] == "decode" for r in records()))
    (pulled,) = [r for r in records() if r["side"] == "decode"]
    assert pulled["tokens_pulled"] > 0
    assert pulled["bytes_pulled"] > 0
    streamed = cluster.home.run("chat", text, "--max-tokens", "8", "--system", "be short")
    assert streamed.stdout.strip()


def test_a_conversation_goes_on_after_ctrl_c_ended_an_answer(cluster):
    # 20,000 tokens of 2 ms: far longer than this test.
    talk = cluster.home.start("chat", "--max-tokens", "20000", "--cluster", cluster.name)
    assert talk.stdin is not None
    assert talk.stdout is not None
    talk.stdin.write("tell me all\n")
    talk.stdin.flush()
    assert talk.stdout.read(20).startswith("> ")
    talk.send_signal(signal.SIGINT)
    talk.stdin.write("\n")  # nothing said: it asks again
    talk.stdin.close()
    assert talk.wait(60) == 0
    assert "> > " in talk.stdout.read()
    # The engines stopped, too.
    cluster.wait_for(lambda s: all(w["load"]["running"] == 0 for w in s["workers"]))


def test_logs_show_the_engines_own_words(cluster):
    assert "simulated engine" in cluster.home.run("logs", "decode/0").stdout
    following = cluster.home.start("logs", "decode/0", "-f", "-n", "1")
    assert following.stdout is not None
    assert "simulated engine" in following.stdout.readline()
    following.send_signal(signal.SIGINT)
    assert following.wait(60) == 130
    wrong = cluster.home.run("logs", "decode", exit_code=2)
    assert "write POOL/INDEX" in wrong.stderr


def test_up_again_changes_nothing(cluster):
    before = cluster.status()
    again = cluster.home.run("up", str(cluster.topology))
    assert "is up already, nothing changed" in again.stdout
    after = cluster.status()
    assert [w["engine_pid"] for w in after["workers"]] == [
        w["engine_pid"] for w in before["workers"]
    ]


@pytest.fixture
def edited(cluster, tmp_path):
    def write(edit):
        parsed = yaml.safe_load(cluster.topology.read_text())
        edit(parsed["metadata"]["serving"])
        changed = tmp_path / "changed.yaml"
        changed.write_text(yaml.safe_dump(parsed))
        return str(changed)

    return write


def test_up_of_a_changed_file_names_the_keys_and_says_what_to_do(cluster, edited):
    def edit(serving):
        serving["pools"][1]["replicas"] = 2
        serving["pools"][1]["simulated"]["decode_step_s"] = 0.1
        serving["gateway"]["port"] += 1

    for options in ([], ["--no-wait"]):
        refused = cluster.home.run("up", edited(edit), *options, exit_code=1)
        assert "pools[decode].simulated.decode_step_s, gateway.port;" in refused.stderr
        assert f"pdcluster down --cluster {cluster.name}" in refused.stderr
    assert [w["name"] for w in cluster.status()["workers"]] == ["decode/0", "prefill/0"]


def test_up_with_other_replicas_gives_a_running_cluster_just_those(cluster, edited):
    def two_decode_workers(serving):
        serving["pools"][1]["replicas"] = 2

    def engines():
        return {w["name"]: w["engine_pid"] for w in cluster.status()["workers"]}

    before, gateways = engines(), cluster.home.actor(cluster.name, "GatewayReplica")
    more = cluster.home.json("up", edited(two_decode_workers), "--no-wait")
    assert (more["was_up"], more["changed"]) == (True, ["decode"])
    cluster.wait_for(
        lambda s: {p["name"]: p["ready"] for p in s["pools"]} == {"prefill": 1, "decode": 2}
    )
    assert before.items() < engines().items()
    less = cluster.home.run("up", str(cluster.topology))
    assert "changed: replicas of decode" in less.stdout
    cluster.wait_for(lambda s: len(s["workers"]) == 2)
    assert engines() == before
    assert cluster.home.actor(cluster.name, "GatewayReplica") == gateways


def test_commands_on_another_machine_need_an_address_and_the_token(cluster, tmp_path):
    state = cluster.home.state(cluster.name)
    serving = yaml.safe_load(cluster.topology.read_text())["metadata"]["serving"]
    addresses = {
        "PDCLUSTER_CONTROL_URL": f"http://127.0.0.1:{serving['control']['port']}",
        "PDCLUSTER_ENDPOINT_URL": f"http://127.0.0.1:{serving['gateway']['port']}",
    }
    secrets = {
        "PDCLUSTER_CONTROL_TOKEN": (state / "control-token").read_text().strip(),
        "PDCLUSTER_API_KEY": key_of(cluster),
    }
    far = replace(cluster.home, folder=tmp_path, extra_env=addresses | secrets)
    status = far.json("status")
    assert [w["name"] for w in status["workers"]] == ["decode/0", "prefill/0"]
    assert status["endpoint"] == addresses["PDCLUSTER_ENDPOINT_URL"]
    answer = far.json("chat", " ".join(f"far{n}" for n in range(60)), "--max-tokens", "4")
    assert answer["decode"] == "decode/0"
    wait_until(lambda: far.json("transfers", answer["request_id"]))
    assert "simulated engine" in far.run("logs", "decode/0").stdout
    following = far.start("logs", "decode/0", "-f", "-n", "1")
    assert "simulated engine" in following.stdout.readline()
    following.send_signal(signal.SIGINT)
    assert following.wait(60) == 130

    wrong = replace(far, extra_env=addresses | {"PDCLUSTER_CONTROL_TOKEN": "wrong"})
    refused = wrong.run("status", exit_code=1)
    assert "refuses the token; it came from PDCLUSTER_CONTROL_TOKEN" in refused.stderr
    missing = replace(far, extra_env=addresses).run("status", exit_code=2)
    assert "set PDCLUSTER_CONTROL_TOKEN" in missing.stderr


def test_a_second_up_at_the_same_time_names_the_first(cluster, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", cluster.home.env["XDG_STATE_HOME"])
    with lock(ClusterPaths(cluster.name)):
        for command in ("up", "down"):
            refused = cluster.home.run(command, str(cluster.topology), exit_code=1)
            assert f"pid {os.getpid()}" in refused.stderr


def sockets_of(processes):
    """The kernel's numbers of these processes' sockets; none is given out twice."""
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    return sockets


def listening(sockets):
    """(4 or 6, ADDRESS:PORT) of those of these sockets that listen, whoever has them by now."""
    found = set()
    for table, family in (("tcp", 4), ("tcp6", 6), ("udp", 4), ("udp6", 6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            is_open = fields[3] == ("0A" if table.startswith("tcp") else "07")
            if is_open and fields[9] in sockets:
                found.add((family, fields[1]))
    return found


def test_nothing_listens_beyond_loopback(cluster):
    sockets = sockets_of(cluster.home.processes(cluster.name))
    found = {(family, place.split(":")[0]) for family, place in listening(sockets)}
    assert found
    loopback = {(4, "0100007F"), (6, "0000000000000000FFFF00000100007F"), (6, "0" * 31 + "1")}
    loopback.add((6, "00000000000000000000000001000000"))
    assert found <= loopback


def test_the_key_is_asked_for(cluster):
    curl = next(line for line in cluster.up.stdout.splitlines() if line.startswith("curl "))
    url = curl.split()[1]
    code = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url, "-d", "{}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert code == "401"


@pytest.mark.parametrize("section", ["gateway", "control"])
def test_a_port_in_use_is_named_before_anything_starts(home, section):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def edit(serving):
            serving[section]["port"] = port

        topology = home.topology("it-port", edit)
        refused = home.run("up", str(topology), exit_code=2)
    assert f"127.0.0.1:{port}" in refused.stderr
    assert f"pid {os.getpid()}" in refused.stderr
    assert f"metadata.serving.{section}.port" in refused.stderr
    assert "Ray" not in refused.stderr
    assert home.processes("it-port") == []


def test_endpoint_and_control_api_cannot_have_one_port(home):
    def edit(serving):
        serving["control"]["port"] = serving["gateway"]["port"]

    refused = home.run("up", str(home.topology("it-same", edit)), exit_code=2)
    assert "metadata.serving.control.port" in refused.stderr
    assert "gateway.port" in refused.stderr


def test_a_missing_model_folder_is_named_before_anything_starts(home):
    def edit(serving):
        serving["model"]["id"] = "/no/such/model"

    refused = home.run("up", str(home.topology("it-model", edit)), exit_code=2)
    assert "/no/such/model" in refused.stderr
    assert "Ray" not in refused.stderr
    assert home.processes("it-model") == []


def test_down_leaves_nothing_and_a_second_down_says_so(cluster):
    sockets = sockets_of(cluster.home.processes(cluster.name))
    assert len(listening(sockets)) >= 8
    done = cluster.home.run("down", str(cluster.topology))
    assert f"cluster {cluster.name} is down" in done.stdout
    assert cluster.home.leftovers(cluster.name) == []
    # By socket and not by port: what has become free may be another's a moment later.
    assert listening(sockets) == set()
    again = cluster.home.run("down", str(cluster.topology))
    assert "nothing runs here" in again.stdout
    assert cluster.home.json("down", "--cluster", cluster.name) == {
        "cluster": cluster.name,
        "was_running": False,
    }
    missing = cluster.home.run("status", "--cluster", cluster.name, exit_code=1)
    assert "pdcluster up FILE" in missing.stderr
