"""Every metric that this system exports, in one table: exporters, rules, dashboards and docs are held to it.

Names follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): prefix `frepa_`, base
units, `_total` for counters. Which run, which rank and which node are labels of the target, not of a metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# who exports: the ranks of a run, the supervisor of a node, a builder of shards, the driver of a sweep
Exporter = Literal["train", "supervisor", "build", "sweep"]
# steps take from milliseconds (twins on a CPU) to a minute (much accumulation)
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus shows it.
        kind: counters only grow while the process lives.
        exporter: what serves it.
        text: what it says, a sentence without its point.
        labels: names of its own labels.
        unit: of the value, for the axes of panels: as Grafana names it.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    exporter: Exporter
    text: str
    labels: tuple[str, ...] = ()
    unit: str = "short"
    buckets: tuple[float, ...] = ()


METRICS = (
    # training: of this rank where not said otherwise
    Metric("frepa_train_step", "gauge", "train", "Optimizer steps applied; it falls when a run goes back"),
    Metric("frepa_train_planned_steps", "gauge", "train", "Optimizer steps of the whole run"),
    Metric("frepa_train_epoch", "gauge", "train", "Epoch that is being read"),
    Metric("frepa_train_samples_total", "counter", "train", "Samples that this rank has trained on"),
    Metric(
        "frepa_train_samples_per_second",
        "gauge",
        "train",
        "Samples of all ranks per second since the log line before",
    ),
    Metric(
        "frepa_train_last_step_timestamp_seconds",
        "gauge",
        "train",
        "When this rank last finished a step",
        unit="dateTimeFromNow",
    ),
    Metric(
        "frepa_train_step_seconds",
        "histogram",
        "train",
        "Time of a step from batch to batch",
        unit="s",
        buckets=STEP_BUCKETS,
    ),
    Metric(
        "frepa_train_phase_seconds_total",
        "counter",
        "train",
        "Time of the host in data, forward, backward, step, checkpoint and the like",
        labels=("phase",),
        unit="s",
    ),
    Metric(
        "frepa_train_loss",
        "gauge",
        "train",
        "Mean over all ranks since the log line before; `total` is the sum that is minimized",
        labels=("term",),
    ),
    Metric("frepa_train_learning_rate", "gauge", "train", "Learning rate", labels=("network",)),
    Metric("frepa_train_gradient_norm", "gauge", "train", "Norm of the last gradient", labels=("network",)),
    Metric("frepa_train_mi_estimate", "gauge", "train", "Estimate of mutual information", unit="nats"),
    Metric(
        "frepa_train_mi_partition",
        "gauge",
        "train",
        "Partition term of the estimate: log E exp T of pairs that do not belong together",
        unit="nats",
    ),
    Metric(
        "frepa_train_discriminator_accuracy",
        "gauge",
        "train",
        "Share of real and made images that a discriminator tells right",
        labels=("network",),
        unit="percentunit",
    ),
    Metric(
        "frepa_train_teacher_distance",
        "gauge",
        "train",
        "Distance of the EMA teacher's weights from the student's over their norm",
        labels=("network",),
    ),
    Metric(
        "frepa_train_hf_share",
        "gauge",
        "train",
        "Energy in the high band of the spectrum of what is restored, over that of the images",
    ),
    Metric(
        "frepa_train_method",
        "gauge",
        "train",
        "Any other number that a method reports, by the name it has in metrics.jsonl",
        labels=("name",),
    ),
    Metric(
        "frepa_train_guarded_steps_total",
        "counter",
        "train",
        "Steps in which a guard acted: skipped, spikes, passed_over, returns",
        labels=("kind",),
    ),
    Metric(
        "frepa_train_checkpoints_total",
        "counter",
        "train",
        "Checkpoints (rank 0): written, failed",
        labels=("result",),
    ),
    Metric("frepa_train_checkpoint_step", "gauge", "train", "Step of the newest whole checkpoint (rank 0)"),
    Metric(
        "frepa_train_checkpoint_timestamp_seconds",
        "gauge",
        "train",
        "When the newest whole checkpoint was written (rank 0)",
        unit="dateTimeFromNow",
    ),
    Metric(
        "frepa_train_checkpoint_write_seconds",
        "gauge",
        "train",
        "Time the newest checkpoint took to write, beside training (rank 0)",
        unit="s",
    ),
    Metric(
        "frepa_train_device_memory_bytes",
        "gauge",
        "train",
        "Memory of the device: allocated now, and the peak since the start",
        labels=("kind",),
        unit="bytes",
    ),
    # the loader of a rank
    Metric("frepa_data_bytes_read_total", "counter", "train", "Bytes of samples read", unit="bytes"),
    Metric("frepa_data_samples_skipped_total", "counter", "train", "Damaged samples that were replaced"),
    Metric(
        "frepa_data_cache_requests_total",
        "counter",
        "train",
        "Shards asked of the local cache: hit, miss",
        labels=("result",),
    ),
    Metric("frepa_data_cache_bytes", "gauge", "train", "Bytes in the local cache of shards", unit="bytes"),
    # the supervisor of a node
    Metric("frepa_supervisor_restarts_total", "counter", "supervisor", "Restarts of all ranks"),
    Metric(
        "frepa_supervisor_faults_total",
        "counter",
        "supervisor",
        "Starts that ended in a fault, by its exit code",
        labels=("code",),
    ),
    Metric(
        "frepa_supervisor_ranks",
        "gauge",
        "supervisor",
        "Ranks of this node by what they last said",
        labels=("state",),
    ),
    Metric(
        "frepa_supervisor_heartbeat_age_seconds",
        "gauge",
        "supervisor",
        "Time since a rank of this node last said something new; the longest of them",
        unit="s",
    ),
    Metric(
        "frepa_disk_free_bytes",
        "gauge",
        "supervisor",
        "Free bytes of the disk under the run folder and under the cache",
        labels=("place",),
        unit="bytes",
    ),
    Metric(
        "frepa_disk_size_bytes",
        "gauge",
        "supervisor",
        "Size of the disk under the run folder and under the cache",
        labels=("place",),
        unit="bytes",
    ),
    # a builder of shards
    Metric(
        "frepa_build_units_total",
        "counter",
        "build",
        "Images, slices, pages, tiles by what became of them: sample, duplicate, excluded, quarantined",
        labels=("outcome",),
    ),
    Metric("frepa_build_shards_total", "counter", "build", "Shards committed by this build"),
    Metric("frepa_build_planned_shards", "gauge", "build", "Shards that this build has to write"),
    Metric("frepa_build_bytes_written_total", "counter", "build", "Bytes of shards written", unit="bytes"),
    # the driver of a sweep
    Metric("frepa_sweep_trials", "gauge", "sweep", "Trials by state", labels=("state",)),
    Metric("frepa_sweep_planned_trials", "gauge", "sweep", "Trials of the whole sweep"),
    Metric("frepa_sweep_reports_total", "counter", "sweep", "Measurements that trials have reported"),
    Metric("frepa_sweep_best_metric", "gauge", "sweep", "The best value of the sweep's metric so far"),
)
