"""The report's pictures: both students are shown the same, figures belong to pictures, tokens are marked."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from frepa_dist.config import RunConfig
from frepa_dist.evaluate import report_pictures
from frepa_dist.evaluate.reconstruct import run_reconstruct
from frepa_dist.evaluate.report import build_report
from frepa_dist.evaluate.report_pictures import choose_views, list_rows, mark_tokens, shrink
from frepa_dist.methods.base import Preview
from frepa_dist.methods.mae import Mae
from frepa_dist.methods.registry import METHODS, create_method
from frepa_dist.runs import build_student, load_run_config, load_student
from frepa_dist.train import submodules
from frepa_dist.train.engines import World
from shards.builder.build import BuildConfig, build_dataset
from shards.support.settings import dump_yaml


@pytest.fixture(autouse=True)
def _two_pictures(monkeypatch):
    """Figures take their time."""
    monkeypatch.setattr(report_pictures, "NUM_PICTURES", 2)


class Dimmer(torch.nn.Module):
    """A student that gives its input times a number back."""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))


class TwoWays(Mae):
    """A method that hides all pixels, or the left half."""

    @classmethod
    def previews(cls, student, images, config, draw_keys):
        everything = torch.ones_like(images[:, :1], dtype=torch.bool)
        left = everything.clone()
        left[..., images.shape[-1] // 2 :] = False
        return [
            Preview("dark", images * 0.5, images * student.factor, everything),
            Preview("half", images * ~left, torch.where(left, 0.0, images), left, "a remark"),
        ]


def test_figures_belong_to_their_pictures(run_dir, monkeypatch):
    monkeypatch.setitem(METHODS, "mae", TwoWays)
    config = load_run_config(run_dir)
    views = choose_views(config)
    rows = list_rows(Dimmer(0.25), Dimmer(0.75), config, views)
    assert [row.corruption for row in rows] == ["dark", "half"] * len(views)
    for (_, view), row in zip(views, rows[::2], strict=True):
        original = view.image.transpose(1, 2, 0)
        np.testing.assert_array_equal(row.original, original)
        np.testing.assert_allclose(row.seen.astype(float), original * 0.5, atol=0.51)
        np.testing.assert_allclose(row.before.picture.astype(float), original * 0.25, atol=0.51)
        assert row.before.error == pytest.approx(original.mean() / 255 * 0.75, rel=1e-4)
        assert row.after.error == pytest.approx(original.mean() / 255 * 0.25, rel=1e-4)
        assert row.after.high_band == pytest.approx(0.25, rel=1e-3)
        assert row.before.power_kept == pytest.approx(0.0625, rel=1e-3)
        np.testing.assert_allclose(row.after.spectrum, row.spectrum * 0.75**2, rtol=1e-3)
    for (_, view), row in zip(views, rows[1::2], strict=True):
        assert row.after.error == pytest.approx(view.image[:, :, :32].mean() / 255, rel=1e-4)
        assert row.note == "a remark"


def test_a_method_of_several_corruptions_is_shown_with_its_notes(run_dir, monkeypatch):
    monkeypatch.setitem(METHODS, "mae", TwoWays)
    monkeypatch.setattr(report_pictures, "load_student", lambda run: (Dimmer(0.75), None, 12))
    monkeypatch.setattr(report_pictures, "build_student", lambda config: Dimmer(0.25))
    build_report(run_dir, run_dir / "report.html")
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert text.count('alt="dark"') == text.count('alt="half"') == 2
    assert text.count("<p>a remark</p>") == 1
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert cells[cells.index("dark") + 1] == "2"
    assert cells[cells.index("dark") + 3] == "0.750 → 0.250"


def test_a_method_without_previews_says_so(run_dir, monkeypatch):
    monkeypatch.setattr(TwoWays, "previews", classmethod(lambda cls, *arguments: []))
    monkeypatch.setitem(METHODS, "mae", TwoWays)
    build_report(run_dir, run_dir / "report.html")
    assert "The method mae shows no reconstructions." in (run_dir / "report.html").read_text()


def test_every_modality_is_shown(run_dir, tmp_path):
    config = load_run_config(run_dir)
    root = tmp_path / "many"
    shutil.copytree(config.data.root, root)
    rng = np.random.default_rng(0)
    for modality in ("oct", "xray"):
        folder = tmp_path / modality
        folder.mkdir()
        for number in range(2):
            coarse = Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8))
            coarse.resize((90, 72)).save(folder / f"{number}.png")
        build_dataset([folder], root, BuildConfig(modality=modality, size=72, jobs=1))
    data = config.data.model_copy(update={"root": str(root), "snapshot": None})
    views = choose_views(config.model_copy(update={"data": data}))
    assert [modality for modality, _ in views] == ["histopathology", "oct", "xray"]


class Engineless:
    """What takes the place of the student's engine: it keeps the network as the loop built it."""

    def __init__(self, module, *settings):
        self.module = self.call = module


