import pytest

from cluster.identity import Role, WorkerId, WorkerState
from cluster.workers.gang import merge
from cluster.workers.report import WorkerReport


def report(state, ip="10.0.0.1", message="", rss=10, last_words=(), node="n1", lost=0):
    return WorkerReport(
        id=WorkerId("decode", 0, 1),
        role=Role.DECODE,
        state=state,
        message=message,
        node_ip=ip,
        url="http://10.0.0.1:20000" if ip == "10.0.0.1" else "",
        started_at_s=0.0,
        rss_bytes=rss,
        last_words=last_words,
        revision="abc",
        node_id=node,
        node_ids=(node,),
        log_lines_lost=lost,
    )


READY, FAILED, STOPPED = WorkerState.READY, WorkerState.FAILED, WorkerState.STOPPED
DRAINING = WorkerState.DRAINING


def test_a_replica_on_one_node_reports_as_it_is():
    assert merge([report(READY)]) == report(READY)


def test_a_gang_is_ready_when_every_rank_is_and_its_memory_adds_up():
    merged = merge([report(READY), report(READY, "10.0.0.2")])
    assert (merged.state, merged.url, merged.rss_bytes) == (READY, "http://10.0.0.1:20000", 20)


def test_a_gang_is_not_ready_while_one_rank_starts():
    merged = merge([report(READY), report(WorkerState.STARTING, "10.0.0.2")])
    assert merged.state is WorkerState.WARMING
    assert merged.message == "rank 1 on 10.0.0.2 is starting"


def test_one_failed_rank_fails_the_gang_and_says_which():
    failed = report(FAILED, "10.0.0.3", "exit code 1", last_words=("boom",))
    merged = merge([report(READY), report(READY, "10.0.0.2"), failed])
    assert merged.state is FAILED
    assert merged.message == "rank 2 on 10.0.0.3: exit code 1"
    assert merged.last_words == ("boom",)


def test_a_rank_that_stopped_while_the_head_serves_has_left_its_gang():
    merged = merge([report(READY), report(STOPPED, "10.0.0.2")])
    assert (merged.state, merged.message) == (FAILED, "rank 1 on 10.0.0.2: it has stopped")


@pytest.mark.parametrize("other", [STOPPED, DRAINING, READY])
def test_a_gang_that_drains_is_as_its_head_is_whatever_the_others_have_done_by_then(other):
    assert merge([report(DRAINING), report(other, "10.0.0.2")]).state is DRAINING


def test_a_rank_that_fails_takes_the_requests_along_that_a_draining_head_waits_for():
    assert merge([report(DRAINING), report(FAILED, "10.0.0.2", "exit code 1")]).state is FAILED


def test_a_gang_whose_head_has_ended_is_what_the_head_is():
    assert merge([report(STOPPED), report(FAILED, "10.0.0.2")]).state is STOPPED


def test_a_gang_names_the_nodes_of_all_its_ranks_and_its_revision_once():
    merged = merge([report(READY), report(READY, "10.0.0.2", node="n2", lost=3)])
    assert (merged.node_id, merged.node_ids) == ("n1", ("n1", "n2"))
    assert (merged.revision, merged.log_lines_lost) == ("abc", 3)
    assert merge([report(READY), report(FAILED, node="n2")]).node_ids == ("n1", "n2")
