"""JSON Schema of a whole topology file, for editors and for `pdcluster schema`.

`metadata.serving` is described key by key; Ray's half is left open, since Ray's own schema is the
judge of it. Pure.
"""

from __future__ import annotations

from typing import Any

from cluster.topology.schema import ServingSpec, Topology


def schema_json() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12). A fresh dict at each call."""
    serving = ServingSpec.model_json_schema(ref_template="#/$defs/{model}")
    definitions = serving.pop("$defs")
    name = Topology.model_json_schema()["properties"]["cluster_name"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pdcluster topology",
        "description": "A Ray cluster-launcher file whose metadata.serving says what to serve.",
        "type": "object",
        "required": ["cluster_name", "provider", "metadata"],
        "properties": {
            "cluster_name": {
                **name,
                "title": "cluster_name",
                "description": "Names the cluster for Ray and for pdcluster.",
            },
            "provider": {
                "type": "object",
                "required": ["type"],
                "description": "Where Ray finds nodes: Ray's half of the file.",
            },
            "metadata": {
                "type": "object",
                "required": ["serving"],
                "description": "Free to Ray. `serving` is ours.",
                "properties": {"serving": {"$ref": "#/$defs/ServingSpec"}},
            },
        },
        "$defs": {**definitions, "ServingSpec": serving},
    }
