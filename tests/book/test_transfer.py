"""The measure "like SVHN", and the command line around the data."""

from __future__ import annotations

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.transfer import accuracy, train_reader
from lipguide.data import DownloadError
from lipguide.data.digits import Digits

pytestmark = pytest.mark.usefixtures("own_cache")


def run(*arguments: str) -> int:
    return main(["data", *arguments])


def bars(count: int, seed: int) -> Digits:
    """Ten easy classes: one bright column each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = 0.3 * torch.rand(count, 3, 32, 32, generator=generator)
    images[torch.arange(count), :, :, 3 * labels + 1] = 1.0
    return Digits(images, labels)


def test_the_reader_learns_what_can_be_learnt_and_repeats():
    model = train_reader(bars(240, 0), epochs=2, device="cpu", seed=1, batch=16)
    assert accuracy(model, bars(100, 1), "cpu") > 0.9
    state = torch.random.get_rng_state()
    again = train_reader(bars(240, 0), epochs=2, device="cpu", seed=1, batch=16)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_accuracy_counts():
    class Says(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    data = Digits(torch.zeros(700, 3, 32, 32), torch.tensor([3] * 175 + [4] * 525))
    assert accuracy(Says(), data, "cpu") == 0.25
    with pytest.raises(ValueError, match="at least one"):
        accuracy(Says(), Digits(torch.zeros(0, 3, 32, 32), torch.zeros(0)), "cpu")


def test_commands_fail_with_a_message(tmp_path, capsys, monkeypatch):
    assert run("compare", "--svhn", str(tmp_path / "none"), "--size", "2", "--epochs", "1") == 1
    assert "is missing" in capsys.readouterr().err

    def unreachable(root, extra):
        raise DownloadError("no network")

    monkeypatch.setattr("lipguide.data.download_svhn", unreachable)
    assert run("svhn", "--root", str(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "non-commercial use only" in captured.out and captured.err == "python -m lipguide data svhn: no network\n"


def test_svhn_passes_on_what_it_was_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lipguide.data.download_svhn", lambda root, extra: [f"{root}/extra={extra}"])
    assert run("svhn", "--root", "there", "--extra") == 0
    assert "there/extra=True is complete" in capsys.readouterr().out


def test_synthetic_fills_the_cache_or_a_folder(tmp_path, capsys):
    assert run("synthetic", "--size", "3", "--split", "test") == 0
    assert list((tmp_path / "cache").rglob("*.npz"))
    assert run("synthetic", "--size", "3", "--root", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "train" / "3.mask.png").exists() and (tmp_path / "out" / "test" / "3.png").exists()
    assert run("synthetic", "--size", "3", "--root", str(tmp_path / "out")) == 1
    assert "exists already" in capsys.readouterr().err
    assert run("synthetic", "--size", "2", "--split", "test", "--version", "3") == 0
    assert capsys.readouterr().out == "Synthetic House Numbers 3, test: 2 scenes in the cache\n"
