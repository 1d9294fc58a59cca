"""A Prometheus that runs, as tests ask it."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request


class Prometheus:
    """`url`: http://host:port."""

    def __init__(self, url: str) -> None:
        self.url = url

    def targets(self) -> list[dict[str, str]]:
        """The labels of what is scraped, and `health`."""
        found = self._ask("targets?state=active")["activeTargets"]
        return [{**target["labels"], "health": target["health"]} for target in found]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, now."""
        found = self._ask("query?" + urllib.parse.urlencode({"query": expression}))["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def wait_for(self, expression: str, within_s: float = 30.0) -> list[tuple[dict, float]]:
        """As `query`, as soon as there is something."""
        deadline_s = time.monotonic() + within_s
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline_s, f"no data within {within_s} s: {expression}"
            time.sleep(0.3)
        return found

    def _ask(self, path: str) -> dict:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]
