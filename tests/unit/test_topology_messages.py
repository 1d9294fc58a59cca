"""Every fault of our half of a topology file: its line, its key, and the words that matter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from topology_text import BASE, DECODE, GATEWAY, PREFILL

from cluster.errors import TopologyError
from cluster.topology.loader import load

MARK = "  #!"


@dataclass(frozen=True)
class Bad:
    """BASE with `old` made `new`. The one line of `new` that ends in MARK is where the fault is."""

    title: str
    old: str
    new: str
    key: str
    found: str
    fix: str


def in_prefill(line: str) -> tuple[str, str]:
    return PREFILL, PREFILL + f"        {line}{MARK}\n"


def in_both(line: str, decode: str | None = None) -> tuple[str, str]:
    """`line` in both pools, marked where decode has its own."""
    first = PREFILL + f"        {line}{'' if decode else MARK}\n"
    return PREFILL + DECODE, first + DECODE + (f"        {decode}{MARK}\n" if decode else "")


def in_decode(line: str, before: str) -> tuple[str, str]:
    return DECODE, DECODE + f"        {before}\n        {line}{MARK}\n"


def in_gateway(line: str) -> tuple[str, str]:
    return GATEWAY, GATEWAY + f"      {line}{MARK}\n"


def in_serving(line: str) -> tuple[str, str]:
    return GATEWAY, f"    {line}{MARK}\n" + GATEWAY


S = "metadata.serving."
MODEL = "    model: {id: simulated}\n    pools:\n"
SHORT = MODEL.replace("simulated", "simulated, max_model_len_tokens: 4096")
ISLAND = "    islands:\n      - name: one\n"
P0, P1 = f"{S}pools[0].", f"{S}pools[1]."

BAD_FILES = [
    # YAML
    Bad("tab", "    model: {id: simulated}\n", f"\tmodel: {{id: simulated}}{MARK}\n",
        "YAML", "malformed YAML", "spaces, not with tabs"),
    Bad("open bracket", "pools: [prefill, decode]", f"pools: [prefill, decode{MARK}",
        "YAML", "expected ',' or ']'", "close the bracket"),
    Bad("open brace", "    model: {id: simulated}\n", f"    model: {{id: simulated{MARK}\n",
        "YAML", "expected ',' or '}'", "close the brace"),
    Bad("open quote", "      - name: one\n", "      - name: 'one  #!\n",
        "YAML", "unexpected end of stream", "close the quote"),
    Bad("two colons", "    model: {id: simulated}\n", f"    model: id: simulated{MARK}\n",
        "YAML", "mapping values are not allowed", "put a value that contains"),
    Bad("no colon", GATEWAY, f"    gateway{MARK}\n",
        "YAML", "could not find expected ':'", "write `key: value`"),
    Bad("indent", "      - name: one\n        pools: [prefill, decode]\n",
        f"      - name: one\n       pools: [prefill, decode]{MARK}\n",
        "YAML", "expected <block end>", "indent this line like its neighbours"),
    Bad("unknown alias", "{id: simulated}", f"*nothing{MARK}",
        "YAML", "undefined alias 'nothing'", "define it above with &name"),
    Bad("alias in its anchor", "{id: simulated}", f"&m {{id: simulated, served_name: *m}}{MARK}",
        f"{S}model.served_name", "inside its own anchor", "write the value out"),
    Bad("two documents", "metadata:\n", f"---{MARK}\nmetadata:\n",
        "YAML", "another document", "keep one document"),
    Bad("tag", "{id: simulated}", f"!secret x{MARK}",
        "YAML", "'!secret'", "take out the tag"),
    Bad("python object", "{id: simulated}", f"!!python/object/apply:os.getpid []{MARK}",
        "YAML", "could not determine a constructor", "take out the tag"),
    Bad("reserved character", "{id: simulated}", f"@model{MARK}",
        "YAML", "cannot start any token", "in quotes"),
    Bad("no such date", "port: 8000", f"port: 2024-13-45{MARK}",
        "YAML", '"2024-13-45" cannot be read', "in quotes"),
    Bad("merge of no mapping", "    model: {id: simulated}\n", f"    model:\n      <<: 3{MARK}\n",
        "YAML", "for merging", "give << a mapping"),
    Bad("control character", "{id: simulated}", f"\x07{MARK}",
        "YAML", "control character U+0007", "take it out"),
    Bad("key twice", GATEWAY, GATEWAY + f"      port: 8001{MARK}\n",
        f"{S}gateway.port", "given twice, first on line 18", "keep one"),
    Bad("key no text", GATEWAY, GATEWAY + f"      on: 1{MARK}\n",
        f"{S}gateway.on", "the key on is not text", 'put it in quotes: "on"'),
    Bad("key a list", "{id: simulated}", f"{{? [a] : b}}{MARK}",
        f"{S}model", "a key is itself a list or a mapping", "write a word as key"),
    # The frame
    Bad("no cluster_name", "cluster_name: t\n", "",
        "cluster_name", "missing", "add `cluster_name: NAME`"),
    Bad("cluster_name", "cluster_name: t", f"cluster_name: My Cluster{MARK}",
        "cluster_name", '"My Cluster"', "lower-case letters, digits and dashes"),
    Bad("no metadata", BASE[BASE.index("metadata:"):], "",
        "metadata.serving", "missing", "add it, with keys model, pools, islands"),
    Bad("metadata a list", BASE[BASE.index("metadata:"):], f"metadata: [1]{MARK}\n",
        "metadata.serving", "`metadata` is a list of 1", "write `serving:` below `metadata:`"),
    Bad("serving null", BASE[BASE.index("  serving:"):], f"  serving:{MARK}\n",
        "metadata.serving", "nothing (null)", "write a mapping with keys model"),
    Bad("serving at the top", BASE[BASE.index("metadata:"):], "serving: {}\n",
        "metadata.serving", "missing, but `serving` stands at the top", "move it below"),
    # The schema
    Bad("misspelt key", *in_prefill("replica: 2"),
        f"{P0}replica", 'unknown key "replica"', "did you mean `replicas`?"),
    Bad("key of another tool", *in_prefill("tensor_parallel_size: 2"),
        f"{P0}tensor_parallel_size", "unknown key", "write `parallel.tensor` instead"),
    Bad("key at the wrong place", *in_prefill("connector: nixl"),
        f"{P0}connector", "unknown key", "a key at metadata.serving.islands[].connector"),
    Bad("unheard-of key", *in_prefill("zzz: 1"),
        f"{P0}zzz", "unknown key", "take it out; the keys here are name, role"),
    Bad("missing key", DECODE, f"      - name: decode{MARK}\n        engine: simulated\n",
        f"{P1}role", "missing", "add `role: prefill`"),
    Bad("wrong word", PREFILL, PREFILL.replace("simulated", f"simulate{MARK}"),
        f"{P0}engine", '"simulate"', "did you mean `simulated`? "
        "(vllm | vllm_ascend | sglang | xllm | ktransformers | simulated)"),
    Bad("no such role", "role: decode", f"role: decoder{MARK}",
        f"{P1}role", '"decoder"', "did you mean `decode`? (prefill | decode | mixed)"),
    Bad("bad name", "      - name: decode", f"      - name: Decode_1{MARK}",
        f"{P1}name", '"Decode_1"', "at most 48 lower-case letters"),
    Bad("number wanted", "port: 8000", f"port: web{MARK}",
        f"{S}gateway.port", '"web"', "write a whole number"),
    Bad("boolean as number", "port: 8000", f"port: yes{MARK}",
        f"{S}gateway.port", "found true", "write a number"),
    Bad("boolean as optional number", *in_prefill("max_num_seqs: on"),
        f"{P0}max_num_seqs", "found true", "write a number"),
    Bad("fraction", "port: 8000", f"port: 80.5{MARK}",
        f"{S}gateway.port", "80.5", "write a whole number"),
    Bad("too great", "port: 8000", f"port: 65536{MARK}",
        f"{S}gateway.port", "65536", "a number of at most 65535"),
    Bad("too small", "port: 8000", f"port: 0{MARK}",
        f"{S}gateway.port", "found 0", "a number of at least 1"),
    Bad("huge", "port: 8000", f"port: {'9' * 300}{MARK}",
        f"{S}gateway.port", "more than 60 digits", "number"),
    Bad("zero where positive", *in_prefill("start_timeout_s: 0"),
        f"{P0}start_timeout_s", "found 0", "a number greater than 0"),
    Bad("infinite", *in_prefill("start_timeout_s: .inf"),
        f"{P0}start_timeout_s", "inf", "not infinite"),
    Bad("not a number", *in_prefill("start_timeout_s: .nan"),
        f"{P0}start_timeout_s", "nan", "number"),
    Bad("text wanted", *in_prefill("env: {THREADS: 2}"),
        f"{P0}env.THREADS", "found 2", 'put it in quotes: "2"'),
    Bad("secret that is a number", *in_prefill("env: {HF_TOKEN: 20231123}"),
        f"{P0}env.HF_TOKEN", "a value (not shown", "put it in quotes"),
    Bad("list wanted", "pools: [prefill, decode]", f"pools: prefill{MARK}",
        f"{S}islands[0].pools", '"prefill"', "write a list"),
    Bad("empty list", "pools: [prefill, decode]", f"pools: []{MARK}",
        f"{S}islands[0].pools", "an empty list", "at least one item"),
    Bad("section empty", GATEWAY, f"    gateway:{MARK}\n",
        f"{S}gateway", "nothing (null)", "or take the key out for its defaults"),
    Bad("section a text", "    model: {id: simulated}", f"    model: simulated{MARK}",
        f"{S}model", '"simulated"', "a mapping with keys such as id"),
    Bad("replicas a text", *in_prefill("replicas: two"),
        f"{P0}replicas", '"two"', "a whole number, or a mapping with keys initial, min, max"),
    Bad("replicas negative", *in_prefill("replicas: -1"),
        f"{P0}replicas", "-1", "a number of at least 0"),
    Bad("replicas out of order", *in_prefill("replicas: {initial: 1, min: 2}"),
        f"{P0}replicas", "min 2, initial 1, max 64 are out of order", "min <= initial <= max"),
    Bad("flag of no kind", *in_prefill("engine_args: {x: 2024-01-01}"),
        f"{P0}engine_args.x", "2024-01-01", 'put it in quotes: "2024-01-01"'),
    Bad("empty text", "{id: simulated}", f"{{id: ''}}{MARK}",
        f"{S}model.id", "an empty text", "write smollm2-135m-instruct"),
    Bad("two sources of keys", *in_gateway("auth: {keys_file: k, keys_env: K}"),
        f"{S}gateway.auth", "both given", "keep one of them"),
    Bad("key instead of its variable", *in_gateway("auth: {keys_env: sk-1234}"),
        f"{S}gateway.auth.keys_env", "no name of an environment", "write the variable's name"),
    # Between keys
    Bad("pool name twice", DECODE, DECODE + f"      - name: decode{MARK}\n        role: decode\n"
        "        engine: simulated\n",
        f"{S}pools[2].name", 'already the name of pools[1]', "a name of its own"),
    Bad("island name twice", GATEWAY, f"      - name: one{MARK}\n        pools: [more]\n" + GATEWAY,
        f"{S}islands[1].name", "already the name of islands[0]", "a name of its own"),
    Bad("unknown pool in island", "pools: [prefill, decode]", f"pools: [prefill, decod]{MARK}",
        f"{S}islands[0].pools[1]", 'no pool is called "decod"', "did you mean `decode`?"),
    Bad("pool twice in island", "[prefill, decode]", f"[prefill, decode, decode]{MARK}",
        f"{S}islands[0].pools[2]", "is listed twice", "keep one"),
    Bad("pool in two islands", GATEWAY,
        f"      - name: two\n        pools: [decode]{MARK}\n" + GATEWAY,
        f"{S}islands[1].pools[0]", 'also in island "one"', "keep it in one island"),
    Bad("pool in no island", DECODE, DECODE + f"      - name: spare{MARK}\n        role: mixed\n"
        "        engine: simulated\n",
        f"{S}pools[2].name", 'pool "spare" is in no island', "(islands: one)"),
    Bad("link to unknown pool", *in_serving("links: [{prefill: prefil, decode: decode}]"),
        f"{S}links[0].prefill", 'no pool is called "prefil"', "did you mean `prefill`?"),
    Bad("link the wrong way round", *in_serving("links: [{prefill: decode, decode: decode}]"),
        f"{S}links[0].prefill", 'pool "decode" has role decode', "with `role: prefill`"),
    Bad("link twice", GATEWAY, "    links:\n      - {prefill: prefill, decode: decode}\n"
        f"      - {{prefill: prefill, decode: decode}}{MARK}\n" + GATEWAY,
        f"{S}links[1]", "the same link as links[0]", "keep one"),
    Bad("link across islands", "        pools: [prefill, decode]\n",
        "        pools: [prefill]\n      - name: two\n        pools: [decode]\n"
        f"    links: [{{prefill: prefill, decode: decode}}]{MARK}\n",
        f"{S}links[0]", '"prefill" is in island "one", "decode" in "two"', "pools of one island"),
    Bad("prefill with no link", "role: decode", "role: mixed",
        f"{P0}role", 'has no link: island "one" has no decode pool',
        "or write `role: mixed` here"),
    Bad("decode with no link", "role: prefill", "role: mixed",
        f"{P1}role", 'has no link: island "one" has no prefill pool',
        "a pool with `role: prefill`"),
    Bad("no pool decodes", "role: decode", "role: prefill",
        f"{S}pools", "zero decode workers: every pool has role prefill",
        "give one pool `role: decode`"),
    Bad("zero decode workers", DECODE, DECODE + f"        replicas: 0{MARK}\n",
        f"{P1}replicas", "zero decode workers: no replica of decode",
        "write `replicas: 1` or more"),
    Bad("engines mixed", DECODE, DECODE.replace("simulated", f"vllm{MARK}"),
        f"{P1}engine", 'engine vllm, but pool "prefill"', "one engine within an island"),
    Bad("nixl from 8 to 4", *in_both("parallel: {tensor: 8}", "parallel: {tensor: 4}"),
        f"{P1}parallel.tensor", 'has 8, decode pool "decode" has 4',
        "divides the decode size (nixl)"),
    Bad("A2 with A3", *in_both("hardware: atlas_a2", "hardware: atlas_a3"),
        f"{P1}hardware", 'has Atlas A2, decode pool "decode" has Atlas A3', "islands of their own"),
    Bad("mooncake from 3 to 2", PREFILL + DECODE + ISLAND,
        PREFILL + "        parallel: {tensor: 3}\n" + DECODE + "        parallel: {tensor: 2}"
        f"{MARK}\n{ISLAND}        connector: mooncake\n",
        f"{P1}parallel.tensor", 'has 3, decode pool "decode" has 2', "one divides the other"),
    Bad("connector of another engine", PREFILL + DECODE + ISLAND,
        (PREFILL + DECODE).replace("simulated", "vllm_ascend")
        + f"{ISLAND}        connector: mooncake{MARK}\n",
        f"{S}islands[0].connector", 'mooncake, which engine vllm_ascend of pool "prefill"',
        "write ascend_mooncake or ascend_layerwise"),
    Bad("default connector of another engine", PREFILL + DECODE,
        (PREFILL + DECODE).replace("simulated", "sglang"),
        f"{S}islands[0].connector", 'nixl, which engine sglang of pool "prefill"',
        "write sglang_mooncake or sglang_nixl or sglang_ascend"),
    Bad("xllm decodes alone", DECODE, f"      - name: decode\n        role: decode{MARK}\n"
        "        engine: xllm\n",
        f"{P1}role", "decode with engine xllm; xLLM pairs", "write `role: mixed`"),
    Bad("ktransformers prefills", PREFILL, f"      - name: prefill\n        role: prefill{MARK}\n"
        "        engine: ktransformers\n",
        f"{P0}role", "prefill with engine ktransformers; KTransformers has no KV hand-over",
        "write `role: mixed`"),
    Bad("unlike weights", *in_both("model: {id: org/fp8}", "model: {id: org/w8a8}"),
        f"{P1}model.id", 'org/w8a8 here, org/fp8 in pool "prefill"', "the same value in both"),
    Bad("unlike KV dtypes", DECODE, DECODE + f"        model: {{kv_cache_dtype: fp8}}{MARK}\n",
        f"{P1}model.kv_cache_dtype", "fp8 here, auto in pool", "the same value in both"),
    Bad("block sizes differ", *in_both("block_size_tokens: 16", "block_size_tokens: 32"),
        f"{P1}block_size_tokens", '32 here, 16 in pool "prefill"', "the same value in both"),
    Bad("one block size unset", DECODE, DECODE + f"        block_size_tokens: 32{MARK}\n",
        f"{P1}block_size_tokens", "32 here, unset in pool", "the same value in both"),
    Bad("only prefill has the layers that draft", PREFILL,
        PREFILL + "        speculative: {method: deepseek_mtp, num_speculative_tokens: 1}\n",
        f"{P1}speculative.method", 'unset here, mtp in pool "prefill"', "the same value in both"),
    Bad("hash seeds differ", *in_both("env: {PYTHONHASHSEED: '1'}", "env: {PYTHONHASHSEED: '2'}"),
        f"{P1}env.PYTHONHASHSEED", "2 here, 1 in pool", "the same value in both"),
    Bad("attention backends differ", *in_both("engine_args: {attention-backend: A}",
        "engine_args: {attention_backend: B}"),
        f"{P1}engine_args.attention-backend", "B here, A in pool", "the same value in both"),
    # Within a pool
    Bad("simulated block", f"{PREFILL}{DECODE}", f"{PREFILL}{DECODE}".replace("simulated", "vllm")
        + f"        simulated: {{}}{MARK}\n",
        f"{P1}simulated", "on a pool with engine vllm", "`engine: simulated`"),
    Bad("ranks over nodes", *in_prefill("nodes_per_replica: 2"),
        f"{P0}nodes_per_replica", "= 1 ranks cannot be spread over 2 nodes", "a multiple of 2"),
    Bad("copies over nodes", *in_decode("parallel: {tensor: 2, data: 3}", "nodes_per_replica: 2"),
        f"{P1}parallel.data", "3 copies cannot be spread over 2 nodes", "multiple of nodes_per"),
    Bad("too few devices", *in_decode("placement: {resources: {GPU: 2}}", "parallel: {tensor: 4}"),
        f"{P1}placement.resources.GPU", "found 2, but tensor 4", "write 4, one GPU per rank"),
    Bad("vllm on NPUs", PREFILL, PREFILL.replace("simulated", f"vllm{MARK}")
        + "        placement: {resources: {NPU: 8}}\n",
        f"{P0}engine", "vllm cannot use the NPU", "write `engine: vllm_ascend`"),
    Bad("vllm_ascend on GPUs", PREFILL, PREFILL.replace("simulated", f"vllm_ascend{MARK}")
        + "        placement: {resources: {GPU: 8}}\n",
        f"{P0}engine", "vllm_ascend cannot use the GPU", "write `engine: vllm`"),
    Bad("H200 without GPU", PREFILL, PREFILL.replace("simulated", "vllm")
        + f"        hardware: h200{MARK}\n",
        f"{P0}hardware", "asks for no GPU", "add `GPU: N`"),
    Bad("Atlas with GPU", PREFILL, PREFILL.replace("simulated", "sglang")
        + f"        hardware: atlas_a3\n        placement: {{resources: {{GPU: 8}}}}{MARK}\n",
        f"{P0}placement.resources.GPU", "Atlas A3 has no GPU", "ask for NPU"),
    Bad("CPU with GPU", PREFILL, PREFILL.replace("simulated", "vllm")
        + f"        hardware: cpu\n        placement: {{resources: {{GPU: 1}}}}{MARK}\n",
        f"{P0}placement.resources.GPU", "CPU has no GPU", "take it out, or correct `hardware`"),
    Bad("too many dies for an A2", PREFILL, PREFILL.replace("simulated", "vllm_ascend")
        + f"        hardware: atlas_a2\n        placement: {{resources: {{NPU: 16}}}}{MARK}\n",
        f"{P0}placement.resources.NPU", "found 16; one Atlas A2 node has 8", "8 or less"),
    Bad("too many dies for an A3", PREFILL, PREFILL.replace("simulated", "vllm_ascend")
        + f"        hardware: atlas_a3\n        placement: {{resources: {{NPU: 32}}}}{MARK}\n",
        f"{P0}placement.resources.NPU", "found 32; one Atlas A3 node has 16", "16 or less"),
    Bad("longer than the model", f"{MODEL}{PREFILL}{DECODE}",
        f"{SHORT}{PREFILL}{DECODE}        max_model_len_tokens: 9000{MARK}\n",
        f"{P1}max_model_len_tokens", "found 9000, more than the model's", "write 4096 or less"),
    Bad("decode takes what nobody may prefill", f"{MODEL}{PREFILL}{DECODE}{ISLAND}",
        f"{SHORT}{PREFILL}        max_model_len_tokens: 2000{MARK}\n{DECODE}{ISLAND}"
        "        on_prefill_failure: fail\n",
        f"{P0}max_model_len_tokens", 'found 2000, less than decode pool "decode" takes (4096)',
        "write 4096, lower the decode pool's, or write `on_prefill_failure: recompute`"),
    Bad("half an accelerator too many", *in_prefill("placement: {resources: {NPU: 1.5}}"),
        f"{P0}placement.resources.NPU", "found 1.5", "write a whole number"),
    Bad("flag we set", *in_prefill("engine_args: {max_num_seqs: 4}"),
        f"{P0}engine_args.max_num_seqs", "pdcluster sets this engine flag",
        "the pool's max_num_seqs"),
    Bad("part of a flag we set", *in_prefill("engine_args: {speculative-config.method: mtp}"),
        f'{P0}engine_args["speculative-config.method"]', "sets this engine flag", "speculative"),
    Bad("denied flag we set", *in_prefill("engine_args: {no-trust-remote-code: true}"),
        f"{P0}engine_args.no-trust-remote-code", "sets this engine flag",
        "model.trust_remote_code"),
    Bad("flag with dashes", *in_prefill("engine_args: {--enforce-eager: true}"),
        f'{P0}engine_args["--enforce-eager"]', "with its dashes", "write `enforce-eager`"),
    Bad("secret flag", *in_prefill("engine_args: {hf-token: abc}"),
        f"{P0}engine_args.hf-token", "looks like a secret", "export it"),
    Bad("variable we set", *in_prefill("env: {CUDA_VISIBLE_DEVICES: '0'}"),
        f"{P0}env.CUDA_VISIBLE_DEVICES", "sets this variable itself", "placement.resources"),
    Bad("no variable", *in_prefill("env: {A B: x}"),
        f'{P0}env["A B"]', "no name of an environment variable", "underscores only"),
    *(
        Bad(f"secret {name}", *in_prefill(f"env: {{{name}: hunter2}}"),
            f"{P0}env.{name}", "looks like a secret in plain text", "keys_env")
        for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET", "DB_PASSWORD")
    ),
    Bad("no name for clients", "{id: simulated}", f"{{id: /}}{MARK}",
        f"{S}model.id", "leaves no name", "served_name"),
    Bad("HAProxy's port", "port: 8000", f"port: 8404{MARK}",
        f"{S}gateway.port", "belongs to HAProxy's statistics", "or `ingress: direct`"),
    Bad("Serve's ports", "port: 8000", f"port: 30500{MARK}",
        f"{S}gateway.port", "belongs to Serve's own replicas", "another port"),
    Bad("backoff", *in_serving("health: {restart_backoff_s: 9, restart_backoff_max_s: 2}"),
        f"{S}health.restart_backoff_max_s", "found 2, less than", "write 9 or more"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.title)
def test_a_bad_file_is_told_where_it_is_wrong_and_what_to_write(bad: Bad, tmp_path: Path) -> None:
    assert BASE.count(bad.old) == 1, "the case does not say which part of the base it changes"
    text = BASE.replace(bad.old, bad.new)
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(TopologyError) as caught:
        load(path)
    faults = caught.value.faults
    fault = next((fault for fault in faults if fault.key == bad.key), None)
    assert fault is not None, "\n".join(map(str, faults))
    assert bad.found in fault.found
    assert bad.fix in fault.fix
    assert fault.file.endswith("t.yaml")
    if MARK in text:
        assert fault.line == text[: text.index(MARK)].count("\n") + 1
    assert "hunter2" not in str(fault)
    assert "sk-1234" not in str(fault)
    assert "20231123" not in str(fault)
