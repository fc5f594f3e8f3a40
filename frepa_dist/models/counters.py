"""What is counted while tensors are computed, real ones or fake ones: operations, and bytes alive."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of storages that operations make, until they are freed.

    Attributes:
        live: bytes alive now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made; views and results in place share a known storage."""
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return

        def forget(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def create_counter() -> FlopCounterMode:
    """A counter of operations; torch's own takes grouped convolutions for dense ones in the backward pass."""
    backward = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=backward)


def _convolution_backward_flops(
    out_gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """Each gradient of a convolution, to its input or its weight, takes as much as the forward pass.

    Args:
        out_gradient: shape (B, C_out, ...).
        x: shape (B, C_in, ...).
        weight: shape (C_out, C_in / groups, ...), of a transposed one (C_in, C_out / groups, ...).
        others: bias, stride, padding, dilation, transposed, output padding, groups, which gradients.
    """
    transposed, wanted = others[4], others[7]
    places = x if transposed else out_gradient
    return int(2 * math.prod(places) * math.prod(weight[1:]) * sum(wanted[:2]))
