from cluster.workers.logs import LAST_WORDS_LINES, last_words, read_window, telling_lines

CHAINED = """\
INFO 11-24 api_server.py:10] vLLM API server version 0.32.0
(EngineCore pid=12) ERROR 11-24 core.py:20] EngineCore failed to start.
(EngineCore pid=12) ERROR 11-24 core.py:20] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-24 core.py:20]   File "core.py", line 1, in run
(EngineCore pid=12) ERROR 11-24 core.py:20]     load()
(EngineCore pid=12) ERROR 11-24 core.py:20] ValueError: No available memory for the cache blocks.
Traceback (most recent call last):
  File "api_server.py", line 2, in main
    wait_for_engine_startup()
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_last_words_hold_the_first_cause_and_the_end():
    words = telling_lines(CHAINED + "\n".join(f"shutdown line {n}" for n in range(40)))
    assert len(words) <= LAST_WORDS_LINES
    assert any("No available memory for the cache blocks." in word for word in words)
    assert words[-1] == "shutdown line 39"


def test_a_deep_traceback_keeps_its_last_lines():
    frames = "".join(f'  File "f{n}.py", line {n}, in f\n    f()\n' for n in range(60))
    words = telling_lines(
        f"Traceback (most recent call last):\n{frames}torch.cuda.OutOfMemoryError: x\n"
    )
    assert "torch.cuda.OutOfMemoryError: x" in words
    assert any('"f59.py"' in word for word in words)


def test_without_a_traceback_the_end_of_the_log_is_told_without_colours():
    text = "".join(f"\x1b[31mline {n}\x1b[0m\n\n" for n in range(100))
    words = telling_lines(text)
    assert len(words) == LAST_WORDS_LINES
    assert words[-1] == "line 99"


def test_a_missing_log_has_no_words_and_an_unreadable_one_says_so(tmp_path):
    assert last_words(tmp_path / "none.log") == ()
    assert "cannot be read" in last_words(tmp_path)[0]


def test_a_log_is_read_on_from_where_the_reader_was(tmp_path):
    path = tmp_path / "w.log"
    path.write_bytes(b"one\ntwo\n")
    data, offset = read_window(path, 0, 4)
    assert (data, offset) == (b"one\n", 4)
    assert read_window(path, offset, 100) == (b"two\n", 8)
    assert read_window(path, 8, 100) == (b"", 8)
    assert read_window(path, -4, 100) == (b"two\n", 8)
    assert read_window(path, -999, 100) == (b"one\ntwo\n", 8)


def test_a_follower_gets_the_rest_of_a_log_that_was_moved_away(tmp_path):
    path = tmp_path / "w.log"
    (tmp_path / "w.log.1").write_bytes(b"old old old rest\n")
    path.write_bytes(b"new\n")
    data, offset = read_window(path, 12, 100)
    assert (data, offset) == (b"rest\n", 0)
    assert read_window(path, offset, 100) == (b"new\n", 4)
