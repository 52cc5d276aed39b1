"""The faults of a run, by number: test_NN_what proves row NN, most of them by the command itself.

Single cases are tried at greater length where their code is tested: the data (1 to 19) in test_data, files in
test_checkpoints and test_submission. How many bad inputs were tried is printed at the end.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_checkpoints
import test_data
import test_submission
import torch
from conftest import ROOT, tiny_arrays
from test_frames import cut_frames
from test_solve import FAST, SAVE_EACH_EPOCH, refused, start, write

import lib
import solve

CASES = {number: [name for name in test_data.FAULTS if name.startswith(number)]
         for number in sorted({name[:2] for name in test_data.FAULTS})}


def finished(argv, *expected):
    """Run the command; assert that it ends well, with a checked submission, and says all of expected."""
    status, out, err = start(argv)
    assert status == 0, err
    for part in expected:
        assert re.search(part, out), f"{part} is not in:\n{out}"
    assert "submission.csv, 6 rows, checked" in out
    return out


@pytest.fixture
def argv(tmp_path):
    """A whole run on tiny data, two folds of two epochs a stage, as the words of a command."""
    return ["--data", write(tmp_path), "--out", tmp_path / "out", *FAST]


def failing(function, error, *calls):
    """Return function, which raises error at these calls of it, from 1, or at all if none is given."""
    count = 0

    def wrapper(*args, **kwargs):
        nonlocal count
        count += 1
        if not calls or count in calls:
            raise error
        return function(*args, **kwargs)

    return wrapper


FULL = OSError(errno.ENOSPC, "No space left on device")
MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


# ------------------------------------------------------------------------------ data


@pytest.mark.parametrize("name", [name for names in CASES.values() for name in names])
def test_01_to_17_of_the_data(tmp_path, name):
    """A path, archive, shape, type or value that is wrong is one sentence; --out is not even made."""
    folder = tmp_path / "data set"
    folder.mkdir()
    make, expected = test_data.FAULTS[name]
    refused(["--data", make(folder), "--out", tmp_path / "out", *FAST], *expected)
    assert not (tmp_path / "out").exists()


def test_every_row_of_the_data_has_a_case():
    """Rows 1 to 17 are each among the bad files above; 2, 3, 5 and 6 by their own names."""
    assert set(CASES) >= {f"{row:02}" for row in range(1, 18)} - {"13"}


def test_13_types(tmp_path):
    """Big-endian integers and reversed views give the same data as plain bytes."""
    plain = lib.load_data(write(tmp_path))
    for change in (lambda x: x.astype(">i4"), lambda x: np.ascontiguousarray(x[::-1])[::-1]):
        other = lib.load_data(write(tmp_path, training_set=change(tiny_arrays()["training_set"])))
        np.testing.assert_array_equal(other.images, plain.images)


def test_18_duplicates(tmp_path):
    """A test image that is also a training image is counted in the run's first lines."""
    test = tiny_arrays()["test_set"].copy()
    test[3] = tiny_arrays()["training_set"][5, 0]
    finished(["--data", write(tmp_path, test_set=test), "--out", tmp_path / "out", *FAST], "1 test image")


def test_19_odd_sizes(tmp_path):
    """Tiles of 65×127 are padded inside: the submission has their 8,255 pixels a row."""
    data = tmp_path / "odd.npz"
    np.savez(data, **tiny_arrays(8, 6, 65, 127))
    finished(["--data", data, "--out", tmp_path / "out", *FAST, "--stages", "1"])
    assert (tmp_path / "out" / "submission.csv").read_text().splitlines()[1].count(",") == 65 * 127


# ------------------------------------------------------------------------------ cleaning and morphology


@pytest.mark.parametrize("template,word", [(np.full((9, 9), 80.0), "flat"), (np.eye(99), "larger")])
def test_20_21_templates(template, word):
    """A flat template, which OpenCV finds everywhere, and one larger than the image are refused."""
    images, masks = (tiny_arrays()["training_set"][:, i] for i in (0, 1))
    with pytest.raises(lib.UserError, match=word):
        lib.template_scores(images, masks, np.zeros(len(images), bool), template)


