"""KV bytes per token against published figures and against vLLM's own layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidInput
from cluster.sizing.kv import kv_bytes_per_token

SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
GLM_5_2 = {
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "hidden_size": 6144,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
}
DEEPSEEK_V3 = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(("dtype_bytes", "expected"), [(4, 46_080), (2, 23_040), (1, 11_520)])
def test_grouped_query_counts_keys_and_values_of_every_kv_head(dtype_bytes, expected):
    assert kv_bytes_per_token(SMOLLM2, dtype_bytes) == expected


def test_stated_head_dim_wins_over_hidden_size_by_heads():
    # Qwen3-0.6B: 16 heads of 128 on a hidden size of 1024.
    qwen = {
        "hidden_size": 1024,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    assert kv_bytes_per_token(qwen, 2) == 114_688


def test_without_num_key_value_heads_every_head_keeps_its_own():
    config = {key: value for key, value in SMOLLM2.items() if key != "num_key_value_heads"}
    assert kv_bytes_per_token(config, 2) == 3 * kv_bytes_per_token(SMOLLM2, 2)


def test_latent_attention_keeps_one_latent_and_one_rotary_key_per_layer():
    assert kv_bytes_per_token(DEEPSEEK_V3, 2) == 70_272
    assert kv_bytes_per_token(DEEPSEEK_V3, 1) == 35_136


def test_glm_5_2_in_bf16_is_latent_plus_21_indexers():
    assert kv_bytes_per_token(GLM_5_2, 2) == 78 * 1152 + 21 * 132 == 92_628


def test_glm_5_2_in_fp8_keeps_the_rotary_part_in_bf16():
    assert kv_bytes_per_token(GLM_5_2, 1) == 78 * 656 + 21 * 132 == 53_940


def test_sparse_attention_without_shared_indexers_has_one_in_every_layer():
    deepseek_v3_2 = {**DEEPSEEK_V3, "index_topk": 2048, "index_head_dim": 128}
    assert kv_bytes_per_token(deepseek_v3_2, 1) == 61 * (656 + 132)


def test_an_indexer_pattern_overrides_the_frequency():
    config = {**GLM_5_2, "index_topk_pattern": "F" + "S" * 77}
    assert kv_bytes_per_token(config, 2) == 78 * 1152 + 132


def test_multimodal_config_is_sized_by_its_text_config():
    assert kv_bytes_per_token({"text_config": SMOLLM2, "num_hidden_layers": 99}, 2) == 23_040


def test_linear_attention_layers_keep_nothing_per_token():
    kinds = (["linear_attention"] * 2 + ["full_attention"]) * 10
    assert kv_bytes_per_token({**SMOLLM2, "layer_types": kinds}, 2) == 7_680


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "num_hidden_layers"),
        ({"num_hidden_layers": 2}, "num_attention_heads"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers"),
        ({"num_hidden_layers": 2, "kv_lora_rank": 512}, "qk_rope_head_dim"),
        ({**SMOLLM2, "layer_types": ["full_attention", "retention"]}, "retention"),
        ({**SMOLLM2, "hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
    ],
)
def test_an_unknown_layout_is_refused_by_name(config, named):
    with pytest.raises(InvalidInput, match=named):
        kv_bytes_per_token(config, 2)


def test_a_dtype_of_no_bytes_is_refused():
    with pytest.raises(InvalidInput, match="kv_dtype_bytes"):
        kv_bytes_per_token(SMOLLM2, 0)


@given(
    layers=st.integers(1, 200),
    heads=st.integers(1, 128),
    head_dim=st.integers(1, 512),
    dtype_bytes=st.sampled_from([1, 2, 4]),
)
def test_twice_the_layers_take_twice_the_bytes(layers, heads, head_dim, dtype_bytes):
    config = {"num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim}
    doubled = {**config, "num_hidden_layers": 2 * layers}
    single = kv_bytes_per_token(config, dtype_bytes)
    assert kv_bytes_per_token(doubled, dtype_bytes) == 2 * single > 0
