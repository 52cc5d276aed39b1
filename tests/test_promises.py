"""The promises of the kit's design, each held by a whole run."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import kit
import numpy as np
import pytest
import torch

import lib
import solve

PLAIN = "--no-clean", "--no-frames"  # a tiny run of less than a second


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


# ------------------------------------------------- one command, whatever comes between

@pytest.mark.fault(48)
def test_one_command_ends_in_a_checked_submission(finished):
    """From the data file alone: a submission that our checker and pandas' layout accept, its zip,
    and what describes it."""
    out = finished / "out"
    labels = lib.check_submission(out / "submission.csv", 6, 32 * 64)
    rows = (out / "submission.csv").read_text().splitlines()
    assert rows[0] == ",".join(["id", *map(str, range(2048))]) and len(rows) == 7
    assert rows[6] == ",".join(["5", *map(str, labels[5])])
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.read("submission.csv") == (out / "submission.csv").read_bytes()
    assert {"report.html", "figure.png", "history.csv", "outliers.csv"} <= set(contents(out))
    assert "degraded" not in metrics_of(out)


def test_all_cores_are_used(finished_copy):
    """With two threads there are two workers, and the same bytes as with one."""
    out = finished_copy / "out"
    before = (out / "submission.csv").read_bytes()
    for network in (out / "state").glob("stage*"):
        network.unlink()
    torch.set_num_threads(2)
    try:
        status, printed, err = kit.run_main(finished_copy / "mars.npz", out)
    finally:
        torch.set_num_threads(1)
    assert status == 0, err
    assert ", 2 workers," in printed and "stage 1  epoch 2/2" in printed
    assert (out / "submission.csv").read_bytes() == before


# one child imports torch and is forked into runs that die at their n-th os.replace
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import kit, lib
lib.SAVE_SECONDS = 0
replace = os.replace
for n in map(int, sys.argv[4:]):
    if os.fork() == 0:
        def count(*paths):
            global n
            n -= 1
            if n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
        os.replace = count
        kit.run_main(sys.argv[2], f"{sys.argv[3]}{n}", *{flags})
        os._exit(1)
    print(n, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.fault(37)
@pytest.mark.parametrize("moments", [
    (6, 9, 12), pytest.param(range(1, 18), marks=pytest.mark.slow)], ids=["three", "all"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, moments):
    """kill -9 at the n-th file that gets its name, in stage 1, in stage 2, at the submission: no
    file is half written, the same command keeps the epochs that were saved, and it ends in the
    bytes of a run that nobody disturbed."""
    np.savez(tmp_path / "mars.npz", **kit.tiny_arrays(12, 3, 32, 32))
    assert kit.run_main(tmp_path / "mars.npz", tmp_path / "whole", *PLAIN)[0] == 0
    whole, saved = tmp_path / "whole", 0
    child = subprocess.run(
        [sys.executable, "-c", KILLED.replace("{flags}", repr(PLAIN)), kit.ROOT / "tests",
         tmp_path / "mars.npz", tmp_path / "out", *map(str, moments)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(kit.ROOT)})
    assert child.stdout.split("\n")[:-1] == [f"{n} -9" for n in moments], child.stderr
    for n in moments:
        out = tmp_path / f"out{n}"
        paths = sorted(out.glob("state/stage*.pt"))
        before = {path: lib.load_checkpoint(path)["history"] for path in paths}
        status, printed, err = kit.run_main(tmp_path / "mars.npz", out, *PLAIN)
        assert status == 0 and "damaged" not in printed, err
        for path, history in before.items():
            assert lib.load_checkpoint(path)["history"][:len(history)] == history
            saved += len(history)
        assert (out / "submission.csv").read_bytes() == (whole / "submission.csv").read_bytes()
        ours, theirs = metrics_of(out), metrics_of(whole)
        assert ours | {"minutes": 0} == theirs | {"minutes": 0}
        assert not list(out.rglob("*.tmp"))
    assert saved > 2


@pytest.mark.slow
@pytest.mark.fault(47)
def test_a_submission_exists_before_the_hours_are_over(tmp_path):
    """Of --max-hours 0.01 a run of planned size, not a tiny one, uses no more than its 36 s."""
    np.savez(tmp_path / "mars.npz", **kit.tiny_arrays(60, 20))
    start = time.time()
    done = subprocess.run(
        [sys.executable, kit.ROOT / "solve.py", "--data", tmp_path / "mars.npz", "--out",
         tmp_path / "out", "--device", "cpu", "--max-hours", "0.01"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "submission.csv").stat().st_mtime - start < 36
    lib.check_submission(tmp_path / "out" / "submission.csv", 20, 32 * 64)


# ------------------------------------------------------------------- the user's mistakes

MISTAKES = {"flag": (("--max-hour", "1"), "--max-hours"), "file": (("--data", "no.npz"), "no.npz"),
            "another run": (("--seed", "3"), "seed = 0")}


@pytest.mark.parametrize("flags,named", MISTAKES.values(), ids=MISTAKES)
def test_a_users_mistake_is_one_sentence(finished_copy, flags, named):
    """On standard error, naming what is wrong, with status 2 and no traceback; of an earlier run's
    files all keep their bytes."""
    before = contents(finished_copy)
    status, _, err = kit.run_main(finished_copy / "mars.npz", finished_copy / "out", *flags)
    assert status == 2 and err.count("\n") == 1 and err.startswith("solve.py: ") and named in err
    assert contents(finished_copy) == before


# ---------------------------------------------------- no network, pickle or foreign file

WATCHED = {"socket.__new__", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
           "os.system", "os.posix_spawn", "pickle.find_class"}
seen: list[str] | None = None  # by Python's audit, while it is a list


def audit(event: str, args: tuple) -> None:
    if seen is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        if (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(os.path.realpath(os.fsdecode(args[0])))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.rename"):
        seen.extend(os.path.realpath(os.fsdecode(path)) for path in args[:2]
                    if isinstance(path, (str, bytes, os.PathLike)))
    elif event in WATCHED:
        seen.append(f"{event} {args}"[:200])


def test_no_network_no_pickle_nothing_outside_out(tmp_path, monkeypatch):
    """Python's own audit of a whole run: it opens no socket, starts no process, unpickles nothing,
    and writes and removes nothing outside --out."""
    np.savez(tmp_path / "mars.npz", **kit.tiny_arrays())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))  # PyTorch makes it
    monkeypatch.setattr(sys.modules[__name__], "seen", [])
    sys.addaudithook(audit)  # for ever, but blind after this test
    status, _, err = kit.run_main(tmp_path / "mars.npz", tmp_path / "out", "--save-probs")
    assert status == 0, err
    inside = [path for path in seen if path.startswith(str((tmp_path / "out").resolve()))]
    outside = [path for path in seen if path not in inside and path != "/dev/null"
               and not path.startswith(str((tmp_path / "torch").resolve()))]
    assert len(inside) > 20 and outside == []


class Evil:
    """Leaves a file behind if a pickle of it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.fault(8, 41)
