"""The console script, and `python -m cluster.cli`: Ctrl-C is seen to before all is imported."""

from __future__ import annotations

from cluster.cli import interrupt


def main() -> None:
    """Ends the process with the command's exit code."""
    interrupt.ends_at_once()
    from cluster.cli import main as commands

    commands.main()


if __name__ == "__main__":
    main()
