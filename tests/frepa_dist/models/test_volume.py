"""The volume encoder: at first the 2D one, blind to padding, bounded in memory, with every backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from frepa_dist.models.backbones import Backbone
from frepa_dist.models.volume import (
    ClassificationHead,
    DenseHead,
    SliceMixer,
    VolumeEncoder,
    VolumeSettings,
    sincos,
)
from shards.support.errors import ConfigError
from shards.support.settings import validate

SMALL = {"num_slices": 5, "overlap": 1, "width": 32, "depth": 4, "num_heads": 2, "slice_chunk": 2}


class Stub(nn.Module):
    """Stride 8, 12 channels, wide inside: what it computes is far more than what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 12, 8, stride=8), nn.BatchNorm2d(12)
        )

    def forward(self, images):
        return self.layers(images)


def make(**changes):
    torch.manual_seed(0)
    train = changes.pop("train_encoder", False)
    return VolumeEncoder(Stub(), 12, VolumeSettings(**{**SMALL, **changes}), train_encoder=train)


def awake(model):
    """The model with a last layer that is no longer zero."""
    nn.init.normal_(
        model.get_submodule("mixer.project" if hasattr(model, "mixer") else "project").weight, std=0.1
    )
    return model


def volumes(num=2, depth=5, size=40, seed=1):
    return torch.randn(num, depth, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("train_encoder", [False, True])
def test_at_first_it_is_the_2d_encoder_to_the_bit(train_encoder):
    model = make(train_encoder=train_encoder)
    images = volumes()
    with torch.no_grad():
        flat = torch.cat([model.encoder(part) for part in images.flatten(0, 1).split(2)])
    assert torch.equal(model(images).flatten(0, 1), flat)
    assert not torch.equal(awake(model)(images).flatten(0, 1), flat)


def test_chunks_change_nothing():
    images = volumes()
    expected = awake(make())(images)
    for chunk in (1, 3, 10, 100):
        torch.testing.assert_close(awake(make(slice_chunk=chunk))(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train_encoder", [False, True])
def test_padding_changes_no_result_and_no_gradient(train_encoder):
    images = volumes(1, 3)
    runs = []
    for filler in (None, 0.0, 1e3):
        model = awake(make(train_encoder=train_encoder))
        mask = None
        padded = images
        if filler is not None:
            padded = torch.cat([images, torch.full_like(images[:, :2], filler)], dim=1)
            mask = torch.tensor([[True, True, True, False, False]])
        out = model(padded, mask)
        assert filler is None or not out[:, 3:].any()
        out[:, :3].square().sum().backward()
        runs.append((out[:, :3].detach(), {n: p.grad for n, p in model.named_parameters()}))
    for out, gradients in runs[1:]:
        torch.testing.assert_close(out, runs[0][0], rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][1][name], rtol=1e-3, atol=1e-3)


def test_a_gap_is_seen_by_none_and_no_volume_sees_another():
    mixer = awake(SliceMixer(12, VolumeSettings(**SMALL)))
    maps = torch.randn(3, 5, 12, 6, 6)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False], [False] * 5])
    out = mixer(maps, mask)
    other = maps.clone()
    other[1, 1] += 10
    other[0] += 10
    again = mixer(other, mask)
    assert torch.equal(again[1], out[1])
    assert not torch.equal(again[0], out[0])
    assert not out[2].any()
    assert out.isfinite().all()


def test_slices_see_each_other_only_between_and_the_control_sees_a_set():
    maps = torch.randn(1, 5, 12, 6, 6)
    other = maps.clone()
    other[0, 4] += 1
    alternating = awake(SliceMixer(12, VolumeSettings(**SMALL)))
    assert (alternating(other)[0, 0] - alternating(maps)[0, 0]).abs().max() > 1e-3
    control = awake(SliceMixer(12, VolumeSettings(**SMALL, between=False)))
    assert torch.equal(control(other)[0, :4], control(maps)[0, :4])
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(control(maps[:, order]), control(maps)[:, order])
    assert (alternating(maps[:, order]) - alternating(maps)[:, order]).abs().max() > 1e-3
    num = [sum(p.numel() for p in model.parameters()) for model in (alternating, control)]
    assert num[0] == num[1]


