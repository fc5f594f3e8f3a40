"""Time the losses: the hierarchical frequency loss by an FFT of the difference against those of the images.

    python tools/bench_losses.py [--size 512] [--batch 4] [--runs 7]

The plain way filters prediction and target one by one: for each of five cut-offs two FFTs and two inverse
ones. Both ways run in float32, in turn, in one process, forward and backward, and forward alone; medians are
printed with the difference of their values. The input channel and the other losses are timed beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from frepa_dist.losses import (
    HFL_CUTOFFS,
    focal_frequency_loss,
    gradient_l1,
    hierarchical_frequency_loss,
    rmse,
)
from frepa_dist.models.response import InputChannelConfig, append_input_channel
from frepa_dist.spectrum import radial_frequency


def plain_hfl(pred: Tensor, target: Tensor) -> Tensor:
    """Five cut-offs, four complex transforms each; the filters are kept."""
    total = pred.new_zeros(())
    for gain in plain_gains(pred.shape[-1], pred.device):
        high = [torch.fft.ifft2(torch.fft.fft2(image) * gain).real for image in (pred, target)]
        total = total + (high[0] - high[1]).abs().mean()
    return total


GAINS: dict[tuple[int, torch.device], list[Tensor]] = {}


def plain_gains(size: int, device: torch.device) -> list[Tensor]:
    """Five filters over the whole spectrum, kept: the comparison is about transforms."""
    if (size, device) not in GAINS:
        rho2 = radial_frequency(size, device).square()
        GAINS[size, device] = [1 - torch.exp(-rho2 / cutoff**2) for cutoff in HFL_CUTOFFS]
    return GAINS[size, device]


def measure(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    target = torch.rand(shape, device=device)
    pred = torch.rand(shape, device=device, requires_grad=True)

    @torch.no_grad()
    def forward(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return loss(pred, target)

    def train(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(pred, target), pred)

    def channel(config: InputChannelConfig) -> Callable[[], object]:
        return lambda: append_input_channel(target, config)

    steps = {
        "hfl, 20 FFTs": train(plain_hfl),
        "hfl, one FFT of the difference": train(hierarchical_frequency_loss),
        "hfl, 20 FFTs, forward": lambda: forward(plain_hfl),
        "hfl, one FFT, forward": lambda: forward(hierarchical_frequency_loss),
        "focal frequency": train(focal_frequency_loss),
        "gradient": train(gradient_l1),
        "rmse": train(rmse),
        "input channel: response": channel(InputChannelConfig()),
        "input channel: frangi": channel(InputChannelConfig(kind="frangi")),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(arguments.runs + 1):
        for name, step in steps.items():
            seconds = measure(step, device)
            if run:  # the first one makes filters and plans
                times[name].append(seconds)
    with torch.no_grad():
        apart = float(hierarchical_frequency_loss(pred, target) / plain_hfl(pred, target) - 1)
    print(f"{device}, {arguments.threads} threads, batch {shape}, median of {arguments.runs}")
    for name, seconds_of in times.items():
        print(f"{name:34} {1e3 * statistics.median(seconds_of) / arguments.batch:9.3f} ms an image")
    plain, ours, plain_forward, our_forward = (statistics.median(times[name]) for name in list(steps)[:4])
    print(
        f"hfl: {plain / ours:.2f} times as fast, {plain_forward / our_forward:.2f} times forward; "
        f"values differ by {apart:.1e} of the value"
    )


if __name__ == "__main__":
    main()
