"""Have processes that begin in another folder find the `cluster` package that runs here."""

from __future__ import annotations

import site
import sys
from collections.abc import Mapping
from pathlib import Path

import cluster


def with_source_root(environment: Mapping[str, str]) -> dict[str, str]:
    """The same, with PYTHONPATH as it has to be: unchanged where the interpreter finds the package
    by itself."""
    found = dict(environment)
    root = Path(cluster.__file__).resolve().parent.parent
    packages = {Path(folder).resolve() for folder in site.getsitepackages()}
    if root not in packages and not root.is_relative_to(Path(sys.prefix).resolve()):
        path = found.get("PYTHONPATH")
        found["PYTHONPATH"] = f"{root}:{path}" if path else str(root)
    return found
