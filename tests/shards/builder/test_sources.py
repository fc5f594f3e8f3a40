"""Listing of objects: trees, files, tables; and which places may be used together."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.builder.sources import check_places, list_objects
from shards.stores.store import LocalStore
from shards.support.errors import ConfigError, DataError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def rows_of(*sources, **options) -> list[dict]:
    rows = list_objects(sources, **options).objects.to_pylist()
    return [row | {"name": os.fsdecode(row["name"]), "uri": os.fsdecode(row["uri"])} for row in rows]


def names_of(*sources):
    return [row["name"] for row in rows_of(*sources)]


def test_every_object_is_listed_in_the_order_of_its_bytes(tmp_path):
    touch(tmp_path, "b.png", "a/z.png", "a.png", "Z.png", ".hidden", "a/.DS_Store", "é.png")
    assert names_of(tmp_path) == [
        "0/.hidden", "0/Z.png", "0/a.png", "0/a/.DS_Store", "0/a/z.png", "0/b.png", "0/é.png",
    ]  # fmt: skip


def test_names_do_not_depend_on_where_the_source_lies(tmp_path):
    assert names_of(touch(tmp_path / "x", "a/b.png")) == names_of(touch(tmp_path / "y", "a/b.png"))


def test_several_sources_and_single_files(tmp_path):
    one, two = touch(tmp_path / "one", "a.png"), touch(tmp_path / "two", "a.png", "b.png")
    listing = list_objects([one, str(two), two / "a.png", one / "a.png"])
    assert listing.objects["name"].to_pylist() == [b"0/a.png", b"1/a.png", b"1/b.png"]
    assert listing.num_repeated == 2


def test_names_need_not_be_utf_8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    (name,) = list_objects([tmp_path]).objects["name"].to_pylist()
    assert name == b"0/\xff.png"


def test_links(tmp_path):
    source = touch(tmp_path / "source", "real/a.png")
    touch(tmp_path / "elsewhere", "b.png")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "real" / "loop").symlink_to(source)
    (source / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.png")
    found = {row["name"]: row for row in rows_of(source)}
    assert sorted(found) == ["0/broken.png", "0/linked/b.png", "0/pipe.png", "0/real/a.png"]
    assert (found["0/broken.png"]["num_bytes"], found["0/broken.png"]["is_file"]) == (-1, False)
    assert not found["0/pipe.png"]["is_file"]


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        list_objects([tmp_path / "none"])
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty.*to mend it"):
        list_objects([tmp_path / "empty"])


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(["\ufeff" + ",".join(rows[0]), *lines]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["filename", "uri"])
def test_a_listing_names_objects_and_labels_them(tmp_path, suffix, column):
    touch(tmp_path / "data", "a.png", "b.png", "c.png")
    rows = [
        {column: "data/b.png", "label": "sick", "patient": 7, "secret": "Doe"},
        {column: str(tmp_path / "data" / "a.png"), "label": "", "patient": "", "secret": "Doe"},
        {column: "data/none.png", "label": "x", "patient": 8, "secret": "Doe"},
    ]
    if suffix == ".parquet":
        rows = [{name: str(value) for name, value in row.items()} for row in rows]
    table = write_table(tmp_path / f"list{suffix}", rows)
    found = {Path(row["uri"]).name: row for row in rows_of(table, columns=("label",))}
    assert sorted(found) == ["a.png", "b.png", "none.png"]
    assert (found["b.png"]["labels"], found["b.png"]["patient"]) == ('{"label":"sick"}', "7")
    assert (found["a.png"]["labels"], found["a.png"]["patient"]) == ("{}", None)
    assert found["b.png"]["name"] == "0/data/b.png"
    assert not found["none.png"]["is_file"]


def test_what_a_tree_and_a_listing_both_name_is_listed_once(tmp_path):
    tree = touch(tmp_path / "data", "a.png", "b.png")
    table = write_table(tmp_path / "list.csv", [{"filename": "data/b.png"}, {"filename": "data/b.png"}])
    listing = list_objects([tree, table])
    assert listing.objects["name"].to_pylist() == [b"0/a.png", b"0/b.png"]
    assert listing.num_repeated == 2


@pytest.mark.parametrize("text", ["file,label\na,b\n", "", 'filename\n""\n', "filename,label\n,x\n"])
def test_unusable_listings(tmp_path, text):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises((ConfigError, DataError), match=r"list\.csv"):
        list_objects([tmp_path / "list.csv"])
    (tmp_path / "list.parquet").write_text(text)
    with pytest.raises(ConfigError, match=r"list\.parquet"):
        list_objects([tmp_path / "list.parquet"])


def test_places(tmp_path):
    source, root, state = tmp_path / "source", tmp_path / "root", tmp_path / "state"
    check_places([source], LocalStore(root), state)
    for wrong in (
        (source / "root", state),
        (root, source / "state"),
        (source, state),
        (root, root / "state"),
        (tmp_path, tmp_path.with_name("state")),
    ):
        with pytest.raises(ConfigError):
            check_places([source], LocalStore(wrong[0]), wrong[1])


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("s3://bucket", "destination lies inside the source"),
        ("s3://bucket/a", "destination lies inside the source"),
        ("s3://bucket/a/b/", "destination lies inside the source"),
        ("s3://bucket/a/b/c", "source lies inside the destination"),
        ("s3://bucket/a/bb", ""),
        ("s3://bucke", ""),
        ("bucket/a", ""),
    ],
)
def test_places_in_s3(tmp_path, source, wrong):
    store = LocalStore(tmp_path)
    store.uri = "s3://bucket/a/b"
    if wrong:
        with pytest.raises(ConfigError, match=wrong):
            check_places([source], store, tmp_path)
    else:
        check_places([source], store, tmp_path)
