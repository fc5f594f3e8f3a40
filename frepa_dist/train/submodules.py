"""Submodules of a run under one lifecycle: build, wrap or not, after_step, state, metrics.

A method declares what it needs (`SubmoduleSpec`); this registry decides how each lives: the student as a
DeepSpeed engine, a discriminator as another, its EMA teacher in fp32 (`train.ema`), MINE's critic as a plain
fp32 module with its own optimizer, a frozen encoder as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from frepa_dist.config import TrainConfig
from frepa_dist.methods.base import Method, StepInfo, SubmoduleSpec
from frepa_dist.models.vit_mae import use_fused_attention
from frepa_dist.train.ema import EmaSubmodule, PartitionedEma, Teacher
from frepa_dist.train.engines import EngineSubmodule, World, student_settings
from frepa_dist.train.opponent import OpponentSubmodule
from frepa_dist.train.schedule import learning_rate, opponent_learning_rate
from shards.support.errors import ConfigError


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


def check_opponents(method: Method, specs: Mapping[str, SubmoduleSpec]) -> None:
    """Make sure that a method's opponents have losses to learn from.

    Raises:
        ConfigError: they would rest for ever.
    """
    opponents = [name for name, spec in specs.items() if spec.kind == "opponent"]
    if opponents and type(method).opponent_losses is Method.opponent_losses:
        raise ConfigError(
            f"method '{method.name}' has opponents ({', '.join(opponents)}) and no losses for them",
            where="method.name",
            fix=f"define opponent_losses in {type(method).__qualname__}",
        )


class Submodules:
    """All submodules of a method, built in an order that lets a teacher find its student.

    Attributes:
        student: the one of kind `engine`.
        opponents, teachers, plain, frozen: the others by name.
        nets: what a method calls, by name.

    Raises:
        ConfigError: the method has opponents, and no losses for them.
    """

    def __init__(self, method: Method, config: TrainConfig, accumulation: int, world: World) -> None:
        specs = method.submodules()
        check_opponents(method, specs)
        assert [name for name, spec in specs.items() if spec.kind == "engine"] == ["student"]
        # every rank builds the same weights
        torch.manual_seed(config.seed)
        built = {name: spec.build() for name, spec in specs.items()}
        # what a network draws while it trains (drop path) is another draw on every rank
        torch.manual_seed((config.seed << 20) + world.rank)
        # the backward of fused attention in bf16 is several times slower than plain products on a CPU
        fused = world.device.type == "cuda" or config.precision == "fp32"
        for module in built.values():
            use_fused_attention(module, fused)
        for name, spec in specs.items():
            if spec.kind == "ema":  # before the student's weights become bf16
                assert spec.of == "student", f"{name}: an EMA needs the engine it follows"
                student = built["student"].state_dict()
                built[name].load_state_dict({key: student[key] for key in built[name].state_dict()})
        self._specs, self._config = specs, config
        if config.compile:
            built["student"].compile()
        self.student = EngineSubmodule(
            built["student"].to(world.device), student_settings(config), config.micro_batch_size, accumulation
        )
        self.opponents: dict[str, OpponentSubmodule] = {}
        self.teachers: dict[str, Teacher] = {}
        self.plain: dict[str, PlainSubmodule] = {}
        self.frozen: dict[str, nn.Module] = {}
        for name, spec in specs.items():
            if spec.kind == "opponent":
                self.opponents[name] = OpponentSubmodule(built[name], config, accumulation, world)
            elif spec.kind == "ema":
                source = self.student.module
                kind = PartitionedEma if config.zero_stage == 3 else EmaSubmodule
                self.teachers[name] = kind(built[name], source, world, config.precision)
            elif spec.kind == "plain":
                self.plain[name] = PlainSubmodule(built[name], config, world)
            elif spec.kind == "frozen":
                self.frozen[name] = built[name].to(world.device).eval().requires_grad_(False)
        called: dict[str, EngineSubmodule | OpponentSubmodule | Teacher | PlainSubmodule]
        called = {"student": self.student, **self.opponents, **self.teachers, **self.plain}
        self.nets: Mapping[str, nn.Module] = {
            **{name: submodule.call for name, submodule in called.items()},
            **self.frozen,
        }

    @property
    def engines(self) -> dict[str, EngineSubmodule]:
        """All that DeepSpeed trains, by name."""
        return {"student": self.student, **{name: o.own for name, o in self.opponents.items()}}

    def begin_step(self, info: StepInfo) -> None:
        """Set the learning rates of an optimizer step."""
        self.student.set_learning_rate(learning_rate(self._config, info.step, info.total_steps))
        for opponent in self.opponents.values():
            rate = opponent_learning_rate(self._config, info.step, info.total_steps)
            opponent.own.set_learning_rate(rate)

    def end_targets(self) -> None:
        """Give up what only targets need; once per step, on all ranks."""
        for teacher in self.teachers.values():
            teacher.release()

    def after_step(self, info: StepInfo) -> None:
        """Step the plain modules, move the teachers, let opponents follow; once per step, on all ranks."""
        for plain in self.plain.values():
            plain.step()
        for name, teacher in self.teachers.items():
            spec: SubmoduleSpec = self._specs[name]
            if self.student.was_applied():
                assert spec.momentum is not None, f"{name}: an EMA needs a momentum"
                teacher.after_step(spec.momentum(info))
        for opponent in self.opponents.values():
            opponent.after_step()
