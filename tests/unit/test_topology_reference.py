"""docs/topologies.md and the JSON Schema say what the schema says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.topology import schema_json
from cluster.topology.loader import load
from cluster.topology.pairing import RULES
from cluster.topology.reference import table, with_table
from cluster.topology.shape import every_key, field_at, model_at, unit

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "topologies.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_table_of_keys_in_the_docs_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run scripts/write_topology_reference"


def test_a_page_without_marks_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="put them back"):
        with_table("# nothing here\n")


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_in_the_docs_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    load(path)


def test_the_docs_have_examples_of_one_machine_and_of_many() -> None:
    providers = {yaml.safe_load(text)["provider"]["type"] for text in EXAMPLES}
    assert providers == {"local", "external"}


def test_the_docs_name_every_connector() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{connector}` |" in page for connector in RULES)


def test_every_key_has_a_description() -> None:
    assert [key.path for key in every_key() if not key.field.description] == []


def test_rows_show_unit_and_default() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", table(), re.MULTILINE))
    assert rows["islands[].lease_s"].startswith("number | s | `30` |")
    assert rows["pools[].kv_cache_gib"].startswith("number or null | GiB |  |")
    assert rows["pools[].role"].startswith("`prefill`, `decode`, `mixed` |  | **required** |")
    assert rows["pools[].placement.resources"].startswith("mapping |  | `{CPU: 1}` |")
    assert len(rows) == len(list(every_key()))


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("lease_s", "s"),
        ("prefill_tokens_per_s", "tokens/s"),
        ("kv_bytes_per_token", "bytes/token"),
        ("block_size_tokens", "tokens"),
        ("max_body_mib", "MiB"),
        ("max_num_seqs", ""),
    ],
)
def test_a_name_ends_in_its_unit(name: str, symbol: str) -> None:
    assert unit(name) == symbol


def test_keys_are_looked_up_by_path() -> None:
    assert field_at(("pools", 3, "replicas", "max")) is not None
    assert field_at(("pools", 0, "engine_args", "max")) is None
    assert field_at(()) is None
    assert model_at(("pools", 0, "engine_args")) is None
    assert model_at(("no", "such", "path")) is None


def is_valid(value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema_json()).is_valid(value))


def test_the_json_schema_is_one_and_describes_every_key() -> None:
    schema = schema_json()
    jsonschema.Draft202012Validator.check_schema(schema)
    for model in schema["$defs"].values():
        for name, entry in model.get("properties", {}).items():
            assert entry.get("description") or "$ref" in entry, name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "topologies").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_topologies_fit_the_json_schema_and_load(path: Path) -> None:
    assert is_valid(yaml.safe_load(path.read_text()))
    load(path)


def test_an_editor_sees_what_is_wrong() -> None:
    good = yaml.safe_load(EXAMPLES[0])
    assert is_valid(good)
    for breakage in (
        {"cluster_name": "Not A Name"},
        {"metadata": {}},
        {"metadata": {"serving": {**good["metadata"]["serving"], "gatway": {}}}},
        {"metadata": {"serving": {**good["metadata"]["serving"], "islands": []}}},
    ):
        assert not is_valid({**good, **breakage})


def test_an_editor_takes_a_number_and_a_section_for_replicas() -> None:
    value = yaml.safe_load(EXAMPLES[0])
    pools = value["metadata"]["serving"]["pools"]
    pools[0]["replicas"], pools[1]["replicas"] = 2, {"initial": 2, "max": 4}
    assert is_valid(value)
    pools[0]["replicas"] = "two"
    assert not is_valid(value)
