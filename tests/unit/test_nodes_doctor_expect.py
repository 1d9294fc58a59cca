"""What a topology asks of each host: who may run there, by which Python, on which ports."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctor_facts import GPU_1, GPU_POOL, HEAD, NPU_1, plan_of, rack, ray_half, serving_half

from cluster.errors import InvalidInput
from cluster.nodes.doctor.expect import LOOPBACK, Container, survey
from cluster.nodes.doctor.needs import ModelNeed
from cluster.nodes.doctor.session import command
from cluster.topology import loader
from cluster.topology.schema import ServingSpec, Topology

TOPOLOGIES = Path(__file__).parents[2] / "topologies"


def test_pools_are_expected_where_resources_and_labels_let_ray_place_them():
    survey = rack()
    assert plan_of(survey, HEAD).pools == ()
    assert [p.name for p in plan_of(survey, GPU_1).pools] == ["prefill-gpu", "decode-gpu"]
    assert [p.name for p in plan_of(survey, NPU_1).pools] == ["prefill-npu", "decode-npu"]


def test_the_head_comes_first_and_each_type_has_its_own_way_in():
    survey = rack()
    assert survey.head == survey.hosts[0].address == HEAD
    access = plan_of(survey, NPU_1).access
    assert access is not None
    assert (access.user, access.port, access.key) == ("npu", 2222, "~/.ssh/rack")


def test_ports_of_the_head_are_the_files_and_rays():
    ray = ray_half()
    ray["head_start_ray_commands"] = [
        "ray stop",
        "ulimit -n 65536; /opt/v/bin/python -m cluster.nodes.start ray start --head --port=6380 "
        "--ray-client-server-port 10001",
    ]
    plan = plan_of(rack(ray, gateway={"host": "0.0.0.0", "port": 80}), HEAD)
    assert {port.port: port.address for port in plan.ports} == {
        80: "0.0.0.0",
        8001: HEAD,
        8404: "0.0.0.0",
        9101: "0.0.0.0",
        6380: HEAD,
        10001: HEAD,
    }


@pytest.mark.parametrize(
    ("start", "remote"),
    [
        ("python3 -m cluster.nodes.start ray start --head", "python3 -u -c "),
        (
            "ulimit -n 9; /v/bin/python -m cluster.nodes.start ray start",
            "ulimit -n 9; /v/bin/python -u",
        ),
        (". /v/bin/activate && ray start --head", ". /v/bin/activate && python3 -u -c "),
    ],
)
def test_the_probe_is_started_as_ray_is(start, remote):
    plan = plan_of(rack(ray_half(head_start_ray_commands=["ray stop", start])), HEAD)
    argv = command(plan)
    assert argv[0] == "ssh"
    assert f"source ~/.bashrc; {remote}" in argv[-1].replace("'\"'\"'", "'")


def test_the_probes_command_line_holds_none_of_its_source_and_no_question():
    words = " ".join(command(plan_of(rack(), HEAD)))
    assert "def gather" not in words
    assert len(words) < 2000


def test_rays_docker_section_means_that_packages_are_looked_for_in_the_container():
    ray = ray_half(
        docker={"image": "pdcluster:cpu", "container_name": "pd", "run_options": ["--ipc=host"]}
    )
    ray["available_node_types"]["a3"]["docker"] = {"worker_image": "pdcluster:ascend"}
    survey = rack(ray)
    assert plan_of(survey, HEAD).container == Container("pdcluster:cpu", "pd", is_ipc_shared=True)
    assert plan_of(survey, NPU_1).container == Container(
        "pdcluster:ascend", "pd", is_ipc_shared=True
    )
    assert "docker" in plan_of(survey, NPU_1).commands


def test_each_kind_of_model_is_looked_for_in_its_own_place():
    def models(of: dict, **pool: object) -> tuple[ModelNeed, ...]:
        pools = [{"name": "p", "role": "mixed", **GPU_POOL, **pool}]
        islands = [{"name": "i", "pools": ["p"]}]
        survey = rack(model=of, pools=pools, islands=islands)
        return plan_of(survey, GPU_1).models

    assert models({"id": "/models/glm"}) == (ModelNeed("folder", "/models/glm"),)
    assert models({"id": "zai-org/GLM", "revision": "v1"}) == (
        ModelNeed("hub", "zai-org/GLM", "v1"),
    )
    assert models({"id": "/models/glm"}, model={"id": "~/fp8"}) == (ModelNeed("folder", "~/fp8"),)
    (made,) = models({"id": "smollm2-135m-instruct"})
    assert made.kind == "made"


def test_only_some_hosts_are_looked_at_if_asked():
    only = rack().only([NPU_1, HEAD])
    assert [plan.address for plan in only.hosts] == [HEAD, NPU_1]
    assert set(only.pairs) == {(HEAD, NPU_1), (NPU_1, HEAD)}
    with pytest.raises(InvalidInput, match="10\\.9\\.9\\.9"):
        rack().only(["10.9.9.9"])


def test_a_topology_for_one_machine_needs_no_ssh():
    topology = loader.load(TOPOLOGIES / "local-mixed.yaml")
    (plan,) = survey(topology, is_this_machine=True).hosts
    assert (plan.address, plan.access, plan.commands) == (LOOPBACK, None, ())
    assert [port.port for port in plan.ports] == [8000, 8001]
    assert "libibverbs.so.1" in plan.needs.libraries


@pytest.mark.parametrize("path", sorted(TOPOLOGIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_topology_that_we_ship_can_be_surveyed(path):
    topology = loader.load(path)
    is_local = topology.ray["provider"]["type"] == "local"
    hosts = survey(topology, is_this_machine=is_local).hosts
    placed = {pool.name for plan in hosts for pool in plan.pools}
    assert placed == {pool.name for pool in topology.serving.pools}


def test_hosts_of_rays_local_provider_are_read_too():
    ray = {
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]},
        "auth": {"ssh_user": "ops"},
        "head_start_ray_commands": ["ulimit -n 65536; ray start --head --port=6379"],
    }
    hosts = survey(topology_of(ray), is_this_machine=False).hosts
    assert [(plan.address, plan.is_head) for plan in hosts] == [
        ("10.0.0.1", True),
        ("10.0.0.2", False),
    ]
    assert all(len(plan.pools) == 4 for plan in hosts)


def test_a_cloud_that_makes_its_own_hosts_is_refused():
    with pytest.raises(InvalidInput, match="provider aws makes its own hosts"):
        survey(topology_of({"provider": {"type": "aws"}}), is_this_machine=False)


def topology_of(ray: dict) -> Topology:
    serving = ServingSpec.model_validate(serving_half())
    return Topology(path="t.yaml", cluster_name="t", ray=ray, serving=serving)
