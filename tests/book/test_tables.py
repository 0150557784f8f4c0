"""Tables show each number with the decimals and the unit of its column, and refuse what they do not have."""

import re

import pytest
import torch

from lipguide.book.tables import table


def columns(shown):
    rows = re.findall(r"<tr>(.*?)</tr>", shown._repr_html_())
    return list(zip(*(re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in rows), strict=True))


def test_decimals_stand_under_each_other():
    shown = table([{"time": 0.17366899999160523}, {"time": 12.5}, {"time": torch.tensor(3.0)}], {"time": "ms"})
    assert columns(shown) == [("time (ms)", "0.17", "12.50", "3.00")]
    assert shown._repr_html_().count('class="number"') == 4
    ends = {len(line) for line in repr(shown).splitlines()}
    assert len(ends) == 1  # right-aligned


def test_names_of_several_words_are_shown_as_words():
    shown = table([{"zeros_share": 1.0, "apart_min": 2.0}], {"apart_min": "m"}, {"zeros_share": 0})
    assert shown.heads == ["zeros share", "apart min (m)"]


def test_what_rounding_would_lose_keeps_its_size():
    assert columns(table({"gradient": 3e-19}))[0][1] == "3.0·10⁻¹⁹"
    assert columns(table({"gradient": 0.0}))[0][1] == "0.00"


def test_words_are_escaped_and_stay_on_the_left():
    shown = table({"a < b": {"passes": True}})._repr_html_()
    assert "a &lt; b" in shown and 'class="number"' not in shown
    assert "<th></th>" not in shown  # an empty head is announced as a head without a name


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no column 'speed'; the table has time"):
        table([{"time": 1.0}], units={"speed": "m/s"})
    with pytest.raises(ValueError, match="at least one row"):
        table([])
