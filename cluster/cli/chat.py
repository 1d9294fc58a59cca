"""`chat`: one question, or a conversation, with the endpoint of a running cluster."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, Json, TopologyFile, target
from cluster.launcher.endpoint import Endpoint


def chat(
    question: Annotated[
        str | None, typer.Argument(help="Ask this and end. Without it: a conversation.")
    ] = None,
    topology: TopologyFile = None,
    cluster: Cluster = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    json: Json = False,
) -> None:
    """Talk to the model. Ctrl-C ends an answer, Ctrl-D the conversation.

    Example: pdcluster chat "What is the capital of France?"
    """
    if question is None and json:
        raise typer.BadParameter("--json needs a QUESTION")
    at = target(topology, cluster)
    endpoint = at.endpoint()
    model = at.model or endpoint.model()
    messages = [{"role": "system", "content": system}] if system else []
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    if question is None:
        _converse(endpoint, model, messages, options)
        return
    messages.append({"role": "user", "content": question})
    if json:
        answer = endpoint.chat(model, messages, **options)
        output.print_json(
            {
                "text": answer.text,
                "request_id": answer.request_id,
                "prefill": answer.prefill,
                "decode": answer.decode,
                "route": answer.route,
                "usage": dict(answer.usage),
            }
        )
        return
    for piece in endpoint.chat_stream(model, messages, **options):
        _write(piece)
    _write("\n")


def _converse(
    endpoint: Endpoint, model: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> None:
    output.err.print(f"[dim]{model} at {endpoint.url}; Ctrl-D ends[/dim]")
    while True:
        try:
            said = input("> ")
        except EOFError:
            _write("\n")
            return
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        answer = _answer(endpoint, model, messages, options)
        messages.append({"role": "assistant", "content": answer})


def _answer(
    endpoint: Endpoint, model: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> str:
    """What came of it, also if Ctrl-C ended it: the conversation goes on from there."""
    pieces: list[str] = []
    stream = endpoint.chat_stream(model, messages, **options)
    try:
        for piece in stream:
            pieces.append(piece)
            _write(piece)
    except KeyboardInterrupt:
        # Closing the connection makes both engines stop.
        stream.close()
    _write("\n")
    return "".join(pieces)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
