"""How a topology file is read: all faults at once, none invented, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from topology_text import BASE, DECODE, GATEWAY, PREFILL

from cluster.errors import Fault, TopologyError
from cluster.identity import Role
from cluster.topology.loader import load
from cluster.topology.shape import every_key

S = "metadata.serving."
P0, P1 = f"{S}pools[0].", f"{S}pools[1]."

Load = Callable[[str | bytes], Any]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    def load_it(text: str | bytes) -> Any:
        path = tmp_path / "t.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    return load_it


def faults_of(load_text: Load, text: str | bytes) -> tuple[Fault, ...]:
    with pytest.raises(TopologyError) as caught:
        load_text(text)
    return caught.value.faults


def test_the_base_of_all_bad_files_is_good(load_text: Load) -> None:
    topology = load_text(BASE)
    assert topology.cluster_name == "t"
    assert topology.serving.pairs() == (("prefill", "decode"),)
    assert topology.ray["provider"]["type"] == "local"
    assert topology.ray["metadata"] == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("port: 8000", "port: 80"),
        ("port: 8000", "port: 8404\n      ingress: direct"),
        (DECODE, DECODE + "        parallel: {tensor: 4}\n"),
        (DECODE, DECODE + "        placement: {resources: {GPU: 0.5}}\n"),
        (DECODE, DECODE + "        engine_args: {enforce-eager: true}\n"),
        (DECODE, DECODE + "        env: {PYTHONHASHSEED: '0'}\n"),  # what prefill gets anyhow
        (DECODE, DECODE + "        env: {TOKENIZERS_PARALLELISM: 'false'}\n"),
        ("role: prefill", "role: mixed\n        replicas: 2"),
    ],
)
def test_what_can_work_is_not_refused(old: str, new: str, load_text: Load) -> None:
    text = BASE.replace(old, new)
    if "role: mixed" in new:
        text = text.replace("role: decode", "role: mixed")
    load_text(text)


def test_vllm_ascend_takes_what_nixl_refuses_and_the_other_way_round(load_text: Load) -> None:
    text = BASE.replace(DECODE, DECODE + "        parallel: {tensor: 4}\n")
    load_text(text)
    ascend = text.replace("[prefill, decode]", "[prefill, decode]\n        connector: CONNECTOR")
    for connector in ("ascend_mooncake", "ascend_layerwise"):
        (fault,) = faults_of(load_text, ascend.replace("CONNECTOR", connector))
        assert "multiple of the decode size (vLLM-Ascend)" in fault.fix
    wide = PREFILL + "        parallel: {tensor: 8}\n"
    load_text(ascend.replace("CONNECTOR", "ascend_mooncake").replace(PREFILL, wide))


@pytest.mark.parametrize("engine", ["xllm", "ktransformers", "sglang", "vllm_ascend", "vllm"])
def test_an_island_of_one_mixed_pool_needs_no_link_and_no_connector(
    load_text: Load, engine: str
) -> None:
    alone = f"      - {{name: alone, role: mixed, engine: {engine}}}\n"
    text = BASE.replace(DECODE, DECODE + alone)
    text = text.replace(GATEWAY, "      - {name: two, pools: [alone]}\n" + GATEWAY)
    spec = load_text(text).serving
    assert spec.pairs() == (("prefill", "decode"),)
    assert spec.peers_of("alone") == ()


def test_a_simulated_pool_may_stand_for_any_hardware(load_text: Load) -> None:
    both = PREFILL + "        hardware: atlas_a3\n" + DECODE + "        hardware: atlas_a3\n"
    load_text(BASE.replace(PREFILL + DECODE, both))


def test_pools_of_one_island_may_take_requests_of_unlike_length(load_text: Load) -> None:
    text = BASE.replace("{id: simulated}", "{id: simulated, max_model_len_tokens: 4096}")
    load_text(text.replace(PREFILL, PREFILL + "        max_model_len_tokens: 1024\n"))


def test_links_leave_out_pools_they_do_not_name(load_text: Load) -> None:
    third = DECODE.replace("decode", "decode-b", 1)
    text = BASE.replace(DECODE, DECODE + third).replace(
        "[prefill, decode]", "[prefill, decode, decode-b]"
    )
    load_text(text)
    linked = text + "    links: [{prefill: prefill, decode: decode}]\n"
    (fault,) = faults_of(load_text, linked)
    assert fault.key == f"{S}pools[2].role"
    assert "has no link: `links` names other pools only" in fault.found
    assert "{prefill: prefill, decode: decode-b}" in fault.fix


def test_all_faults_come_at_once_in_the_order_of_lines(load_text: Load) -> None:
    text = BASE.replace("port: 8000", "port: 99999\n      port: 99999\n      prot: 1")
    text = text.replace(DECODE, DECODE + "        replicas: 0\n")
    text = text.replace(PREFILL, PREFILL + "        engine_args: {port: 1}\n")
    text = text.replace("cluster_name: t", "cluster_name: T")
    faults = faults_of(load_text, text)
    assert [fault.key for fault in faults] == [
        "cluster_name",
        f"{P0}engine_args.port",
        f"{P1}replicas",
        f"{S}gateway.port",
        f"{S}gateway.port",
        f"{S}gateway.prot",
    ]
    assert [fault.line for fault in faults] == sorted(fault.line for fault in faults)
    message = str(TopologyError(faults)).splitlines()
    assert len(message) == len(faults)


@pytest.mark.parametrize("misspelt", ["engin: vllm", "engine: vlm"])
def test_a_fault_that_follows_from_another_is_not_reported(misspelt: str, load_text: Load) -> None:
    # Were the key taken for absent, the pool would have the default engine, unlike its island's.
    text = BASE.replace(PREFILL, PREFILL.replace("engine: simulated", misspelt))
    assert len(faults_of(load_text, text)) == 1


def test_a_bad_item_of_a_list_does_not_shift_the_others(load_text: Load) -> None:
    text = BASE.replace("        role: prefill\n", "").replace("role: decode", "role: decoder")
    assert [fault.key for fault in faults_of(load_text, text)] == [f"{P0}role", f"{P1}role"]


def test_of_a_list_with_a_bad_name_nothing_more_is_concluded(load_text: Load) -> None:
    # Without the name that is wrong, its pool would seem to be in no island.
    faults = faults_of(load_text, BASE.replace("[prefill, decode]", "[prefill, De_code]"))
    assert [fault.key for fault in faults] == [f"{S}islands[0].pools[1]"]


def test_anchors_merges_and_aliases_are_read_and_located(load_text: Load) -> None:
    text = BASE.replace("{type: local,", "&p {type: local,").replace(
        DECODE, "      - &d\n" + DECODE.replace("      - name: decode", "        name: decode")
    )
    load_text(text)
    merged = text.replace(
        "    islands:",
        "      - <<: *d\n        name: other\n        max_num_seqs: -1\n    islands:",
    )
    faults = faults_of(load_text, merged)
    fault = next(fault for fault in faults if fault.key == f"{S}pools[2].max_num_seqs")
    assert fault.line == merged.splitlines().index("        max_num_seqs: -1") + 1


def test_aliases_cannot_blow_up(load_text: Load) -> None:
    laughs = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    laughs += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 30)]
    (fault,) = faults_of(load_text, "\n".join(laughs))
    assert "aliases stand for more than 200,000 values" in fault.found
    assert "fewer aliases" in fault.fix


@pytest.mark.parametrize(
    ("data", "line", "found", "fix"),
    [
        (b"a: 1\nb: \xff\n", 2, "invalid UTF-8: byte 0xff", "save the file as UTF-8"),
        (b"", 1, "the file is empty", "docs/topologies.md"),
        (b"# nothing\n", 1, "the file is empty", "docs/topologies.md"),
        (b"\n- 1\n", 2, "not a mapping", "begin with `cluster_name: NAME`"),
        (b"a: " + b"[" * 5000, 1, "nested too deeply", "nest less deeply"),
        (b"#" * (4 * 1024 * 1024 + 1), 1, "larger than 4 MiB", "name a topology file"),
    ],
)
def test_what_is_no_topology_is_said_plainly(
    data: bytes, line: int, found: str, fix: str, load_text: Load
) -> None:
    (fault,) = faults_of(load_text, data)
    assert fault.line == line
    assert found in fault.found
    assert fix in fault.fix


def test_a_byte_order_mark_is_no_fault(load_text: Load) -> None:
    load_text(b"\xef\xbb\xbf" + BASE.encode())


@pytest.mark.parametrize(
    ("name", "found", "fix"),
    [
        ("missing.yaml", "does not exist", "there.yaml"),
        ("folder", "it is a folder", "name a topology file in it"),
        ("nul\0.yaml", "cannot be read", "may read"),
        ("none/at/all.yaml", "does not exist", "check the path"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    name: str, found: str, fix: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.yaml").touch()
    with pytest.raises(TopologyError) as caught:
        load(tmp_path / name)
    (fault,) = caught.value.faults
    assert fault.key == "file"
    assert found in fault.found
    assert fix in fault.fix


YAML_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["prefill", "decode", "mixed", "vllm", "simulated", "nixl", "a"])
    | st.dates()
)
YAML_VALUES = st.recursive(
    YAML_SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([key.name for key in every_key()]) | st.text(max_size=8),
            inner,
            max_size=6,
        )
    ),
    max_leaves=40,
)


@given(serving=st.dictionaries(st.sampled_from(["model", "pools", "islands", "links", "gateway"])
                               | st.text(max_size=8), YAML_VALUES, max_size=6))  # fmt: skip
def test_any_mapping_at_all_is_loaded_or_refused_with_faults(
    serving: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "t.yaml"
    text = yaml.safe_dump({"cluster_name": "t", "metadata": {"serving": serving}})
    path.write_text(text, encoding="utf-8")
    refused = None
    try:
        load(path)
    except TopologyError as error:
        refused = error
    if refused is not None:
        assert refused.faults
        assert all(fault.found and fault.fix and fault.line >= 1 for fault in refused.faults)


@given(
    data=st.binary(max_size=60)
    | st.text("ab:{}[]&*!?|>-#%'\"\t\n ,<1.", max_size=40).map(str.encode)
)
def test_any_bytes_at_all_are_refused_with_faults(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "t.yaml"
    path.write_bytes(data)
    with pytest.raises(TopologyError) as caught:
        load(path)
    assert all(fault.found and fault.fix and fault.line >= 1 for fault in caught.value.faults)


NEARLY_GOOD_POOL = st.fixed_dictionaries(
    {"name": st.sampled_from("abc"), "role": st.sampled_from([str(role) for role in Role])},
    optional={
        "engine": st.sampled_from(["vllm", "simulated"]),
        "replicas": st.integers(0, 3),
        "parallel": st.fixed_dictionaries({"tensor": st.integers(1, 8), "data": st.integers(1, 2)}),
        "nodes_per_replica": st.integers(1, 3),
        "block_size_tokens": st.sampled_from([16, 32]),
        "placement": st.fixed_dictionaries({"resources": st.dictionaries(
            st.sampled_from(["CPU", "GPU", "NPU"]), st.floats(0.1, 16), max_size=2)}),
        "simulated": st.just({}),
    },
)  # fmt: skip


@given(
    pools=st.lists(NEARLY_GOOD_POOL, min_size=1, max_size=4),
    islands=st.lists(
        st.fixed_dictionaries({
            "name": st.sampled_from(["i", "j"]),
            "pools": st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=3),
            "connector": st.sampled_from(["nixl", "mooncake"]),
        }), min_size=1, max_size=3),
    links=st.lists(st.fixed_dictionaries({
        "prefill": st.sampled_from(["a", "b", "c", "d"]),
        "decode": st.sampled_from(["a", "b", "c", "d"])}), max_size=3),
)  # fmt: skip
def test_a_loaded_topology_has_a_decoder_and_every_pool_in_one_island(
    pools: list[dict[str, Any]],
    islands: list[dict[str, Any]],
    links: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    serving = {"model": {"id": "m"}, "pools": pools, "islands": islands, "links": links}
    path = tmp_path_factory.mktemp("near") / "t.yaml"
    path.write_text(yaml.safe_dump({"cluster_name": "t", "metadata": {"serving": serving}}))
    try:
        spec = load(path).serving
    except TopologyError:
        return
    members = [name for island in spec.islands for name in island.pools]
    assert sorted(members) == sorted(pool.name for pool in spec.pools)
    assert any(pool.role != "prefill" and pool.replicas.initial for pool in spec.pools)
    linked = {name for pair in spec.pairs() for name in pair}
    assert linked == {pool.name for pool in spec.pools if pool.role != "mixed"}
