"""What the end-to-end tests share: prompts, the reference server, and a cluster as its operator
sees it (through the CLI, the endpoint and the engines' own ports)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from ports import free_port

from cluster.models import store
from cluster.settings import ClusterPaths
from cluster.topology.schema import ModelSpec

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
ANSWER_TOKENS = 32
TOPOLOGIES = {"nixl": "local-cpu.yaml", "mooncake": "local-mooncake.yaml"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One greedy request and what a single engine answers to it."""

    name: str
    messages: list[dict[str, str]]
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""


NOUNS = ("river", "mountain", "library", "engine", "garden", "letter", "market", "harbour")
VERBS = ("crosses", "follows", "remembers", "opens", "carries", "watches", "repairs", "paints")


def filler(words: int, seed: int) -> str:
    """About `words` words of varied sentences."""
    rng = random.Random(seed)
    sentences: list[str] = []
    while 8 * len(sentences) < words:
        subject, verb, thing = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)
        sentences.append(f"The {subject} {verb} the {thing} {rng.randrange(1000)} times.")
    return " ".join(sentences)


def prompts() -> list[Prompt]:
    """21 prompts of about 30 to 3,000 tokens once templated; unlike content, no shared prefix
    beyond the model's own system message."""
    short = [
        "What is the capital of France?",
        "Name three primes.",
        "Translate to French: good morning.",
        "Write a haiku about rain.",
        "Repeat after me: one two three one two three one two three.",
        "Why is the sky blue? Answer in one sentence.",
        "List the days of the week.",
        'Say "ünïcødé" and 東京 and 🙂.',
    ]
    words = [20, 40, 60, 90, 130, 180, 240, 320, 420, 560, 760, 1000, 1900]
    long = [f"{filler(n, seed=n)} Summarise the text above." for n in words]
    return [
        Prompt(name=f"{len(text.split())}-words-{i}", messages=[{"role": "user", "content": text}])
        for i, text in enumerate(short + long)
    ]


