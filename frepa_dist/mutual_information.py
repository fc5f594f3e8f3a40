"""Five estimators of mutual information (MI) from a critic's scores, as losses to minimize. All in float32.

With T(z, c) the score of a pair, "joint" pairs of the same image and "product" pairs of two images:

    dv       E_joint[T] - log E_product[e^T], Donsker and Varadhan; Belghazi et al., MINE, 2018. In place of a
             mini-batch's mean, whose logarithm is biased, the loss takes a moving average a:
             -E_joint[T] + E_product[e^T] / a + log a - 1, never below -dv and equal to it at a = E[e^T].
    smile    dv with e^T clipped to e^-tau .. e^tau; Song and Ermon, 2020. As there, the critic is fitted by
             js (the clipped bound alone would let it grow without end); the encoder follows the clipped one.
    infonce  E_joint[T - log mean of e^T over the pair and its K negatives] <= log(K + 1); van den Oord, 2018.
    js       log 4 - E_joint[softplus(-T)] - E_product[softplus(T)] <= 2 JSD(joint || product), between 0 and
             log 4: not MI itself; Hjelm et al., 2019.
    cosine   mean cosine similarity of the joint pairs: no MI and no critic, the control.

Every loss is a mean over rows, each of which sees its own scores and the moving average only, so that it does
not depend on how a global batch is cut into ranks and micro-batches.

Shapes: B rows of a micro-batch, G global batch, C columns drawn from it, K negatives of a row, D widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from shards.read.draws import sample_rng
from shards.support.errors import ConfigError

EstimatorName = Literal["dv", "smile", "infonce", "js", "cosine"]
Critic = Callable[[Tensor, Tensor], Tensor]


class Scores(NamedTuple):
    """A critic's scores: `joint` (B,) of the rows' own pairs, `product` (B, K) of their negatives."""

    joint: Tensor
    product: Tensor


class Pairs(NamedTuple):
    """What is scored against what.

    Attributes:
        z: (B, D) embeddings that learn.
        own: (B, D') the other embedding of the same images.
        pool: (G, D') that of the whole global batch, in slot order.
        slots: (B,) the slots of the rows.
        columns: (C,) the slots whose embeddings serve as negatives.
    """

    z: Tensor
    own: Tensor
    pool: Tensor
    slots: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Estimator:
    """An estimator: what is minimized, and what is reported.

    Attributes:
        rows: (scores, log of the moving average) -> (B,) loss of each row.
        estimate: scores -> 0-dim estimate in nats (a similarity for `cosine`).
        partition: scores -> 0-dim log E_product[e^T] as the estimator sees it.
        critic_rows: the same as `rows`, where the critic minimizes another loss than the encoder.
    """

    rows: Callable[[Scores, Tensor], Tensor]
    estimate: Callable[[Scores], Tensor]
    partition: Callable[[Scores], Tensor]
    critic_rows: Callable[[Scores, Tensor], Tensor] | None = None


class MineLoss(NamedTuple):
    """The loss of a micro-batch and what to report; all 0-dim, all detached but the loss.

    Attributes:
        loss: to minimize; 0 without gradient where skipped.
        estimate: of the estimator; 0 where skipped.
        mean_score: over the joint and product scores; 0 where skipped.
        max_score: the same.
        log_partition: log E_product[e^T], as found, skipped or not.
        clipped_log_partition: the same as the estimator sees it; the moving average's next value.
        skipped: bool, the same on all ranks.
    """

    loss: Tensor
    estimate: Tensor
    mean_score: Tensor
    max_score: Tensor
    log_partition: Tensor
    clipped_log_partition: Tensor
    skipped: Tensor


def log_mean_exp(x: Tensor) -> Tensor:
    """Return log(mean(exp(x))) over all entries, without overflow."""
    return x.flatten().logsumexp(0) - math.log(x.numel())


def _identity(product: Tensor) -> Tensor:
    return product


def _partition(scores: Scores, clip: Callable[[Tensor], Tensor]) -> Tensor:
    return log_mean_exp(clip(scores.product))


def _dv_rows(scores: Scores, log_average: Tensor, clip: Callable[[Tensor], Tensor]) -> Tensor:
    ratio = (clip(scores.product) - log_average).exp().mean(dim=1)
    return -scores.joint + ratio + log_average - 1


def _dv_estimate(scores: Scores, clip: Callable[[Tensor], Tensor]) -> Tensor:
    return scores.joint.mean() - _partition(scores, clip)


def _infonce_rows(scores: Scores, log_average: Tensor) -> Tensor:
    candidates = torch.cat([scores.joint[:, None], scores.product], dim=1)
    return candidates.logsumexp(dim=1) - math.log(candidates.shape[1]) - scores.joint


def _js_rows(scores: Scores, log_average: Tensor) -> Tensor:
    return functional.softplus(-scores.joint) + functional.softplus(scores.product).mean(dim=1) - math.log(4)


def _cosine_rows(scores: Scores, log_average: Tensor) -> Tensor:
    return -scores.joint


def _negative_mean(rows: Callable[[Scores, Tensor], Tensor], scores: Scores) -> Tensor:
    return -rows(scores, torch.zeros_like(scores.joint[0])).mean()


def create_estimator(name: EstimatorName, tau: float = 5.0) -> Estimator:
    """Create an estimator by name; `tau` bounds the scores of `smile`."""
    plain = partial(_partition, clip=_identity)
    if name == "dv":
        return Estimator(partial(_dv_rows, clip=_identity), partial(_dv_estimate, clip=_identity), plain)
    if name == "smile":
        clip = partial(torch.clamp, min=-tau, max=tau)
        return Estimator(
            partial(_dv_rows, clip=clip),
            partial(_dv_estimate, clip=clip),
            partial(_partition, clip=clip),
            critic_rows=_js_rows,
        )
    rows = {"infonce": _infonce_rows, "js": _js_rows, "cosine": _cosine_rows}[name]
    return Estimator(rows, partial(_negative_mean, rows), plain)


def cosine_scores(z: Tensor, context: Tensor) -> Tensor:
    """Score pairs by cosine similarity: what stands in for the critic of `cosine`."""
    return functional.cosine_similarity(z.float(), context.float(), dim=-1)


def draw_columns(num_samples: int, num_negatives: int, *, seed: int, step: int) -> Tensor:
    """Draw the slots of a global batch that serve as negatives in a step, the same on every rank.

    Returns:
        (C,) int64, C = min(num_negatives + 1, num_samples): each row leaves one of them out.

    Raises:
        ConfigError: a batch of one sample has no negatives.
    """
    if num_samples < 2:
        raise ConfigError(
            "mutual information needs at least 2 samples in a global batch",
            fix="raise train.global_batch_size",
        )
    order = sample_rng(seed, 0, step, "mine.negatives").permutation(num_samples)
    return torch.from_numpy(order[: num_negatives + 1].copy())


def score_pairs(critic: Critic, pairs: Pairs) -> Scores:
    """Score each row against its own pair and K = C - 1 negatives.

    A row leaves out the column of its own slot, or the last one where its slot was not drawn, so that all
    rows have the same number of negatives.
    """
    is_own = pairs.columns == pairs.slots[:, None]
    last = len(pairs.columns) - 1
    left_out = torch.where(is_own.any(dim=1), is_own.int().argmax(dim=1), last)
    kept = torch.arange(last, device=pairs.z.device)
    kept = kept + (kept >= left_out[:, None])
    everything = critic(pairs.z[:, None], pairs.pool[pairs.columns][None])
    return Scores(critic(pairs.z, pairs.own), everything.gather(1, kept))


def mine_loss(
    estimator: Estimator,
    critic: Critic,
    pairs: Pairs,
    log_average: Tensor,
    *,
    limit: float,
    any_rank: Callable[[Tensor], Tensor],
) -> MineLoss:
    """Compute the negative estimate, for encoder and critic to minimize together.

    Args:
        estimator: how scores become a loss.
        critic: scores broadcast pairs; an `nn.Module` for an estimator with `critic_rows`.
        pairs: what to score.
        log_average: 0-dim, log of the moving average of E_product[e^T].
        limit: the term is skipped where |log E_product[e^T]| exceeds it on any rank.
        any_rank: all-reduces a 0-dim flag; called once by every rank.
    """
    with torch.autocast(pairs.z.device.type, enabled=False):
        scores = score_pairs(critic if estimator.critic_rows is None else _frozen(critic), pairs)
        log_partition = log_mean_exp(scores.product.detach())
        # the comparison is false for NaN, which therefore skips
        skipped = any_rank(~(log_partition.abs() <= limit))
        safe = _masked(scores, skipped)
        loss = estimator.rows(safe, log_average).mean()
        if estimator.critic_rows is not None:
            fitted = _masked(score_pairs(critic, pairs._replace(z=pairs.z.detach())), skipped)
            critic_loss = estimator.critic_rows(fitted, log_average).mean()
            loss = loss + critic_loss - critic_loss.detach()  # the value stays that of the estimator
        loss = torch.where(skipped, 0.0, loss)
    safe = Scores(safe.joint.detach(), safe.product.detach())
    together = torch.cat([safe.joint, safe.product.flatten()])
    return MineLoss(
        loss=loss,
        estimate=estimator.estimate(safe),
        mean_score=together.mean(),
        max_score=together.max(),
        log_partition=log_partition,
        clipped_log_partition=estimator.partition(safe),
        skipped=skipped,
    )


def _frozen(critic: Critic) -> Critic:
    """The same critic, through which gradients reach its inputs but not its weights."""
    assert isinstance(critic, nn.Module)
    weights = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return lambda z, context: functional_call(critic, weights, (z, context))


def _masked(scores: Scores, skipped: Tensor) -> Scores:
    """Replace scores before any exponential: zeros afterward would still meet inf * 0 in the gradient."""
    return Scores(*(torch.where(skipped, 0.0, x) for x in scores))


class LogMovingAverage:
    """A moving average of a positive quantity, kept as its logarithm; it starts at log 1 = 0.

    Args:
        momentum: share of the old average kept in an update.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.value = torch.zeros(())
        self._observed: list[Tensor] = []

    def observe(self, log_value: Tensor) -> None:
        """Note the quantity's logarithm (0-dim) for the next update."""
        self._observed.append(log_value.detach())

    def update(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Average what was noted since the last update, over ranks too; every rank must call it."""
        if not self._observed:
            return
        mean = mean_over_ranks(torch.stack(self._observed).exp().mean())
        old = self.value.to(mean.device)
        self.value = torch.logaddexp(old + math.log(self.momentum), mean.log() + math.log(1 - self.momentum))
        self._observed.clear()
