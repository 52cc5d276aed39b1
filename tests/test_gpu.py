"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import json
import math

import lib
import numpy as np
import pytest
import solve
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def begin_run(tiny, write_npz, tmp_path):
    """A function that returns a run on the GPU, its plan made, given flags."""

    def begin(*flags: str) -> solve.Run:
        path = write_npz(**tiny(n=96, h=64, w=128))
        argv = ["--data", str(path), "--out", str(tmp_path / "out"), "--folds", "2", "--epochs", "2", "--width", "8"]
        return solve.open_run(solve.parse([*argv, "--no-clean", "--max-hours", "1", *flags]))

    return begin


def losses(run: solve.Run, captured: bool | None) -> list[float]:
    """The first ten losses of a network, whose step is captured after three, never, or in vain."""
    network = solve.new_network(run, 1, 0)
    tiles = torch.arange(96, device=network.device)
    step = solve.training_step(run, network, run.tiles, 0, tiles[run.tiles.holds_rare[tiles]])
    network.generator.manual_seed(1)
    network.model.train()
    step.wanted = math.inf if captured is False else 3
    found = []
    with lib.on_stream(network.device):
        for _ in range(10):
            network.sums.zero_()
            step(tiles[torch.randperm(96, device=tiles.device, generator=network.generator)[:32]])
            found.append(float(network.sums[0]))
    assert (step.graph is not None) == bool(captured)
    return found


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_gpu_replays_the_same_steps(begin_run, precision):
    """A captured step is the step: augmentation, loss, clipping, optimizer, average, in each precision."""
    run = begin_run("--precision", precision)
    np.testing.assert_allclose(losses(run, True), losses(run, False), rtol=1e-3)


def test_gpu_rate_and_average_vary_in_a_graph(begin_run):
    """At a rate of 0 a replayed step changes no weight, and the average moves on to them."""
    run = begin_run("--precision", "float32")
    network = solve.new_network(run, 1, 0)
    network.optimizer.param_groups[0]["weight_decay"] = 0.0
    tiles = torch.arange(32, device=network.device)
    step = solve.training_step(run, network, run.tiles, 0, tiles[:0])
    with lib.on_stream(network.device):
        for _ in range(5):
            step(tiles)
        network.rate, before = 0.0, [p.clone() for p in network.model.parameters()]
        average = next(network.ema.model.parameters()).clone()
        step(tiles)
    assert step.graph is not None and float(network.ema.steps) == 6
    assert all(torch.equal(*pair) for pair in zip(before, network.model.parameters(), strict=True))
    assert not torch.equal(average, next(network.ema.model.parameters()))


def test_gpu_capture_that_fails_goes_on(begin_run, monkeypatch, capsys):
    """Without a graph the steps are the same, and a line says why."""
    run = begin_run("--precision", "float32")
    wanted = losses(run, False)

    class Broken(torch.cuda.CUDAGraph):
        def capture_begin(self, *args, **kwargs):
            raise RuntimeError("no capture today")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    np.testing.assert_allclose(losses(run, None), wanted, rtol=1e-3)
    assert "without a CUDA graph (no capture today)" in capsys.readouterr().out


def test_gpu_is_chosen_and_the_run_goes_on(begin_run, tiny, write_npz, tmp_path, monkeypatch):
    """Five networks at once, in float16; stopped in stage 2, the same command ends with a submission."""
    devices, why = lib.pick_devices()
    assert devices[0].type == "cuda" and why == torch.cuda.get_device_name(0)
    path = write_npz(**tiny(n=96, h=64, w=128))
    argv = ["--data", str(path), "--out", str(tmp_path / "run"), "--width", "8",
            "--folds", "5", "--epochs", "3", "--precision", "float16", "--max-hours", "1", "--no-clean"]
    real = solve.next_epoch

    def stop(run, stage, *rest):
        if stage == 2:
            raise KeyboardInterrupt
        real(run, stage, *rest)

    monkeypatch.setattr(solve, "next_epoch", stop)
    assert solve.main(argv) == 130
    monkeypatch.setattr(solve, "next_epoch", real)
    monkeypatch.setattr(lib, "SAVE_SECONDS", 0)
    assert solve.main(argv) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["precision"] == "float16" and metrics["test_miou"] > 0.3


def test_gpu_memory_that_runs_out_halves_the_batch(capsys):
    """What does not fit at once is predicted in parts, and gives the same probabilities."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = lib.UNet(1, 4, 16).to(device, memory_format=torch.channels_last).eval()
    x = torch.rand(256, 1, 256, 256, device=device)
    args = [model], lambda part: x[part], len(x), torch.float32, 1, False, 0
    wanted = lib.predict_probs(*args, 16)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**31) / total)
    try:
        found = lib.predict_probs(*args, 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory at 256 images" in capsys.readouterr().out
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_gpu_finds_the_rate_after_a_resume(begin_run):
    """The rate of a network that goes on lies in the tensor that its graph reads, with the value saved."""
    run = begin_run("--precision", "float32")
    network = solve.new_network(run, 1, 0)
    network.rate = 0.25
    network.save()
    other = solve.new_network(run, 1, 0)
    other.resume()
    assert other.optimizer.param_groups[0]["lr"] is other.lr and other.lr.device == other.device
    assert other.rate == 0.25
