"""Make speculative decoding sample rightly on CPU engines without Triton.

Two faults of vLLM 0.32, both outside greedy decoding, both measured with n-gram drafts:

- Per-request values (temperature, top_k, top_p) are spread over that request's draft tokens by a
  kernel whose CPU version writes into a copy unless the values are int64. The sampler then reads
  uninitialised memory: at best wrong samples, with top_k "selected index k out of range", which
  ends the engine (vllm-project/vllm pull request 42638).
- A step in which no request has a draft token, with top_k: "max(): Expected reduction dim", which
  ends the engine too.

vLLM's registry for platform kernels cannot be used this late: it walks every loaded module and
stumbles over foreign ones. So the two functions are exchanged, for the whole process, and only
where the first proves faulty.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample import rejection_sampler


def repair() -> bool:
    """Exchange the functions if they are faulty here; say whether that was needed."""
    if _is_right():
        return False
    stock_constraints = rejection_sampler.apply_sampling_constraints

    def apply_sampling_constraints(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock_constraints(logits, *args, **kwargs) if logits.shape[0] else logits

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    rejection_sampler.apply_sampling_constraints = apply_sampling_constraints
    return True


def _is_right() -> bool:
    values = torch.tensor([0.25, 0.75])
    try:
        spread = rejection_sampler.expand_batch_to_tokens(values, torch.tensor([1, 3]), 3)
    except (RuntimeError, TypeError):
        return False
    return bool(spread.tolist() == [0.25, 0.75, 0.75])


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """`x[i]` for every token of request i, with `replace_from` exchanged for `replace_to`.

    `cu_num_tokens` are running totals per request; the last one is `num_tokens`."""
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    values = torch.where(x == replace_from, replace_to, x).to(x.dtype)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
