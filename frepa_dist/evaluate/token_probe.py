"""Token budget: how well a probe does that sees a quarter of an image's tokens (analysis of RetMAE).

The same classifier learns from, and is judged on, features of all tokens, of the strongest quarter by high
frequency, of a random quarter, and of the low-frequency ones. "Low-frequency" has two readings in the paper,
and both are here: the lowest quarter kept, and the highest quarter removed.

Shapes: B batch, N tokens, K tokens kept, V variants, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from frepa_dist.evaluate.cka import token_subsets
from frepa_dist.evaluate.classifiers import Classifier
from frepa_dist.evaluate.compare import holm
from frepa_dist.evaluate.encoder import Encoder
from frepa_dist.evaluate.extract import Extraction, extract
from frepa_dist.evaluate.features import load_encoder
from frepa_dist.evaluate.paired import PairedDifference, compare_pair
from frepa_dist.evaluate.pictures import Pictures
from frepa_dist.evaluate.probe import find_leaks, judge_features, linear_training, probe_result
from frepa_dist.evaluate.probe_result import ProbeResult
from frepa_dist.evaluate.task import ProbeTask, read_parts
from frepa_dist.evaluate.views import stack_images
from shards.read.draws import sample_rng
from shards.support.errors import ConfigError
from shards.support.settings import Settings

ALL = "all tokens"


class Tokens(NamedTuple):
    """Images (B, 3, S, S) uint8, and their patches (B, N), strongest high frequency first."""

    images: Tensor
    order: Tensor


@dataclass(frozen=True)
class TokenLook:
    """All tokens of a picture, and subsets of them (see `extract.Look`).

    Attributes:
        keep: share of the tokens in a subset.
        seed: of the random subsets, which depend on the picture's content and on nothing else.
    """

    keep: float
    seed: int

    def version(self, encoder: Encoder, pictures: Pictures) -> str:
        """See `Look`."""
        return f"tokens {self.keep} {self.seed} {pictures.hf_version()}"

    def load(self, encoder: Encoder, pictures: Pictures, numbers: Sequence[int]) -> Tokens:
        """See `Look`."""
        views = pictures.views(numbers, encoder.grid)
        return Tokens(stack_images(views), torch.from_numpy(np.stack([view.hf_order for view in views])))

    def embed(self, encoder: Encoder, loaded: Tokens, digests: Sequence[str]) -> Tensor:
        """See `Look`: (B, V, D), in the order of `variants`."""
        num_tokens = loaded.order.shape[1]
        drawn = [
            sample_rng(self.seed, 0, _number(digest), "token budget").permutation(num_tokens)
            for digest in digests
        ]
        subsets = token_subsets(loaded.order, torch.from_numpy(np.stack(drawn)), self.keep)
        normalized = encoder.normalize(loaded.images)
        parts = [encoder.embed(normalized), *(encoder.embed(normalized, ids) for ids in subsets.values())]
        return torch.stack([part.cpu() for part in parts], dim=1)

    def variants(self) -> list[str]:
        """Names of the V variants."""
        order = torch.arange(4)[None]
        return [ALL, *token_subsets(order, order, self.keep)]


def _number(digest: str) -> int:
    return int(digest[:15], 16)


class TokenResult(Settings):
    """A probe by the tokens it sees.

    Attributes:
        keep: share of the tokens in a subset.
        modality: that decides what high frequency is, None of a dataset, which knows it.
        rows: the probe of each variant; "all tokens" is the first.
        differences: of each subset from all tokens, paired by test images, corrected by Holm.
    """

    keep: float
    modality: str | None
    rows: dict[str, ProbeResult]
    differences: list[PairedDifference]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """A table for the terminal."""
        full = self.rows[ALL]
        lines = [
            f"AUROC of a {full.head} probe by the tokens it sees, {sum(full.num_test)} test images; "
            f"95% intervals over {full.resampled}; difference from all tokens, p after Holm"
        ]
        found = {difference.first: difference for difference in self.differences}
        for name, row in self.rows.items():
            line = f"{name:32} {row.auroc.describe()}"
            if name in found:
                line += f"  {found[name].value:+.3f}, p = {found[name].p_holm:.3g}"
            lines.append(line)
        lines.append(f"leakage: {full.leakage}")
        return "\n".join(lines)


def run_token_probe(
    encoder: str,
    task: ProbeTask,
    *,
    keep: float = 0.25,
    head: Classifier = "logistic",
    train: Sequence[str] = (),
    num_permutations: int = 2000,
    extraction: Extraction | None = None,
    allow_leakage: bool = False,
    states: Sequence[Path] = (),
) -> TokenResult:
    """Probe an encoder that sees some of an image's tokens.

    Args:
        encoder: with tokens, see `features.SOURCES`.
        task: the images, and what is to be told; of files it names the modality, which decides what high
            frequency is. Its seed is that of the random tokens too.
        keep: share of the tokens in a subset.
        head: a classifier of frozen features.
        train: overrides of the training of `linear`.
        num_permutations: of each paired test.
        extraction: how features are computed.
        allow_leakage: go on where test images were in the run's pretraining data; the result says so.
        states: private folders of the builds of those data, see `leakage.check_leakage`.

    Raises:
        FrepaError: what is wrong with encoder, images or labels.
    """
    if not 0 < keep < 1:
        raise ConfigError("share of the tokens", where=keep, allowed="between 0 and 1")
    training = linear_training(head, train, task.seed)
    parts = read_parts(task)
    if parts.test is not parts.train:
        raise ConfigError("the token budget is measured within one set", where="transfer", fix="leave it out")
    parts.train.pictures.hf_version()  # without a modality this ends before anything is computed
    leakage = find_leaks(encoder, parts, allow_leakage, states)
    extraction, look = extraction or Extraction(), TokenLook(keep, task.seed)
    loaded = load_encoder(encoder, extraction.device)
    _ = loaded.grid  # so does an encoder without tokens
    features = extract(encoder, parts.train.pictures, extraction, look, encoder=loaded)
    rows = {}
    for number, name in enumerate(look.variants()):
        x = features[:, number]
        judged = judge_features(head, x, x, parts, task.seed, training)
        rows[name] = probe_result(loaded.name, task, parts, judged).model_copy(update={"leakage": leakage})
    return TokenResult(
        keep=keep, modality=task.modality, rows=rows, differences=from_all(rows, num_permutations, task.seed)
    )


def from_all(rows: dict[str, ProbeResult], num: int, seed: int) -> list[PairedDifference]:
    """Paired differences in AUROC of each variant from all tokens, corrected for their number."""
    names = [name for name in rows if name != ALL]
    found = [compare_pair(rows[name], rows[ALL], "auroc", num=num, seed=seed) for name in names]
    corrected = holm(np.array([one.p for one in found])).tolist()
    return [
        PairedDifference.of(name, ALL, one, p) for name, one, p in zip(names, found, corrected, strict=True)
    ]
