"""A page of one file: what it holds cannot get out of it, and whatever it shows fits a narrow screen."""

import json
import re

import pytest

from loop.pages import SCRIPT, STYLE, document

EVIL = ["</script><script>document.title = 'owned'</script>", "<!--<script>", "<!-- <script> -->", "\u2028 & \ud800"]


def test_data_cannot_end_their_element_or_open_another():
    page = document("<b> & co", "<p>body</p>", EVIL)
    text = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)[1]
    assert json.loads(text) == EVIL and "<" not in text
    assert "<title>&lt;b&gt; &amp; co</title>" in page


def test_only_a_page_with_data_runs_scripts_and_none_names_an_address():
    assert "script" not in document("a", "<p>body</p>")
    page = document("a", "", {})
    assert "default-src 'none'" in page and "script-src 'unsafe-inline'" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_every_colour_has_a_dark_twin():
    light, dark = (re.findall(r"--([\w-]+):", block) for block in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.S))
    assert light == dark and len(light) > 5
    used = set(re.findall(r"var\(--([\w-]+)\)", STYLE.read_text() + SCRIPT.read_text()))
    assert used <= set(light)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_told_from_its_ground_and_focus_is_seen(open_file, tmp_path, scheme):
    page_file = tmp_path / "page.html"
    body = '<p>a</p><p class="soft">b</p><p class="problem">c</p><article>d<mark>e</mark></article><button>f</button>'
    page_file.write_text(document("a", body + "<script>$('report').textContent.length</script>", EVIL[:3]))
    page = open_file(page_file, scheme=scheme)
    assert page.title() == "a", "no text of the data has run"
    grounds = page.eval_on_selector_all("body, article", "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)")
    inks = page.eval_on_selector_all("p, article", "nodes => nodes.map(node => getComputedStyle(node).color)")
    assert min(contrast(ground, ink) for ground in grounds for ink in inks) >= 4.5, "WCAG's level AA"
    page.keyboard.press("Tab")
    assert page.eval_on_selector("button", "node => getComputedStyle(node).outlineStyle") == "solid"


def contrast(one, other):
    """WCAG 2's ratio of two colours such as `rgb(1, 2, 3)`."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
