"""Remembered stretches give the ids that the whole text gives."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from cluster.gateway.tokens import Encoder


def byte_level(*special: AddedToken | str) -> tokenizers.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ġ", "the"), ("a", "a")]
    names = [*letters, *("".join(pair) for pair in merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


TOKENIZER = byte_level("<|im_start|>", "<|im_end|>", "<|im|>", "<s>")
ENCODER = Encoder(TOKENIZER)
PIECES = ["<|im_start|>", "<|im_end|>", "<|im|>", "<s>", " ", "\n", "the", " a", "<", "|im", "日本"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map("".join))
def test_ids_are_those_of_the_whole_text(text):
    assert ENCODER.remembers
    assert ENCODER.encode(text, False) == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_a_chats_next_turn_costs_only_its_new_message():
    encoder = Encoder(TOKENIZER)
    history = "<|im_start|>" + "the cat " * 500 + "<|im_end|>"
    encoder.encode(history, False)
    before = encoder.remembered_tokens
    encoder.encode(history + "<|im_start|>and now<|im_end|>", False)
    assert 0 < encoder.remembered_tokens - before <= len("and now")


def test_private_texts_leave_no_trace():
    encoder = Encoder(TOKENIZER)
    before = encoder.remembered_tokens
    text = "<s>the secret"
    assert encoder.encode(text, False, may_remember=False) == TOKENIZER.encode(text).ids
    assert encoder.remembered_tokens == before


def test_memory_is_bounded():
    encoder = Encoder(TOKENIZER, max_tokens=100)
    for number in range(200):
        text = f"<s>{number} zzz"
        assert encoder.encode(text, False) == TOKENIZER.encode(text).ids
        assert encoder.remembered_tokens <= 100


@pytest.mark.parametrize(
    "special",
    [
        AddedToken("<s>", special=True, lstrip=True),
        AddedToken("<s>", special=True, rstrip=True),
        AddedToken("<s>", special=True, single_word=True),
    ],
)
def test_special_tokens_that_swallow_their_surroundings_are_not_cut_at(special):
    tokenizer = byte_level(special)
    encoder = Encoder(tokenizer)
    text = "the <s> a<s>a"
    assert encoder.encode(text, False) == tokenizer.encode(text).ids
    assert not encoder.remembers


def test_tokenizer_that_marks_a_texts_beginning_is_not_cut():
    letters = sorted({"▁", *"abcdefghijklmnopqrstuvwxyz"})
    tokenizer = tokenizers.Tokenizer(
        models.BPE({letter: index for index, letter in enumerate(letters)}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>"])
    encoder = Encoder(tokenizer)
    assert not encoder.remembers
    assert encoder.encode("a<s>a", False) == tokenizer.encode("a<s>a").ids
