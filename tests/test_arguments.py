"""Whole numbers: what counts as one is the same in every room."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lipguide.arguments import pair, whole

NONE = [True, False, np.True_, torch.tensor(True), 2.0, np.float32(2), torch.tensor(2.0), "2", None, float("nan"), [2]]


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), torch.tensor(2)])
def test_every_whole_number_is_one_and_comes_out_as_an_int(value):
    assert type(whole("size", value)) is int and whole("size", value) == 2
    assert [type(number) for number in pair("size", (value, 3), "it has two sides")] == [int, int]


@pytest.mark.parametrize("value", NONE, ids=repr)
def test_what_is_none_is_named(value):
    with pytest.raises(ValueError, match="size is .*: give it a whole number ≥ 0"):
        whole("size", value, least=0)


@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_smallest_is_allowed_and_no_smaller_one(least):
    assert whole("size", least, least=least) == least
    with pytest.raises(ValueError, match=f"size is {least - 1}: it has sides, so give it a whole number ≥ {least}"):
        whole("size", least - 1, "it has sides", least)


@pytest.mark.parametrize("value", [(), (1,), (1, 2, 3), (1, 0), (1, 2.0), "12", None])
def test_a_pair_is_one_whole_number_or_two(value):
    with pytest.raises(ValueError, match="size is "):
        pair("size", value, "it has two sides")


def test_workers_that_make_scenes_need_no_torch_for_it():
    code = "import sys, lipguide.arguments; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
