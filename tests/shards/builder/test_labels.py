"""Labels of objects: from folders and from tables."""

from __future__ import annotations

import pytest

from shards.builder.labels import Labels, create_labeler
from shards.support.errors import ConfigError


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
    assert create_labeler("folder", (), "")(name, "").values == labels


def test_labels_from_a_table(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufefffilename,label,split,patient,mask\nimages/a.png,x,,7,secret.png\nimages/b.png,,test,,\n"
        "s3://bucket/c.png,y,,8,\n"
    )
    label = create_labeler(str(table), ("label", "split"), "patient")
    assert label("", str(tmp_path / "images" / "a.png")) == Labels({"label": "x"}, "7")
    assert label("", str(tmp_path / "images" / "b.png")) == Labels({"split": "test"})
    assert label("", str(tmp_path / "images" / "c.png")) == Labels()
    assert label("", "s3://bucket/c.png") == Labels({"label": "y"}, "8")
    assert create_labeler("none", (), "")("0/a/x.png", "/x.png") == Labels()


@pytest.mark.parametrize("text", ["file,label\na,b\n", "filename,class\na,b\n", "", None])
def test_unusable_tables(tmp_path, text):
    table = tmp_path / "labels.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.csv"):
        create_labeler(str(table), ("label",), "patient")
