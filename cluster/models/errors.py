"""The one error of this room."""

from __future__ import annotations

from cluster.errors import InvalidInput


class ModelError(InvalidInput):
    """`model` (an id or a path, as the operator wrote it) cannot be served; what was `found`
    and the `fix`, as plain sentences."""

    def __init__(self, model: str, found: str, fix: str) -> None:
        super().__init__(model, found, fix)
        self.model = model
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        return f"model {self.model}: {self.found}; {self.fix}"
