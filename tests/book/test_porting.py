"""The page for those who come from another library names all that is public there."""

import ast
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = set(re.findall(r"\w+", (ROOT / "book" / "porting.md").read_text(encoding="utf-8")))


def public_names(package):
    """Functions and classes of all modules of a package, read and not imported."""
    found = set()
    for path in Path(find_spec(package).submodule_search_locations[0]).rglob("*.py"):
        if "legacy" not in path.parts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in their docstrings
                parts = ast.parse(path.read_text(encoding="utf-8")).body
            found |= {part.name for part in parts if isinstance(part, ast.FunctionDef | ast.ClassDef)}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("package, known", [("deel.torchlip", "SpectralLinear"), ("orthogonium", "AOLConv2D")])
def test_every_public_name_of_the_peers_is_on_the_page(package, known):
    names = public_names(package)
    assert known in names and len(names) > 60
    assert not names - NAMED
