"""Worker ids: what people type, what logs show, and what restarts change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.identity import WorkerId


@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
    st.integers(0, 999),
    st.integers(0, 10**6),
)
def test_an_id_reads_back_as_it_was_written(pool: str, index: int, generation: int) -> None:
    worker = WorkerId(pool, index, generation)
    assert WorkerId.parse(str(worker)) == worker
    assert WorkerId.parse(worker.name) == WorkerId(pool, index)


@pytest.mark.parametrize("text", ["decode", "decode/", "/0", "decode/x", "Decode/0", "decode/0#"])
def test_what_is_not_an_id_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="decode/0"):
        WorkerId.parse(text)


def test_a_restarted_replica_is_not_its_former_self() -> None:
    assert WorkerId("decode", 0, 1) != WorkerId("decode", 0, 2)
    assert WorkerId("decode", 0, 1).name == WorkerId("decode", 0, 2).name
