"""What a method is: it maps a batch to named losses, and knows no engine, no rank and no optimizer.

The contract with the training loop, for one optimizer step over a global batch of G images in slot order,
cut into ranks and micro-batches in any way:

1. `targets` for every micro-batch of this rank, without gradient. The loop gathers them over micro-batches
   and ranks into `pool`, whose row i belongs to slot i.
2. For each micro-batch `losses`, then backward of `Losses.total` divided by the number of micro-batches. In
   `losses` opponents (discriminators) are frozen: gradients go through them, not into them.
3. For each opponent and micro-batch `opponent_losses`, inside the opponent's own engine, then its backward.
   They work on `Losses.outputs`, which carry no gradient.
4. `after_step`, once, on all ranks, also when the optimizer skipped the step.

Losses are means over the rows of the micro-batch of terms that see their own row and the pool only, so that
gradients do not depend on the cut.

Shapes: B micro-batch, G global batch, N patches, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shards.support.settings import Settings

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class StepInfo:
    """Where training stands.

    Attributes:
        step: optimizer steps so far, from 0 to `total_steps` - 1.
        total_steps: of the run.
        seed: of the run.
        is_logged: whether a line is logged after this step: what is only measured, and takes time, may be
            left out of other steps.
    """

    step: int
    total_steps: int
    seed: int
    is_logged: bool = False


class Comm(Protocol):
    """Agreement between ranks; every rank must call each in the same order, none waits on the host."""

    def any(self, flag: Tensor) -> Tensor:
        """Return a 0-dim bool tensor, true where `flag` is true on any rank."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over the ranks, without gradient."""


@dataclass
class Losses:
    """The losses of one micro-batch.

    Attributes:
        terms: 0-dim tensors by name; a term that is switched off is not there.
        weights: the weight of each term.
        metrics: detached 0-dim tensors to log. They are means over the rows of the micro-batch, but for
            those whose name ends in `_max`. A guard tells that it acts by `.../skipped` (a share above 0) or
            `.../multiplier` (below 1): the loop writes an event when that begins and ends.
        outputs: detached tensors of this micro-batch that `opponent_losses` needs.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The weighted sum; a term of weight 0 stays out of the graph."""
        weighted = [self.weights[name] * term for name, term in self.terms.items() if self.weights[name]]
        if not weighted:
            return torch.zeros_like(next(iter(self.terms.values())))
        return torch.stack(weighted).sum()


@dataclass(frozen=True)
class SubmoduleSpec:
    """A network of a method and how the loop keeps it.

    Attributes:
        build: makes the module, on the CPU, in fp32.
        kind: `engine` (the student: a DeepSpeed engine), `opponent` (a discriminator: a DeepSpeed engine of
            its own with its own optimizer and ZeRO stage, trained by `Method.opponent_losses`; a module may
            have a function `after_step()`, called once per optimizer step), `ema` (fp32 average of an
            engine's parameters, no gradient), `plain` (fp32, outside every engine, own optimizer, gradients
            all-reduced; the gradients are None on all ranks in a step where it was not used) or `frozen` (not
            in checkpoints).
        of: for `ema`, the name of the engine. The module's parameter names are a subset of the engine's:
            the loop copies those at the start and averages them by name.
        momentum: for `ema`, the share of the old average that is kept after a step.
        outline: where `build` needs files, makes a module of the same shapes without them, so that its cost
            can be counted.
    """

    build: Callable[[], nn.Module]
    kind: Literal["engine", "opponent", "ema", "plain", "frozen"]
    of: str | None = None
    momentum: Callable[[StepInfo], float] | None = None
    outline: Callable[[], nn.Module] | None = None


class InputSettings(Protocol):
    """What every method's `model` settings say about its input.

    Attributes:
        image_size: side of the training views in pixels.
        patch_size: side of the cells in which high-frequency (HF) tokens and mask noise are counted; divides
            the image size.
        num_patches: cells of a view.
        mean, std: of the channels, of images scaled to [0, 1].
    """

    @property
    def image_size(self) -> int: ...  # noqa: D102

    @property
    def patch_size(self) -> int: ...  # noqa: D102

    @property
    def num_patches(self) -> int: ...  # noqa: D102

    @property
    def mean(self) -> tuple[float, float, float]: ...  # noqa: D102

    @property
    def std(self) -> tuple[float, float, float]: ...  # noqa: D102


class MethodSettings(Settings):
    """Settings of a method: a class of each method inherits them, and gives `name` a literal of its own.

    A concrete one has a field `model` that satisfies `InputSettings`.
    """

    name: str

    @property
    def input(self) -> InputSettings:
        """The settings of the network's input."""
        settings: InputSettings = self.model  # type: ignore[attr-defined]
        return settings