def test_22_23_types_of_images():
    """NaN in an image gives no NaN in a score, and float64 images the scores of their uint8 ones."""
    images, masks = (tiny_arrays()["training_set"][:, i] for i in (0, 1))
    plain, double = (lib.autoencoder_scores(x, masks) for x in (images, images.astype(np.float64)))
    np.testing.assert_array_equal(plain, double)
    broken = images.astype(np.float64)
    broken[2, 3:5] = np.nan
    assert np.isfinite(lib.autoencoder_scores(broken, masks)).all()


def test_24_insane_cut(tmp_path, monkeypatch):
    """A witness that names half of the images is not believed: the run says so and keeps all of them."""
    monkeypatch.setattr(lib, "mask_copies", lambda images, masks: np.arange(len(images)) % 2 * 9.0)
    flags = [word for word in FAST if word != "--no-clean"]
    finished(["--data", write(tmp_path), "--out", tmp_path / "out", *flags], "refused, all are kept",
             "0 of 24 training images")


def test_25_diverged_autoencoder(tmp_path, monkeypatch):
    """An autoencoder whose loss is no number any more is left out, and it is said."""
    monkeypatch.setattr(lib.F, "mse_loss", lambda *_: torch.tensor(float("nan")))
    flags = [word for word in FAST if word != "--no-clean"]
    finished(["--data", write(tmp_path), "--out", tmp_path / "out", *flags], "without the autoencoder")


def test_26_decisions_are_kept(argv, monkeypatch):
    """The second start does not look for intruders again."""
    flags = [word for word in argv if word != "--no-clean"]
    finished(flags)
    monkeypatch.setattr(lib, "find_outliers", failing(lib.find_outliers, AssertionError("looked again")))
    finished(flags)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, bool])
def test_27_types_of_masks(dtype):
    """Morphology takes any integers, and gives their type back."""
    mask = np.zeros((1, 9, 9), dtype)
    mask[0, 2:7, 2:7] = 1
    assert lib.clean_masks(mask).dtype == dtype and (lib.clean_masks(mask) == mask).all()


def test_28_renumbered_classes():
    """Renumbering the classes renumbers the cleaned mask, and does nothing else."""
    masks = np.random.default_rng(0).integers(0, 5, (4, 20, 30)).astype(np.uint8)
    new = np.array([3, 0, 4, 1, 2], np.uint8)
    np.testing.assert_array_equal(lib.clean_masks(new[masks]), new[lib.clean_masks(masks)])


def test_29_small_rocks_stay():
    """A class that is one pixel of a mask is still there after opening and closing."""
    mask = np.ones((1, 9, 9), np.uint8)
    mask[0, 4, 4] = 4
    assert 4 in lib.clean_masks(mask)


# ------------------------------------------------------------------------------ training


class Injector:
    """Lets what is asked for happen in training, at a stage, network, epoch and step, whoever trains when."""

    def __init__(self, monkeypatch):
        self.here, self.faults = threading.local(), {}
        epoch, batch = solve.train_one_epoch, solve.training_batch

        def train_one_epoch(run, network, data, index, key, *rest):
            self.here.key, self.here.step = key, 0
            return epoch(run, network, data, index, key, *rest)

        def training_batch(*args):
            self.here.step += 1
            x, y = batch(*args)
            for where in (self.here.key + (self.here.step,), self.here.key, self.here.key[:1]):
                if where in self.faults:
                    x = self.faults[where](x)
            return x, y

        monkeypatch.setattr(solve, "train_one_epoch", train_one_epoch)
        monkeypatch.setattr(solve, "training_batch", training_batch)

    def at(self, *where, fault):
        """Pass each batch at (stage[, net, epoch[, step]]) through fault."""
        self.faults[where] = fault


@pytest.fixture
def inject(monkeypatch):
    """A function that injects faults."""
    return Injector(monkeypatch).at


def not_a_number(x):
    """Return a batch that spoils the loss, each gradient and batch norm's statistics."""
    return x * float("nan")


def raising(error):
    """Return a fault that raises."""
    def fault(x):
        raise error

    return fault


