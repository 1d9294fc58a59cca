"""KV transfer: how much moves, how fast, how much need not move, what fails, over which links."""

from __future__ import annotations

from cluster.observe.dashboards.panel import Board, Kind, Panel, Query, Section, Steps, Unit
from cluster.observe.dashboards.promql import (
    POOL,
    PREFILL_POOL,
    everywhere,
    or_none,
    or_zero,
    pairs,
    quantile,
    rate,
    ratio,
    total,
)

_LINK = ("prefill_pool", "decode_pool")
_LINK_LEGEND = "{{prefill_pool}} to {{decode_pool}}"
_TRANSFERS = "pdcluster_kv_transfers_total"


def _worker(name: str) -> str:
    return rate(everywhere(f"pdcluster_worker_kv_{name}_total", POOL))


def _link_bytes() -> str:
    def tokens(name: str) -> str:
        return total(pairs(f"pdcluster_gateway_{name}_tokens_total", 'prefill_pool!=""'), *_LINK)

    moved = f"({tokens('prompt')} - {tokens('held')})"
    of_pool = f"sum by (decode_pool) ({moved})"
    pulled = f'label_join({_worker("bytes_pulled")}, "decode_pool", "", "pool")'
    join = "on (decode_pool) group_left ()"
    return f"{moved} / {join} ({of_pool} > 0) * {join} sum by (decode_pool) ({pulled})"


_BYTES_NOW = Panel(
    asks="How many bytes move per second?",
    formula="Bytes per second = sum(rate(pdcluster_worker_kv_bytes_pulled_total)) of the chosen "
    "decode pools.",
    do="Compare with what the links carry; it grows with prompts, and shrinks with prefix hits.",
    unit=Unit.BYTES_PER_S,
    queries=(Query(total(_worker("bytes_pulled"))),),
    kind=Kind.STAT,
)

_SKIPPED_SHARE = Panel(
    asks="What share of blocks need not move?",
    formula="Skipped / (skipped + pulled) = blocks that decode held already, of those it needed, "
    "from pdcluster_worker_kv_blocks_skipped_total and _pulled_total.",
    do="Chats of several turns should be far above 0: else see how requests are routed.",
    unit=Unit.SHARE,
    queries=(
        Query(
            ratio(
                total(_worker("blocks_skipped")),
                f"({total(_worker('blocks_skipped'))} + {total(_worker('blocks_pulled'))})",
            )
        ),
    ),
    kind=Kind.STAT,
    at_most=1.0,
)

_PULLED_SHARE = Panel(
    asks="Do transfers end well?",
    formula='Transfers with outcome "pulled" / all transfers that ended = '
    "rate of pdcluster_kv_transfers_total.",
    do="Below 99 % see How do transfers end.",
    unit=Unit.SHARE,
    queries=(
        Query(
            ratio(
                or_zero(total(pairs(_TRANSFERS, 'outcome="pulled"'))),
                total(pairs(_TRANSFERS)),
            )
        ),
    ),
    kind=Kind.STAT,
    steps=Steps(warn=0.99, bad=0.95),
    at_most=1.0,
)

_LEASES = Panel(
    asks="How many prompts does prefill keep for decode?",
    formula="Open leases = sum by (prefill_pool) (pdcluster_kv_leases_open), of all gateways.",
    do="One that only grows is memory that nobody takes: decode is stuck, or leases do not end.",
    unit=Unit.COUNT,
    queries=(
        Query(
            total(everywhere("pdcluster_kv_leases_open", PREFILL_POOL), "prefill_pool"),
            "{{prefill_pool}}",
        ),
    ),
)

_BYTES = Panel(
    asks="How many bytes does each decode pool pull?",
    formula="Bytes per second = sum by (pool) (rate(pdcluster_worker_kv_bytes_pulled_total)).",
    do="A pool that stands out gets the long prompts; one at its link's limit makes TTFT.",
    unit=Unit.BYTES_PER_S,
    queries=(Query(total(_worker("bytes_pulled"), "pool"), "{{pool}}"),),
)

_BLOCKS = Panel(
    asks="How many blocks are pulled, and how many skipped?",
    formula="Blocks per second = rate of pdcluster_worker_kv_blocks_pulled_total, and of "
    "_blocks_skipped_total: those that decode held from an earlier turn.",
    do="Much pulled and nothing skipped in chats: block hashes differ, or routing ignores what is "
    "held.",
    unit=Unit.PER_S,
    queries=(
        Query(total(_worker("blocks_pulled")), "pulled"),
        Query(total(_worker("blocks_skipped")), "skipped"),
    ),
    is_stacked=True,
)

_LATENCY = Panel(
    asks="How long from prefill's answer to the end of the transfer?",
    formula="Lease time of each link = histogram_quantile(q, sum by (le, prefill_pool, "
    "decode_pool) (rate(pdcluster_kv_lease_seconds_bucket))): the wait in decode's queue, the "
    "pull, and the way there.",
    do="High with a short queue at decode: the link. A pair's first one includes the handshake.",
    unit=Unit.SECONDS,
    queries=tuple(
        Query(
            quantile(q, pairs("pdcluster_kv_lease_seconds_bucket"), *_LINK),
            f"p{q * 100:g} {_LINK_LEGEND}",
        )
        for q in (0.5, 0.95)
    ),
)

_SIZE = Panel(
    asks="How large is an average transfer?",
    formula="Bytes pulled / prompts transferred, per decode pool = "
    "pdcluster_worker_kv_bytes_pulled_total / pdcluster_worker_kv_transfers_total.",
    do="Divide by the link's bandwidth: what the pull alone must take.",
    unit=Unit.BYTES,
    queries=(
        Query(
            ratio(total(_worker("bytes_pulled"), "pool"), total(_worker("transfers"), "pool")),
            "{{pool}}",
        ),
    ),
)

