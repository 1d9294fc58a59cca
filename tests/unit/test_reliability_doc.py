"""docs/reliability.md names the test of each promise: those tests exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs/reliability.md").read_text()
SHORT = {"failures/": "integration/failures/"}


def test_every_test_that_a_promise_names_exists():
    named = re.findall(r"`((?:…|[a-z0-9_/]+\.py)(?:::(\w+))?)`", PAGE)
    file = ""
    found = 0
    for whole, test in named:
        path = whole.partition("::")[0]
        if path.startswith("cluster/"):
            assert (TESTS.parent / path).is_file(), path
            continue
        # An ellipsis stands for the file that was named before.
        file = file if path == "…" else path
        for short, full in SHORT.items():
            file = full + file.removeprefix(short) if file.startswith(short) else file
        assert (TESTS / file).is_file(), whole
        assert not test or f"def {test}(" in (TESTS / file).read_text(), whole
        found += 1
    assert found > 30
