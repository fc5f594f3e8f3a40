"""Listing and labeling of objects."""

from __future__ import annotations

import os

import pytest

from shards.sources import SourceObject, check_places, create_labeler, list_objects
from shards.support.errors import ConfigError, DataError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def names_of(*sources):
    return [item.name for item in list_objects(sources)]


def test_every_object_is_listed_in_the_order_of_its_bytes(tmp_path):
    touch(tmp_path, "b.png", "a/z.png", "a.png", "Z.png", ".hidden", "a/.DS_Store", "é.png")
    assert names_of(tmp_path) == [
        "0/.hidden", "0/Z.png", "0/a.png", "0/a/.DS_Store", "0/a/z.png", "0/b.png", "0/é.png",
    ]  # fmt: skip


def test_names_do_not_depend_on_where_the_source_lies(tmp_path):
    assert names_of(touch(tmp_path / "x", "a/b.png")) == names_of(touch(tmp_path / "y", "a/b.png"))


def test_several_sources_and_single_files(tmp_path):
    one, two = touch(tmp_path / "one", "a.png"), touch(tmp_path / "two", "a.png")
    assert names_of(one, two, two / "a.png") == ["0/a.png", "1/a.png", "2/a.png"]


def test_names_need_not_be_utf_8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    (item,) = list_objects([tmp_path])
    assert os.fsencode(item.name) == b"0/\xff.png"


def test_links(tmp_path):
    source = touch(tmp_path / "source", "real/a.png")
    touch(tmp_path / "elsewhere", "b.png")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "real" / "loop").symlink_to(source)
    (source / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.png")
    found = {item.name: item for item in list_objects([source])}
    assert sorted(found) == ["0/broken.png", "0/linked/b.png", "0/pipe.png", "0/real/a.png"]
    assert (found["0/broken.png"].num_bytes, found["0/broken.png"].is_file) == (-1, False)
    assert not found["0/pipe.png"].is_file


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        list_objects([tmp_path / "none"])
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty.*to mend it"):
        list_objects([tmp_path / "empty"])


def test_places(tmp_path):
    source, root, state = tmp_path / "source", tmp_path / "root", tmp_path / "state"
    check_places([source], root, state)
    for wrong in (
        (source / "root", state),
        (root, source / "state"),
        (source, state),
        (root, root / "state"),
    ):
        with pytest.raises(ConfigError):
            check_places([source], *wrong)


def item(path) -> SourceObject:
    return SourceObject(f"0/{path}", str(path), 1, 0, is_file=True)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("0/a.png", {}),
        ("0/glaucoma/a.png", {"label": "glaucoma"}),
        ("0/glaucoma/deeper/a.png", {"label": "glaucoma"}),
        ("0/train/glaucoma/a.png", {"split": "train", "label": "glaucoma"}),
        ("0/Test/a.png", {"split": "Test"}),
    ],
)
def test_labels_from_folders(name, labels):
    labeler = create_labeler("folder", (), "")
    assert labeler(SourceObject(name, "", 1, 0, is_file=True)).values == labels


def test_labels_from_a_table(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufefffilename,label,split,patient,mask\nimages/a.png,x,,7,secret.png\nimages/b.png,,test,,\n"
    )
    labeler = create_labeler(str(table), ("label", "split"), "patient")
    labels = labeler(item(tmp_path / "images" / "a.png"))
    assert (labels.values, labels.patient) == ({"label": "x"}, "7")
    assert labeler(item(tmp_path / "images" / "b.png")).values == {"split": "test"}
    assert labeler(item(tmp_path / "images" / "c.png")).values == {}
    assert create_labeler("none", (), "")(item("x")).values == {}


@pytest.mark.parametrize("text", ["file,label\na,b\n", "filename,class\na,b\n", "", None])
def test_unusable_tables(tmp_path, text):
    table = tmp_path / "labels.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.csv"):
        create_labeler(str(table), ("label",), "patient")