def test_blocks_attend_as_a_loop_over_slices_and_places_would():
    torch.manual_seed(0)
    mixer = awake(SliceMixer(12, VolumeSettings(**SMALL)))
    maps = torch.randn(2, 5, 12, 6, 8)
    tokens = torch.stack([torch.stack([mixer.embed(m[None])[0] for m in v]) for v in maps])  # B F W r c
    half = SMALL["width"] // 2
    for row in range(3):
        for column in range(4):
            place = torch.cat([sincos(4, half, maps.device)[column], sincos(3, half, maps.device)[row]])
            tokens[..., row, column] += place + sincos(5, 2 * half, maps.device)
    for number, block in enumerate(mixer.blocks):
        for v in range(2):
            if number % 2 == 0:
                for f in range(5):
                    tokens[v, f] = block(tokens[v, f].flatten(1).T[None])[0].T.reshape(-1, 3, 4)
            else:
                for row in range(3):
                    for column in range(4):
                        tokens[v, ..., row, column] = block(tokens[v, ..., row, column][None])[0]
    found = mixer.project(mixer.norm(tokens.permute(0, 1, 3, 4, 2)))  # B F r c (D p p)
    found = found.reshape(2, 5, 3, 4, 12, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(maps.shape)
    torch.testing.assert_close(mixer(maps), maps + found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [(1, 1), (3, 5), (7, 7)])
def test_maps_that_patches_do_not_fill(side):
    mixer = awake(SliceMixer(12, VolumeSettings(**SMALL)))
    assert mixer(torch.randn(2, 5, 12, *side)).shape == (2, 5, 12, *side)


def saved_bytes(model, images):
    """Bytes that the forward pass keeps for the backward one, each storage counted once."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    keep = []  # nothing is freed meanwhile, or an address could come twice
    with saved_tensors_hooks(lambda t: (keep.append(t), pack(t))[1], lambda t: t):
        out = model(images)
    return sum(held.values()), out


class Counter(nn.Module):
    """Counts how often the 2D encoder runs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.runs = encoder, 0

    def forward(self, images):
        self.runs += 1
        return self.encoder(images)


def test_what_is_held_for_the_backward_pass_grows_by_inputs_and_not_by_activations():
    """Accounting of saved tensors: with 2 and with 8 chunks, recomputed and (the control) not."""
    per_chunk = {}
    for recomputed in (True, False):
        sizes = []
        for chunks in (2, 8):
            model = make(train_encoder=True, num_slices=16, slice_chunk=2)
            if not recomputed:
                model.encode_slices = lambda images, encoder=model.encoder: torch.cat(
                    [encoder(chunk) for chunk in images.split(2)]
                )
            mixer_only, _ = saved_bytes(model.mixer, torch.randn(1, 2 * chunks, 12, 5, 5, requires_grad=True))
            held, out = saved_bytes(model, volumes(1, 2 * chunks))
            out.sum().backward()
            sizes.append(held - mixer_only)
        per_chunk[recomputed] = (sizes[1] - sizes[0]) / 6
    one_chunk = 2 * 3 * 40 * 40 * 4  # the images of a chunk, float32
    activations = 2 * 64 * 40 * 40 * 4  # one layer of the stub
    assert per_chunk[True] <= one_chunk
    assert per_chunk[False] >= 2 * activations  # before and behind the GELU


def test_gradients_are_those_without_recomputing_and_each_chunk_runs_twice():
    images = volumes()
    gradients = []
    for recomputed in (True, False):
        model = awake(make(train_encoder=True, slice_chunk=3))
        spy = model.encoder = Counter(model.encoder)
        if not recomputed:
            model.encode_slices = lambda images, encoder=spy: torch.cat([encoder(c) for c in images.split(3)])
        model(images).square().sum().backward()
        assert spy.runs == (8 if recomputed else 4)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_frozen_encoder_stays_as_it_is_and_in_evaluation_mode():
    model = make().train()
    before = {n: t.clone() for n, t in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(volumes()).square().sum().backward()
    optimizer.step()
    assert not model.encoder.training
    assert all(torch.equal(t, before[n]) for n, t in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.mixer.project.weight.grad.any()
    trained = make(train_encoder=True).train()
    assert trained.encoder.training
    assert not trained.encoder.layers[3].training  # BatchNorm: chunks and padding are not to be learned


@pytest.mark.parametrize(
    "name", ["vit_pico", "swin_pico", "swinv2_pico", "convnext_twin", "convnextv2_twin", "resnet10"]
)
@pytest.mark.parametrize("train_encoder", [False, True])
def test_every_backbone(name, train_encoder):
    torch.manual_seed(0)
    backbone = Backbone(name, 64)
    model = VolumeEncoder(backbone, backbone.width, VolumeSettings(**SMALL), train_encoder=train_encoder)
    images = volumes(1, 3, 64)
    with torch.no_grad():
        flat = torch.cat([backbone(part) for part in images[0].split(2)])
    out = model(images)
    torch.testing.assert_close(out[0], flat.float())
    side = 64 // backbone.stride
    assert out.shape == (1, 3, backbone.width, side, side)
    logits = DenseHead(backbone.width, 2, backbone.stride)(out[0], (60, 60))
    assert logits.shape == (3, 2, 60, 60)
    head = ClassificationHead(backbone.width, 4)
    classes = head(head.pool(out, torch.ones(1, 3)), torch.tensor([3.0]), torch.ones(1, 1))
    (logits.mean() + classes.sum()).backward()
    assert any(p.grad is not None for p in backbone.parameters()) == train_encoder


def test_autocast():
    model = awake(make(train_encoder=True))
    expected = model(volumes())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(volumes())
    out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.3)


def test_the_head_pools_slices_of_all_windows_once():
    torch.manual_seed(0)
    head = ClassificationHead(6, 3)
    maps = torch.randn(4, 2, 6, 3, 3)
    weight = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.0, 0.0], [1.0, 1.0]])
    members = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    flat = maps.mean(dim=(3, 4))
    pooled = [
        (flat[0, 0] + 0.5 * flat[0, 1] + 0.5 * flat[1, 0] + flat[1, 1]) / 3,
        flat[2, 0],
        (flat[3, 0] + flat[3, 1]) / 2,
    ]
    expected = head.linear(head.norm(torch.stack(pooled)))
    torch.testing.assert_close(head(head.pool(maps, weight), weight.sum(dim=1), members), expected)


def test_what_is_refused():
    model = make()
    model.width = 13
    with pytest.raises(ConfigError, match=r"gives \(2, 12, 5, 5\) .* a map \(n, 13, h, w\)"):
        model(volumes())
    for changes, words in (
        ({"width": 30}, "multiple of 4"),
        ({"num_heads": 5}, "no multiple of num_heads"),
        ({"overlap": 5}, "must be smaller than num_slices"),
        ({"depth": 1}, "no block between slices"),
        ({"deep": 1}, "unknown key 'deep'"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(VolumeSettings, {**SMALL, **changes}, where="model")


def test_what_the_transformer_sees_is_standardized_and_what_passes_is_not():
    torch.manual_seed(0)
    mixer = SliceMixer(12, VolumeSettings(**SMALL))
    maps = 50 + 0.01 * torch.randn(2, 5, 12, 4, 4)
    mixer.standardize_by(maps.transpose(0, 2).flatten(1))
    seen = []
    mixer.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert torch.equal(mixer(maps), maps)
    assert seen[0].mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (seen[0].std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    mixer.standardize_by(torch.ones(12, 9))  # no spread, no division by zero
    assert mixer(maps).isfinite().all()
