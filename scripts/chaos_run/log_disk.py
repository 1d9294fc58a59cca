"""A small disk of its own under a cluster's logs, to be filled. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from chaos_run.home import Home

_SIZE_MIB = 8
_PIECE_BYTES = 1 << 16


@contextlib.contextmanager
def mounted(home: Home) -> Iterator[bool]:
    """There while it lasts; whether it is. Before `up`."""
    home.logs.mkdir(mode=0o700, parents=True)
    size = f"size={_SIZE_MIB}m,mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", size, "pdcluster-logs", str(home.logs)]
    has_disk = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield has_disk
    finally:
        if has_disk:
            subprocess.run(["umount", "--lazy", str(home.logs)], capture_output=True, check=False)


def fill(home: Home) -> None:
    """To the last byte."""
    with contextlib.suppress(OSError), (home.logs / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(_PIECE_BYTES))


def make_room(home: Home) -> None:
    """What was left of it before, again. May be called at any time."""
    (home.logs / "filler").unlink(missing_ok=True)
