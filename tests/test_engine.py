"""The engine's choices: threads, memory; and what it shows."""

import io
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lib
import solve


@pytest.fixture
def threads():
    """PyTorch's number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def convolution(slow, monkeypatch):
    """Let the timed convolution take slow[threads] seconds, as other processes would make it."""
    monkeypatch.setattr(lib, "_conv_seconds", lambda dtype: slow[torch.get_num_threads()])


@pytest.mark.parametrize(
    "slow,chosen",
    [
        ({16: 1, 8: 2, 4: 4, 2: 8, 1: 16}, 16),  # alone
        ({16: 1, 8: 0.95, 4: 1.2, 2: 2, 1: 4}, 16),  # the smaller half is faster by the noise of a timing
        ({16: 9, 8: 3, 4: 1, 2: 2, 1: 4}, 4),  # a container that may use 4 of the 16 cores
        ({16: 90, 8: 30, 4: 20, 2: 9, 1: 1}, 1),  # all busy
    ],
)
def test_the_fastest_number_of_threads_is_taken(threads, monkeypatch, slow, chosen):
    """Of 16, 8, 4, 2 and 1 threads the fastest is set; in doubt all."""
    convolution(slow, monkeypatch)
    torch.set_num_threads(16)
    lib.set_threads()
    assert torch.get_num_threads() == chosen


def test_a_resumed_run_keeps_its_threads(threads, monkeypatch):
    """Other threads give other last bits: a number that is given is set without measuring."""
    monkeypatch.setattr(lib, "_conv_seconds", None)
    lib.set_threads(3)
    assert torch.get_num_threads() == 3


def test_freed_memory_is_kept():
    """A block of 64 MB used again and again is not fetched anew from the kernel: no page
    faults (on glibc; each of 20 fresh blocks would cost 16,384)."""
    resource = pytest.importorskip("resource")
    lib.keep_freed_memory()
    for _ in range(10):
        torch.zeros(2**24).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24).add_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if faults > 20 * 10000 and not hasattr(lib.ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library")
    assert faults < 20 * 1000


def test_the_timed_convolution_takes_time():
    """Six real convolutions forward and backward are behind the figure."""
    start = time.perf_counter()
    one = lib._conv_seconds(torch.float32)
    assert 0 < one < time.perf_counter() - start


# ------------------------------------------------------------------------------ what a person sees


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Return True."""
        return True


def test_a_line_an_epoch_where_nobody_watches():
    """Not a terminal: one line an epoch that holds every figure, and no carriage return."""
    stream = io.StringIO()
    progress = lib.Progress("stage 1  fold 0", 3, 1, stream)
    progress.show(2, {"loss": 0.5, "score": 0.25}, 1.5)
    progress.close()
    assert stream.getvalue() == "stage 1  fold 0  epoch 2/3  loss 0.5  score 0.25  used 1.5 min\n"


def test_a_bar_on_a_terminal(monkeypatch):
    """On a terminal tqdm redraws one line: it goes on at the epoch done, and holds title and figures; without
    tqdm there are lines all the same."""
    pytest.importorskip("tqdm")
    stream = Terminal()
    progress = lib.Progress("stage 2  fold 1", 3, 1, stream)
    for epoch in (2, 3):
        time.sleep(0.15)  # tqdm draws at most ten times a second
        progress.show(epoch, {"loss": 0.5}, 1.5)
    progress.close()
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and "\r" in shown
    for part in ("stage 2  fold 1", "1/3", "3/3", "loss 0.5"):
        assert part in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    lib.Progress("stage 2  fold 1", 3, 1, stream).show(2, {"loss": 0.5}, 1.5)
    assert stream.getvalue().endswith("used 1.5 min\n")


