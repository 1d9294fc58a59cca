"""`model.id` of a topology → something an engine can load.

    builtin id     made here from public parts, once, into the cache (models.cache)
    local folder   looked at, not copied (models.folder)
    anything else  a hub id, handed to the engine as it is; nothing is downloaded

Called by: launcher, before anything is started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models import cache, folder, simulated, smollm2
from cluster.models.errors import ModelError
from cluster.models.progress import Progress
from cluster.topology.schema import ModelSpec

__all__ = ["BUILTIN", "ModelError", "Progress", "ResolvedModel", "resolve"]

BUILTIN = (smollm2.ID, simulated.ID)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
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
        maker = smollm2 if model.id == smollm2.ID else simulated
        place = cache.ensure(maker.ID, maker.REVISION, maker.NEEDED_BYTES, maker.fill, progress)
        return _local(model, place, needs_weights=maker is smollm2)
    place = Path(model.id).expanduser()
    if place.exists() or not _HUB_ID.fullmatch(model.id):
        _refuse_revision(model)
        return _local(model, place.absolute(), needs_weights=True)
    return _hub(model)


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
