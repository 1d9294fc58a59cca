"""The table, for a terminal and for docs/autoscaling.md."""

from __future__ import annotations

from autoscaling_replay.compare import Result

BEGIN = "<!-- begin: written by scripts/replay_autoscaling --write -->"
END = "<!-- end -->"


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


def with_table(page: str, results: list[Result]) -> str:
    """The page with the table anew. Raises: ValueError if it has no place for it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}; put them back")
    return f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}"