class Student(Protocol):
    """What evaluation and export ask of a student, whatever its method.

    Attributes:
        width: D of its features.
        image_size: S of the images it was made for.
        patch_size: side of its patches where it can encode some of them alone, else None.
    """

    width: int
    image_size: int
    patch_size: int | None

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Give the mean feature of images, or of some of their patches, after the final norm.

        Args:
            images: (B, 3, S, S), normalized by the mean and std of the settings.
            ids_keep: (B, K) row-major indices of the patches to encode; only where `patch_size` is not None.

        Returns:
            (B, D).
        """


class Preview(NamedTuple):
    """One way in which a method hides part of an image, and what its student makes of it.

    Attributes:
        name: of the way, such as "masked patches".
        seen: (B, 3, S, S) what the student saw, in [0, 1].
        predicted: (B, 3, S, S) the image it makes of it, in [0, 1]; where nothing was hidden it may be the
            image.
        hidden: (B, 1, S, S) bool, the pixels that were hidden, or all where frequencies were.
        note: what a reader must know of it, such as what the prediction borrows from the truth.
    """

    name: str
    seen: Tensor
    predicted: Tensor
    hidden: Tensor
    note: str = ""


class Method(ABC):
    """A pretraining method; see the module's text for when each function is called, and by whom.

    Args:
        config: an instance of `config_class`.
        compute_dtype: what networks outside the engines compute in, by autocast, where the method runs them.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MethodSettings]]

    @abstractmethod
    def __init__(self, config: Any, compute_dtype: torch.dtype = torch.float32) -> None: ...

    @classmethod
    @abstractmethod
    def create_student(cls, config: Any) -> nn.Module:
        """Create the network that is trained, freshly initialized, whatever `init` says: a `Student`."""

    @classmethod
    def previews(
        cls, student: nn.Module, images: Tensor, config: Any, draw_keys: Sequence[int]
    ) -> list[Preview]:
        """Show what a student makes of images, for the report; without gradient.

        Args:
            student: what `create_student` made, in evaluation mode.
            images: (B, 3, S, S) float32 in [0, 1].
            config: an instance of `config_class`.
            draw_keys: one of each image; equal keys give equal masks.
        """
        return []

    @classmethod
    def restore(cls, student: nn.Module, images: Tensor, config: Any) -> Tensor | None:
        """Restore whole images that somebody else corrupted, for evaluation; without gradient.

        Args:
            student: what `create_student` made, in evaluation mode.
            images: (B, 3, S, S) float32 in [0, 1] but for what the corruption added.
            config: an instance of `config_class`.

        Returns:
            (B, 3, S, S) in [0, 1]; None where a student hides patches itself and takes no corrupted image.
        """
        return None

    @abstractmethod
    def submodules(self) -> dict[str, SubmoduleSpec]:
        """Name the networks. They may be called, and nothing else: an engine hides its module."""

    def targets(self, nets: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """Compute what the rows of other micro-batches need of this one: name -> (B, D), no gradient."""
        return {}

    @abstractmethod
    def losses(
        self,
        nets: Mapping[str, nn.Module],
        batch: Batch,
        targets: Mapping[str, Tensor],
        pool: Mapping[str, Tensor],
        info: StepInfo,
        comm: Comm,
    ) -> Losses:
        """Compute the losses of one micro-batch.

        Args:
            nets: the networks of `submodules`, by name.
            batch: a micro-batch of `shards.read.stream`, on the device.
            targets: what `targets` gave for this micro-batch, (B, D) each.
            pool: the same of the whole global batch in slot order, (G, D) each, no gradient.
            info: where training stands.
            comm: agreement between ranks.
        """

    def opponent_losses(
        self, name: str, nets: Mapping[str, nn.Module], outputs: Mapping[str, Tensor], info: StepInfo
    ) -> Losses | None:
        """Compute the loss of one opponent on what `losses` left of the same micro-batch.

        A method with opponents has to define it; one without is never asked.

        Args:
            name: of the opponent in `submodules`.
            nets: the weights of `nets[name]` take gradients here. It may be called several times, with inputs
                that require a gradient too (`adversarial.r1_penalty`).
            outputs: `Losses.outputs` of this micro-batch, without gradient.
            info: where training stands.

        Returns:
            None where the opponent rests in this step, then on all ranks and for all micro-batches.
        """
        return None

    def after_step(self, info: StepInfo, comm: Comm) -> None:  # noqa: B027 (most methods hold no state)
        """Advance moving averages; called once per global batch by all ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's own state, for the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: the names differ.
        """
        expected = self.state_dict().keys()
        if set(state) != set(expected):
            raise ValueError(f"the method's state holds {sorted(state)}, expected {sorted(expected)}")
