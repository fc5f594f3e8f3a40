"""Nothing of a patient is in a dataset: DICOM with all tags filled, folders and files that bear names.

The whole destination is searched: raw bytes, and what lies under its compression (tars' members, zstd, PNG,
parquet); so is all that a build says. That the search would find a name is shown with `keep_names`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import zstandard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from shards.support.errors import EnvironmentFault
from tests.s3.building import assert_whole, download, files_of
from tests.s3.proxy import ALWAYS
from tests.shards.builder.test_build_volumes import draw_volume
from tests.shards.building import SALT, build
from tests.shards.formats.made import SECRETS, make_dicom, make_nifti
from tests.shards.images import draw, encode

UIDS = {
    name: generate_uid(entropy_srcs=[name])
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")
}
TAGS = {
    **SECRETS,
    **UIDS,
    "PatientAge": "070Y",
    "OtherPatientIDs": "OTHER-PID-5151",
    "PatientComments": "Likes Schlotterbeck",
    "PatientMotherBirthName": "Amsel^Portiunkula",
    "PerformingPhysicianName": "Dimpfelmoser^A",
    "SoftwareVersions": "syngo Ottokar 3",
    "PatientTelephoneNumbers": "+49-911-774411",
    "DerivationDescription": "from Grimhild's scan",
    "AcquisitionComments": "moved, Grimhild",
}
NAMES = ("Portiunkula", "Hotzenplotz", "Zwackelmann", "private-value-9137")
PLAIN, UNKNOWN = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.9.9\0"  # transfer syntaxes
FOLDER = "Klinik Finsterwald/Hotzenplotz^Amsel_1948"


def secrets() -> set[str]:
    """All values, their parts of some length, names of files and folders, and unsalted digests of them."""
    words = {*map(str, TAGS.values()), *NAMES, *FOLDER.split("/"), "ottokar_pid", SALT, "s3://"}
    words |= {part for word in list(words) for part in word.replace(" ", "^").split("^") if len(part) >= 7}
    words -= {"070Y"}  # would be found by chance
    digests = {
        getattr(hashlib, kind)(word.encode()).hexdigest()[:16] for word in words for kind in ("md5", "sha256")
    }
    return words | digests


def fill(data: bytes, number: int) -> bytes:
    """Add what a keyword cannot: private tags, a sequence, a preamble."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    block = dataset.private_block(0x0029, "SIEMENS Hotzenplotz", create=True)
    block.add_new(0x10, "LO", "private-value-9137")
    block.add_new(0x11, "UN", b"Portiunkula in bytes")
    item = Dataset()
    item.PatientID = "OTHER-PID-5151"
    dataset.OtherPatientIDsSequence = [item]
    dataset.file_meta.PrivateInformationCreatorUID = UIDS["StudyInstanceUID"]
    dataset.file_meta.PrivateInformation = b"Hotzenplotz "
    dataset.InstanceNumber = number
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return b"Hotzenplotz".ljust(128, b"\0") + buffer.getvalue()[128:]


def slice_of(number: int, pixels: np.ndarray, **tags: object) -> bytes:
    place = {
        "Modality": "MR",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, float(number)],
        "SOPInstanceUID": f"{UIDS['SOPInstanceUID']}.{number}"[:64],
    }
    return fill(make_dicom(pixels, **{**TAGS, **place, **tags}), number)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A series, single images with metadata, and one of each kind of broken object."""
    top = tmp_path_factory.mktemp("pacs")
    folder = top / FOLDER
    folder.mkdir(parents=True)
    volume = draw_volume(0, 7)

    def put(name: str, data: bytes) -> None:
        (folder / f"ottokar_pid_774411_{name}").write_bytes(data)

    for number in range(6):
        put(f"{number}.dcm", slice_of(number, volume[number]))
    put("same.dcm", slice_of(0, volume[0]))  # a byte duplicate
    put("pixels.dcm", slice_of(9, volume[0], SeriesInstanceUID=generate_uid(entropy_srcs=["another"])))
    put("cut.dcm", slice_of(10, volume[5])[:-3000])
    put("flat.dcm", slice_of(11, np.zeros_like(volume[0])))
    put("tiny.dcm", slice_of(12, volume[0][:9, :9]))
    put("wrong.dcm", fill(make_dicom(volume[1], **TAGS), 13).replace(PLAIN, UNKNOWN))
    put("report.dcm", slice_of(14, volume[1], Modality="SR"))
    put("bad.dcm", b"Hotzenplotz".ljust(128) + b"DICM" + b"Zwackelmann" * 20)
    put("notes.txt", b"Hotzenplotz, Amsel")
    put(
        "brain.nii.gz",
        make_nifti(volume[:3].transpose(2, 1, 0) + 7, is_gzip=True, descrip=b"Hotzenplotz, Amsel"),
    )
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E] = "Hotzenplotz"  # ImageDescription
    text.add_text("Patient", "Hotzenplotz", zip=True)
    pictures = {"JPEG": {"exif": exif, "comment": b"Zwackelmann"}, "PNG": {"pnginfo": text}}
    for number, (kind, options) in enumerate(pictures.items()):
        put(f"eye.{kind.lower()}", encode(draw(number, 96, 96), kind, **options))
    return top


def unpacked(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file as it is, and all that lies under its compression."""
    yield name, data
    if name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                yield from unpacked(f"{name}/{member.name}", tar.extractfile(member).read())
                yield f"{name}/{member.name}, header", repr(member.get_info()).encode()
    elif name.endswith(".zst"):
        yield f"{name}, unpacked", zstandard.decompress(data)
    elif name.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(data))
        facts = [pq.read_metadata(pa.BufferReader(data)).metadata, table.schema.metadata, table.schema]
        yield f"{name}, rows", "\n".join(map(str, [*facts, *table.to_pylist()])).encode()
        for column in table.column_names:
            yield f"{name}, {column}", "\n".join(map(str, table[column].to_pylist())).encode()
    elif name.endswith((".png", ".jpg")):
        with Image.open(io.BytesIO(data)) as image:
            yield f"{name}, pixels", image.tobytes()
            yield f"{name}, metadata", repr((image.info, dict(image.getexif()))).encode()


