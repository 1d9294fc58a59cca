"""How Ray's updaters run commands on a bare host: Ray's own ssh runner, with three differences.

    user and port   those of the host's node type, where it has any
    the mark        what starts something (Ray's start commands) runs with the cluster's owner mark
    `ray stop`      which `ray down` sends to the head, would end every Ray of that user there: it
                    becomes `cluster.nodes.end`, which ends this cluster's

Called by: nodes.provider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.autoscaler._private.command_runner import DockerCommandRunner, SSHCommandRunner

from cluster.nodes import ssh
from cluster.nodes.marks import ray_owner
from cluster.nodes.ssh import Host
from cluster.settings import OWNER_ENV

_TOKEN_MODE = "RAY_AUTH_MODE=token"


def end_command(cluster: str) -> str:
    return f"python3 -m cluster.nodes.end --cluster {cluster}"


class BareHostRunner(SSHCommandRunner):  # type: ignore[misc]  # Ray ships no types
    """Runs Ray's commands on `host`. `has_token`: the cluster's Ray asks for its token.
    `before_stop` is called before a `ray stop`, and may refuse by an error."""

    def __init__(
        self, *, host: Host, has_token: bool, before_stop: Callable[[], None], **common: Any
    ) -> None:
        super().__init__(**common)
        self._before_stop = before_stop
        self.ssh_user = host.user
        self.ssh_options.arg_dict["Port"] = host.port
        # Ray's own bound is two minutes, which a host that is cut off takes each time.
        self.ssh_options.to_ssh_options_list = self._options
        self._has_token = has_token

    def run(self, cmd: str | None = None, **options: Any) -> Any:
        """As Ray's own `run`."""
        if cmd is not None:
            if is_stop(cmd):
                self._before_stop()
            cmd = worded(cmd, self.cluster_name, self._has_token, _is_start(options))
        # For initialization commands Ray makes new options with the same key, and without our port.
        options.pop("ssh_options_override_ssh_key", None)
        return super().run(cmd, **options)

    def _options(self, *, timeout: int = 60) -> list[str]:
        kind = type(self.ssh_options)
        bound_s = min(timeout, ssh.CONNECT_BOUND_S)
        listed: list[str] = kind.to_ssh_options_list(self.ssh_options, timeout=bound_s)
        return listed


class ContainerRunner(DockerCommandRunner):  # type: ignore[misc]
    """As BareHostRunner, for commands inside the host's container (`docker:` in the file)."""

    def __init__(
        self,
        docker_config: dict[str, Any],
        *,
        host: Host,
        has_token: bool,
        before_stop: Callable[[], None],
        **common: Any,
    ) -> None:
        super().__init__(docker_config, **common)
        self.ssh_command_runner = BareHostRunner(
            host=host, has_token=False, before_stop=before_stop, **common
        )
        self._before_stop = before_stop
        self._has_token = has_token

    def run(self, cmd: str | None = None, **options: Any) -> Any:
        """As Ray's own `run`."""
        if cmd is not None and options.get("run_env", "auto") != "host":
            cluster = self.ssh_command_runner.cluster_name
            if is_stop(cmd):
                self._before_stop()
            cmd = worded(cmd, cluster, self._has_token, _is_start(options))
        return super().run(cmd, **options)


def is_stop(cmd: str) -> bool:
    return cmd.strip() == "ray stop"


def worded(cmd: str, cluster: str, has_token: bool, is_start: bool) -> str:
    """The command as it is run."""
    if is_stop(cmd):
        return end_command(cluster)
    exports = [_TOKEN_MODE] if has_token else []
    if is_start:
        exports.append(f"{OWNER_ENV}={ray_owner(cluster)}")
    return f"export {' '.join(exports)}; {cmd}" if exports else cmd


def _is_start(options: dict[str, Any]) -> bool:
    # Ray gives an environment, be it empty, to start commands and to nothing else.
    return options.get("environment_variables") is not None
