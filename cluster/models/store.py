"""`model.id` of a topology → something an engine can load.

    builtin id     made here, once, into the cache (models.cache)
    local folder   looked at, not copied (models.folder)
    anything else  a hub id, handed to the engine as it is; nothing is downloaded

    place_on_node  the same once more on each node of a worker: made, or known to be there

Called by: launcher, before anything is started; workers, on their own node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.models import cache, folder, simulated, smollm2, tiny_glm
from cluster.models.errors import ModelError
from cluster.models.progress import Progress
from cluster.topology.schema import ModelSpec

__all__ = ["BUILTIN", "ModelError", "Progress", "ResolvedModel", "place_on_node", "resolve"]


class Maker(Protocol):
    """What a module that makes a model folder has. `NEEDED_BYTES`: most on disk at once."""

    ID: str
    REVISION: str
    NEEDED_BYTES: int

    def fill(self, folder: Path, progress: Progress, /) -> None:
        """Raises: ModelError, OSError."""
        ...


_MAKERS: tuple[Maker, ...] = (smollm2, simulated, tiny_glm)
BUILTIN: Mapping[str, Maker] = {maker.ID: maker for maker in _MAKERS}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Digests that say what was asked for, not what was seen (see `_hub`, control.state).
_UNSEEN = ("hub:", "id:")
# config.json's key for the longest sequence, by age and family of the model.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that engines can be started with. `digest` is equal on two nodes only if both
    have the same model; `config` is config.json, empty for a hub id."""

    path: str
    is_local: bool
    digest: str
    config: Mapping[str, Any]
    max_model_len_tokens: int


def resolve(model: ModelSpec, progress: Progress) -> ResolvedModel:
    """Blocks: seconds for a builtin that is not in the cache yet, else milliseconds (0.3 s to
    verify the cached default model).

    Raises: ModelError.
    Cancel: KeyboardInterrupt leaves no half model."""
    if model.id in BUILTIN:
        _refuse_revision(model)
        maker = BUILTIN[model.id]
        place = cache.ensure(maker.ID, maker.REVISION, maker.NEEDED_BYTES, maker.fill, progress)
        return _local(model, place, needs_weights=model.id != simulated.ID)
    place = Path(model.id).expanduser()
    if place.exists() or not _HUB_ID.fullmatch(model.id):
        _refuse_revision(model)
        return _local(model, place.absolute(), needs_weights=True)
    return _hub(model)


def place_on_node(model: ModelSpec, path: str, digest: str, node: str, progress: Progress) -> str:
    """What the engine on this node (`node`: its address, for people) loads for `model`, which was
    resolved elsewhere to `path` with `digest`.

    A builtin is made here if it is missing. Anything else with an absolute path must lie at the
    same place on every node, and be the same; a hub id goes through. Blocks as `resolve`.

    Raises: ModelError: it is missing here, or is another model than the one with `digest`.
    Cancel: KeyboardInterrupt leaves no half model."""
    if model.id in BUILTIN:
        return path if Path(path).is_dir() else resolve(model, progress).path
    place = Path(path).expanduser()
    if not place.is_absolute():
        return path
    if not place.is_dir():
        raise ModelError(
            path,
            f"is missing on node {node}",
            "copy the model there: it must be at this path on every node that its pools may use; "
            "`pdcluster doctor FILE` looks at all of them",
        )
    # Another node's digest is known only if `up` saw the folder itself.
    if not digest.startswith(_UNSEEN) and folder.inspect(place).digest != digest:
        raise ModelError(
            path,
            f"is another model on node {node} than where `up` ran: config.json, or the name, size "
            "or header of a weight file differs",
            "copy the same files to every node; `pdcluster doctor FILE` compares them",
        )
    return str(place)


def _local(model: ModelSpec, place: Path, needs_weights: bool) -> ResolvedModel:
    found = folder.inspect(place, needs_weights)
    limit = model.max_model_len_tokens or _config_limit(found.config)
    if limit is None:
        raise ModelError(
            model.id,
            f"config.json has none of {', '.join(_LENGTH_KEYS)}",
            "give model.max_model_len_tokens",
        )
    return ResolvedModel(str(place), True, found.digest, found.config, limit)


def _hub(model: ModelSpec) -> ResolvedModel:
    if model.max_model_len_tokens is None:
        raise ModelError(
            model.id,
            "is no builtin and no folder here, so a hub id, whose config is not known before an "
            "engine loads it",
            "give model.max_model_len_tokens, or the path of a folder",
        )
    digest = f"hub:{model.id}@{model.revision or 'main'}"
    return ResolvedModel(model.id, False, digest, {}, model.max_model_len_tokens)


def _config_limit(config: Mapping[str, Any]) -> int | None:
    # Multimodal configs keep the language model's own one level down.
    for part in (config, config.get("text_config") or {}):
        for key in _LENGTH_KEYS:
            if isinstance(part.get(key), int) and part[key] > 0:
                return int(part[key])
    return None


def _refuse_revision(model: ModelSpec) -> None:
    if model.revision is not None:
        raise ModelError(
            model.id, f"has no revision {model.revision!r}: only a hub id has", "leave it out"
        )
