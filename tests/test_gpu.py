"""What only a GPU can show; skipped where there is none."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import lib
import solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def begin_run(tiny, write_npz, tmp_path):
    """A function that returns a run on the GPU, its plan made, given flags."""
    def begin(*flags: str) -> solve.Run:
        path = write_npz(**tiny(n=96, h=64, w=128))
        argv = ["--data", str(path), "--out", str(tmp_path / "out"), "--folds", "2", "--epochs",
                "2", "--width", "8", "--no-clean", "--max-hours", "1", *flags]
        return solve.open_run(solve.parse(argv))

    return begin


def begin_step(run: solve.Run) -> tuple[lib.TrainingState, lib.Replayed]:
    """Return a network of stage 1, and what trains it on a batch of tiles."""
    network = solve.new_network(run, 1, 0)
    network.set_lr(2e-3)
    network.generator.manual_seed(1)
    network.model.train()
    rare = torch.nonzero(run.tiles.holds_rare[:96]).flatten()
    return network, solve.training_step(run, network, run.tiles, 0, rare)


def losses(run: solve.Run, captured: bool | None) -> list[float]:
    """Return the first ten losses of a network whose step is captured after three, never, or in
    vain."""
    network, step = begin_step(run)
    if captured is False:
        step.capture_after = math.inf
    found = []
    with lib.on_stream(network.device):
        for _ in range(10):
            network.sums.zero_()
            order = torch.randperm(96, device=network.device, generator=network.generator)
            step(order[:32])
            found.append(float(network.sums[0]))
    assert (step.graph is not None) == bool(captured)
    return found


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_gpu_replays_the_same_steps(begin_run, precision):
    """A captured step is the step: augmentation, loss, clipping, optimizer, average."""
    run = begin_run("--precision", precision)
    np.testing.assert_allclose(losses(run, True), losses(run, False), rtol=1e-3)


def test_gpu_rate_and_average_vary_in_a_graph(begin_run):
    """At a rate of 0 a replayed step changes no weight, and the average moves on to them."""
    network, step = begin_step(begin_run("--precision", "float32"))
    network.optimizer.param_groups[0]["weight_decay"] = 0.0
    tiles = torch.arange(32, device=network.device)
    with lib.on_stream(network.device):
        for _ in range(5):
            step(tiles)
        network.set_lr(0.0)
        before = [p.clone() for p in network.model.parameters()]
        average = next(network.ema.model.parameters()).clone()
        step(tiles)
    assert step.graph is not None and float(network.ema.steps) == 6
    assert all(torch.equal(*pair) for pair in zip(before, network.model.parameters(), strict=True))
    assert not torch.equal(average, next(network.ema.model.parameters()))


def test_gpu_capture_that_fails_goes_on(begin_run, monkeypatch, capsys):
    """Without a graph the steps are the same, and a line says why."""
    run = begin_run("--precision", "float32")
    wanted = losses(run, False)

    def refuse(*args, **kwargs):
        raise RuntimeError("no capture today")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse)
    np.testing.assert_allclose(losses(run, None), wanted, rtol=1e-3)
    assert "without a CUDA graph (no capture today)" in capsys.readouterr().out


def test_gpu_is_chosen_and_the_run_goes_on(tiny, write_npz, tmp_path, monkeypatch):
    """Five networks at once, in float16; stopped in stage 2, the same command ends well."""
    devices, why = lib.pick_devices()
    assert devices[0].type == "cuda" and torch.cuda.get_device_name(devices[0]) in why
    path = write_npz(**tiny(n=96, h=64, w=128))
    argv = ["--data", str(path), "--out", str(tmp_path / "run"), "--width", "8", "--folds", "5",
            "--epochs", "3", "--precision", "float16", "--max-hours", "1", "--no-clean"]

    def stop(run, stage, *rest, real=solve.next_epoch):
        if stage == 2:
            raise KeyboardInterrupt
        real(run, stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(solve, "next_epoch", stop)
        assert solve.main(argv) == 130
    assert solve.main(argv) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["precision"] == "float16" and metrics["test_miou"] > 0.3


def test_gpu_memory_that_runs_out_halves_the_batch(capsys):
    """What does not fit at once is predicted in parts, and gives the same probabilities."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = lib.UNet(1, 4, 16).to(device, memory_format=torch.channels_last).eval()
    x = torch.rand(256, 1, 256, 256, device=device)

    def probs(part: torch.Tensor) -> torch.Tensor:
        return lib.to_bytes(lib.predict_probs([model], part, torch.float32, False))

    wanted = lib.in_batches(probs, x, 16)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**31) / total)
    try:
        found = lib.in_batches(probs, x, 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: going on with 128 frames at once" in capsys.readouterr().out
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_gpu_rate_lies_in_the_graphs_tensor_after_a_resume(begin_run):
    """The rate set for a network that goes on lies in the tensor that its graph reads."""
    run = begin_run("--precision", "float32")
    network, _ = begin_step(run)
    network.save()
    other = solve.new_network(run, 1, 0)
    other.resume()
    other.set_lr(0.25)
    assert other.optimizer.param_groups[0]["lr"] is other.lr and other.lr.device == other.device
    assert float(other.lr) == 0.25