def test_before_is_the_student_that_training_starts_with(run_dir, monkeypatch):
    config = load_run_config(run_dir)
    state = torch.get_rng_state()
    student = build_student(config)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(submodules, "EngineSubmodule", Engineless)
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    built = submodules.Submodules(create_method(config.method), config.train, 1, world).student.module
    for (name, ours), theirs in zip(student.state_dict().items(), built.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    trained, _, _ = load_student(run_dir)
    assert not torch.equal(trained.norm.bias, student.norm.bias)


def test_before_takes_the_weights_that_training_started_from(run_dir, small_weights, tmp_path):
    path = tmp_path / "init.safetensors"
    save_file(small_weights, path)
    text = (run_dir / "config.yaml").read_text()
    assert "init: null" in text
    (run_dir / "config.yaml").write_text(text.replace("init: null", f"init: {path}"))
    build_report(run_dir, run_dir / "report.html")
    page = (run_dir / "report.html").read_text()
    before, after = (re.findall(rf'alt="{side}: error ([^"]*)"', page) for side in ("before", "after"))
    assert before == after
    assert len(before) == 2
    path.unlink()
    build_report(run_dir, run_dir / "report.html")
    assert "random weights, for those it started from cannot be read" in (run_dir / "report.html").read_text()


@pytest.fixture
def frepa_run(run_dir):
    """The run as one of Frepa on a hierarchical backbone, whose cells have 32 pixels."""
    config = load_run_config(run_dir)
    method = {"name": "frepa", "model": {"backbone": "convnext_twin", "image_size": 64}}
    changed = RunConfig.model_validate({**config.model_dump(mode="json"), "method": method})
    (run_dir / "config.yaml").write_text(dump_yaml(changed.model_dump(mode="json")))
    torch.manual_seed(7)
    student = METHODS["frepa"].create_student(changed.method)
    save_file(student.state_dict(), run_dir / "checkpoints" / "step-00000012" / "student.safetensors")
    return run_dir


def test_a_frepa_run_on_a_hierarchical_backbone(frepa_run):
    build_report(frepa_run, frepa_run / "report.html")
    text = (frepa_run / "report.html").read_text(encoding="utf-8")
    assert "convnext_twin, 32-pixel cells, 64-pixel views" in text
    assert text.count('alt="histogram"') == text.count('alt="frequency"') == 2
    assert "The 25% of the 32-pixel cells" in text
    assert "normalized one by one" not in text
    before, after = (re.findall(rf'alt="{side}: error ([^"]*)"', text) for side in ("before", "after"))
    assert len(before) == len(after) == 4
    assert before != after


def test_a_frepa_run_is_measured_under_its_own_and_the_common_corruptions(frepa_run):
    result = run_reconstruct(frepa_run, load_run_config(frepa_run).data.root, num=3, device="cpu")
    assert [(row.corruption, row.common) for row in result.rows] == [
        ("histogram", False),
        ("frequency", False),
        ("75% of 16-pixel patches hidden", True),
        ("below 16 cycles removed", True),
    ]
    assert not any(row.note for row in result.rows)


def test_large_pictures_are_averaged_down():
    picture = np.zeros((768, 768, 3), np.uint8)
    picture[::2] = 200
    assert (shrink(picture) == 100).all()
    assert shrink(picture).shape == (384, 384, 3)
    assert shrink(picture[:64, :64]).shape == (64, 64, 3)


def test_marked_tokens_keep_their_inside_and_others_are_dimmed():
    image = np.full((64, 64, 3), 200, np.uint8)
    drawn = mark_tokens(image, np.array([5]), 16)
    assert (drawn[18:30, 18:30] == 200).all()
    assert (drawn[16, 16:32] == (255, 196, 0)).all()
    drawn[16:32, 16:32] = 90
    assert (drawn == 90).all()
