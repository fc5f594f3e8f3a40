"""What a run costs, counted without running it: parameters, operations of a step, memory of a GPU.

The real method computes one step on tensors that have a shape and no data (torch's fake tensors; the meta
device alone knows no autocast). Counted are

- operations: multiplications and additions of matrix products, convolutions and attention, forward and
  backward, recomputation by activation checkpointing included. Norms, elementwise operations, FFTs and the
  optimizer are not.
- activations: the most bytes of tensors alive at once in a micro-batch, beyond weights and gradients. Not
  counted are workspaces of libraries, fragmentation and the CUDA context (half a GB, about).
- weights, gradients, optimizer: by formula, as DeepSpeed keeps them in ZeRO stage 0 to 3. In stage 3 the
  weights are this GPU's partition and those that are gathered at a time, and the EMA teacher is this GPU's
  partition: it is whole only while there are no activations. What is offloaded to the host is not counted.

The step is the last one of a run, when every term is on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import _lru_cache_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frepa_dist.config import RunConfig
from frepa_dist.methods.base import Batch, Losses, Method, StepInfo, SubmoduleSpec
from frepa_dist.methods.registry import create_method
from frepa_dist.models.backbones import Backbone
from frepa_dist.models.counters import LiveBytes, create_counter
from frepa_dist.models.vit_mae import use_fused_attention

DECODER_PARTS = ("decoder", "neck", "mask_token")
# What engines are told, in elements. Gradients are reduced so many at a time, or all of a smaller network.
BUCKET_ELEMENTS = 500_000_000
# Of ZeRO 3: parameters up to the first stay whole on every rank, for gathering them one by one would cost
# more than they take; of other layers so many stay gathered, or are gathered ahead. DeepSpeed's default, a
# billion, is more than all of a ViT-L: nothing would ever be given up.
PERSISTENT_ELEMENTS, LIVE_ELEMENTS, PREFETCH_ELEMENTS = 100_000, 100_000_000, 25_000_000
LAST_STEP = StepInfo(step=999_999, total_steps=1_000_000, seed=0)
FP32, MASTER_AND_ADAM, ADAM = 4, 12, 8  # bytes of a parameter


@dataclass(frozen=True)
class Cost:
    """Of a run.

    Attributes:
        parameters: of each network.
        trained: those of them that an optimizer steps.
        encoder_parameters: of the student's encoder; its other parameters decode.
        flops: operations per image of a step, by phase: `targets`, `student`, and each opponent's name.
        memory: bytes of each GPU, by what takes them.
        micro_batch_size: images that a rank holds at once.
        ranks: GPUs.
    """

    parameters: dict[str, int]
    trained: dict[str, int]
    encoder_parameters: int
    flops: dict[str, float]
    memory: dict[str, int]
    micro_batch_size: int
    ranks: int

    @property
    def total_flops(self) -> float:
        """Operations per image of a step."""
        return sum(self.flops.values())

    @property
    def total_memory(self) -> int:
        """Bytes of each GPU."""
        return sum(self.memory.values())


class _Alone:
    """Agreement of one rank with itself."""

    def any(self, flag: Tensor) -> Tensor:
        return flag > 0

    def mean(self, x: Tensor) -> Tensor:
        return x.detach().float()


class _Autocast(nn.Module):
    """Calls a module of fp32 weights under autocast, as the loop runs teachers and discriminators."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.module(*args, **kwargs)


def count_cost(config: RunConfig, ranks: int = 1) -> Cost:
    """Count what a run of a config costs on some number of GPUs.

    Raises:
        ConfigError: the settings contradict each other.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    method = create_method(config.method, dtype)
    specs = method.submodules()
    modules = _build(method, config, specs, dtype)
    student = modules["student"]
    inner = {name for name, _ in student.named_parameters() if not name.startswith(DECODER_PARTS)}
    encoder = sum(p.numel() for name, p in student.named_parameters() if name in inner)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    trained = {
        name: sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in modules.items()
    }
    with ExitStack() as stack:
        stack.callback(forget_cached_tensors)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # with memory of their own, so to speak: what has none cannot take part in autograd's accounting
        modules = {name: module.to_empty(device="cpu") for name, module in modules.items()}
        flops, activations = _run_step(method, config, specs, modules, dtype)
    memory = static_memory(config, parameters, trained, ranks)
    memory["activations"] = activations
    return Cost(parameters, trained, encoder, flops, memory, config.train.micro_batch_size, ranks)


def network_specs(config: RunConfig) -> Mapping[str, SubmoduleSpec]:
    """What the networks of a run are to training, by name; no network is built."""
    return create_method(config.method).submodules()


def forget_cached_tensors() -> None:
    """Empty what functions of this package remember: filters made among fake tensors have no data."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == __package__.partition(".")[0]:
            for member in list(vars(module).values()):
                if isinstance(member, _lru_cache_wrapper):
                    member.cache_clear()


