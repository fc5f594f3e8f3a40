"""Submodules of a run under one lifecycle: build, wrap or not, after_step, state, metrics.

A method declares what it needs (`SubmoduleSpec`); this registry decides how each lives: the student as a
DeepSpeed engine, its EMA teacher in fp32 on every rank, MINE's critic as a plain fp32 module with its own
optimizer, a frozen encoder as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import Method, StepInfo, SubmoduleSpec
from frepa_dist.models.vit_mae import use_fused_attention
from frepa_dist.train.engines import World, create_engine


class EngineSubmodule:
    """A module trained by a DeepSpeed engine; DeepSpeed saves its own state.

    Attributes:
        module: the module, its weights in the engine's precision.
        fixed: its fp32 tensors that are not trained: the engine keeps no fp32 master of them.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, accumulation: int) -> None:
        self.module = module
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        self.fixed = {
            name: value.detach().float().cpu().clone()
            for name, value in module.state_dict().items()
            if name not in trained
        }
        self.engine = create_engine(module, config, accumulation, learning_rate=config.base_learning_rate)

    @property
    def call(self) -> nn.Module:
        """What a method calls: the engine, so that ZeRO's hooks run."""
        engine: nn.Module = self.engine
        return engine

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of every parameter group for the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the engine divides by the number of micro-batches."""
        self.engine.backward(loss)

    def step(self) -> None:
        """End a micro-batch; at the last of a global batch the engine applies the step."""
        self.engine.step()

    def was_applied(self) -> bool:
        """Whether the last boundary changed the weights (bf16 skips overflows in silence)."""
        return bool(self.engine.was_step_applied())

    def gradient_norm(self) -> Tensor | float | None:
        """Global norm of the last step's gradient before clipping, where the engine knows it."""
        norm: Tensor | float | None = self.engine.get_global_grad_norm()
        return norm


class EmaSubmodule:
    """An exponential moving average of an engine's module, whole on every rank, in fp32.

    In bf16 an update by (1 - 0.999) would be rounded away. The lerp needs no communication: under ZeRO 0-2
    every rank holds all of the student's weights.
    """

    def __init__(self, module: nn.Module, source: nn.Module, world: World, precision: str) -> None:
        self.module = module.to(world.device, torch.float32).eval().requires_grad_(False)
        own = dict(self.module.named_parameters())
        # what is not trained stays as it was copied: in the engine it may be rounded to bf16
        self._names = [name for name, p in source.named_parameters() if name in own and p.requires_grad]
        self._source = source
        self._autocast = precision == "bf16"
        self._device = world.device

    @property
    def call(self) -> nn.Module:
        """The teacher under the student's autocast."""
        return _Autocast(self.module, self._device.type) if self._autocast else self.module

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's parameters and the student's of the same names, both in fp32."""
        own, source = dict(self.module.named_parameters()), dict(self._source.named_parameters())
        return [own[n].data for n in self._names], [source[n].data.float() for n in self._names]

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """Move the teacher toward the student by (1 - momentum)."""
        teacher, student = self._pairs()
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Norm of teacher minus student over the norm of the student; 0-dim."""
        teacher, student = self._pairs()
        apart = torch.stack(torch._foreach_norm(torch._foreach_sub(teacher, student))).norm()
        whole = torch.stack(torch._foreach_norm(student)).norm()
        return torch.div(apart, whole.clamp_min(1e-12))


class _Autocast(nn.Module):
    """Calls a module under bf16 autocast; methods of the module are called the same way."""

    def __init__(self, module: nn.Module, device_type: str) -> None:
        super().__init__()
        self._wrapped, self._device_type = [module], device_type  # a list: not a submodule of its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device_type, torch.bfloat16):
            return self._wrapped[0](*args, **kwargs)


class PlainSubmodule:
    """A small fp32 module outside every engine (inside one, bf16 would take its weights)."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        self.module = module.to(world.device, torch.float32)
        # all ranks start from rank 0's weights
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            dist.broadcast(tensor.data, 0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=config.critic_learning_rate)
        self._clipping, self._world = config.critic_clipping, world

    @property
    def call(self) -> nn.Module:
        """The module itself."""
        return self.module

    def step(self) -> None:
        """Average the gradients over ranks, clip, and apply; no gradient (a term in warm-up): nothing.

        The engine's backward has already divided by the number of micro-batches.
        """
        params = list(self.module.parameters())
        if all(p.grad is None for p in params):
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self._world.size
        for p, part in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).clone()
        if self._clipping is not None:
            nn.utils.clip_grad_norm_(params, self._clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Submodules:
    """All submodules of a method, built in an order that lets a teacher find its student."""

    def __init__(self, method: Method, config: TrainConfig, accumulation: int, world: World) -> None:
        specs = method.submodules()
        # every rank builds the same weights
        torch.manual_seed(config.seed)
        built = {name: spec.build() for name, spec in specs.items()}
        # the backward of fused attention in bf16 is several times slower than plain products on a CPU
        fused = world.device.type == "cuda" or config.precision == "fp32"
        for module in built.values():
            use_fused_attention(module, fused)
        self.engines: dict[str, EngineSubmodule] = {}
        self.teachers: dict[str, EmaSubmodule] = {}
        self.plain: dict[str, PlainSubmodule] = {}
        self.frozen: dict[str, nn.Module] = {}
        self._specs = specs
        for name, spec in specs.items():
            if spec.kind == "ema":  # before the student's weights become bf16
                assert spec.of is not None, f"{name}: an EMA needs the engine it follows"
                student = built[spec.of].state_dict()
                built[name].load_state_dict({key: student[key] for key in built[name].state_dict()})
        for name, spec in specs.items():
            if spec.kind == "engine":
                self.engines[name] = EngineSubmodule(built[name].to(world.device), config, accumulation)
        for name, spec in specs.items():
            if spec.kind == "ema":
                assert spec.of is not None
                source = self.engines[spec.of].module
                self.teachers[name] = EmaSubmodule(built[name], source, world, config.precision)
            elif spec.kind == "plain":
                self.plain[name] = PlainSubmodule(built[name], config, world)
            elif spec.kind == "frozen":
                self.frozen[name] = built[name].to(world.device).eval().requires_grad_(False)
        self.nets: Mapping[str, nn.Module] = {
            **{name: engine.call for name, engine in self.engines.items()},
            **{name: teacher.call for name, teacher in self.teachers.items()},
            **{name: plain.call for name, plain in self.plain.items()},
            **self.frozen,
        }

    def after_step(self, info: StepInfo) -> None:
        """Step the plain modules and move the teachers; once per optimizer step, on all ranks."""
        for plain in self.plain.values():
            plain.step()
        for name, teacher in self.teachers.items():
            spec: SubmoduleSpec = self._specs[name]
            assert spec.of is not None
            if self.engines[spec.of].was_applied():
                assert spec.momentum is not None, f"{name}: an EMA needs a momentum"
                teacher.after_step(spec.momentum(info))

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed does not save: teachers, plain modules and their optimizers. Equal on all ranks."""
        return {
            "teachers": {name: t.module.state_dict() for name, t in self.teachers.items()},
            "plain": {
                name: {"module": p.module.state_dict(), "optimizer": p.optimizer.state_dict()}
                for name, p in self.plain.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name, teacher in self.teachers.items():
            teacher.module.load_state_dict(state["teachers"][name])
        for name, plain in self.plain.items():
            plain.module.load_state_dict(state["plain"][name]["module"])
            plain.optimizer.load_state_dict(state["plain"][name]["optimizer"])
