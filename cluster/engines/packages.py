"""Versions of Python packages as another interpreter would import them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path


def installed(python: str, names: Iterable[str]) -> str | None:
    """Version of the first of `names` that the interpreter `python` has, read from its
    site-packages folders without running it; None if it has none of them."""
    folders = sys.path if python == sys.executable else _site_packages(Path(python))
    found = {dist.name.lower(): dist.version for dist in distributions(path=list(folders))}
    return next((found[name] for name in names if name in found), None)


def _site_packages(python: Path) -> list[str]:
    # The interpreter's own path, not what it links to: a virtual environment's python is a link.
    prefix = python.parent.parent
    return [str(folder) for folder in prefix.glob("lib/python3*/*-packages")]
