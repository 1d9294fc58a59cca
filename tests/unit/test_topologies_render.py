"""Every shipped topology: valid to Ray and to us, rendered, explained, and honest about hosts."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.launcher.explain import explain
from cluster.launcher.render import render
from cluster.launcher.validate import validate
from cluster.topology import loader, presets

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "topologies").glob("*.yaml"))
# Ours by node count, as vllm-project/vllm-ascend's GLM5.2.md has them ("Model Weight").
NODES = {
    "atlas-a3-w8a8": ("NPU", 16, 1),
    "atlas-a3-bf16": ("NPU", 16, 2),
    "atlas-a2-w8a8": ("NPU", 8, 2),
    "atlas-a2-bf16": ("NPU", 8, 4),
    "h200-single-node": ("GPU", 8, 1),
}
SHIPPED = {
    "local-cpu",
    "local-glm-mtp",
    "local-mixed",
    "local-simulated-large",
    "h200-single-node",
    "h200-pd",
    "atlas-a3-w8a8",
    "atlas-a3-bf16",
    "atlas-a2-w8a8",
    "atlas-a2-bf16",
    "h200-atlas-mixed",
    "h200-offload",
    "ascend-xllm",
    "h200-sglang",
}
_DOCUMENTATION = ipaddress.ip_network("192.0.2.0/24")


@pytest.fixture(params=ALL, ids=lambda path: path.stem)
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_all_that_are_promised_are_there():
    assert {path.stem for path in ALL} >= SHIPPED


def test_it_is_a_valid_file_for_ray_and_for_us(file: Path):
    assert validate(file).cluster_name == file.stem


def test_it_opens_with_for_whom_it_is(file: Path):
    text = file.read_text()
    assert text.startswith("# For: ")
    assert f"topologies/{file.name}" in text


def test_every_worker_is_rendered_on_ports_of_its_own(file: Path):
    topology = loader.load(file)
    workers = render(topology)
    pools = topology.serving.pools
    assert len(workers) == sum(p.replicas.initial * p.nodes_per_replica for p in pools)
    for worker in workers:
        assert worker.argv
        assert worker.shell().startswith(("env ", worker.argv[0]))


def test_every_argument_has_an_origin(file: Path):
    examined = loader.examine(file)
    # Workers of one pool are alike.
    first = {worker.pool: worker for worker in reversed(render(examined.topology()))}
    for explained in explain(examined.document, tuple(first.values())):
        rows = (*explained.arguments, *explained.variables)
        assert len(explained.variables) == len(explained.worker.env)
        # A bare "pdcluster" would be an argument nobody accounts for.
        assert not [row for row in rows if row.origin in ("", "pdcluster")]
        assert json.dumps([row.value for row in rows])


def test_hosts_are_examples_from_the_range_for_documentation(file: Path):
    types = yaml.safe_load(file.read_text()).get("available_node_types", {})
    hosts = [host for entry in types.values() for host in entry["node_config"].get("hosts", ())]
    assert all(ipaddress.ip_address(host) in _DOCUMENTATION for host in hosts)
    assert len(hosts) == len(set(hosts))


@pytest.mark.parametrize("name", NODES)
def test_node_counts_are_what_the_weights_need(name: str):
    topology = loader.load(ROOT / f"topologies/{name}.yaml")
    resource, per_node, nodes = NODES[name]
    (pool,) = topology.serving.pools
    assert pool.nodes_per_replica == nodes
    assert pool.placement.resources[resource] == per_node
    entries = topology.ray["available_node_types"].values()
    having = [entry for entry in entries if entry["resources"].get(resource) == per_node]
    assert sum(len(entry["node_config"]["hosts"]) for entry in having) == nodes


def test_the_mixed_rack_has_two_islands_that_load_unlike_weights():
    serving = loader.load(ROOT / "topologies/h200-atlas-mixed.yaml").serving
    connectors = {island.name: island.connector for island in serving.islands}
    assert connectors == {"h200": "nixl", "atlas-a3": "ascend_mooncake"}
    assert serving.model_of("decode-h200").id == "zai-org/GLM-5.2-FP8"
    assert serving.model_of("decode-atlas").id == "Eco-Tech/GLM-5.2-w8a8"
    assert serving.model_of("decode-h200").quantization is None
    assert serving.model_of("decode-atlas").quantization == "ascend"
    assert not any(
        serving.island_of(one).name != serving.island_of(other).name
        for one, other in serving.pairs()
    )


def test_the_page_names_it(file: Path):
    assert f"| `{file.stem}` |" in (ROOT / "docs/topologies.md").read_text()


@pytest.mark.parametrize("name", presets.names())
def test_the_page_names_every_preset(name: str):
    stem, _, side = name.rpartition("-")
    shown = f"`{stem}-prefill`, `-decode`" if side in ("prefill", "decode") else f"`{name}`"
    assert shown in (ROOT / "docs/engines.md").read_text()


def test_presets_that_comments_name_exist(file: Path):
    named = re.findall(r"glm-5\.2-[a-z0-9]+-[a-z0-9]+(?:-(?:prefill|decode))?", file.read_text())
    assert set(named) <= set(presets.names())