_MATRIX = Panel(
    asks="Which links carry the transfers?",
    formula="Transfers that ended in the time shown, from prefill pool (row) to decode pool "
    "(column) = sum by (prefill_pool, decode_pool) (increase(pdcluster_kv_transfers_total)).",
    do="An empty cell between pools of one island: `pdcluster transfers` says why.",
    unit=Unit.COUNT,
    queries=(Query(total(pairs(_TRANSFERS, function="increase", window="$__range"), *_LINK)),),
    kind=Kind.TABLE,
    matrix=_LINK,
)

_FAILED_MATRIX = Panel(
    asks="Which links lose transfers?",
    formula="Transfers not pulled / all that ended in the time shown, per link (row to column) = "
    'increase of pdcluster_kv_transfers_total{outcome!="pulled"} / of all.',
    do="One cell: that link. A row: that prefill pool. A column: that decode pool.",
    unit=Unit.SHARE,
    queries=(
        Query(
            "1 - "
            + ratio(
                total(
                    pairs(_TRANSFERS, 'outcome="pulled"', function="increase", window="$__range"),
                    *_LINK,
                ),
                total(pairs(_TRANSFERS, function="increase", window="$__range"), *_LINK),
            )
        ),
    ),
    kind=Kind.TABLE,
    matrix=_LINK,
    steps=Steps(warn=0.01, bad=0.05),
    at_most=1.0,
)

_RATE = Panel(
    asks="How many transfers does each link make?",
    formula="Transfers per second = sum by (prefill_pool, decode_pool) "
    "(rate(pdcluster_kv_transfers_total)).",
    do="Even shares are no aim: routing goes where blocks are held and queues are short.",
    unit=Unit.PER_S,
    queries=(Query(total(pairs(_TRANSFERS), *_LINK), _LINK_LEGEND),),
)

_LINK_BYTES = Panel(
    asks="How many bytes does each link carry?",
    formula="Bytes per second that a decode pool pulls, shared out over its links by the tokens "
    "that each had to carry = rate(pdcluster_worker_kv_bytes_pulled_total) * "
    "rate(pdcluster_gateway_prompt_tokens_total - pdcluster_gateway_held_tokens_total) of the link "
    "/ that of all links to the pool.",
    do="Compare with what the link can carry. The decode pool with most gets the long prompts.",
    unit=Unit.BYTES_PER_S,
    queries=(Query(_link_bytes(), _LINK_LEGEND),),
)

_OUTCOMES = Panel(
    asks="How do transfers end?",
    formula="Transfers per second by connector and outcome = "
    "sum by (connector, outcome) (rate(pdcluster_kv_transfers_total)).",
    do="expired: decode came too late. lost: the prefill worker went. released: the request was "
    "given up.",
    unit=Unit.PER_S,
    queries=(Query(total(pairs(_TRANSFERS), "connector", "outcome"), "{{connector}} {{outcome}}"),),
    is_stacked=True,
)

_CAUSES = Panel(
    asks="Why do blocks not get to decode?",
    formula="Transfers per second that brought nothing, by link and cause = sum by (prefill_pool, "
    "decode_pool, cause) (rate(pdcluster_kv_transfer_failures_total)).",
    do="given-up: clients left. pull-failed on one link: the way between its hosts; on all of one "
    "pool: its engines' logs. expired: scale decode, or raise `lease_s`.",
    unit=Unit.PER_S,
    queries=(
        Query(
            or_none(
                f"{total(pairs('pdcluster_kv_transfer_failures_total'), *_LINK, 'cause')} > 0",
                "cause",
            ),
            f"{{{{cause}}}} {_LINK_LEGEND}",
        ),
    ),
    needs=None,
)

_FAULTS = Panel(
    asks="What fails in transfers?",
    formula="Per second: pulls that decode workers report as failed, releases that did not reach "
    "prefill, links refused because KV blocks are unlike = rate of "
    "pdcluster_worker_kv_transfer_failures_total, pdcluster_kv_release_failures_total, "
    "pdcluster_kv_mismatches_total.",
    do="Failed pulls: network, or a prefill worker that went. Unlike blocks: `pdcluster status` "
    "says what differs.",
    unit=Unit.PER_S,
    queries=(
        Query(or_none(total(_worker("transfer_failures"), "pool"), "pool"), "pull: {{pool}}"),
        Query(
            or_none(
                total(
                    rate(everywhere("pdcluster_kv_release_failures_total", PREFILL_POOL)),
                    "prefill_pool",
                ),
                "prefill_pool",
            ),
            "release: {{prefill_pool}}",
        ),
        Query(
            or_none(total(pairs("pdcluster_kv_mismatches_total"), "decode_pool"), "decode_pool"),
            "unlike blocks: {{decode_pool}}",
        ),
    ),
    needs=None,
)

BOARD = Board(
    uid="pdcluster-kv-transfer",
    title="pdcluster / KV transfer",
    description="How much moves, how fast, how much need not move, what fails, over which links.",
    sections=(
        Section("Now", ((_BYTES_NOW, _SKIPPED_SHARE, _PULLED_SHARE),)),
        Section("Volume", ((_BYTES, _BLOCKS), (_LATENCY, _SIZE))),
        Section("Links", ((_MATRIX, _FAILED_MATRIX), (_LINK_BYTES, _RATE, _LEASES))),
        Section("Failures", ((_OUTCOMES, _CAUSES, _FAULTS),)),
    ),
)
