import contextlib
import ipaddress
import json

import pytest

from shards.support.errors import EnvironmentFault
from shards.support.targets import advertised_host, remove_targets, unique_label, write_target


def target_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_places_of_one_name_have_labels_of_their_own_that_tell_no_folder():
    labels = {unique_label(place) for place in ("/home/ada/runs/vit", "/home/bob/runs/vit", "s3://b/vit")}
    assert len(labels) == 3
    assert all(label.startswith("vit-") and not {"ada", "bob", "/"} & set(label) for label in labels)
    assert unique_label("/runs/vit/") == unique_label("/runs/vit")
    assert unique_label('/runs/a "b"').startswith("a__b_-")


def test_a_rank_has_one_file_wherever_it_runs(tmp_path):
    for node, run in (("0", "a"), ("1", "a"), ("0", "b")):
        write_target(tmp_path, "10.0.0.1:9100", {"job": "frepa_train", "run": run, "rank": "3", "node": node})
    assert target_files(tmp_path) == ["frepa_train-a-3.json", "frepa_train-b-3.json"]
    (group,) = json.loads((tmp_path / "frepa_train-a-3.json").read_text())
    assert group["labels"]["node"] == "1"


def test_what_is_removed_has_all_the_labels(tmp_path):
    for job, run, node in (("train", "a", "0"), ("train", "a", "1"), ("train", "b", "0"), ("sup", "a", "0")):
        write_target(tmp_path, "10.0.0.1:9100", {"job": job, "run": run, "rank": node, "node": node})
    for name, text in (
        ("torn.json", "[{"),
        ("other.json", "[]"),
        ("strange.json", "[{}]"),
        ("list.json", "3"),
    ):
        (tmp_path / name).write_text(text)
    before = target_files(tmp_path)
    remove_targets(tmp_path, {"job": "train", "run": "a", "node": "0"})
    assert set(before) - set(target_files(tmp_path)) == {"train-a-0.json"}


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=r"metrics\.targets"):
        write_target(tmp_path / "file", "h:1", {"job": "x"})


def test_who_listens_everywhere_is_reached_at_an_address():
    assert advertised_host("127.0.0.1") == "127.0.0.1"
    assert advertised_host("::1") == "[::1]"
    assert advertised_host("node-7.cluster") == "node-7.cluster"
    host = advertised_host("0.0.0.0")  # noqa: S104
    assert host
    with contextlib.suppress(ValueError):  # a machine without a network: its name
        assert not ipaddress.ip_address(host).is_unspecified
