"""Both halves of a topology file at once, Ray's judged by Ray's own validator. Starts no Ray."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Fault, TopologyError
from cluster.launcher.validate import validate
from cluster.topology.schema import Topology

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/topologies.md").read_text(), re.DOTALL)

SERVING = """\
metadata:
  serving:
    model: {id: simulated}
    pools:
      - name: one
        role: mixed
        engine: simulated
        replicas: 1
        placement: {resources: {CPU: 1}}
    islands:
      - {name: i, pools: [one]}
    gateway: {port: 8000, ingress: direct}
"""
LOCAL = (
    """\
cluster_name: t
max_workers: 0
provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}
"""
    + SERVING
)
RACK = (
    """\
cluster_name: t
max_workers: 1
provider: {type: external, module: ray.autoscaler.node_provider.NodeProvider}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4}, node_config: {}}
  atlas-a2:
    resources: {CPU: 64, NPU: 8}
    labels: {kind: A2}
    node_config: {}
    max_workers: 1
    min_workers: 1
file_mounts: {}
cluster_synced_files: []
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands: [ray start --head --port=6379]
worker_start_ray_commands: ["ray start --address=$RAY_HEAD_IP:6379"]
"""
    + SERVING
)
AWS = (
    """\
cluster_name: t
max_workers: 2
provider: {type: aws, region: us-west-2}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4}, node_config: {InstanceType: m5.large}}
  gpu: {node_config: {InstanceType: p5.48xlarge}}
