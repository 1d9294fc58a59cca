"""A YAML file as values plus lines: which line does this key path stand on?

In: a path. Out: a Document, or TopologyError if it cannot be read at all: not there, not UTF-8, not
YAML, aliases that blow up. Keys given twice or not text are faults of a Document that can be read.
Called by: topology.loader, which alone knows what the keys mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import Fault, TopologyError
from cluster.topology.findings import KeyPath, dotted, quote

# Hand-written topologies have a few kB; a model file given by mistake has gigabytes.
_LARGEST_FILE_BYTES = 4 * 1024 * 1024
# With all aliases written out. Ten nested aliases of ten are 10^10.
_MOST_VALUES = 200_000

_NO_KEY = "\0"  # stands for a key that is no scalar: no YAML text contains it
_STR_TAG = "tag:yaml.org,2002:str"
_MERGE_TAG = "tag:yaml.org,2002:merge"

# What PyYAML complains of, and what people then have to do. The first match counts.
_YAML_FIXES = (
    (r"'\\t'", "indent with spaces, not with tabs"),
    (r"cannot start any token|cannot be read as", 'put the value in quotes: key: "value"'),
    (r"mapping values are not allowed", "indent this line like its neighbours, or put a value "
     'that contains ": " in quotes'),
    (r"could not find expected ':'", "write `key: value`, and indent it like its neighbours"),
    (r"scanning a quoted scalar|unexpected end of stream", "close the quote"),
    (r"flow sequence", "close the bracket with ], and put commas between the items"),
    (r"flow mapping", "close the brace with }, and put commas between the keys"),
    (r"undefined alias", "define it above with &name, or put a value that begins with * in quotes"),
    (r"another document", "keep one document: take out the line with ---"),
    (r"could not determine a constructor", "take out the tag, that is the word beginning with !"),
    (r"expected a mapping .* for merging", "give << a mapping or a list of mappings"),
    (r"expected <block end>|block (mapping|collection)", "indent this line like its neighbours"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """A file that could be read. `value` is its top mapping; `faults` are in its keys."""

    file: str
    value: dict[str, Any]
    root: yaml.Node
    faults: tuple[Fault, ...]

    def line(self, path: KeyPath) -> int:
        """The line (from 1) of the key at `path`, or of the nearest key above that is there."""
        node, line = self.root, self.root.start_mark.line + 1
        for part in path:
            entry = _entry(node, part)
            if entry is None:
                break
            key, node = entry
            line = key.start_mark.line + 1
        return line


def read(path: Path) -> Document:
    """Read one YAML mapping. Raises: TopologyError."""
    file = str(path)
    text = _text(path)
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            raise _refuse(file, 1, "the file is empty", "write a topology; see docs/topologies.md")
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            raise _refuse(
                file, line, "the file is not a mapping", "begin with `cluster_name: NAME`"
            )
        hopeless, faults = _node_faults(file, root)
        if hopeless:
            raise TopologyError((*hopeless, *faults))
        loader = _Loader("")
        # Constructing flattens `<<` merges in place, which is what Document.line relies on.
        value = loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"the control character U+{error.character:04X}"
        raise _refuse(file, line, found, "take it out") from error
    except yaml.MarkedYAMLError as error:
        raise TopologyError((_syntax_fault(file, error),)) from error
    except RecursionError as error:
        raise _refuse(file, 1, "values are nested too deeply", "nest less deeply") from error
    return Document(file, value, root, faults)


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            # 2024-13-45 looks like a date to YAML and is none; PyYAML lets ValueError through.
            found = quote(node.value) if isinstance(node, yaml.ScalarNode) else "a value"
            problem = f"{found} cannot be read as what it looks like"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _text(path: Path) -> str:
    file = str(path)
    try:
        if path.is_dir():
            raise _refuse(file, 1, "it is a folder", "name a topology file in it", key="file")
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        near = sorted(str(name) for name in path.parent.glob("*.yaml"))[:5]
        fix = f"name one that does, such as {', '.join(near)}" if near else "check the path"
        raise _refuse(file, 1, "the file does not exist", fix, key="file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        fix = "name a file that this user may read"
        raise _refuse(file, 1, f"it cannot be read ({why})", fix, key="file") from error
    if len(data) > _LARGEST_FILE_BYTES:
        raise _refuse(file, 1, "it is larger than 4 MiB", "name a topology file", key="file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"invalid UTF-8: byte 0x{data[error.start]:02x}"
        raise _refuse(file, line, found, "save the file as UTF-8", key="file") from error


def _refuse(file: str, line: int, found: str, fix: str, key: str = "YAML") -> TopologyError:
    return TopologyError((Fault(file, line, key, found, fix),))


def _syntax_fault(file: str, error: yaml.MarkedYAMLError) -> Fault:
    said = " ".join(part for part in (error.context, error.problem) if part)
    fix = next(
        (fix for pattern, fix in _YAML_FIXES if re.search(pattern, said)), "check this line's YAML"
    )
    # Something left open is where it was opened, a key without colon where it began.
    left_open = fix.startswith(("close", "write `key"))
    mark = (left_open and error.context_mark) or error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    return Fault(file, line, "YAML", f"malformed YAML: {error.problem or said}", fix)


def _node_faults(file: str, root: yaml.Node) -> tuple[tuple[Fault, ...], tuple[Fault, ...]]:
    """Faults that leave nothing to read, and faults of single keys. Each node is looked at once,
    however many aliases point at it. Keys that YAML takes for numbers or booleans become text."""
    hopeless: list[Fault] = []
    faults: list[Fault] = []
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node, path: KeyPath) -> None:
        open_nodes.add(id(node))
        size = 1
        if isinstance(node, yaml.MappingNode):
            faults.extend(_key_faults(file, node, path))
        for part, child in _children(node):
            line = child.start_mark.line + 1
            where = dotted((*path, part))
            if part == _NO_KEY:
                found = "a key is itself a list or a mapping"
                above = dotted(path) or "YAML"
                hopeless.append(Fault(file, line, above, found, "write a word as key"))
            elif id(child) in open_nodes:
                found = "an alias stands inside its own anchor"
                hopeless.append(Fault(file, line, where, found, "write the value out"))
            else:
                if id(child) not in sizes:
                    visit(child, (*path, part))
                size += sizes[id(child)]
        open_nodes.discard(id(node))
        sizes[id(node)] = size

    visit(root, ())
    if sizes[id(root)] > _MOST_VALUES:
        found = f"its aliases stand for more than {_MOST_VALUES:,} values"
        hopeless.append(Fault(file, 1, "YAML", found, "use fewer aliases of aliases"))
    return tuple(hopeless), tuple(faults)


def _key_faults(file: str, node: yaml.MappingNode, path: KeyPath) -> Iterator[Fault]:
    first_line: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == _MERGE_TAG or not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        where = dotted((*path, key.value))
        if key.tag != _STR_TAG:
            found = f"the key {key.value or 'null'} is not text to YAML"
            yield Fault(file, line, where, found, f'put it in quotes: "{key.value}"')
            key.tag = _STR_TAG
        if key.value in first_line:
            found = f"given twice, first on line {first_line[key.value]}"
            yield Fault(file, line, where, found, "keep one of the two")
        else:
            first_line[key.value] = line


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (key.value if isinstance(key, yaml.ScalarNode) else _NO_KEY), value
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)


def _entry(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode) and isinstance(part, str):
        # The last one counts: merged keys come first, and a key of one's own overrides them.
        for key, value in reversed(node.value):
            if key.value == part:
                return key, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None
