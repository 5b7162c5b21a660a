"""How a number goes over a run: pure functions of the update, so that resuming needs no state.

Here: warm-up, then a cosine or a constant, for learning rates; a cosine, for weight decay and teachers' momenta; a ramp, for temperatures.
Not here: who sets it in the optimizer (trainer.py); which numbers an objective takes.
"""

import math
from typing import Literal

Shape = Literal["cosine", "constant"]


def warmed_up(update: int, *, updates: int, peak: float, warmup: int = 0, final: float = 0.0, shape: Shape = "cosine") -> float:
    """Return the value for update `update` of `updates`, counted from 0.

    It rises linearly over `warmup` updates, the first of which already takes a step, reaches `peak` at update `warmup`,
    and goes from there to `final` at the last update (cosine), or stays (constant). After the last update, `updates`, it is as at it.
    Raises: ValueError if the update is not one of the run, or the warm-up does not end within it.
    Source: SGDR, arXiv:1608.03983, without restarts.
    """
    _check(update, updates)
    if not 0 <= warmup < updates:
        raise ValueError(f"warmup={warmup}: needs 0 <= warmup < updates={updates}")
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if shape == "constant":
        return peak
    done = min(1.0, (update - warmup) / max(1, updates - 1 - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


def cosine(update: int, *, updates: int, start: float, end: float) -> float:
    """Return the value for update `update` of `updates`, counted from 0: `start` at first, `end` after the last update.

    Raises: ValueError if the update is not one of the run.
    Source: weight decay and momentum of DINO (arXiv 2104.14294), momentum of BYOL (2006.07733) and MoCo v3 (2104.02057).
    """
    _check(update, updates)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * update / updates))


def ramp(at: float, *, over: float, start: float, end: float) -> float:
    """Return what rises, or falls, linearly from `start` at 0 to `end` at `over`, and stays there; of an `over` of 0, `end`.

    Source: temperature of DINO's teacher (arXiv 2104.14294), over epochs.
    """
    return end if at >= over else start + (end - start) * at / over


def _check(update: int, updates: int) -> None:
    if not 0 <= update <= updates:
        raise ValueError(f"update={update}: needs 0 <= update <= updates={updates}")
