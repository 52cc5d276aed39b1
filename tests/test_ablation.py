"""Whole frames in one fold, as tests/ablation.py --group-frames measures it."""
from __future__ import annotations

import json

import ablation
import numpy as np
import pytest
from kit import TINY, run_main

import lib
import solve


def tiles(n, seed=0):
    """Return n distinct images 8×16, each all of one class, 0 to 3."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 8, 16), dtype=np.uint8)
    masks = np.broadcast_to(rng.integers(0, 4, (n, 1, 1)), images.shape).astype(np.uint8)
    return images, masks


@pytest.mark.parametrize("folds", [1, 3])
def test_frames_and_copies_share_a_fold(folds):
    """No frame is on both sides of a split, nor are two frames tied by a copy; tiles of no frame
    are on their own; a frame is rare if one of its tiles is, and such are spread evenly."""
    images, masks = tiles(90)
    frame = np.repeat(np.arange(-1, 14), 6)  # six tiles are in no frame
    images[6 * 3] = images[6 * 9 + 2]        # ties frames 2 and 8
    masks[6 * np.array([1, 4, 7, 10, 11, 13]) + 5, 0, 0] = 4
    fold_of = ablation.folds_of_frames(images, masks, folds, 0, frame)
    assert all(len(np.unique(fold_of[frame == f])) == 1 for f in range(14))
    assert fold_of[6 * 3] == fold_of[6 * 9]
    assert len(np.unique(fold_of)) == max(2, folds)
    if folds == 3:
        assert len(np.unique(fold_of[frame == -1])) > 1
        assert np.bincount(fold_of[(masks == 4).any((1, 2))]).tolist() == [2, 2, 2]


def test_fewer_frames_than_folds_is_one_sentence():
    """The sentence speaks of frames, and of the flag that asked for them."""
    with pytest.raises(lib.UserError, match="only 1 different frames; leave out --group-frames"):
        ablation.folds_of_frames(*tiles(12), 2, 0, np.zeros(12, int))


@pytest.mark.slow
def test_no_label_of_a_validated_frame_is_known(tmp_path, monkeypatch):
    """A run of whole frames, eight of 3×3 tiles cut out of smooth ground, ends like any other; the
    context says nothing of a validated tile, and something of it to the other fold; the folds of
    other runs are left as they were, and no other run goes on with it."""
    rng = np.random.default_rng(3)
    ground = np.stack([lib.cv2.resize(rng.uniform(0, 255, (12, 24)), (192, 96),
                                      interpolation=lib.cv2.INTER_CUBIC) for _ in range(8)])
    cells = ground.clip(0, 255).reshape(8, 3, 32, 3, 64).transpose(0, 1, 3, 2, 4)
    images = rng.permutation(cells.reshape(72, 32, 64).astype(np.uint8))
    masks = np.ones_like(images)
    masks[:, 16:] = 2
    data, out = tmp_path / "mars.npz", tmp_path / "out"
    np.savez(data, training_set=np.stack([images, masks], 1)[:60], test_set=images[60:])
    flags = ["--data", str(data), "--out", str(out), *TINY, "--no-clean", "--stages", "1"]
    runs = []

    def conclude(run, *rest, real=solve.conclude):
        runs.append(run)
        real(run, *rest)

    monkeypatch.setattr(solve, "conclude", conclude)
    metrics = ablation.main(["--group-frames", *flags])
    written = json.loads((out / "metrics.json").read_text())
    assert written["frames_miou"] == metrics["frames_miou"]
    fold_of, frame = runs[0].fold_of, runs[0].place[0, :60]
    assert set(fold_of) == {0, 1} and (frame >= 0).sum() > 40
    assert all(len(set(fold_of[frame == one])) == 1 for one in set(frame[frame >= 0]))
    ratios = lib.context_log_ratios(runs[0].data.masks, fold_of, runs[0].place)
    own = fold_of, np.arange(60)
    np.testing.assert_allclose(ratios[own], 0, atol=1e-3)
    others = np.abs(ratios[1 - fold_of, np.arange(60)])[frame >= 0]
    assert others.max((1, 2, 3)).min() > 0.01
    assert lib.make_folds is ablation.folds_of_images
    status, _, err = run_main(data, out, "--no-clean", "--stages", "1")
    assert status == 2 and "group_frames = True" in err
    with pytest.raises(lib.UserError, match="--group-frames: .*--no-frames"):
        ablation.main(["--group-frames", *flags, "--no-frames"])