@pytest.mark.parametrize("where", [(1, 0, 1, 1), (1, 1, 2, 3), (2, 0, 1, 2)])
def test_30_not_a_number_once(argv, inject, where):
    """One batch that is no number, at any step, is left out: no weight is NaN, the run ends well."""
    inject(*where, fault=not_a_number)
    finished(argv)
    for file in (argv[3] / "state").glob("stage?_fold?.pt"):
        state = lib.load_checkpoint(file)
        assert all(torch.isfinite(value.float()).all() for value in state["best"].values())
        assert all(np.isfinite(epoch["loss"]) for epoch in state["history"])


def test_30_not_a_number_for_ever(argv, inject):
    """If every step of an epoch is no number, a sentence says where and what to try; what was saved before is
    still good."""
    inject(1, 1, 2, fault=not_a_number)
    monkey, lib.SAVE_SECONDS = lib.SAVE_SECONDS, 0
    try:
        refused(argv, "stage1_fold1, epoch 2", "finite", "--lr", "--fresh")
    finally:
        lib.SAVE_SECONDS = monkey
    assert len(lib.load_checkpoint(argv[3] / "state" / "stage1_fold1.pt")["history"]) == 1


def test_30_not_a_number_in_stage_2(argv, inject):
    """In stage 2 that costs stage 2 alone: there is a submission, and it is said."""
    inject(2, 1, 2, fault=not_a_number)
    degraded(argv, "UserError: stage2_fold1, epoch 2", "submitted: stage1")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_31_focal_loss_at_its_ends(gamma):
    """At logits of ±200 value and gradient are finite, whatever γ."""
    logits = torch.tensor([[[200.0, -200.0, 0.0]], [[-200.0, 200.0, 0.0]]]).transpose(0, 1)[..., None]
    logits = logits.clone().requires_grad_()
    loss = lib.focal_loss(logits, torch.zeros(1, 3, 1, dtype=torch.int64), gamma)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_32_scaler_skips_the_first_step(argv):
    """Half precision, whose scaler overflows at first, trains to a submission."""
    at = argv.index("float32")
    finished([*argv[:at], "float16", *argv[at + 1:]], "float16")


@pytest.mark.parametrize("where", [(0,), (1,), (1, 1, 2, 3)])
def test_33_out_of_memory_in_training(argv, inject, where):
    """Want of memory, while the speed is measured or later, is a sentence that says what to make smaller."""
    inject(*where, fault=raising(MEMORY))
    refused(argv, "out of memory", "--fresh", "--batch-size", "--width")


def test_33_out_of_memory_in_prediction(argv, monkeypatch):
    """Half the batch, again; the run says so and ends well."""
    real = lib.predict_probs
    monkeypatch.setattr(lib, "predict_probs", lambda models, make_input, *rest: real(
        models, failing(make_input, MEMORY, 1, 3), *rest))
    finished(argv, "out of memory at 64 images: going on with 32")


def degraded(argv, reason, *expected):
    """Run the command; assert that it ends with status 3, a traceback, the reason in metrics.json and a
    checked submission, and says all of expected; return the metrics."""
    status, out, err = start(argv)
    assert status == 3 and "Traceback (most recent call last)" in err
    metrics = json.loads((argv[3] / "metrics.json").read_text())
    assert reason in metrics["degraded"] and reason in err
    for part in ("submission.csv, 6 rows, checked", f"degraded: {metrics['degraded']}", *expected):
        assert part in out
    return metrics


@pytest.mark.parametrize("error", [MemoryError("no"), ValueError("a bug"), FULL, MEMORY])
def test_60_a_submission_whatever_fails_in_stage_2(argv, inject, error):
    """Stage 1 is submitted if stage 2 fails, be it by a fault of the kit, and nothing hides it; the same
    command, the fault mended, goes on to the end."""
    inject(2, 1, 1, 2, fault=raising(error))
    degraded(argv, "out of memory" if error is MEMORY else str(error), "submitted: stage1")


@pytest.mark.parametrize("name,call", [("refine", 1), ("second_input", 1), ("predict", 2), ("keep_first", 1),
                                       ("conclude", 2)])
