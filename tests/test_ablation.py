"""Whole frames in one fold, as tests/ablation.py --group-frames measures it."""

import json

import ablation
import numpy as np
import pytest
from test_folds import tiles
from test_frames import cut_frames
from test_solve import start

import lib
import solve


@pytest.mark.parametrize("folds", [1, 3])
def test_frames_and_copies_share_a_fold(folds):
    """With frames given, none is on both sides of a split, nor are two frames tied by a copy; tiles of no
    frame are on their own."""
    images, masks = tiles(90, 4)
    frame = np.repeat(np.arange(-1, 14), 6)  # six tiles are in no frame
    images[6 * 3] = images[6 * 9 + 2]  # ties frames 2 and 8
    fold_of = ablation.folds_of_frames(images, masks, folds, 0, frame)
    assert all(len(np.unique(fold_of[frame == f])) == 1 for f in range(14))
    assert fold_of[6 * 3] == fold_of[6 * 9]
    assert len(np.unique(fold_of)) == max(2, folds)
    if folds == 3:
        assert len(np.unique(fold_of[frame == -1])) > 1


@pytest.mark.parametrize("seed", range(10))
def test_rare_frames_are_spread_evenly(seed):
    """A frame is rare if any of its tiles holds a rare class: of four among ten each of 2 folds has two."""
    images, masks = tiles(160, seed=seed)
    frame = np.repeat(np.arange(10) + 300, 16)  # numbers beyond the training tiles': others are of test tiles
    masks[np.arange(4) * 48 + 5, 0, 0] = 4
    fold_of = ablation.folds_of_frames(images, masks, 2, seed, frame)
    assert np.bincount(fold_of[np.arange(4) * 48]).tolist() == [2, 2]


def test_fewer_frames_than_folds_is_one_sentence():
    """The sentence speaks of frames, and of the flag that asked for them."""
    with pytest.raises(lib.UserError, match="only 1 different frames; leave out --group-frames"):
        ablation.folds_of_frames(*tiles(12), 2, 0, np.zeros(12, int))


ARGS = ["--folds", "2", "--width", "4", "--epochs", "1", "--stages", "1", "--no-clean", "--max-hours", "1"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """The flags of a run on ten drawn frames of 3 × 3 tiles, two of three known, each tile of two classes."""
    folder = tmp_path_factory.mktemp("frames")
    images, _ = cut_frames(10, 3, 3, 16, 32, seed=3)
    masks = np.ones_like(images)
    masks[:, 8:] = 2
    np.savez(folder / "mars.npz", training_set=np.stack([images, masks], 1)[:60], test_set=images[60:])
    return ["--data", str(folder / "mars.npz"), "--out", str(folder / "out"), *ARGS]


@pytest.fixture(scope="module")
def measured(argv):
    """What the script returned of its own run, and that run as it was scored."""
    runs, conclude = [], solve.conclude
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "conclude", lambda run, *rest: runs.append(run) or conclude(run, *rest))
        return ablation.main(["--group-frames", *argv]), runs[0]


def test_no_label_of_a_validated_frame_is_known(argv, measured):
    """The run of whole frames ends like any other, scored and written; the frames say nothing of a validated
    tile, whose neighbours' labels are all hidden, and something of it to the other fold; and the folds of
    other runs are left as they were."""
    metrics, run = measured
    with open(argv[argv.index("--out") + 1] + "/metrics.json") as f:
        assert json.load(f)["frames_miou"] == metrics["frames_miou"]
    n, frame = len(run.fold_of), run.place[0, :60]
    assert n == 60 and set(run.fold_of) == {0, 1} and (frame >= 0).sum() > 40
    assert all(len(set(run.fold_of[frame == one])) == 1 for one in set(frame[frame >= 0]))
    evidence = lib.frame_evidence(run.data.masks, run.fold_of, run.place)
    np.testing.assert_allclose(evidence[run.fold_of, np.arange(n)], 0, atol=1e-3)
    assert np.abs(evidence[1 - run.fold_of, np.arange(n)])[frame >= 0].max((1, 2, 3)).min() > 0.01
    assert lib.make_folds is ablation.folds_of_images


def test_no_other_run_goes_on_with_it(argv, measured):
    """solve.py with the same flags is refused: its folds would score networks on what they were taught."""
    status, _, err = start(argv)
    assert status == 2 and "group_frames = True" in err


def test_frames_that_nobody_looks_for_are_no_folds(argv, tmp_path):
    """--group-frames beside --no-frames is one sentence, and nothing is written."""
    with pytest.raises(lib.UserError, match="--group-frames: .*--no-frames"):
        ablation.main(["--group-frames", *argv, "--no-frames", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
