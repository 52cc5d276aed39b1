"""Section 11: flags, devices, workers, networks in training, prediction, what a person sees."""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

import lib

CPU = torch.device("cpu")


def refuse_everything(*_):
    """Raise what a full disk raises."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ------------------------------------------------------------------------------------------- flags

@dataclasses.dataclass(frozen=True)
class Flags:
    """A configuration of one flag of each kind, and a field that is none."""

    data_file: str = lib.option("data", "a file", group="files")
    recipe: str = lib.option("best", "which", ("best", "paper"))
    epochs: int = lib.option(0, "how many", least=1, most=9)
    lr: float = lib.option(0.1, "the rate", least=1e-9, most=0.999)
    clean: bool = lib.option(True, "do not clean")
    fresh: bool = lib.option(False, "begin anew")
    inner: int = 3


def test_flags_end_in_their_fields_with_their_types():
    """--flag value, --flag=value and switches; what is not given is not there."""
    argv = ["--data-file", "a b", "--epochs=3", "--lr", "1e-3", "--no-clean", "--fresh"]
    given = lib.parse_flags(Flags, argv, "about")
    assert given == {"data_file": "a b", "epochs": 3, "lr": 1e-3, "clean": False, "fresh": True}
    assert lib.parse_flags(Flags, [], "about") == {}


@pytest.mark.fault(52)
@pytest.mark.parametrize("argv, words", [
    (["--epoch", "3"], "did you mean --epochs?"), (["--no-cleaning"], "did you mean --no-clean?"),
    (["mars.npz"], "mars.npz"), (["--inner", "4"], "--inner"), (["--epochs", "two"], "--epochs"),
    (["--epochs", "10"], "--epochs 10: out of range"), (["--lr", "nan"], "--lr nan: out of range"),
    (["--recipe", "papers"], "--recipe")])
def test_a_wrong_flag_is_one_sentence(argv, words):
    """Mistyped, abbreviated, no flag at all, of the wrong type or out of range: it is named."""
    with pytest.raises(lib.UserError) as error:
        lib.parse_flags(Flags, argv, "about")
    assert words in str(error.value) and "--help" in str(error.value)


def test_help_tells_of_every_flag(capsys):
    """It leaves with status 0, and shows headings, flags and their texts, and no other field."""
    assert lib.run_command(lambda: lib.parse_flags(Flags, ["-h"], "about ─")) == 0
    shown = capsys.readouterr()
    for words in ("about ─", "files:", "--data-file", "--no-clean", "do not clean", "--fresh"):
        assert words in shown.out
    assert "inner" not in shown.out and shown.err == ""


@pytest.mark.fault(36, 38)
@pytest.mark.parametrize("error, status, words", [
    (lib.UserError("mars.npz: damaged"), 2, "solve.py: mars.npz: damaged\n"),
    (OSError(errno.ENOSPC, "No space left on device", "x.csv"), 2, "No space left on device"),
    (KeyboardInterrupt(), 130, "the same command, without --fresh, goes on"),
    (None, 143, "the same command, without --fresh, goes on")])
def test_the_exit_status_says_how_a_run_ended(capsys, error, status, words):
    """2 a user's mistake or a full disk, 130 Ctrl-C, 143 SIGTERM, None here: one sentence on
    standard error, and the process has its own handler again."""
    def command():
        if error is not None:
            raise error
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    assert lib.run_command(command) == status
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_mistake_in_the_code_keeps_its_traceback():
    """What is no user's mistake is raised as it is; a command's own status is handed on."""
    with pytest.raises(KeyError):
        lib.run_command(lambda: {}["no such key"])
    assert lib.run_command(lambda: 3) == 3


@pytest.mark.fault(53)
def test_an_ascii_terminal_does_not_crash(monkeypatch):
    """A stream that cannot show × gets ? instead."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert lib.run_command(lambda: print("2 folds × 1 seed") or 0) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"2 folds ? 1 seed\n"


# -------------------------------------------------------------------- devices, precision, the clock

@pytest.fixture
def two_gpus(monkeypatch):
    """PyTorch as it is where there are two GPUs of capability 8.0 and 7.5; returns the set of those
    that fail at their first kernel, for the test to fill. They compute on the CPU."""
    broken, zeros, conv = set(), torch.zeros, torch.nn.Conv2d

    def on_gpu(make):
        def made(*args, device=None, **kwargs):
            if device is not None and torch.device(device).index in broken:
                raise RuntimeError("CUDA error: no kernel image is available\nmore")
            return make(*args, **kwargs)

        return made

    monkeypatch.setattr(torch, "zeros", on_gpu(zeros))
    monkeypatch.setattr(torch.nn, "Conv2d", on_gpu(conv))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda device: ((8, 0), (7, 5))[device.index])
    return broken


def test_all_usable_gpus_are_taken(two_gpus):
    """auto and cuda: both, the weaker one first, since its type suits both; cuda:1: that one."""
    zero, one = torch.device("cuda", 0), torch.device("cuda", 1)
    assert lib.pick_devices() == lib.pick_devices("cuda") == ([one, zero], "GPU 1, GPU 0")
    assert lib.pick_devices("cuda:1") == ([one], "GPU 1")
    assert lib.pick_devices("cpu") == ([CPU], "asked for")


