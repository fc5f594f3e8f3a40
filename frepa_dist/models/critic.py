"""The critic of mutual information neural estimation (MINE, Belghazi et al., 2018): it scores pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class MineCritic(nn.Module):
    """LayerNorm on each side, then a three-layer perceptron on the two together, always in float32.

    The first layer is factorized, W [z; c] = W_z z + W_c c: it costs as much as the number of embeddings, not
    that of pairs. The last layer starts at zero, so that an untrained critic calls everything independent.

    Args:
        width: D of the first embedding.
        context_width: of the second.
        hidden: width of the two hidden layers.
    """

    def __init__(self, width: int, context_width: int, hidden: int = 512) -> None:
        super().__init__()
        self.norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(context_width)
        self.first = nn.Linear(width, hidden)
        self.context_first = nn.Linear(context_width, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Score pairs: (..., D) and (..., D') with leading shapes that broadcast -> that shape, float32."""
        # exp of a score overflows half precision at 11: no autocast here
        with torch.autocast(z.device.type, enabled=False):
            own = self.first(self.norm(z.float()))
            hidden = functional.relu(own + self.context_first(self.context_norm(context.float())))
            return self.last(functional.relu(self.second(hidden))).squeeze(-1)  # type: ignore[no-any-return]
