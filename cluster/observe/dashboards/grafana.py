"""Boards as Grafana's JSON, through its own types. In: Board. Out: text, the same every time.

Ids count up, and places on the grid of 24 columns follow from the sections' rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table
from grafana_foundation_sdk.builders import timeseries as lines
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

from cluster.observe.dashboards.beside import SOURCE_NAME, SOURCE_UID
from cluster.observe.dashboards.panel import Board, Kind, Panel, Query, Steps
from cluster.observe.dashboards.variables import CHOICES, EVENTS, TARGETS, Choice, Target

COLUMNS = 24
TAG = "pdcluster"

_HEIGHTS = {Kind.STAT: 4, Kind.LINES: 8, Kind.BARS: 8, Kind.TABLE: 8}
_SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

B = TypeVar("B", bargauge.Panel, lines.Panel, stat.Panel, table.Panel)


def text(board: Board) -> str:
    """JSON, with a newline at its end."""
    return json.dumps(as_json(board), indent=2, ensure_ascii=False) + "\n"


def as_json(board: Board) -> dict[str, Any]:
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .timezone("browser")
        .editable()
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource")
            .label("Data source")
            .type("prometheus")
            .current(_option(SOURCE_NAME, SOURCE_UID))
        )
        .link(
            dashboard.DashboardLink("pdcluster")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .keep_time(True)
            .include_vars(True)
        )
    )
    for choice in CHOICES:
        builder.with_variable(_choice(choice))
    for target in TARGETS if board.has_targets else ():
        builder.with_variable(_target(target))
    _place(builder, board)
    plain: dict[str, Any] = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        # The SDK gives every variable the fields of one that is an interval.
        for field in ("auto", "auto_min", "auto_count"):
            del variable[field]
    # The SDK's type of an annotation knows Grafana's own events only, not a data source's query.
    plain["annotations"] = {"list": _events()}
    return plain


def _place(builder: dashboard.Dashboard, board: Board) -> None:
    y, panel_id = 0, 1
    for section in board.sections:
        builder.with_row(
            dashboard.Row(section.title)
            .id(panel_id)
            .grid_pos(model.GridPos(x=0, y=y, w=COLUMNS, h=1))
        )
        y, panel_id = y + 1, panel_id + 1
        for row in section.rows:
            width, height = COLUMNS // len(row), max(_HEIGHTS[panel.kind] for panel in row)
            for number, panel in enumerate(row):
                place = model.GridPos(x=number * width, y=y, w=width, h=height)
                builder.with_panel(_panel(panel).id(panel_id).grid_pos(place))
                panel_id += 1
            y += height


def _panel(panel: Panel) -> bargauge.Panel | lines.Panel | stat.Panel | table.Panel:
    match panel.kind:
        case Kind.LINES:
            return _lines(panel)
        case Kind.STAT:
            return (
                _told(stat.Panel(), panel)
                .graph_mode(shapes.BigValueGraphMode.AREA)
                .color_mode(shapes.BigValueColorMode.VALUE)
                .reduce_options(_last())
            )
        case Kind.BARS:
            return (
                _told(bargauge.Panel(), panel)
                .display_mode(shapes.BarGaugeDisplayMode.BASIC)
                .orientation(shapes.VizOrientation.HORIZONTAL)
                .reduce_options(_last())
            )
        case Kind.TABLE:
            return _table(panel)


def _told(builder: B, panel: Panel) -> B:
    """What every kind of panel has."""
    builder.title(panel.asks).description(f"{panel.formula}\n\n{panel.do}")
    builder.datasource(_SOURCE).unit(panel.unit.value).min(0)
    if panel.at_most is not None:
        builder.max(panel.at_most)
    builder.thresholds(_thresholds(panel.steps))
    for number, query in enumerate(panel.queries):
        builder.with_target(_query(panel, query).ref_id(chr(ord("A") + number)))
    return builder


def _lines(panel: Panel) -> lines.Panel:
    builder = (
        _told(lines.Panel(), panel)
        .line_width(1)
        .fill_opacity(25 if panel.is_stacked else 5)
        .show_points(shapes.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.TABLE)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["mean", "max", "lastNotNull"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(shapes.TooltipDisplayMode.MULTI)
            .sort(shapes.SortOrder.DESCENDING)
        )
    )
    if panel.is_stacked:
        builder.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    if panel.steps is not None:
        builder.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED)
        )
    for query in panel.queries:
        if query.is_target:
            builder.override_by_name(query.legend, _dashed())
    return builder


def _dashed() -> list[model.DynamicConfigValue]:
    return [
        model.DynamicConfigValue(
            "custom.lineStyle", shapes.LineStyle(fill="dash", dash=[10.0, 10.0])
        ),
        model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
        model.DynamicConfigValue("custom.fillOpacity", 0),
    ]


def _table(panel: Panel) -> table.Panel:
    builder = _told(table.Panel(), panel)
    if panel.matrix is not None:
        row, column = panel.matrix
        fields = {"rowField": row, "columnField": column, "valueField": "Value"}
        builder.with_transformation(model.DataTransformerConfig("groupingToMatrix", options=fields))
    else:
        shown = {
            "includeByName": dict.fromkeys(panel.columns, True),
            "indexByName": {name: number for number, name in enumerate(panel.columns)},
        }
        builder.with_transformation(model.DataTransformerConfig("organize", options=shown))
    if panel.steps is not None:
        builder.cell_options(shapes.TableColoredBackgroundCellOptions())
    return builder


def _query(panel: Panel, query: Query) -> prometheus.Dataquery:
    builder = (
        prometheus.Dataquery()
        .expr(query.expr)
        .datasource(_SOURCE)
        .editor_mode(QueryEditorMode.CODE)
        .legend_format(query.legend or "__auto")
    )
    if panel.kind is Kind.TABLE:
        builder.format(PromQueryFormat.TABLE)
    return builder.instant() if panel.is_instant else builder.range()


def _thresholds(steps: Steps | None) -> dashboard.ThresholdsConfig:
    found: list[tuple[str, float | None]] = [("green", None)]
    if steps is not None and steps.warn <= steps.bad:
        # Equal steps leave no room for yellow.
        if steps.warn < steps.bad:
            found.append(("yellow", steps.warn))
        found.append(("red", steps.bad))
    elif steps is not None:
        found = [("red", None), ("yellow", steps.bad), ("green", steps.warn)]
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=colour) for colour, value in found])
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _choice(choice: Choice) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(choice.label)
        .label(choice.title)
        .datasource(_SOURCE)
        .query({"qryType": 1, "query": choice.query, "refId": "PrometheusVariableQueryEditor"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(_option(["All"], ["$__all"]))
    )


def _target(target: Target) -> dashboard.TextBoxVariable:
    return (
        dashboard.TextBoxVariable(target.name)
        .label(target.title)
        .default_value(target.default)
        .current(_option(target.default, target.default))
    )


def _option(shown: str | list[str], value: str | list[str]) -> model.VariableOption:
    return model.VariableOption(selected=True, text=shown, value=value)


def _events() -> Sequence[dict[str, Any]]:
    source = _SOURCE.to_json()
    return [
        {
            "name": event.name,
            "datasource": source,
            "enable": True,
            "iconColor": event.colour,
            "target": {"refId": "Anno", "expr": event.expr, "interval": "15s"},
            "titleFormat": event.title,
            "textFormat": event.text,
        }
        for event in EVENTS
    ]
