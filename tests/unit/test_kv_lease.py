"""The table of a transfer's states."""

from __future__ import annotations

import itertools

import pytest

from cluster.kv.lease import ENDED, MOVES, Cause, IllegalMove, State, step

ALL = list(itertools.product(State, Cause))


@pytest.mark.parametrize(("state", "cause"), ALL)
def test_every_pair_moves_stays_at_the_end_or_is_illegal(state: State, cause: Cause) -> None:
    if state in ENDED:
        assert step(state, cause) is state
    elif (state, cause) in MOVES:
        assert step(state, cause) is MOVES[state, cause]
    else:
        with pytest.raises(IllegalMove, match=f"{state} cannot take: {cause}"):
            step(state, cause)


@pytest.mark.parametrize("state", [state for state in State if state not in ENDED])
@pytest.mark.parametrize("cause", [Cause.FINISHED, Cause.ABANDONED, Cause.WORKER_REPLACED])
def test_an_open_transfer_can_always_be_ended(state: State, cause: Cause) -> None:
    assert step(state, cause) in ENDED


def test_only_a_pull_that_was_asked_for_counts_as_pulled() -> None:
    assert [state for (state, _), to in MOVES.items() if to is State.PULLED] == [State.PULLING]


def test_nothing_leaves_an_end() -> None:
    assert not ENDED & {state for state, _ in MOVES}
