"""Each check of one host: sound, it is silent; one thing changed, and just that check speaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from doctor_facts import GIB, GPU_1, HEAD, NPU_1, NPU_POOL, plan_of, rack, ray_half, sound
from hypothesis import given
from hypothesis import strategies as st

from cluster.nodes.doctor.expect import Container
from cluster.nodes.doctor.facts import Facts
from cluster.nodes.doctor.judge import judge
from cluster.nodes.doctor.needs import ModelNeed, Needs, Packages

RACK = rack()


def found(address: str, **changes: Any) -> list[tuple[str, str]]:
    """(severity, check) of every finding on a sound host with these facts changed."""
    plan = plan_of(RACK, address)
    return [
        (f.severity, f.check) for f in judge(plan, Facts.of({**sound(plan), **changes}), "rack")
    ]


@pytest.mark.parametrize("plan", RACK.hosts, ids=lambda plan: plan.address)
def test_a_sound_host_has_no_findings(plan):
    assert judge(plan, Facts.of(sound(plan)), "rack") == []


def test_a_missing_program_is_an_error():
    plan = plan_of(RACK, HEAD)
    assert set(plan.commands) == {"rsync", "flock", "ssh"}
    told = Facts.of({**sound(plan), "commands": {"rsync": False, "flock": True, "ssh": False}})
    fixes = [finding.fix for finding in judge(plan, told, "rack")]
    assert fixes == ["apt-get install rsync", "apt-get install openssh-client"]


@pytest.mark.parametrize("name", ["ray", "pdcluster", "vllm", "nixl-cu12"])
def test_a_missing_package_is_an_error_of_rays_python(name):
    has = sound(plan_of(RACK, GPU_1))["packages"]
    del has[name]
    check = "packages" if name in ("ray", "pdcluster") else "engine"
    assert found(GPU_1, packages=has) == [("error", check)]


def with_interpreter(**told: Any) -> list[tuple[str, str]]:
    plan = replace(
        plan_of(RACK, GPU_1),
        needs=Needs(packages=(Packages("/opt/vllm/bin/python", (("vllm",),), ("decode-gpu",)),)),
    )
    facts = Facts.of({**sound(plan), "interpreters": {"/opt/vllm/bin/python": told}})
    return [(f.check, f.found) for f in judge(plan, facts, "rack")]


def test_the_packages_of_a_pools_own_interpreter_count():
    assert with_interpreter(exists=True, packages={"vllm": "0.33.0"}) == []
    assert with_interpreter(exists=True, packages={"torch": "2"}) == [
        ("engine", "/opt/vllm/bin/python has no vllm")
    ]


def test_a_pools_interpreter_must_exist_and_run():
    assert with_interpreter(exists=False) == [("engine", "no /opt/vllm/bin/python")]
    assert with_interpreter(exists=True, error="no module encodings") == [
        ("engine", "/opt/vllm/bin/python: no module encodings")
    ]


def test_libraries_that_mooncake_loads_are_named_by_their_debian_packages():
    plan = plan_of(RACK, NPU_1)
    missing = {"libibverbs.so.1": "cannot open", "liburing.so.2": "cannot open"}
    told = Facts.of({**sound(plan), "libraries": {**sound(plan)["libraries"], **missing}})
    (finding,) = judge(plan, told, "rack")
    assert finding.severity == "error"
    assert finding.fix == "apt-get install libibverbs1 liburing2"


def test_fewer_devices_than_stated_are_an_error_and_more_a_warning():
    assert found(GPU_1, devices={"nvidia": 7}) == [("error", "devices")]
    assert found(GPU_1, devices={"nvidia": 9}) == [("warning", "devices")]
    assert found(NPU_1, devices={"davinci": 8}) == [("error", "devices"), ("warning", "devices")]


def test_an_a3_counts_two_dies_to_a_card():
    ray = ray_half()
    ray["available_node_types"]["a3"]["resources"] = {"CPU": 64, "NPU": 8}
    pool = {**NPU_POOL, "placement": {"resources": {"NPU": 8}}}
    pools = [{"name": "prefill-npu", "role": "mixed", **pool}]
    survey = rack(ray, pools=pools, islands=[{"name": "npu", "pools": ["prefill-npu"]}])
    plan = plan_of(survey, NPU_1)
    (finding,) = judge(plan, Facts.of(sound(plan)), "rack")
    assert finding.expected == "16 on a node of atlas_a3, two dies to a card"


def test_cards_of_another_kind_than_the_hardware_named_are_an_error():
    gpu = {"names": ["NVIDIA H100 80GB HBM3"], "driver": "580.95.05"}
    assert found(GPU_1, gpu=gpu) == [("error", "devices")]


@pytest.mark.parametrize(
    ("address", "changes"),
    [
        (GPU_1, {"gpu": {"error": "no command nvidia-smi"}}),
        (NPU_1, {"npu": {"driver": "25.5.0", "cann": "9.1.0", "error": "dcmi failed"}}),
        (NPU_1, {"npu": {"driver": "", "cann": "9.1.0"}}),
        (NPU_1, {"npu": {"driver": "25.5.0", "cann": ""}}),
    ],
)
def test_a_driver_that_is_silent_or_has_no_version_is_an_error(address, changes):
    assert found(address, **changes) == [("error", "drivers")]


def test_shared_memory_too_small_for_the_engines_is_an_error():
    assert found(GPU_1, shm={"total_bytes": 64 * 2**20}) == [("error", "shared memory")]


def test_shared_memory_too_small_for_rays_store_as_well_is_a_warning():
    # 8 ranks take 4 GiB; three tenths of 500 GiB are Ray's.
    assert found(GPU_1, shm={"total_bytes": 153 * GIB}) == [("warning", "shared memory")]
    assert found(GPU_1, shm={"total_bytes": 155 * GIB}) == []
    assert found(HEAD, shm={"total_bytes": 64 * 2**20}) == [("warning", "shared memory")]


def test_the_store_that_ray_is_told_to_make_counts_instead_of_its_default():
    ray = ray_half()
    ray["worker_start_ray_commands"][0] += " --object-store-memory=1000000000"
    plan = plan_of(rack(ray), GPU_1)
    told = {**sound(plan), "shm": {"total_bytes": 5 * GIB}}
    assert judge(plan, Facts.of(told), "rack") == []


@pytest.mark.parametrize(("files", "severity"), [(1024, "error"), (20_000, "warning")])
def test_few_open_files_are_told(files, severity):
    limits = {"open_files": files, "locked_bytes": -1}
    assert found(HEAD, limits=limits) == [(severity, "limits")]


def test_locked_memory_matters_where_kv_blocks_are_registered():
    limits = {"open_files": -1, "locked_bytes": 65_536}
    assert found(GPU_1, limits=limits) == [("error", "limits")]
    assert found(HEAD, limits=limits) == []


def test_accelerators_without_an_rdma_device_are_a_warning():
    assert found(GPU_1, rdma_devices=[]) == [("warning", "network")]
    assert found(HEAD, rdma_devices=[]) == []


def port_finding(**told: Any) -> list[Any]:
    plan = plan_of(RACK, HEAD)
    ports = [{"port": 6379, "address": HEAD, **told}]
    return judge(plan, Facts.of({**sound(plan), "ports": ports}), "rack")


def test_a_port_held_by_somebody_else_is_an_error_that_names_him():
    (finding,) = port_finding(error="Address already in use", by="redis-server (pid 9)")
    assert (finding.severity, finding.check) == ("error", "ports")
    assert "Ray's --port 6379" in finding.found
    assert "redis-server (pid 9)" in finding.found


@pytest.mark.parametrize("owner", ["rack@hosts/ray", "rack/decode/0#1:0"])
def test_a_port_held_by_the_cluster_itself_is_no_fault(owner):
    assert port_finding(error="Address already in use", by="gcs_server (pid 9)", owner=owner) == []


def test_a_port_of_another_cluster_is_a_fault():
    (finding,) = port_finding(error="Address already in use", by="x (pid 9)", owner="rack2/d/0")
    assert finding.check == "ports"


def test_an_address_that_is_not_the_hosts_is_told_apart_from_a_port_that_is_held():
    (finding,) = port_finding(error="Cannot assign requested address")
    assert "ip address" in finding.fix


def test_fixed_ports_and_engines_ports_must_lie_below_the_kernels():
    assert found(HEAD, ephemeral=[1024, 65_535]).count(("warning", "ports")) == 4
    assert found(GPU_1, ephemeral=[32_768, 60_999]) == []
    assert found(GPU_1, ephemeral=[25_000, 60_999]) == [("warning", "ports")]


def test_mooncake_on_a3_takes_ports_that_the_kernel_has_by_default():
    plan = plan_of(RACK, NPU_1)
    told = Facts.of({**sound(plan), "ephemeral": [32_768, 60_999]})
    (finding,) = judge(plan, told, "rack")
    assert finding.severity == "warning"
    assert finding.found == "the kernel's own ports (32768-60999) reach into 20000-35999"
    assert finding.expected == "none there: Mooncake's transport listens there"
    assert "ip_local_port_range='36000 60999'" in finding.fix


def test_a_folder_that_cannot_be_written_is_an_error_and_names_its_owner():
    folders = {"ray": {"path": "/tmp/ray", "writable": False, "owner": "eve", "free_bytes": GIB}}
    plan = plan_of(RACK, HEAD)
    (finding,) = judge(plan, Facts.of({**sound(plan), "folders": folders}), "rack")
    assert finding.severity == "error"
    assert "/tmp/ray cannot be written, which belongs to eve" in finding.found


def test_a_full_disk_is_a_warning():
    folders = {"ray": {"path": "/tmp/ray", "writable": True, "free_bytes": 1000}}
    assert found(HEAD, folders=folders) == [("warning", "folders")]


def model(**changes: Any) -> dict[str, Any]:
    return {**sound(plan_of(RACK, GPU_1))["models"][0], **changes}


def test_a_model_folder_must_be_there_and_whole():
    assert found(GPU_1, models=[model(exists=False)]) == [("error", "model")]
    assert found(GPU_1, models=[model(config="")]) == [("error", "model")]
    assert found(GPU_1, models=[model(missing=["model-00003.safetensors"])]) == [("error", "model")]


def judged_model(need: ModelNeed, **told: Any) -> list[tuple[str, str]]:
    plan = replace(plan_of(RACK, HEAD), models=(need,))
    facts = {**sound(plan), "models": [{"id": need.id, "path": "/m", "exists": False, **told}]}
    return [(f.severity, f.fix) for f in judge(plan, Facts.of(facts), "rack")]


def test_a_model_that_pdcluster_makes_needs_room_on_every_host():
    made = ModelNeed("made", "smollm2-135m-instruct", "1", 380_000_000)
    assert judged_model(made, free_bytes=10**9) == []
    assert judged_model(made, free_bytes=10**8)[0][0] == "error"


def test_a_hub_model_that_is_not_in_the_cache_is_a_warning():
    ((severity, fix),) = judged_model(ModelNeed("hub", "zai-org/GLM-5.2-FP8"))
    assert severity == "warning"
    assert "hf download zai-org/GLM-5.2-FP8" in fix


def in_container(**told: Any) -> list[tuple[str, str]]:
    plan = replace(
        plan_of(RACK, GPU_1),
        container=Container("pdcluster:cuda", "pdcluster"),
        commands=("rsync", "docker"),
    )
    facts = {**sound(plan), "packages": {}, "folders": {}, "container": told}
    return [(f.severity, f.check) for f in judge(plan, Facts.of(facts), "rack")]


def test_a_container_is_judged_by_what_is_in_it():
    inside = {"ray": "2.60.0", "pdcluster": "0.1.0", "vllm": "0.33.0", "nixl-cu12": "1.5.1"}
    assert in_container(has_image=True, runs=False) == []
    assert in_container(has_image=True, runs=True, packages=inside) == []
    del inside["vllm"]
    assert in_container(has_image=True, runs=True, packages=inside) == [("error", "engine")]


def test_a_container_that_cannot_be_started_is_an_error_and_a_missing_image_a_warning():
    assert in_container(error="permission denied: /var/run/docker.sock") == [("error", "container")]
    assert in_container(has_image=False, runs=False) == [("warning", "container")]


def test_what_could_not_be_looked_at_is_said():
    plan = plan_of(RACK, HEAD)
    told = {**sound(plan), "errors": {"shm": "OSError: no /dev/shm"}}
    del told["shm"]
    (finding,) = judge(plan, Facts.of(told), "rack")
    assert (finding.severity, finding.check) == ("warning", "doctor")
    assert "shm could not be looked at: OSError: no /dev/shm" in finding.found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
SOUND = sound(plan_of(RACK, NPU_1))


@st.composite
def odd_facts(draw: st.DrawFn) -> Any:
    """A sound host's facts with parts of them, at any depth, replaced by anything."""

    def bent(value: Any) -> Any:
        if draw(st.integers(0, 5)) == 0:
            return draw(JSON)
        if isinstance(value, dict):
            return {name: bent(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [bent(inner) for inner in value]
        return value

    return bent(SOUND)


@given(told=odd_facts() | JSON, plan=st.sampled_from(RACK.hosts))
def test_no_facts_however_odd_keep_the_doctor_from_judging(told, plan):
    for finding in judge(plan, Facts.of(told), "rack"):
        assert finding.host == plan.address
        assert finding.found
        assert finding.expected
        assert finding.fix


def test_one_odd_value_leaves_the_others_as_they_are():
    told = {**SOUND, "memory_bytes": "much", "devices": {"nvidia": -1, "davinci": 16}}
    facts = Facts.of(told)
    assert facts.memory_bytes is None
    assert facts.devices is not None
    assert (facts.devices.nvidia, facts.devices.davinci) == (0, 16)
    assert facts.packages == SOUND["packages"]
