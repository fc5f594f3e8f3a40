"""A head on volumes: what attention between slices adds to a 2D encoder, beside the head without it.

Both heads have the same size and see the same volumes in the same order; the control's blocks all attend
within slices and know no slice number, so that a volume is a set of slices to it. Volumes are split by
patient, and the bootstrap draws patients.

Shapes: n volumes, D width of a map, K classes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.heads import seeded
from frepa_dist.evaluate.leakage import NOT_CHECKED, check_leakage
from frepa_dist.evaluate.scores import accuracy, bootstrap_intervals, macro_auroc
from frepa_dist.evaluate.volume_data import (
    LabeledVolumes,
    Load,
    SliceEncoder,
    SliceImages,
    label_volumes,
    store_maps,
)
from frepa_dist.evaluate.volume_result import HeadResult, VolumeResult
from frepa_dist.evaluate.volume_training import (
    Body,
    VolumeTraining,
    predict_classes,
    train_classifier,
)
from frepa_dist.models.volume import ClassificationHead, SliceMixer, VolumeEncoder, VolumeSettings
from frepa_dist.models.volume_slots import cut_slots
from shards.audit.stored import StoredImages
from shards.dataset import load_snapshot
from shards.read.reader import ShardReader
from shards.read.volumes import list_volumes
from shards.read.windows import WindowName
from shards.support.errors import DataError

LOOKED_FOR = 3  # slices of a volume, of which memory holds the fingerprints


def run_volume(
    encoder: str,
    dataset: str,
    label_column: str,
    *,
    modality: str | None = None,
    window: WindowName | None = None,
    train_encoder: bool = False,
    settings: VolumeSettings | None = None,
    training: VolumeTraining | None = None,
    num_resamples: int = 1000,
    cache: Path | None = None,
    device: str | None = None,
    smoke_test: bool = False,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> VolumeResult:
    """Train and judge a volume head and its control on the labeled volumes of a dataset.

    Args:
        encoder: see `features.SOURCES`.
        dataset: a folder of shards or `s3://bucket/prefix`.
        label_column: a label that all slices of a volume have in common.
        modality: the only one to use, None for all.
        window: of CT, None for everything between air and hard bone.
        train_encoder: train the 2D encoder too, from the same start for both heads.
        settings: of the head.
        training: how it is trained.
        num_resamples: of the bootstrap.
        cache: folder for the maps of a frozen encoder while this runs, None for the system's temporary one.
        device: None takes a GPU if there is one.
        smoke_test: say with the result that its labels are not medical.
        allow_leakage: go on where volumes were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, dataset, labels or disk.
    """
    settings, training = settings or VolumeSettings(), training or VolumeTraining()
    snapshot = load_snapshot(dataset)
    found = list_volumes(dataset, snapshot, modality)
    if not found:
        raise DataError(
            "the dataset holds no volumes", where=dataset, fix="build one from volumes (NIfTI, DICOM series)"
        )
    data = label_volumes(found, label_column, training.seed, dataset)
    reader = ShardReader(dataset, snapshot)
    leakage = find_leaks(encoder, data, reader, allow_leakage, states)
    loaded = load_encoder(encoder, device)
    slices = SliceEncoder(loaded).to(loaded.device)
    images = SliceImages(reader, data.volumes, loaded.image_size, window)
    with tempfile.TemporaryDirectory(prefix="frepa-volume-", dir=cache) as folder:
        began = time.perf_counter()
        load: Load = images
        if not train_encoder:
            chunk = settings.slice_chunk
            load = store_maps(slices, images, data.volumes, Path(folder), loaded.device, num=chunk)
        encode_seconds = (time.perf_counter() - began) / len(data.volumes)
        heads = compare_heads(
            slices if train_encoder else None,
            map_width(slices, loaded.image_size, loaded.device),
            load, data, settings, training, loaded.device, num_resamples=num_resamples,
        )  # fmt: skip
    train, test = (
        np.bincount(data.y[part], minlength=len(data.classes)) for part in (~data.is_test, data.is_test)
    )
    lengths = [len(volume.slices) for volume in data.volumes]
    return VolumeResult(
        encoder=loaded.name,
        dataset=str(dataset),
        snapshot=snapshot.hash,
        label_column=label_column,
        classes=data.classes,
        num_train=train.tolist(),
        num_test=test.tolist(),
        num_left_out=data.num_left_out,
        num_slices=(min(lengths), float(np.median(lengths)), max(lengths)),
        num_missing=sum(volume.num_missing for volume in data.volumes),
        split=data.split,
        num_test_groups=len(np.unique(data.groups[data.is_test])),
        resampled="patients" if any(volume.patient for volume in data.volumes) else "volumes",
        test_y=data.y[data.is_test].tolist(),
        test_groups=data.groups[data.is_test].tolist(),
        num_resamples=num_resamples,
        majority=float(test[int(train.argmax())] / test.sum()),
        settings=settings,
        training=training,
        train_encoder=train_encoder,
        encode_seconds_per_volume=None if train_encoder else encode_seconds,
        volume=heads[0],
        control=heads[1],
        smoke_test=smoke_test,
        leakage=leakage,
    )


def find_leaks(
    encoder: str, data: LabeledVolumes, reader: ShardReader, allow: bool, states: Sequence[Path]
) -> str:
    """Say whether volumes of the test part were in the pretraining data of a run: some slices tell of each.

    Raises:
        DataError: some were, and that is not allowed.
    """
    chosen = [
        (number, int(place))
        for number, volume in enumerate(data.volumes)
        for place in np.unique(np.linspace(0, len(volume.slices) - 1, LOOKED_FOR + 2).astype(int)[1:-1])
    ]
    volumes = [data.volumes[number] for number, _ in chosen]
    samples = StoredImages(
        reader.store,
        reader.snapshot.shards,
        [(int(v.shards[at]), int(v.rows[at])) for v, (_, at) in zip(volumes, chosen, strict=True)],
        [f"{v.name}, slice {v.slices[at]}" for v, (_, at) in zip(volumes, chosen, strict=True)],
    )
    tested = [bool(data.is_test[number]) for number, _ in chosen]
    said = check_leakage(encoder, samples, images=reader.store.uri, allow=allow, states=states, tested=tested)
    return said if said.startswith(NOT_CHECKED) else f"{said} (of each volume {LOOKED_FOR} slices)"


def compare_heads(
    encoder: SliceEncoder | None,
    width: int,
    load: Load,
    data: LabeledVolumes,
    settings: VolumeSettings,
    training: VolumeTraining,
    device: torch.device,
    *,
    num_resamples: int = 1000,
) -> tuple[HeadResult, HeadResult]:
    """Train and judge the head with attention between slices, and the control, from the same start.

    Args:
        encoder: the 2D encoder, where it is to be trained; it comes back as the control left it.
        width: D.
        load: images, where the encoder is trained; else maps.
        data: the volumes.
        settings: of the head; `between` is set here.
        training: how.
        device: where.
        num_resamples: of the bootstrap.

    Raises:
        DivergedError: the loss is no number.
    """
    state = {} if encoder is None else encoder.module.state_dict()
    start = {name: value.clone() for name, value in state.items()}
    results = []
    for between in (True, False):
        chosen = settings.model_copy(update={"between": between})
        with seeded(training.seed, device):
            if encoder is None:
                body: Body = SliceMixer(width, chosen)
            else:
                encoder.module.load_state_dict(start)
                body = VolumeEncoder(encoder, width, chosen, train_encoder=True)
            head = ClassificationHead(width, len(data.classes))
            results.append(_judge(body.to(device), head.to(device), load, data, training, num_resamples))
    return results[0], results[1]


@torch.no_grad()
def map_width(encoder: SliceEncoder, size: int, device: torch.device) -> int:
    """D of the maps that an encoder gives for images of a size."""
    found: Tensor = encoder(torch.zeros(1, 3, size, size, device=device))
    return found.shape[1]


def _judge(
    body: Body,
    head: ClassificationHead,
    load: Load,
    data: LabeledVolumes,
    training: VolumeTraining,
    num_resamples: int,
) -> HeadResult:
    window = body.settings
    slots = [cut_slots(v.slices, window.num_slices, window.overlap) for v in data.volumes]
    train, test = np.flatnonzero(~data.is_test), np.flatnonzero(data.is_test)
    began = time.perf_counter()
    train_classifier(body, head, load, slots, data.y, train, training)
    trained = time.perf_counter()
    scores = predict_classes(body, head, load, slots, test)
    seconds = time.perf_counter() - trained
    y, groups = data.y[test], data.groups[test]
    intervals = bootstrap_intervals(
        scores, y, groups, num_resamples, training.seed, (macro_auroc, accuracy)
    ).tolist()
    learning: Sequence[Tensor] = [p for m in (body, head) for p in m.parameters() if p.requires_grad]
    return HeadResult(
        auroc=macro_auroc(scores, y),
        auroc_low=intervals[0][0],
        auroc_high=intervals[0][1],
        accuracy=accuracy(scores, y),
        accuracy_low=intervals[1][0],
        accuracy_high=intervals[1][1],
        train_accuracy=accuracy(predict_classes(body, head, load, slots, train), data.y[train]),
        num_parameters=sum(parameter.numel() for parameter in learning),
        seconds=trained - began,
        seconds_per_volume=seconds / len(test),
        scores=np.asarray(scores, np.float64).tolist(),
    )
