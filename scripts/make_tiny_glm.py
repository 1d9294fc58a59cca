#!/usr/bin/env python3
"""Make `tiny-glm-mtp`, the model that topologies/local-glm-mtp.yaml serves.

A GLM-architecture mixture of experts with a multi-token-prediction (MTP) layer, 1.3 million
parameters, with its own tokenizer. Both are trained here, from a fixed seed, on the docstrings of
the Python standard library: text that every Python installation carries.

    scripts/make_tiny_glm.py cluster/models/tiny_glm_mtp    five minutes on an idle core
    scripts/make_tiny_glm.py FOLDER --steps 20              to see that it runs

The first writes what the package has; REVISION in cluster/models/tiny_glm.py goes with it. Needs
torch and transformers, which vLLM brings. With the versions in the weights' metadata and on a like
processor every tensor comes out the same, bit by bit (run twice). Another Python has other
docstrings, and another torch or processor rounds otherwise, which training carries on: a model
alike, not the same one.

It is a model of a language model: it continues docstrings, word by word plausibly, and knows
nothing. What it is for is real: its MTP layer was trained on the hidden states of its own body, so
an engine that drafts with it sees tokens accepted.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

SEED = 20_260
VOCABULARY = 1024
END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
LAYERS = 3  # the MTP layer comes on top
SEQUENCE, BATCH = 256, 8
# One: sums are split among threads, so their number would show in the last bits. Nor is it slower
# on a machine that does other things too: two threads wait for each other.
THREADS = 1
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def docstrings() -> Iterator[str]:
    """Every docstring of the standard library's own modules, in the order of file names."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    yield " ".join(text.split())


def as_lessons(texts: list[str]) -> list[str]:
    """Every other text as a chat in which the answer goes on where the question broke off."""
    rng = random.Random(SEED)
    lessons = []
    for index, text in enumerate(texts):
        words = text.split(" ")
        if index % 2 and len(words) > 4:
            cut = rng.randrange(2, len(words) - 1)
            text = f"{USER}{' '.join(words[:cut])}{ASSISTANT}{' '.join(words[cut:])}"
        lessons.append(text)
    return lessons


def make_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_config() -> Glm4MoeConfig:
    """With one layer more than the body has: the last is the MTP block."""
    return Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
        eos_token_id=0,
        pad_token_id=0,
        num_mtp_layers=0,
    )


class Multi(nn.Module):
    """Body and MTP layer, as vLLM runs them: the MTP layer at position t sees the body's normed
    hidden state of t and the embedding of token t+1, and predicts token t+2. Asked again for the
    token after that, it sees its own hidden state in place of the body's."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.whole = Glm4MoeForCausalLM(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.RMSNorm(hidden, eps=eps)
        self.hnorm = nn.RMSNorm(hidden, eps=eps)
        self.head_norm = nn.RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the next token, (batch, time, vocabulary), and of the two after it, each
        shorter by one in time."""
        model = self.whole.model
        length = ids.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        embedded = model.embed_tokens(ids)
        rotary = model.rotary_emb(embedded, positions)

        def layer(index: int, x: torch.Tensor, n: int) -> torch.Tensor:
            out = model.layers[index](
                x,
                attention_mask=mask[:, :, :n, :n],
                position_ids=positions[:, :n],
                position_embeddings=tuple(part[:, :n] for part in rotary),
            )
            return out[0] if isinstance(out, tuple) else out

        x = embedded
        for index in range(LAYERS):
            x = layer(index, x, length)
        x = model.norm(x)
        logits = [self.whole.lm_head(x)]
        for step in (1, 2):
            seen = torch.cat([self.enorm(embedded[:, step:]), self.hnorm(x[:, :-1])], dim=-1)
            x = layer(LAYERS, self.eh_proj(seen), length - step)
            logits.append(self.whole.lm_head(self.head_norm(x)))
        return tuple(logits)


def train(model: Multi, ids: torch.Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1
    )
    begun = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - SEQUENCE - 1, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + SEQUENCE] for start in starts.tolist()])
        losses = [
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, ahead:].flatten())
            for ahead, logits in enumerate(model(batch), start=1)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            told = " ".join(f"{loss.item():.2f}" for loss in losses)
            took_s = time.monotonic() - begun
            print(f"step {step}/{steps} losses={told} took_s={took_s:.0f}", file=sys.stderr)


def save(model: Multi, tokenizer: Tokenizer, folder: Path, made_with: dict[str, str]) -> None:
    """In the published layout of GLM's checkpoints: the MTP layer is layer number LAYERS. Without
    its second copies of embedding and head, which are the body's: engines take those."""
    folder.mkdir(parents=True, exist_ok=True)
    model.whole.to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    extra = {
        "enorm.weight": model.enorm.weight,
        "hnorm.weight": model.hnorm.weight,
        "eh_proj.weight": model.eh_proj.weight,
        "shared_head.norm.weight": model.head_norm.weight,
    }
    for name, weight in extra.items():
        weights[f"model.layers.{LAYERS}.{name}"] = weight.detach().to(torch.bfloat16).clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", **made_with})
    (folder / "model.safetensors").chmod(0o644)  # it comes out readable by its owner only
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "architectures": ["Glm4MoeForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 1,
    }
    config.pop("num_mtp_layers", None)
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "model_max_length": 4096,
            "chat_template": CHAT,
        },
    )


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--steps", type=int, default=800, help="default: 800")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    texts = list(docstrings())
    tokenizer = make_tokenizer(texts)
    ids = torch.tensor(tokenizer.encode(END.join(as_lessons(texts))).ids)
    model = Multi(make_config())
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{len(ids)} tokens, {parameters / 1e6:.1f} M parameters", file=sys.stderr)
    train(model, ids, options.steps)
    made_with = {"python": platform.python_version(), "torch": torch.__version__}
    made_with |= {"transformers": transformers.__version__, "steps": str(options.steps)}
    save(model, tokenizer, options.folder, made_with)


if __name__ == "__main__":
    main()
