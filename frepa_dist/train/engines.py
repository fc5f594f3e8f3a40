"""DeepSpeed engines and the process group: the one place that knows DeepSpeed's configuration."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from frepa_dist.config import MONITOR_BLOCKS, TrainConfig
from frepa_dist.models.cost import (
    BUCKET_ELEMENTS,
    LIVE_ELEMENTS,
    PERSISTENT_ELEMENTS,
    PREFETCH_ELEMENTS,
)
from frepa_dist.threads import share_cores
from shards.support.errors import EnvironmentFault

T = TypeVar("T")
WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: place among all processes; `local_rank` among those of this node.
        size: number of processes.
        device: where this rank computes.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    def any(self, flag: Tensor) -> Tensor:
        """True where any rank's flag is; all ranks must call it, nobody waits for the device."""
        return self.max(flag) > 0

    def max(self, value: Tensor) -> Tensor:
        """Largest value over ranks, without gradient; all ranks must call it."""
        largest = value.detach().to(torch.float32).clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, without gradient; all ranks must call it."""
        total = value.detach().to(torch.float32).clone()
        dist.all_reduce(total)
        return total / self.size

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the (B, D) rows of all ranks in rank order to (W B, D); all ranks must call it."""
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def from_main(self, value: Any) -> Any:
        """Rank 0's value of a small plain object; all ranks must call it."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait_for_main(self, work: Callable[[], T], beat: Callable[[], None]) -> T:
        """What a function returns that rank 0 alone runs and that may take long; all ranks must call it.

        The others ask every few seconds, so that no collective waits for longer than its timeout.

        Args:
            work: rank 0's; what it returns must be a small plain object.
            beat: called on all ranks while they wait.
        """
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work) if self.is_main else None
            while True:
                if future is not None:
                    wait([future], WAIT_SECONDS)
                if self.from_main(future is not None and future.done()):
                    result: T = self.from_main(future.result() if future is not None else None)
                    return result
                beat()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and draws progress."""
        return self.rank == 0


