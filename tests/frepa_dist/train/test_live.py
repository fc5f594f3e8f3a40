"""What a rank exports: the whole table, by a run of Frepa with all its terms on shards of a real S3."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from frepa_dist.config import DataConfig
from frepa_dist.runs import list_checkpoints, read_metrics
from frepa_dist.train.engines import World
from frepa_dist.train.live import LiveMetrics, find_series
from shards.support.metrics import METRICS
from shards.support.telemetry import MetricsConfig, Telemetry
from tests.frepa_dist.train.small_runs import create_trainer, make_config
from tests.one_rank import one_rank
from tests.scraping import Samples, scrape

STEPS, BATCH = 6, 2
AT_ONCE = {"warmup_fraction": 0.0, "ramp_fraction": 0.0}
METHOD = {
    "name": "frepa",
    "model": {"backbone": "vit_pico", "image_size": 64},
    "hmi": {**AT_ONCE, "hidden": 16},
    "adversarial_image": {**AT_ONCE, "width": 8},
    "adversarial_embedding": AT_ONCE,
}


def base_names(found: Samples) -> set[str]:
    """Names of metrics, without what a histogram adds."""
    histograms = {metric.name for metric in METRICS if metric.kind == "histogram"}
    names = {name for name, *_ in found}
    return {next((whole for whole in histograms if name.startswith(f"{whole}_")), name) for name in names}


def test_a_run_with_all_terms_exports_the_whole_table(small_dataset, s3, tmp_path):
    uri, cache = s3.put_tree(small_dataset, "data/"), tmp_path / "cache"
    config = make_config(
        small_dataset, tmp_path / "run", METHOD, steps=STEPS, global_batch_size=BATCH, log_every=2
    )
    remote = {"root": uri, "remote": "cache", "cache_dir": cache, "num_workers": 0}
    config = config.model_copy(update={"data": config.data.model_copy(update=remote)})
    during: list[Samples] = []
    over = threading.Event()
    with one_rank() as world, Telemetry.serve(MetricsConfig(port=0), "train", {}) as telemetry:
        trainer = create_trainer(config, world, telemetry)

        def watch() -> None:
            while not over.wait(0.05):
                during.append(scrape(telemetry.port))

        watcher = threading.Thread(target=watch)
        watcher.start()
        trainer.run()
        over.set()
        watcher.join()
        found, records = scrape(telemetry.port), read_metrics(config.output)
        trainer.resume(list_checkpoints(config.output)[0])
        back = scrape(telemetry.port)
    assert base_names(found) == {metric.name for metric in METRICS if metric.exporter == "train"}

    assert [record["step"] for record in records] == [2, 4, 6]
    for name, value in records[-1].items():
        series = find_series(name)
        if series is not None:
            assert found[series[0], *series[1].values()] == pytest.approx(value), name
    terms = {key[1] for key in found if key[0] == "frepa_train_loss"}
    assert terms == {"total", "rec", "gradient", "hfl", "hmi", "adversarial_image", "adversarial_embedding"}
    networks = {"image_discriminator", "embedding_discriminator"}
    assert {key[1] for key in found if key[0] == "frepa_train_discriminator_accuracy"} == networks
    assert {key[1] for key in found if key[0] == "frepa_train_gradient_norm"} == {"student", *networks}
    assert found["frepa_train_hf_share",] > 0, "of a student that has learned nothing yet, it may be large"

    assert found["frepa_train_step",] == found["frepa_train_planned_steps",] == STEPS
    assert found["frepa_train_samples_total",] == STEPS * BATCH
    assert found["frepa_train_step_seconds_count",] == STEPS
    seconds = {key[1]: value for key, value in found.items() if key[0] == "frepa_train_phase_seconds_total"}
    assert {"data", "targets", "forward", "backward", "opponents", "step", "checkpoint"} == set(seconds)
    assert sum(seconds.values()) < found["frepa_train_step_seconds_sum",]
    for phase, spent in seconds.items():
        logged = sum(2 * record.get(f"time/{phase}", 0) for record in records)
        assert logged == pytest.approx(spent) if phase not in ("checkpoint",) else logged <= spent, phase

    requests = [found["frepa_data_cache_requests_total", result] for result in ("hit", "miss")]
    assert sum(requests) >= STEPS * BATCH, "one shard, asked for by each micro-batch"
    assert found["frepa_data_cache_bytes",] == sum(path.stat().st_size for path in cache.glob("*.tar")) > 0
    assert found["frepa_data_bytes_read_total",] > 1000 * STEPS * BATCH
    assert found["frepa_data_samples_skipped_total",] == 0
    memory = {key[1]: value for key, value in found.items() if key[0] == "frepa_train_device_memory_bytes"}
    assert 100e6 < memory["allocated"] <= memory["peak"]

    assert found["frepa_train_checkpoints_total", "written"] == 3
    assert found["frepa_train_checkpoints_total", "failed"] == 0
    assert found["frepa_train_checkpoint_step",] == STEPS
    assert (
        found["frepa_train_checkpoint_timestamp_seconds",]
        <= found["frepa_train_last_step_timestamp_seconds",] + 60
    )
    assert (back["frepa_train_step",], back["frepa_train_checkpoint_step",]) == (2, 2)

    steps = [one["frepa_train_step",] for one in during]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2, "it was scraped while it trained"
    losses = {one["frepa_train_loss", "total"] for one in during if ("frepa_train_loss", "total") in one}
    assert losses <= {record["loss"] for record in records}


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("loss", ("frepa_train_loss", {"term": "total"})),
        ("loss/hfl", ("frepa_train_loss", {"term": "hfl"})),
        ("judge/loss", ("frepa_train_method", {"name": "judge/loss"})),
        ("lr/opponent", ("frepa_train_learning_rate", {"network": "opponent"})),
        ("gradient_norm/student", ("frepa_train_gradient_norm", {"network": "student"})),
        ("judge/accuracy", ("frepa_train_discriminator_accuracy", {"network": "judge"})),
        ("teacher/distance", ("frepa_train_teacher_distance", {"network": "teacher"})),
        ("teacher/agreement", ("frepa_train_method", {"name": "teacher/agreement"})),
        ("mi/estimate", ("frepa_train_mi_estimate", {})),
        ("mi/log_partition", ("frepa_train_mi_partition", {})),
        ("mi_aux/estimate", ("frepa_train_method", {"name": "mi_aux/estimate"})),
        ("time/forward", None),
        ("guard/skipped", None),
        ("data/skipped", None),
        ("step", None),
        ("steps_of_another_kind", ("frepa_train_method", {"name": "steps_of_another_kind"})),
    ],
)
def test_every_logged_number_has_its_series(name, series):
    assert find_series(name) == series


def test_guards_and_replaced_samples_are_counted(tmp_path):
    world = World(1, 1, 2, torch.device("cpu"))
    with Telemetry.serve(MetricsConfig(port=0), "train", {}) as telemetry:
        live = LiveMetrics(telemetry, world, DataConfig(root=str(tmp_path)))
        before = scrape(telemetry.port)
        live.train(4, Counter(skipped=1, spikes=2))
        live.train(4, Counter(skipped=1, spikes=3, returns=1))
        skipped = [{"position": 0, "sample": "a", "reason": "torn"}] * 3
        live.load({"num_bytes": 7, "skipped": skipped, "cache_requests": (0, 0)})
        found = scrape(telemetry.port)
    guarded = {key[1]: value for key, value in found.items() if key[0] == "frepa_train_guarded_steps_total"}
    assert guarded == {"skipped": 1, "spikes": 3, "passed_over": 0, "returns": 1}
    assert before["frepa_train_guarded_steps_total", "returns"] == 0, "it is there before it grows"
    assert found["frepa_data_samples_skipped_total",] == 3
    assert found["frepa_data_bytes_read_total",] == 7
    assert found["frepa_train_samples_total",] == 8
    others = {"frepa_data_cache_bytes", "frepa_train_checkpoints_total", "frepa_data_cache_requests_total"}
    assert not others & base_names(found), "of rank 0, or of a cache that there is not"
