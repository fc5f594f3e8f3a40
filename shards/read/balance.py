"""How often each modality is read: from what a run asks for to passes over each modality in an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import PlainValidator

from shards.support.errors import ConfigError

ALPHA = "alpha"


def _check_weights(value: object) -> object:
    if value == "uniform":
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            "take `uniform`, `{alpha: A}` with A from 0 (uniform) to 1 (by size), or passes by modality, as "
            "`{fundus: 2}`"
        )
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"'{name}' is {weight!r}, no number from 0 on")
    weights = {str(name): float(weight) for name, weight in value.items()}
    if ALPHA not in weights:
        return weights
    others = ", ".join(f"'{name}'" for name, passes in weights.items() if name != ALPHA and passes)
    if others:
        raise ValueError(f"'{ALPHA}' balances all modalities, so {others} cannot stand beside it but with 0")
    if weights[ALPHA] > 1:
        raise ValueError(f"'{ALPHA}' is {weights[ALPHA]}, more than 1 (by size)")
    return weights


ModalityWeights = Annotated[Literal["uniform"] | dict[str, float], PlainValidator(_check_weights)]
"""How modalities are balanced; n is a modality's number of samples, those that are excluded not counted.

- `uniform`: every modality is drawn equally often.
- `{alpha: A}`, A in [0, 1]: a modality's share is in proportion to n^A; 0 is uniform, 1 is by size.
  `{alpha: A, fundus: 0}` leaves one out and balances the others.
- by name, `{fundus: 2, mri: 0.5}`: passes over a modality in one epoch, 1 where not named; 0 leaves it out.

With the first two an epoch is about as long as the dataset without what is left out, in the mean over epochs:
what is drawn more than by size is repeated, what is drawn less is thinned. By name, the epoch is as long as
the passes make it.
"""


def passes_by_modality(asked: ModalityWeights, num_samples: Mapping[str, int]) -> dict[str, float]:
    """Return the passes over each modality in an epoch, for every modality of the dataset.

    The shares of `{alpha: A}` are temperature sampling, as languages are balanced by Conneau et al. 2020
    (arXiv:1911.02116, section 3.1, where A = 0.3).

    Args:
        asked: the balance.
        num_samples: samples of each modality, without those that are excluded.

    Raises:
        ConfigError: a modality is named that the dataset does not have.
    """
    if asked != "uniform" and ALPHA not in asked:
        check_names(asked, num_samples)
        return {name: asked.get(name, 1.0) for name in num_samples}
    weights = {ALPHA: 0.0} if asked == "uniform" else asked
    check_names((name for name in weights if name != ALPHA), num_samples)
    drawn = drawn_modalities(weights, (name for name, n in num_samples.items() if n))
    parts = {name: num_samples[name] ** weights[ALPHA] for name in drawn}
    # n^A may differ in the last bit between machines; ranks must not. No weight is below 1 / modalities
    scale = sum(num_samples[name] for name in drawn) / math.fsum(parts.values()) if parts else 0.0
    return {
        name: round(scale * parts[name] / n, 6) if name in parts else 0.0 for name, n in num_samples.items()
    }


def drawn_modalities(asked: ModalityWeights, known: Iterable[str]) -> tuple[str, ...]:
    """Modalities of which anything is drawn: all but those that are left out."""
    unwanted = left_out(asked)
    return tuple(name for name in known if name not in unwanted)


def left_out(asked: ModalityWeights) -> tuple[str, ...]:
    """Modalities that are asked for with 0 passes."""
    passes = asked if isinstance(asked, dict) else {}
    return tuple(name for name in sorted(passes) if name != ALPHA and not passes[name])


def check_names(asked: Iterable[str], known: Iterable[str]) -> None:
    """Check that the dataset has the modalities that are named.

    Raises:
        ConfigError: it does not.
    """
    known = sorted(known)
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"no shard is of modality '{name}'", where="modality_weights", allowed=", ".join(known)
            )
