"""Weights on disk: what was saved comes back, and nothing else passes for it."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lipguide import orthogonal, spectral
from lipguide.tasks.weights import WEIGHTS, fingerprint, halved, load, run_of, save


def network(width=4):
    return nn.Sequential(spectral(nn.Conv2d(3, width, 3)), nn.Flatten(), orthogonal(nn.Linear(width * 4, 2)))


def test_round_trip_gives_the_same_outputs_and_the_run(tmp_path):
    torch.manual_seed(0)
    model, other, x = network(), network(), torch.rand(2, 3, 4, 4)
    run = {"steps": 3, "data": {"name": "SHN", "scenes": 10}, "note": "ε"}
    save("pair", model, run, tmp_path)
    assert load("pair", other, tmp_path) == run
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_a_truncated_or_foreign_file_is_named(tmp_path):
    path = save("cut", network(), {}, tmp_path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.safetensors is no file of weights"):
            load("cut", network(), tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    save("four", network(4), {}, tmp_path)
    with pytest.raises(ValueError, match="'four' belong to another model"):
        load("four", network(5), tmp_path)


def test_missing_weights_name_those_that_are_there(tmp_path):
    save("here", network(), {}, tmp_path)
    with pytest.raises(FileNotFoundError, match="there are: here"):
        load("gone", network(), tmp_path)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.bias, float("nan"))
    with pytest.raises(ValueError, match="'bias' of 'broken' is not finite"):
        save("broken", layer, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_is_that_of_the_bytes_in_order_whatever_the_memory_format():
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([1, 2])
    expected = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:12]
    assert fingerprint(images.contiguous(memory_format=torch.channels_last), labels) == expected
    assert fingerprint(labels, images) != expected and fingerprint(images) != expected


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_weights_are_small_and_say_how_they_were_made(path):
    assert path.stat().st_size < 8 * 2**20
    with safe_open(path, framework="pt") as file:
        assert {"steps", "device", "data", "seed", "commit", "seconds"} <= set(json.loads(file.metadata()["run"]))


def test_weights_that_float16_holds_are_written_in_it_and_come_back_as_they_were(tmp_path):
    def twin():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))

    torch.manual_seed(0)
    model, x = twin(), torch.rand(16, 3, 4, 4)
    model(x)  # batch norm counts, and its statistics stay in full precision
    whole = save("whole", model, {}, tmp_path).stat().st_size
    outputs = halved(model).eval()(x)
    half = save("half", model, {}, tmp_path)
    assert half.stat().st_size < 0.75 * whole
    with safe_open(half, "pt") as file:
        assert file.get_tensor("0.weight").dtype == torch.float16
        assert file.get_tensor("1.running_var").dtype == torch.float32
    other = twin()
    load("half", other, tmp_path)
    assert torch.equal(other.eval()(x), outputs) and other[0].weight.dtype == torch.float32


def test_what_ships_is_in_float16_where_no_bound_rests_on_it_and_small_in_all():
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for path in WEIGHTS.glob("*.safetensors"):
        network = run_of(path).get("recipe", {}).get("network", "")  # the study's weights name none
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                kinds[network.startswith("ordinary")].add(file.get_slice(key).get_dtype())
    assert "F16" in kinds[True] and "F16" not in kinds[False]
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 30e6
