"""The estimators on correlated Gaussians, where mutual information is known: -d/2 log(1 - rho^2) nats."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from frepa_dist.models.critic import MineCritic
from frepa_dist.mutual_information import (
    LogMovingAverage,
    Pairs,
    Scores,
    cosine_scores,
    create_estimator,
    draw_columns,
    log_mean_exp,
    mine_loss,
    score_pairs,
)
from shards.support.errors import ConfigError

DIM, RHO = 4, 0.7
# nats, at 1.35: a lower bound after 400 short steps falls short, and 2,000 fresh pairs have an error of 0.03
BELOW, ABOVE = 0.2, 0.1
LIMIT = 20.0


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def embed(x: torch.Tensor) -> torch.Tensor:
    """An invertible map onto vectors of mean 0 and one length, from which LayerNorm takes nothing."""
    half = x / 2
    return torch.cat([half.sin(), half.cos(), -half.sin(), -half.cos()], dim=1)


def gaussians(n: int, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, DIM)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, DIM)
    return x, y


def pairs_of(x: torch.Tensor, y: torch.Tensor, negatives: int, step: int) -> Pairs:
    z, c = embed(x), embed(y)
    return Pairs(z, c, c, torch.arange(len(z)), draw_columns(len(z), negatives, seed=0, step=step))


def trained_estimate(name: str, rho: float, steps: int = 400) -> float:
    """Fit a critic on fresh samples, then estimate on 2,000 pairs that it has not seen."""
    torch.manual_seed(0)
    estimator, average = create_estimator(name), LogMovingAverage(0.9)
    critic = MineCritic(4 * DIM, 4 * DIM, hidden=64)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        pairs = pairs_of(*gaussians(128, rho), negatives=63, step=step)
        result = mine_loss(estimator, critic, pairs, average.value, limit=LIMIT, any_rank=alone)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        schedule.step()
        average.observe(result.clipped_log_partition)
        average.update(alone)
    with torch.no_grad():
        pairs = pairs_of(*gaussians(2000, rho), negatives=63, step=steps)
        result = mine_loss(estimator, critic, pairs, average.value, limit=LIMIT, any_rank=alone)
    assert not result.skipped
    # the loss is the estimate that was promised, up to the moving average's lag
    assert float(-result.loss) == pytest.approx(float(result.estimate), abs=0.05)
    return float(result.estimate)


@pytest.mark.parametrize("name", ["dv", "smile", "infonce"])
def test_estimators_reach_the_closed_form(name):
    truth = -DIM / 2 * math.log(1 - RHO**2)
    assert truth < math.log(64) - 1  # else infonce could not
    assert truth - BELOW < trained_estimate(name, RHO) < truth + ABOVE


def test_js_reaches_its_own_optimum():
    """2 JSD(joint || product): the js bound at the true log density ratio, by Monte Carlo."""

    def log_ratio(x, y):
        quadratic = RHO**2 * (x**2 + y**2) - 2 * RHO * x * y
        return (-0.5 * math.log(1 - RHO**2) - quadratic / (2 * (1 - RHO**2))).sum(dim=1)

    torch.manual_seed(1)
    x, y = gaussians(200_000, RHO)
    joint, product = log_ratio(x, y), log_ratio(x, y.roll(1, 0))
    assert float(joint.mean()) == pytest.approx(-DIM / 2 * math.log(1 - RHO**2), abs=0.02)
    truth = math.log(4) - float(functional.softplus(-joint).mean() + functional.softplus(product).mean())
    assert truth - 0.06 < trained_estimate("js", RHO) < truth + 0.03


@pytest.mark.parametrize("name", ["dv", "js"])
def test_independence_is_seen_as_such(name):
    assert abs(trained_estimate(name, 0.0, steps=100)) < 0.05


@pytest.mark.parametrize("name", ["dv", "smile", "infonce", "js", "cosine"])
def test_descending_the_loss_raises_the_estimate(name):
    torch.manual_seed(0)
    critic = cosine_scores if name == "cosine" else MineCritic(16, 16, hidden=32)
    if name != "cosine":
        torch.nn.init.normal_(critic.last.weight)
    pairs = pairs_of(*gaussians(32, 0.3), negatives=31, step=0)
    estimator = create_estimator(name)
    z = pairs.z.clone().requires_grad_()

    def run(z, log_average):
        return mine_loss(estimator, critic, pairs._replace(z=z), log_average, limit=LIMIT, any_rank=alone)

    before = run(z, torch.zeros(()))
    before = run(z, before.clipped_log_partition)  # where dv's surrogate touches dv
    assert float(-before.loss.detach()) == pytest.approx(float(before.estimate), abs=1e-5)
    before.loss.backward()
    after = run((z - 0.05 * z.grad / z.grad.norm()).detach(), before.clipped_log_partition)
    assert after.estimate > before.estimate


def test_dv_is_never_above_its_value_at_the_true_denominator():
    scores = Scores(torch.randn(8), torch.randn(8, 20))
    dv = create_estimator("dv")
    values = [float(dv.rows(scores, torch.tensor(a)).mean()) for a in (-1.0, 0.0, 0.7, 2.0)]
    assert min(values) >= -float(dv.estimate(scores)) - 1e-6
    exact = dv.rows(scores, log_mean_exp(scores.product)).mean()
    assert float(exact) == pytest.approx(-float(dv.estimate(scores)), abs=1e-6)


def test_smile_clips_negatives_and_fits_its_critic_by_js():
    torch.manual_seed(0)
    critic = MineCritic(16, 16, hidden=32)
    torch.nn.init.normal_(critic.last.weight)
    pairs = pairs_of(*gaussians(16, 0.5), negatives=15, step=0)
    gradients = {}
    for name in ("smile", "js", "dv"):
        z = pairs.z.clone().requires_grad_()
        critic.zero_grad()
        estimator = create_estimator(name, tau=0.5)
        loss = mine_loss(
            estimator, critic, pairs._replace(z=z), torch.zeros(()), limit=LIMIT, any_rank=alone
        ).loss
        loss.backward()
        gradients[name] = critic.second.weight.grad.clone(), z.grad
    torch.testing.assert_close(gradients["smile"][0], gradients["js"][0])
    assert not torch.allclose(gradients["smile"][1], gradients["js"][1])
    assert not torch.allclose(gradients["smile"][1], gradients["dv"][1])  # tau = 0.5 bites
    scores = Scores(torch.zeros(1), torch.tensor([[100.0, -100.0]]))
    expected = -math.log((math.exp(5) + math.exp(-5)) / 2)
    assert float(create_estimator("smile").estimate(scores)) == pytest.approx(expected)


def test_infonce_is_bounded_by_the_number_of_negatives():
    perfect = Scores(torch.full((4,), 50.0), torch.full((4, 7), -50.0))
    assert float(create_estimator("infonce").estimate(perfect)) == pytest.approx(math.log(8))


@pytest.mark.parametrize(("size", "negatives"), [(12, 5), (12, 11), (12, 256), (2, 1)])
def test_each_row_meets_the_same_number_of_others_and_never_itself(size, negatives):
    columns = draw_columns(size, negatives, seed=3, step=9)
    pool = torch.arange(float(size))[:, None]
    # a "critic" that tells which pair it was shown
    scores = score_pairs(
        lambda z, c: (100 * z + c).squeeze(-1), Pairs(pool, pool, pool, torch.arange(size), columns)
    )
    assert scores.joint.tolist() == [101.0 * i for i in range(size)]
    assert scores.product.shape == (size, min(negatives, size - 1))
    for i, row in enumerate(scores.product.tolist()):
        others = {value - 100 * i for value in row}
        assert len(others) == len(row)
        assert i not in others
        assert others <= set(columns.tolist())


def test_columns_are_a_function_of_seed_and_step():
    draw = draw_columns(100, 20, seed=1, step=2)
    assert torch.equal(draw, draw_columns(100, 20, seed=1, step=2))
    assert not torch.equal(draw, draw_columns(100, 20, seed=1, step=3))
    assert not torch.equal(draw, draw_columns(100, 20, seed=2, step=2))
    with pytest.raises(ConfigError, match="at least 2"):
        draw_columns(1, 20, seed=1, step=2)


@pytest.mark.parametrize("name", ["dv", "smile", "infonce", "js"])
@pytest.mark.parametrize("score", [30.0, -30.0, float("inf"), float("nan")])
def test_a_runaway_partition_skips_the_term_with_finite_zero_gradients(name, score):
    critic = MineCritic(16, 16, hidden=8)
    torch.nn.init.normal_(critic.last.weight)
    critic.last.bias.data.fill_(score)
    pairs = pairs_of(*gaussians(8, 0.5), negatives=7, step=0)
    z = pairs.z.clone().requires_grad_()
    result = mine_loss(
        create_estimator(name), critic, pairs._replace(z=z), torch.zeros(()), limit=LIMIT, any_rank=alone
    )
    assert result.skipped
    assert float(result.loss.detach()) == float(result.estimate) == float(result.max_score) == 0
    result.loss.backward()
    for gradient in (z.grad, *(p.grad for p in critic.parameters())):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_another_ranks_flag_skips_here_too():
    critic = MineCritic(16, 16, hidden=8)
    pairs = pairs_of(*gaussians(8, 0.5), negatives=7, step=0)
    asked = []

    def any_rank(flag):
        asked.append(bool(flag))
        return torch.tensor(True)

    result = mine_loss(
        create_estimator("dv"), critic, pairs, torch.tensor(0.5), limit=LIMIT, any_rank=any_rank
    )
    assert asked == [False]
    assert result.skipped
    assert float(result.loss.detach()) == 0


def test_the_critic_starts_at_zero_and_computes_in_float32_under_autocast():
    critic = MineCritic(16, 12, hidden=8)
    z, c = torch.randn(5, 1, 16), torch.randn(1, 3, 12)
    assert torch.equal(critic(z, c), torch.zeros(5, 3))
    torch.nn.init.normal_(critic.last.weight)
    plain = critic(z, c)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(critic(z, c), plain)
    assert critic(z.bfloat16(), c.bfloat16()).dtype == torch.float32


def test_the_factorized_first_layer_is_the_concatenated_one():
    critic = MineCritic(6, 4, hidden=8)
    torch.nn.init.normal_(critic.last.weight)
    z, c = torch.randn(5, 6), torch.randn(3, 4)
    scores = critic(z[:, None], c[None])
    joined = torch.cat([critic.first.weight, critic.context_first.weight], dim=1)
    for i in range(5):
        for j in range(3):
            pair = torch.cat([critic.norm(z[i]), critic.context_norm(c[j])])
            hidden = functional.relu(joined @ pair + critic.first.bias)
            expected = critic.last(functional.relu(critic.second(hidden)))[0]
            torch.testing.assert_close(scores[i, j], expected)


def test_the_moving_average_is_that_of_the_exponentials():
    average, plain = LogMovingAverage(0.9), 1.0
    average.update(alone)
    assert float(average.value) == 0
    for values in ([1.0, 3.0], [0.5], [-2.0, 0.0, 1.0]):
        for value in values:
            average.observe(torch.tensor(value))
        average.update(lambda x: x + 0.25)  # what the other ranks add to the mean
        plain = 0.9 * plain + 0.1 * (sum(map(math.exp, values)) / len(values) + 0.25)
        assert float(average.value) == pytest.approx(math.log(plain), abs=1e-6)
