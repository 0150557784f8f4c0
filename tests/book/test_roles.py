"""Numbers from a ledger read as people write them."""

import pytest
from docutils import nodes
from docutils.utils import new_document

from lipguide.book.roles import keep_units
from lipguide.book.tables import readable


def rendered(*parts):
    paragraph = nodes.paragraph()
    for part in parts:
        paragraph += nodes.inline(part[0], part[0], classes=["ledger"]) if isinstance(part, list) else nodes.Text(part)
    document = new_document("page")
    document += paragraph
    keep_units(document)
    return paragraph.astext()


@pytest.mark.parametrize("unit", ["%", "ms", "s", "min", "MiB", "points"])
@pytest.mark.parametrize("gap", [" ", "\n"])
def test_no_line_breaks_between_a_number_and_its_unit(unit, gap):
    assert rendered("reads ", ["66"], f"{gap}{unit} of them") == f"reads 66\u00a0{unit} of them"


def test_words_are_no_units():
    assert rendered(["66"], " steps") == "66 steps"
    assert rendered(["66"], " of ", ["70"]) == "66 of 70"
    assert rendered("a ", ["66"]) == "a 66"


@pytest.mark.parametrize(
    "value, form", [(3.21e-19, ".0e"), (-4.5e7, ".1e"), (0.5, ".2f"), (-0.5, ".2f"), (12345, ",d")]
)
def test_a_readable_number_is_the_same_number(value, form):
    text = readable(format(value, form))
    assert "e" not in text
    digits, _, power = text.replace("−", "-").replace(",", "").partition("·10")
    back = float(digits) * 10.0 ** int((power or "⁰").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    assert back == pytest.approx(value, rel=0.1)
