"""Speculative decoding: how much a step gives, where drafts stop being right, what they cost."""

from __future__ import annotations

from cluster.observe.dashboards.panel import Board, Kind, Needs, Panel, Query, Section, Steps, Unit
from cluster.observe.dashboards.promql import pools, ratio, total

_LENGTH = "pdcluster:engine_acceptance_length:rate5m"
_DRAFTS = "vllm:spec_decode_num_drafts_total"
_DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_GENERATED = "vllm:generation_tokens_total"
_VLLM = "Of vLLM's engines (vLLM-Ascend, simulated): others do not count it."


def _rate(name: str, *by: str) -> str:
    """Over five minutes, as in the recorded acceptance length: drafts come in bursts."""
    return total(f"rate({pools(name)}[5m])", *by)


def _panel(
    asks: str,
    formula: str,
    do: str,
    unit: Unit,
    *queries: Query,
    kind: Kind = Kind.LINES,
    steps: Steps | None = None,
) -> Panel:
    return Panel(
        asks=asks,
        formula=formula,
        do=do,
        unit=unit,
        queries=queries,
        kind=kind,
        steps=steps,
        at_most=1.0 if unit is Unit.SHARE else None,
        needs=Needs.SPECULATION,
    )


_LENGTH_NOW = _panel(
    "How many tokens does a decode step give?",
    "Acceptance length = 1 + accepted tokens / drafts, over 5 minutes, the mean of the engines: "
    "avg(pdcluster:engine_acceptance_length:rate5m). From 1 (no draft is right) to 1 + tokens per "
    "draft.",
    "Near 1 speculation only costs: fewer draft tokens, another method, or none.",
    Unit.COUNT,
    Query(f"avg({pools(_LENGTH)})"),
    kind=Kind.STAT,
    steps=Steps(warn=1.3, bad=1.1),
)

_ACCEPTED_NOW = _panel(
    "What share of drafted tokens is right?",
    f"Accepted / drafted tokens = rate of {_ACCEPTED} / rate of {_DRAFTED}. {_VLLM}",
    "Low with a good first position: draft fewer tokens at a time.",
    Unit.SHARE,
    Query(ratio(_rate(_ACCEPTED), _rate(_DRAFTED))),
    kind=Kind.STAT,
    steps=Steps(warn=0.3, bad=0.1),
)

_PER_DRAFT = _panel(
    "How many tokens does a draft propose?",
    f"Tokens per draft = rate of {_DRAFTED} / rate of {_DRAFTS}: k, if the method always proposes "
    f"all it may. {_VLLM}",
    "Below num_speculative_tokens the method finds nothing to propose (n-gram).",
    Unit.COUNT,
    Query(ratio(_rate(_DRAFTED), _rate(_DRAFTS))),
    kind=Kind.STAT,
)

_SAVED = _panel(
    "What share of decode steps is saved?",
    "Steps saved / steps without speculation = 1 - 1 / acceptance length, the mean of the engines.",
    "The most that time per output token can gain; drafting takes its part of it.",
    Unit.SHARE,
    Query(f"1 - 1 / avg({pools(_LENGTH)})"),
    kind=Kind.STAT,
)

_BY_POOL = _panel(
    "How long are accepted runs in each pool?",
    "Acceptance length by pool = avg by (pool) (pdcluster:engine_acceptance_length:rate5m).",
    "A pool that differs from its like with the same traffic: compare versions and KV dtype; after "
    "a transfer the draft layer's blocks may be missing.",
    Unit.COUNT,
    Query(f"avg by (pool) ({pools(_LENGTH)})", "{{pool}}"),
)

_BY_POSITION = _panel(
    "At which position do drafts stop being right?",
    "Drafts whose token at this position was accepted / all drafts = avg by (position) "
    "(pdcluster:engine_accepted_per_pos:rate5m).",
    "Positions under 20 % cost more than they give: lower num_speculative_tokens to the last good "
    "one.",
    Unit.SHARE,
    Query(
        f"avg by (position) ({pools('pdcluster:engine_accepted_per_pos:rate5m')})",
        "position {{position}}",
    ),
)

_COST = _panel(
    "How many tokens are drafted for one that is kept?",
    f"Drafted tokens / generated tokens, by pool = rate of {_DRAFTED} / rate of {_GENERATED}. "
    f"{_VLLM}",
    "The draft's work per token of an answer: when the batch is full, it competes with decoding.",
    Unit.COUNT,
    Query(ratio(_rate(_DRAFTED, "pool"), _rate(_GENERATED, "pool")), "{{pool}}"),
)

_RIGHT_AND_WRONG = _panel(
    "How many drafted tokens are thrown away?",
    f"Tokens per second = rate of {_ACCEPTED} (right), and rate of {_DRAFTED} less that (thrown "
    f"away). {_VLLM}",
    "Thrown away grows with load: switch speculation off above some batch size.",
    Unit.PER_S,
    Query(_rate(_ACCEPTED), "right"),
    Query(f"{_rate(_DRAFTED)} - {_rate(_ACCEPTED)}", "thrown away"),
)

BOARD = Board(
    uid="pdcluster-speculative",
    title="pdcluster / Speculative decoding",
    description="How much a step gives, where drafts stop being right, what they cost. Empty for "
    "pools without speculative decoding.",
    sections=(
        Section("Now", ((_LENGTH_NOW, _ACCEPTED_NOW, _PER_DRAFT, _SAVED),)),
        Section("Acceptance", ((_BY_POOL, _BY_POSITION),)),
        Section("Cost", ((_COST, _RIGHT_AND_WRONG),)),
    ),
)
