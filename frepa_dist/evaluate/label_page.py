"""The page of a label curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from frepa_dist.evaluate.label_curve import LabelCurve
from frepa_dist.evaluate.plots import share_figure
from frepa_dist.evaluate.probe_result import SHOWN
from shards.support.page import Page


def write_curve(curves: Sequence[LabelCurve], out_html: Path) -> None:
    """Write a page with the curves of one or several encoders, one self-contained file.

    Args:
        curves: of the same task.
        out_html: the page.

    Raises:
        EnvironmentFault: the page cannot be written.
    """
    first = curves[0].full
    page = Page("Label efficiency", f"{', '.join(first.classes)}: {sum(first.num_test)} test images")
    if any(curve.full.smoke_test for curve in curves):
        page.note("A smoke test: these labels are not medical, and compare no methods.")
    page.text(
        "Points are means over draws of the training labels, lines reach one standard deviation of the draws "
        "up and down; all labels are one draw. The test images are the same throughout."
    )
    for name in first.measures:
        lines = {
            curve.full.encoder: [(row.share, row.mean(name), row.deviation(name)) for row in curve.rows]
            for curve in curves
        }
        page.figure(share_figure(lines, SHOWN[name]), SHOWN[name])
    for curve in curves:
        page.heading(curve.full.encoder)
        page.code(curve.describe())
    page.write(out_html)
