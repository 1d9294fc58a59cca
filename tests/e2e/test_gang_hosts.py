"""One real vLLM engine over several hosts, made of namespaces with addresses of their own: a whole
`ray up`, CPU engines, SmolLM2-135M.

    tensor   three ranks share each layer over three hosts (`--nnodes 3`): the model's 9 heads and
             3 KV heads divide by nothing smaller
    data     two copies on two of the three hosts (`--data-parallel-size-local 1`), one endpoint

Simulated engines stand in where parts of a replica are killed one by one: see
tests/integration/workers/test_workers_gang.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import metric
from e2e.hosts_rack import HEAD, OPERATOR, Hosts, Rack, address, hosts_up, rack, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]

NODES = (2, 3, 4)
SHAPES: dict[str, dict[str, Any]] = {
    "tensor": {"nodes_per_replica": 3, "parallel": {"tensor": 3}},
    "data": {"nodes_per_replica": 2, "parallel": {"data": 2}},
}
READY_WITHIN_S = 240
QUESTIONS = {"What is the capital of France?": "Paris", "Name a colour.": "colour"}
ANSWERS: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    shared = Path("/tmp/pdcluster-e2e-gang")
    shared.mkdir(mode=0o755, exist_ok=True)
    with hosts_up("pdgang", shared, 2 + len(NODES)) as made:
        yield made
    for file in shared.iterdir():
        file.unlink()
    shared.rmdir()


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def up(hosts: Hosts, shape: str) -> Iterator[Rack]:
    made = Rack(hosts, hosts.shared / f"{shape}.yaml")
    config = rack({"cpu": list(NODES)}, serving=True)
    serving = config["metadata"]["serving"]
    serving["pools"] = [
        {
            "name": "wide",
            "role": "mixed",
            "hardware": "cpu",
            "placement": {"resources": {"CPU": 1}, "labels": {"hardware": "cpu"}},
            "kv_cache_gib": 0.25,
            "max_num_seqs": 8,
            # Threads of three ranks that wait for each other spin on two cores: a token took 3 s.
            "env": {"OMP_NUM_THREADS": "1"},
            **SHAPES[shape],
        }
    ]
    serving["islands"] = [{"name": "cpu", "pools": ["wide"]}]
    serving["health"] = {"restart_backoff_s": 1, "hung_after_s": 20}
    made.write(config)
    made.ray_up()
    made.await_nodes(HEAD, *NODES)
    yield made
    made.ray_down()
    assert {host: left for host in (HEAD, *NODES) if (left := hosts.left(host))} == {}


def ready(rack: Rack, generation: int) -> dict[str, Any]:
    """The replica of that generation, once it is the only one and takes work."""

    def probe() -> dict[str, Any] | None:
        workers = rack.status()["workers"]
        if [w["generation"] for w in workers] != [generation] or workers[0]["state"] != "ready":
            return None
        return dict(workers[0])

    return wait_for(probe, READY_WITHIN_S, f"wide/0#{generation} ready")


def ranks(rack: Rack) -> dict[int, str]:
    """`head` or `headless`, of each host that runs a rank."""
    programs = {
        "-m vllm.entrypoints.openai.api_server": "head",
        "-m cluster.engines.vllm_headless": "headless",
    }
    found: dict[int, str] = {}
    for host in NODES:
        commands = rack.hosts.run(host, "ps", "-ewwo", "args=").stdout
        for program, rank in programs.items():
            if program in commands:
                found[host] = rank
    return found


def test_ranks_on_hosts_of_their_own_answer_as_one_engine(up: Rack, shape: str) -> None:
    worker = ready(up, 1)
    logs = ("logs", "wide/0", "--rank", "1", "-n", "2000")
    log = up.pdcluster(*logs, "--topology", str(up.file)).stdout
    assert "headless" in log
    by_host = ranks(up)
    nodes = SHAPES[shape]["nodes_per_replica"]
    assert sorted(by_host.values()) == ["head"] + ["headless"] * (nodes - 1)
    (head,) = (host for host, rank in by_host.items() if rank == "head")
    assert worker["url"].startswith(f"http://{address(head)}:")

    ANSWERS[shape] = {}
    for question, expected in QUESTIONS.items():
        said = up.chat(question, max_tokens=8)["text"]
        assert expected in said
        ANSWERS[shape][question] = said
    # Split over three hosts or whole on each of two, the model says the same.
    assert len({tuple(answers.values()) for answers in ANSWERS.values()}) == 1


def test_each_copy_of_a_data_parallel_engine_takes_requests(up: Rack, shape: str) -> None:
    if shape != "data":
        pytest.skip("one copy")
    worker = ready(up, 1)

    def both() -> bool | None:
        up.chat("Name a colour.", max_tokens=4)
        text = up.hosts.run(OPERATOR, "curl", "-s", f"{worker['url']}/metrics").stdout
        taken = [metric(text, "vllm:request_success_total", engine=str(rank)) for rank in (0, 1)]
        return True if min(taken) > 0 else None

    wait_for(both, 60, "both ranks have answered")


def test_a_host_that_is_cut_off_takes_the_replica_along_and_it_comes_again_on_those_that_remain(
    up: Rack, shape: str
) -> None:
    if shape != "data":
        pytest.skip("no host is left for a third rank")
    ready(up, 1)
    before = ranks(up)
    lost = next(host for host, rank in before.items() if rank == "headless")
    up.hosts.tool("cut", str(lost))
    cut_s = time.monotonic()
    try:
        ready(up, 2)
        print(f"ready on other hosts {time.monotonic() - cut_s:.0f} s after a host was cut off")
        now = ranks(up)
        remaining = {host for host in NODES if host != lost}
        assert {host for host in now if host != lost} == remaining
        assert "Paris" in up.chat("What is the capital of France?")["text"]
    finally:
        up.hosts.tool("join", str(lost))
