"""Words and the edges of fields are told from what is behind them: WCAG 2.2's contrast, in light and dark."""

import re
from pathlib import Path

import pytest

from gui import page

CSS = (page.STATIC / "page.css").read_text(encoding="utf-8")
SOFT = ("accent", "red", "amber", "green")
PAIRS = [
    *((words, behind) for words in ("text", "muted", "accent", "red", "amber", "green") for behind in ("card", "page")),
    *((words, f"{words}-soft") for words in SOFT),
    *(("text", f"{behind}-soft") for behind in SOFT),
    *(("text", behind) for behind in ("grid", "edge-soft")),
    ("muted", "grid"),
    *(("card", behind) for behind in ("red", "amber")),
    ("mark", "card"),
]


def colours(selector):
    block = re.search(re.escape(selector) + r" \{(.*?)\n\}", CSS, re.DOTALL)[1]
    return dict(re.findall(r"--lw-([\w-]+): #(\w{6,8});", block))


def channels(colour, behind=(255, 255, 255), opacity=1.0):
    """Red, green and blue of #rrggbb or #rrggbbaa laid over another colour."""
    parts = [int(colour[i : i + 2], 16) for i in range(0, len(colour), 2)]
    share = opacity * (parts[3] / 255 if len(parts) > 3 else 1)
    return [share * own + (1 - share) * other for own, other in zip(parts, behind, strict=False)]


def luminance(colour):
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05), the lighter first."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_measure_is_that_of_wcag():
    assert contrast(channels("000000"), channels("ffffff")) == pytest.approx(21)
    assert contrast(channels("767676"), channels("ffffff")) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_is_told_from_what_is_behind_it(scheme):
    table = colours(":root") | (colours(".dark") if scheme == "dark" else {})
    card = channels(table["card"])
    low = {}
    for words, behind in PAIRS:
        ground = channels(table[behind], card)
        low[words, behind] = contrast(channels(table[words], ground), ground)
    for styles in ("page.css", "tools.css"):
        opacity = float(re.search(r"::placeholder .*?opacity: ([\d.]+)", Path(page.STATIC / styles).read_text())[1])
        low["placeholder", styles] = contrast(channels(table["muted"], card, opacity), card)
    for fixed in re.findall(r"lw-(?:primary|danger) \{ background: #(\w{6});", CSS):
        low["white", fixed] = contrast(channels("ffffff"), channels(fixed))
    assert {pair: round(value, 2) for pair, value in low.items() if value < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_edge_of_an_empty_field_is_told_from_what_is_around_and_in_it(scheme):
    table = colours(":root") | (colours(".dark") if scheme == "dark" else {})
    around = {ground: contrast(channels(table["field"]), channels(table[ground])) for ground in ("card", "page")}
    assert min(around.values()) >= 3, around
    fields = re.findall(r"([^{}]*)\{[^{}]*border(?:-color)?: (?:1px solid )?var\(--lw-(field|edge)\)", CSS)
    edges = {
        selector.split("*/")[-1].strip(): edge
        for selector, edge in fields
        if re.search(r"input|caption|textarea", selector)
    }
    assert len(edges) >= 4 and set(edges.values()) == {"field"}, edges