def test_a_pickle_is_never_executed(finished_copy):
    """Neither one among the arrays, which is refused, nor one in the place of a checkpoint, with
    the right checksum, whose network is trained again."""
    evil = Evil(finished_copy / "executed")
    np.savez(finished_copy / "evil.npz", training_set=np.array([evil], object))
    status, _, err = kit.run_main(finished_copy / "evil.npz", finished_copy / "other")
    assert status == 2 and "never unpickled" in err
    raw = pickle.dumps(evil, 2)
    path = finished_copy / "out" / "state" / "stage1_fold0.pt"
    path.write_bytes(hashlib.sha256(raw).digest() + raw)
    status, printed, err = kit.run_main(finished_copy / "mars.npz", finished_copy / "out")
    assert status == 0 and f"{path}: damaged" in printed, err
    assert not evil.path.exists()
    pickle.loads(raw)
    assert evil.path.exists()  # it would have been


# ------------------------------------------------------------------------------ the metric

def test_the_metric_is_the_competitions_over_the_whole_set(finished, tmp_path):
    """Keras' figure of the submission, and of each step's pixels out of fold, all in one matrix;
    the paper's, in which background counts, is beside it in the file and on the same line."""
    out, metrics = finished / "out", metrics_of(finished / "out")
    with np.load(finished / "mars.npz") as arrays:
        masks, truth = arrays["training_set"][:, 1], arrays["test_labels"]
    labels = lib.check_submission(out / "submission.csv", 6, 32 * 64)
    assert metrics["test_miou"] == pytest.approx(kit.keras_mean_iou(truth.reshape(6, -1), labels))
    for step in ("stage1", "stage2"):
        confusion = np.array(metrics[f"{step}_confusion"])
        np.testing.assert_array_equal(confusion.sum(1), np.bincount(masks.ravel(), minlength=5))
        pairs = np.indices((5, 5)).reshape(2, -1).repeat(confusion.ravel(), 1)
        assert metrics[f"{step}_miou"] == pytest.approx(kit.keras_mean_iou(*pairs))
        assert metrics[f"{step}_paper_miou"] == pytest.approx(kit.keras_mean_iou(*pairs, None))
    printed = kit.run_main(finished / "mars.npz", tmp_path / "out", *PLAIN)[1]
    assert re.search(r"stage1 out of fold: 0\.\d{4} ± .* mean IoU, the paper's 0\.\d{4};", printed)