@pytest.mark.fault(35)
def test_an_unusable_gpu_is_left_out(two_gpus):
    """One of two that fails at its first kernel is not used; where both fail: the CPU, and why."""
    two_gpus.add(0)
    assert lib.pick_devices() == ([torch.device("cuda", 1)], "GPU 1")
    two_gpus.add(1)
    devices, why = lib.pick_devices()
    assert devices == [CPU] and "no kernel image" in why and "more" not in why and "T4 x2" in why


def test_ranks_of_a_machine_share_its_gpus(two_gpus, monkeypatch):
    """Two ranks have one each; of three the third takes what there is."""
    for rank, ranks, count in ((0, 2, 1), (1, 2, 1), (2, 3, 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        devices = lib.pick_devices()[0]
        assert len(devices) == count and torch.device("cuda", min(rank, 1)) in devices


@pytest.mark.fault(35)
def test_a_gpu_asked_for_and_not_there(monkeypatch):
    """--device cuda without one is a sentence, and so is another word; auto takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, words in (("cuda:1", "--device cpu"), ("cuda:x", "cuda:N"), ("tpu", "cuda:N")):
        with pytest.raises(lib.UserError, match=words):
            lib.pick_devices(name)
    assert lib.pick_devices()[0] == [CPU]


@pytest.mark.parametrize("capability, dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16),
    ((6, 0), torch.float32)])
def test_a_gpus_precision_follows_from_its_capability(monkeypatch, capability, dtype):
    """A T4 (7.5) only emulates bfloat16, a P100 (6.0) has no fast half precision."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert lib.pick_precision(torch.device("cuda", 0))[0] == dtype
    assert lib.pick_precision(torch.device("cuda", 0), "float32")[0] == torch.float32


@pytest.mark.parametrize("low, dtype", [(0.95, torch.float32), (0.5, torch.bfloat16)])
def test_a_cpus_precision_is_measured(monkeypatch, low, dtype):
    """bfloat16 where its convolution is plainly faster than float32's 1 s; in doubt float32."""
    taken = iter([1.0, low])

    def repeat(step, number, repeat):
        step()
        return [next(taken)] * repeat

    monkeypatch.setattr(lib.timeit, "repeat", repeat)
    found, why = lib.pick_precision(CPU)
    assert found == dtype and f"{1 / low:.1f}×" in why


def test_freed_memory_is_kept():
    """A block of 64 MB used again and again is not fetched anew from the kernel: no page faults (on
    glibc; each of 20 fresh blocks would cost 16,384)."""
    resource = pytest.importorskip("resource")
    if not hasattr(lib.ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library")
    lib.keep_freed_memory()
    for _ in range(3):
        torch.zeros(2**24).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24).add_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20 * 1000


def test_the_clock_counts_all_starts(tmp_path, monkeypatch):
    """Two starts of 100 s each have used them both, and the 3 s of the first import; it is written
    at once and every ten seconds; a full disk stops no clock; the least limit is a second."""
    now = [50.0]
    monkeypatch.setattr(lib.time, "monotonic", lambda: now[0])
    for used in (103, 203):
        clock = lib.Clock(tmp_path / "clock.pt", 0)
        now[0] += 9
        clock.save_now_and_then()
        assert lib.load_checkpoint(clock.path) == {"seconds": used - 91}
        now[0] += 91
        clock.save_now_and_then()
        assert clock.used() == used and lib.load_checkpoint(clock.path) == {"seconds": used}
    now[0] += 11
    monkeypatch.setattr(os, "fsync", refuse_everything)
    clock.save_now_and_then()
    assert clock.used() == 214 and clock.limit == 1


# ----------------------------------------------------------------------------------------- workers

def test_a_map_keeps_its_order():
    """Whichever item is done first: the results are in the order of the items."""
    def slow(item):
        time.sleep(0.02 * (4 - item))
        return item ** 2

    assert lib.Workers([CPU], 3).map(slow, range(5)) == [0, 1, 4, 9, 16]
    assert lib.Workers([CPU], 3).map(slow, []) == []


def test_workers_are_at_work_at_once_each_with_its_own_threads():
    """Two workers meet inside the work, in two threads, none of them the caller's; their operations
    have the threads that Workers were given, and the caller's keep theirs."""
    meeting, met = threading.Barrier(2, timeout=10), set()

    def meet(item):
        meeting.wait()
        met.add(threading.current_thread())
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert lib.Workers([CPU], 2, 3).map(meet, range(4)) == [3] * 4
    assert len(met) == 2 and threading.main_thread() not in met
    assert torch.get_num_threads() == before


def test_workers_are_devices():
    """There are as many workers as asked for; of several GPUs each in turn gets another one."""
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert lib.Workers([CPU], 3).devices == [CPU] * 3
    assert lib.Workers(gpus, 1).devices == gpus[:1]
    assert lib.Workers(gpus, 5).devices == [*gpus, *gpus, gpus[0]]


def test_one_thread_at_a_time_launches_on_gpus():
    """Who is alone with one GPU keeps others from all of them; nobody waits for the CPU."""
    with lib.alone(torch.device("cuda", 0)):
        assert not lib.alone(torch.device("cuda", 1)).acquire(blocking=False)
    with lib.alone(CPU), lib.alone(CPU):
        pass


def endless(workers, ended):
    """Return work that has no end of its own, and when it is ended needs a moment to tidy up."""
    def work(device):
        try:
            while True:
                workers.check()
                time.sleep(0.005)
        finally:
            time.sleep(0.1)
            ended.append(threading.current_thread())

    return work


def test_an_error_in_one_worker_ends_the_others():
    """It is raised in the caller; the others end at their next check(), what waits in a map is not
    begun, and the same workers work again."""
    workers, ended, before = lib.Workers([CPU], 3), [], threading.enumerate()
    forever, begun = endless(workers, ended), threading.Barrier(3, timeout=10)

    def work(item):
        begun.wait()
        if item == 1:
            raise ValueError("one of three")
        forever(CPU)

    with pytest.raises(ValueError, match="one of three"):
        workers.map(work, range(100))
    assert len(ended) == 2 and threading.enumerate() == before
    assert workers.map(str, range(3)) == ["0", "1", "2"]


@pytest.mark.fault(36)
def test_ctrl_c_reaches_the_workers():
    """A real SIGINT, while the caller waits for its workers, ends them within a second."""
    workers, ended, sent = lib.Workers([CPU], 2), [], []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, send)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        workers.run(endless(workers, ended))
    assert time.monotonic() - sent[0] < 1 and len(ended) == 2


# ------------------------------------------------------------------------------------ stage's input

def stage_input(padding=0, **more):
    """Return a frame of 3×3 tiles without the middle one (tiles 0 to 7), one of 1×2 (8, 9) and a
    lone tile (10), of 4×6 pixels. The image is a pixel's number mod 256, the label its tile's fold,
    0 to 2, plus 1; the last two tiles are of the test set."""
    cells = [(0, r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    place = np.array([*cells, (1, 0, 0), (1, 0, 1), (-1, 0, 0)]).T
    fold_of = torch.arange(11) % 3
    fold_of[9:] = -2
    targets = torch.where(fold_of < 0, -1, fold_of + 1).to(torch.int8)
    targets = targets[:, None, None].repeat(1, 4, 6)
    images = (torch.arange(264).reshape(11, 4, 6) % 256).byte()
    return lib.StageInput(lib.Frames.lay_out(place, 11), 0, padding, images, 0.0, 1.0, targets,
                          fold_of, torch.arange(5) == 4, 1, **more)


def find_tile(data, tile, x, y):
    """Return the place of the whole tile in the window x (h, w), and its labels there."""
    (h, w), image = data.images.shape[1:], data.images[tile].float()
    corners = itertools.product(range(x.shape[0] - h + 1), range(x.shape[1] - w + 1))
    (i, j), = ((i, j) for i, j in corners if torch.equal(x[i:i + h, j:j + w], image))
    return (i, j), y[i:i + h, j:j + w]


def test_training_windows_hold_their_tile_and_no_label_held_out():
    """A window lies anywhere with the tile wholly inside, at every place in time; the labels are
    those of all tiles in it but of the held-out fold, of no test tile and no mirrored pixel."""
    data, places = stage_input(3), set()
    tiles = torch.arange(11).repeat(60)
    x, y = data.windows(tiles, torch.Generator().manual_seed(0), 1)
    assert x.shape == (660, 1, 7, 9) and y.shape == (660, 7, 9) and y.dtype == torch.int8
    for tile, image, labels in zip(tiles.tolist(), x[:, 0], y, strict=True):
        place, own = find_tile(data, tile, image, labels)
        assert (own == (data.fold_of[tile] + 1 if data.fold_of[tile] in (0, 2) else -1)).all()
        places.add(place)
    assert places == {(i, j) for i in range(4) for j in range(4)}
    assert set(y.unique().tolist()) == {-1, 1, 3}
    known = (y > 0) & (x[:, 0] >= 8)  # smaller numbers are on two tiles
    assert torch.equal(y[known].long(), data.fold_of[x[:, 0][known].long() // 24] + 1)
    assert (y[data.fold_of[tiles] == 0] == 3).any()  # neighbours' labels count
    numbers = [image[there].tolist() for image, there in zip(x[:, 0], known, strict=True)]
    assert all(len(set(seen)) == len(seen) for seen in numbers)  # a mirrored one would count twice


def test_validation_sees_around_a_tile_and_counts_its_labels_alone():
    """The tile is in the middle, what lies around it is seen, only its own pixels have labels."""
    data = stage_input(4)
    x, y = data.windows(torch.arange(9))
    for tile in range(9):
        place, own = find_tile(data, tile, x[tile, 0], y[tile])
        assert place == (2, 2) and (own == data.fold_of[tile] + 1).all()
    assert ((y >= 0).sum((1, 2)) == 24).all()


def second_input(**more):
    """Return a stage 2's input: fold v says class 1 + v of tile 0 and class 4 of the others, with a
    confidence of 51 · (v + 1) bytes; its context is 3 · v, and 30 in the lower half of a tile."""
    masks = torch.full((3, 11, 4, 6), 4, dtype=torch.uint8)
    masks[:, 0] = torch.tensor([1, 2, 3])[:, None, None]
    confidence = torch.tensor([51, 102, 153], dtype=torch.uint8)[:, None, None, None]
    context = 3.0 * torch.arange(3)[:, None, None, None, None].repeat(1, 11, 4, 2, 3)
    context[:, :, :, 1] = 30
    return stage_input(4, predicted=masks, confidence=confidence.repeat(1, 11, 4, 6),
                       context=context, **more)


def test_windows_of_a_second_stage_have_the_labels_of_one_fold():
    """A window's labels are those of its tile's fold, in neighbours too; a test tile's has none."""
    data, tiles = second_input(), torch.arange(11).repeat(60)
    _, y = data.windows(tiles, torch.Generator().manual_seed(0))
    for tile, fold in enumerate(data.fold_of.tolist()):
        labels = set(y[tiles == tile].unique().tolist()) - {-1}
        assert labels == ({fold + 1} if fold >= 0 else set())
    counts = (y >= 0).sum((1, 2))[data.fold_of[tiles] >= 0]
    assert counts.min() == 24 < counts.max()  # its own pixels, and some of neighbours


def test_the_second_network_sees_what_its_fold_predicted():
    """Channels: image, four classes of the mask, confidence, context of four classes over 3; as
    published a flag, 0 where stage 1 said background and -1 elsewhere."""
    data = second_input()
    for fold in range(3):
        x = data.whole_frames(torch.tensor([0]), fold)
        assert x.shape == (1, 10, 12, 18)
        tile = x[0, :, :4, :6]
        assert torch.equal(tile[0], data.images[0].float())
        assert tile[1:5].amax((1, 2)).tolist() == [float(c == fold) for c in range(4)]
        assert torch.equal(x[0, 4, :4, 6:], torch.ones(4, 12))
        assert torch.allclose(tile[5], torch.tensor((fold + 1) / 5))
        assert (tile[6:, :2] == fold).all() and (tile[6:, 2:] == 10).all()
    x, _ = data.windows(torch.tensor([1, 2]))  # of folds 1 and 2
    assert torch.allclose(x[:, 5, 0, 0], torch.tensor([0.4, 0.6]))
    data = dataclasses.replace(data, confidence=None)
    data.predicted[0, 8] = 0
    x = data.whole_frames(torch.tensor([1]), 0)
    assert x.shape[1] == 2 and (x[0, 1, :, :6] == 0).all() and (x[0, 1, :, 6:] == -1).all()


def test_half_sized_images_are_means_and_every_second_label():
    """Of 4×6 pixels 2×3: 0, 1, 6 and 7 are 3.5, rounded to the even 4; the first label of four;
    context padding 3 becomes 2; a tile holds a rare class if one of its labels is."""
    data = stage_input(3)
    data.targets[1, 0, 0] = data.targets[2, 1, 1] = 4
    half = dataclasses.replace(data).halved(0.25)
    assert half.images.shape == (11, 2, 3) and half.images[0, 0, 0] == 4
    assert (half.padding, half.paste, half.targets[1, 0, 0]) == (2, 0.25, 4)
    assert torch.nonzero(half.holds_rare).flatten().tolist() == [1]
    assert torch.nonzero(dataclasses.replace(data).holds_rare).flatten().tolist() == [1, 2]
    assert half.windows(torch.arange(9))[0].shape == (9, 1, 4, 5)


# --------------------------------------------------------------------------- a network in training

def new_network(folder, name="stage1_fold0", seed=0, dtype=torch.float32):
    """Return a small network in training, whose first weights depend on the seed alone."""
    torch.manual_seed(seed)
    network = lib.TrainingState.begin(folder / f"{name}.pt", lib.UNet(1, 4, 4, 2), CPU, dtype,
                                      weight_decay=0.1, ema_decay=0.9)
    network.set_lr(0.01)
    return network


def note_epoch(network, score=0.5, confusion=None, loss=1.0):
    """Let a network have an epoch behind it."""
    confusion = np.eye(lib.NUM_CLASSES, dtype=int).tolist() if confusion is None else confusion
    network.history.append({"score": score, "confusion": confusion, "loss": loss})
    network.keep_if_best(score)


def assert_same(one, other):
    """Two nested values are equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def batch(seed):
    """Return images and their loss as a function of logits."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 1, 16, 24, generator=gen)
    y = torch.randint(-1, 4, (4, 16, 24), generator=gen)
    return x, lambda logits: lib.deep_supervision_loss(logits, y, (0.1,), gamma=0.0)


def nan_loss(logits):
    """Return NaN."""
    return logits[0].mean() * float("nan")


def inf_gradient(logits):
    """Return a loss that is finite, with a slope that is not: a root at 0."""
    return torch.sqrt((logits[0] - logits[0].detach()).sum())


def take_step(network, x, criterion):
    """Take a step; return its loss and how many good ones it is, as they are counted."""
    network.sums.zero_()
    network.step(x, torch.float32, criterion)
    return network.sums.tolist()


def learnt(network):
    """Return copies of weights, statistics and the optimizer's averages and counters."""
    weights = {name: value.clone() for name, value in network.model.state_dict().items()
               if "num_batches_tracked" not in name}  # which is never used
    state = network.optimizer.state_dict()["state"]
    return weights, {i: {name: value.clone() for name, value in one.items()}
                     for i, one in state.items()}


def test_the_average_counts_its_own_steps():
    """From 0 towards 1, decay .28: at first 2/11 and 3/12 are less than that, from the third step
    on it is what counts; what is left of the start is the product. Decay 0 is a copy, and an
    average goes on where it was saved."""
    model, left = torch.nn.Linear(2, 1), 1.0
    torch.nn.utils.vector_to_parameters(torch.zeros(3), model.parameters())
    ema, copy, other = lib.EMA(model, 0.28), lib.EMA(model, 0.0), lib.EMA(model, 0.28)
    torch.nn.utils.vector_to_parameters(torch.ones(3), model.parameters())
    for steps, decay in enumerate((2 / 11, 3 / 12, 0.28, 0.28), 1):
        ema.update(model)
        copy.update(model)
        left *= decay
        assert ema.steps == steps
        for value in ema.model.parameters():
            assert torch.allclose(value, torch.full_like(value, 1 - left), atol=1e-6)
        assert_same(dict(copy.model.state_dict()), dict(model.state_dict()))
        if steps == 3:
            other.load_state_dict(ema.state_dict())
    other.update(model)
    assert_same(dict(other.state_dict()), dict(ema.state_dict()))


@pytest.mark.fault(30, 32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("bad", [nan_loss, inf_gradient])
def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path, bad, first, dtype):
    """No weight, no statistic, no counter: after it, as the first step or between two, the next
    good step is that of a twin that never met it, bit for bit. The scale is halved."""
    network, twin = new_network(tmp_path, dtype=dtype), new_network(tmp_path, dtype=dtype)
    for seed in range(first):
        assert [take_step(one, *batch(seed))[1] for one in (network, twin)] == [1, 1]
    before, scale = learnt(network)[0], network.scaler.get_scale()
    assert take_step(network, batch(7)[0], bad) == [0, 0]
    assert_same(before, learnt(network)[0])
    assert network.scaler.get_scale() == scale / 2
    assert all(value.isfinite().all() for value in network.ema.model.state_dict().values())
    ours, theirs = (take_step(one, *batch(10)) for one in (network, twin))
    assert ours == theirs and ours[1] == 1
    assert_same(learnt(network), learnt(twin))


def trained(folder, **args):
    """Return a network that has two good steps and an epoch behind it."""
    network = new_network(folder, **args)
    for seed in range(2):
        take_step(network, *batch(seed))
    note_epoch(network, 0.25)
    return network


@pytest.mark.fault(43, 44)
def test_a_network_is_saved_and_loaded_bit_for_bit(tmp_path):
    """Weights, average, optimizer, scale, history, best weights, by plain names: all as they were,
    and the next step is the same."""
    network, other = trained(tmp_path, dtype=torch.float16), new_network(tmp_path, seed=1)
    take_step(network, batch(7)[0], nan_loss)  # the scale has been halved
    network.save()
    other.resume()
    assert_same(network.state_dict(), other.state_dict())
    assert len(other.history) == 1 and other.scaler.get_scale() == 2.0**9
    assert other.best_figure == 0.25 and "encoder.0.0.weight" in network.state_dict()["model"]
    assert_same(*(take_step(one, *batch(5)) for one in (network, other)))
    assert_same(network.state_dict(), other.state_dict())


def test_of_a_finished_network_only_facts_are_kept(tmp_path):
    """Its file holds history, best weights and shape, no optimizer, and is a fraction as large; the
    network that is used has the best weights."""
    network = trained(tmp_path)
    network.save()
    size = network.path.stat().st_size
    network.finished = True
    network.save()
    facts = {"history", "best", "best_figure", "best_epoch", "finished", "shape"}
    assert lib.load_checkpoint(network.path).keys() == facts
    assert network.path.stat().st_size < 0.5 * size
    other = new_network(tmp_path, seed=1)
    other.resume()
    assert other.finished and other.best_epoch == 1 and not other.ema.model.training
    assert_same(dict(other.ema.model.state_dict()), dict(network.best))


@pytest.mark.fault(38)
def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    """No room for a checkpoint: a line says so, the earlier one stays whole, training goes on."""
    network = trained(tmp_path)
    network.save()
    before = network.path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse_everything)
        network.save()
    assert "stage1_fold0.pt: not saved (No space left on device)" in capsys.readouterr().out
    assert network.path.read_bytes() == before and take_step(network, *batch(4))[1] == 1


@pytest.mark.fault(41, 42)
def test_a_checkpoint_of_no_use(tmp_path, capsys):
    """A damaged one is named, and the network is as new; one of another network is a sentence."""
    network = trained(tmp_path)
    network.save()
    raw = bytearray(network.path.read_bytes())
    raw[len(raw) // 2] ^= 1
    network.path.write_bytes(raw)
    other = new_network(tmp_path, seed=1)
    other.resume()
    assert f"{network.path}: damaged" in capsys.readouterr().out
    assert_same(other.state_dict(), new_network(tmp_path, seed=1).state_dict())
    network.save()
    other.model = lib.UNet(1, 4, 8, 2)
    with pytest.raises(lib.UserError, match="stage1_fold0.pt: of other code or another network"):
        other.resume()


# ---------------------------------------------------------------------------- training side by side

def train(networks, advance, count=1, epochs=9, title="stage 1"):
    """Let so many workers train networks on the CPU."""
    progress = lib.Progress(title, networks, epochs, lambda: 40.0)
    lib.train_side_by_side(networks, advance, lib.Workers([CPU], count), progress)


def new_networks(folder, count):
    """Return so many new networks."""
    return [new_network(folder, f"stage1_fold{i}") for i in range(count)]


def test_who_has_come_least_far_is_next(tmp_path, capsys):
    """Of networks with 2, 0, 1 and 0 epochs of 3 one worker takes the second, the fourth, then the
    others as they fall behind; all are saved; each epoch of all has a line."""
    networks, taken = new_networks(tmp_path, 4), []
    for network, epochs in zip(networks, (2, 0, 1, 0), strict=True):
        for _ in range(epochs):
            note_epoch(network)

    def advance(network):
        taken.append(networks.index(network))
        note_epoch(network)
        network.finished = len(network.history) == 3

    train(networks, advance, epochs=3)
    assert taken == [1, 3, 1, 2, 3, 0, 1, 2, 3]
    assert all(lib.load_checkpoint(network.path)["finished"] for network in networks)
    shown = re.findall(r"^stage 1  epoch (\d)/3  ", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["1", "2", "3"]


def test_two_workers_never_train_one_network_at_once(tmp_path):
    """Three networks of two workers that meet in each of six epochs: two networks each time, and
    only those that lie on their device."""
    networks, meeting = new_networks(tmp_path, 4), threading.Barrier(2, timeout=10)
    at_work, met = set(), []
    networks[3].sums = networks[3].sums.to("meta")

    def advance(network):
        at_work.add(network)
        if meeting.wait() == 0:
            met.append(len(at_work))
            at_work.clear()
        meeting.wait()
        note_epoch(network)
        network.finished = len(network.history) == 4

    train(networks, advance, 2)
    assert met == [2] * 6 and [len(network.history) for network in networks] == [4, 4, 4, 0]


def test_checkpoints_come_when_half_a_minute_has_passed(tmp_path):
    """A network is saved after the epoch that ends half a minute after its last checkpoint, not
    before, and when it is finished."""
    network, saved = new_network(tmp_path), []

    def advance(network):
        saved.append(len((lib.load_checkpoint(network.path) or {"history": []})["history"]))
        note_epoch(network)
        if len(network.history) == 2:
            network.saved -= lib.SAVE_SECONDS + 1
        network.finished = len(network.history) == 4

    train([network], advance)
    assert saved == [0, 0, 2, 2] and lib.load_checkpoint(network.path)["finished"]


@pytest.mark.fault(30, 33)
@pytest.mark.parametrize("error, sentence", [
    (lib.UserError("no good step"), "no good step; try --fresh and a smaller --lr"),
    (RuntimeError("CUDA out of memory. Tried to allocate"),
     "out of memory; try --fresh and a smaller --batch-size or --width"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "out of memory; try --fresh and a smaller --batch-size or --width"),
    (RuntimeError("an illegal memory access"), None), (KeyError("no stage"), None)])
def test_what_a_user_can_mend_names_network_epoch_and_cure(tmp_path, error, sentence):
    """An epoch without one good step, or too little memory, is one sentence; a mistake in the code
    keeps its type and words. The network isn't finished."""
    networks = new_networks(tmp_path, 2)

    def advance(network):
        if network is networks[1] and len(network.history) == 1:
            raise error
        note_epoch(network)
        network.finished = len(network.history) == 3

    with pytest.raises(lib.UserError if sentence else type(error)) as raised:
        train(networks, advance, 2)
    if sentence:
        assert str(raised.value) == f"stage1_fold1, epoch 2: {sentence}"
    assert (raised.value is error) == (sentence is None) and not networks[1].finished


def test_speed_is_that_of_all_workers_together(tmp_path):
    """40 images in .1 s by each of two workers are 800 a second; one disturbed moment, three times
    as long, does not count, nor do the first steps."""
    networks = new_networks(tmp_path, 2)
    asked = {network: [] for network in networks}

    def train(network, steps):
        time.sleep((0.2, 0.1, 0.3)[len(asked[network])])
        asked[network].append(steps)
        return 10 * steps

    assert 500 < lib.measure_speed(lib.Workers([CPU], 2), networks, train) <= 800
    assert [*asked.values()] == [[2, 4, 4], [2, 4, 4]]


# ------------------------------------------------------------------------------- what a person sees

CONFUSIONS = (
    # rows the truth: of 10 pixels of soil 8 are right, two said to be bedrock, whose 10 are right
    [[5, 0, 0, 0, 0], [0, 8, 2, 0, 0], [0, 0, 10, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 2]],
    [[0, 9, 0, 0, 0], [0, 4, 6, 0, 0], [0, 0, 10, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 2]])
# of both: soil 12 / 20, bedrock 20 / 28, sand and big rock 1
FIGURES = ("loss 0.7500  score 0.8286 (0.7500 ± 0.0500)  Soil 0.600  Bedrock 0.714  Sand 1.000  "
           "Big Rock 1.000")
LINE = "stage 1  epoch {}/3  " + FIGURES + "  at most 40.0 min left\n"


def advance_two(networks, epochs):
    """Let two networks have so many epochs more behind them."""
    scores = (0.8, 0.7)
    for network, confusion, score, count in zip(networks, CONFUSIONS, scores, epochs, strict=True):
        for _ in range(count):
            note_epoch(network, score, confusion, loss=1.5 * score - 0.375)


def test_a_line_an_epoch_for_the_whole_stage(tmp_path, capsys):
    """Mean loss, score of all validation images together, mean and spread over the networks, each
    class by name, minutes left, once all networks have the epoch behind them: one has three, the
    other none: nothing; one: a line; it has ended after that: the others' epochs are shown."""
    networks = new_networks(tmp_path, 2)
    progress = lib.Progress("stage 1", networks, 3, lambda: 40.0)
    shown = []
    for epochs in ((3, 0), (0, 1), (0, 0)):
        advance_two(networks, epochs)
        progress.show()
        shown.append(capsys.readouterr().out)
    networks[1].finished = True
    progress.show()
    progress.close()
    assert shown == ["", LINE.format(1), ""]
    assert capsys.readouterr().out == LINE.format(2) + LINE.format(3)


def test_what_an_earlier_start_showed_is_not_repeated(tmp_path, capsys):
    """A run that goes on after two epochs shows the third."""
    networks = new_networks(tmp_path, 2)
    advance_two(networks, (2, 2))
    progress = lib.Progress("stage 1", networks, 3, lambda: 40.0)
    progress.show()
    advance_two(networks, (1, 1))
    progress.show()
    assert capsys.readouterr().out == LINE.format(3)


@pytest.mark.fault(49, 50)
@pytest.mark.parametrize("there", [True, False])
def test_a_bar_on_a_terminal(tmp_path, monkeypatch, there):
    """On a terminal tqdm redraws one line, with title and figures; where it is missing there is a
    line an epoch, without a carriage return."""
    if there:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sys.stdout.isatty = lambda: True
    networks = new_networks(tmp_path, 2)
    progress = lib.Progress("stage 1", networks, 3, lambda: 40.0)
    for _ in range(2):
        time.sleep(0.15 * there)  # tqdm draws at most ten times a second
        advance_two(networks, (1, 1))
        progress.show()
    progress.close()
    shown = sys.stdout.getvalue()
    if not there:
        assert shown == LINE.format(1) + LINE.format(2)
    else:
        assert shown.count("\n") == 1 and "\r" in shown
        assert all(part in shown for part in ("stage 1", "1/3", "2/3", FIGURES))


def test_a_warning_has_the_number_of_its_process(monkeypatch, capsys):
    """Alone and in rank 0 it is printed as it is, in another rank on standard error, numbered."""
    monkeypatch.delenv("RANK", raising=False)
    lib.warn("no room")
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        lib.warn("no room")
    assert capsys.readouterr() == ("no room\nno room\n", "rank 3: no room\n")


@pytest.mark.fault(59)
def test_a_score_of_chance_is_said(capsys):
    """Six pixels of soil and two of sand: soil everywhere scores (6/8 + 0) / 2 = .375; .5 is hardly
    more than that, .6 is."""
    masks = np.uint8([[[1, 1, 1, 1, 1], [1, 3, 3, 0, 0]]])
    lib.warn_of_chance(0.6, masks)
    assert capsys.readouterr().out == ""
    for score in (0.5, float("nan")):
        lib.warn_of_chance(score, masks)
        assert "guesses 0.375" in capsys.readouterr().out


def test_plateaus_by_hand():
    """Patience 1: two epochs in a row without a better figure are one; the count begins anew."""
    assert lib.count_plateaus([], 1) == 0
    assert lib.count_plateaus([1, 1, 2, 2], 1) == 0
    assert lib.count_plateaus([1, 1, 1], 1) == 1
    assert lib.count_plateaus([1, 1, 1, 1, 0, 2, 2, 2], 1) == 3


@pytest.mark.fault(60)
def test_a_mistake_is_printed_and_noted_and_the_run_goes_on(capsys):
    """The traceback on standard error, its type and words in the metrics; of a user's mistake one
    sentence; a signal ends the run."""
    metrics = {}
    with lib.going_on(metrics):
        pass
    assert metrics == {}
    with lib.going_on(metrics):
        metrics["nosuch"]
    assert metrics == {"degraded": "KeyError: 'nosuch'"}
    assert "Traceback" in capsys.readouterr().err
    with lib.going_on(metrics):
        raise lib.UserError("a smaller --lr")
    assert capsys.readouterr().err == "solve.py: a smaller --lr\n"
    assert metrics == {"degraded": "UserError: a smaller --lr"}
    with pytest.raises(KeyboardInterrupt), lib.going_on(metrics):
        raise KeyboardInterrupt


# --------------------------------------------------------------------------- validation, prediction

class Ramp(torch.nn.Module):
    """Three classes' logits: the image, a ramp from left to right, and minus the image."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # its device is the model's

    def forward(self, x):
        return [torch.cat([x, 3 * torch.linspace(-1, 1, x.shape[-1]).expand_as(x), -x], 1)]


def test_an_evaluation_by_hand():
    """Two batches of one row: images 1 and -1 stand for soil and sand, but where the ramp is more,
    3 at the right end: bedrock. Of soil, soil and an ignored pixel one is right; of sand and sand
    one, the last one is said to be bedrock. The loss is the mean over the three images."""
    x = torch.tensor([[[[1.0, 1.0, 1.0]]], [[[1.0, 1.0, 1.0]]], [[[-1.0, -1.0, -1.0]]]])
    y = torch.tensor([[[1, -1, 1]], [[-1, -1, -1]], [[3, -1, 3]]])
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    seen = []

    def criterion(logits, target):
        seen.append(target.tolist())
        return torch.tensor(float(len(seen)))

    model = Ramp().train()
    got = lib.evaluate(model, batches, torch.float32, 1, criterion)
    assert seen == [[[[0, -1, 0]], [[-1, -1, -1]]], [[[2, -1, 2]]]] and not model.training
    assert got["val_loss"] == pytest.approx((2 * 1 + 1 * 2) / 3)
    assert got["confusion"] == [[0] * 5, [0, 1, 1, 0, 0], [0] * 5, [0, 0, 1, 1, 0], [0] * 5]
    assert got["score"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)


@pytest.mark.parametrize("tta", [False, True])
def test_probabilities_by_hand(tta):
    """The mean softmax of two networks, with that of the mirrored copy's turned back."""
    x, model = torch.randn(5, 1, 4, 6, generator=torch.Generator().manual_seed(0)), Ramp()
    got = lib.predict_probs([model, model], x, torch.float32, tta)
    probs = model(x)[0].softmax(1)
    if tta:
        probs = (probs + model(x.flip(-1))[0].softmax(1).flip(-1)) / 2
    torch.testing.assert_close(got, probs)


@pytest.mark.parametrize("rim", [0, 3])
def test_whole_frames_are_predicted(rim):
    """What the networks of a fold say of two tiles side by side comes again from their frame,
    mirrored around by hand, and cut in two; fold 2 has tile 8 there. Background's share is 0, and
    so are all of the tiles of other folds' frames."""
    torch.manual_seed(0)
    data = dataclasses.replace(stage_input(), rim=rim, mean=127.5, std=50.0)
    data.fold_of[:8] = 0
    stage = [[lib.UNet(1, 4, 4, 2) for _ in range(2)] for _ in range(3)]
    for model in itertools.chain(*stage):
        model(torch.randn(4, 1, 16, 24))  # batch norms that have seen something
        model.eval()
    got = lib.predict_unseen(stage, data, torch.float32, True, lib.Workers([CPU], 2))
    assert got.shape == (3, 11, 5, 4, 6) and got.dtype == np.uint8
    frame = (np.hstack([*data.images[8:10].numpy()]).astype(np.float32) - 127.5) / 50
    x = torch.from_numpy(np.pad(frame, rim, "symmetric"))[None, None]
    want = lib.predict_probs(stage[2], x, torch.float32, True)[0, :, rim:rim + 4, rim:rim + 12]
    for tile, part in ((8, slice(0, 6)), (9, slice(6, 12))):
        np.testing.assert_allclose(got[2, tile, 1:], 255 * want[..., part].numpy(), atol=0.6)
    answered = got.any((2, 3, 4))
    assert answered[0].all() and not answered[1:, :8].any() and answered[1:, 8:].all()
    assert not got[:, :, 0].any()


@pytest.mark.fault(33)
def test_prediction_halves_a_batch_that_does_not_fit(capsys):
    """Out of memory at 8 and at 4 items: two at a time give all results in order, and it is said;
    at one item it is a sentence, and another error stays what it is."""
    asked = []

    def double(part, most=2, error="CUDA out of memory. Tried to allocate 9 GiB"):
        asked.append(len(part))
        if len(part) > most:
            raise RuntimeError(error)
        return 2 * part

    assert lib.in_batches(double, torch.arange(5), 8).tolist() == [0, 2, 4, 6, 8]
    assert asked == [5, 4, 2, 2, 1]
    assert "out of memory: going on with 2 frames at once" in capsys.readouterr().out
    for error, kind in (("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", lib.UserError),
                        ("an illegal memory access was encountered", RuntimeError)):
        with contextlib.suppress(kind):
            lib.in_batches(lambda part, e=error: double(part, 0, e), torch.arange(5), 8)
            pytest.fail("no error")


def test_the_networks_of_a_run_can_be_loaded(finished_copy):
    """By the names of their files, in eval mode, ready for an image; not those that are not
    finished or damaged."""
    out = finished_copy / "out"
    names = [f"stage{stage}_fold{fold}" for stage in (1, 2) for fold in (0, 1)]
    networks = lib.load_networks(out)
    assert [*networks] == names and not any(model.training for model in networks.values())
    first = networks["stage1_fold0"](torch.zeros(2, 1, 32, 64))
    assert len(first) == 1 and first[0].shape == (2, 4, 32, 64)
    (out / "state" / f"{names[0]}.pt").write_bytes(b"torn")
    new_network(out / "state", names[1]).save()
    assert [*lib.load_networks(out)] == names[2:]


def test_a_seed_depends_on_its_whole_key():
    """Of 200 keys none shares a seed, the order counts, and all fit into a signed 64-bit number."""
    keys = itertools.product(range(2), range(1, 3), range(5), range(10))
    seeds = {lib.seed_of(*key) for key in keys}
    assert len(seeds) == 200 and min(seeds) >= 0 and max(seeds) < 2**63
    assert lib.seed_of(1, 2) != lib.seed_of(2, 1)
