"""A replica that spans nodes: one worker (rank) per node, and one replica to everybody else.

merge          the ranks' reports as one. Pure. Called by: workers.handle
Gang           how a rank reaches the others. Called by: workers.worker
MeetingPlace   what rank 0 tells them: where its engine waits for theirs

rank 0 reserves its ports ─▶ the others ask for them, and start
any rank fails            ─▶ the replica has failed; control removes all of it
stop                      ─▶ rank 0's requests end, it tells the others, all end together
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.identity import ENDED, WorkerState
from cluster.workers.report import WorkerReport


@dataclass(frozen=True, slots=True)
class MeetingPlace:
    """Rank 0's address and the ports it holds, by the names of its engine's PortNeeds."""

    host: str = ""
    ports: Mapping[str, int] = field(default_factory=dict)


class Gang(Protocol):
    """The replica as one of its ranks sees it."""

    async def meeting_place(self) -> MeetingPlace:
        """Rank 0's, as soon as it has reserved its ports; asked by the others.

        Raises: PeerGone: rank 0 ended before it had any."""
        ...

    def end_others(self) -> None:
        """Rank 0's word to the others that all end now. Does not wait for them."""
        ...


def merge(reports: Sequence[WorkerReport]) -> WorkerReport:
    """One report for the whole replica: rank 0's, unless another rank is worse off.

    `reports` are in the order of ranks, at least one."""
    head, *others = reports
    merged = replace(
        head,
        rss_bytes=sum(report.rss_bytes for report in reports),
        node_ids=tuple(dict.fromkeys(name for report in reports for name in report.node_ids)),
        log_lines_lost=sum(report.log_lines_lost for report in reports),
    )
    for rank, report in enumerate(others, start=1):
        where = f"rank {rank} on {report.node_ip}"
        if _has_left(report, head):
            return replace(
                merged,
                state=WorkerState.FAILED,
                message=f"{where}: {report.message or 'it has stopped'}",
                last_words=report.last_words,
            )
        if merged.state is WorkerState.READY and report.state is not WorkerState.READY:
            merged = replace(
                merged, state=WorkerState.WARMING, message=f"{where} is {report.state}"
            )
    return merged


def _has_left(report: WorkerReport, head: WorkerReport) -> bool:
    """Whether a rank ended on its own. While rank 0 drains, the others stop when it says so; one
    that fails before has taken the requests along that rank 0 waits for."""
    if head.state in ENDED:
        return False
    if report.state is WorkerState.STOPPED:
        return head.state is not WorkerState.DRAINING
    return report.state is WorkerState.FAILED