def test_idle_gpus_are_told_of(monkeypatch):
    """Two GPUs, one process: the command that uses both; nothing under torchrun, on a CPU, with one GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = lib.spare_gpus(torch.device("cuda:0"), ["--max-hours", "8"])
    assert "torchrun --standalone --nproc_per_node=2 solve.py --max-hours 8" in said
    assert "%%writefile solve.py" in said
    assert lib.spare_gpus(torch.device("cpu"), []) == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert lib.spare_gpus(torch.device("cuda:1"), []) == ""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert lib.spare_gpus(torch.device("cuda:0"), ["--max-hours", "8"]) == ""


def test_a_disturbed_moment_does_not_shrink_the_plan(monkeypatch):
    """One measurement of three that takes fifty times as long leaves the speed as it is."""
    seconds = iter([0.1, 0.01, 0.5, 0.01, 0.1, 0.001, 0.001, 0.5])
    monkeypatch.setattr(solve, "halved", lambda *_: (None, None))
    monkeypatch.setattr(solve, "new_training", lambda *_: {})
    monkeypatch.setattr(solve, "train_one_epoch", lambda *_: time.sleep(next(seconds)))
    run = SimpleNamespace(images=torch.zeros(512, 1, 1), masks=torch.zeros(512, 1, 1), device="cpu", plan={},
                          cfg=solve.Config())
    speed, share = solve.measure_speed(run, 4, 0)
    assert 6 * 32 / 0.1 < speed <= 6 * 32 / 0.01
    assert 1 - run.cfg.small_share < share < 0.8  # small images took a tenth of the time


@pytest.mark.parametrize("world, folds", [(1, 5), (2, 4), (3, 6), (4, 4), (5, 5), (8, 8), (64, 5)])
def test_no_process_waits_for_anothers_last_network(monkeypatch, world, folds):
    """Time enough for five folds: planned are as many as give each of a few processes equally many."""
    monkeypatch.setattr(solve, "measure_speed", lambda *_: (200.0, 0.6))
    run = SimpleNamespace(images=torch.zeros(2000, 1, 1), test_images=torch.zeros(2000, 1, 1), plan={},
                          place=None, masks=torch.ones(2000, 1, 1), is_rare=torch.zeros(5, dtype=torch.bool),
                          cfg=solve.Config(),
                          ranks=SimpleNamespace(world=world, barrier=int, gather=lambda v: np.full(world, v)),
                          clock=SimpleNamespace(left=lambda: 3600.0))
    assert solve.make_plan(run)["folds"] == folds
    run.cfg = solve.Config(folds=7)
    assert solve.make_plan(run)["folds"] == 7
    run.cfg = solve.Config(seeds=world)  # 5 folds are shared evenly then
    assert solve.make_plan(run)["folds"] == 5
    run.ranks.gather = lambda v: np.array([v, v / 2])  # another process has half of everything
    assert solve.make_plan(run)["train_images_per_second"] == 100


@pytest.mark.parametrize("hours, margin", [(0.3, 0), (1, 0), (2, 16), (4, 32)])
def test_what_lies_around_a_tile_is_worth_its_time(monkeypatch, hours, margin):
    """The more time there is, the more of the frame the networks see around a tile; no surroundings, small
    tiles and tiles without frames leave none. Measured last is what is trained."""
    asked = []
    monkeypatch.setattr(solve, "measure_speed", lambda *args: asked.append(args[1:]) or (80.0, 0.6))
    tiles = torch.zeros(2500, 64, 128)
    run = SimpleNamespace(images=tiles, test_images=tiles, masks=tiles, plan={}, cfg=solve.Config(),
                          place=np.zeros((3, 5000), int), is_rare=torch.zeros(5, dtype=torch.bool),
                          ranks=SimpleNamespace(world=2, barrier=int, gather=lambda v: np.full(2, v)),
                          clock=SimpleNamespace(left=lambda: 3600.0 * hours))
    solve.make_plan(run)
    assert asked[0] == (16, 0) and asked[-1][1] == margin
    run.cfg = solve.Config(folds=4, width=16, epochs=90)  # in four hours they leave time for all, in two not
    solve.make_plan(run)
    assert asked[-1][1] == (32 if hours == 4 else 0)
    for change in {"cfg": solve.Config(surroundings=False)}, {"place": None}, {"images": tiles[:, :63]}:
        asked.clear()
        solve.make_plan(SimpleNamespace(**vars(run) | change))
        assert {margin for _, margin in asked} == {0}
