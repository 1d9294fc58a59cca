"""NPUs and GPUs as Ray deals them out: a real Ray, whose nodes only state that they have them.

The engine is simulated and uses none; what counts is which ones it would see."""

import asyncio
import json
import os
import sys
import time

import psutil
import pytest
import ray
from ray_nodes import ray_of, simulated_worker

from cluster.identity import WorkerState
from cluster.settings import ray_namespace
from cluster.topology.schema import PlacementSpec
from cluster.workers import handle

pytestmark = pytest.mark.integration

NAME = f"devices-{os.getpid()}"
TYPE = "ray.io/accelerator-type"
# What a node with CANN has: here, a card's two dies would be missed, and its kind would be told by
# the chip's name.
ACL = """
class rt:
    get_device_count = staticmethod(lambda: (8, 0))
get_soc_name = lambda: "Ascend910_9391"
"""


@pytest.fixture(scope="module")
def rack(tmp_path_factory):
    """A head with two GPUs, and an Atlas A3 as a topology file states it: 8 cards, 16 dies."""
    stub = tmp_path_factory.mktemp("acl")
    (stub / "acl.py").write_text(ACL)
    with ray_of(NAME, [{"num_cpus": 2, "num_gpus": 2}]) as racked:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(stub)
            # So `ray up` hands a node type's labels and resources to its nodes.
            patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 4, "NPU": 16}))
            patch.setenv("RAY_OVERRIDE_LABELS", json.dumps({TYPE: "atlas-a3", "rack": "r1"}))
            racked.add_node(node_ip_address="127.0.0.1", object_store_memory=100 << 20)
        # Ray has imported it here: the next Ray of this process is not to find any NPU.
        sys.modules.pop("acl", None)
        yield racked


def spec(index, **placement):
    return simulated_worker(NAME, index, {"placement": PlacementSpec(**placement)})


async def seen_by(spec):
    """(devices the adapter is told of, environment of the engine, label of the node)."""
    replica = await handle.spawn(spec)
    deadline_s = time.monotonic() + 40
    while (report := await replica.report()).state is not WorkerState.READY:
        assert time.monotonic() < deadline_s, report
        await asyncio.sleep(0.05)

    def look(worker):
        context = worker._running.context
        return context.devices, context.host_facts.platform, context.interface

    actor = ray.get_actor(f"worker:{spec.id}:0", namespace=ray_namespace(NAME))
    told = await actor.__ray_call__.remote(look)
    return told, psutil.Process(report.engine_pid).environ()


async def removed(*specs):
    for each in specs:
        await handle.remove(NAME, each.id)


async def test_two_workers_of_one_a3_node_see_eight_dies_each_and_none_twice(rack):
    one, other = (spec(index, resources={"NPU": 8}, labels={"rack": "r1"}) for index in (0, 1))
    try:
        seen = [await seen_by(each) for each in (one, other)]
        dies = []
        for (devices, platform, interface), environ in seen:
            assert platform == "npu"
            assert interface == "lo"
            assert environ["ASCEND_RT_VISIBLE_DEVICES"] == ",".join(devices)
            assert len(devices) == 8
            dies += devices
        assert sorted(map(int, dies)) == list(range(16))
    finally:
        await removed(one, other)


async def test_a_worker_that_takes_a_gpu_sees_that_one_only(rack):
    one, other = (spec(index, resources={"GPU": 1}) for index in (0, 1))
    try:
        seen = [await seen_by(each) for each in (one, other)]
        assert [told[1] for told, _ in seen] == ["cuda", "cuda"]
        shown = [environ["CUDA_VISIBLE_DEVICES"] for _, environ in seen]
        assert shown == [",".join(told[0]) for told, _ in seen]
        assert sorted(shown) == ["0", "1"]
    finally:
        await removed(one, other)


def test_what_the_file_states_wins_over_what_ray_finds_on_the_node(rack):
    (node,) = [node for node in ray.nodes() if "NPU" in node["Resources"]]
    assert node["Resources"]["NPU"] == 16  # acl counts 8
    assert node["Labels"][TYPE] == "atlas-a3"  # acl says Ascend910_9391
    assert node["Labels"]["rack"] == "r1"


async def test_workers_are_placed_by_the_stated_label(rack):
    here = spec(0, resources={"NPU": 1}, labels={TYPE: "atlas-a3"})
    nowhere = spec(1, resources={"NPU": 1}, labels={TYPE: "Ascend910_9391"})
    try:
        assert len((await seen_by(here))[0][0]) == 1
        report = await (await handle.spawn(nowhere)).report()
        assert f"label {TYPE}=atlas-a3" in report.message
    finally:
        await removed(here, nowhere)
