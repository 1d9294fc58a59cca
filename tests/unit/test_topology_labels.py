"""Label selectors, as Ray reads them."""

import pytest

from cluster.topology.labels import label_matches


@pytest.mark.parametrize(
    ("selector", "value", "matches"),
    [
        ("h200", "h200", True),
        ("h200", "h100", False),
        ("h200", None, False),
        ("!h200", "h100", True),
        ("!h200", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a,b)", "a", False),
        ("!in(a,b)", "c", True),
        ("intel", "intel", True),  # begins like in(...)
        ("in(a", "b", True),  # not a selector: Ray says so
    ],
)
def test_label_selectors_mean_what_ray_means_by_them(selector, value, matches):
    assert label_matches(selector, value) is matches
