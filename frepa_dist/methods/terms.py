"""Terms of a loss: how much each weighs at which step."""

from __future__ import annotations

from pydantic import Field

from frepa_dist.methods.base import StepInfo
from shards.support.settings import Settings


class TermConfig(Settings):
    """One term of a loss.

    Attributes:
        weight: of the term, after warm-up and ramp.
        warmup_fraction: share of the steps without the term.
        ramp_fraction: share of the steps, after those, in which the weight rises linearly from 0.
    """

    weight: float = Field(default=1.0, ge=0)
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    ramp_fraction: float = Field(default=0.0, ge=0, le=1)


def scheduled_weight(term: TermConfig | None, info: StepInfo) -> float:
    """Return the weight of a term in a step: 0 in the warm-up, then a ramp, then `weight`; 0 for None."""
    if term is None:
        return 0.0
    past = info.step - term.warmup_fraction * info.total_steps
    ramp = term.ramp_fraction * info.total_steps
    share = float(past >= 0) if ramp == 0 else min(max(past / ramp, 0.0), 1.0)
    return term.weight * share


def is_active(term: TermConfig | None, info: StepInfo) -> bool:
    """Whether a term's warm-up is over; at the foot of its ramp it is active and still weighs nothing."""
    if term is None or not term.weight:
        return False
    return info.step >= term.warmup_fraction * info.total_steps
