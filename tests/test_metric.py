"""The competition's metric and the paper's, thresholds, the folds' scores, calibration."""
from __future__ import annotations

import kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lib


def score(truth, pred, ignore_class: int | None = 0):
    """Return the mean IoU and each class's of lists or arrays."""
    confusion = lib.confusion_matrix(np.uint8(truth), np.uint8(pred))
    return lib.iou_scores(confusion, ignore_class)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(0, 6)] * 3), elements=st.integers(0, 4)),
       st.integers(0, 999), st.sampled_from([0, None]))
def test_the_metric_is_keras(truth, seed, ignore_class):
    """Of any truth and prediction: Keras' figure, in any order of the pixels, given once or
    thrice."""
    rng = np.random.default_rng(seed)
    pred = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, 5, truth.shape))
    want = kit.keras_mean_iou(truth, pred, ignore_class)
    order = rng.permutation(truth.size)
    for t, p in ((truth, pred), (truth.ravel()[order], pred.ravel()[order]),
                 (np.tile(truth, 3), np.tile(pred, 3))):
        assert score(t, p, ignore_class)[0] == pytest.approx(want, abs=1e-9, nan_ok=True)


def test_two_by_two_by_hand():
    """Truth 1 1 2 0, prediction 1 2 2 3: both classes ½, the 3 on unlabelled ground is nothing. The
    paper's mean is (0 + ½ + ½ + 0) / 4. A class that occurs nowhere is in no mean."""
    truth, pred = [1, 1, 2, 0], [1, 2, 2, 3]
    miou, iou = score(truth, pred)
    assert miou == 0.5
    np.testing.assert_array_equal(iou, [np.nan, 0.5, 0.5, np.nan, np.nan])
    miou, iou = score(truth, pred, None)
    assert miou == 0.25
    np.testing.assert_array_equal(iou, [0, 0.5, 0.5, 0, np.nan])


def test_one_predicted_zero_costs_a_fifth():
    """Of 4,000 perfect pixels one predicted 0 takes the score from 1 to (0.999 + 3) / 5; where the
    truth is 0 too it costs nothing. A class predicted in vain has IoU 0."""
    truth = np.arange(1, 5).repeat(1000)
    pred = truth.copy()
    assert score([*truth, 0], [*pred, 0])[0] == 1
    pred[0] = 0
    assert score(truth, pred)[0] == pytest.approx((0.999 + 3) / 5, abs=1e-12)
    assert score([1, 1], [1, 4])[0] == 0.25


@pytest.mark.fault(17)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pixels", [[], [0, 0]])
def test_nothing_counted_is_nan(pixels):
    """No image, or no labelled pixel: NaN, neither 0 nor 1, and no warning."""
    miou, iou = score(pixels, pixels)
    assert np.isnan(miou) and np.isnan(iou).all()


def test_the_whole_set_is_not_the_mean_of_images():
    """6 of 8 pixels right, in one matrix: (6/8 + 0) / 2 = 3/8; the mean of both images is 5/8."""
    truth, pred = np.ones((2, 1, 4)), np.array([[[1, 1, 1, 1]], [[1, 1, 2, 2]]])
    assert score(truth, pred)[0] == 3 / 8
    assert np.mean([score(t, p)[0] for t, p in zip(truth, pred, strict=True)]) == 5 / 8


def test_rows_of_the_confusion_are_the_truth():
    """One pixel of truth 2 predicted as 4 is in row 2, column 4, an int64, beyond the 4 million
    pixels that are counted at once too; scoring leaves the matrix as it is."""
    truth = np.ones(2**22 + 1, np.uint8)
    pred = truth.copy()
    truth[-1], pred[-1] = 2, 4
    confusion = lib.confusion_matrix(truth, pred)
    before = confusion.copy()
    lib.iou_scores(confusion)
    assert confusion[2, 4] == 1 and confusion[1, 1] == 2**22 and confusion.sum() == 2**22 + 1
    assert confusion.dtype == np.int64 and (confusion == before).all()


# ---------------------------------------------------------------------------- probabilities

def test_bytes_and_back():
    """A byte is 1/255: none is off by more than half of that, all 256 come back, and of arrays and
    tensors come the same."""
    probs = np.linspace(0, 1, 1000, dtype=np.float32)
    stored = lib.to_bytes(probs)
    assert np.abs(lib.from_bytes(stored) - probs).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(lib.to_bytes(torch.from_numpy(probs)).numpy(), stored)
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(lib.to_bytes(lib.from_bytes(every)), every)


