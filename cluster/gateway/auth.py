"""API keys: where they come from, and whether a request carries one.

Keys are kept and compared as SHA-256 digests, in constant time: neither a core dump nor a
stopwatch gives one away.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.errors import InvalidInput
from cluster.gateway import errors
from cluster.topology.schema import AuthSpec


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_hashes(
    auth: AuthSpec | None, default_file: Path, environ: Mapping[str, str] | None = None
) -> tuple[bytes, ...] | None:
    """Digests of the accepted keys, or None if the endpoint asks for none.

    `default_file` is read when `auth` names neither a file nor a variable. Empty lines and lines
    that begin with `#` are skipped. Raises: InvalidInput.
    """
    if auth is None:
        return None
    if auth.keys_env is not None:
        text = (os.environ if environ is None else environ).get(auth.keys_env, "")
        keys = [key.strip() for key in text.split(",")]
        where = f"environment variable {auth.keys_env} (gateway.auth.keys_env)"
    else:
        path = auth.keys_file or default_file
        where = f"{path} (gateway.auth.keys_file)"
        try:
            keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"{where}: cannot be read ({error}); write a file with one API key per line"
            ) from error
    hashes = tuple(hash_key(key) for key in keys if key and not key.startswith("#"))
    if not hashes:
        raise InvalidInput(f"{where}: holds no API key; add one, or set gateway.auth to null")
    return hashes


class Authenticator:
    """Checks the Authorization header against a fixed set of digests."""

    def __init__(self, hashes: Iterable[bytes] | None) -> None:
        self._hashes = None if hashes is None else tuple(hashes)

    def check(self, authorization: bytes | None) -> None:
        """Raises: ApiError 401."""
        if self._hashes is None:
            return
        if authorization is None:
            raise errors.no_key()
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            raise errors.no_key()
        digest = hashlib.sha256(key).digest()
        # Every digest is compared, so that the time says nothing about which one matched.
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        if not any(matches):
            raise errors.wrong_key()
