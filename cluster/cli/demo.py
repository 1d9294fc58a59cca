"""`demo`: a cluster, one question, and the way its answer took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import output
from cluster.cli.target import File
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from cluster.launcher.demo import Demo
    from cluster.launcher.running import Running


def demo(
    file: File,
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Bring all down again; succeed only if prefill and decode were two workers, KV "
            "blocks moved between them, and the answer is right.",
        ),
    ] = False,
) -> None:
    """Bring FILE up, ask "What is the capital of France?", show which way the answer took.

    Example: pdcluster demo topologies/local-cpu.yaml --once
    """
    from cluster.launcher.demo import ask, shortcomings
    from cluster.launcher.down import down
    from cluster.launcher.up import up

    with output.Progress() as progress:
        done = up(file, progress)
        at = done.running
        if once and done.was_up:
            raise ClusterError(
                f"cluster {at.cluster} was up before, and --once would end it; "
                f"first: pdcluster down --cluster {at.cluster}"
            )
        try:
            progress.stage("question")
            shown = ask(at)
        finally:
            if once:
                progress.stage("down")
                down(at.cluster, 2.0, progress)
    _draw(shown)
    if not once:
        _draw_next(at)
        return
    wrong = shortcomings(shown)
    if wrong:
        raise ClusterError("; ".join(wrong))
    output.out.print("\nall is down again; the answer came through both workers")


def _draw(shown: Demo) -> None:
    answer = shown.answer
    accepted = shown.acceptance_length
    rows = {
        "question": shown.question,
        "answer": answer.text.strip(),
        "prefill": answer.prefill,
        "decode": answer.decode,
        "KV moved": f"{shown.tokens_pulled} tokens, {shown.bytes_pulled / 1024:.1f} KiB "
        f"({shown.tokens_held} more tokens were held already)",
        "acceptance": f"{accepted:.2f} tokens per decode step" if accepted else "no drafts yet",
        "took": output.span_text(shown.took_s),
    }
    output.out.print()
    for name, value in rows.items():
        output.out.print(f"  {name:12}{value}", markup=False)


def _draw_next(at: Running) -> None:
    from cluster.launcher.endpoint import curl_line

    output.out.print(f"  {'endpoint':12}{at.endpoint}/v1\n", markup=False)
    output.out.print(curl_line(at.endpoint, at.model, at.key_file, at.key_env), markup=False)
    output.out.print("\nnext: pdcluster chat | pdcluster status | pdcluster down")