@pytest.mark.parametrize("first_class", [0, 1])
def test_thresholds_are_an_argmax(first_class):
    """The class from first_class on with the largest probability times factor; equal factors change
    nothing."""
    probs = np.float32([[0.5, 0.3, 0.1, 0.06, 0.04], [0.05, 0.4, 0.3, 0.15, 0.1]])[..., None, None]
    ones, rock = lib.NO_THRESHOLDS, np.array([[1, 1, 1, 1, 20], [0] * 5])
    plain = [[0, 1], [1, 1]][first_class]
    assert lib.apply_thresholds(probs, ones, first_class).ravel().tolist() == plain
    assert lib.apply_thresholds(probs, 7 * ones, first_class).ravel().tolist() == plain
    assert lib.apply_thresholds(probs, rock, first_class).ravel().tolist() == [4, 4]
    assert lib.apply_thresholds(probs, rock, first_class).dtype == np.uint8


def test_lone_tiles_are_cleaned():
    """300 tiles without neighbours: a speck goes, its class's block stays, background is never the
    answer, and tiles that are not wanted are 0."""
    probs = np.zeros((300, 5, 9, 9), np.uint8)
    probs[:, 0] = 200
    probs[:, 1] = 20
    probs[299, 3, :3, :3] = probs[299, 3, 5, 5] = 99
    want = np.ones((300, 9, 9), np.uint8)
    want[299, :3, :3], want[0] = 3, 0
    frames, wanted = lib.Frames.lay_out(None, 300), np.arange(300) > 0
    got = lib.cleaned_labels(probs, frames, wanted, lib.NO_THRESHOLDS, 1)
    np.testing.assert_array_equal(got, want)


ROCK = np.array([0, 0, 0, 0, 1.0])
PEAK = np.stack([np.ones(5), 0.8 * ROCK])


@pytest.mark.parametrize("scale", [1, 3])
def test_a_part_without_its_peak_goes_to_the_next_class(scale):
    """Rock .5 .6 .9, soil, rock .6 .7, times any factor: with a peak of .8 the second rock is sand,
    the next class; the image below, with rock of .9 there, does not lend its peak."""
    rock = np.float32([[0.5, 0.6, 0.9, 0.1, 0.6, 0.7], [0.1, 0.1, 0.1, 0.1, 0.9, 0.9]])
    probs = np.zeros((2, 5, 1, 6), np.float32)
    probs[:, 4, 0], probs[:, 1, 0], probs[:, 3, 0] = rock, 0.2 * (1 - rock), 0.8 * (1 - rock)
    probs[0, 1, 0, 3], probs[0, 3, 0, 3] = 0.9, 0
    factors = np.ones(5) + (scale - 1) * ROCK
    got = lib.apply_thresholds(probs, np.stack([factors, 0.8 * ROCK]), 1)
    np.testing.assert_array_equal(got[:, 0], [[4, 4, 4, 1, 3, 3], [3, 3, 3, 3, 4, 4]])
    without = lib.apply_thresholds(probs, np.stack([factors, 0 * ROCK]), 1)
    assert (without[0, 0, 4:] == 4).all()


def test_a_rock_across_a_border_is_one_part():
    """A rock on two tiles side by side, sure on the left one alone, is kept on both; where the
    tiles are apart, the right one's part goes."""
    probs = np.zeros((2, 5, 8, 8), np.float32)
    probs[:, 1] = 0.4
    probs[0, 4, 2:6, 4:], probs[1, 4, 2:6, :4] = 0.9, 0.5
    place, both = np.array([[0, 0], [0, 0], [0, 1]]), np.ones(2, bool)
    for at, kept in ((place, 4), (None, 1)):
        frames = lib.Frames.lay_out(at, 2)
        got = lib.cleaned_labels(lib.to_bytes(probs), frames, both, PEAK, 1)
        assert (got[0, 2:6, 4:] == 4).all() and (got[1, 2:6, :4] == kept).all()


def test_each_tile_by_its_own_fold():
    """Out of fold a tile's labels are those of its fold's probabilities; without a fold 0."""
    probs = np.zeros((2, 4, 5, 8, 8), np.uint8)
    probs[0, :, 1], probs[1, :, 2] = 200, 200
    frames = lib.Frames.lay_out(None, 4)
    got = lib.cleaned_out_of_fold(probs, frames, np.array([1, 0, -1]), lib.NO_THRESHOLDS,
                                  1)
    assert got[:, 0, 0].tolist() == [2, 1, 0] and got.shape == (3, 8, 8)


