import pytest

from cluster.workers.memory import Kills, kills_so_far, shortage

NONE = Kills(3, 1)
TRACE = ("Traceback (most recent call last):", "  File ...", "numpy._core.MemoryError: no 8 GiB")


def test_an_end_that_nothing_about_memory_goes_with_is_left_unexplained():
    assert shortage(True, NONE, NONE, ("last line",)) == ""
    assert shortage(False, NONE, NONE, ()) == ""
    assert shortage(False, Kills(None, None), Kills(None, None), ()) == ""


def test_a_kill_in_the_engines_own_cgroup_is_certain():
    why = shortage(True, NONE, Kills(4, 2), ())
    assert why == "out of memory: the kernel ended a process of its memory cgroup"


def test_a_kill_on_its_node_may_have_been_another_process():
    why = shortage(True, NONE, Kills(5, 1), ())
    assert why == "out of memory? the kernel ended 2 processes of this node for memory"
    # Also one inside an engine whose first process then ends by itself.
    assert shortage(False, NONE, Kills(4, None), ()).startswith("out of memory?")


def test_a_kill_where_the_kernel_tells_nothing_is_asked_about():
    unknown = Kills(None, None)
    why = shortage(True, unknown, unknown, ())
    assert why == "out of memory? the kernel's counters cannot be read here"


@pytest.mark.parametrize(
    "line",
    [
        "MemoryError",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "OSError: [Errno 12] Cannot allocate memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...",
    ],
)
def test_what_an_engine_says_itself_is_repeated(line):
    assert shortage(False, NONE, NONE, ("before", line, "after")) == f"out of memory: {line}"


def test_the_last_complaint_is_shown_and_a_long_one_is_cut():
    assert shortage(False, NONE, NONE, (*TRACE, "MemoryError: " + "x" * 900)).count("x") < 200


def test_a_metric_that_merely_mentions_memory_is_no_complaint():
    line = "Available KV cache memory: 3.1 GiB, GPU memory usage 90 %"
    assert shortage(False, NONE, NONE, (line,)) == ""


def write(root, texts):
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_counters_of_cgroup_2_are_read_from_the_group_of_this_process(tmp_path):
    write(
        tmp_path,
        {
            "proc/vmstat": "nr_free_pages 7\noom_kill 12\n",
            "proc/self/cgroup": "0::/ray/w\n",
            "sys/fs/cgroup/ray/w/memory.events": "low 0\nmax 4\noom 2\noom_kill 5\n",
        },
    )
    assert kills_so_far(tmp_path) == Kills(12, 5)


def test_counters_of_cgroup_1_are_read_from_the_memory_controllers_group(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu,memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 2\n",
        },
    )
    assert kills_so_far(tmp_path) == Kills(None, 2)


def test_a_container_that_sees_its_group_at_the_top_is_counted(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/memory.events": "oom_kill 1\n",
        },
    )
    assert kills_so_far(tmp_path) == Kills(None, 1)


def test_nothing_readable_is_nothing_known(tmp_path):
    assert kills_so_far(tmp_path) == Kills(None, None)
