from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from frepa_dist.config import RunConfig
from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.draws import SampleDraws
from frepa_dist.losses import gradient_l1, hierarchical_frequency_loss, rmse
from frepa_dist.methods.adversaries import EmbeddingAdversaryConfig, ImageAdversaryConfig
from frepa_dist.methods.base import StepInfo
from frepa_dist.methods.frepa import TERMS, ConsistencyConfig, Frepa, FrepaConfig, consistency_loss
from frepa_dist.methods.mine_term import HmiConfig
from frepa_dist.methods.registry import create_method
from frepa_dist.methods.whole_image import clean_images
from frepa_dist.models.backbones import BackboneSettings
from frepa_dist.normalization import min_max_scale, standardize
from shards.support.errors import ConfigError
from shards.support.settings import validate
from tests.frepa_dist.methods.steps import LATE, NUM_SAMPLES, ThreadComm, build_nets, make_batch, run_step

SIZE = 64


def settings(backbone="vit_pico", **more):
    return BackboneSettings(backbone=backbone, image_size=SIZE, neck_width=16, **more)


def everything(backbone="vit_pico", **changes):
    """Every term on, each heavy enough to be seen in the gradients."""
    terms = {
        "consistency": ConsistencyConfig(weight=1.0),
        "adversarial_image": ImageAdversaryConfig(weight=1.0, width=8, num_layers=2, r1=0.1),
        "adversarial_embedding": EmbeddingAdversaryConfig(weight=1.0, hidden=16),
        "hmi": HmiConfig(weight=1.0, negatives=3, hidden=16),
    }
    return FrepaConfig(model=settings(backbone), **(terms | changes))


def batch_for(backbone="vit_pico"):
    return make_batch(SIZE, 16 if backbone.startswith("vit") else 4)


def one_step(config, info=LATE, backbone="vit_pico"):
    return run_step(config, build_nets(config), batch_for(backbone), info=info)


@pytest.mark.parametrize("backbone", ["vit_pico", "swinv2_pico", "convnext_twin"])
def test_nothing_depends_on_how_the_global_batch_is_cut(backbone):
    config, batch = everything(backbone), batch_for(backbone)
    nets = build_nets(config)
    whole = run_step(config, nets, batch)
    networks = {"student", "image_discriminator", "embedding_discriminator", "teacher_critic"}
    assert {name.split(".")[0] for name in whole.gradients} == networks
    assert whole.terms.keys() - {"hinge", "r1", "class"} == set(TERMS) - {"focal"}
    for world_size, accumulation in ((2, 2), (1, 2)) if backbone == "vit_pico" else ((2, 1),):
        parts = run_step(config, nets, batch, world_size, accumulation)
        for name in ("gradients", "terms", "state"):
            ours, theirs = getattr(parts, name), getattr(whole, name)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(
                    ours[key], value, rtol=2e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
                )


def test_a_root_over_the_batch_does_depend_on_it():
    """The authors' way, and the proof that the comparison above would notice."""
    config = FrepaConfig.model_validate({"model": settings(), "rec": {"per": "batch"}})
    nets, batch = build_nets(config), batch_for()
    batch["image"][:4] = 77
    whole, parts = run_step(config, nets, batch), run_step(config, nets, batch, 1, 4)
    assert abs(whole.terms["rec"] - parts.terms["rec"]) > 1e-5


def test_the_terms_compare_with_the_clean_image():
    """Written out: min-max, corruption, normalization, student, losses."""
    config, batch = FrepaConfig(model=settings()), batch_for()
    nets = build_nets(config)
    clean = batch["image"].float() / 255
    low, high = clean.flatten(1).amin(1), clean.flatten(1).amax(1)
    clean = (clean - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1)
    corrupted = corrupt(clean, SampleDraws(batch["draw_key"], "cpu"), config.corruption)
    model = config.model
    output = nets["student"](standardize(corrupted.images, model.mean, model.std))
    losses = create_method(config).losses(nets, batch, {}, {}, LATE, ThreadComm(1))
    assert losses.weights == {"rec": 1.0, "gradient": 1.0, "hfl": 0.2}
    expected = {
        "rec": rmse(output.prediction, clean),
        "gradient": gradient_l1(output.prediction, clean),
        "hfl": hierarchical_frequency_loss(output.prediction, clean),
    }
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses.terms[name], value, msg=name)
    shares = {f"corruption/{k}": corrupted.kind.count(k) / NUM_SAMPLES for k in ("histogram", "frequency")}
    assert {name: float(value) for name, value in losses.metrics.items()} == shares


