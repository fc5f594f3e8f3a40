"""EMA teachers: exponential moving averages of the student's weights, held in fp32.

In bf16 an update by (1 - 0.999) would be rounded away. Under ZeRO 0 to 2 every rank holds all of the
student's weights, so each keeps a whole teacher. Under ZeRO 3 each keeps the part of the teacher that lies
beside its part of the student's fp32 masters. In both cases the average needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from frepa_dist.train.engines import Autocast, World

GATHER_ELEMENTS = 1 << 25  # of a part of the teacher that is gathered at once: 128 MiB


class Teacher(Protocol):
    """What the loop asks of a teacher; all ranks must call each, in the same order.

    Attributes:
        module: its weights, where they are whole.
    """

    module: nn.Module

    @property
    def call(self) -> nn.Module:
        """What a method calls."""

    def release(self) -> None:
        """Give up what a forward pass needed: no other follows in this step."""

    def after_step(self, momentum: float) -> None:
        """Move the teacher toward the student by (1 - momentum)."""

    def distance(self) -> Tensor:
        """Norm of teacher minus student over the norm of the student; 0-dim."""

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, whole, equal on all ranks."""

    def parts(self) -> dict[str, tuple[int, Tensor]]:
        """What this rank alone holds, live: name -> (where it begins in the flattened weight, (L,))."""

    def whole(self) -> dict[str, Tensor]:
        """The other weights, which every rank holds, live."""

    def numel(self, name: str) -> int:
        """Numbers in a weight that is held in parts."""


def _followed(module: nn.Module, source: nn.Module) -> list[str]:
    """Parameters that move; what is not trained stays as it was copied (an engine may round it to bf16)."""
    own = dict(module.named_parameters())
    return [name for name, p in source.named_parameters() if name in own and p.requires_grad]


def _relative_distance(sums: Tensor) -> Tensor:
    """From the sums of squares of teacher minus student, and of the student, (2,)."""
    apart, whole = sums.sqrt().unbind()
    return torch.div(apart, whole.clamp_min(1e-12))


