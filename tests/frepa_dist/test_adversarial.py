import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from frepa_dist.adversarial import (
    AdversarialGuardConfig,
    Guard,
    class_accuracy,
    class_loss,
    confusion_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
    real_fake_accuracy,
    with_detail,
)
from frepa_dist.models.discriminator import EmbeddingDiscriminator
from frepa_dist.spectrum import gaussian_high_pass


def itself(x: torch.Tensor) -> torch.Tensor:
    return x


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1) / 2)
    assert float(hinge_generator_loss(fake)) == pytest.approx(1.0)
    assert hinge_generator_loss(fake.bfloat16()).dtype == torch.float32


def test_accuracy_counts_both_sides_alike_and_a_zero_half():
    assert float(real_fake_accuracy(torch.tensor([1.0, 1.0]), torch.tensor([-1.0]))) == 1.0
    assert float(real_fake_accuracy(torch.tensor([1.0, 1.0]), torch.tensor([1.0]))) == 0.5
    assert float(real_fake_accuracy(torch.zeros(2), torch.zeros(3))) == 0.5
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert float(class_accuracy(logits, torch.tensor([0, 1, 1]))) == pytest.approx(2 / 3)


def test_r1_is_the_squared_gradient_and_can_be_minimized():
    torch.manual_seed(0)
    weight = torch.randn(12, requires_grad=True)
    images = torch.randn(4, 12, requires_grad=True)
    logits = (images**2 @ weight)[:, None].expand(4, 3)  # the mean over an image's logits is the logit
    penalty = r1_penalty(logits, images)
    expected = (2 * images * weight).square().sum(dim=1).mean()
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, (8 * images.square() * weight).mean(dim=0))


def test_confusion_is_least_where_nothing_can_be_told():
    assert float(confusion_loss(torch.full((5, 3), 2.0))) == pytest.approx(0, abs=1e-6)
    sure = torch.tensor([[8.0, 0.0, 0.0]])
    assert float(confusion_loss(sure)) > 1
    assert float(class_loss(torch.zeros(2, 4), torch.tensor([0, 3]))) == pytest.approx(math.log(4))


def test_an_embedding_learns_to_hide_from_a_frozen_discriminator():
    torch.manual_seed(0)
    judge = EmbeddingDiscriminator(6, 2, 16)
    classes = torch.arange(32) % 2
    embedding = nn.Parameter(torch.randn(32, 6, 3, 3) + 2 * classes[:, None, None, None])
    learner = torch.optim.Adam(judge.parameters(), lr=1e-2)
    for _ in range(40):
        learner.zero_grad()
        class_loss(judge(embedding.detach()), classes).backward()
        learner.step()
        judge.after_step()
    judge.requires_grad_(False)
    before = confusion_loss(judge(embedding)).item()
    assert before > 0.3
    hider = torch.optim.Adam([embedding], lr=0.05)
    for _ in range(60):
        hider.zero_grad()
        confusion_loss(judge(embedding)).backward()
        hider.step()
    assert confusion_loss(judge(embedding)).item() < 0.05 * before


def test_detail_stands_beside_the_image_and_lets_gradients_through():
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    both = with_detail(images, 3.0, gain=4.0)
    assert both.shape == (2, 6, 16, 16)
    assert torch.equal(both[:, :3], images)
    torch.testing.assert_close(both[:, 3:], 4 * gaussian_high_pass(images, 3.0))
    both[:, 3:].square().sum().backward()
    assert images.grad.abs().sum() > 0


CONFIG = AdversarialGuardConfig(momentum=0.9, patience=20, fall=0.9, recovery=0.01, floor=0.1)


def follow(guard: Guard, accuracy: float, steps: int, spread: float = 1.0) -> float:
    logits = spread * torch.linspace(-1, 1, 8)
    for _ in range(steps):
        guard.observe(torch.tensor(accuracy), logits)
        guard.update(itself)
    return float(guard.multiplier)


def test_a_balanced_pair_keeps_the_whole_weight():
    guard = Guard(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        assert follow(guard, 0.7 + 0.1 * float(torch.randn((), generator=generator)), 1) == 1


def test_a_winner_lowers_the_weight_to_the_floor_and_it_recovers_slowly():
    guard = Guard(CONFIG)
    assert follow(guard, 0.99, 3) == pytest.approx(0.9**3)
    assert follow(guard, 0.99, 60) == pytest.approx(0.1)
    after = [follow(guard, 0.7, 1) for _ in range(150)]
    assert after[30] < 0.5
    assert after[-1] == 1
    steps = [b - a for a, b in pairwise(after)]
    assert max(steps) == pytest.approx(CONFIG.recovery, rel=1e-3)


@pytest.mark.parametrize(("accuracy", "spread"), [(0.5, 1.0), (0.45, 1.0), (0.7, 0.0)])
def test_a_collapsed_one_lowers_the_weight_after_patience(accuracy, spread):
    guard = Guard(CONFIG)
    assert follow(guard, accuracy, CONFIG.patience - 1, spread) == 1
    assert follow(guard, accuracy, 10, spread) == pytest.approx(0.9**10)


def test_chance_is_that_of_the_classes():
    guard = Guard(CONFIG, chance=0.75)
    assert follow(guard, 0.9, 30) == 1, "skill 0.6"
    assert follow(guard, 0.74, 60) < 1
    assert follow(Guard(CONFIG, chance=0.25), 0.9, 30) < 1, "skill 0.87"


def test_a_resting_opponent_changes_nothing():
    guard = Guard(CONFIG)
    follow(guard, 0.99, 5)
    before = {name: value.clone() for name, value in guard.state_dict().items()}
    guard.update(lambda _: pytest.fail("no rank may enter the reduction"))
    assert all(torch.equal(before[name], value) for name, value in guard.state_dict().items())


def test_the_state_goes_through_a_checkpoint():
    whole, first, second = Guard(CONFIG), Guard(CONFIG), Guard(CONFIG)
    follow(first, 0.97, 7)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    follow(whole, 0.97, 7)
    for guard in (whole, second):
        follow(guard, 0.6, 9)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_cut_of_a_batch_does_not_matter():
    """One rank with a batch of 8 against two ranks of two micro-batches of 2."""
    torch.manual_seed(0)
    batches = 0.05 * torch.randn(60, 8, 3)
    right = (torch.rand(60, 8) < 0.8).float()
    one, ranks = Guard(CONFIG), [Guard(CONFIG), Guard(CONFIG)]
    for logits, correct in zip(batches, right, strict=True):
        one.observe(correct.mean(), logits)
        one.update(itself)
        own: list[torch.Tensor] = []  # what each rank brings to the all-reduce
        for rank, guard in enumerate(ranks):
            for first in (4 * rank, 4 * rank + 2):
                guard.observe(correct[first : first + 2].mean(), logits[first : first + 2])
            probe = copy.deepcopy(guard)
            probe.update(lambda mean, own=own: own.append(mean) or mean)
        for guard in ranks:
            guard.update(lambda _, own=own: torch.stack(own).mean(dim=0))
    assert float(one.multiplier) == 1
    assert float(one.accuracy) == pytest.approx(0.8, abs=0.1)
    for name, value in one.state_dict().items():
        assert torch.equal(ranks[0].state_dict()[name], ranks[1].state_dict()[name])
        torch.testing.assert_close(ranks[0].state_dict()[name], value, rtol=1e-4, atol=1e-5)
