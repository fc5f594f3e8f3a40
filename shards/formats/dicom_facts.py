"""What DICOM tags say about an object: its place in a volume, and the facts that may enter a dataset."""

from __future__ import annotations

import math

import numpy as np
from pydicom.dataset import Dataset

VOLUME_MODALITIES = frozenset({"CT", "MR", "PT", "NM", "OPT"})
"""Modalities whose series are slices of a volume; a series of X-rays is a few views."""

NUMBERS = {
    "SliceThickness": "slice_thickness_mm",
    "SpacingBetweenSlices": "slice_spacing_mm",
    "KVP": "tube_kv",
    "MagneticFieldStrength": "field_tesla",
    "EchoTime": "echo_ms",
    "RepetitionTime": "repetition_ms",
    "BitsStored": "bits",
}
CODES = {
    "Modality": (
        "CR CT DX ES GM IO IVUS MG MR NM OCT OP OPT OPTBSV OPTENF OT PT PX RF SC SM US XA XC",
        "dicom_modality",
    ),
    "PhotometricInterpretation": (
        "MONOCHROME1 MONOCHROME2 PALETTE_COLOR RGB YBR_FULL YBR_FULL_422 YBR_ICT YBR_RCT",
        "photometric",
    ),
    "BodyPartExamined": (
        "ABDOMEN ABDOMENPELVIS ANKLE ARM BRAIN BREAST BRONCHUS CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE "
        "COLON CSPINE ELBOW ESOPHAGUS EYE FEMUR FINGER FOOT FOREARM HAND HEAD HEADNECK HEART HIP HUMERUS JAW "
        "KIDNEY KNEE LEG LIVER LSPINE LUNG NECK ORBIT PANCREAS PELVIS PROSTATE RETINA RIB SHOULDER SINUS "
        "SKIN SKULL SPINE SSPINE STOMACH THIGH THYROID TIBIA TOE TSPINE UTERUS WHOLEBODY WRIST",
        "body_part",
    ),
    "ViewPosition": ("AP PA LL LAT RL LLD RLD LLO RLO CC MLO ML LM XCCL", "view"),
    "Laterality": ("L R", "laterality"),
    "ImageLaterality": ("L R B", "laterality"),
}
"""Tags whose value may enter, where it is one of the list: a code field may hold anything that was typed."""


def number_of(tags: Dataset, keyword: str, place: int = 0) -> float | None:
    """A finite number of a tag, None where there is none; `place` is for tags with several."""
    try:
        value = tags.get(keyword)
        if isinstance(value, (str, bytes)) or value is None:
            return None
        number = float(value[place] if np.ndim(value) else value)
    except Exception:  # whatever pydicom raises on a damaged tag: it is as if it were missing
        return None
    return number if math.isfinite(number) else None


def text_of(tags: Dataset, keyword: str) -> str | None:
    """A tag as stripped text, several values joined by a backslash; None where there is none."""
    try:
        value = tags.get(keyword)
    except Exception:  # as above
        return None
    if value is None:
        return None
    several = value if not isinstance(value, str) and np.ndim(value) else [value]
    return "\\".join(str(one) for one in several).strip(" \0")


def group_of(tags: Dataset, frame: int, sequence: str) -> Dataset:
    """Where a frame's attributes are: in an item of its functional groups, or with the others.

    Enhanced multi-frame objects keep them by frame, or once for all frames (PS3.3 C.7.6.16).
    """
    for groups, place in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = tags.get(groups) or []
        if place < len(items) and items[place].get(sequence):
            return Dataset(items[place].get(sequence)[0])
    return tags


def find_volume(tags: Dataset) -> bool:
    """Whether the object is a slice of the volume that its series is."""
    has_position = number_of(tags, "ImagePositionPatient", 2) is not None
    return text_of(tags, "Modality") in VOLUME_MODALITIES or has_position


def find_place(tags: Dataset) -> float:
    """Where along its normal a slice lies, in mm; else its stated location, else its number in the series."""
    direction = [number_of(tags, "ImageOrientationPatient", n) for n in range(6)]
    corner = [number_of(tags, "ImagePositionPatient", n) for n in range(3)]
    if None not in direction and None not in corner:
        normal = np.cross(np.array(direction[:3], float), np.array(direction[3:], float))
        if np.any(normal):
            return round(float(normal @ np.array(corner, float)), 4)
    stated = (number_of(tags, keyword) for keyword in ("SliceLocation", "InstanceNumber"))
    return next((place for place in stated if place is not None), 0.0)


def collect_facts(tags: Dataset) -> dict[str, str | float]:
    """Numbers of the acquisition and codes from fixed lists, by the names of the dataset."""
    facts: dict[str, str | float] = {}
    for keyword, name in NUMBERS.items():
        number = number_of(tags, keyword)
        if number is not None:
            facts[name] = float(f"{number:.6g}")
    spacing = number_of(tags, "PixelSpacing") or number_of(tags, "ImagerPixelSpacing")
    if spacing is not None:
        facts["pixel_spacing_mm"] = float(f"{spacing:.6g}")
    for keyword, (allowed, name) in CODES.items():
        code = (text_of(tags, keyword) or "").upper().replace(" ", "_")
        if code and code in allowed.split():
            facts[name] = code
    return facts
