"""Tests run in several processes side by side (pytest -n), so each keeps to one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
