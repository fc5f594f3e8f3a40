"""DICOM: series, and what of its tags is let through."""

from __future__ import annotations

import logging
import threading
import warnings

import numpy as np
import pydicom

from shards.formats.common import Unreadable, quiet
from tests.shards.formats.made import (
    SECRETS,
    XRAY,
    decode,
    header_of,
    make_dicom,
)
from tests.shards.images import draw

GREY = draw(3, channels=1)
SIGNED = GREY.astype(np.int16) * 8 - 1000


def test_slices_of_a_series_sort_by_their_place():
    orientation = [0, 1, 0, 0, 0, -1]  # sagittal
    slices = [
        make_dicom(SIGNED, InstanceNumber=9 - n, ImageOrientationPatient=orientation, SliceLocation=-n,
                   ImagePositionPatient=[-n * 1.5, 7, 8])
        for n in range(3)
    ]  # fmt: skip
    headers = [header_of(data) for data in slices]
    assert len({header.series for header in headers}) == 1
    assert headers[0].series
    assert [header.place for header in headers] == [0.0, 1.5, 3.0]
    assert header_of(make_dicom(SIGNED, SliceLocation=4.5, InstanceNumber=2)).place == 4.5
    assert header_of(make_dicom(SIGNED, InstanceNumber=2)).place == 2
    assert header_of(make_dicom(SIGNED, SliceLocation=0, InstanceNumber=2)).place == 0
    assert header_of(make_dicom(GREY, Modality="DX", SOPClassUID=XRAY)).series is None


def test_only_listed_facts_come_through():
    data = make_dicom(
        SIGNED, **SECRETS, KVP=120, SliceThickness="2.50000001", PixelSpacing=[0.7, 0.7], ViewPosition="AP"
    )
    header = header_of(data)
    assert header.patient == SECRETS["PatientID"]
    assert header.facts == {
        "dicom_modality": "CT",
        "photometric": "MONOCHROME2",
        "bits": 16.0,
        "tube_kv": 120.0,
        "slice_thickness_mm": 2.5,
        "pixel_spacing_mm": 0.7,
        "view": "AP",
    }
    assert header_of(make_dicom(SIGNED, BodyPartExamined="CHEST")).facts["body_part"] == "CHEST"
    assert header_of(make_dicom(SIGNED, PatientID="")).patient is None


def test_damaged_facts_cost_only_themselves():
    data = make_dicom(SIGNED, KVP="80.1234567", PixelSpacing=[0.12345, 0.12345], SliceThickness="3")
    data = data.replace(b"80.1234567", b"about 80! ").replace(b"0.12345", b"abcdefg")
    facts = header_of(data).facts
    assert facts["slice_thickness_mm"] == 3.0
    assert not {"tube_kv", "pixel_spacing_mm"} & set(facts)


def test_nothing_is_quoted(caplog, capfd):
    typed = {"PatientBirthDate": "not a date", "BodyPartExamined": "Grimhilds knee"}
    # an unknown character set is what pydicom quotes in a warning, whatever its settings
    data = make_dicom(SIGNED, **SECRETS | typed, SpecificCharacterSet="ISO_IR 100")
    data = data.replace(b"ISO_IR 100", b"ISO_GRIMHI")
    at = data.find(b"KNIE")
    caplog.set_level(logging.DEBUG)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(-60, 60):
            broken = bytearray(data)
            broken[at + step] ^= 0x55 * (step != 0)
            try:
                header_of(bytes(broken), "x.dcm")
                decode(bytes(broken), "x.dcm")
            except Unreadable as error:
                told.append(f"{error} {error.detail} {error.__cause__}")
        told += [str(warning.message) for warning in warned]
    captured = capfd.readouterr()
    shown = " ".join([*told, captured.out, captured.err, caplog.text]).upper()
    for value in [*SECRETS.values(), *typed.values(), "ISO_GRIMHI"]:
        for word in value.replace("^", " ").split():
            assert len(word) < 3 or word.upper() not in shown


def test_the_logger_of_others_is_left_as_it_was():
    decode(make_dicom(SIGNED))
    assert not logging.getLogger("pydicom").disabled
    assert pydicom.config.settings.reading_validation_mode == pydicom.config.WARN


def test_threads_keep_it_silent_for_each_other():
    logger = logging.getLogger("pydicom")
    inside, go_on = threading.Event(), threading.Event()

    def stay() -> None:
        with quiet("pydicom"):
            inside.set()
            go_on.wait(10)

    with quiet("pydicom"):
        other = threading.Thread(target=stay)
        other.start()
        assert inside.wait(10)
    assert logger.disabled  # the other one is not done
    go_on.set()
    other.join()
    assert not logger.disabled
