"""Constrained layers under DistributedDataParallel: two processes with half a batch each learn what one learns."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lipguide.layers.affine import orthogonal, spectral


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        spectral(nn.Conv2d(2, 4, 3, padding=1)),
        nn.ReLU(),
        orthogonal(nn.Conv2d(4, 4, 3, padding=1)),
        nn.Flatten(),
        spectral(nn.Linear(4 * 36, 3)),
    )


def learn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 6, 6, generator=generator), torch.randn(8, 3, generator=generator)


def work(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = data()
    model = learn(DistributedDataParallel(make()), x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])
    if rank == 0:
        model.module.eval()(x)  # one process alone may evaluate: proofs are not part of what is exchanged
    learn(model.train(), x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_learns(tmp_path, forked):
    code = f"from tests.layers.test_affine_distributed import work; work({str(tmp_path)!r})"
    for done in forked.ranks(code, tmp_path):
        assert done.returncode == 0, done.stderr
    alone = learn(learn(make(), *data()), *data()).state_dict()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in alone:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-4)