def test_images_are_scaled_one_by_one_and_flat_ones_are_safe():
    batch = batch_for()
    batch["image"][3] = 77
    images = clean_images(batch, settings())
    others = [number for number in range(NUM_SAMPLES) if number != 3]
    assert torch.equal(images[others].flatten(1).amin(1), torch.zeros(7))
    torch.testing.assert_close(images[others].flatten(1).amax(1), torch.ones(7))
    assert not images[3].any()
    torch.testing.assert_close(clean_images(batch, settings(min_max=False)), batch["image"].float() / 255)
    assert torch.equal(min_max_scale(images), images)


def test_a_flat_image_trains():
    config, batch = everything(), batch_for()
    batch["image"][:] = 77
    step = run_step(config, build_nets(config), batch)
    assert all(value.isfinite().all() for value in [*step.gradients.values(), *step.terms.values()])


def test_only_the_terms_of_the_step_are_computed():
    early = StepInfo(step=5, total_steps=100, seed=7)
    config = everything()
    nets = build_nets(config)
    alone = {"student": nets["student"]}  # the others are not even called
    losses = create_method(config).losses(alone, batch_for(), {}, {}, early, ThreadComm(1))
    assert set(losses.terms) == {"rec", "gradient", "hfl", "consistency"}
    assert losses.outputs == {}
    assert create_method(config).targets(alone, batch_for(), early) == {}
    assert create_method(config).opponent_losses("image_discriminator", {}, {}, early) is None
    foot = StepInfo(step=10, total_steps=100, seed=7)  # here the discriminators begin, their terms do not yet
    step = run_step(config, nets, batch_for(), info=foot)
    assert not {"adversarial_image", "adversarial_embedding", "hmi"} & set(step.terms)
    assert {"hinge", "r1", "class"} <= set(step.terms)
    assert set(step.state) == set(create_method(config).state_dict())


@pytest.mark.parametrize("term", ["rec", "gradient", "hfl", "consistency"])
@pytest.mark.parametrize("off", [None, {"weight": 0}])
def test_a_term_that_is_off_is_not_computed(term, off):
    terms = {"consistency": {}, term: off}
    config = FrepaConfig.model_validate({"model": settings(), **terms})
    losses = create_method(config).losses(build_nets(config), batch_for(), {}, {}, LATE, ThreadComm(1))
    assert set(losses.terms) == {"rec", "gradient", "hfl", "consistency"} - {term}


def test_a_weight_of_0_builds_no_network():
    off = {"weight": 0}
    config = FrepaConfig.model_validate(
        {"model": settings(), "adversarial_image": off, "adversarial_embedding": off, "hmi": off}
    )
    method = create_method(config)
    assert set(method.submodules()) == {"student"}
    assert method.state_dict() == {}


def test_consistency_compares_two_corruptions_and_decodes_one():
    config, batch = FrepaConfig(model=settings(), consistency=ConsistencyConfig()), batch_for()
    nets, seen = build_nets(config), []

    def spy(images, num_decoded=None):
        seen.append((images, num_decoded, nets["student"](images, num_decoded=num_decoded)))
        return seen[-1][2]

    losses = create_method(config).losses({"student": spy}, batch, {}, {}, LATE, ThreadComm(1))
    (images, num_decoded, output) = seen[0]
    assert (len(images), num_decoded, len(output.prediction)) == (2 * NUM_SAMPLES, NUM_SAMPLES, NUM_SAMPLES)
    assert not torch.equal(images[:NUM_SAMPLES], images[NUM_SAMPLES:])
    first, second = output.embedding[:NUM_SAMPLES], output.embedding[NUM_SAMPLES:]
    cosine = (functional.normalize(first, dim=1) * functional.normalize(second, dim=1)).sum(1)
    torch.testing.assert_close(losses.terms["consistency"], 1 - cosine.mean())
    same = torch.cat([first, 3 * first]).detach()
    assert float(consistency_loss(same)) == pytest.approx(0, abs=1e-5)


