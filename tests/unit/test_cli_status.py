"""What `status` shows beside pools and workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from cluster.cli import status_view
from cluster.control.state import ClusterStatus, SilentHost
from cluster.launcher.target import Target

NOW_S = 1_700_000_000.0


def shown(**more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(("pools", "workers", "failed", "links", "events"), ())
    status = ClusterStatus("c", "m", 1, NOW_S - 500.0, **{**empty, **more})
    at = cast(Target, SimpleNamespace(here=None, endpoint_url="http://127.0.0.1:8000"))
    return status_view.of(at, status, "", NOW_S)


def test_a_silent_host_is_shown_with_since_when_and_why(capsys):
    host = SilentHost("10.0.0.8", NOW_S - 127.0, "missed [too many] heartbeats")
    view = shown(silent_hosts=(host,))
    assert view["silent_hosts"] == [
        {
            "address": "10.0.0.8",
            "since_s": NOW_S - 127.0,
            "silent_for_s": 127.0,
            "why": "missed [too many] heartbeats",
        }
    ]
    status_view.draw(view)
    drawn = " ".join(capsys.readouterr().out.split())
    assert "host 10.0.0.8 silent for 2 min 07 s: missed [too many] heartbeats" in drawn


def test_where_none_is_silent_nothing_is_said_of_it(capsys):
    view = shown()
    assert view["silent_hosts"] == []
    status_view.draw(view)
    assert "silent" not in capsys.readouterr().out
