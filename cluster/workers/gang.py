"""A replica that spans nodes has one worker per node and is one to everybody else. Pure.

Called by: workers.handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.identity import ENDED, WorkerState
from cluster.workers.report import WorkerReport


def merge(reports: Sequence[WorkerReport]) -> WorkerReport:
    """One report for the whole replica: rank 0's, unless another rank is worse off.

    `reports` are in the order of ranks, at least one."""
    head, *others = reports
    merged = replace(head, rss_bytes=sum(report.rss_bytes for report in reports))
    for rank, report in enumerate(others, start=1):
        where = f"rank {rank} on {report.node_ip}"
        if report.state is WorkerState.FAILED and head.state not in ENDED:
            return replace(
                merged,
                state=WorkerState.FAILED,
                message=f"{where}: {report.message}",
                last_words=report.last_words,
            )
        if merged.state is WorkerState.READY and report.state is not WorkerState.READY:
            merged = replace(
                merged, state=WorkerState.WARMING, message=f"{where} is {report.state}"
            )
    return merged
