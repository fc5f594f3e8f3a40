"""The metric of a sweep at a checkpoint."""

from __future__ import annotations

from pathlib import Path

from cluster.sweep.config import MetricConfig

NUM_RECONSTRUCTED = 64


def check_metric(metric: MetricConfig) -> None:
    """Make sure that there is what trials are to be measured on.

    Raises:
        FrepaError: what is wrong with the images or the labels.
    """
    from frepa_dist.evaluate.labelled import read_labeled
    from frepa_dist.evaluate.views import list_images
    from shards.dataset import has_dataset
    from shards.stores.store import is_remote

    images = Path(metric.images)
    if not metric.reconstructs:
        read_labeled(images, metric.labels, label_column=metric.label_column, classes=metric.classes)
    elif not is_remote(metric.images) and not has_dataset(images):
        list_images(images)


def measure(run: Path, step: int, metric: MetricConfig) -> tuple[float, dict[str, float]]:
    """Measure a checkpoint of a run.

    Returns:
        The value trials are compared by, and all that was measured with it.

    Raises:
        FrepaError: what is wrong with the checkpoint or the images.
    """
    from frepa_dist.evaluate.selection import measure_detail, measure_labeled
    from frepa_dist.evaluate.task import ProbeTask

    if metric.reconstructs:
        details = measure_detail(
            run,
            step,
            metric.images,
            mask_ratio=metric.mask_ratio,
            num=metric.num or NUM_RECONSTRUCTED,
            modality=metric.modality,
            seed=metric.seed,
            device=metric.device,
        )
        return details[metric.kind], details
    task = ProbeTask(
        images=str(metric.images),
        labels=metric.labels,
        label_column=metric.label_column,
        classes=metric.classes,
        seed=metric.seed,
    )
    neighbors = metric.neighbors if metric.kind == "knn" else None
    details = measure_labeled(run, step, task, num=metric.num, neighbors=neighbors, device=metric.device)
    return details["auroc"], details
