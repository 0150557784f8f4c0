"""A chapter runs again when something that it depends on changes, and not otherwise."""

import pytest

from lipguide.book.staleness import PACKAGE, chapter_key, modules_behind, records_read


def names(code):
    return {p.name for p in modules_behind(code)}


@pytest.mark.parametrize(
    "code, inside, outside",
    [
        ("import lipguide as lip\nlip.GroupSort2()", {"activations.py"}, {"affine.py"}),
        ("import lipguide as lip\nlip.spectral", {"affine.py", "constraints.py", "norms.py"}, {"activations.py"}),
        ("from lipguide.layers.norms import conv_norm", {"norms.py"}, {"affine.py"}),
        ("from lipguide import spectral", {"affine.py", "norms.py"}, {"activations.py"}),
        ("import lipguide.layers.norms", {"norms.py"}, {"affine.py"}),
        ("from lipguide.book.ledger import Ledger", {"ledger.py"}, {"norms.py"}),
        ("import torch", set(), {"affine.py"}),
    ],
)
def test_only_the_modules_behind_the_code_count(code, inside, outside):
    found = names(code)
    assert inside <= found and not (outside & found)


def test_a_name_that_cannot_be_traced_counts_for_everything():
    assert names("import lipguide as lip\nlip.surprise") == {p.name for p in PACKAGE.rglob("*.py")}


def test_each_ingredient_changes_the_key():
    base = ("import lipguide as lip\nlip.spectral", "text", {"profile": "quick", "seed": 0}, "lock")
    variants = [
        ("import torch", *base[1:]),
        (base[0], "other text", *base[2:]),
        (*base[:2], {"profile": "full", "seed": 0}, "lock"),
        (*base[:3], "other lock"),
    ]
    keys = {chapter_key(*v) for v in [base, *variants]}
    assert len(keys) == 5 and chapter_key(*base) == chapter_key(*base)


@pytest.mark.parametrize("reads", ["read('results/study.cpu.json')", "read(f'results/{name}.cpu.json')"])
def test_a_new_record_makes_the_chapters_that_read_it_stale(tmp_path, reads):
    """Those that read it by its name or by a pattern, and no other."""

    def keys():
        codes = (f"from lipguide.book.ledger import read\n{reads}", "from lipguide.book.ledger import read\nread(path)")
        return [chapter_key(code, "text", {}, "lock", records_read(code, tmp_path)) for code in codes]

    (tmp_path / "results").mkdir()
    record = tmp_path / "results" / "study.cpu.json"
    record.write_text("{}")
    (tmp_path / "results" / "other.quick.json").write_text("{}")
    first = keys()
    (tmp_path / "results" / "other.quick.json").write_text("[]")
    assert keys() == first
    record.write_text("[]")
    reader, other = keys()
    assert reader != first[0] and other == first[1]