def test_60_a_mistyped_name(argv, monkeypatch, name, call):
    """A NameError in any part of what follows stage 1: a traceback, status 3, and stage 1 is submitted."""
    error = NameError("name 'evidnece' is not defined")
    monkeypatch.setattr(solve, name, failing(getattr(solve, name), error, call))
    metrics = degraded(argv, "NameError: name 'evidnece' is not defined")
    assert metrics["submitted"] == "stage1"
    monkeypatch.undo()
    finished(argv)
    assert "degraded" not in json.loads((argv[3] / "metrics.json").read_text())


def test_60_labels_that_cannot_be_described(argv, monkeypatch):
    """A mistake in the figures of the submission, each time they are asked for, costs those alone."""
    def wrong(*_):
        raise ValueError("a lasting bug")

    monkeypatch.setattr(lib, "describe_labels", wrong)
    assert "test_shares" not in degraded(argv, "ValueError: a lasting bug")


def test_60_a_report_that_fails(argv, monkeypatch):
    """A mistake in the report costs the report alone."""
    monkeypatch.setattr(lib, "pictures", failing(lib.pictures, KeyError("wrong")))
    degraded(argv, "KeyError: 'wrong'")


@pytest.mark.parametrize("where", [(0, 0, 0, 1), (1, 1, 2)])
def test_a_mistake_in_stage_1_is_not_hidden(argv, inject, where):
    """Before there is anything to submit a mistake of the kit comes out as it is."""
    inject(*where, fault=raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        start(argv)


def test_34_last_batch_of_one_image(tmp_path):
    """Batches of 4 of 13 images: the last one holds one image, and batch norm takes it."""
    arrays = tiny_arrays(13, 6)
    np.savez(tmp_path / "mars.npz", **arrays)
    finished(["--data", tmp_path / "mars.npz", "--out", tmp_path / "out", *FAST, "--rare-repeat", "1",
              "--batch-size", "4", "--folds", "1", "--stages", "1"])


@pytest.mark.parametrize("images", [2, 10])
def test_34_one_image_of_few_pixels(tmp_path, images):
    """Tiles of 16×16 are one pixel at the bottom of the network: a batch of one has nothing to normalise."""
    np.savez(tmp_path / "mars.npz", **tiny_arrays(images, 6, 16, 16))
    finished(["--data", tmp_path / "mars.npz", "--out", tmp_path / "out", *FAST])


def test_35_gpu_that_is_there_but_unusable(monkeypatch):
    """A GPU that dies at its first kernel, as a P100 does with today's builds: the CPU, and a hint."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", failing(None, RuntimeError("no kernel image is available")))
    (device,), why = lib.pick_devices("auto")
    assert device.type == "cpu" and "no kernel image" in why and "GPU T4 x2" in why


def test_35_gpu_asked_for_and_not_there():
    """--device cuda without one is a sentence."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(lib.UserError, match="--device cpu"):
        lib.pick_devices("cuda")


PHASES = {"cleaning": ("find_outliers", "lib"), "frames": ("assemble_frames", "lib"),
          "plan": ("measure_speed", "solve"), "stage 1": ("train_one_epoch", "solve"),
          "prediction": ("predict", "solve"), "out of fold": ("score_step", "lib"),
          "frames' evidence": ("frame_evidence", "lib"), "stage 2": ("second_input", "solve"),
          "test set": ("submit", "lib"), "report": ("write_report", "lib")}
SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import lib, solve
name, module = sys.argv[1:3]
module = globals()[module]
real = getattr(module, name)
def slow(*args, **kwargs):
    if name != "train_one_epoch" or args[4][0] == 1:
        print("IN PHASE", flush=True)
        for _ in range(3000):  # as long as a person needs, in short calls as of NumPy
            time.sleep(0.01)
            getattr(args[0], "workers", lib.Workers([solve.torch.device("cpu")], 1)).check()
    return real(*args, **kwargs)
setattr(module, name, slow)
sys.exit(solve.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("sig,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("phase", PHASES)
def test_36_signals(frames_data, tmp_path, phase, sig, status):
    """In each phase SIGTERM ends with 143 and Ctrl-C with 130 and one sentence, within seconds; a phase that
    never comes, or a signal that is ignored, fails."""
    flags = [word for word in FAST if word != "--no-clean"]
    argv = ["--data", frames_data, "--out", tmp_path / "out", *flags]
    child = subprocess.Popen([sys.executable, "-u", "-c", SLOW, *PHASES[phase], *map(str, argv)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert any("IN PHASE" in line for line in child.stdout), child.stderr.read()
    child.send_signal(sig)
    _, err = child.communicate(timeout=20)
    assert child.returncode == status
    assert err == "solve.py: stopped; the same command, without --fresh, goes on from the last checkpoint\n"
    assert not (tmp_path / "out" / "submission.csv").exists() or phase == "report"


@pytest.fixture(scope="module")
def frames_data(tmp_path_factory):
    """Tiles that are put together to frames."""
    images, _ = cut_frames(6, 3, 2, 32, 64)
    masks = (1 + (images > 110)).astype(np.uint8)
    file = tmp_path_factory.mktemp("frames") / "mars.npz"
    np.savez(file, training_set=np.stack([images[:24], masks[:24]], 1), test_set=images[24:])
    return file


def launch(argv):
    """Start the command as a process of its own."""
    return subprocess.Popen([sys.executable, "-u", "-c", SAVE_EACH_EPOCH, *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


MOMENTS = ("", "device:", "plan:", "stage 1", "stage1 out", "stage 2", "stage2 out", "submission:")


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.long)])
def test_37_killed_at_any_moment(tmp_path, kills):
    """SIGKILL up to .4 s after lines of every part from loading to the CSV: the same command goes on, shows
    at most one epoch twice, and ends in the bytes of a run that nobody disturbed. Tiles of 64 × 64, so that
    stage 1 begins with an epoch of small ones."""
    flags = [word for word in FAST if word != "--no-clean"]
    data, rng, done, lives = write(tmp_path, **tiny_arrays(12, 4, 64, 64)), random.Random(0), 0, 0
    assert start(["--data", data, "--out", tmp_path / "whole", *flags])[0] == 0
    want = (tmp_path / "whole" / "submission.csv").read_bytes()
    while done < kills:
        argv, killed = ["--data", data, "--out", tmp_path / f"out{lives}", *flags], 0
        while killed < 5:  # then let it end
            child, said = launch(argv), ""
            for line in child.stdout:
                said += line
                if line.startswith(MOMENTS[(done + killed) % len(MOMENTS)]):
                    break
            time.sleep(rng.uniform(0, 0.4))
            child.kill()
            said += child.communicate()[0]
            if child.returncode == 0:
                break  # that moment was over
            killed += 1
        child = launch(argv)
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert (tmp_path / f"out{lives}" / "submission.csv").read_bytes() == want
        epochs = re.findall(r"stage \d  epoch \d", said + out)
        assert len(epochs) <= len(set(epochs)) + 1
        done, lives = done + killed, lives + 1
    print(f"{done} kills in {lives} runs")


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("what", ["fold", "submission.csv", "report.html"])
def test_38_full_disk(argv, monkeypatch, what):
    """Without room for a checkpoint the run goes on; without room for the CSV it says so, and the next start
    needs no training; without room for the report the submission is there."""
    real = lib.atomic_write

    def write_atomically(path):
        if what in path.name:
            raise FULL
        return real(path)

    monkeypatch.setattr(lib, "atomic_write", write_atomically)
    if what == "submission.csv":
        refused(argv, "No space left")
        monkeypatch.setattr(lib, "atomic_write", real)
        assert "epoch 1/" not in finished(argv)
    else:
        finished(argv, "No space left")


def test_39_out_that_cannot_be_written(tmp_path):
    """--out below a file is refused with its name."""
    data = write(tmp_path)
    refused(["--data", data, "--out", data / "out", *FAST], "cannot be written", "choose another folder")


def test_40_two_runs_in_one_folder(tmp_path):
    """The second is refused; once the first is killed, the folder is free again."""
    argv = ["--data", write(tmp_path), "--out", tmp_path / "out", *FAST]
    first = launch([*argv, "--epochs", "999"])
    for line in first.stdout:
        if line.startswith("plan:"):
            break
    refused(argv, "another run works in", "--out")
    first.kill()
    first.communicate()
    finished([*argv, "--fresh"])


@pytest.mark.parametrize("kind", test_checkpoints.DAMAGED)
def test_41_damaged_checkpoints(tmp_path, kind):
    """Empty, cut, text or evil: never executed, and named."""
    test_checkpoints.test_anything_else_is_refused_and_never_executed(tmp_path, kind)


@pytest.mark.parametrize("flag,value,field", [("--seed", "5", "seed"), ("--width", "8", "width"),
                                              ("--lr", "0.5", "lr"), ("--data", "other.npz", "data_sha256")])
def test_42_another_run(tmp_path, flag, value, field):
    """--out that holds a run of another seed, network, rate or file is refused, the field named."""
    argv = ["--data", write(tmp_path), "--out", tmp_path / "out", *FAST, "--stages", "1"]
    finished(argv)
    if flag == "--data":
        value = write(tmp_path, value, **tiny_arrays(seed=1))
    refused([*argv, flag, value], f"with {field} = ", "--fresh")


def test_42_another_version(tmp_path):
    """State of other names, as another version may leave it, is refused by the name."""
    argv = ["--data", write(tmp_path), "--out", tmp_path / "out", *FAST, "--stages", "1"]
    finished(argv)
    file = tmp_path / "out" / "state" / "identity.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "depth": 5}))
    refused(argv, "depth = 5")


def test_43_44_45_what_a_checkpoint_holds(argv, monkeypatch):
    """Plain values and tensors that weights_only takes; no prefix of a wrapper; the plateau's state."""
    monkeypatch.setattr(lib, "SAVE_SECONDS", 0)

    def validate(run, network, *rest, real=solve.validate):
        if network.history:  # in the second epoch
            raise KeyboardInterrupt
        return real(run, network, *rest)

    monkeypatch.setattr(solve, "validate", validate)
    assert start(argv)[0] == 130
    state = lib.load_checkpoint(argv[3] / "state" / "stage1_fold0.pt")
    assert state["scheduler"]["num_bad_epochs"] is not None and not state["finished"]
    assert not [key for key in state["model"] if key.startswith(("module.", "_orig_mod."))]


def test_46_finished_run(argv, monkeypatch):
    """Once more: no network is trained."""
    finished(argv)
    monkeypatch.setattr(solve, "train_one_epoch", failing(None, AssertionError("trained again")))
    finished(argv)


@pytest.mark.parametrize("hours", ["0", "0.00001", "0.0015"])
def test_47_no_time(argv, hours):
    """A budget of nothing, of less than an epoch, and one that is over in the middle: a submission."""
    finished([*argv, "--max-hours", hours])


def test_47_in_time(tmp_path):
    """A run whose networks could train for minutes has written its submission, from start to end of the
    process, within the 40 s that it was given, and has used most of them."""
    data, start = write(tmp_path, **tiny_arrays(64, 12, 64, 64)), time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "solve.py", "--data", data, "--out", tmp_path / "out",
                           "--no-clean", "--max-hours", str(40 / 3600)], capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert "submission.csv, 12 rows, checked" in done.stdout and 15 < seconds < 40


@pytest.mark.parametrize("seconds", ["NaN", "-1e9", '"soon"', "null", "1e400", "1e308"])
def test_47_damaged_clock(argv, seconds):
    """A clock that holds no time starts anew."""
    finished(argv)
    (argv[3] / "state" / "clock.json").write_text(f'{{"seconds": {seconds}}}')
    finished(argv)


# ------------------------------------------------------------------------------ output and notebook


@pytest.mark.parametrize("name", test_submission.FAULTS)
def test_48_checker(tmp_path, name):
    """The checker says what is wrong with a submission, and where."""
    test_submission.test_checker_names_the_fault(tmp_path, name)


@pytest.mark.parametrize("module", ["matplotlib", "tqdm"])
def test_49_without(argv, module):
    """The run ends well where a package for pictures or bars is missing."""
    code = f"import sys; sys.modules['{module}'] = None; import solve; sys.exit(solve.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_50_no_terminal(argv):
    """Into a file the output has a line an epoch and nothing is drawn twice."""
    out = finished(argv)
    assert "\r" not in out and "\x1b" not in out and len(re.findall("^stage 1  epoch", out, re.M)) == 2


def test_51_pasted_cell():
    """Without __file__ the last line calls main([]), whatever the kernel's arguments are."""
    last = ast.parse((ROOT / "solve.py").read_text()).body[-1]
    code = compile(ast.Module([last], []), "cell", "exec")
    for _ in range(2):
        got = []
        exec(code, {"__name__": "__main__", "main": got.append, "sys": sys})
        assert got == [[]]


@pytest.mark.parametrize("flag,near", [("--fold", "--folds"), ("--epoch", "--epochs"), ("--ouut", "--out")])
def test_52_mistyped_flag(flag, near):
    """An unknown flag names the nearest."""
    refused([flag, "3"], f"did you mean {near}?")


def test_53_paths(tmp_path):
    """Spaces and umlauts in paths, and a locale without them, are no trouble."""
    folder = tmp_path / "Mars Gelände"
    folder.mkdir()
    argv = ["--data", write(folder), "--out", folder / "the out", *FAST]
    done = subprocess.run([sys.executable, ROOT / "solve.py", *map(str, argv)], capture_output=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    assert (folder / "the out" / "submission.csv").exists()


@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 300, "a\0b", ""])
@pytest.mark.parametrize("flag", ["--data", "--out"])
def test_53_impossible_paths(argv, flag, path):
    """A path that cannot be is a sentence."""
    refused([*argv, flag, path])


def test_54_another_process_has_ended(argv, monkeypatch):
    """If a collective finds that a process of the run is dead, this one ends too, in one sentence, and after
    stage 1 with what there is. That torchrun's processes do: test_ranks.py."""
    def broken(*_):
        raise RuntimeError("Connection closed by peer")

    work = SimpleNamespace(is_completed=lambda: True, wait=broken)
    with monkeypatch.context() as patch:
        patch.setattr(solve, "train_stage", lambda *_: lib.Ranks().wait(work))
        refused(argv, "another process of this run has ended; the same command goes on")
    monkeypatch.setattr(solve, "refine", lambda *_: lib.Ranks().wait(work))
    degraded(argv, "another process of this run has ended", "submitted: stage1")


def test_62_beside_busy_processes(tmp_path):
    """Beside two busy processes cleaning and frames of 60 tiles take a few times as long, not forty
    times: no thread of an operation waits for another."""
    images = np.random.default_rng(0).integers(1, 255, (60, 64, 128)).astype(np.uint8)
    np.savez(tmp_path / "mars.npz", training_set=np.stack([images, images % 4 + 1], 1))
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import lib; from pathlib import Path; "
            "state = Path(sys.argv[3]); state.mkdir(parents=True); data = lib.load_data(sys.argv[2])\n"
            "with lib.single_threaded():\n"
            "    start = time.monotonic(); workers = lib.Workers([lib.torch.device('cpu')], 2)\n"
            "    lib.clean_data(data, state, '', 0, lib.Ranks(), workers.map)\n"
            "    lib.find_frames(data, state, lib.torch.device('cpu'), lib.Ranks(), workers.map)\n"
            "    print('SECONDS', time.monotonic() - start)")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def seconds(name):
        command = [sys.executable, "-c", code, ROOT, tmp_path / "mars.npz", tmp_path / name / "state"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
        return float(re.search(r"SECONDS ([\d.]+)", done.stdout)[1])

    alone, others = seconds("alone"), []
    try:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        assert seconds("beside") < 2 + 6 * alone
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_all_rows_are_here():
    """Each of the first 54 rows has its test in this file."""
    names = re.findall(r"^def test_(\d\d)_(?:to_)?(\d\d)?_?(\d\d)?", Path(__file__).read_text(), re.M)
    rows = {int(number) for name in names for number in name if number} | set(range(1, 18))
    assert rows >= set(range(1, 55))
