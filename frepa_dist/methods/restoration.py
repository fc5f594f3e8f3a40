"""Terms that compare a restored image with the clean one, and their settings (Frepa, arXiv 2407.14651).

Shapes: B micro-batch, S image side.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from frepa_dist.losses import (
    HFL_CUTOFFS,
    focal_frequency_loss,
    gradient_l1,
    hierarchical_frequency_loss,
    rmse,
)
from frepa_dist.methods.base import MethodSettings, StepInfo
from frepa_dist.methods.terms import TermConfig
from frepa_dist.spectrum import DETAIL_CYCLES, energy_kept

MEASURED_IMAGES = 4  # of a micro-batch, so that it takes less than half a percent of a step of 8 images


class RmseConfig(TermConfig):
    """The root mean squared error.

    Attributes:
        per: `image`, or `batch` as in the authors' code, which depends on how a batch is cut.
    """

    per: Literal["image", "batch"] = "image"


class HflConfig(TermConfig):
    """The hierarchical frequency-to-spatial loss.

    Attributes:
        cutoffs: of its high-pass filters, in cycles per image side.
    """

    weight: float = Field(default=0.2, ge=0)
    cutoffs: tuple[float, ...] = Field(default=HFL_CUTOFFS, min_length=1)


class FocalConfig(TermConfig):
    """The focal frequency loss; Frepa's authors saw aliasing in what it trains.

    Attributes:
        alpha: exponent of its weights.
    """

    alpha: float = Field(default=1.0, ge=0)


class RestorationConfig(MethodSettings):
    """Settings of a method that restores images; a term that is null or has weight 0 is not computed.

    Attributes:
        rec: root mean squared error.
        gradient: mean absolute error of the forward differences.
        hfl: hierarchical frequency-to-spatial loss.
        focal: focal frequency loss.
    """

    rec: RmseConfig | None = RmseConfig()
    gradient: TermConfig | None = TermConfig()
    hfl: HflConfig | None = HflConfig()
    focal: FocalConfig | None = None

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        terms = (self.rec, self.gradient, self.hfl, self.focal)
        if not any(
            term and term.weight and not (term.warmup_fraction or term.ramp_fraction) for term in terms
        ):
            raise ValueError("one of 'rec', 'gradient', 'hfl' and 'focal' must weigh something in every step")
        return self


def restoration_terms(
    config: RestorationConfig, names: Container[str], prediction: Tensor, clean: Tensor
) -> dict[str, Tensor]:
    """Compute those of `names` that compare the prediction with the clean images, (B, 3, S, S) each."""
    terms = {}
    if config.rec is not None and "rec" in names:
        terms["rec"] = rmse(prediction, clean, per=config.rec.per)
    if "gradient" in names:
        terms["gradient"] = gradient_l1(prediction, clean)
    if config.hfl is not None and "hfl" in names:
        terms["hfl"] = hierarchical_frequency_loss(prediction, clean, config.hfl.cutoffs)
    if config.focal is not None and "focal" in names:
        terms["focal"] = focal_frequency_loss(prediction, clean, config.focal.alpha)
    return terms


def detail_metrics(prediction: Tensor, clean: Tensor, info: StepInfo) -> dict[str, Tensor]:
    """Measure `hf_share` in logged steps: energy of the restored detail over that of the true one.

    It is the mean of `spectrum.energy_kept`, of grey images, over the first of a micro-batch; images without
    detail are left out. An estimate that costs little.

    Args:
        prediction: (B, 3, S, S).
        clean: (B, 3, S, S), what it is to be.
        info: where training stands.
    """
    if not info.is_logged:
        return {}
    grey = [x[:MEASURED_IMAGES].detach().float().mean(dim=1, keepdim=True) for x in (prediction, clean)]
    return {"hf_share": energy_kept(grey[0], grey[1], DETAIL_CYCLES).nanmean()}