def _keep_operators() -> None:
    """Have DeepSpeed's operator for CPU ranks compiled once for each environment, which takes a minute.

    It is compiled anew by another version of ninja than the last time, and for the headers of another
    environment: so always the ninja beside this interpreter, and a folder of a virtual environment's own.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "share" / "torch_extensions"))


@contextlib.contextmanager
def process_group() -> Iterator[World]:
    """Join the process group the launcher describes in the environment; leave it when all went well.

    After an error it is not left: that can wait for ranks which wait for this one. The caller ends the
    process.

    Raises:
        EnvironmentFault: the launcher's variables are missing, or the others cannot be reached.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ["LOCAL_RANK"])
    except KeyError as error:
        raise EnvironmentFault(
            f"{error.args[0]} is not set: this program is started by a launcher",
            where="frepa_dist.train",
            fix="use `frepa pretrain --config FILE`, or `deepspeed --module frepa_dist.train --config FILE`",
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_operators()
        share_cores(int(os.environ.get("LOCAL_SIZE", "1")))
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError is a RuntimeError
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvironmentFault(
            f"the ranks could not meet: {' '.join(str(error).split())[:300]}",
            where=address,
            fix="choose a free port with --master-port, and check that the nodes reach each other",
        ) from error
    yield World(rank, local_rank, size, device)
    dist.destroy_process_group()


@dataclass(frozen=True)
class EngineSettings:
    """What an engine and its optimizer need to know beside the sizes of batches.

    Attributes:
        betas, weight_decay: of AdamW.
        clipping: largest norm of the gradient; None does not clip.
        zero_stage: ZeRO stage.
        bf16: whether the engine holds the module in bf16, and masters in fp32.
        more: more of DeepSpeed's configuration.
        offload_optimizer: whether masters and moments live, and the optimizer steps, in the host's memory.
    """

    betas: tuple[float, float]
    weight_decay: float
    clipping: float | None
    zero_stage: int
    bf16: bool
    more: Mapping[str, Any]
    offload_optimizer: bool = False


def student_settings(config: TrainConfig) -> EngineSettings:
    """Settings of the student's engine."""
    return EngineSettings(
        betas=config.betas,
        weight_decay=config.weight_decay,
        clipping=config.gradient_clipping,
        zero_stage=config.zero_stage,
        bf16=config.precision == "bf16",
        more={key: value for key, value in config.deepspeed.items() if key not in MONITOR_BLOCKS},
        offload_optimizer=config.offload_optimizer,
    )


def opponent_settings(config: TrainConfig) -> EngineSettings:
    """Settings of a discriminator's engine: fp32, for bf16 would round the vectors of spectral norm."""
    own = config.opponent
    return EngineSettings(
        betas=own.betas,
        weight_decay=own.weight_decay,
        clipping=own.clipping,
        zero_stage=own.zero_stage,
        bf16=False,
        more={},
    )


def zero_config(settings: EngineSettings, num_trained: int) -> dict[str, Any]:
    """The part of the DeepSpeed configuration that is about ZeRO, for a network of so many parameters."""
    # DeepSpeed makes the buffer of gradients as large as this, whatever the size of the network
    bucket = min(BUCKET_ELEMENTS, max(num_trained, 1))
    made: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": bucket}
    if settings.zero_stage == 3:
        made |= {
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
        }
    if settings.offload_optimizer:
        # memory is pinned for copies from and to an accelerator
        made["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return made


def deepspeed_config(
    settings: EngineSettings, num_trained: int, micro_batch_size: int, accumulation: int
) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours, for a network of `num_trained` parameters."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero_config(settings, num_trained),
        # torch's fused AdamW knows the CPU too; DeepSpeed's own would have to be compiled there
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.bf16},
        # DeepSpeed clips at 1 where nothing is said
        "gradient_clipping": math.inf if settings.clipping is None else settings.clipping,
        "steps_per_print": 10**9,
    }
    return {**settings.more, **made}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay, biases and norms do not (one-dimensional parameters; as facebookresearch/mae).

    Nor do those that a module names by `no_weight_decay()`.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    named: set[str] = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()  # type: ignore[operator]
    spared = {name for name, p in trained if p.ndim <= 1 or name.endswith(".bias") or name in named}
    decayed = [p for name, p in trained if name not in spared]
    kept = [p for name, p in trained if name in spared]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_engine(
    module: nn.Module, settings: EngineSettings, micro_batch_size: int, accumulation: int
) -> Any:
    """Wrap a module in a DeepSpeed engine with AdamW (fused); all ranks must call it.

    Its learning rate is 0 until it is set.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=0.0,
        betas=settings.betas,
        fused=True,
    )
    num_trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config(settings, num_trained, micro_batch_size, accumulation),
        dist_init_required=False,
    )
    if settings.bf16 and settings.zero_stage == 0:
        # here DeepSpeed has taken a step without gradients, which would count in Adam's bias correction
        engine.optimizer.optimizer.state.clear()
    return engine


class EngineSubmodule:
    """A module trained by a DeepSpeed engine.

    Attributes:
        module: the module, its weights in the engine's precision.
        fixed: its fp32 tensors that are not trained: the engine keeps no fp32 master of them.
        whole_norm: norm of the last step's gradient, where each rank has all of it (ZeRO 0).
    """

    whole_norm: Tensor | None = None

    def __init__(
        self, module: nn.Module, settings: EngineSettings, micro_batch_size: int, accumulation: int
    ) -> None:
        self.module = module
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        self.fixed = {
            name: value.detach().float().cpu().clone()
            for name, value in module.state_dict().items()
            if name not in trained
        }
        self.engine = create_engine(module, settings, micro_batch_size, accumulation)

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
        """Global norm of the last step's gradient before clipping; None before the first step."""
        norm: Tensor | float | None = self.engine.get_global_grad_norm()
        return self.whole_norm if norm is None else norm  # in fp32, the engine of ZeRO 0 knows none


class Autocast(nn.Module):
    """Calls a module under bf16 autocast; methods of the module are called the same way."""

    def __init__(self, module: nn.Module, device_type: str) -> None:
        super().__init__()
        self._wrapped, self._device_type = [module], device_type  # a list: not a submodule of its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        with torch.autocast(self._device_type, torch.bfloat16):
            return self._wrapped[0](*args, **kwargs)
