"""Secrets of a cluster: the endpoint's API keys, the control API's token, the engines' key, Ray's
token.

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
from cluster.topology.schema import AuthSpec, ControlSpec

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
    if auth.keys_file is not None:
        auth = auth.model_copy(update={"keys_file": auth.keys_file.expanduser()})
    found = key_hashes(auth, paths.api_key)
    _warn_if_open(api_key_file(auth, paths), warn)
    return found


def api_key_file(auth: AuthSpec, paths: ClusterPaths) -> Path | None:
    """The file that holds the endpoint's keys; None if they are in a variable."""
    return _file(auth.keys_file, auth.keys_env, paths.api_key)


def control_token(control: ControlSpec, paths: ClusterPaths, warn: Callable[[str], None]) -> str:
    """The token of the control API; made if the topology says nothing of where it is.

    Raises: InvalidInput: the file or variable that the topology names holds none."""
    file = token_file(control, paths)
    if file == _made_token_file(paths):
        return kept_secret(file, prefix="pdctl-")
    token = first_key(str(file) if file is not None else None, control.token_env)
    assert token is not None  # one of the two is given
    _warn_if_open(file, warn)
    return token


def token_file(control: ControlSpec, paths: ClusterPaths) -> Path | None:
    """The file that holds the control API's token; None if it is in a variable."""
    return _file(control.token_file, control.token_env, _made_token_file(paths))


def _made_token_file(paths: ClusterPaths) -> Path:
    return paths.state / "control-token"


def _file(stated: Path | None, variable: str | None, made: Path) -> Path | None:
    if variable is not None:
        return None
    return stated.expanduser().absolute() if stated is not None else made


def _warn_if_open(file: Path | None, warn: Callable[[str], None]) -> None:
    if file is not None and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        warn(f"{file} can be read by others; make it yours alone: chmod 600 {file}")


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
