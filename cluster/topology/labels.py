"""Ray's label selectors, as far as we must judge them before or beside Ray."""

from __future__ import annotations

import re

_SELECTOR = re.compile(r"(?P<no>!?)(?:in\((?P<several>[^()]*)\)|(?P<one>[^()]*))")


def label_matches(selector: str, value: str | None) -> bool:
    """Whether a node whose label is `value` (None: it has no such label) is taken by `selector`:
    `a`, `!a`, `in(a,b)` or `!in(a,b)`. True for any other form: Ray judges that."""
    match = _SELECTOR.fullmatch(selector)
    if match is None:
        return True
    several = match["several"]
    values = {match["one"]} if several is None else {part.strip() for part in several.split(",")}
    return (value in values) is not bool(match["no"])
