"""Labeled sets: what is read from folders and tables, and what is said of those that cannot be used."""

from __future__ import annotations

import pytest

from frepa_dist.evaluate.labelled import read_labeled
from shards.support.errors import ConfigError, DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def table(folder, text):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_folder_per_class(tmp_path):
    touch(tmp_path, "a/2.png", "a/deep/1.JPG", "b/1.tif", "b/notes.txt", ".cache/x.png", "loose.png")
    found = read_labeled(tmp_path)
    assert [
        (str(p.relative_to(tmp_path)), label) for p, label in zip(found.paths, found.labels, strict=True)
    ] == [
        ("a/2.png", "a"),
        ("a/deep/1.JPG", "a"),
        ("b/1.tif", "b"),
    ]
    assert (found.splits, found.patients, found.num_left_out) == (None, None, 1)


def test_split_folders(tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/2.png", "Test/b/3.png", "train/b/4.png")
    found = read_labeled(tmp_path)
    assert sorted(zip((p.name for p in found.paths), found.labels, found.splits, strict=True)) == [
        ("1.png", "a", "train"),
        ("2.png", "a", "train"),
        ("3.png", "b", "test"),
        ("4.png", "b", "train"),
    ]
    touch(tmp_path, "preview.png")  # beside them, it is left out
    again = read_labeled(tmp_path)
    assert (sorted(again.labels), sorted(again.splits), again.num_left_out) == (
        sorted(found.labels),
        sorted(found.splits),
        1,
    )
    touch(tmp_path, "masks/1.png")
    with pytest.raises(ConfigError, match=r"Test, train, val are parts of a split.*lies masks.*CSV"):
        read_labeled(tmp_path)


def test_names_of_patients_are_what_is_left_without_spaces(tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png")
    path = table(tmp_path, "filename,label,patient\n1.png,a,p1\n2.png,b, p1 \n3.png,b,  \n")
    assert read_labeled(tmp_path, path).patients == ["p1", "p1", "(row 2)"]


def test_table_with_split_patients_other_columns_and_rows_without_label(tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png", "sub/4.png")
    path = table(
        tmp_path,
        "\ufefffilename,grade,split,patient,note\n"
        '1.png,mild,train,p1,"a, b"\n2.png,none,test,p2,\n3.png,,train,p2,\nsub/4.png,none,valid,,\n',
    )
    found = read_labeled(tmp_path, path, label_column="grade")
    assert [p.name for p in found.paths] == ["1.png", "2.png", "4.png"]
    assert found.labels == ["mild", "none", "none"]
    assert found.splits == ["train", "test", "train"]
    assert found.patients == ["p1", "p2", "(row 3)"]
    assert found.num_left_out == 1


def test_chosen_classes_only(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    path = table(tmp_path, "filename,label\n1.png,a\n2.png,b\nnot-there.png,c\n")
    assert read_labeled(tmp_path, path, classes=["a", "b"]).num_left_out == 1
    with pytest.raises(DataError, match=r"found a;.*choose among the labels in the file: a, b, c"):
        read_labeled(tmp_path, path, classes=["a", "z"])


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("filename,grade,age\n1.png,a,3\n", ConfigError, "no column 'label'.*filename, grade, age"),
        ("file,label\n1.png,a\n", ConfigError, "no column 'filename'"),
        ("", ConfigError, r"\(none\)"),
        ("filename;label\n1.png;a\n", ConfigError, "by commas, not by ';'"),
        ("filename, label\n1.png,a\n", ConfigError, "rename ' label'"),
        ("filename,label,split\n1.png,a,train\n2.png,b,holdout\n", ConfigError, "unknown split 'holdout'"),
        ("filename,label,split\n1.png,a,train\n2.png,b\n", ConfigError, "unknown split"),
        ("filename,label\n1.png,a\n2.png,a\n", DataError, "two classes or more, found a"),
        ("filename,label\n1.png,a\n1.png,b\n", DataError, "listed twice, such as 1.png"),
        ("filename,label\n1.png,a\n9.png,b\n8.png,b\n", DataError, "2 of 3 images are missing.*9.png"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, error, word):
    touch(tmp_path, "1.png", "2.png")
    with pytest.raises(error, match=word):
        read_labeled(tmp_path, table(tmp_path, text))


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_labeled(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image"):
        read_labeled(tmp_path)
    touch(tmp_path, "images/1.png")
    with pytest.raises(DataError, match="found images"):
        read_labeled(tmp_path)
    table(tmp_path, "filename,label\n")
    with pytest.raises(DataError, match=r"--labels .*labels\.csv"):
        read_labeled(tmp_path)


def test_a_table_that_is_not_text(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_labeled(tmp_path, tmp_path / "labels.csv")
