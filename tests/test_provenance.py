"""Provenance says which code made a run: exactly the commit, or the commit and more, or that it does not know."""

import subprocess

import pytest
import torch

from lipguide.book.ledger import Ledger
from lipguide.provenance import commit, provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed checkout that the package seems to lie in, and git in it."""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    for name in (".gitignore", "book/results/a.json", "lipguide/weights/a.safetensors", "lipguide/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("study/")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr("lipguide.provenance.ROOT", tmp_path)
    return tmp_path


def test_only_what_runs_write_may_differ_from_the_commit(checkout):
    def marked():
        ignored = (["book/results"], ["book/results", "lipguide/weights"])
        commits = [Ledger("a", "quick", "cpu", 0).provenance["commit"], *(commit(paths) for paths in ignored)]
        return [name.endswith("+") for name in commits]

    assert marked() == [False, False, False]
    (checkout / "book/results/a.json").write_text("two")
    assert marked() == [False, False, False]
    (checkout / "lipguide/weights/a.safetensors").write_text("two")
    assert marked() == [True, True, False]
    (checkout / "lipguide/a.py").write_text("two")
    assert marked() == [True, True, True]


def test_a_new_file_marks_the_commit_unless_git_ignores_it(checkout):
    (checkout / "study").mkdir()
    (checkout / "study" / "weights").write_text("")
    assert not commit().endswith("+")
    (checkout / "lipguide" / "new.py").write_text("")
    assert commit().endswith("+")


def test_a_package_inside_another_repository_does_not_name_its_commit(checkout, monkeypatch):
    assert commit() != "unknown"
    monkeypatch.setattr("lipguide.provenance.ROOT", checkout / "lipguide")
    assert commit() == "unknown"


def test_no_git_means_unknown(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def test_asking_for_provenance_leaves_the_statistics_of_cuda_alone(monkeypatch):
    def touched(*_):
        raise AssertionError("the peak of memory was reset")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", touched)
    assert provenance("cuda", 0)["device"] == "a GPU"
