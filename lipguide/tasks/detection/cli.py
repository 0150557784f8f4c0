"""`python -m lipguide study`: the full case study from the command line, alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from lipguide import distributed
from lipguide.book.ledger import Ledger
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.study import CONFIGURATIONS, EPSILON, PLANS, study

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register what `python -m lipguide study` takes; sets `run`, a function that returns the exit status.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["--plan", "quick", "--only", "naive"]).only
    ['naive']
    """
    parser.add_argument("--plan", choices=PLANS, default="full", help="full (a GPU), cpu (hours), quick (a minute)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS, metavar="CONFIGURATION")
    parser.add_argument("--svhn", type=Path, metavar="DIR", help="real SVHN instead of its synthetic twin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="checkpoints, weights and results (default: study/PLAN)")
    parser.set_defaults(run=_run)


def _problem(options: argparse.Namespace) -> str:
    """What keeps the study from starting as asked, and what would do; nothing if all is well."""
    if torch.cuda.is_available():
        return ""
    if options.device == "cuda":
        return "torch sees no CUDA device; --plan cpu --device cpu runs the study without one, in hours"
    if options.plan == "full" and options.device == "auto":
        return "torch sees no CUDA device, and plan full takes days without: take --plan cpu, or insist by --device cpu"
    return ""


def _run(options: argparse.Namespace) -> int:
    if problem := _problem(options):
        print(f"python -m lipguide study: {problem}", file=sys.stderr)
        return 2
    device = distributed.start(options.device)
    first = distributed.rank_and_ranks()[0] == 0
    folder, plan = options.folder or Path("study") / options.plan, PLANS[options.plan]
    ledger = Ledger("study", options.plan, device.type, options.seed, folder=folder)
    try:
        splits = {
            split: load_split(split, count, options.seed, device, options.svhn)
            for split, count in (("train", plan.train_scenes), ("test", plan.test_scenes))
        }
        report = (lambda line: print(line, flush=True)) if first else (lambda line: None)
        entries = study(plan, **splits, folder=folder, seed=options.seed, only=options.only, report=report)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"python -m lipguide study: {error}", file=sys.stderr)
        return 1
    if first:
        ledger.used(splits["train"].name, splits["train"].hash)
        ledger["configurations"] = entries
        ledger["epsilon"], ledger["threads"] = EPSILON, torch.get_num_threads()
        # What all configurations took, also those that an earlier call trained.
        seconds = sum(entry["train_seconds"] + entry["evaluate_seconds"] for entry in entries)
        print(f"on record: {ledger.save(seconds)}")
    distributed.finish()
    return 0
