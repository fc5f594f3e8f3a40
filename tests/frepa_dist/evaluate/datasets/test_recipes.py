"""Every recipe against a synthetic copy laid out as it says, and against copies with something wrong."""

from __future__ import annotations

import csv
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from frepa_dist.evaluate.datasets.check import check_dataset, write_labels
from frepa_dist.evaluate.datasets.recipe import Recipe, fill_pattern, load_recipe, recipe_names
from frepa_dist.evaluate.labelled import read_labeled
from frepa_dist.evaluate.pairs import read_masked
from shards.support.errors import ConfigError, DataError
from tests.commands import frepa

SIZE = (72, 64)
GENERIC = ("table", "class-folders", "image-masks", "volumes")
RECIPES = [name for name in recipe_names() if load_recipe(name).kind != "facts" and name not in GENERIC]

# of each recipe, texts that its groups may be; a part takes as many combinations as it counts images
GROUPS = {
    "chasedb1": {"eye": ["L", "R"], "patient": [f"{n:02d}" for n in range(1, 15)]},
    "drive": {"id": [f"{n:02d}" for n in range(1, 41)]},
    "stare": {"id": [f"im{n:04d}" for n in range(1, 21)]},
    "hrf": {"id": [f"{n:02d}" for n in range(1, 16)], "group": ["h", "dr", "g"]},
    "oct2017": {
        "split": ["train", "test"],
        "label": ["CNV", "DME", "DRUSEN", "NORMAL"],
        "disease": ["CNV"],
        "patient": ["17", "18"],
        "number": ["1"],
    },
    "ham10000": {"part": ["1"], "id": [f"ISIC_{n}" for n in range(40)]},
    "msd-lung": {"id": ["lung_001", "lung_002"]},
    "chaksu": {"id": [f"{n}" for n in range(40)], "suffix": ["jpg"]},
}
FEW = 12  # images of a large part: the copy is then too small, and said to be


def images_of(recipe, part):
    """Group values of each image of a part."""
    texts = GROUPS.get(recipe.name, {"id": [f"{n}" for n in range(1, 41)]})
    values = [
        [text for text in texts[name] if re.fullmatch(part.groups.get(name, ".+"), text)]
        for name in names(part)
    ]
    found = [dict(zip(names(part), combined, strict=True)) for combined in itertools.product(*values)]
    return found[: min(part.count or 999, 45) if part.count is None or part.count <= 45 else FEW]


def names(part):
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", part.images)))


def draw(path, rng, *, grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".nii.gz"):
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, 2, (16, 16, 4)).astype(np.int16), np.eye(4)), path)
        return
    pixels = rng.integers(0, 255, SIZE if grey else (*SIZE, 3), dtype=np.uint8)
    Image.fromarray((pixels > 128).astype(np.uint8) * 255 if grey else pixels).save(path)


def lay_out(recipe: Recipe, folder):
    """A copy of a data set, as the recipe says; of large parts a few images."""
    rng = np.random.default_rng(0)
    for number, part in enumerate(recipe.parts):
        found = images_of(recipe, part)
        if recipe.name == "drive":
            found = [{"id": f"{n + 20 * (number == 0):02d}"} for n in range(1, 21)]
        for groups in found:
            draw(folder / fill_pattern(part.images, groups), rng)
            for pattern in filter(None, (part.mask, part.fov, part.mask2)):
                draw(folder / fill_pattern(pattern, groups), rng, grey=True)
        for table in part.labels:
            path = folder / table.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([f"{table.key} ", *table.columns.values(), "more"])
                for place, groups in enumerate(found):
                    cell = fill_pattern(table.match, {"rest": "x-1.jpg", **groups})
                    known = [
                        next(iter(table.values.get(ours, {str(place % 2): ""}))) for ours in table.columns
                    ]
                    writer.writerow([cell, *known, ""])
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_that_is_laid_out_as_the_recipe_says_is_found(name, tmp_path):
    recipe = load_recipe(name)
    folder = lay_out(recipe, tmp_path / "set")
    report = check_dataset(recipe, folder)
    expected = sum(len(images_of(recipe, part)) for part in recipe.parts)
    assert len(report.layout.images) == expected
    counted = [
        problem
        for problem in report.problems
        if "the set has" in problem.what or "that of the set" in problem.what
    ]
    assert report.problems == counted  # large parts are too small here, nothing else is wrong
    assert bool(counted) == any((part.count or 0) > 45 for part in recipe.parts)
    out = tmp_path / "labels.csv"
    num_copied = write_labels(report, out)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == expected
    assert all((folder / row["filename"]).is_file() for row in rows)
    assert num_copied == {"drive": 100, "stare": 60, "les-av": 22}.get(name, 0)
    if recipe.kind == "masks" and "split" in rows[0]:
        assert {pair.is_test for pair in read_masked(folder, out)} == {True, False}
    if name in ("oct2017", "hrf"):
        assert len(read_labeled(folder, out).paths) == expected