def sure(*cells: tuple[int, float, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return bytes (10, 5, 4, 400) and truth of 1,000 cells of 4×4 pixels. Args: how many cells,
    their probability of rock, how many of them are rock; all others are surely soil."""
    rock, truth, start = np.zeros(1000, np.float32), np.ones(1000, np.uint8), 0
    for count, prob, true in cells:
        rock[start:start + count] = prob
        truth[start:start + true] = 4
        start += count
    probs = np.zeros((1000, 5), np.float32)
    probs[:, 1], probs[:, 4] = 1 - rock, rock
    probs = probs.reshape(10, 1, 100, 5).transpose(0, 3, 1, 2)
    truth = truth.reshape(10, 1, 100)
    return lib.to_bytes(probs).repeat(4, 2).repeat(4, 3), truth.repeat(4, 1).repeat(4, 2)


def decide(probs, masks, fold_of=None, peaks=(0.3,)) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels and the thresholds of lib.decide_out_of_fold of lone tiles, with factors of
    rock of 1, .5, 2 and 4 and each of the peaks; without fold_of all are of one fold."""
    fold_of = np.zeros(len(masks), int) if fold_of is None else fold_of
    probs = np.stack([probs] * (fold_of.max() + 1))
    frames = lib.Frames.lay_out(None, len(masks))
    tried = np.array([(factor, peak) for factor in (1, 0.5, 2, 4) for peak in peaks])
    candidates = np.where(ROCK, tried[:, :, None], lib.NO_THRESHOLDS)
    return lib.decide_out_of_fold(probs, masks, frames, fold_of, candidates, 1)


@pytest.mark.parametrize("cells,factor", [((30, 0.4, 12), 2), ((100, 0.4, 1), 1),
                                          ((100, 0.55, 1), 0.5)])
def test_the_unlikely_is_taken_where_it_pays(cells, factor):
    """Of 30 cells of .4, 12 are rock: to take them makes the IoUs (12/30, 970/988) of (0, .988),
    and 2 · .4 > .6 is the first factor that does. Of 100 one is rock: left, at .55 given up.
    Common classes keep their factor of 1."""
    assert decide(*sure(cells))[1].tolist() == [[1, 1, 1, 1, factor], [0, 0, 0, 0, 0.3]]
    assert decide(*sure(cells), peaks=(0.8,))[1][0, 4] == 1  # no part is so sure


def test_thresholds_are_fitted_with_the_peaks():
    """Rocks of .4 .9 .4 among 20 false ones of .6: no factor tells them apart, peak and factor do.
    Where the true ones are no surer, no peak is taken."""
    false, rock = [(1, 0.6, 0), (1, 0.0, 0)] * 20, [(1, 0.4, 1), (1, 0.9, 1), (1, 0.4, 1)]
    probs, truth = sure(*false, *rock, (1, 0.0, 0), *rock)
    thresholds = decide(probs, truth, peaks=(0, 0.8))[1]
    assert thresholds.tolist() == [[1, 1, 1, 1, 2], [0, 0, 0, 0, 0.8]]
    got = lib.apply_thresholds(lib.from_bytes(probs), thresholds, 1)
    np.testing.assert_array_equal(got, truth)
    assert decide(*sure((30, 0.6, 28)), peaks=(0.8, 0))[1][1, 4] == 0


def test_a_fold_is_decided_by_the_others_thresholds():
    """Rock of .4 is worth taking in fold 1 and of .55 worth giving up in fold 0: each fold is
    decided by the other's factor, whatever its own labels are; tiles of no fold do not count."""
    parts = sure((100, 0.55, 1)), sure((30, 0.4, 12)), sure((900, 0.4, 900))
    probs, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    fold_of = np.array([0, 1, -1]).repeat(10)
    scored = fold_of >= 0
    labels, thresholds = decide(probs, masks, fold_of)
    assert (labels[0, :, :40] == 4).all() and (labels[10:] < 4).all()
    np.testing.assert_array_equal(thresholds, decide(probs[scored], masks[scored])[1])
    masks[fold_of == 0] = 3
    noisy, _ = decide(probs, masks, fold_of)
    np.testing.assert_array_equal(noisy[:10], labels[:10])


@pytest.mark.fault(17)
@pytest.mark.filterwarnings("error")
def test_the_scores_of_folds_by_hand():
    """Of three folds, right, half right and without a label, the pooled score is (2/3 + 1/2) / 2,
    and the spread is that of 1 and 1/4; with nothing labelled there is none."""
    truth = np.uint8([[[1, 2]], [[1, 2]], [[0, 0]]])
    labels = np.uint8([[[1, 2]], [[1, 1]], [[1, 1]]])
    scores = lib.score_folds(truth, labels, np.arange(3), 3)
    assert scores["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["paper_miou"] == pytest.approx((0 + 2 / 5 + 1 / 2) / 3)
    assert scores["fold_miou"] == [1, 0.25, pytest.approx(np.nan, nan_ok=True)]
    assert scores["fold_std"] == pytest.approx(0.375)
    assert np.array(scores["confusion"])[:3, :3].tolist() == [[0, 2, 0], [0, 2, 0], [0, 1, 1]]
    assert np.isnan(lib.score_folds(truth[2:], labels[2:], np.zeros(1), 1)["fold_std"])
