"""KV-cache bytes of one token, from a model's config.json. Pure arithmetic.

The figure is for one full copy: grouped-query models split it over tensor-parallel ranks (down
to one KV head each), latent-attention models keep it whole on every rank. Layers of a drafter
(MTP, EAGLE) come on top, and so does what an engine wastes in the last block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import InvalidInput

# Kinds of layers in `layer_types` that keep K and V of every token. A sliding window bounds how
# many tokens a layer keeps, not the bytes of one that it keeps.
_KEEPS_KV = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
_KEEPS_STATE = frozenset({"linear_attention", "conv", "mamba"})

# Keys of models whose layers differ in ways that the formulas below do not know.
_UNEQUAL_LAYERS = (
    "attn_layer_period",
    "attn_type_list",
    "block_configs",
    "compress_ratios",
    "global_head_dim",
    "hybrid_override_pattern",
    "layers_block_type",
    "num_global_key_value_heads",
    "num_kv_shared_layers",
    "swa_head_dim",
    "swa_num_key_value_heads",
)

# fp8 values of the sparse-attention cache share one float32 scale per 128 of them.
_FP8_GROUP = 128
_SCALE_BYTES = 4
_BF16_BYTES = 2


def kv_bytes_per_token(config: Mapping[str, Any], kv_dtype_bytes: float) -> int:
    """Bytes that one token takes in the KV cache, over all layers of one full copy.

    `kv_dtype_bytes`: 4 float32, 2 bfloat16 or float16, 1 fp8 or int8 (> 0). A multimodal
    config's `text_config` is used if there is one.

    Formulas:
      grouped-query  layers x KV heads x 2 x head_dim x dtype (Ainslie et al. 2023)
      latent (MLA)   layers x (kv_lora_rank + qk_rope_head_dim) x dtype (DeepSeek-V2, 2024)
      latent sparse  at 1 byte: fp8 latent + a scale per 128 + bf16 rotary part (vLLM
                     v1/attention/backends/mla/flashmla_sparse.py, format fp8_ds_mla); always
                     plus the indexer's fp8 key and its scales, in the layers that own an
                     indexer (vLLM model_executor/models/deepseek_v2.py)

    Raises: InvalidInput: the config lacks a key, or describes layers not covered here."""
    if kv_dtype_bytes <= 0:
        raise InvalidInput(f"kv_dtype_bytes: found {kv_dtype_bytes}; give a number above 0")
    text: Mapping[str, Any] = config.get("text_config") or config
    layers = _attention_layers(text)
    if text.get("kv_lora_rank"):
        return round(layers * _latent_bytes(text, kv_dtype_bytes) + _indexer_bytes(text, layers))
    heads = text.get("num_key_value_heads") or _int(text, "num_attention_heads")
    return round(layers * heads * 2 * _head_dim(text) * kv_dtype_bytes)


def _attention_layers(text: Mapping[str, Any]) -> int:
    unequal = [key for key in _UNEQUAL_LAYERS if text.get(key)]
    if unequal:
        raise InvalidInput(
            f"KV bytes per token are not known for a {text.get('model_type', 'model')!r} whose "
            f"config.json has {', '.join(unequal)}: its layers keep unequal caches"
        )
    kinds = text.get("layer_types")
    if kinds is None:
        return _int(text, "num_hidden_layers")
    unknown = sorted(set(kinds) - _KEEPS_KV - _KEEPS_STATE)
    if unknown:
        raise InvalidInput(
            f"KV bytes per token are not known for layer_types {', '.join(unknown)} in config.json"
        )
    return sum(kind in _KEEPS_KV for kind in kinds)


def _latent_bytes(text: Mapping[str, Any], dtype_bytes: float) -> float:
    latent = _int(text, "kv_lora_rank")
    rotary = _int(text, "qk_rope_head_dim")
    if text.get("index_topk") and dtype_bytes == 1:
        return latent + latent // _FP8_GROUP * _SCALE_BYTES + rotary * _BF16_BYTES
    return (latent + rotary) * dtype_bytes


def _indexer_bytes(text: Mapping[str, Any], layers: int) -> int:
    if not text.get("index_topk"):
        return 0
    key = _int(text, "index_head_dim")
    pattern = text.get("index_topk_pattern")
    if pattern is not None:
        owners = sum(letter != "S" for letter in pattern[:layers]) + max(layers - len(pattern), 0)
    else:
        every = text.get("index_topk_freq") or 1
        first = text.get("index_skip_topk_offset", 2) - 1
        owners = sum(max(layer - first, 0) % every == 0 for layer in range(layers))
    return int(owners) * (key + key // _FP8_GROUP * _SCALE_BYTES)


def _head_dim(text: Mapping[str, Any]) -> int:
    if text.get("head_dim"):
        return _int(text, "head_dim")
    return _int(text, "hidden_size") // _int(text, "num_attention_heads")


def _int(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidInput(
            f"config.json {key}: found {value!r}; KV bytes per token need a whole number above 0"
        )
    return value
