"""Costs counted on tensors without data are those of real ones, and those that can be worked out by hand."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from frepa_dist.config import RunConfig
from frepa_dist.corruption import CorruptionConfig, corrupt
from frepa_dist.draws import SampleDraws
from frepa_dist.methods.registry import create_method
from frepa_dist.models.autoencoder import create_autoencoder
from frepa_dist.models.backbones import BackboneSettings
from frepa_dist.models.cost import (
    LAST_STEP,
    _Alone,
    count_backbone,
    count_cost,
    engine_memory,
    fake_batch,
)
from frepa_dist.models.counters import LiveBytes, create_counter
from frepa_dist.models.vit_mae import create_vit_mae

MIB = 2**20


def config(method, **train):
    settings = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "steps": 10,
        "precision": "fp32",
        "zero_stage": 1,
    }
    return RunConfig.model_validate(
        {"output": "x", "method": method, "data": {"root": "x"}, "train": {**settings, **train}}
    )


def mae(**model):
    return {"name": "mae", "model": {"size": "tiny", "image_size": 64, **model}}


def vit_flops(width, depth, tokens, hidden=4):
    """Of the blocks' matrix products: qkv, scores, values, projection, two layers of the perceptron."""
    linear = 2 * tokens * width * width * (3 + 1 + 2 * hidden)
    attention = 2 * 2 * tokens * tokens * width
    return depth * (linear + attention)


def test_operations_of_a_masked_autoencoder_by_hand():
    """A backward pass takes twice a forward one, but for the patch projection: no gradient to the pixels."""
    counted = count_cost(config(mae()))
    patches, kept, pixels = 16, 4, 3 * 16 * 16
    embed = 2 * patches * pixels * 192
    blocks = vit_flops(192, 12, 1 + kept) + vit_flops(128, 4, 1 + patches)
    joints = 2 * (1 + kept) * 192 * 128 + 2 * (1 + patches) * 128 * pixels
    # fused attention computes the scores once more in its backward pass: 2.5 times the forward one
    fused = 0.5 * (4 * 192 * 12 * (1 + kept) ** 2 + 4 * 128 * 4 * (1 + patches) ** 2)
    assert counted.flops == {"student": pytest.approx(2 * embed + 3 * (blocks + joints) + fused)}


def test_operations_of_a_forward_pass_by_hand():
    width, parameters, flops = count_backbone("vit_base", 224)
    assert width == 768
    assert flops == pytest.approx(2 * 196 * 768 * 768 + vit_flops(768, 12, 196))
    assert parameters == sum(
        p.numel()
        for p in create_autoencoder(
            BackboneSettings(backbone="vit_base", image_size=224)
        ).encoder.parameters()
    )
    # He et al. (2015) and Liu et al. (2022) state 4.1 and 4.5 G multiply-adds
    assert count_backbone("resnet50", 224)[2] / 2e9 == pytest.approx(4.1, abs=0.1)
    assert count_backbone("convnext_tiny", 224)[2] / 2e9 == pytest.approx(4.5, abs=0.1)
    assert count_backbone("swin_tiny", 224)[2] / 2e9 == pytest.approx(4.5, abs=0.2)


