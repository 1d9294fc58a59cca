"""Everything that `pdcluster dashboards build` writes, by path below the folder of dashboards."""

from __future__ import annotations

from pathlib import Path

from cluster.observe import rules
from cluster.observe.dashboards import (
    beside,
    kv_transfer,
    overview,
    prefill_decode,
    scaling,
    speculative,
)
from cluster.observe.dashboards.panel import Board

BOARDS: tuple[Board, ...] = (
    overview.BOARD,
    prefill_decode.BOARD,
    kv_transfer.BOARD,
    speculative.BOARD,
    scaling.BOARD,
)


def generated() -> dict[str, str]:
    """Text by path: dashboards, rules, and what Grafana and Prometheus beside each other need."""
    from cluster.observe.dashboards import grafana

    found = {f"{file_name(board)}.json": grafana.text(board) for board in BOARDS}
    found.update({f"prometheus/{name}": text for name, text in rules.files().items()})
    found.update(beside.files())
    return found


def file_name(board: Board) -> str:
    return board.uid.removeprefix("pdcluster-")


def differing(folder: Path) -> list[str]:
    """Paths whose file in `folder` is missing or has another text. Reads, writes nothing."""
    return [path for path, text in generated().items() if _text(folder / path) != text]


def write(folder: Path) -> list[str]:
    """Writes what differs; its paths."""
    texts, changed = generated(), differing(folder)
    for path in changed:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(texts[path], encoding="utf-8")
    return changed


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