def test_background_is_never_predicted(finished):
    """Not in the submission, not out of fold, not with any probability."""
    labels = lib.check_submission(finished / "out" / "submission.csv", 6, 32 * 64, 0)
    assert labels.min() >= 1
    assert not np.array(metrics_of(finished / "out")["stage1_confusion"])[:, 0].any()
    with np.load(finished / "out" / "probabilities.npz") as probs:
        assert not probs["test"][:, 0].any() and not probs["out_of_fold"][:, 0].any()
        assert probs["test"].any() and probs["out_of_fold"].any()


# ---------------------------------------------------------------- what a fold's score saw

FOLDS = 3


@pytest.fixture(scope="module")
def framed(tmp_path_factory) -> solve.Run:
    """A run of three folds, opened; its tiles lie in frames of 2×3, and windows reach over them."""
    folder = tmp_path_factory.mktemp("framed")
    np.savez(folder / "mars.npz", **kit.tiny_arrays(30, 6))
    argv = ["--data", folder / "mars.npz", "--out", folder / "out", *kit.TINY, *PLAIN,
            "--folds", FOLDS, "--epochs", "1"]
    run = solve.open_run(solve.parse(list(map(str, argv))))
    tile = np.arange(36)
    run.place = np.stack([tile // 6, tile % 6 // 3, tile % 3])
    run.plan = dataclasses.replace(run.plan, padding=16)
    assert run.is_rare[4]  # its patches are pasted, and stage 2 leaves it as it is
    return run


def with_noise(framed: solve.Run, state: Path, fold: int,
               others: lib.StageInput | None = None) -> tuple:
    """Return each fold's probabilities after stage 1, the frames' context and stage 2, and stage
    2's input, of the run with a fold's labels shuffled, pixel by pixel; fold -1: with none.

    Given are the choices that the README admits to make on them: one epoch, whose weights are the
    best, and (others) what networks and frames say of other folds' tiles, on which stage 2 trains.
    """
    state.mkdir()
    masks, own = framed.data.masks.copy(), framed.fold_of == fold
    masks[own] = np.random.default_rng(0).permutation(masks[own].ravel()).reshape(masks[own].shape)
    run = dataclasses.replace(framed, state=state, metrics={}, histories={}, steps=[],
                              data=dataclasses.replace(framed.data, masks=masks))
    run.tiles = solve.first_input(run)
    first = solve.train_stage(run, 1, run.tiles)
    probs = lib.predict_unseen(first, run.tiles, run.dtype, run.cfg.tta, run.workers)
    after = [probs.copy()]
    log_ratios = solve.add_context(run, probs)
    after.append(probs)
    second = solve.second_input(run, probs, log_ratios)
    if others is not None:
        for name in ("predicted", "confidence", "context"):
            view = getattr(others, name).clone()
            view[fold] = getattr(second, name)[fold]
            setattr(second, name, view)
    last = lib.predict_unseen(solve.train_stage(run, 2, second, first), second, run.dtype,
                              run.cfg.tta, run.workers)
    solve.keep_first(run, second, probs, last)
    return [*after, last], second


@pytest.fixture
def given_choices(monkeypatch):
    """The last epoch's weights are used, and the context's weight is 1, whatever labels say."""
    real = solve.validate

    def validate(run, network, *args):
        return real(run, network, *args) | {"figure": max(0, network.best_figure) + 1}

    monkeypatch.setattr(solve, "validate", validate)
    monkeypatch.setattr(lib, "fit_context_weight", lambda *_: 1.0)


def test_no_label_of_fold_k_is_seen_when_fold_k_is_scored(framed, given_choices, tmp_path):
    """With the labels of fold k replaced by noise fold k's probabilities after stage 1, context and
    stage 2 are the same to the last bit, though windows and frames reach over its tiles; the other
    folds' are not."""
    before, seen_before = with_noise(framed, tmp_path / "state", -1)
    for k in range(FOLDS):
        after, seen_after = with_noise(framed, tmp_path / f"state{k}", k, seen_before)
        for name in ("predicted", "confidence", "context"):
            assert torch.equal(getattr(seen_after, name)[k], getattr(seen_before, name)[k])
        for old, new in zip(before, after, strict=True):
            changed = [fold for fold in range(FOLDS) if not np.array_equal(old[fold], new[fold])]
            assert changed == [fold for fold in range(FOLDS) if fold != k]


# -------------------------------------------------------------------------------- the README

def test_every_figure_in_the_readme_says_how_to_get_it_again():
    """Each row of a table that holds a score, as .759, has a command or a link."""
    rows = [line for line in (kit.ROOT / "README.md").read_text().splitlines()
            if line.startswith("|") and re.search(r"\D\.\d{2,}", line)]
    assert rows and [row for row in rows if not re.search(r"`python |\]\(", row)] == []
