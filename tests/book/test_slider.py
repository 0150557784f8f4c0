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
    assert re.findall(r'<span data-at="(\d)">', page) == ["2"] and page.count(" hidden><img") == len(GRID) - 1
    assert "width:70.0%" in page and "width:100.0%" in page  # a bar does not leave its rail
    assert "ε = 0.20: certified 70.0 %, above 150.0 %" in page and ">ε = 0.20</p>" in page
    assert page.count("<tr>") == 1 + len(GRID)  # the table of all positions


def test_a_frame_can_be_a_drawing_whose_boxes_stay():
    frames = [boxed(torch.rand(3, 6, 8), [[0.1, 0.1, 0.4, 0.9]] * count, None, range(count)) for count in (3, 2, 1, 0)]
    made = slider(GRID, [{"mAP": 50.0}] * 4, {"detected": frames}, start=0.1)
    assert made.says[0] == "ε = 0.00: mAP 50 %"
    assert made._repr_html_().count("<text") == 6 and not states(made._repr_html_())


def test_positions_keep_their_decimals():
    shown = slider([0.0, 1 / 8, 0.5], [{"a": 1.0}] * 3, start=1 / 8)
    assert shown.says == ["ε = 0.000: a 1 %", "ε = 0.125: a 1 %", "ε = 0.500: a 1 %"] and "0.125" in repr(shown)


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
    assert re.findall(r'<span data-at="(\d)">', page) == ["3"]
    assert 'aria-valuetext="ε = 0.40: 1 of 2 boxes certified, certified 50 %"' in page
    assert '<p class="epsilon-says">ε = 0.40: 1 of 2 boxes certified</p>' in page
    assert "width: 50%" in page and '<span class="value">50 %</span>' in page
    assert re.search(r'<label class="epsilon-knob">', page)  # no longer hidden