def test_the_teacher_sees_the_hf_tokens_of_the_clean_image_alone():
    for backbone, side in (("vit_pico", 16), ("convnext_twin", 32)):
        config, batch = everything(backbone), batch_for(backbone)
        nets, method = build_nets(config), create_method(config)
        cells = SIZE // side
        kept = torch.zeros(NUM_SAMPLES, cells * cells).scatter_(1, batch["hf_indices"], 1.0)
        visible = functional.interpolate(kept.view(-1, 1, cells, cells), scale_factor=float(side)).bool()
        # the smallest and the largest value are in the first cell kept, so that the scale does not change
        for image, cell in zip(batch["image"], batch["hf_indices"][:, 0].tolist(), strict=True):
            row, column = cell // cells * side, cell % cells * side
            image[:, row, column], image[:, row, column + 1] = 0, 255
        before = method.targets(nets, batch, LATE)["teacher"]
        assert before.shape == (NUM_SAMPLES, nets["student"].width)
        assert not before.requires_grad
        changed = {**batch, "image": torch.where(visible, batch["image"], 99)}
        torch.testing.assert_close(method.targets(nets, changed, LATE)["teacher"], before)
        moved = {**batch, "image": torch.where(visible, 255 - batch["image"], batch["image"])}
        assert not torch.allclose(method.targets(nets, moved, LATE)["teacher"], before, atol=1e-3)


def test_z_is_the_mean_over_the_corrupted_image(monkeypatch):
    from frepa_dist.methods import mine_term

    config, batch, seen = everything(), batch_for(), []
    nets, method, real = build_nets(config), create_method(config), mine_term.mine_loss

    def spy(estimator, critic, pairs, *args, **kwargs):
        seen.append(pairs)
        return real(estimator, critic, pairs, *args, **kwargs)

    monkeypatch.setattr(mine_term, "mine_loss", spy)
    targets = method.targets(nets, batch, LATE)
    method.losses(nets, batch, targets, targets, LATE, ThreadComm(1))
    clean = clean_images(batch, config.model)
    corrupted = corrupt(clean, SampleDraws(batch["draw_key"], "cpu"), config.corruption).images
    normalized = standardize(corrupted, config.model.mean, config.model.std)
    torch.testing.assert_close(seen[0].z, nets["student"].embed(normalized))


def test_the_guard_scales_the_terms_and_its_state_goes_round():
    config, batch = everything(hmi=None), batch_for()
    nets = build_nets(config)
    plain = run_step(config, nets, batch)
    method = create_method(config)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    for name in state:
        if name.endswith("multiplier"):
            state[name] = torch.tensor(0.25)
    method.load_state_dict(state)
    torch.testing.assert_close(method.state_dict(), state)
    lowered = run_step(config, nets, batch, state=state)
    for term in ("adversarial_image", "adversarial_embedding"):
        assert float(plain.metrics[f"{term}/multiplier"]) == 1
        assert float(lowered.metrics[f"{term}/multiplier"]) == 0.25
        torch.testing.assert_close(lowered.terms[term], 0.25 * plain.terms[term])
        assert float(plain.state[f"{term}.updates"]) == 1
    with pytest.raises(ValueError, match="expected"):
        method.load_state_dict({"other": torch.tensor(1.5)})


def test_discriminators_are_given_what_the_student_made_of_which_corruption():
    config, batch = everything(hmi=None), batch_for()
    method = create_method(config)
    outputs = method.losses(build_nets(config), batch, {}, {}, LATE, ThreadComm(1)).outputs
    clean = clean_images(batch, config.model)
    draws = SampleDraws(batch["draw_key"], "cpu")
    kinds = [kind for view in range(2) for kind in corrupt(clean, draws, config.corruption, view=view).kind]
    assert outputs["kinds"].tolist() == [list(config.corruption.kinds).index(kind) for kind in kinds]
    assert len(outputs["embedding"]) == 2 * NUM_SAMPLES
    assert len(outputs["prediction"]) == NUM_SAMPLES
    assert torch.equal(outputs["target"], clean)


