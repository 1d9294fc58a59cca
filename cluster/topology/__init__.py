"""The topology file: schema, loader with line numbers, cross-field checks. No Ray import.

    load(path)     a file's Topology, or every fault in our half of it (`loader`)
    schema_json()  JSON Schema of the file, for editors (`editor_schema`)

Shapes are in `schema`, what must agree in `checks`, with Ray's half in `agreement`.
"""

from cluster.topology.editor_schema import schema_json
from cluster.topology.loader import load

__all__ = ["load", "schema_json"]
