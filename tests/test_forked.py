"""Code in a child of a process that has imported torch runs as in a process of its own."""

import pytest

DEPRECATED = "import warnings; warnings.warn_explicit('going', DeprecationWarning, 'a.py', 1, module={!r})"


@pytest.mark.parametrize(
    "code, status, out, last",
    [
        ("import sys; print(__name__, sys.argv); print('no', file=sys.stderr)", 0, "__main__ ['-c']\n", "no"),
        ("nn.Linear(2, 2)", 1, "", "NameError: name 'nn' is not defined"),
        ("torch.ones(2)", 1, "", "NameError: name 'torch' is not defined"),
        ("import warnings; warnings.warn('beware')", 1, "", "UserWarning: beware"),
        ("import warnings; warnings.warn('going', DeprecationWarning)", 1, "", "DeprecationWarning: going"),
        (DEPRECATED.format("lipguide.layers"), 1, "", "DeprecationWarning: going"),
        (DEPRECATED.format("matplotlib.pyplot"), 0, "", ""),
        ("import sys; sys.exit(7)", 7, "", ""),
        ("import os; os.kill(os.getpid(), 9)", -9, "", ""),
        ("import sys; print({'lipguide', 'tests', 'torchmetrics'} & set(sys.modules))", 0, "set()\n", ""),
        ("import os; open('made', 'x').close(); print(os.listdir())", 0, "['made']\n", ""),
        ("input()", 1, "", "EOFError: EOF when reading a line"),
    ],
)
def test_code_ends_and_says_what_it_would_in_a_process_of_its_own(code, status, out, last, forked, tmp_path):
    done = forked.run(code, tmp_path)
    assert (done.returncode, done.stdout) == (status, out)
    assert (done.stderr.splitlines() or [""])[-1].startswith(last)


def test_code_has_the_environment_of_now(forked, tmp_path, monkeypatch):
    monkeypatch.setenv("LIPGUIDE_CACHE", "here")
    assert forked.run("import os; print(os.environ['LIPGUIDE_CACHE'])", tmp_path).stdout == "here\n"
    monkeypatch.delenv("LIPGUIDE_CACHE")
    assert forked.run("import os; print('LIPGUIDE_CACHE' in os.environ)", tmp_path).stdout == "False\n"


def test_nothing_of_one_run_is_left_for_the_next(forked, tmp_path):
    first = "import torch; a = 1; torch.a = 2; torch.set_default_dtype(torch.float64)"
    assert forked.run(first, tmp_path).returncode == 0
    done = forked.run("import torch; print('a' in globals(), hasattr(torch, 'a'), torch.ones(1).dtype)", tmp_path)
    assert done.stdout.split() == ["False", "False", "torch.float32"]


def test_ranks_know_each_other_and_the_tests(forked, tmp_path):
    code = "from tests import networks; from lipguide import distributed as d; d.start('cpu'); "
    code += "print(d.gathered(d.rank_and_ranks()))"
    for done in forked.ranks(code, tmp_path):
        assert done.stdout == "[(0, 2), (1, 2)]\n", done.stderr
