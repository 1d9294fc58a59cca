"""How long work on a model tells where it is."""

from __future__ import annotations

from collections.abc import Callable

# What is being done, and the part of it that is done: 0..1, or None while nobody can say.
Progress = Callable[[str, float | None], None]
