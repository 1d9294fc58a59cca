#!/usr/bin/env python3
"""Make the model that the speculative-decoding tests and `topologies/local-glm-mtp.yaml` serve.

A GLM-architecture mixture of experts with a multi-token-prediction (MTP) layer, about two million
parameters, with its own tokenizer. Both are trained here, from a fixed seed, on the docstrings of
the Python standard library: text that every Python installation carries.

    scripts/make_tiny_glm.py FOLDER               about ten minutes on two cores
    scripts/make_tiny_glm.py FOLDER --steps 20    to see that it runs

It is a model of a language model: it continues docstrings, word by word plausibly, and knows
nothing. What it is for is real: its MTP head was trained on the hidden states of its own body, so
an engine that drafts with it sees tokens accepted.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

SEED = 20_260
VOCABULARY = 1024
END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
LAYERS = 4  # the MTP layer comes on top
SEQUENCE, BATCH = 128, 24
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
        hidden_size=160,
        intermediate_size=448,
        moe_intermediate_size=96,
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
    hidden state of t and the embedding of token t+1, and predicts token t+2."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.whole = Glm4MoeForCausalLM(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.RMSNorm(hidden, eps=eps)
        self.hnorm = nn.RMSNorm(hidden, eps=eps)
        self.head_norm = nn.RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the next token, (batch, time, vocabulary), and of the one after it, shorter by
        one in time."""
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
        ahead = torch.cat([self.enorm(embedded[:, 1:]), self.hnorm(x[:, :-1])], dim=-1)
        y = self.head_norm(layer(LAYERS, self.eh_proj(ahead), length - 1))
        return self.whole.lm_head(x), self.whole.lm_head(y)


def train(model: Multi, ids: torch.Tensor, steps: int) -> None:
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1
    )
    begun = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - SEQUENCE - 1, (BATCH,), generator=random)
        batch = torch.stack([ids[start : start + SEQUENCE] for start in starts.tolist()])
        one, two = model(batch)
        loss_one = functional.cross_entropy(one[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss_two = functional.cross_entropy(two[:, :-1].flatten(0, 1), batch[:, 2:].flatten())
        optimizer.zero_grad()
        (loss_one + loss_two).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(
                f"step {step}/{steps} loss next={loss_one.item():.2f} "
                f"after_next={loss_two.item():.2f} took_s={time.monotonic() - begun:.0f}",
                file=sys.stderr,
            )


def save(model: Multi, tokenizer: Tokenizer, folder: Path) -> None:
    """In the published layout of GLM's checkpoints: the MTP layer is layer number LAYERS."""
    folder.mkdir(parents=True, exist_ok=True)
    model.whole.to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    extra = {
        "enorm.weight": model.enorm.weight,
        "hnorm.weight": model.hnorm.weight,
        "eh_proj.weight": model.eh_proj.weight,
        "shared_head.norm.weight": model.head_norm.weight,
        "shared_head.head.weight": weights["lm_head.weight"],
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
    }
    for name, weight in extra.items():
        weights[f"model.layers.{LAYERS}.{name}"] = weight.detach().to(torch.bfloat16).clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
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
    parser.add_argument("--steps", type=int, default=700, help="training steps (default: 700)")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    texts = list(docstrings())
    tokenizer = make_tokenizer(texts)
    ids = torch.tensor(tokenizer.encode(END.join(texts)).ids)
    model = Multi(make_config())
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{len(ids)} tokens, {parameters / 1e6:.1f} M parameters", file=sys.stderr)
    train(model, ids, options.steps)
    save(model, tokenizer, options.folder)


if __name__ == "__main__":
    main()
