"""The probe's end of a conversation: questions come in, answers go out.

    in    {"id": 1, "do": "clock" | "facts" | "listen" | "connect", ...}     one JSON per line
    out   MARK {"id": 1, "answer": ...} or MARK {"id": 1, "error": "..."}

Answers carry a mark, because a login shell may print what it likes before. When the input ends
(the ssh connection is gone) or nothing is asked for `_IDLE_S`, the probe ends, and with it the
listener and every program it has started. Called by: nodes.doctor.session, over ssh.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.nodes.doctor.on_host import commands, disk, reach, system

MARK = "@pdcluster-doctor "
_IDLE_S = 300.0

_out_guard = threading.Lock()


def main() -> None:
    """Greet, then answer until the input ends."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: _end())
    _say({"id": 0, "answer": None})
    for line in _lines():
        message = json.loads(line)
        if message["do"] == "clock":  # at once: the time it takes is part of the answer
            _answer(message)
        else:
            threading.Thread(target=_answer, args=(message,), daemon=True).start()
    _end()


def gather(asked: dict[str, Any]) -> dict[str, Any]:
    """All facts, each part by itself: one that fails leaves its reason under `errors`."""
    parts: dict[str, Callable[[], Any]] = {
        "system": system.python,
        "packages": system.packages,
        "interpreters": lambda: {name: system.interpreter(name) for name in asked["interpreters"]},
        "commands": lambda: system.commands(asked["commands"]),
        "libraries": lambda: {name: system.library(name) for name in asked["libraries"]},
        "devices": system.devices,
        "gpu": lambda: system.gpu() if "GPU" in asked["accelerators"] else None,
        "npu": lambda: system.npu() if "NPU" in asked["accelerators"] else None,
        "rdma_devices": system.rdma_devices,
        "memory_bytes": system.memory_bytes,
        "shm": system.shm,
        "limits": system.limits,
        "ephemeral": system.ephemeral,
        "ports": lambda: [system.port(p["port"], p["address"]) for p in asked["ports"]],
        "folders": disk.folders,
        "models": lambda: disk.models(asked["models"]),
        "container": lambda: system.container(**asked["container"]) if asked["container"] else None,
    }
    facts: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, look in parts.items():
        try:
            facts[name] = look()
        except Exception as error:  # whatever a strange host makes of one, the rest is told
            errors[name] = f"{type(error).__name__}: {error}"
    facts["errors"] = errors
    return facts


def _answer(message: dict[str, Any]) -> None:
    try:
        _say({"id": message["id"], "answer": _do(message)})
    except Exception as error:  # the other side must not wait for an answer in vain
        _say({"id": message.get("id"), "error": f"{type(error).__name__}: {error}"})


def _do(message: dict[str, Any]) -> Any:
    if message["do"] == "clock":
        return time.time()
    if message["do"] == "facts":
        return gather(message["about"])
    if message["do"] == "listen":
        listener = reach.Listener(message["address"], message["low"], message["high"])
        return {"port": listener.port, "word": listener.word}
    if message["do"] == "connect":
        return reach.reach(message["targets"])
    raise ValueError(f"asked to {message['do']}")


def _lines() -> Iterator[bytes]:
    """Lines of input, until it ends or is silent for too long. Not by `sys.stdin`, whose buffer
    hides from `select` what it has read ahead."""
    descriptor = sys.stdin.fileno()
    held = b""
    while select.select([descriptor], [], [], _IDLE_S)[0]:
        more = os.read(descriptor, 65536)
        if not more:
            return
        *whole, held = (held + more).split(b"\n")
        yield from whole


def _say(message: dict[str, Any]) -> None:
    with _out_guard:
        try:
            sys.stdout.write(MARK + json.dumps(message) + "\n")
            sys.stdout.flush()
        except OSError:
            _end()


def _end() -> None:
    """At once, with all children: nobody hears us any more."""
    with contextlib.suppress(Exception):
        commands.end_all()
    os._exit(0)