def _build(
    method: Method, config: RunConfig, specs: Mapping[str, SubmoduleSpec], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The networks on the meta device, in the precision they are kept in, without any file's weights."""
    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name, spec in specs.items():
            if name == "student":
                modules[name] = type(method).create_student(config.method)
            else:
                modules[name] = (spec.outline or spec.build)()
    for name, module in modules.items():
        use_fused_attention(module, True)
        if specs[name].kind == "engine":
            module.to(dtype)
        else:
            module.float()
        if specs[name].kind in ("ema", "frozen"):
            module.eval().requires_grad_(False)
    return modules


def fake_batch(config: RunConfig) -> Batch:
    """A micro-batch of the right shapes, as `shards.read.stream` gives it; call it among fake tensors."""
    size, num = config.method.input.image_size, config.train.micro_batch_size
    num_patches = config.method.input.num_patches
    return {
        "image": torch.zeros(num, 3, size, size, dtype=torch.uint8),
        "window": torch.tensor([0.0, 255.0]).repeat(num, 1),
        "hf_indices": torch.zeros(num, round(config.data.hf_keep * num_patches), dtype=torch.int64),
        "mask_noise": torch.rand(num, num_patches),
        "position": torch.arange(num),
        "slot": torch.arange(num),
        "draw_key": list(range(num)),
        "key": [str(number) for number in range(num)],
        "skipped": [],
        "num_bytes": 0,
    }


def _run_step(
    method: Method,
    config: RunConfig,
    specs: Mapping[str, SubmoduleSpec],
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype,
) -> tuple[dict[str, float], int]:
    """Operations per image, and the most bytes alive in a micro-batch."""
    nets = {
        name: _Autocast(module, dtype) if specs[name].kind in ("ema", "opponent") else module
        for name, module in modules.items()
    }
    opponents = [name for name, spec in specs.items() if spec.kind == "opponent"]
    for module in modules.values():  # gradients are counted with the weights, not with the activations
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    batch = fake_batch(config)
    flops: dict[str, float] = {}
    bytes_alive = LiveBytes()

    def count(phase: str, work: Callable[[], Any]) -> Any:
        counter = create_counter()
        with counter, bytes_alive:
            result = work()
        flops[phase] = counter.get_total_flops() / config.train.micro_batch_size
        return result

    targets = count("targets", lambda: method.targets(nets, batch, LAST_STEP))
    others = config.train.global_batch_size - config.train.micro_batch_size
    pool = {
        name: torch.cat([value, value.new_zeros(others, *value.shape[1:])]) for name, value in targets.items()
    }

    def student_step() -> Losses:
        with _frozen([modules[name] for name in opponents]):
            losses = method.losses(nets, batch, targets, pool, LAST_STEP, _Alone())
            torch.autograd.backward(losses.total)
        return Losses({}, {}, outputs=losses.outputs)

    losses = count("student", student_step)
    for name in opponents:

        def opponent_step(name: str = name) -> None:
            own = method.opponent_losses(name, nets, losses.outputs, LAST_STEP)
            if own is not None:
                torch.autograd.backward(own.total)

        count(name, opponent_step)
    return {phase: number for phase, number in flops.items() if number}, bytes_alive.peak


@contextmanager
def _frozen(modules: list[nn.Module]) -> Iterator[None]:
    for module in modules:
        module.requires_grad_(False)
    yield
    for module in modules:
        module.requires_grad_(True)


def static_memory(
    config: RunConfig, parameters: Mapping[str, int], trained: Mapping[str, int], ranks: int
) -> dict[str, int]:
    """Bytes per GPU of weights, gradients and optimizers: all but the activations, of counted networks.

    Args:
        config: of the run; its ZeRO stages and precision count.
        parameters: of each network, as `Cost.parameters`.
        trained: as `Cost.trained`.
        ranks: GPUs.
    """
    train, specs = config.train, network_specs(config)
    memory = {"weights": 0, "gradients": 0, "optimizer": 0, "buckets": 0, "other networks": 0}
    for name, spec in specs.items():
        number, learning = parameters[name], trained[name]
        if spec.kind in ("engine", "opponent"):
            stage, precision, offload = train.zero_stage, train.precision, train.offload_optimizer
            if spec.kind == "opponent":  # they stay in fp32
                stage, precision, offload = train.opponent.zero_stage, "fp32", False
            made = engine_memory(number, learning, precision, stage, ranks, offload=offload)
            if stage:
                made["buckets"] = min(BUCKET_ELEMENTS, learning) * (2 if precision == "bf16" else FP32)
            for key, value in made.items():
                memory[key] += value
        elif spec.kind == "plain":
            memory["other networks"] += number * (FP32 + FP32 + ADAM)
        elif spec.kind == "ema" and train.zero_stage == 3:
            memory["other networks"] += number * FP32 // ranks
        else:
            memory["other networks"] += number * FP32
    return memory


def engine_memory(
    number: int, trained: int, precision: str, stage: int, ranks: int, *, offload: bool = False
) -> dict[str, int]:
    """Bytes per GPU of a DeepSpeed engine: weights, gradients, and the optimizer with its master weights.

    In bf16 weights and gradients take 2 bytes, master weights and Adam's moments 12. Stage 1 cuts the
    optimizer among the ranks, stage 2 the gradients too, stage 3 the weights too, but for those that are
    gathered at a time. In fp32 there is no master copy in stage 0. An offloaded optimizer is on the host.
    """
    size = 2 if precision == "bf16" else FP32
    optimizer = ADAM if precision == "fp32" and stage == 0 else MASTER_AND_ADAM
    weights = number * size
    if stage == 3:
        weights = weights // ranks + min(number, LIVE_ELEMENTS) * size
    return {
        "weights": weights,
        "gradients": trained * size // (ranks if stage >= 2 else 1),
        "optimizer": 0 if offload else trained * optimizer // (ranks if stage else 1),
    }


def count_backbone(name: str, image_size: int) -> tuple[int, int, float]:
    """Width, parameters, and operations of a forward pass of one image of a backbone of the catalog.

    Raises:
        ConfigError: no such backbone, or the size does not fit.
    """
    with torch.device("meta"):
        encoder = Backbone(name, image_size)
    use_fused_attention(encoder, True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        encoder = encoder.to_empty(device="cpu").eval()
        with create_counter() as counter:
            encoder(torch.zeros(1, 3, image_size, image_size))
    parameters = sum(p.numel() for p in encoder.parameters())
    return encoder.width, parameters, float(counter.get_total_flops())
