"""What several test files use: tiny data sets, and runs of the kit in this process and others."""
from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import lib
import solve

ROOT = Path(__file__).resolve().parents[1]
GREY = np.array([20, 60, 110, 160, 230])  # of each class: one threshold away from its neighbours
# two folds of the smallest networks, two epochs in each of two stages: about two seconds
TINY = ("--folds", "2", "--seeds", "1", "--width", "4", "--epochs", "2", "--device", "cpu",
        "--precision", "float32", "--max-hours", "1")


def tiny_arrays(n: int = 24, m: int = 6, h: int = 32, w: int = 64, seed: int = 0) -> dict:
    """Return tiles of two or three classes side by side under an unlabelled strip; every fourth
    holds a 6×6 rock."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n + m, h, w), np.uint8)
    for i, mask in enumerate(masks):
        left, right = rng.permutation([1, 2, 3])[:2]
        cut = int(rng.integers(w // 4, 3 * w // 4 + 1))
        mask[h // 8:, :cut] = left
        mask[h // 8:, cut:] = right
        if i % 4 == 0:
            y = rng.integers(h // 8, max(h // 8 + 1, h - 6))
            x = rng.integers(0, max(1, w - 6))
            mask[y:y + 6, x:x + 6] = 4
    images = (GREY[masks] + rng.integers(-12, 13, masks.shape)).astype(np.uint8)
    return {"training_set": np.stack([images[:n], masks[:n]], 1),
            "test_set": images[n:], "test_labels": masks[n:]}


def run_main(data: Path, out: Path, *flags: str) -> tuple[int, str, str]:
    """Return the exit status, standard output and standard error of a tiny run in this process;
    flags come after TINY's and override them."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = solve.main(["--data", str(data), "--out", str(out), *TINY, *flags])
    return status, stdout.getvalue(), stderr.getvalue()


def start(data: Path, out: Path, *flags: str, **popen) -> subprocess.Popen:
    """Start a tiny run in a process of its own."""
    command = [sys.executable, str(ROOT / "solve.py"), "--data", str(data), "--out", str(out),
               *TINY, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **popen)


def keras_mean_iou(truth, pred, ignore_class: int | None = 0) -> float:
    """Return Keras' MeanIoU of five classes in loops over pixels, without its epsilon of 1e-7."""
    total = [[0.0] * 5 for _ in range(5)]
    for t, p in zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True):
        if ignore_class is None or t != ignore_class:  # else Keras multiplies it by 0
            total[t][p] += 1
    ious = []
    for c in range(5):
        union = sum(total[c]) + sum(row[c] for row in total) - total[c][c]
        if union:
            ious.append(total[c][c] / union)
    return sum(ious) / len(ious) if ious else float("nan")


def open_run(folder: Path, *flags: str, arrays: dict | None = None,
             place: np.ndarray | None = None) -> solve.Run:
    """Return a run on tiny arrays, planned, nothing trained, in folder; flags come after TINY's.
    Given place (3, N + M), the tiles lie in these frames; otherwise each is alone."""
    arrays = arrays or tiny_arrays()
    np.savez(folder / "mars.npz", **arrays)
    argv = ["--data", str(folder / "mars.npz"), "--out", str(folder / "out"), *TINY, "--no-clean"]
    if place is None:
        argv.append("--no-frames")
    else:  # as if an earlier start had found them
        digest = hashlib.sha256(np.concatenate([arrays["training_set"][:, 0], arrays["test_set"]]))
        (folder / "out" / "state").mkdir(parents=True)
        found = folder / "out" / "state" / f"frames_{digest.hexdigest()[:12]}.pt"
        lib.save_checkpoint(found, {"place": torch.from_numpy(place)})
    return solve.open_run(solve.parse([*argv, *flags]))


def failing(function, error: BaseException, *calls: int):
    """Return function, which raises error at these calls of it, from 1, or at all if none is
    given."""
    count = itertools.count(1)

    def wrapper(*args, **kwargs):
        if next(count) in calls or not calls:
            raise error
        return function(*args, **kwargs)

    return wrapper
