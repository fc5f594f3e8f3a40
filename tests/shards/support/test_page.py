"""The page is one file, escapes what it is given, and links to what exists."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from shards.support.errors import EnvironmentFault
from shards.support.page import Page

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "path", "use", "rect"}


class Reader(HTMLParser):
    """Collects tags, ids, links and text, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.body: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.body.append(data)


def parse(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def figure(label: str) -> Figure:
    made = Figure(figsize=(3, 2))
    axes = made.add_subplot()
    axes.plot([0, 1], [0, 1], "o-")
    axes.set_title(label)
    return made


def full_page(text: str) -> Page:
    page = Page(text, text)
    page.heading(text)
    page.heading(text, level=3)
    page.text(text)
    page.note(text)
    page.table([text, "n"], [[text, 1], [None, 2.5]])
    page.image(np.zeros((4, 5), np.uint8), text, max_width=80)
    page.gallery([(np.zeros((4, 5, 3), np.uint8), text)] * 2)
    page.gallery([(np.zeros((4, 5, 3), np.uint8), text), (figure(text), text)], columns=2)
    page.figure(figure(text), text)
    page.code(text, text)
    page.heading("Second")
    return page


def test_every_text_is_escaped():
    reader = parse(full_page(EVIL).render())
    assert "script" not in reader.tags
    assert "".join(reader.body).count(EVIL) >= 12


def test_nothing_is_loaded_from_elsewhere():
    text = full_page("plain").render()
    for link in parse(text).links:
        assert link.startswith(("#", "data:image/png;base64,")), link
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_contents_lead_to_sections_and_equal_headings_keep_their_own_anchor():
    page = Page("t")
    for _ in range(3):
        page.heading("Loss & more")
    page.heading("a part", level=3)
    reader = parse(page.render())
    targets = [link[1:] for link in reader.links]
    assert targets == ["loss-more", "loss-more-2", "loss-more-3"]
    assert set(targets) <= set(reader.ids)


def test_images_keep_their_pixels():
    array = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    page = Page("t")
    page.image(array)
    (link,) = [link for link in parse(page.render()).links if link.startswith("data:")]
    decoded = Image.open(io.BytesIO(base64.b64decode(link.split(",")[1])))
    np.testing.assert_array_equal(np.asarray(decoded), array)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)])
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match="uint8"):
        Page("t").image(array)


def test_numbers_are_set_right_and_rows_must_fit():
    page = Page("t")
    page.table(["name", "value"], [["a", 0.123456], ["b", 12]])
    text = page.render()
    assert '<td class="number">0.1235</td>' in text
    assert "<td>a</td>" in text
    with pytest.raises(ValueError, match="shorter"):
        page.table(["name", "value"], [["a"]])


def test_figures_are_vector_take_the_text_color_and_share_no_clip_path():
    page = Page("t")
    page.figure(figure("one"))
    page.figure(figure("two"))
    text = page.render()
    assert text.count("<svg") == 2
    assert "currentColor" in text
    assert "#000000" not in text
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)) > 0


def test_same_content_same_bytes(tmp_path):
    full_page("x").write(tmp_path / "new" / "a.html")
    full_page("x").write(tmp_path / "new" / "b.html")
    assert (tmp_path / "new" / "a.html").read_bytes() == (tmp_path / "new" / "b.html").read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.html", "b.html"]


def test_a_place_that_cannot_be_written_is_an_error_for_people(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        Page("t").write(tmp_path / "file" / "a.html")