"""
    + SERVING
)
MARK = "  #!"
CPU = "{resources: {CPU: 1}}"
PLACE = "metadata.serving.pools[0].placement"


@dataclass(frozen=True)
class Bad:
    """`base` with `old` made `new`; the line of `new` that ends in MARK is where the fault is."""

    title: str
    base: str
    old: str
    new: str
    key: str
    found: str
    fix: str


BAD_FILES = [
    # What Ray's schema refuses
    Bad("unknown key", LOCAL, "max_workers: 0", f"max_worker: 0{MARK}",
        "max_worker", 'Ray knows no key "max_worker"', "did you mean `max_workers`?"),
    Bad("free key at the top", LOCAL, "max_workers: 0", f"owner: me{MARK}",
        "owner", 'Ray knows no key "owner"', "move it below `metadata`"),
    Bad("no provider", LOCAL, "provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}\n", "",
        "provider", "missing, and Ray requires it", "add `provider: {type: local"),
    Bad("provider a text", LOCAL, "{type: local, head_ip: 127.0.0.1, worker_ips: []}",
        f"local{MARK}", "provider", 'found "local"', "write a mapping"),
    Bad("no provider type", LOCAL, "{type: local, head_ip: 127.0.0.1, worker_ips: []}",
        f"{{}}{MARK}", "provider.type", "missing, and Ray requires it", "add `type: local`"),
    Bad("provider type a list", LOCAL, "type: local", "type: [local]",
        "provider.type", "found a list of 1", "write a text"),
    Bad("max_workers a text", LOCAL, "max_workers: 0", f"max_workers: many{MARK}",
        "max_workers", 'found "many"', "write a whole number"),
    Bad("max_workers negative", LOCAL, "max_workers: 0", f"max_workers: -1{MARK}",
        "max_workers", "found -1", "a number of at least 0"),
    Bad("commands a text", RACK, "worker_setup_commands: []", f"worker_setup_commands: make{MARK}",
        "worker_setup_commands", 'found "make"', "write a list"),
    Bad("half a resource", RACK, "    resources: {CPU: 64, NPU: 8}",
        f"    resources: {{CPU: 64, NPU: 7.5}}{MARK}",
        "available_node_types.atlas-a2.resources.NPU", "found 7.5", "write a whole number"),
    Bad("node type without resources", RACK, "  head: {resources: {CPU: 4}, node_config: {}}",
        f"  head: {{node_config: {{}}}}{MARK}",
        "available_node_types.head.resources", "missing", "add `resources: {CPU: N}`"),
    Bad("node type with an unknown key", RACK, "    min_workers: 1", f"    min_worker: 1{MARK}",
        "available_node_types.atlas-a2.min_worker", "Ray knows no key", "mean `min_workers`?"),
    Bad("proxy by id without command", LOCAL, "max_workers: 0",
        f"max_workers: 0\nauth: {{ssh_proxy_use_node_id: true}}{MARK}",
        "auth.ssh_proxy_command", "missing, and Ray requires it", "add `ssh_proxy_command: ...`"),
    Bad("credentials of no kind", AWS, "region: us-west-2",
        "gcp_credentials: {type: magic}",
        "provider.gcp_credentials.type", 'found "magic"', "credentials_token, service_account"),
    # What `ray up` would abort or crash on
    Bad("unknown provider", LOCAL, "{type: local,", "{type: locl,",
        "provider.type", 'found "locl"', "did you mean `local`?"),
    Bad("local with node types", LOCAL, "max_workers: 0",
        f"max_workers: 0\nhead_node_type: a\navailable_node_types:{MARK}\n"
        "  a: {resources: {}, node_config: {}}",
        "available_node_types", "knows one node type only", "take it out, or write"),
    Bad("local without head", LOCAL, "head_ip: 127.0.0.1, ", "",
        "provider.head_ip", "`local` requires it", "add `head_ip: 127.0.0.1`"),
    Bad("local without workers", LOCAL, ", worker_ips: []", "",
        "provider.worker_ips", "`local` requires it", "add `worker_ips: []`"),
    Bad("coordinator without max_workers", LOCAL,
        "max_workers: 0\nprovider: {type: local, head_ip: 127.0.0.1, worker_ips: []}",
        "provider: {type: local, coordinator_address: 'h:1'}",
        "max_workers", "`ray up` reads it", "add `max_workers: N`"),
    Bad("external without module", RACK, ", module: ray.autoscaler.node_provider.NodeProvider", "",
        "provider.module", "missing", "add `module: PACKAGE.MODULE.CLASS`"),
    Bad("no node types", RACK, RACK[RACK.index("head_node_type"):RACK.index("file_mounts")], "",
        "available_node_types", "no node has any resource", "docs/topologies.md"),
    *(
        Bad(f"no {key}", RACK, f"\n{line}\n", "\n", key, "`ray up` reads it", f"add `{key}: ")
        for line in RACK[RACK.index("file_mounts"):RACK.index("metadata")].splitlines()
        for key in [line.partition(":")[0]]
    ),
    Bad("no max_workers", RACK, "\nmax_workers: 1\n", "\n",
        "max_workers", "`ray up` reads it", "add `max_workers: N`"),
    Bad("no head type", RACK, "head_node_type: head\n", "",
        "head_node_type", "missing", "write one of: head, atlas-a2"),
    Bad("wrong head type", RACK, "head_node_type: head", f"head_node_type: haed{MARK}",
        "head_node_type", '"haed" is no entry of available_node_types', "did you mean `head`?"),
    Bad("min_workers above max_workers", RACK, "    min_workers: 1", "    min_workers: 2",
        "max_workers", "found 1, less than all min_workers together (atlas-a2: 2)",
        "write 2 or more"),
    Bad("container without image", LOCAL, "max_workers: 0",
        f"max_workers: 0\ndocker: {{container_name: c}}{MARK}",
        "docker.image", "missing beside container_name", "add `image: IMAGE`"),
    Bad("image without container", LOCAL, "max_workers: 0",
        f"max_workers: 0\ndocker: {{image: c}}{MARK}",
        "docker.container_name", "missing", "add `container_name: pdcluster`"),
    # Labels
    Bad("selector", RACK, CPU, f"{{resources: {{CPU: 1}}, labels: {{kind: 'in(A2'}}}}{MARK}",
        f"{PLACE}.labels.kind", 'found "in(A2", no label selector', "write VALUE, !VALUE"),
    Bad("label name", RACK, CPU, f"{{resources: {{CPU: 1}}, labels: {{'a b': x}}}}{MARK}",
        f'{PLACE}.labels["a b"]', "no label name to Ray", "at most 63"),
    Bad("node's label name", RACK, "{kind: A2}", f"{{kind: A2, 'a b': x}}{MARK}",
        'available_node_types.atlas-a2.labels["a b"]', "no label name to Ray", "at most 63"),
    Bad("node's label value", RACK, "{kind: A2}", f"{{kind: 'A 2'}}{MARK}",
        "available_node_types.atlas-a2.labels.kind", 'found "A 2", no label value', "at most 63"),
    # Both halves together
    Bad("more than a node has", RACK, CPU, f"{{resources: {{NPU: 16}}}}{MARK}",
        f"{PLACE}.resources.NPU",
        "found 16; no node type offers more than 8 (head: 0, atlas-a2: 8)", "or add a node type"),
    Bad("what no node has", RACK, CPU, f"{{resources: {{GPU: 1}}}}{MARK}",
        f"{PLACE}.resources.GPU", "no node type offers GPU", "add `GPU: 1`"),
    Bad("label no node has", RACK, CPU, f"{{resources: {{CPU: 1}}, labels: {{zone: b}}}}{MARK}",
        f"{PLACE}.labels.zone", 'no node type has the label "zone"', "add `labels: {zone: b}`"),
    Bad("more replicas than nodes", RACK, f"replicas: 1\n        placement: {CPU}",
        f"replicas: 3{MARK}\n        placement: {{resources: {{NPU: 8}}}}",
        "metadata.serving.pools[0].replicas", "found 3 replicas; 1 replica can be placed",
        "lower it"),
    Bad("two nodes on one machine", LOCAL, "        replicas: 1",
        f"        parallel: {{tensor: 2}}\n        nodes_per_replica: 2{MARK}",
        "metadata.serving.pools[0].nodes_per_replica", "there are 1 node at most", "lower it"),
    Bad("Ray's port", RACK, "gateway: {port: 8000,", "gateway: {port: 6379,",
        "metadata.serving.gateway.port", "taken by Ray on the head", "write another port"),
]  # fmt: skip

Validate = Callable[[str], Topology]


@pytest.fixture
def validate_text(tmp_path: Path) -> Validate:
    def check(text: str) -> Topology:
        path = tmp_path / "t.yaml"
        path.write_text(text)
        return validate(path)

    return check


def faults_of(validate_text: Validate, text: str) -> tuple[Fault, ...]:
    with pytest.raises(TopologyError) as caught:
        validate_text(text)
    return caught.value.faults


@pytest.mark.parametrize("base", [LOCAL, RACK, AWS], ids=["local", "external", "aws"])
def test_the_bases_of_all_bad_files_are_good(base: str, validate_text: Validate) -> None:
    assert validate_text(base).cluster_name == "t"


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.title)
def test_a_bad_file_is_told_where_it_is_wrong_and_what_to_write(
    bad: Bad, validate_text: Validate
) -> None:
    assert bad.base.count(bad.old) == 1, "the case does not say which part of the base it changes"
    text = bad.base.replace(bad.old, bad.new)
    faults = faults_of(validate_text, text)
    fault = next((fault for fault in faults if fault.key == bad.key), None)
    assert fault is not None, "\n".join(map(str, faults))
    assert bad.found in fault.found
    assert bad.fix in fault.fix
    assert len(faults) == 1, "\n".join(map(str, faults))
    if MARK in text:
        assert fault.line == text[: text.index(MARK)].count("\n") + 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "topologies").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_topologies_are_valid(path: Path) -> None:
    assert validate(path).path == str(path)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_in_the_docs_are_valid(text: str, validate_text: Validate) -> None:
    validate_text(text)


def test_faults_of_both_halves_come_at_once_in_the_order_of_lines(
    validate_text: Validate,
) -> None:
    text = LOCAL.replace("max_workers: 0", "max_workers: none").replace("cluster_name: t\n", "")
    text = text.replace("        replicas: 1", "        replicas: 0").replace("8000", "70000")
    faults = faults_of(validate_text, text)
    assert [(fault.line, fault.key) for fault in faults] == [
        (1, "cluster_name"),
        (1, "max_workers"),
        (10, "metadata.serving.pools[0].replicas"),
        (14, "metadata.serving.gateway.port"),
    ]


def test_the_halves_are_compared_even_if_a_key_of_ours_is_unknown(validate_text: Validate) -> None:
    text = RACK.replace(CPU, "{resources: {NPU: 16}}\n        colour: red")
    assert [fault.key.rpartition(".")[2] for fault in faults_of(validate_text, text)] == [
        "NPU",
        "colour",
    ]


def test_a_cloud_that_knows_its_machines_is_not_asked_and_not_doubted(
    validate_text: Validate,
) -> None:
    validate_text(AWS.replace(CPU, "{resources: {GPU: 8}}"))


def test_resources_given_to_ray_start_are_not_missed(validate_text: Validate) -> None:
    text = RACK.replace("--head --port=6379", "--head --resources=$MINE")
    validate_text(text.replace(CPU, "{resources: {X: 1}}"))


def test_nodes_that_kubernetes_describes_are_not_judged_here(validate_text: Validate) -> None:
    provider = "{type: kuberay, namespace: default}\ncluster_synced_files: []"
    text = LOCAL.replace("{type: local, head_ip: 127.0.0.1, worker_ips: []}", provider)
    validate_text(text.replace(CPU, "{resources: {NPU: 8}}"))


def test_a_local_cluster_of_many_hosts_takes_replicas_over_nodes(validate_text: Validate) -> None:
    text = LOCAL.replace("max_workers: 0\n", "").replace("worker_ips: []", "worker_ips: [10.0.0.2]")
    validate_text(
        text.replace(
            "        replicas: 1", "        parallel: {tensor: 2}\n        nodes_per_replica: 2"
        )
    )


def test_what_ray_refuses_unforeseen_is_a_fault_too(
    validate_text: Validate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: dict[str, object]) -> None:
        raise ValueError("I do not like\n `max_workers`")

    monkeypatch.setattr("ray.autoscaler._private.util.validate_config", refuse)
    (fault,) = faults_of(validate_text, LOCAL)
    assert (fault.line, fault.key) == (2, "max_workers")
    assert fault.found == "Ray refuses the file: I do not like `max_workers`"
    assert fault.fix == "correct what Ray names"


def test_nothing_is_printed_by_ray_on_the_way(
    validate_text: Validate, capfd: pytest.CaptureFixture[str]
) -> None:
    validate_text(RACK)
    validate_text(LOCAL.replace("max_workers: 0", "max_workers: 5"))
    assert capfd.readouterr() == ("", "")


def test_a_fresh_process_validates_within_three_seconds_and_starts_no_ray() -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.launcher.validate import validate; "
        "assert 'ray' not in sys.modules; validate(Path(sys.argv[1])); "
        "import ray; assert not ray.is_initialized()"
    )
    path = ROOT / "topologies" / "local-cpu.yaml"
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    assert time.monotonic() - began_s < 3  # the promise itself


RAY_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "module",
                    "head",
                    "resources",
                    "labels",
                    "node_config",
                    "min_workers",
                    "CPU",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    base=st.sampled_from([LOCAL, RACK, AWS]),
    change=st.dictionaries(
        st.sampled_from(
            [
                "provider",
                "max_workers",
                "min_workers",
                "head_node_type",
                "available_node_types",
                "docker",
                "auth",
                "head_node",
                "worker_nodes",
                "setup_commands",
                "head_start_ray_commands",
                "file_mounts",
                "cluster_name",
                "metadata",
            ]
        )
        | st.text(max_size=4),
        RAY_VALUES,
        min_size=1,
        max_size=3,
    ),
)
def test_any_ray_half_at_all_is_validated_or_refused_with_faults(
    base: str, change: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "t.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(base), **change}), encoding="utf-8")
    refused = None
    try:
        validate(path)
    except TopologyError as error:
        refused = error
    if refused is not None:
        assert refused.faults
        assert all(fault.found and fault.fix and fault.line >= 1 for fault in refused.faults)
