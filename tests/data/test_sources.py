"""The key of what is kept: it follows what code says, and not how it is written down."""

from __future__ import annotations

import pytest

from lipguide.data.sources import hash_of, meaning

CODE = '''"""A module."""

def half(x):
    """Half of x."""
    return x / 2
'''


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("A module.", "Another text."),
        CODE.replace("Half of x.", "x over two."),
        CODE.replace("x / 2", "(x / 2)  # exact"),
        CODE.replace("    ", "  ").replace('"""A module."""', ""),
    ],
    ids=["docstring of the module", "docstring of the function", "comment and brackets", "layout"],
)
def test_an_edited_comment_costs_nobody_a_remake(other, tmp_path):
    assert other != CODE and meaning(other) == meaning(CODE)
    for name, text in (("a", CODE), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.py").write_text(text)
    assert hash_of([tmp_path / "a" / "half.py"]) == hash_of([tmp_path / "b" / "half.py"])


@pytest.mark.parametrize("change", [("x / 2", "x / 3"), ("x / 2", "x // 2"), ("half", "third")])
def test_another_meaning_is_another_hash(change):
    assert meaning(CODE.replace(*change)) != meaning(CODE)


def test_a_text_that_is_used_is_no_docstring():
    assert meaning("x = 'a'") != meaning("x = 'b'")
    assert meaning("def f():\n  return 'a'") != meaning("def f():\n  return 'b'")


def test_of_other_files_every_byte_counts(tmp_path):
    path = tmp_path / "figures.json"
    hashes = set()
    for text in ("{}", "{ }"):
        path.write_text(text)
        hashes.add(hash_of([path]))
    assert len(hashes) == 2
