"""The typed configuration of a pretraining run: one YAML file says everything that decides its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from frepa_dist.methods.registry import MethodConfig
from shards.read.balance import ModalityWeights
from shards.read.config import AccessConfig, CropRatio, CropScale, PlaceName, StreamConfig
from shards.read.order import OrderConfig
from shards.read.windows import WindowConfig
from shards.support.settings import Settings
from shards.support.telemetry import MetricsConfig

# keys of DeepSpeed's own configuration that this system decides; passing them through would contradict it
OWNED_DEEPSPEED_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
        "bf16",
        "fp16",
        "torch_autocast",
        "optimizer",
        "scheduler",
        "checkpoint",
    }
)

# blocks of it that turn on DeepSpeed's monitors; no engine is told of them (frepa_dist.train.monitors)
MONITOR_BLOCKS = ("tensorboard", "csv_monitor", "wandb", "comet")


class DataConfig(AccessConfig):
    """Which samples are read, and how a training view is cut from each; see also `AccessConfig`.

    Attributes:
        root: dataset that `frepa shards build` made: a folder, or `s3://bucket/prefix`.
        snapshot: hash of the snapshot to train on; None takes the current one and pins it in the run.
        hf_keep: share of a view's patches that count as high-frequency (HF) tokens.
        hf_digests: HF version by modality, one in the tars or added by `frepa shards rehf`; of modalities
            that are not named, and for None, the one in the tars.
        crop_scale: range of the crop's area as a share of the image's.
        crop_ratio: range of the crop's aspect ratio (width / height).
        flip: whether half of the views are mirrored left to right.
        ct_windows: which windows the views of CT are shown in.
        num_streams: streams of the order (shards.read.order); None chooses one that divides the batch.
        modality_weights: how modalities are balanced (shards.read.balance): `uniform`, `{alpha: 0.5}` for
            shares in proportion to samples^alpha, or passes over a modality in one epoch, 1 where not named.
        num_workers: loader processes per rank; 0 reads in the training process.
        bad_samples: `fail` stops at a damaged sample, `skip` replaces it by another and reports it.
    """

    root: PlaceName
    snapshot: str | None = None
    hf_keep: float = Field(0.25, gt=0, le=1)
    hf_digests: dict[str, str] | None = None
    crop_scale: CropScale = (0.2, 1.0)
    crop_ratio: CropRatio = (3 / 4, 4 / 3)
    flip: bool = True
    ct_windows: WindowConfig = WindowConfig()
    num_streams: int | None = Field(None, ge=1)
    modality_weights: ModalityWeights = Field(default_factory=dict)
    num_workers: int = Field(2, ge=0)
    bad_samples: Literal["fail", "skip"] = "fail"


class OpponentConfig(Settings):
    """How discriminators are trained: each by an engine of its own, in fp32 under the student's autocast.

    Attributes:
        learning_rate: the peak; it rises and falls as the student's does. As `betas`, of Isola et al. (2017).
        betas, weight_decay: of AdamW.
        clipping: largest norm of a discriminator's gradient; None does not clip.
        zero_stage: ZeRO stage; a discriminator is small, and 0 costs the least communication. 3 is not
            offered: spectral normalization needs whole weights after each step.
    """

    learning_rate: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    clipping: float | None = Field(1.0, gt=0)
    zero_stage: Literal[0, 1, 2] = 0


class GuardConfig(Settings):
    """What is done about steps whose numbers cannot be right.

    A step in which a loss, a gradient or a critic's weight is not finite on any rank changes nothing, and is
    written down. No public source states these limits: they are choices.

    Attributes:
        patience: steps in a row that are skipped before the run goes back to its last checkpoint, from where
            it passes over the batches of these steps. It goes back at once where a critic's weights are not
            finite.
        most_returns: how often it goes back without having made a new checkpoint in between; then it ends.
        spike_deviations: a loss is a spike where it is above the median of recent ones by more than this many
            standard deviations (1.4826 times the median distance from the median, at least 1 % of it).
            None looks for none.
        spike_window: how many recent losses that are.
        skip_spikes: whether spikes are skipped as well; else they are written down.
    """

    patience: int = Field(5, ge=1)
    most_returns: int = Field(2, ge=0)
    spike_deviations: float | None = Field(10.0, gt=0)
    spike_window: int = Field(200, ge=20)
    skip_spikes: bool = False


class TrainConfig(Settings):
    """Optimization, its cadence, and what is written down.

    Attributes:
        global_batch_size: samples of one optimizer step, over all ranks and micro-batches.
        micro_batch_size: samples a rank holds at once; accumulation is derived from the world size.
        epochs, steps: length of the run; exactly one of the two.
        base_learning_rate: learning rate at a batch of 256; the rate is base * global batch / 256.
        warmup_fraction: share of the steps in which the learning rate rises linearly from 0.
        min_learning_rate: where the cosine ends.
        gradient_clipping: largest norm of the student's gradient; None does not clip.
        precision: `bf16` keeps fp32 master weights; MINE's critic and the EMA teacher stay in fp32.
        zero_stage: ZeRO stage of the student engine. 1 cuts the optimizer among the ranks, 2 the gradients
            too, 3 also the weights, and with them the EMA teacher; all train the same.
        offload_optimizer: keep the student's master weights and moments in the host's memory, and step
            there; from ZeRO stage 1 on. It saves a GPU 12 bytes per parameter it steps, and takes time.
        critic_learning_rate, critic_clipping: of plain modules that train beside the engine (MINE's critic).
        opponent: how discriminators are trained.
        compile: run the student through torch.compile; the first steps take longer.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        keep_checkpoints: how many of the newest are kept.
        keep_every: checkpoints of steps that are multiples of this are kept as well.
        keep_best: the checkpoint with the smallest value of this logged metric is kept as well; with a minus
            before its name (`-teacher/agreement`) the largest. Values are means since the log line before.
        checkpoint_failures: so many checkpoints in a row that cannot be written (disk full) end the run; with
            fewer it goes on, and says so.
        checkpoint_copy: folder or `s3://bucket/prefix`, of this run alone, where checkpoints are kept a
            second time. A run whose folder is lost or damaged is gone on with from there.
        guard: what is done about steps whose numbers cannot be right.
        log_keys: write the keys of the samples of every step to RUN/keys: what was used can be counted there.
        metrics: where ranks and supervisors serve live metrics to Prometheus.
        deepspeed: more of DeepSpeed's configuration for the student's engine, passed through. Its monitors
            (`tensorboard`, `csv_monitor`, `wandb`, `comet`) get what metrics.jsonl gets.
    """

    global_batch_size: int = Field(256, ge=1)
    micro_batch_size: int = Field(64, ge=1)
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    base_learning_rate: float = Field(1.5e-4, gt=0)
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    min_learning_rate: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    critic_learning_rate: float = Field(1e-4, gt=0)
    critic_clipping: float | None = Field(1.0, gt=0)
    opponent: OpponentConfig = OpponentConfig()
    compile: bool = False
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)
    keep_best: str | None = None
    checkpoint_failures: int = Field(3, ge=1)
    checkpoint_copy: PlaceName | None = None
    guard: GuardConfig = GuardConfig()
    log_keys: bool = False
    metrics: MetricsConfig = MetricsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of 'epochs' and 'steps'")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs a zero_stage of 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile does not go with zero_stage 3: weights come and go between its layers")
        owned = sorted(OWNED_DEEPSPEED_KEYS & set(self.deepspeed))
        if owned:
            raise ValueError(f"deepspeed: {', '.join(owned)} follow from the other settings of `train`")
        return self


class RunConfig(Settings):
    """A whole run: where it goes, what is learned, from what, and how."""

    output: Path
    method: MethodConfig
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_patches = self.method.input.num_patches
        if not round(self.data.hf_keep * num_patches):  # the mean of no token is not a number
            raise ValueError(
                f"data.hf_keep {self.data.hf_keep} keeps none of the {num_patches} patches of a view"
            )
        return self

    def order_config(self) -> OrderConfig:
        """The settings of the order of samples."""
        return OrderConfig(
            seed=self.train.seed,
            global_batch_size=self.train.global_batch_size,
            num_streams=self.data.num_streams,
            modality_weights=self.data.modality_weights,
        )

    def stream_config(self) -> StreamConfig:
        """The settings of the loader; the view's size and grid are the model's."""
        return StreamConfig(
            **self.data.model_dump(exclude={"num_streams", "modality_weights"}),
            image_size=self.method.input.image_size,
            patch_size=self.method.input.patch_size,
            seed=self.train.seed,
        )
