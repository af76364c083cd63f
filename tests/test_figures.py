"""Figures of however few and however many images and networks: every word of theirs lies on the paper, and none on another."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from art_saliency.evaluation import figures_report as draw
from art_saliency.evaluation.figures import saliency_panel
from art_saliency.evaluation.figures_maps import maps_panel
from art_saliency.threat import ThreatModel

TITLE = "adv-gsct: digits, Linf eps 0.2, PGD-20, and whatever else a title has to say"
CLASSES = ("automobile", "Chesapeake Bay retriever")


@pytest.fixture
def figures(monkeypatch):
    """:return: The figures that were saved."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
    return kept


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def images(count):
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, (x + 0.1).clamp(0, 1), torch.arange(count) % 2


def row(accuracy):
    return {"accuracy": accuracy, "interval_95": [max(0, accuracy - 0.04), min(1, accuracy + 0.04)]}


def panel(count, path):
    saliency_panel(network(), *images(count), path, title=TITLE)


def panel_of_named_classes(count, path):
    saliency_panel(network(), *images(count), path, title=TITLE, classes=CLASSES * 5)


def maps(count, path):
    x, x_adv, y = images(count)
    names = [f"image {n}" for n in range(count)]
    maps_panel(
        network(), x, x_adv, y, {"loss-gradient": (x, x_adv)}, path, title=TITLE, names=names, classes=CLASSES * 5
    )


def surface(count, path):
    x, _, y = images(count)
    draw.loss_surface_figure(network(), x, y, path, threat=ThreatModel("Linf", 0.1), title=TITLE)


def waterfall(count, path):
    names = ("clean", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "adaptive, of one's own")
    draw.waterfall({name: row(0.9 - 0.1 * place) for place, name in enumerate(names[:count])}, path, title=TITLE)


def radii(count, path):
    curves = {f"network {n}": {eps: row(0.9 - eps) for eps in (0, 0.05, 0.1, 0.2, 0.4, 0.8)} for n in range(count)}
    draw.accuracy_curve(curves, path, title=TITLE, label="Linf eps", marked=0.2)


def steps(count, path):
    curves = {f"network {n}": {k: row(0.9 - k / 200) for k in (1, 2, 5, 10, 20, 50, 100)} for n in range(count)}
    draw.accuracy_curve(curves, path, title=TITLE, label="PGD steps", logarithmic=True)


def bars(count, path):
    measures = ("clean", "PGD-20", "AutoAttack", "transferred attacks, worst of all")
    networks = {f"adv-gsct, seed {n}": {measure: row(0.5) for measure in measures} for n in range(count)}
    draw.side_by_side(networks, path, title=TITLE, measures=measures)


def one_bar(count, path):
    networks = {f"adv-gsct, seed {n}": {"clean": row(0.5)} for n in range(count)}
    draw.side_by_side(networks, path, title=TITLE, measures=["clean"])


def words_of(figure):
    """:return: Each text that is drawn, and the box it takes, in pixels; of a slanted one the box is no measure of its letters."""
    from matplotlib.text import Text

    unseen = set()  # ticks beyond the ends of their axis
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                unseen |= {tick.label1, tick.label2}
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [(text, text.get_window_extent(renderer)) for text in texts if text not in unseen]


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize(
    "drawing", [panel, panel_of_named_classes, maps, surface, waterfall, radii, steps, bars, one_bar]
)
def test_every_word_is_on_the_paper_and_none_on_another(drawing, count, figures, tmp_path):
    drawing(count, tmp_path / "figure.png")
    (figure,) = figures
    words = words_of(figure)
    assert "whatever" in " ".join(text.get_text() for text, _ in words)  # the title, in lines or in one
    beyond = [
        (text.get_text(), box.extents)
        for text, box in words
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    assert not beyond
    upright = [(text.get_text(), box.padded(-1)) for text, box in words if text.get_rotation() in (0, 90)]
    meeting = [(one, two) for (one, a), (two, b) in itertools.combinations(upright, 2) if a.overlaps(b)]
    assert not meeting
