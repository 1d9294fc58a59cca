"""Accepted drafts by position: from counts to shares, and summed over workers and time."""

from __future__ import annotations

import pytest

from cluster.control.points import came, plus
from cluster.workers.report import Counters


def test_shares_are_of_the_drafts_and_add_up_to_the_acceptance_length():
    counters = Counters(spec_drafts=10, spec_accepted=15, spec_accepted_per_position=(8, 5, 2))
    assert counters.acceptance_per_position == (0.8, 0.5, 0.2)
    assert counters.acceptance_length == pytest.approx(1 + sum(counters.acceptance_per_position))


def test_without_drafts_there_are_no_shares():
    assert Counters(spec_accepted_per_position=(0, 0)).acceptance_per_position == ()


def test_what_came_since_is_counted_by_position():
    before = Counters(spec_drafts=4, spec_accepted=3, spec_accepted_per_position=(2, 1))
    now = Counters(spec_drafts=9, spec_accepted=7, spec_accepted_per_position=(5, 2))
    assert came(now, before).spec_accepted_per_position == (3, 1)
    assert came(now, Counters()).spec_accepted_per_position == (5, 2)


def test_workers_that_draft_unlike_many_tokens_are_added_by_position():
    two = Counters(spec_drafts=4, spec_accepted=3, spec_accepted_per_position=(2, 1))
    one = Counters(spec_drafts=1, spec_accepted=1, spec_accepted_per_position=(1,))
    assert plus(one, two).spec_accepted_per_position == (3, 1)
    assert plus(two, Counters()).spec_accepted_per_position == (2, 1)
