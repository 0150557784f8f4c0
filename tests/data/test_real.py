"""Real data sets: where they are looked for, and what is said when they are not there."""

from __future__ import annotations

import pytest

from lipguide.data import REAL, SVHN, SyntheticHouseNumbers, first, folder_of, real


def test_a_folder_is_found_from_the_checkout_and_from_its_folders(tmp_path, monkeypatch):
    (tmp_path / "data" / "svhn").mkdir(parents=True)
    (tmp_path / "book").mkdir()
    for place in (tmp_path, tmp_path / "book"):
        monkeypatch.chdir(place)
        assert folder_of("svhn").resolve() == tmp_path / "data" / "svhn"
        assert folder_of("cifar10").parts == ("data", "cifar10")


def test_svhn_is_opened_where_it_lies(tmp_path, monkeypatch):
    SyntheticHouseNumbers("test", 3, cache=False).save(tmp_path / "data" / "svhn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "cache"))
    found = real("svhn", "test")
    assert isinstance(found, SVHN) and len(found) == 3 and len(first(found, 2)) == 2
    assert len(real("svhn", "test", tmp_path / "data" / "svhn")) == 3


@pytest.mark.parametrize("name", REAL)
def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*(lipguide data svhn|CIFAR10)"):
        real(name, "train", tmp_path)


def test_other_names_are_refused():
    for name, split in (("mnist", "train"), ("svhn", "extra"), ("cifar10", "all")):
        with pytest.raises(ValueError, match="there are svhn, cifar10"):
            real(name, split)


@pytest.mark.parametrize("count", [-1, 4])
def test_the_first_items_are_there_or_it_is_an_error(count):
    with pytest.raises(ValueError, match="has 3"):
        first([1, 2, 3], count)
