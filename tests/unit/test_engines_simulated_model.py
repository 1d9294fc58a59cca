"""The model that is not there: ids, block keys, stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.simulated.model import (
    Continuation,
    Vocabulary,
    block_keys,
    flat_content,
    spoiled,
)
from cluster.engines.simulated.stops import StopScanner
from cluster.errors import InvalidInput
from cluster.models import store
from cluster.topology.schema import ModelSpec

ids_lists = st.lists(st.integers(0, 258), min_size=1, max_size=80)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    path = store.resolve(ModelSpec(id="simulated"), lambda what, fraction: None).path
    return Vocabulary(path)


def say(vocabulary: Vocabulary, ids: list[int], count: int, foreign: bytes = b"") -> list[int]:
    continuation = Continuation(vocabulary, ids, foreign)
    return [continuation.next(may_end=True) for _ in range(count)]


def test_prompt_plus_sent_tokens_gives_the_rest(vocabulary: Vocabulary):
    @given(ids_lists, st.integers(1, 30))
    def check(ids: list[int], cut: int) -> None:
        whole = say(vocabulary, ids, 30)
        assert say(vocabulary, ids + whole[:cut], 30 - cut) == whole[cut:]

    check()


def test_other_prompts_give_other_text(vocabulary: Vocabulary):
    texts = {tuple(say(vocabulary, [5] * n, 8)) for n in range(1, 200)}
    assert len(texts) == 199


def test_foreign_kv_changes_the_text(vocabulary: Vocabulary):
    assert say(vocabulary, [5, 6], 16) != say(vocabulary, [5, 6], 16, b"wrong")


def test_text_ends_now_and_then_but_not_when_it_may_not(vocabulary: Vocabulary):
    # 8,192 draws at 1 in 1,024: never meeting the end has odds of e^-8.
    assert vocabulary.end_id in say(vocabulary, [5], 8192)
    continuation = Continuation(vocabulary, [5])
    assert vocabulary.end_id not in [continuation.next(may_end=False) for _ in range(8192)]


def test_said_texts_joined_are_the_decoded_ids(vocabulary: Vocabulary):
    ids = [token for token in say(vocabulary, [5], 200) if token != vocabulary.end_id]
    assert "".join(vocabulary.text[token] for token in ids) == vocabulary.decode(ids)


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.5, 4.0, 9.0])
def test_accepted_drafts_have_the_stated_mean_and_never_exceed_the_drafts(
    vocabulary: Vocabulary, mean: float
):
    continuation = Continuation(vocabulary, [7])
    drawn = []
    for _ in range(4000):
        continuation.next(may_end=False)
        drawn.append(continuation.accepted(mean, limit=4))
    assert max(drawn) <= 4
    assert sum(drawn) / len(drawn) == pytest.approx(min(mean, 4), abs=0.05)


@given(ids_lists, st.integers(1, 16))
def test_block_keys_name_all_ids_up_to_their_block(ids: list[int], size: int):
    keys = block_keys(ids, size)
    assert len(keys) == -(-len(ids) // size)
    assert len(set(keys)) == len(keys)
    changed = [ids[0] + 1, *ids[1:]]
    assert not set(keys) & set(block_keys(changed, size))
    whole = len(ids) // size
    assert block_keys([*ids, 1], size)[:whole] == keys[:whole]


def test_spoiled_contents_are_nobodys_right_content():
    keys = block_keys(range(64), 16)
    assert not set(spoiled(keys, b"x")) & set(keys)
    assert spoiled(keys, b"x") != spoiled(keys, b"y")


def test_folder_without_tokenizer_is_refused_with_its_path(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"tokenizer\.json"):
        Vocabulary(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("a", "a"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, "b"], "ab"),
    ],
)
def test_message_content_is_text_or_parts(content: object, text: str):
    assert flat_content(content) == text


def test_message_content_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="int"):
        flat_content(3)


def scan(stops: list[str], include: bool, pieces: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops, include)
    shown = ""
    for piece in pieces:
        text, found = scanner.push(piece)
        shown += text
        if found is not None:
            return shown, found
    return shown + scanner.rest(), None


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_the_same_however_the_text_is_split(text: str, stops: list[str]):
    letter_by_letter = scan(stops, False, list(text))
    first = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    if first is None:
        assert letter_by_letter == (text, None)
    else:
        shown, found = letter_by_letter
        assert found is not None
        assert text.startswith(shown + found)
        assert len(shown + found) == first


def test_stop_string_can_be_kept():
    assert scan(["lo"], True, ["hel", "l", "o you"]) == ("hello", "lo")