def find(files: dict[str, bytes], words: set[str]) -> list[tuple[str, str]]:
    """Where one of the words is, whatever its case, also as UTF-16, and in names of files."""
    found = []
    needles = [
        (word, text) for word in words for text in (word.lower().encode(), word.lower().encode("utf-16-le"))
    ]
    for name, data in files.items():
        for place, content in [(f"the name of {name}", name.encode()), *unpacked(name, data)]:
            lowered = content.lower()
            found += [(place, word) for word, text in needles if text in lowered]
    return found


@pytest.mark.parametrize(("modality", "way"), [("mri", "local"), ("mri", "s3"), ("ct", "s3")])
def test_no_tag_and_no_name_is_there(request, source, tmp_path, capfd, caplog, recwarn, modality, way):
    state, place, start = tmp_path / "state", tmp_path / "root", source
    if way == "s3":
        s3 = request.getfixturevalue("s3")
        place, start = f"{s3.uri}/data", s3.put_tree(source, "hotzenplotz/")
    with caplog.at_level(logging.INFO):
        report = build(start, place, modality=modality, source="pacs", state=state)
        again = build(start, place, modality=modality, source="pacs", state=state)
    assert again.snapshot == report.snapshot
    assert report.counts.samples >= 6 + 2
    assert {"flat", "too_small", "truncated"} <= report.quarantined.keys()
    assert len(report.quarantined) + len(report.excluded) >= 5
    assert report.counts.duplicates >= 1
    assert_whole(place)
    files = download(s3, "data") if way == "s3" else files_of(place)
    assert any(name.endswith(".tar") for name in files)
    words = secrets() | {str(tmp_path), str(source), source.name}
    assert find(files, words) == []
    out, err = capfd.readouterr()
    assert "build" in err  # there is something to search
    said = {
        "stdout": out.encode(),
        "stderr": err.encode(),
        "log": caplog.text.encode(),
        "warnings": repr([str(item.message) for item in recwarn]).encode(),
        "report": "\n".join(report.lines()).encode(),
    }
    assert find(said, words - {"s3://", str(tmp_path)}) == []


def test_the_search_finds_what_is_there(source, tmp_path):
    build(source, tmp_path / "root", modality="mri", keep_names=True)
    found = find(files_of(tmp_path / "root"), secrets())
    assert {"Hotzenplotz", "Klinik Finsterwald", "ottokar_pid"} <= {word for _, word in found}
    assert all(".tar" in place for place, _ in found)  # in each KEY.json, and nowhere else


def test_a_build_that_fails_leaves_no_name_behind(s3, faults, quick, source, tmp_path):
    """The error names the object to whoever builds; what it leaves in the destination does not."""
    start, place = s3.put_tree(source, "hotzenplotz/"), f"{s3.uri}/data"
    faults.add("denied", key=r"brain\.nii\.gz$", method="GET", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=r"ottokar_pid_774411_brain\.nii\.gz"):
        build(start, place, modality="mri", state=tmp_path / "state")
    faults.clear()

    faults.add("denied", key=r"data/dataset\.json$", method="PUT", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=r"dataset\.json"):
        build(start, place, modality="mri", state=tmp_path / "state")
    files = download(s3, "data")
    assert files
    assert find(files, secrets() | {str(tmp_path)}) == []
