import copy

import pytest
import torch
from torch import nn

from frepa_dist.models.discriminator import (
    EmbeddingDiscriminator,
    PatchDiscriminator,
    SpectralConv2d,
    SpectralLinear,
    receptive_field,
)


def largest_singular_values(module: nn.Module) -> list[float]:
    return [
        float(torch.linalg.matrix_norm(layer.norm(layer.weight).detach().flatten(1), 2))
        for layer in module.modules()
        if isinstance(layer, SpectralConv2d | SpectralLinear)
    ]


@pytest.fixture
def patches():
    torch.manual_seed(0)
    return PatchDiscriminator(6, 16, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_estimate_is_close_and_equal_for_equal_seeds(seed):
    built = []
    for _ in range(2):
        torch.manual_seed(seed)
        built.append(nn.ModuleList([PatchDiscriminator(6, 16, 2), EmbeddingDiscriminator(24, 3, 32)]))
    one, other = (module.state_dict() for module in built)
    assert all(torch.equal(one[name], other[name]) for name in one)
    values = largest_singular_values(built[0])
    assert len(values) == 8
    assert all(0.999 < value < 1.1 for value in values)


def test_the_estimate_follows_the_weight_once_per_step(patches):
    layer = patches.layers[0]
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    before = abs(largest_singular_values(patches)[0] - 1)
    vectors = layer.norm.left.clone()
    patches(torch.rand(2, 6, 32, 32))
    assert torch.equal(layer.norm.left, vectors), "a forward pass moves nothing"
    for _ in range(40):
        patches.after_step()
    assert abs(largest_singular_values(patches)[0] - 1) < min(before, 0.05)


def test_the_gradient_passes_through_the_estimate():
    """d/dW of <W / sigma, A> with u and v constant, against finite differences."""
    torch.manual_seed(1)
    layer = SpectralLinear(5, 4)
    layer.norm.double()
    direction = torch.randn(4, 5, dtype=torch.float64)

    def value(weight: torch.Tensor) -> torch.Tensor:
        sigma = layer.norm.left @ weight @ layer.norm.right
        return (weight / sigma * direction).sum()

    weight = layer.weight.detach().double()
    step = 1e-6 * torch.eye(20, dtype=torch.float64).view(20, 4, 5)
    expected = torch.stack([(value(weight + s) - value(weight - s)) / 2e-6 for s in step]).view(4, 5)
    (layer.norm.float()(layer.weight) * direction.float()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected.float(), rtol=1e-3, atol=1e-4)


def test_sigma_is_computed_in_fp32_under_autocast(patches):
    images = torch.rand(2, 6, 32, 32)
    layer = patches.layers[0]
    expected = layer.norm(layer.weight)
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.norm(layer.weight), expected)
        logits = patches(images)
    assert seen == [torch.bfloat16], "the convolution ran under autocast"
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, patches(images), rtol=0.05, atol=0.02)


def test_a_row_sees_itself_only(patches):
    images = torch.rand(3, 6, 32, 32)
    torch.testing.assert_close(patches(images)[1:2], patches(images[1:2]))
    embedding = torch.randn(3, 24, 4, 4)
    judge = EmbeddingDiscriminator(24, 3, 32)
    assert judge(embedding).shape == (3, 3)
    torch.testing.assert_close(judge(embedding)[1:2], judge(embedding[1:2]))


@pytest.mark.parametrize(("num_layers", "expected"), [(1, 16), (2, 34), (3, 70)])
def test_what_a_logit_sees(num_layers, expected):
    judge = PatchDiscriminator(1, 4, num_layers)
    images = torch.rand(1, 1, 128, 128, requires_grad=True)
    logits = judge(images)
    assert logits.shape[:2] == (1, 1)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = images.grad[0, 0].abs().sum(dim=1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == expected == receptive_field(num_layers)


def test_vectors_are_in_the_state_dict(patches):
    for _ in range(3):
        patches.after_step()
    fresh = PatchDiscriminator(6, 16, 2)
    fresh.load_state_dict(copy.deepcopy(patches.state_dict()))
    images = torch.rand(1, 6, 32, 32)
    assert torch.equal(fresh(images), patches(images))
    assert not any("norm" in name for name, _ in patches.named_parameters())
