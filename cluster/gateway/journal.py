"""Records of the requests that ended last, until the controller has them, and a while longer.

They are numbered, and go out with the replica's reports; the controller's answer says up to which
number it has them. So a lost report loses nothing, a restarted controller gets what is still here
again, and a replica that dies takes its last second along. What is not fetched in time is dropped,
the oldest first: requests never wait for it. Called by: gateway.app.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from cluster.request_records import PackedRecord

# Two seconds of a replica's most requests; some 600 KiB.
KEPT = 2048


class Journal:
    """Owned by one event loop."""

    def __init__(self) -> None:
        self._kept: deque[PackedRecord] = deque(maxlen=KEPT)
        self._known = 0  # up to here the controller has them
        self.number = 0  # of the newest record

    def add(self, record: PackedRecord) -> None:
        self.number += 1
        self._kept.append(record)

    def unknown(self) -> tuple[PackedRecord, ...]:
        """Those that the controller does not have, oldest first; the last one is `number`."""
        count = min(self.number - self._known, len(self._kept))
        return tuple(islice(self._kept, len(self._kept) - count, None))

    def known(self, number: int) -> None:
        """The controller has them up to `number`; one that was restarted has none, 0."""
        self._known = min(number, self.number)