def real_step(run):
    """The same step on real tensors: operations, the most bytes alive, the bytes that autograd saved."""
    method = create_method(run.method)
    student = type(method).create_student(run.method)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    batch = fake_batch(run)
    saved = {}
    own = {p.untyped_storage().data_ptr() for p in [*student.parameters(), *student.buffers()]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    gc.collect()  # garbage of tests before must not be freed, and subtracted, in between
    counter, alive = create_counter(), LiveBytes()
    with counter, alive:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = method.losses({"student": student}, batch, {}, {}, LAST_STEP, _Alone())
        losses.total.backward()
    num = run.train.micro_batch_size
    return counter.get_total_flops() / num, alive.peak, sum(saved.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_without_data_counts_as_a_real_one(checkpointing):
    run = config(mae(activation_checkpointing=checkpointing))
    counted = count_cost(run)
    flops, peak, saved = real_step(run)
    assert counted.total_flops == pytest.approx(flops, rel=1e-6)
    # recomputed activations hang in reference cycles until Python's collector comes by, sooner or later
    assert counted.memory["activations"] == pytest.approx(peak, rel=0.15 if checkpointing else 0.02)
    assert saved < peak
    if not checkpointing:  # what is saved for the backward pass is most of what is alive
        assert saved > 0.6 * peak


def test_activation_checkpointing_trades_memory_for_operations():
    plain, recomputed = (
        count_cost(config(mae(activation_checkpointing=flag), micro_batch_size=8)) for flag in (False, True)
    )
    assert recomputed.memory["activations"] < 0.6 * plain.memory["activations"]
    # the blocks' forward pass once more, but for each one's last product: nothing needs its result again
    last = 12 * 2 * 5 * 4 * 192**2 + 4 * 2 * 17 * 4 * 128**2
    more = vit_flops(192, 12, 5) + vit_flops(128, 4, 17) - last
    assert recomputed.total_flops - plain.total_flops == pytest.approx(more)


def test_activations_grow_with_the_micro_batch_and_operations_per_image_do_not():
    small, large = (count_cost(config(mae(), micro_batch_size=size)) for size in (2, 8))
    assert large.total_flops == pytest.approx(small.total_flops)
    assert large.memory["activations"] == pytest.approx(4 * small.memory["activations"], rel=0.1)


def test_bf16_halves_the_activations():
    full, half = (count_cost(config(mae(), precision=precision)) for precision in ("fp32", "bf16"))
    assert 0.45 < half.memory["activations"] / full.memory["activations"] < 0.65


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_operations_of_convolutions_by_hand(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 16, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 8, 12, 12, requires_grad=True)
    with create_counter() as counter:
        y = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    # each place of the input (of the output, if not transposed) meets the whole kernel once
    places = 2 * 12 * 12 * 8 if transposed else y.numel()
    expected = 2 * places * 9 * (16 if transposed else 8) // groups
    assert (forward, counter.get_total_flops()) == (expected, 3 * expected)


def test_storages_are_counted_once_and_until_they_are_freed():
    with LiveBytes() as alive:
        x = torch.zeros(MIB)  # 4 MiB
        view = x.view(-1, 2)[1:]
        x.add_(1)
        assert alive.live == 4 * MIB
        y = x * 2
        assert alive.live == 8 * MIB
        del y
        assert alive.live == 4 * MIB
        del x
        assert alive.live == 4 * MIB
        del view
    assert (alive.live, alive.peak) == (0, 8 * MIB)


def test_every_network_of_retmae_is_counted():
    method = mae() | {"name": "retmae", "aux": {"model": "test_resnet"}}
    counted = count_cost(config(method))
    student = type(create_method(config(method).method)).create_student(config(method).method)
    encoder = sum(
        p.numel() for name, p in student.named_parameters() if "decoder" not in name and name != "mask_token"
    )
    assert set(counted.parameters) == {
        "student",
        "teacher",
        "auxiliary",
        "teacher_critic",
        "auxiliary_critic",
    }
    assert counted.parameters["student"] == sum(p.numel() for p in student.parameters())
    assert counted.encoder_parameters == counted.parameters["teacher"] == encoder
    others = counted.parameters["teacher"] + counted.parameters["auxiliary"]
    critics = counted.parameters["teacher_critic"] + counted.parameters["auxiliary_critic"]
    assert counted.memory["other networks"] == 4 * others + 16 * critics
    assert set(counted.flops) == {"targets", "student"}
    assert counted.total_memory == sum(counted.memory.values())


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("fp32", 0, (400, 400, 800)),
        ("fp32", 1, (400, 400, 300)),
        ("fp32", 2, (400, 100, 300)),
        ("bf16", 0, (200, 200, 1200)),
        ("bf16", 1, (200, 200, 300)),
        ("bf16", 2, (200, 50, 300)),
        ("bf16", 3, (250, 50, 300)),
    ],
)
def test_bytes_of_an_engine(precision, stage, expected):
    assert tuple(engine_memory(100, 100, precision, stage, ranks=4).values()) == expected


def test_the_reduction_s_bucket_is_there_from_stage_1_on():
    memory = [count_cost(config(mae(), zero_stage=stage)).memory["buckets"] for stage in (0, 1)]
    trained = sum(p.numel() for p in create_vit_mae("tiny", image_size=64).parameters() if p.requires_grad)
    assert memory == [0, 4 * trained]


def test_an_offloaded_optimizer_takes_nothing_of_a_gpu():
    assert engine_memory(100, 100, "bf16", 3, ranks=4, offload=True)["optimizer"] == 0
    settings = {"zero_stage": 2, "precision": "bf16"}
    here, there = (
        count_cost(config(mae(), **settings, offload_optimizer=offload), ranks=2) for offload in (False, True)
    )
    assert here.memory["optimizer"] > 0 == there.memory["optimizer"]
    assert here.memory["weights"] == there.memory["weights"]


def test_stage_3_cuts_the_teacher_too():
    method = {"name": "retmae", "model": {"size": "tiny", "image_size": 64}}
    whole, cut = (count_cost(config(method, zero_stage=stage), ranks=4) for stage in (2, 3))
    teacher = 4 * whole.parameters["teacher"]
    apart = whole.memory["other networks"] - cut.memory["other networks"]
    assert apart == teacher - teacher // 4


def test_every_network_of_frepa_is_counted():
    method = {
        "name": "frepa",
        "model": {"backbone": "swin_pico", "image_size": 64},
        "consistency": {},
        "adversarial_image": {},
        "adversarial_embedding": {},
        "hmi": {},
    }
    counted = count_cost(config(method, precision="bf16"))
    discriminators = {"image_discriminator", "embedding_discriminator"}
    assert set(counted.parameters) == {"student", "teacher", "teacher_critic"} | discriminators
    assert set(counted.flops) == {"targets", "student"} | discriminators
    assert counted.encoder_parameters == counted.parameters["teacher"]
    # discriminators are kept in fp32, without ZeRO
    small = sum(counted.parameters[name] for name in discriminators)
    assert counted.memory["weights"] == 2 * counted.parameters["student"] + 4 * small
    # what was computed among fake tensors is not remembered
    images = torch.rand(2, 3, 64, 64)
    corruption = CorruptionConfig(kinds={"frequency": 1.0})
    corrupted = corrupt(images, SampleDraws([1, 2], "cpu"), corruption).images
    assert type(corrupted) is torch.Tensor
    # without the second view, the student costs less
    alone = count_cost(config(method | {"consistency": None}, precision="bf16"))
    assert alone.flops["student"] < counted.flops["student"]
