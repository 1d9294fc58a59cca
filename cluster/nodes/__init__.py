"""Hosts of a rack: Ray's node provider for them, and the checks that prepare them.

config, assignment   what a file says, which host gets which node (pure)
provider             what Ray talks to: `operator` on the operator's machine, `on_head` there
start, head, end     what runs on a host: start Ray unless it runs, take in a changed file, end
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.nodes.provider import BareHostProvider

__all__ = ["BareHostProvider"]


def __getattr__(name: str) -> Any:
    # `start` and `end` run on hosts, where Ray's import would be most of the time they take.
    if name == "BareHostProvider":
        from cluster.nodes.provider import BareHostProvider

        return BareHostProvider
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
