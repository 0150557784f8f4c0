"""What `import lipguide` offers, and what it does not load for it."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import lipguide as lip

ROOT = Path(lip.__file__).parent
# What only the book, the data, the tasks or the metrics need.
HEAVY = ["IPython", "PIL", "h5py", "matplotlib", "papermill", "pycocotools", "safetensors", "scipy", "sphinx"]
HEAVY += ["torchmetrics", "torchvision", "tqdm"]


def loaded(code: str, after: str) -> set[str]:
    """The top-level modules that some code loads in a fresh interpreter, after other code."""
    report = "print(*{name.split('.')[0] for name in sys.modules if name not in before})"
    code = f"{after}; import sys; before = set(sys.modules)\n{code}\n{report}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_alone_loads_nothing_but_the_standard_library():
    others = loaded("import lipguide as lip; dir(lip)", after="import importlib, typing, __future__")
    assert "lipguide" in others and others <= {"lipguide", *sys.stdlib_module_names}


def test_a_layer_and_its_bound_load_nothing_beside_torch():
    code = "import lipguide as lip; lip.lipschitz_bound(lip.spectral(torch.nn.Linear(2, 2)).eval(), (2,))"
    added = loaded(code, after="import torch")
    assert "lipguide" in added and not added & set(HEAVY)


def test_every_name_is_what_its_module_defines():
    for name in lip.__all__:
        assert getattr(lip, name) is getattr(lip, name)
    assert set(lip.__all__) <= set(dir(lip))


def test_editors_are_told_what_is_there():
    """Type checkers read the imports under TYPE_CHECKING; `__getattr__` does the same from its tables."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {}
    for line in block.body:
        for name in line.names:
            inner = f"{line.module}.{name.name}"
            told[name.name] = inner if importlib.util.find_spec(line.module) and _is_module(inner) else line.module
    assert told == lip._HOMES | lip._ROOMS


def _is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").exists()


def test_no_name_is_that_of_another_module_at_the_root():
    """`import lipguide.x` binds `lipguide.x`: a function of that name would be gone, depending on what ran before."""
    for name in lip._HOMES:
        assert not _is_module(f"lipguide.{name}"), name
    for name, module in lip._ROOMS.items():
        assert not _is_module(f"lipguide.{name}") or module == f"lipguide.{name}"


@pytest.mark.parametrize(
    "code",
    [
        "from lipguide import spectral; spectral.__module__ == 'lipguide.layers.affine' or exit(1)",
        "from lipguide import *; GroupSort2; losses.HKR",
        "import lipguide.layers.export, lipguide; lipguide.export.__call__; lipguide.layers.export.export",
        "from lipguide import metrics; metrics.__name__ == 'lipguide.robustness.metrics' or exit(1)",
    ],
)
def test_every_way_to_import_a_name_works_first_thing(code, forked, tmp_path):
    done = forked.run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="'lipguide' has no attribute 'spektral'"):
        lip.spektral  # noqa: B018
