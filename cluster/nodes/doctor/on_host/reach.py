"""Can one host reach another? A listener for a moment on one, connections from the others."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import threading
from typing import Any

_CONNECT_BOUND_S = 3.0
_LISTEN_TRIES = 50
_AT_ONCE = 32


class Listener:
    """Listens on a free port in [low, high) and greets whoever connects with its word, so that a
    connection that ended up somewhere else is noticed. Ends with the process."""

    def __init__(self, address: str, low: int, high: int) -> None:
        """Raises: OSError: the address is not this host's, or no port is free."""
        self.word = secrets.token_hex(8)
        self._socket, self.port = _bind(address, low, high)
        threading.Thread(target=self._greet, name="listen", daemon=True).start()

    def _greet(self) -> None:
        while True:
            peer, _ = self._socket.accept()
            with contextlib.suppress(OSError), peer:
                peer.sendall(self.word.encode())


def reach(targets: list[dict[str, Any]]) -> dict[str, str]:
    """By address: "" if the listener of that host answered, else why not."""
    results: dict[str, str] = {}
    for start in range(0, len(targets), _AT_ONCE):
        threads = [
            threading.Thread(target=_connect, args=(target, results))
            for target in targets[start : start + _AT_ONCE]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def _bind(address: str, low: int, high: int) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(_LISTEN_TRIES):
        port = low + secrets.randbelow(max(high - low, 1))
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.bind((address, port))
            server.listen(128)
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return server, port
    raise OSError(f"no free port on {address} in {low}-{high - 1}")


def _connect(target: dict[str, Any], results: dict[str, str]) -> None:
    address = target["address"]
    try:
        with socket.create_connection((address, target["port"]), _CONNECT_BOUND_S) as peer:
            word = peer.recv(64).decode("ascii", "replace")
        results[address] = "" if word == target["word"] else "somebody else answers there"
    except socket.timeout:  # noqa: UP041  TimeoutError is another class before Python 3.10
        results[address] = f"no answer within {_CONNECT_BOUND_S:g} s"
    except OSError as error:
        results[address] = error.strerror or str(error)
