import itertools

import pytest

from cluster.identity import ENDED, WorkerState
from cluster.workers.lifecycle import MOVES, Cause, IllegalMove, Lifecycle, step


@pytest.mark.parametrize(("state", "cause"), list(itertools.product(WorkerState, Cause)))
def test_every_pair_moves_as_the_table_says_or_is_refused(state, cause):
    if (state, cause) in MOVES:
        assert step(state, cause) is MOVES[state, cause]
    else:
        with pytest.raises(IllegalMove, match=state.value):
            step(state, cause)


def test_nothing_leaves_an_ended_state():
    assert not [pair for pair in MOVES if pair[0] in ENDED]


def test_every_living_state_can_be_stopped_and_can_fail():
    # CHANGING is what the controller shows of a READY one.
    living = set(WorkerState) - ENDED - {WorkerState.CHANGING}
    assert {state for state, cause in MOVES if cause is Cause.STOP_ASKED} == living - {
        WorkerState.DRAINING
    }
    assert {state for state, cause in MOVES if cause is Cause.BROKE} == living - {
        WorkerState.DRAINING
    }


def test_start_stages_are_timed_and_then_stand_still():
    life = Lifecycle("decode/0#1", 100.0)
    life.move(Cause.SPOKE, 102.0)
    life.move(Cause.LISTENS, 107.0)
    assert life.stage_s(107.5) == {"starting": 2.0, "loading": 5.0, "warming": 0.5}
    life.move(Cause.GENERATED, 108.0)
    assert life.stage_s(900.0) == {"starting": 2.0, "loading": 5.0, "warming": 1.0}


def test_a_move_replaces_the_message_of_the_former_state():
    life = Lifecycle("decode/0#1", 0.0)
    life.note("503 while warming")
    life.move(Cause.LISTENS, 1.0)
    assert life.message == ""
    life.move(Cause.BROKE, 2.0, "exit code 3")
    assert (life.state, life.message) == (WorkerState.FAILED, "exit code 3")
