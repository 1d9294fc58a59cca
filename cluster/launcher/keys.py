"""Secrets of a cluster: the endpoint's API keys, the engines' key, Ray's token.

Each is a file that only its user can read, made once and kept; none is ever in argv, in a log, or
in the topology.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from cluster.errors import InvalidInput
from cluster.gateway.auth import key_hashes
from cluster.settings import ClusterPaths
from cluster.topology.schema import AuthSpec

_KEY_BYTES = 32


def kept_secret(path: Path, prefix: str = "") -> str:
    """The secret in `path`, made if there is none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        found = path.read_text(encoding="utf-8").strip()
        if found:
            return found
        raise InvalidInput(f"{path}: is empty; delete it, and the next `up` makes a key") from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        made = prefix + secrets.token_urlsafe(_KEY_BYTES)
        file.write(made + "\n")
    return made


def endpoint_hashes(
    auth: AuthSpec | None, paths: ClusterPaths, warn: Callable[[str], None]
) -> tuple[bytes, ...] | None:
    """Digests of the keys that clients may use; None: no key is asked for.

    Raises: InvalidInput: the file or variable that the topology names holds no key."""
    if auth is None:
        return None
    if auth.keys_file is None and auth.keys_env is None:
        kept_secret(paths.api_key, prefix="pdc-")
    found = key_hashes(auth, paths.api_key)
    file = auth.keys_file or (None if auth.keys_env else paths.api_key)
    if file is not None and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        warn(f"{file} can be read by others; make it yours alone: chmod 600 {file}")
    return found


def first_key(key_file: str | None, key_env: str | None) -> str | None:
    """The first accepted key, for pdcluster's own requests; None if the endpoint asks for none.

    Raises: InvalidInput."""
    if key_env is not None:
        text = os.environ.get(key_env, "").replace(",", "\n")
        where = f"environment variable {key_env}"
    elif key_file is not None:
        where = key_file
        try:
            text = Path(key_file).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"{key_file}: cannot be read ({error.strerror})") from error
    else:
        return None
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            return line.strip()
    raise InvalidInput(f"{where}: holds no API key")
