"""Frepa (arXiv 2407.14651; IEEE TMI 2025, doi 10.1109/TMI.2025.3559402): restore corrupted whole images.

The encoder sees the whole corrupted image, no token is dropped, so any backbone serves. Against the clean
image the prediction minimizes

    L = RMSE + 1.0 L_gradient + 0.2 L_hfl (+ focal frequency loss, an ablation)
        + 0.1 consistency + adversarial terms + 0.1 L_hmi

The last line is optional. No formula of the adversarial and consistency terms is public: their forms are
choices. L_hmi is that of RetMAE (openreview K5tcKEQaUr): the encoder's mean over the corrupted image shares
information with what an exponential moving average (EMA) of it makes of the clean image's high-frequency (HF)
tokens alone.

Shapes: B micro-batch, S image side, E width and h, w sides of the embedding, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from frepa_dist.corruption import CorruptionConfig
from frepa_dist.corruption.batch import to_device
from frepa_dist.methods.adversaries import (
    Adversary,
    EmbeddingAdversary,
    EmbeddingAdversaryConfig,
    ImageAdversary,
    ImageAdversaryConfig,
    Seen,
)
from frepa_dist.methods.base import (
    Batch,
    Comm,
    Losses,
    Method,
    Preview,
    StepInfo,
    SubmoduleSpec,
)
from frepa_dist.methods.mine_term import HmiConfig, MineTerm, ema_momentum, teacher_tokens
from frepa_dist.methods.restoration import RestorationConfig, detail_metrics, restoration_terms
from frepa_dist.methods.terms import TermConfig, is_active, scheduled_weight
from frepa_dist.methods.whole_image import (
    check_corruption,
    clean_images,
    corrupt_batch,
    kind_shares,
    preview_corruptions,
    restore_images,
    run_student,
    student_spec,
    used_kinds,
)
from frepa_dist.models.autoencoder import BackboneAutoencoder, create_autoencoder
from frepa_dist.models.backbones import BackboneSettings, PooledEncoder, create_backbone
from frepa_dist.models.catalog import BACKBONES
from frepa_dist.models.critic import MineCritic
from frepa_dist.models.masked_backbone import CellEncoder
from frepa_dist.normalization import standardize


class ConsistencyConfig(TermConfig):
    """1 - cos between the embeddings of two corruptions of one image, the mean over positions."""

    weight: float = Field(default=0.1, ge=0)


class FrepaConfig(RestorationConfig):
    """Settings of Frepa; a term that is null or has weight 0 is not computed. See also `RestorationConfig`.

    Attributes:
        model: the network.
        corruption: how images are corrupted.
        consistency: the term between two corruptions; the student then sees twice as many images.
        adversarial_image, adversarial_embedding: the terms with discriminators.
        hmi: RetMAE's term.
    """

    name: Literal["frepa"] = "frepa"
    model: BackboneSettings = BackboneSettings()
    corruption: CorruptionConfig = CorruptionConfig()
    consistency: ConsistencyConfig | None = None
    adversarial_image: ImageAdversaryConfig | None = None
    adversarial_embedding: EmbeddingAdversaryConfig | None = None
    hmi: HmiConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_corruption(self.model, self.corruption)
        if self.adversarial_embedding is not None and len(used_kinds(self.corruption)) < 2:
            raise ValueError("'adversarial_embedding' needs two kinds in 'corruption' to tell apart")
        channel, family = self.model.input_channel, BACKBONES[self.model.backbone].family
        if self.hmi is not None and channel is not None and family != "vit":
            raise ValueError(
                f"'hmi' with input_channel on {self.model.backbone}: its teacher sees hidden cells, and the "
                "filter would answer to their edges; leave out one of the two, or take a vision transformer"
            )
        return self


TERMS = (
    "rec",
    "gradient",
    "hfl",
    "focal",
    "consistency",
    "adversarial_image",
    "adversarial_embedding",
    "hmi",
)


def term_weights(config: FrepaConfig, info: StepInfo) -> dict[str, float]:
    """Return the weights of a step, of the terms that weigh something in it."""
    weights = {name: scheduled_weight(getattr(config, name), info) for name in TERMS}
    return {name: weight for name, weight in weights.items() if weight}


def consistency_loss(embedding: Tensor) -> Tensor:
    """1 - cos between the halves of (2 B, E, h, w), the mean over rows and positions; 0-dim float32."""
    first, second = embedding.float().chunk(2)
    return 1 - functional.cosine_similarity(first, second, dim=1).mean()


class Frepa(Method):
    """Restoration of corrupted images, with the terms of the module's text.

    Args:
        config: the settings.
        compute_dtype: not needed: all networks are the loop's.
    """

    name: ClassVar[str] = "frepa"
    config_class = FrepaConfig

    def __init__(self, config: FrepaConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self._kinds = used_kinds(config.corruption)
        self._hmi = config.hmi if config.hmi is not None and config.hmi.weight else None
        self._mine = MineTerm(self._hmi, "teacher") if self._hmi is not None else None
        self._adversaries: dict[str, Adversary] = {}
        if (image := config.adversarial_image) is not None and image.weight:
            self._add(ImageAdversary(image))
        if (embedding := config.adversarial_embedding) is not None and embedding.weight:
            shares = [config.corruption.kinds[kind] for kind in self._kinds]  # type: ignore[index]
            self._add(EmbeddingAdversary(embedding, self._embedding_width(), shares))

    def _add(self, adversary: Adversary) -> None:
        self._adversaries[adversary.opponent] = adversary

    def _encoder_width(self) -> int:
        with torch.device("meta"):
            return create_backbone(self.config.model).width

    def _create_teacher(self) -> nn.Module:
        """An encoder of the HF tokens: a map has no tokens to leave out, so its cells are hidden instead."""
        encoder = create_backbone(self.config.model)
        return PooledEncoder(encoder) if encoder.can_drop_tokens else CellEncoder(encoder)

    def _embedding_width(self) -> int:
        return self.config.model.neck_width or self._encoder_width()

    @classmethod
    def create_student(cls, config: FrepaConfig) -> BackboneAutoencoder:
        """See `Method`."""
        return create_autoencoder(config.model)

    @classmethod
    def previews(
        cls, student: nn.Module, images: Tensor, config: FrepaConfig, draw_keys: Sequence[int]
    ) -> list[Preview]:
        """See `Method`: one for each kind of corruption of the config."""
        return preview_corruptions(student, images, config.model, config.corruption, draw_keys)

    @classmethod
    def restore(cls, student: nn.Module, images: Tensor, config: FrepaConfig) -> Tensor:
        """See `Method`."""
        return restore_images(student, images, config.model)

    def submodules(self) -> dict[str, SubmoduleSpec]:
        """See `Method`."""
        specs = {"student": student_spec(self.config.model)}
        for opponent, adversary in self._adversaries.items():
            specs[opponent] = adversary.spec()
        if (hmi := self._hmi) is not None and self._mine is not None:
            specs["teacher"] = SubmoduleSpec(
                build=self._create_teacher,
                kind="ema",
                of="student",
                momentum=lambda info: ema_momentum(hmi, info),
            )
            if self._mine.has_critic:
                width = self._encoder_width()
                specs[self._mine.critic_name] = SubmoduleSpec(
                    build=lambda: MineCritic(width, width, hmi.hidden), kind="plain"
                )
        return specs

    @torch.no_grad()
    def targets(self, nets: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See `Method`: `teacher` (B, D) of the HF tokens of the clean images."""
        if self._hmi is None or not scheduled_weight(self._hmi, info):
            return {}
        model = self.config.model
        images = standardize(clean_images(batch, model), model.mean, model.std)
        return {"teacher": nets["teacher"](images, teacher_tokens(self._hmi, batch))}

    def losses(
        self,
        nets: Mapping[str, nn.Module],
        batch: Batch,
        targets: Mapping[str, Tensor],
        pool: Mapping[str, Tensor],
        info: StepInfo,
        comm: Comm,
    ) -> Losses:
        """See `Method`."""
        config, weights = self.config, term_weights(self.config, info)
        clean = clean_images(batch, config.model)
        num_views = 2 if "consistency" in weights else 1
        views = [corrupt_batch(clean, batch, config.corruption, view=view) for view in range(num_views)]
        kinds = [kind for view in views for kind in view.kind]
        images = torch.cat([view.images for view in views])
        output = run_student(nets["student"], images, config.model, num_decoded=len(clean))
        losses = Losses(
            terms=restoration_terms(config, weights, output.prediction, clean),
            weights=weights,
            metrics=kind_shares(kinds, config.corruption, clean.device),
        )
        losses.metrics |= detail_metrics(output.prediction, clean, info)
        if "consistency" in weights:
            losses.terms["consistency"] = consistency_loss(output.embedding)
        self._add_adversarial(losses, nets, output, clean, kinds, info)
        if self._mine is not None and "hmi" in weights:
            z = output.pooled[: len(clean)]
            losses.terms["hmi"], metrics = self._mine.loss(nets, z, batch, targets, pool, info, comm)
            losses.metrics |= {f"mi/{key}": value for key, value in metrics.items()}
        return losses

    def _add_adversarial(
        self,
        losses: Losses,
        nets: Mapping[str, nn.Module],
        output: Any,
        clean: Tensor,
        kinds: Sequence[str],
        info: StepInfo,
    ) -> None:
        active = [a for a in self._adversaries.values() if is_active(a.config, info)]
        if not active:
            return
        numbers = to_device(np.array([self._kinds.index(kind) for kind in kinds]), clean.device)
        seen = Seen(output.prediction, clean, output.embedding, numbers)
        for adversary in active:
            losses.outputs |= adversary.outputs(seen)
            if adversary.name in losses.weights:
                losses.terms[adversary.name], metrics = adversary.guarded_loss(nets, seen)
                losses.metrics |= metrics

    def opponent_losses(
        self, name: str, nets: Mapping[str, nn.Module], outputs: Mapping[str, Tensor], info: StepInfo
    ) -> Losses | None:
        """See `Method`: a discriminator rests in the warm-up of its term."""
        adversary = self._adversaries[name]
        if not is_active(adversary.config, info):
            return None
        return adversary.opponent_losses(nets[name], outputs)

    def after_step(self, info: StepInfo, comm: Comm) -> None:
        """See `Method`."""
        if self._mine is not None:
            self._mine.average.update(comm.mean)
        for adversary in self._adversaries.values():
            adversary.guard.update(comm.mean)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        state = {
            f"{adversary.name}.{key}": value
            for adversary in self._adversaries.values()
            for key, value in adversary.guard.state_dict().items()
        }
        if self._mine is not None:
            state["hmi.log_average"] = self._mine.average.value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Method`."""
        super().load_state_dict(state)
        for adversary in self._adversaries.values():
            prefix = f"{adversary.name}."
            adversary.guard.load_state_dict(
                {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            )
        if self._mine is not None:
            self._mine.average.value = state["hmi.log_average"].clone()