def test_discriminators_learn_what_they_are_asked():
    """On one batch each gets it right; the student is not touched by them."""
    config, batch = everything(hmi=None), batch_for()
    nets, method = build_nets(config), create_method(config)
    losses = method.losses(nets, batch, {}, {}, LATE, ThreadComm(1))
    first, last = {}, {}
    for name in ("image_discriminator", "embedding_discriminator"):
        optimizer = torch.optim.Adam(nets[name].parameters(), lr=3e-3)
        for number in range(40):
            optimizer.zero_grad()
            asked = method.opponent_losses(name, nets, losses.outputs, LATE)
            asked.total.backward()
            optimizer.step()
            (last if number else first)[name] = asked
            nets[name].after_step()
        assert last[name].total.item() < 0.7 * first[name].total.item()
    accuracy = last["embedding_discriminator"].metrics["embedding_discriminator/accuracy"]
    assert float(accuracy) > 0.9
    for side in ("real", "fake"):
        assert float(last["image_discriminator"].metrics[f"adversarial_image/accuracy_{side}"]) > 0.7
    assert all(p.grad is None for p in nets["student"].parameters())


def test_hiding_the_corruption_lowers_the_discriminators_accuracy():
    config, batch = everything(hmi=None, adversarial_image=None, consistency=None), batch_for()
    config = config.model_copy(update={"rec": None, "gradient": None, "hfl": None})
    nets, method = build_nets(config), create_method(config)
    discriminator = nets["embedding_discriminator"]
    outputs = method.losses(nets, batch, {}, {}, LATE, ThreadComm(1)).outputs
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        method.opponent_losses("embedding_discriminator", nets, outputs, LATE).total.backward()
        optimizer.step()
        discriminator.after_step()
    discriminator.requires_grad_(False)
    optimizer = torch.optim.Adam(nets["student"].parameters(), lr=1e-3)
    terms = []
    for _ in range(15):
        optimizer.zero_grad()
        losses = method.losses(nets, batch, {}, {}, LATE, ThreadComm(1))
        losses.total.backward()
        optimizer.step()
        terms.append(losses.terms["adversarial_embedding"].item())
    assert terms[-1] < 0.5 * terms[0]


def test_previews_show_every_kind_of_the_config():
    kinds = {"histogram": 0.5, "frequency": 0.3, "zero": 0.2, "low_pass": 0.0}
    config = FrepaConfig(model=settings(), corruption=CorruptionConfig(kinds=kinds))
    student = Frepa.create_student(config).eval()
    images = min_max_scale(batch_for()["image"].float() / 255)[:3]
    previews = Frepa.previews(student, images, config, [5, 6, 7])
    assert [p.name for p in previews] == ["histogram", "frequency", "zero"]
    for preview in previews:
        for shown in (preview.seen, preview.predicted):
            assert shown.shape == images.shape
            assert not shown.requires_grad
            assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
        assert preview.hidden.shape == (3, 1, SIZE, SIZE)
        assert preview.hidden.dtype == torch.bool
    frequency, zero = previews[1], previews[2]
    assert frequency.hidden.all()
    assert 0 < zero.hidden.float().mean() < 1
    assert not (zero.seen * zero.hidden).any()
    again = Frepa.previews(student, images[1:2], config, [6])
    torch.testing.assert_close(again[0].seen, previews[0].seen[1:2])
    restored = Frepa.restore(student, zero.seen, config)
    torch.testing.assert_close(restored, zero.predicted)


def test_a_student_starts_from_a_checkpoint(tmp_path):
    from safetensors.torch import save_file

    config = FrepaConfig(model=settings())
    start = Frepa.create_student(config)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    given = FrepaConfig(model=settings(init=tmp_path / "start.safetensors"))
    student = create_method(given).submodules()["student"].build()
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"rec": None, "gradient": None, "hfl": None}, "'rec', 'gradient', 'hfl' and 'focal'"),
        ({"rec": {"warmup_fraction": 0.1}, "gradient": None, "hfl": None}, "in every step"),
        ({"adversarial_embedding": {}, "corruption": {"kinds": {"histogram": 1}}}, "two kinds"),
        ({"hmi": {}, "model": {"backbone": "swin_base", "input_channel": "frangi"}}, "edges"),
        ({"model": {"backbone": "vit_tiny", "image_size": 32}}, "nothing to choose from"),
        ({"model": {"backbone": "vit_bass"}}, "no such backbone"),
        ({"model": {"image_size": 100}}, "image_size 100"),
        ({"consistency": {"weights": 1}}, "weights"),
    ],
)
def test_configs_that_cannot_be(method, words):
    data = {
        "output": "run",
        "data": {"root": "data"},
        "train": {"steps": 1},
        "method": {"name": "frepa"} | method,
    }
    with pytest.raises(ConfigError, match=words):
        validate(RunConfig, data, where="test")