def test_facts_are_shown_and_not_checked(tmp_path):
    with pytest.raises(ConfigError, match="holds facts"):
        check_dataset(load_recipe("frepa-pretraining"), tmp_path)
    shown = frepa("datasets", "show", "frepa-pretraining").stdout
    assert "not established" in shown
    listed = frepa("datasets", "list").stdout
    assert all(name in listed for name in recipe_names())


def test_what_is_missing_or_torn_is_named_with_a_way_to_mend_it(tmp_path):
    recipe = load_recipe("chasedb1")
    folder = lay_out(recipe, tmp_path / "set")
    (folder / "Image_01L_2ndHO.png").unlink()
    Image.new("L", (8, 8)).save(folder / "Image_02R_1stHO.png")
    (folder / "Image_12L.jpg").write_bytes(b"\xff\xd8 torn")
    (folder / "Image_13R.jpg").unlink()
    ended = frepa("datasets", "check", "chasedb1", folder, "--deep")
    assert ended.returncode == 3
    for text in (
        "first 20: 1 files of mask2 are missing: Image_01L_2ndHO.png",
        "Image_02R_1stHO.png: 8 x 8, its image Image_02R.jpg has 72 x 64",
        "Image_12L.jpg",
        "last 8: 7 images, the set has 8",
        "to mend it",
    ):
        assert text in ended.stdout


def test_tables_are_compared_with_the_images(tmp_path):
    recipe = load_recipe("idrid")
    folder = lay_out(recipe, tmp_path / "set")
    table = folder / recipe.parts[0].labels[0].path
    text = table.read_text().replace("\n1,", "\n777,")
    table.write_text(text)
    (folder / recipe.parts[1].labels[0].path).write_text("Image,grade\n")
    said = "\n".join(check_dataset(recipe, folder).lines())
    assert "1 rows name no image: 777" in said
    assert "1 images are in no table" in said
    assert "has no column Image name" in said


def test_a_folder_too_high_is_guessed(tmp_path):
    lay_out(load_recipe("stare"), tmp_path / "set" / "STARE" / "data")
    problems = check_dataset(load_recipe("stare"), tmp_path / "set").problems
    assert f"name the folder {tmp_path / 'set' / 'STARE' / 'data'}" in problems[0].fix
    with pytest.raises(DataError, match="no such folder"):
        check_dataset(load_recipe("stare"), tmp_path / "nowhere")


def test_generic_recipes(tmp_path):
    rng = np.random.default_rng(0)
    for place in ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"):
        draw(tmp_path / "classes" / place, rng)
    report = check_dataset(load_recipe("class-folders"), tmp_path / "classes", deep=True)
    assert report.problems == []
    assert [found.columns["split"] for found in report.layout.images].count("test") == 2
    for number in range(3):
        draw(tmp_path / "masks" / "images" / f"{number}.png", rng)
        draw(tmp_path / "masks" / "masks" / f"{number}.png", rng, grey=True)
    assert check_dataset(load_recipe("image-masks"), tmp_path / "masks").problems == []
    (tmp_path / "masks" / "labels.csv").write_text(
        "filename,mask,note\nimages/0.png,masks/0.png,x\nimages/9.png,,\n"
    )
    report = check_dataset(load_recipe("table"), tmp_path / "masks")
    assert [found.files["mask"] for found in report.layout.images] == ["masks/0.png"]
    assert [problem.what for problem in report.problems] == ["labels.csv: 1 rows name no image: images/9.png"]
    for name in ("images/v.nii.gz", "masks/v.nii.gz"):
        draw(tmp_path / "volumes" / name, rng)
    assert check_dataset(load_recipe("volumes"), tmp_path / "volumes", deep=True).problems == []


@pytest.mark.parametrize("name", ["drive", "chasedb1", "hrf"])
@pytest.mark.real_data
def test_the_rearranged_real_copies_are_whole(name, real_data):
    report = check_dataset(load_recipe("table"), real_data / "fundus" / name)
    assert report.problems == []
    assert len(report.layout.images) == sum(part.count for part in load_recipe(name).parts)


def test_a_recipe_that_contradicts_itself_is_refused(tmp_path):
    part = {"name": "all", "images": "{id}.png", "mask": "{other}.png"}
    with pytest.raises(ValueError, match=r"names \{other\}"):
        Recipe(
            name="own",
            title="",
            modality="fundus",
            kind="masks",
            tasks=[],
            get="",
            source=["x"],
            verified=False,
            parts=[part],
        )
    with pytest.raises(ConfigError, match="chasedb1"):
        load_recipe("chase-db1")
