"""The slider over ε: a still picture without its script, and with it what belongs to the position."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from lipguide.book.slider import boxed, held, slider
from tests.book.browser import chromium

STATIC = Path(__file__).resolve().parents[2] / "book" / "_static"
GRID = [0.0, 0.1, 0.2, 0.4]


def scene(radii):
    return boxed(torch.rand(3, 6, 8), [[0.1, 0.1, 0.4, 0.9]] * len(radii), radii, range(len(radii)))


def states(page):
    return re.findall(r'<g class="(\w+)" data-until', page)


@pytest.mark.parametrize("seed", range(5))
def test_a_box_holds_below_its_radius_and_not_at_it(seed):
    generator = torch.Generator().manual_seed(seed)
    radii = torch.rand(6, generator=generator, dtype=torch.float64) * 0.5
    radii[0], radii[1] = -1.0, GRID[2]
    drawing = scene(radii)
    for eps in GRID:
        kept = [radius > eps for radius in radii.tolist()]
        assert held(drawing, eps) == (sum(kept), 6)
        shown = states(slider(GRID, pictures={"scene": drawing}, start=eps)._repr_html_())
        assert [state == "kept" for state in shown] == kept


def test_a_radius_is_written_rounded_down():
    assert ">0: 0.19</text>" in scene([0.199]) and ">0: 0.00</text>" in scene([-0.5])


def test_the_still_picture_is_that_of_its_start():
    frames = [torch.full((3, 2, 2), eps) for eps in GRID]
    rows = [{"certified": 90.0 - 100 * eps, "above": 150.0} for eps in GRID]
    page = slider(GRID, rows, {"frame": frames}, start=0.2, digits=1)._repr_html_()
    shown = [image for image in re.findall(r"<img [^>]*>", page) if "hidden" not in image]
    assert len(shown) == 1 and 'data-at="2"' in shown[0]
    assert "width:70.0%" in page and "width:100.0%" in page  # a bar does not leave its rail
    assert "ε = 0.20: certified 70.0 %, above 150.0 %" in page
    assert page.count("<tr>") == 1 + len(GRID)  # the table of all positions


def test_names_are_escaped():
    page = slider([0.0], [{"a < b": 1.0}], {"<i>": [torch.zeros(3, 1, 1)]}, start=0.0)._repr_html_()
    assert "<i>" not in page and "a < b" not in page


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": [{"a": 1.0}]}, "rows: 1 for 4 positions"),
        ({"pictures": {"p": [torch.zeros(3, 1, 1)] * 3}}, "p: 3 for 4 positions"),
        ({"rows": []}, "rows or pictures"),
        ({"pictures": {"p": "<svg>"}, "start": 0.3}, "start=0.3 is none"),
        ({"pictures": {"p": "<svg>"}, "epsilons": [0.2, 0.1, 0.3, 0.4], "start": 0.2}, "should rise"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        slider(**{"epsilons": GRID, "start": 0.1} | arguments)
    with pytest.raises(ValueError, match="1 boxes, 2 radii and 1 names"):
        boxed(torch.zeros(3, 2, 2), [[0, 0, 1, 1]], [0.1, 0.2], ["a"])


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_the_script_moves_everything(tmp_path):
    frames = [torch.full((3, 2, 2), eps) for eps in GRID]
    rows = [{"certified": 90.0 - 100 * eps} for eps in GRID]
    made = slider(GRID, rows, {"scene": scene([0.3, 0.5]), "frame": frames}, start=0.1)
    move = """addEventListener("DOMContentLoaded", () => {
      const knob = document.querySelector("input");
      knob.value = 3;
      knob.dispatchEvent(new Event("input"));
    });"""
    scripts = f"<script>{(STATIC / 'slider.js').read_text()}</script><script>{move}</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{scripts}{made._repr_html_()}")
    options = f"--headless --no-sandbox --disable-gpu --dump-dom --user-data-dir={tmp_path / 'profile'}".split()
    command = [chromium(), *options, (tmp_path / "page.html").as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert states(page) == ["lost", "kept"]
    assert [re.search(r'data-at="(\d)"', i)[1] for i in re.findall(r"<img [^>]*>", page) if "hidden" not in i] == ["3"]
    says = "ε = 0.40: certified 50 %, 1 of 2 boxes certified"
    assert f'aria-valuetext="{says}"' in page and f'<p class="epsilon-says">{says}</p>' in page
    assert "width: 50%" in page and '<span class="value">50 %</span>' in page
    assert re.search(r'<label class="epsilon-knob">', page)  # no longer hidden
