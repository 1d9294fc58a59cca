"""Secrets for engines that read them from a file only. Called by: workers.worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write each text into `folder`, readable by this user alone. Raises: OSError; FileExistsError
    if a name is taken."""
    for name, text in files.items():
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
