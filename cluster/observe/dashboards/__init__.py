"""Grafana dashboards as code. In: nothing but the names of metrics. Out: JSON that Grafana takes.

    panel       Panel, Query, Section, Board: what a board says, as values
    promql      fragments of PromQL, and the names and variables in an expression
    variables   the choices above every board, and the events drawn over its panels
    overview, prefill_decode, kv_transfer, speculative, scaling     one board each
    grafana     values to JSON, through Grafana's own types (grafana-foundation-sdk)
    files       everything that `pdcluster dashboards build` writes

A board is read without Grafana's SDK, which only `grafana` imports: `verify` needs queries alone.
"""
