"""The table, for a terminal and for docs/autoscaling.md."""

from __future__ import annotations

from autoscaling_replay.compare import Result

END = "<!-- end -->"


def begin(shape: str) -> str:
    """The line that the table of a day comes after."""
    return f"<!-- begin {shape}: written by scripts/replay_autoscaling --write -->"


def table(results: list[Result]) -> str:
    """Markdown, in the order of the runs."""
    rows = [
        "| way | worker-hours | both kept | TTFT kept | TPOT kept | TTFT p95 | TPOT p95 "
        "| most prefill + decode | started, stopped, role changes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {r.name} | {r.worker_hours:.2f} | {r.kept:.1%} | {r.ttft_kept:.1%} "
        f"| {r.tpot_kept:.1%} | {r.ttft_p95_s:.2f} s | {1e3 * r.tpot_p95_s:.0f} ms "
        f"| {r.most_prefill} + {r.most_decode} | {r.ups}, {r.downs}, {r.role_changes} |"
        for r in results
    ]
    return "\n".join(rows) + "\n"


def with_table(page: str, results: list[Result], shape: str) -> str:
    """The page with the table anew. Raises: ValueError if it has no place for it."""
    before, found, rest = page.partition(begin(shape))
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"the page has no lines {begin(shape)} and {END}; put them back")
    return f"{before}{begin(shape)}\n\n{table(results)}\n{END}{after}"
