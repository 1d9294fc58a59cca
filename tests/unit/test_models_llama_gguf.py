"""GGUF to safetensors on a model of a few numbers, written with the gguf package itself."""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from cluster.models import llama_gguf

HIDDEN, HEADS, KV_HEADS, FFN = 8, 2, 1, 32
TOKENS = ["<|end|>", *"abcdefgh 0123456789".replace(" ", "Ġ"), "ab", "ĠĠ"]
PARTS = {
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def write_gguf(path, weights, architecture="llama", quantized=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b", "Ġ Ġ"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, values in weights.items():
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_safetensors(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    tensors = {}
    for name, tensor in header.items():
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        assert tensor["dtype"] == "BF16"
        halves = np.frombuffer(raw[start:end], dtype=np.uint16).astype(np.uint32) << 16
        tensors[name] = halves.view(np.float32).reshape(tensor["shape"])
    return tensors


@pytest.fixture
def weights():
    # Whole numbers up to 256 are exact in bfloat16, so that equality means equality.
    rng = np.random.default_rng(7)
    made = {
        f"blk.0.{part}.weight": rng.integers(-128, 128, shape).astype(np.float32)
        for part, shape in PARTS.items()
    }
    made["token_embd.weight"] = rng.integers(-128, 128, (len(TOKENS), HIDDEN)).astype(np.float32)
    made["output_norm.weight"] = np.ones(HIDDEN, dtype=np.float32)
    return made


@pytest.fixture
def converted(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights)
    llama_gguf.convert(tmp_path / "m.gguf", tmp_path, lambda part: None)
    return tmp_path


def test_weights_get_their_names_and_keep_their_values(converted, weights):
    tensors = read_safetensors(converted / "model.safetensors")
    assert len(tensors) == len(weights)
    same = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    for name, source in same.items():
        np.testing.assert_array_equal(tensors[name], weights[source])


def test_rotary_rows_are_stacked_by_half_within_each_head(converted, weights):
    query = read_safetensors(converted / "model.safetensors")[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    # Head 0 in GGUF: rows a0 b0 a1 b1; in Hugging Face's layout: a0 a1 b0 b1. Head 1 likewise.
    np.testing.assert_array_equal(query, weights["blk.0.attn_q.weight"][[0, 2, 1, 3, 4, 6, 5, 7]])


def test_quantized_weights_come_out_as_the_package_dequantizes_them(tmp_path, weights):
    name = "blk.0.ffn_down.weight"
    write_gguf(tmp_path / "m.gguf", weights, quantized=(name,))
    llama_gguf.convert(tmp_path / "m.gguf", tmp_path, lambda part: None)
    found = read_safetensors(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert found.shape == weights[name].shape
    np.testing.assert_allclose(found, weights[name], atol=1.0)


def test_config_says_what_the_file_says(converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100_000.0
    assert (config["head_dim"], config["num_key_value_heads"]) == (4, 1)
    assert config["max_position_embeddings"] == 64
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0


def test_tokenizer_splits_digits_before_words(converted):
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.encode("ab  12").tokens == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|end|>ab").ids == [0, TOKENS.index("ab")]


def test_progress_ends_at_one(tmp_path, weights):
    parts = []
    write_gguf(tmp_path / "m.gguf", weights)
    llama_gguf.convert(tmp_path / "m.gguf", tmp_path, parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_a_tensor_without_a_place_is_refused(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", {**weights, "output.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(ValueError, match=r"'output\.weight' has no place"):
        llama_gguf.convert(tmp_path / "m.gguf", tmp_path, lambda part: None)


def test_another_architecture_is_refused(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights, architecture="gemma")
    with pytest.raises(ValueError, match="'gemma' is not llama"):
        llama_gguf.convert(tmp_path / "m.gguf", tmp_path, lambda part: None)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F80_0000, 0x3F80),  # exact
        (0x3F80_7FFF, 0x3F80),  # below the middle
        (0x3F80_8001, 0x3F81),  # above
        (0x3F80_8000, 0x3F80),  # tie: the even neighbour is below
        (0x3F81_8000, 0x3F82),  # tie: the even neighbour is above
        (0x8000_0000, 0x8000),  # -0.0
        (0x3FFF_FFFF, 0x4000),  # carries into the exponent
    ],
)
def test_bfloat16_rounds_to_nearest_and_ties_to_even(bits, expected):
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    assert llama_gguf._bfloat16(value)[0] == expected
