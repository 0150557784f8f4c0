"""The sub-commands of `python -m lipguide data`: svhn, synthetic, compare."""

from __future__ import annotations

import argparse
import sys

import torch

from lipguide.book.transfer import compare
from lipguide.data.cards import SVHN_TERMS
from lipguide.data.shn import SyntheticHouseNumbers
from lipguide.data.svhn import PictureError
from lipguide.data.svhn.digit_struct import DigitStructError
from lipguide.data.svhn.download import DownloadError, download_svhn

__all__ = ["add_commands"]


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")


def _svhn(arguments: argparse.Namespace) -> int:
    _say(SVHN_TERMS)
    try:
        for folder in download_svhn(arguments.root, extra=arguments.extra):
            _say(f"{folder} is complete")
    except (DownloadError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _synthetic(arguments: argparse.Namespace) -> int:
    try:
        for split in arguments.split:
            data = SyntheticHouseNumbers(split, arguments.size, arguments.seed)
            where = data.save(arguments.root) if arguments.root else "the cache"
            _say(f"{split}: {len(data)} scenes in {where}")
    except (RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = compare(arguments.svhn, arguments.size, arguments.epochs, device, arguments.seed)
    except (DigitStructError, PictureError, RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    _say(f"a small network trained on synthetic house numbers alone reads, on {device}:")
    _say(f"  synthetic test digits  {100 * found.synthetic:.2f} %  of {found.digits[0]}")
    _say(f"  SVHN test digits       {100 * found.real:.2f} %  of {found.digits[1]}")
    _say(f"trained on SYN DIGITS    {100 * found.syn_digits:.1f} %  (published, DIRT-T table 1)")
    return 0


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Register svhn, synthetic and compare; each sets `run`, a function of the arguments that returns the status.

    >>> parser = argparse.ArgumentParser()
    >>> add_commands(parser.add_subparsers())
    >>> parser.parse_args(["synthetic", "--size", "3"]).size
    3
    """
    svhn = subparsers.add_parser("svhn", help="download SVHN (non-commercial use only)")
    svhn.add_argument("--root", required=True, help="folder that train/ and test/ go into")
    svhn.add_argument("--extra", action="store_true", help="also the 531,131 digits of extra/ (2 GB)")
    svhn.set_defaults(run=_svhn)

    synthetic = subparsers.add_parser("synthetic", help="make synthetic house numbers, in the cache or in a folder")
    synthetic.add_argument("--root", help="write pictures, masks and digitStruct.mat there, as SVHN has them")
    synthetic.add_argument("--split", nargs="+", choices=("train", "test"), default=["train", "test"])
    synthetic.add_argument("--size", type=int, help="scenes a split (default: as many as SVHN has)")
    synthetic.add_argument("--seed", type=int, default=0)
    synthetic.set_defaults(run=_synthetic)

    measure = subparsers.add_parser("compare", help="train on synthetic digits, read real ones")
    measure.add_argument("--svhn", required=True, help="folder that holds SVHN's test/")
    measure.add_argument("--size", type=int, help="synthetic scenes a split (default: as many as SVHN has)")
    measure.add_argument("--epochs", type=int, default=12)
    measure.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    measure.add_argument("--seed", type=int, default=0)
    measure.set_defaults(run=_compare)
