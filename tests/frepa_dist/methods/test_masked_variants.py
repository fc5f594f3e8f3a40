"""Variants of MAE and RetMAE: HF input, PixMIM's target, hierarchical backbones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from frepa_dist.config import RunConfig
from frepa_dist.methods.mae import MaeConfig, create_model, create_student
from frepa_dist.methods.registry import create_method
from frepa_dist.methods.retmae import RetMaeConfig
from frepa_dist.models.masked_backbone import MaskedBackbone, show_cells
from frepa_dist.models.masked_settings import ModelConfig
from frepa_dist.models.vit_mae import create_vit_mae
from shards.support.errors import ConfigError
from shards.support.settings import dump_yaml, load_settings, validate
from tests.frepa_dist.methods.steps import LATE, ThreadComm, build_nets, make_batch, run_step

VIT = {"size": "tiny", "image_size": 64}
HMI = {"weight": 1.0, "negatives": 3, "hidden": 16}
BACKBONES = ["swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]
VARIANTS = {
    "mae, HF input": {"name": "mae", "model": VIT, "hf_input": True},
    "retmae, HF input": {"name": "retmae", "model": VIT, "hf_input": True, "hmi": HMI},
    "retmae, Frangi input": {
        "name": "retmae",
        "model": VIT,
        "hf_input": True,
        "input_channel": {"kind": "frangi", "scales": [0.02]},
        "hmi": HMI,
    },
    "PixMIM": {"name": "mae", "model": VIT, "target_low_pass_cycles": 12},
}
for backbone in BACKBONES:
    shape = {"backbone": backbone, "image_size": 128}
    VARIANTS[f"mae, {backbone}"] = {"name": "mae", "model": shape}
    VARIANTS[f"retmae, {backbone}"] = {"name": "retmae", "model": shape, "hmi": HMI}


def config_of(method):
    data = {"output": "run", "data": {"root": "data"}, "train": {"steps": 1}, "method": method}
    return validate(RunConfig, data, where="test").method


def batch_for(config):
    return make_batch(config.model.image_size, config.model.num_patches)


@pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
def test_a_few_steps_teach_something(method):
    config = config_of(method)
    nets, batch = build_nets(config), batch_for(config)
    before, losses = {k: v.clone() for k, v in nets["student"].state_dict().items()}, []
    optimizer = torch.optim.AdamW(nets["student"].parameters(), lr=1e-3)
    for _ in range(4):
        step = run_step(config, nets, batch)
        losses.append(float(step.terms["rec"]))
        for name, parameter in nets["student"].named_parameters():
            parameter.grad = step.gradients.get(f"student.{name}")
        optimizer.step()
        with torch.no_grad():
            student = nets["student"].state_dict()
            for name, value in nets["teacher"].state_dict().items() if "teacher" in nets else ():
                if value.is_floating_point():
                    value.lerp_(student[name], 0.5)
    assert losses[3] < 0.98 * losses[0]  # Adam's first step may overshoot
    assert set(step.terms) == ({"rec", "hmi"} if method["name"] == "retmae" else {"rec"})
    student = nets["student"]
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "variant", ["retmae, HF input", "PixMIM", "retmae, swinv2_pico", "retmae, convnextv2_twin"]
)
def test_gradients_do_not_depend_on_how_the_global_batch_is_cut(variant):
    config = config_of(VARIANTS[variant])
    nets, batch = build_nets(config), batch_for(config)
    whole = run_step(config, nets, batch)
    for world_size, accumulation in ((1, 4), (2, 2)):
        cut = run_step(config, nets, batch, world_size, accumulation)
        assert cut.gradients.keys() == whole.gradients.keys()
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(cut.gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("backbone", ["swin_pico", "convnext_twin"])
def test_the_teacher_of_a_backbone_sees_the_hf_cells_alone(backbone):
    config = config_of(VARIANTS[f"retmae, {backbone}"])
    nets, batch, method = build_nets(config), batch_for(config), create_method(config)
    before = method.targets(nets, batch, LATE)["teacher"]
    assert before.shape == (8, nets["student"].width)
    shown = show_cells(torch.full(batch["image"].shape, 9.0), batch["hf_indices"], 32) == 9
    assert shown.float().mean() == 0.25
    changed = {**batch, "image": torch.where(shown, batch["image"], 200).to(torch.uint8)}
    assert torch.equal(method.targets(nets, changed, LATE)["teacher"], before)
    other = {**batch, "hf_indices": (batch["hf_indices"] + 1) % 16}
    assert not torch.allclose(method.targets(nets, other, LATE)["teacher"], before, atol=1e-3)


def test_the_hf_input_is_computed_from_the_view_by_student_and_teacher():
    config = config_of(VARIANTS["retmae, HF input"])
    nets, batch = build_nets(config), batch_for(config)
    assert nets["student"].input_channel == nets["teacher"].input_channel == config.input_channel
    assert nets["teacher"].patch_embed.proj.weight.shape[1] == 4
    plain = config_of({**VARIANTS["retmae, HF input"], "hf_input": False})
    assert create_model(plain).patch_embed.proj.weight.shape[1] == 3
    embedding = nets["student"].embed(torch.randn(2, 3, 64, 64))
    assert embedding.shape == (2, 192)
    targets = create_method(config).targets(nets, batch, LATE)
    assert targets["teacher"].isfinite().all()


def test_hf_masking_hides_cells_of_a_backbone():
    config = MaeConfig(model=ModelConfig(backbone="convnext_twin", image_size=128), hf_masking=True)
    nets, batch = build_nets(config), batch_for(config)
    seen = []
    nets["student"].register_forward_hook(lambda module, args, output: seen.append(output.mask))
    create_method(config).losses(nets, batch, {}, {}, LATE, ThreadComm(1))
    assert seen[0].gather(1, batch["hf_indices"]).all()


def test_previews_of_variants_are_the_image_where_nothing_was_hidden():
    images = make_batch(128)["image"][:2] / 255
    for variant in ("mae, convnext_twin", "PixMIM", "mae, HF input"):
        config = config_of(VARIANTS[variant])
        method = type(create_method(config))
        own = images[:, :, : config.model.image_size, : config.model.image_size]
        (preview,) = method.previews(create_model(config).eval(), own, config, [3, 4])
        assert preview.hidden.float().mean() == 0.75
        shown = ~preview.hidden.expand_as(own)
        assert torch.equal(preview.predicted[shown], own[shown])


def test_a_backbones_cells_are_the_positions_of_its_map(tmp_path):
    model = ModelConfig(backbone="swin_tiny", image_size=224)
    assert (model.patch_size, model.num_patches) == (32, 49)
    (tmp_path / "model.yaml").write_text(dump_yaml(model.model_dump(mode="json")))
    assert load_settings(ModelConfig, tmp_path / "model.yaml") == model
    assert ModelConfig().patch_size == 16


def test_a_backbone_starts_from_a_file(tmp_path):
    start = create_model(config_of(VARIANTS["mae, convnext_twin"]))
    assert isinstance(start, MaskedBackbone)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    model = {**VARIANTS["mae, convnext_twin"]["model"], "init": str(tmp_path / "start.safetensors")}
    student = create_student(config_of({"name": "mae", "model": model}))
    assert all(torch.equal(value, start.state_dict()[key]) for key, value in student.state_dict().items())


def test_hf_input_starts_from_a_checkpoint_without_it(tmp_path):
    start = create_vit_mae("tiny", image_size=64)
    save_file(start.state_dict(), tmp_path / "mae.safetensors")
    model = {**VIT, "init": str(tmp_path / "mae.safetensors")}
    student = create_student(config_of({"name": "mae", "model": model, "hf_input": True}))
    assert torch.equal(student.patch_embed.proj.weight[:, :3], start.patch_embed.proj.weight)
    assert not student.patch_embed.proj.weight[:, 3].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"backbone": "vgg"}}, "no such backbone; allowed: swin_tiny"),
        ({"model": {"backbone": "vit_base"}}, "chosen by `size`"),
        ({"model": {"backbone": "convnext_tiny", "image_size": 100}}, "image_size 100 does not fit"),
        ({"model": {"backbone": "convnext_tiny", "patch_size": 16}}, "has 32 pixels"),
        ({"model": {"backbone": "convnext_tiny", "image_size": 32}}, "keeps 0 of 1 tokens"),
        ({"model": {"backbone": "convnext_tiny", "image_size": 64}, "mask_ratio": 0.8}, "keeps 0 of 4"),
        ({"model": {"backbone": "convnext_tiny"}, "hf_input": True}, "edges"),
        ({"target_low_pass_cycles": 0}, "target_low_pass_cycles"),
        ({"hf_input": True, "input_channel": {"kind": "sobel"}}, "kind"),
    ],
)
@pytest.mark.parametrize("name", ["mae", "retmae"])
def test_settings_that_cannot_be(name, settings, words):
    with pytest.raises(ConfigError, match=words):
        config_of({"name": name, **settings})


def test_too_few_cells_for_the_hf_tokens():
    data = {"output": "run", "data": {"root": "data", "hf_keep": 0.1}, "train": {"steps": 1}}
    method = {"name": "retmae", "model": {"backbone": "resnet10", "image_size": 64}, "mask_ratio": 0.5}
    with pytest.raises(ConfigError, match="none of the 4"):
        validate(RunConfig, {**data, "method": method}, where="test")


def test_defaults_are_those_of_mae():
    config = RetMaeConfig()
    assert (config.hf_input, config.target_low_pass_cycles, config.model.backbone) == (False, None, None)
