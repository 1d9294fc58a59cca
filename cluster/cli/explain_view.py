"""How `pdcluster render` words a worker and, with --explain, where its command came from. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.launcher.explain import Explained, Row
    from cluster.launcher.render import Rendered

# Longer values, mostly JSON, push their origin to the next line.
_WIDTH = 56


def heading(worker: Rendered) -> str:
    rank = f", node {worker.node_rank} of the replica" if worker.node_rank else ""
    return f"# {worker.worker} ({worker.role}{rank}) on {worker.host}"


def text(explained: Sequence[Explained], sources: Mapping[str, str]) -> str:
    """All workers, then the sources of the presets that they use."""
    lines: list[str] = []
    for one in explained:
        lines.append(heading(one.worker))
        for row in one.arguments:
            lines += _columns(_argument(row), row.origin)
        for row in one.variables:
            lines += _columns(f"{row.name}={row.value}", row.origin)
        for name in one.worker.secret_files:
            lines += _columns(f"file {name}", "pdcluster: a secret that `up` makes, never printed")
        lines.append("")
    for name, source in sources.items():
        lines += [f"preset {name}", f"    {source}", ""]
    return "\n".join(lines).rstrip("\n")


def _argument(row: Row) -> str:
    if row.name.startswith("--"):
        return f"{row.name} {row.value}".rstrip()
    return row.value


def _columns(left: str, right: str) -> Iterator[str]:
    if len(left) <= _WIDTH:
        yield f"  {left:<{_WIDTH}}  {right}"
    else:
        yield f"  {left}"
        yield f"  {'':<{_WIDTH}}  {right}"