def http_json(url: str, body: Any = None, key: str | None = None, timeout_s: float = 300) -> Any:
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.loads(answer.read())


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of a series over all label sets that contain `labels`."""
    total = 0.0
    for line in text.splitlines():
        if not line.startswith(name):
            continue
        head, _, value = line.rpartition(" ")
        bare, _, label_text = head.partition("{")
        if bare == name and all(f'{k}="{v}"' in label_text for k, v in labels.items()):
            total += float(value)
    return total


def pdcluster(
    *args: str, check: bool = True, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the CLI as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if check and done.returncode != 0:
        pytest.fail(
            f"pdcluster {' '.join(args)} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


@dataclass
class Cluster:
    """A running cluster, as its operator sees it."""

    name: str
    topology: Path
    base_url: str
    key: str
    client: openai.OpenAI = field(repr=False)

    def status(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(
            pdcluster("status", str(self.topology), "--json").stdout
        )
        return parsed

    def worker(self, name: str) -> dict[str, Any]:
        for worker in self.status()["workers"]:
            if worker["name"] == name:
                found: dict[str, Any] = worker
                return found
        raise AssertionError(f"no worker {name} in {self.status()}")

    @property
    def control_port(self) -> int:
        serving = yaml.safe_load(self.topology.read_text())["metadata"]["serving"]
        return int(serving["control"]["port"])

    def control(self, path: str) -> Any:
        """What the control API answers; quicker than the CLI, for those who ask again and again."""
        token = (ClusterPaths(self.name).state / "control-token").read_text().strip()
        return http_json(f"http://127.0.0.1:{self.control_port}/v1/{path}", key=token, timeout_s=30)

    def workers(self) -> dict[str, dict[str, Any]]:
        """By name (POOL/INDEX): the newest generation of each, as the control API has it."""
        found: dict[str, dict[str, Any]] = {}
        for worker in sorted(
            self.control("status")["workers"], key=lambda worker: worker["id"]["generation"]
        ):
            found["{pool}/{index}".format(**worker["id"])] = worker
        return found

    @property
    def engine_key(self) -> str:
        return ClusterPaths(self.name).engine_key.read_text().strip()

    def engine_metrics(self, worker: str) -> str:
        with urllib.request.urlopen(self.worker(worker)["url"] + "/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def transfers(self, request_id: str) -> list[dict[str, Any]]:
        """The transfer records of one request, from both of its workers."""
        done = pdcluster("transfers", request_id, "--cluster", self.name, "--json")
        parsed: list[dict[str, Any]] = json.loads(done.stdout)
        return parsed

    def ask(self, messages: list[dict[str, str]], **extra: Any) -> Any:
        """A greedy chat; returns the raw response (headers and body)."""
        return self.client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=extra.pop("max_tokens", ANSWER_TOKENS),
            extra_body={"return_token_ids": True} | extra.pop("extra_body", {}),
            **extra,
        )


@contextlib.contextmanager
def running_cluster(
    file: str, tmp: Path, edit: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[Cluster]:
    """`pdcluster up` on a copy of a shipped topology with a free port and its own name. `edit`
    changes its `metadata.serving`."""
    parsed = yaml.safe_load((ROOT / "topologies" / file).read_text())
    port = free_port()
    parsed["cluster_name"] = f"e2e-{parsed['cluster_name']}"
    parsed["metadata"]["serving"]["gateway"]["port"] = port
    parsed["metadata"]["serving"].setdefault("control", {})["port"] = free_port()
    # Not one per cluster of these tests, and never two at one port.
    parsed["metadata"]["serving"]["observability"] = {"prometheus": {"mode": "off"}}
    # In bfloat16 the batch's shape shows in the last bit, and greedy choices of a small model turn
    # on it (measured: 6 of 10 outputs equal); float32 is equal token by token.
    parsed["metadata"]["serving"]["model"]["dtype"] = "float32"
    if edit is not None:
        edit(parsed["metadata"]["serving"])
    topology = tmp / file
    topology.write_text(yaml.safe_dump(parsed))
    try:
        pdcluster("up", str(topology))
        key = ClusterPaths(parsed["cluster_name"]).api_key.read_text().strip()
        base_url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, timeout=300)
        yield Cluster(parsed["cluster_name"], topology, base_url, key, client)
    finally:
        pdcluster("down", str(topology), check=False)


def reference_answers(log_path: Path) -> list[Prompt]:
    """What one plain vLLM server answers to every prompt."""
    with plain_vllm(MODEL, 8192, log_path) as url:
        return [_reference(prompt, url) for prompt in prompts()]


@contextlib.contextmanager
def plain_vllm(model_id: str, max_model_len_tokens: int, log_path: Path) -> Iterator[str]:
    """The URL of one vLLM server without connector and without speculation."""
    model = store.resolve(ModelSpec(id=model_id), lambda _what, _fraction: None)
    port = free_port()
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_RPC_BASE_PATH": str(log_path.parent),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model.path]
    argv += ["--served-model-name", model_id, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--dtype", "float32", "--max-model-len", str(max_model_len_tokens), "--enforce-eager"]
    argv += ["--kv-cache-memory-bytes", "512M", "--distributed-executor-backend", "uni"]
    with log_path.open("w") as log:
        server = subprocess.Popen(
            argv, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(f"{url}/health", server, log_path)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"reference vLLM exited {server.returncode}\n{log.read_text()[-4000:]}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.5)
    pytest.fail(f"reference vLLM not ready in 240 s\n{log.read_text()[-4000:]}")


def _reference(prompt: Prompt, url: str) -> Prompt:
    body = {"model": MODEL, "messages": prompt.messages, "temperature": 0}
    body |= {"max_tokens": ANSWER_TOKENS, "return_token_ids": True}
    answer = http_json(f"{url}/v1/chat/completions", body)
    choice = answer["choices"][0]
    return Prompt(
        name=prompt.name,
        messages=prompt.messages,
        prompt_tokens=answer["usage"]["prompt_tokens"],
        token_ids=tuple(choice["token_ids"]),
        text=choice["message"]["content"],
    )
