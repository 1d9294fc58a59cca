"""Commands that pages, runbooks, boards and messages tell people to type are commands that there
are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from cluster.cli.main import build
from cluster.observe.dashboards.files import generated

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TEXTS = {
    **{str(path.relative_to(ROOT)): path.read_text() for path in PAGES},
    **{str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "cluster").rglob("*.py"))},
    **{f"dashboards/{name}": text for name, text in generated().items()},
}
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
IN_BACKTICKS = re.compile(r"`pdcluster ([^`]+)`")
# A line of its own, with what is said of it behind.
A_LINE = re.compile(r"^(?:\$ )?pdcluster ([a-z].*?)(?: {2,}.*| +#.*)?$", re.MULTILINE)
INDENTED = re.compile(r"^ {4}pdcluster ([a-z].*?)(?: {2,}.*| +#.*)?$", re.MULTILINE)
# A name, or one to be filled in.
WORKER = re.compile(r".*/.*|[A-Z]+")
ROOT_COMMAND = typer.main.get_command(build(is_debug=False))


def typed(text: str) -> list[str]:
    """Command lines in a page or a source, each without its first word."""
    text = re.sub(r'"\s*\n\s*f?"', "", text)  # of a string that goes on
    text = re.sub(r"\{\{.*?\}\}", "NAME", text)  # filled in by Prometheus or Grafana
    text = re.sub(r"\{[^{}\n]*\}", " ", text)  # and by Python
    lines = [line for block in FENCED.findall(text) for line in A_LINE.findall(block)]
    prose = FENCED.sub("", text)
    return [*lines, *INDENTED.findall(prose), *IN_BACKTICKS.findall(prose)]


def fault(text: str) -> str:
    """What is wrong with a command line, without its first word; "": nothing."""
    words = re.split(r"\s[|>;(]\s?|\s\|", text)[0].replace("\n", " ").split()
    command, name = ROOT_COMMAND, ""
    while hasattr(command, "commands"):
        if not words:
            return ""  # "`pdcluster dashboards`" as such
        name = words.pop(0).rstrip(",.;:")
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    options = {option for param in command.params for option in (*param.opts, "--help", "--debug")}
    for word in words:
        if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options:
            return f"{name} has no {word}"
    is_of_a_worker = name in ("logs", "role")
    if is_of_a_worker and words and not WORKER.fullmatch(words[0]) and words[0][0] not in "-.":
        return f"{name} is of a worker, not of {words[0]}"
    return ""


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_that_is_named_can_be_typed(name):
    found = [f"{line}: {wrong}" for line in typed(TEXTS[name]) if (wrong := fault(line))]
    assert found == []


def test_commands_are_found_in_all_kinds_of_texts():
    def count(name: str) -> int:
        return len(typed(TEXTS[name]))

    assert count("docs/racks.md") >= 4
    assert count("README.md") > 5
    assert count("cluster/observe/rules_alerts.py") > 10
    assert count("dashboards/overview.json") >= 3


@pytest.mark.parametrize(
    "text",
    ["drain --node NODE", "logs gateway", "dashboard push", "dashboards pull", "stat", "up --wait"],
)
def test_one_that_there_is_not_would_be_found(text):
    assert fault(text)
