"""One self-contained HTML page: headings, text, tables, images and figures, nothing loaded from elsewhere.

Every text is escaped. Figures become inline SVG whose black takes the page's text color, so that they
read in light and dark; images become PNG data URIs. The same content gives the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.support.errors import EnvironmentFault

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The browser itself then refuses anything that is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --soft: #57606a; --ground: #ffffff; --panel: #f5f6f8;
  --line: #d5d9df; --accent: #0b5cad; --note: #fff6dd; --note-line: #d9a400; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa4b0; --ground: #15181d;
  --panel: #1e2228; --line: #363c45; --accent: #76b3f5; --note: #2d2814; --note-line: #b08a1e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; color: var(--text);
  background: var(--ground); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .6rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.subtitle { color: var(--soft); margin: 0; }
nav { margin: 1.4rem 0 0; padding: .7rem 1rem; background: var(--panel); border-radius: .4rem; }
nav ol { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: 0; padding: 0; list-style: none; }
.note { max-width: 46rem; margin: 1rem 0; padding: .7rem 1rem; background: var(--note);
  border-left: .25rem solid var(--note-line); border-radius: .2rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.1rem .38rem 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.2rem 0; }
figure img, figure svg { display: block; max-width: 100%; height: auto; }
figure svg { fill: currentColor; }
figure img { border-radius: .2rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; max-width: 46rem;
  overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
.gallery.fixed { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); margin: 1.2rem 0; }
.gallery figure { margin: 0; }
.gallery img, .gallery svg { width: 100%; }
@media (max-width: 42rem) { .gallery.fixed { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
pre { background: var(--panel); border-radius: .4rem; padding: .8rem 1rem; overflow: auto;
  max-height: 32rem; font-size: .85rem; line-height: 1.45; }
@media print { pre { max-height: none; } .scroll { overflow: visible; } table { font-size: .72rem; } }
"""


class Page:
    """A page that is put together from top to bottom, then written.

    Args:
        title: the page's title and first heading.
        subtitle: one line below the title.
        refresh_seconds: how often a browser that shows the page reads it again; None: never.
    """

    def __init__(self, title: str, subtitle: str = "", refresh_seconds: float | None = None) -> None:
        self._title, self._subtitle, self._refresh_seconds = title, subtitle, refresh_seconds
        self._parts: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._anchors: set[str] = set()
        self._num_figures = 0

    def heading(self, text: str, anchor: str | None = None, *, level: int = 2) -> None:
        """Start a section (`level` 2, listed in the contents) or a part of one (3).

        Args:
            text: the heading.
            anchor: name for links; by default made of the text, made unique by a number.
            level: 2 or 3.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", (anchor or text).lower()).strip("-") or "section"
        name, num = slug, 1
        while name in self._anchors:
            num += 1
            name = f"{slug}-{num}"
        self._anchors.add(name)
        if level == 2:
            self._contents.append((name, text))
        self._parts.append(f'<h{level} id="{name}">{html.escape(text)}</h{level}>')

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a paragraph that must not be overlooked."""
        self._parts.append(f'<p class="note" role="note">{html.escape(text)}</p>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; a column whose every cell is a number is set flush right.

        Args:
            columns: the titles; without any text in them there is no head.
            rows: the cells.

        Raises:
            ValueError: a row is not as long as `columns`.
        """
        classes = []
        for column in range(len(columns)):
            cells = [row[column] for row in rows if len(row) == len(columns)]
            numeric = bool(cells) and all(isinstance(c, (int, float, np.number)) for c in cells)
            classes.append(' class="number"' if numeric else "")
        head = "".join(f"<th{c}>{html.escape(str(t))}</th>" for c, t in zip(classes, columns, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{c}>{html.escape(_cell(v))}</td>" for c, v in zip(classes, row, strict=True))
            + "</tr>\n"
            for row in rows
        )
        head = f"<thead><tr>{head}</tr></thead>\n" if any(columns) else ""
        self._parts.append(f'<div class="scroll"><table>\n{head}<tbody>\n{body}</tbody></table></div>')

    def image(self, array: NDArray[np.uint8], caption: str = "", max_width: int | None = None) -> None:
        """Add an image (H, W) or (H, W, 3) of uint8; `max_width` in CSS pixels."""
        self._parts.append(_image_figure(array, caption, max_width))

    def gallery(
        self, items: Sequence[tuple[NDArray[np.uint8] | Figure, str]], *, columns: int | None = None
    ) -> None:
        """Add small images or figures with captions, side by side.

        Args:
            items: images or figures, each with its caption.
            columns: how many to a row, two in a narrow window; None: as many as the window's width allows.
        """
        cells = "\n".join(
            _image_figure(item, caption, None) if isinstance(item, np.ndarray) else self._svg(item, caption)
            for item, caption in items
        )
        style = f' fixed" style="--columns:{int(columns)}"' if columns else '"'
        self._parts.append(f'<div class="gallery{style}>\n{cells}\n</div>')

    def figure(self, figure: Figure, caption: str = "") -> None:
        """Add a Matplotlib figure as inline SVG on a transparent ground."""
        self._parts.append(self._svg(figure, caption))

    def _svg(self, figure: Figure, caption: str) -> str:
        import matplotlib as mpl  # 0.3 s that a page without figures need not pay

        self._num_figures += 1
        buffer = io.StringIO()
        # The salt keeps ids (clip paths, markers) apart between figures and alike between two writings.
        with mpl.rc_context({"svg.hashsalt": f"figure-{self._num_figures}"}):
            figure.savefig(
                buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
            )
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
        label = html.escape(caption or f"figure {self._num_figures}", quote=True)
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        return f"<figure>{svg}{_caption(caption)}</figure>"

    def code(self, text: str, caption: str = "") -> None:
        """Add preformatted text."""
        self._parts.append(f"<figure><pre>{html.escape(text)}</pre>{_caption(caption)}</figure>")

    def render(self) -> str:
        """Return the whole page as HTML."""
        title = html.escape(self._title)
        subtitle = f'<p class="subtitle">{html.escape(self._subtitle)}</p>\n' if self._subtitle else ""
        items = "".join(f'<li><a href="#{name}">{html.escape(t)}</a></li>' for name, t in self._contents)
        refresh = ""
        if self._refresh_seconds is not None:
            refresh = f'<meta http-equiv="refresh" content="{max(1, round(self._refresh_seconds))}">\n'
        contents = f'<nav aria-label="Contents"><ol>{items}</ol></nav>\n' if len(self._contents) > 1 else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f'{refresh}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<header>\n<h1>{title}</h1>\n{subtitle}</header>\n{contents}<main>\n"
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page; a reader sees the old file or the new one, never half of it.

        Raises:
            EnvironmentFault: the file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.render(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise EnvironmentFault(
                f"the page cannot be written: {error.strerror}", where=path, fix="choose another place"
            ) from error


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


def _image_figure(array: NDArray[np.uint8], caption: str, max_width: int | None) -> str:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"an image is uint8 (H, W) or (H, W, 3), not {array.dtype} {array.shape}")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = array.shape[:2]
    style = f' style="width:100%;max-width:{int(max_width)}px"' if max_width else ""
    alt = html.escape(caption or "image", quote=True)
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}"'
        f' alt="{alt}"{style}>{_caption(caption)}</figure>'
    )
