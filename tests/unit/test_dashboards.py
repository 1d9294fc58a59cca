"""The boards, as values and as the JSON that is kept in dashboards/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from cluster.observe import catalogue, rules_recording
from cluster.observe.dashboards import files, grafana, promql
from cluster.observe.dashboards.panel import Kind
from cluster.observe.dashboards.variables import CHOICES, EVENTS, TARGETS

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "dashboards"

BOARDS = {files.file_name(board): board for board in files.BOARDS}
PANELS = {
    f"{name}: {panel.asks}": panel for name, board in BOARDS.items() for panel in board.panels()
}
EXPRESSIONS = {
    **{
        f"{name} {number}": query.expr
        for name, panel in PANELS.items()
        for number, query in enumerate(panel.queries)
    },
    **{f"event {event.name}": event.expr for event in EVENTS},
}
GRAFANAS_OWN = {"__rate_interval", "__range"}
VALUES = {"__rate_interval": "1m", "__range": "15m"}
VALUES |= {choice.label: "a|b" for choice in CHOICES} | {t.name: t.default for t in TARGETS}

each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())
each_panel = pytest.mark.parametrize("panel", PANELS.values(), ids=PANELS.keys())
each_expression = pytest.mark.parametrize("expr", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())


def exported_names():
    """Series that exporters declare, that rules record, and that engines have which rules read."""
    named = {
        series for part in catalogue.PARTS for metric in part.metrics for series in metric.series
    }
    recorded = {rule.name for rule in (*rules_recording.ENGINES, *rules_recording.GATEWAYS)}
    read = {name for rule in rules_recording.ENGINES for name in promql.names(rule.expr)}
    return named | recorded | read | {"ALERTS"}


def test_what_is_kept_is_what_is_generated():
    assert files.differing(KEPT) == [], "run `pdcluster dashboards build`"


def test_generating_twice_gives_the_same():
    assert files.generated() == files.generated()


def test_there_are_the_five_boards():
    assert list(BOARDS) == ["overview", "prefill-decode", "kv-transfer", "speculative", "scaling"]


@each_panel
def test_a_panel_asks_a_question_and_says_how_it_is_computed(panel):
    assert panel.asks.endswith("?")
    assert panel.asks[0].isupper()
    assert " = " in panel.formula
    assert panel.formula.endswith((".", ")."))
    assert panel.do.endswith(".")
    assert panel.unit


def test_no_question_is_asked_twice_on_one_board():
    for board in BOARDS.values():
        asked = [panel.asks for panel in board.panels()]
        assert len(asked) == len(set(asked))


@each_panel
def test_lines_that_differ_have_names_that_differ(panel):
    if panel.kind in (Kind.LINES, Kind.BARS) and len(panel.queries) > 1:
        legends = [query.legend for query in panel.queries]
        assert all(legends)
        assert len(legends) == len(set(legends))


@each_expression
def test_every_metric_asked_for_is_exported_or_recorded(expr):
    names = promql.names(expr)
    assert names or expr.startswith("vector"), "no metric was found in it"
    assert names <= exported_names()


def test_a_metric_that_nobody_exports_would_be_found():
    assert not promql.names(promql.pools("pdcluster_worker_upp")) <= exported_names()
    assert promql.names('sum(rate(a_total{x="y"}[1m])) / b:c{}') == {"a_total", "b:c"}


@each_expression
def test_every_variable_is_offered_above_the_board_or_is_grafanas_own(expr):
    offered = {choice.label for choice in CHOICES} | {target.name for target in TARGETS}
    assert promql.variables(expr) <= offered | GRAFANAS_OWN


@each_board
def test_only_boards_with_targets_use_them(board):
    used = {
        name for panel in board.panels() for q in panel.queries for name in promql.variables(q.expr)
    }
    assert bool(used & {target.name for target in TARGETS}) == board.has_targets


@each_panel
def test_metrics_named_in_the_description_are_those_asked_for(panel):
    asked = {name for query in panel.queries for name in promql.names(query.expr)}
    for name in re.findall(r"(?:pdcluster|vllm)[:_][a-z0-9_:]+[a-z0-9]", panel.formula):
        assert name in asked, name


@each_panel
def test_labels_in_legends_are_labels_of_the_answer(panel):
    for query in panel.queries:
        for label in (part.split("}}")[0] for part in query.legend.split("{{")[1:]):
            assert label in query.expr or label == "worker"


@pytest.fixture(scope="module")
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not there (Debian: prometheus)")
    return found


def test_prometheus_parses_every_query(promtool, tmp_path):
    asked = [
        {"record": f"asked:{number}", "expr": promql.filled(expr, VALUES)}
        for number, expr in enumerate(EXPRESSIONS.values())
    ]
    rules = tmp_path / "asked.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    done = subprocess.run(
        [promtool, "check", "rules", "--lint=none", rules], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(EXPRESSIONS)} rules found" in done.stdout


def test_bytes_of_a_decode_pool_are_shared_out_over_its_links(promtool, tmp_path):
    """By the tokens that were not held: 3 to 1 for what `d` pulls, all of it for what `e` pulls."""

    def grows(name, labels, per_s):
        return {"series": f'{name}{{cluster="c", {labels}}}', "values": f"0+{5 * per_s}x30"}

    def link(prefill, decode, prompt, held):
        labels = f'prefill_pool="{prefill}", decode_pool="{decode}"'
        return (
            grows("pdcluster_gateway_prompt_tokens_total", labels, prompt),
            grows("pdcluster_gateway_held_tokens_total", labels, held),
        )

    def pulled(pool, worker, per_s):
        labels = f'pool="{pool}", worker="{pool}/{worker}"'
        return grows("pdcluster_worker_kv_bytes_pulled_total", labels, per_s)

    series = [
        *(*link("p", "d", 50, 20), *link("q", "d", 30, 20), *link("p", "e", 9, 0)),
        *link("", "d", 1000, 0),  # computed by decode itself: over no link
        *(pulled("d", 0, 100), pulled("d", 1, 300), pulled("e", 0, 70)),
    ]
    expected = {("p", "d"): 300, ("q", "d"): 100, ("p", "e"): 70}
    (panel,) = [p for p in PANELS.values() if p.asks == "How many bytes does each link carry?"]
    asked = {
        "expr": promql.filled(panel.queries[0].expr, VALUES | {c.label: ".*" for c in CHOICES}),
        "eval_time": "120s",
        "exp_samples": [
            {"labels": f'{{prefill_pool="{p}", decode_pool="{d}"}}', "value": value}
            for (p, d), value in expected.items()
        ],
    }
    case = {"interval": "5s", "input_series": series, "promql_expr_test": [asked]}
    tests = tmp_path / "links.yml"
    tests.write_text(yaml.safe_dump({"evaluation_interval": "5s", "tests": [case]}))
    done = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_its_configuration(promtool):
    done = subprocess.run(
        [promtool, "check", "config", "--syntax-only", KEPT / "prometheus" / "prometheus.yml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@each_board
def test_panels_fill_the_grid_without_overlap(board):
    taken = set()
    for panel in grafana.as_json(board)["panels"]:
        place = panel["gridPos"]
        assert place["w"] >= 4
        assert place["x"] + place["w"] <= grafana.COLUMNS
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    heights = {y for _, y in taken}
    assert taken == {(x, y) for x in range(grafana.COLUMNS) for y in heights}
    assert heights == set(range(len(heights)))


@each_board
def test_a_board_says_who_it_is(board):
    said = grafana.as_json(board)
    assert said["uid"] == board.uid
    assert 0 < len(said["uid"]) <= 40
    assert said["schemaVersion"] == 41
    assert said["tags"] == ["pdcluster"]
    ids = [panel["id"] for panel in said["panels"]]
    assert len(ids) == len(set(ids))
    assert "id" not in said
    assert "version" not in said


@each_board
def test_every_panel_has_unit_description_thresholds_and_the_chosen_data_source(board):
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in grafana.as_json(board)["panels"]:
        if panel["type"] == "row":
            continue
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"]
        assert defaults["thresholds"]["steps"]
        assert panel["description"]
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert [target["refId"] for target in panel["targets"]] == sorted(
            target["refId"] for target in panel["targets"]
        )


@each_board
def test_thresholds_count_upwards(board):
    for panel in grafana.as_json(board)["panels"]:
        if panel["type"] != "row":
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            assert steps[0]["value"] is None
            values = [step["value"] for step in steps[1:]]
            assert all(a < b for a, b in pairwise(values))


@each_board
def test_every_board_offers_the_choices_and_draws_the_events(board):
    said = grafana.as_json(board)
    offered = [variable["name"] for variable in said["templating"]["list"]]
    assert offered[0] == "datasource"
    assert {"pool", "role", "island", "hardware", "model"} <= set(offered)
    drawn = [event["name"] for event in said["annotations"]["list"]]
    assert drawn == ["Scale", "Role change", "Failure"]


def test_a_choice_follows_from_those_before_it():
    pool = next(choice for choice in CHOICES if choice.label == "pool")
    assert all(f'{choice.label}=~"${choice.label}"' in pool.query for choice in CHOICES[:-1])
    assert CHOICES[-1] is pool


def test_speculation_alone_is_allowed_to_be_absent():
    """Everything else has data as soon as there is a cluster with traffic."""
    boards = {n for n, p in PANELS.items() if p.needs is not None and p.needs == "speculation"}
    assert boards == {name for name in PANELS if name.startswith("speculative: ")}


def test_provisioning_names_the_source_the_folder_and_where_the_boards_are():
    texts = files.generated()
    source = yaml.safe_load(texts["provisioning/datasources/pdcluster.yml"])["datasources"][0]
    provider = yaml.safe_load(texts["provisioning/dashboards/pdcluster.yml"])["providers"][0]
    compose = yaml.safe_load(texts["compose.yaml"])
    mounted = compose["services"]["grafana"]["volumes"]
    assert source["type"] == "prometheus"
    assert provider["folderUid"] == "pdcluster"
    assert f"./:{provider['options']['path']}:ro" in mounted


def test_containers_are_pinned_listen_on_loopback_and_are_not_root():
    compose = yaml.safe_load(files.generated()["compose.yaml"])
    for name, service in compose["services"].items():
        image, tag = service["image"].split(":")
        assert image
        assert tag[0].isdigit() or tag[0] == "v"
        assert tag != "latest"
        assert not service["user"].startswith(("0", "root"))
        said = json.dumps(service)
        assert "127.0.0.1" in said, name
        assert "0.0.0.0" not in said, name


def check(*paths):
    return subprocess.run(
        [ROOT / "scripts" / "check_dashboards", *paths], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def checked():
    """What scripts/check_dashboards says of the boards, and itself, if what it needs is there."""
    done = check()
    if done.returncode == 3:
        pytest.skip(f"Grafana's schema cannot be had: {done.stderr.strip()[:200]}")
    return done, check


def test_grafanas_own_schema_takes_every_board(checked):
    done, _ = checked
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(BOARDS)} dashboards are")


def first(board, kind):
    return next(panel for panel in board["panels"] if panel["type"] == kind)


def misspell_key(board):
    first(board, "timeseries")["heigth"] = 8


def misspell_option(board):
    first(board, "timeseries")["options"]["legend"]["displayMode"] = "tabel"


def misspell_field(board):
    first(board, "timeseries")["fieldConfig"]["defaults"]["custom"]["lineWidht"] = 1


def misspell_query(board):
    first(board, "stat")["targets"][0]["exprr"] = "up"


def forget_expression(board):
    del board["annotations"]["list"][0]["target"]["expr"]


def unknown_enum(board):
    board["templating"]["list"][1]["refresh"] = 7


FAULTS = {
    misspell_key: '"heigth"',
    misspell_option: '"tabel"',
    misspell_field: '"lineWidht"',
    misspell_query: '"exprr"',
    forget_expression: "Property 'expr' is missing",
    unknown_enum: "Type '7'",
}


def test_grafanas_own_schema_refuses_each_fault(checked, tmp_path):
    _, check = checked
    paths = []
    for fault in FAULTS:
        board = json.loads((KEPT / "overview.json").read_text())
        fault(board)
        paths.append(tmp_path / f"{fault.__name__}.json")
        paths[-1].write_text(json.dumps(board))
    done = check(*paths)
    assert done.returncode == 1
    for said in FAULTS.values():
        assert said in done.stderr
