"""What of a run's networks lies on this rank, in every ZeRO stage: the one place that knows where.

DeepSpeed's own files can be read by as many ranks, in the same stage, as wrote them, and are pickles. Here an
engine is seen through its fp32 master weights and Adam's moments, as stretches of named tensors. They hold
all that its next step depends on, and mean the same however they are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frepa_dist.train.checkpoint.files import TensorReader
from frepa_dist.train.engines import EngineSubmodule
from frepa_dist.train.submodules import Submodules

MASTER, MOMENTS, STEP = "master", ("exp_avg", "exp_avg_sq"), "step"
Stretch = tuple[str, int, Tensor]
"""Name of a tensor, where in it the stretch begins, and the stretch itself: (L,), a view where it can be."""


@dataclass(frozen=True)
class Hold:
    """A stretch of a trained tensor and where the optimizer holds it.

    Attributes:
        name: of the tensor in its module.
        numel: of the whole tensor.
        start: where in the flattened tensor the stretch begins.
        holder: the fp32 tensor that the optimizer steps: one parameter, or a partition of many.
        offset, length: where the stretch lies in the flattened holder.
    """

    name: str
    numel: int
    start: int
    holder: Tensor
    offset: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The stretch of a tensor that is laid out as the holder is."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.length]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Set the stretch of a tensor that is laid out as the holder is."""
        if tensor.is_contiguous():
            tensor.detach().view(-1)[self.offset : self.offset + self.length].copy_(values)
        else:  # channels last: a parameter by itself
            assert self.length == tensor.numel()
            tensor.detach().copy_(values.view(tensor.shape))


class Trained:
    """Master weights and moments of a module under one optimizer.

    Args:
        module: whose names they are known by.
        optimizer: what DeepSpeed made of a torch optimizer, or a torch optimizer itself.

    Attributes:
        holds: what this rank holds.
        replicated: whether every rank holds all of it.
        inner: the optimizer whose `state` the moments are in.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self.inner: torch.optim.Optimizer = optimizer
        self.replicated = True
        if not isinstance(optimizer, torch.optim.Optimizer):
            self.inner = optimizer.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self.replicated = False
            self.holds = list(self._of_stage_3())
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self.replicated = False
            self.holds = list(self._of_partitions(optimizer.single_partition_of_fp32_groups))
        elif hasattr(optimizer, "fp32_groups_flat_partition"):
            self.replicated = False
            self.holds = list(self._of_partitions(optimizer.fp32_groups_flat_partition))
        else:
            self.holds = [
                Hold(self.names[own], own.numel(), 0, master, 0, own.numel())
                for own, master in self._with_masters()
            ]

    def _with_masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters and the tensors that are stepped for them, where ranks share nothing."""
        if isinstance(self._optimizer, torch.optim.Optimizer):
            for group in self._optimizer.param_groups:
                yield from ((parameter, parameter) for parameter in group["params"])
        else:
            for own, masters in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True):
                yield from zip(own, masters, strict=True)

    def _of_partitions(self, partitions: list[Tensor]) -> Iterator[Hold]:
        """ZeRO 1 and 2: groups are laid end to end and cut by rank."""
        for parameter, name in self.names.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                held, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                partition = partitions[mapping.param_group_index]
                yield Hold(name, parameter.numel(), own.start, partition, held.start, held.numel)

    def _of_stage_3(self) -> Iterator[Hold]:
        """ZeRO 3: each parameter is cut by rank, and the last parts are filled up."""
        zero = self._optimizer
        for group in zero.fp16_groups:
            for parameter in group:
                index, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = zero._get_param_partition_rank(parameter) * length
                length = min(length, parameter.ds_numel - start)
                if length > 0:
                    holder = zero.fp32_partitioned_groups_flat[index]
                    yield Hold(self.names[parameter], parameter.ds_numel, start, holder, offset, length)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors, of those that any rank holds."""
        if isinstance(self._optimizer, torch.optim.Optimizer):
            trained = {id(own) for own, _ in self._with_masters()}
        else:
            groups = next(
                getattr(self._optimizer, name)
                for name in ("bit16_groups", "bf16_groups", "fp16_groups")
                if hasattr(self._optimizer, name)
            )
            trained = {id(parameter) for group in groups for parameter in group}
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for parameter, name in self.names.items()
            if id(parameter) in trained
        }

    def stretches(self) -> Iterator[Stretch]:
        """All that this rank holds."""
        for hold in self.holds:
            yield f"{MASTER}/{hold.name}", hold.start, hold.of(hold.holder)
            state = self.inner.state.get(hold.holder)
            if state:  # none before its first step
                for key in MOMENTS:
                    yield f"{key}/{hold.name}", hold.start, hold.of(state[key])
                steps = torch.as_tensor(state[STEP], dtype=torch.float32)
                yield f"{STEP}/{hold.name}", 0, steps.reshape(1)

    def restore(self, reader: TensorReader, prefix: str) -> None:
        """Take all that this rank holds from a checkpoint; all ranks must call it.

        Raises:
            DataError: a tensor is missing or of another size.
        """
        known = {id(hold.holder) for hold in self.holds if f"{prefix}/{MOMENTS[0]}/{hold.name}" in reader}
        for hold in self.holds:
            stop = hold.start + hold.length

            def read(kind: str, hold: Hold = hold, stop: int = stop) -> Tensor:
                return reader.read(f"{prefix}/{kind}/{hold.name}", hold.numel, hold.start, stop)

            hold.put(hold.holder, read(MASTER))
            if id(hold.holder) not in known:
                self.inner.state.pop(hold.holder, None)
                continue
            state = self._state_of(hold.holder)
            if f"{prefix}/{STEP}/{hold.name}" in reader:
                for key in MOMENTS:
                    hold.put(state[key], read(key))
                steps = reader.read(f"{prefix}/{STEP}/{hold.name}", 1)
                if isinstance(state[STEP], Tensor):
                    state[STEP].fill_(steps[0])
                else:
                    state[STEP] = int(steps[0])
            else:  # stepped by itself it had no gradient yet; in a partition it has the others' count
                for key in MOMENTS:
                    hold.put(state[key], torch.zeros(hold.length))
        self._follow_masters()

    def _state_of(self, holder: Tensor) -> dict[str, Any]:
        """Adam's state of a tensor, made as its first step would make it."""
        state: dict[str, Any] = self.inner.state[holder]
        if not state:
            if type(self.inner).__module__.startswith("torch."):
                fused = self.inner.defaults.get("fused") or self.inner.defaults.get("capturable")
                device = holder.device if fused else torch.device("cpu")
                state[STEP] = torch.zeros((), dtype=torch.float32, device=device)
            else:  # DeepSpeed's Adam on the CPU counts in Python
                state[STEP] = 0
            for key in MOMENTS:
                state[key] = torch.zeros_like(holder, memory_format=torch.preserve_format)
        return state

    def _follow_masters(self) -> None:
        """Bring the weights that the module computes with to the master weights."""
        zero = self._optimizer
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            # small parameters are kept whole between steps: they are cut, and gathered again
            zero._partition_all_parameters()
            for index in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero._post_step(set())
        elif not self.replicated:
            zero.update_lp_params()
        else:
            for own, master in self._with_masters():
                if own is not master:
                    own.detach().copy_(master)


