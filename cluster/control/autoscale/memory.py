"""What a pool's past says: windows, cooldowns, and the correction that latency taught. Pure.

Called by: policy. Every function takes a PoolMemory and hands back a value or a new one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from cluster.control.autoscale.decision import NeedSample, PoolMemory
from cluster.control.autoscale.signals import known
from cluster.topology.scaling import ScalingSpec

# What the load does not explain is answered in small steps up to a bound: latency has other causes
# than too few replicas, and a slow network must not buy the whole rack.
_CORRECTION_STEP = 1.1
_MOST_CORRECTION = 1.5
# A correction was learnt at one load; at much less it says nothing any more. It does not run out
# with time: at a steady load it would be forgotten and learnt again for ever.
_FORGET_BELOW = 0.7
# Decisions may come late; a longer pause than this many makes the windows begin anew.
_LONGEST_GAP_INTERVALS = 3
# Batches are remembered in this many sizes per doubling, and a size follows what is measured by
# this share each time.
_SIZES_PER_DOUBLING = 4
_FOLLOW = 0.1


def with_steps(memory: PoolMemory, points: Iterable[tuple[float, float]]) -> PoolMemory:
    """Add measured (batch, step time) points.

    A steady load shows one size of batch only. Were the others forgotten, how steps grow with the
    batch would be too, and the pool would be made smaller to find out again."""
    sizes = {_size(batch): (batch, step_s) for batch, step_s in memory.steps}
    for batch, step_s in points:
        if not (known(batch) and known(step_s)):
            continue
        old = sizes.get(_size(batch))
        if old is not None:
            batch, step_s = (
                o + _FOLLOW * (n - o) for o, n in zip(old, (batch, step_s), strict=True)
            )
        sizes[_size(batch)] = (batch, step_s)
    return replace(memory, steps=tuple(sizes[size] for size in sorted(sizes)))


def _size(batch: float) -> int:
    return math.floor(_SIZES_PER_DOUBLING * math.log2(batch))


def with_sample(policy: ScalingSpec, memory: PoolMemory, sample: NeedSample) -> PoolMemory:
    """Add one need, and drop those that no window reaches back to."""
    kept = memory.samples
    longest_gap_s = max(policy.load_window_s, _LONGEST_GAP_INTERVALS * policy.interval_s)
    if kept and not 0 <= sample.at_s - kept[-1].at_s <= longest_gap_s:
        kept = ()
    kept = (*kept, sample)
    longest_s = max(policy.up_window_s, policy.role_window_s, policy.down_window_s)
    # One sample from before the window stays: it shows that the window is covered.
    begins = max((i for i, s in enumerate(kept) if s.at_s <= sample.at_s - longest_s), default=0)
    return replace(memory, samples=kept[begins:])


def lowest_need(memory: PoolMemory, window_s: float, now_s: float) -> NeedSample | None:
    """The least that was needed in the window, either way. None: it is not covered yet."""
    window = _window(memory, window_s, now_s)
    if not window:
        return None
    return NeedSample(now_s, min(s.need for s in window), min(s.need_with_headroom for s in window))


def highest_need(memory: PoolMemory, window_s: float, now_s: float) -> int | None:
    """The most that was needed in the window, headroom included. None: it is not covered yet."""
    return max((s.need_with_headroom for s in _window(memory, window_s, now_s)), default=None)


def rest_s(since_s: float | None, cooldown_s: float, now_s: float) -> float:
    """Seconds of a cooldown that are still to go."""
    return 0.0 if since_s is None else max(0.0, since_s + cooldown_s - now_s)


def without_old_correction(memory: PoolMemory, load: float | None) -> PoolMemory:
    """Forget the correction if the load (tokens/s) has become much smaller since."""
    if load is None or load >= _FORGET_BELOW * memory.corrected_at_load:
        return memory
    return replace(memory, correction=1.0, corrected_at_load=0.0)


def corrected(
    policy: ScalingSpec, memory: PoolMemory, is_unexplained: bool, load: float, now_s: float
) -> PoolMemory:
    """Take the load for larger once latency has been worse than it explains for long enough.

    `is_unexplained`: the target is being missed although all that is needed is ready."""
    settling_s = rest_s(memory.changed_at_s, policy.load_window_s, now_s)
    if not is_unexplained or settling_s > 0:
        return replace(memory, missed_since_s=None)
    if memory.missed_since_s is None:
        return replace(memory, missed_since_s=now_s)
    # Percentiles are over load_window_s: a miss that lasts this long is not one old request.
    if now_s - memory.missed_since_s < max(policy.up_window_s, policy.load_window_s):
        return memory
    return replace(
        memory,
        correction=min(_MOST_CORRECTION, memory.correction * _CORRECTION_STEP),
        corrected_at_load=max(load, memory.corrected_at_load),
        missed_since_s=None,
    )


def _window(memory: PoolMemory, window_s: float, now_s: float) -> tuple[NeedSample, ...]:
    samples = memory.samples
    if not samples or samples[0].at_s > now_s - window_s:
        return ()
    return tuple(s for s in samples if s.at_s >= now_s - window_s)
