"""cluster.launcher.render and plan: what would run, without Ray and without the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.engines.base import HostFacts
from cluster.launcher import plan
from cluster.launcher.render import render
from cluster.models.store import ResolvedModel
from cluster.topology import loader
from cluster.topology.schema import ReplicasSpec, Topology

ROOT = Path(__file__).parents[2]
CPU = HostFacts("cpu", cores=2)
MODEL = ResolvedModel("org/m", False, "hub:org/m@main", {}, 8192)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def local_cpu():
    return loader.load(ROOT / "topologies/local-cpu.yaml")


def test_every_worker_is_rendered_with_its_command_and_host(local_cpu):
    prefill, decode = render(local_cpu)
    assert (prefill.worker, decode.worker) == ("prefill/0", "decode/0")
    assert prefill.host == "127.0.0.1"
    assert "vllm" in " ".join(prefill.argv)
    assert "--speculative-config" in decode.argv
    assert "--speculative-config" not in prefill.argv


def test_secrets_are_masked(local_cpu):
    for worker in render(local_cpu):
        assert worker.env["VLLM_API_KEY"] == "***"
        assert "VLLM_API_KEY='***'" in worker.shell()


def test_the_model_is_shown_where_it_will_be_and_is_not_made(local_cpu, cache):
    shown = " ".join(render(local_cpu)[0].argv)
    assert str(cache / "pdcluster/models/smollm2-135m-instruct-") in shown
    assert not cache.exists()


def test_no_port_is_shown_twice(local_cpu):
    def http_port(worker):
        return worker.argv[worker.argv.index("--port") + 1]

    prefill, decode = render(local_cpu)
    assert http_port(prefill) != http_port(decode)


def test_rendering_needs_no_ray():
    code = (
        "import sys; from pathlib import Path; from cluster.topology import loader;"
        "from cluster.launcher.render import render;"
        "render(loader.load(Path('topologies/local-cpu.yaml'))); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_remote_pool_is_rendered_for_the_hardware_it_asks_for(local_cpu):
    pools = [
        pool.model_copy(
            update={
                "placement": pool.placement.model_copy(
                    update={"resources": {"GPU": 8.0}, "labels": {"rack": "r1"}}
                )
            }
        )
        for pool in local_cpu.serving.pools
    ]
    remote = Topology(
        path="/t.yaml",
        cluster_name="rack",
        ray={"provider": {"type": "aws"}},
        serving=local_cpu.serving.model_copy(update={"pools": pools}),
    )
    worker = render(remote)[0]
    assert worker.host == "a node with GPU: 8 and rack=r1"
    assert "NODE_IP" in worker.argv
    assert "--enforce-eager" not in worker.argv


def test_the_desired_state_carries_what_was_found_of_the_model(local_cpu):
    config = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
    }
    model = ResolvedModel("/m", True, "digest", config, 8192)
    desired = plan.desired_state(local_cpu, model, "127.0.0.1", CPU)
    assert (desired.cluster, desired.model_path, desired.host) == ("local-cpu", "/m", "127.0.0.1")
    # float32 on a CPU without fast bfloat16: 30 layers x 3 heads x 2 x 64 x 4 bytes.
    assert desired.kv_bytes_per_token == 46_080


def test_kv_bytes_are_0_where_the_config_does_not_tell(local_cpu):
    model = ResolvedModel("org/m", False, "hub:org/m@main", {}, 8192)
    assert plan.desired_state(local_cpu, model, "", CPU).kv_bytes_per_token == 0


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://192.0.2.1:8000"),
        ("::", "http://192.0.2.1:8000"),
        ("fd00::1", "http://[fd00::1]:8000"),
    ],
)
def test_an_address_to_bind_becomes_one_to_connect_to(host, url):
    assert plan.url(host, 8000, "192.0.2.1") == url
    assert plan.url("0.0.0.0", 8000) == "http://127.0.0.1:8000"


def changed(desired, **serving):
    return desired.model_copy(update={"serving": desired.serving.model_copy(update=serving)})


def test_other_replicas_are_all_that_a_running_cluster_can_be_given(local_cpu):
    desired = plan.desired_state(local_cpu, MODEL, "", CPU)
    prefill, decode = desired.serving.pools
    more = decode.model_copy(update={"replicas": ReplicasSpec(initial=3, max=5)})
    assert plan.needs_restart(desired, changed(desired, pools=[prefill, more])) == ()
    # Their order says nothing.
    assert plan.needs_restart(desired, changed(desired, pools=[decode, prefill])) == ()


def test_what_takes_a_new_start_is_named_key_by_key(local_cpu):
    desired = plan.desired_state(local_cpu, MODEL, "", CPU)
    prefill, decode = desired.serving.pools
    other = decode.model_copy(update={"engine_args": {"x": 1}, "max_num_seqs": 1})
    new = decode.model_copy(update={"name": "new"})
    gateway = desired.serving.gateway.model_copy(update={"port": 9})
    after = changed(desired, pools=[prefill, other, new], gateway=gateway)
    assert set(plan.needs_restart(desired, after)) == {
        "pools[decode].engine_args.x",
        "pools[decode].max_num_seqs",
        "pools[new]",
        "gateway.port",
    }
    digest = desired.model_copy(update={"model_digest": "another"})
    assert plan.needs_restart(desired, digest) == ("files of the model",)