def engine_parts(engine: EngineSubmodule) -> Trained:
    """Master weights and moments of an engine."""
    return Trained(engine.module, engine.engine.optimizer)


def untrained(module: nn.Module, trained: Trained) -> dict[str, Tensor]:
    """Buffers and fixed parameters of a module that are whole on every rank."""
    own = trained.shapes()
    return {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if name not in own and not hasattr(value, "ds_id")
    }


def replicated_stretches(tensors: dict[str, Tensor]) -> Iterator[Stretch]:
    """Tensors that all ranks hold whole."""
    for name, tensor in tensors.items():
        yield name, 0, tensor.detach().reshape(-1)


def share(stretches: Iterator[Stretch], rank: int, size: int) -> Iterator[Stretch]:
    """This rank's part of what all ranks hold alike, so that each writes about as much."""
    for name, start, tensor in stretches:
        total = len(tensor)
        begin, end = total * rank // size, total * (rank + 1) // size
        if end > begin:
            yield name, start + begin, tensor[begin:end]


def stretches_of(submodules: Submodules, rank: int, size: int) -> Iterator[Stretch]:
    """What this rank writes of all networks; together the ranks write each number once."""
    for place, module, trained in _trained_parts(submodules):
        own = ((f"{place}/{name}", start, tensor) for name, start, tensor in trained.stretches())
        yield from share(own, rank, size) if trained.replicated else own
        rest = {f"{place}/fixed/{name}": value for name, value in untrained(module, trained).items()}
        yield from share(replicated_stretches(rest), rank, size)
    for name, teacher in submodules.teachers.items():
        for key, (start, tensor) in teacher.parts().items():
            yield f"{name}/ema/{key}", start, tensor
        whole = {f"{name}/ema/{key}": value for key, value in teacher.whole().items()}
        yield from share(replicated_stretches(whole), rank, size)


def restore_submodules(submodules: Submodules, reader: TensorReader) -> None:
    """Bring all networks to where a checkpoint was taken; all ranks must call it.

    Raises:
        DataError: a tensor is missing or of another size.
    """
    with torch.no_grad():
        for place, module, trained in _trained_parts(submodules):
            trained.restore(reader, place)
            for name, value in untrained(module, trained).items():
                stored = reader.read(f"{place}/fixed/{name}", value.numel())
                value.detach().copy_(stored.view(value.shape))
        for name, teacher in submodules.teachers.items():
            for key, (start, tensor) in teacher.parts().items():
                place = f"{name}/ema/{key}"
                tensor.copy_(reader.read(place, teacher.numel(key), start, start + len(tensor)))
            for key, value in teacher.whole().items():
                value.copy_(reader.read(f"{name}/ema/{key}", value.numel()).view(value.shape))


def _trained_parts(submodules: Submodules) -> Iterator[tuple[str, nn.Module, Trained]]:
    for name, engine in submodules.engines.items():
        yield name, engine.module, engine_parts(engine)
    for name, plain in submodules.plain.items():
        yield name, plain.module, Trained(plain.module, plain.optimizer)