class EmaSubmodule:
    """A teacher that is whole on every rank: for ZeRO 0 to 2.

    Args:
        module: equal to the student's part of the same names.
        source: the student's module; in bf16 its rounded weights are followed.
        world: this rank.
        precision: of the student; the teacher runs under its autocast.
    """

    def __init__(self, module: nn.Module, source: nn.Module, world: World, precision: str) -> None:
        self.module = module.to(world.device, torch.float32).eval().requires_grad_(False)
        self._names = _followed(self.module, source)
        self._source = source
        self._call = Autocast(self.module, world.device.type) if precision == "bf16" else self.module

    @property
    def call(self) -> nn.Module:
        """See `Teacher`."""
        return self._call

    def release(self) -> None:
        """See `Teacher`: there is nothing to give up."""

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's parameters and the student's of the same names, both in fp32."""
        own, source = dict(self.module.named_parameters()), dict(self._source.named_parameters())
        return [own[n].data for n in self._names], [source[n].data.float() for n in self._names]

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """See `Teacher`."""
        teacher, student = self._pairs()
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """See `Teacher`."""
        teacher, student = self._pairs()
        return _relative_distance(_sums_of_squares(teacher, student))

    def state_dict(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        return self.module.state_dict()

    def parts(self) -> dict[str, tuple[int, Tensor]]:
        """See `Teacher`."""
        return {}

    def whole(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        return self.module.state_dict()

    def numel(self, name: str) -> int:
        """See `Teacher`."""
        raise AssertionError(f"{name}: every rank holds it whole")


def _sums_of_squares(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(teacher, student))).square().sum()
    return torch.stack([apart, torch.stack(torch._foreach_norm(student)).square().sum()])


@dataclass(frozen=True)
class _Part:
    """Where a parameter's partition lies.

    Attributes:
        shape: of the whole parameter.
        start, length: in the flat tensor of every rank; all ranks' parts are as long, the last ones padded.
        filled: elements that this rank's part holds without padding.
    """

    shape: torch.Size
    start: int
    length: int
    filled: int


class PartitionedEma:
    """A teacher of which each rank holds its partition: for ZeRO 3.

    It follows this rank's fp32 masters. DeepSpeed's `GatheredParameters` would not do: what is changed inside
    it is thrown away without an error.

    Its forward passes need all weights, which are gathered at the first one of a step, in fp32, and given up
    after the last. Targets are computed before the student's forward pass, when no activation of it is alive,
    so that the peak of memory is that of the student; and gradient accumulation gathers no more often, which
    an engine of ZeRO 3 around the teacher would do: once for each layer and micro-batch.

    Args:
        module: whole, and equal to the student's part of the same names before its engine was made.
        source: the student's module in its ZeRO 3 engine.
        world: this rank among the others.
        precision: of the student; the teacher runs under its autocast.
    """

    def __init__(self, module: nn.Module, source: nn.Module, world: World, precision: str) -> None:
        self.module = module.to(world.device, torch.float32).eval().requires_grad_(False)
        self._world = world
        names = _followed(self.module, source)
        masters, own = dict(source.named_parameters()), dict(self.module.named_parameters())
        self._masters = {name: masters[name] for name in names}
        self._parts: dict[str, _Part] = {}
        start = 0
        for name in names:
            number = own[name].numel()
            length = -(-number // world.size)
            filled = min(max(number - world.rank * length, 0), length)
            self._parts[name] = _Part(own[name].shape, start, length, filled)
            start += length
        self._flat = torch.zeros(start, device=world.device)
        self._take_own_part()
        inner = Autocast(self.module, world.device.type) if precision == "bf16" else self.module
        self._call = _Gathering(inner, self._gather)

    @property
    def call(self) -> nn.Module:
        """See `Teacher`: it gathers the weights where they are not whole."""
        return self._call

    def _take_own_part(self) -> None:
        """Copy this rank's part of the whole weights, and give the others up."""
        own = dict(self.module.named_parameters())
        for name, part in self._parts.items():
            values = own[name].data.reshape(-1)
            at = min(self._world.rank * part.length, len(values))
            self._flat[part.start :][: part.filled] = values[at:][: part.filled]
        self._is_whole = True
        self.release()

    def release(self) -> None:
        """See `Teacher`."""
        if self._is_whole:
            own = dict(self.module.named_parameters())
            for name in self._parts:
                own[name].data = self._flat.new_empty(0)
        self._is_whole = False

    def _buckets(self) -> Iterator[list[tuple[str, _Part]]]:
        bucket: list[tuple[str, _Part]] = []
        elements = 0
        for name, part in self._parts.items():
            if bucket and elements + part.length * self._world.size > GATHER_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            bucket.append((name, part))
            elements += part.length * self._world.size
        if bucket:
            yield bucket

    @torch.no_grad()
    def _gather(self) -> None:
        """Make the module whole."""
        if self._is_whole:
            return
        own = dict(self.module.named_parameters())
        for bucket in self._buckets():
            first, last = bucket[0][1], bucket[-1][1]
            mine = self._flat[first.start : last.start + last.length]
            everyone = mine.new_empty(self._world.size, len(mine))
            dist.all_gather_into_tensor(everyone.view(-1), mine)
            for name, part in bucket:
                rows = everyone[:, part.start - first.start :][:, : part.length]
                own[name].data = rows.flatten()[: part.shape.numel()].view(part.shape)
        self._is_whole = True

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of teacher and student, without the padding: DeepSpeed never fills its own."""
        teacher, student = [], []
        for name, part in self._parts.items():
            master = safe_get_local_fp32_param(self._masters[name])
            assert master is not None, f"{name}: not in a ZeRO 3 engine"
            assert master.numel() == part.length, f"{name}: partitions differ"
            if part.filled:
                teacher.append(self._flat[part.start :][: part.filled])
                student.append(master[: part.filled])
        return teacher, student

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """See `Teacher`."""
        self.release()
        teacher, student = self._pairs()
        if teacher:
            torch._foreach_lerp_(teacher, student, 1.0 - momentum)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """See `Teacher`."""
        teacher, student = self._pairs()
        sums = _sums_of_squares(teacher, student) if teacher else self._flat.new_zeros(2)
        return _relative_distance(self._world.mean(sums))

    def state_dict(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        self._gather()
        state = {name: value.cpu() for name, value in self.module.state_dict().items()}
        self.release()
        return state

    def parts(self) -> dict[str, tuple[int, Tensor]]:
        """See `Teacher`."""
        self.release()
        return {
            name: (self._world.rank * part.length, self._flat[part.start :][: part.filled])
            for name, part in self._parts.items()
            if part.filled
        }

    def whole(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        return {name: value for name, value in self.module.state_dict().items() if name not in self._parts}

    def numel(self, name: str) -> int:
        """See `Teacher`."""
        return self._parts[name].shape.numel()


class _Gathering(nn.Module):
    """Calls a module after its weights were made whole."""

    def __init__(self, module: nn.Module, gather: Any) -> None:
        super().__init__()
        self._inner, self._gather = [module], gather  # a list: not a submodule of its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        self._gather()
        return self._inner[0](*args, **kwargs)
