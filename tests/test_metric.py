"""The competition's metric and the paper's."""

import math

import numpy as np
import pytest
import torch

import lib


def keras_mean_iou(truth, pred, num_classes, ignore_class):
    """Keras' MeanIoU in loops over pixels and classes: update_state, then result, without its epsilon of
    1e-7."""
    total = [[0.0] * num_classes for _ in range(num_classes)]
    for t, p in zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True):
        weight = 1.0
        if ignore_class is not None and t == ignore_class:
            t, p, weight = 0, 0, 0.0  # Keras multiplies all three by the mask
        total[t][p] += weight
    ious = []
    for c in range(num_classes):
        row = sum(total[c][k] for k in range(num_classes))
        column = sum(total[k][c] for k in range(num_classes))
        denominator = row + column - total[c][c]
        if denominator > 0:
            ious.append(total[c][c] / denominator)
    return sum(ious) / len(ious) if ious else float("nan")


@pytest.mark.parametrize("ignore_class", [0, None])
def test_equals_keras_on_100_random_cases(ignore_class):
    """Within 1e-9 of Keras' formula, with absent classes, predicted zeros and unlabelled pixels among the
    cases."""
    rng = np.random.default_rng(1)
    zeros = absent = 0
    for _ in range(100):
        classes = rng.permutation(5)[: rng.integers(1, 6)]
        shape = tuple(rng.integers(1, 7, 3))
        truth = rng.choice(classes, shape).astype(np.uint8)
        pred = np.where(
            rng.random(shape) < rng.random(), truth, rng.choice(rng.permutation(5)[:3], shape)
        ).astype(np.uint8)
        zeros += bool((pred[truth > 0] == 0).any())
        absent += len(np.union1d(truth, pred)) < 5
        got = lib.iou_scores(lib.confusion_matrix(truth, pred), ignore_class)[0]
        want = keras_mean_iou(truth, pred, 5, ignore_class)
        assert got == pytest.approx(want, abs=1e-9, nan_ok=True)
    assert zeros > 20 and absent > 20  # the cases that matter are among the hundred


def test_two_by_two_by_hand():
    """Truth 1 1 / 2 0 and prediction 1 2 / 2 3: both classes 1/2, and the 3 on unlabelled ground counts for
    nothing."""
    truth, pred = np.array([[[1, 1], [2, 0]]], np.uint8), np.array([[[1, 2], [2, 3]]], np.uint8)
    miou, iou = lib.iou_scores(lib.confusion_matrix(truth, pred))
    assert miou == 0.5
    np.testing.assert_array_equal(iou, [np.nan, 0.5, 0.5, np.nan, np.nan])


def test_paper_metric_counts_background():
    """The same example over all five classes: (0 + 1/2 + 1/2 + 0) / 4, as 4 occurs nowhere."""
    truth, pred = np.array([[[1, 1], [2, 0]]], np.uint8), np.array([[[1, 2], [2, 3]]], np.uint8)
    miou, iou = lib.iou_scores(lib.confusion_matrix(truth, pred), None)
    assert miou == 0.25
    np.testing.assert_array_equal(iou, [0, 0.5, 0.5, 0, np.nan])


def test_one_predicted_zero_costs_a_fifth():
    """Of 4,000 perfect pixels one predicted 0 takes the score from 1 to about 4/5."""
    truth = np.repeat(np.arange(1, 5, dtype=np.uint8), 1000)
    pred = truth.copy()
    assert lib.iou_scores(lib.confusion_matrix(truth, pred))[0] == 1
    pred[0] = 0
    assert lib.iou_scores(lib.confusion_matrix(truth, pred))[0] == pytest.approx((0.999 + 3) / 5, abs=1e-12)


def test_zero_predicted_on_unlabelled_ground_costs_nothing():
    """A 0 where the truth is 0 does not add the fifth class."""
    truth = np.array([0, 1, 2, 3, 4], np.uint8)
    assert lib.iou_scores(lib.confusion_matrix(truth, truth))[0] == 1


@pytest.mark.parametrize("truth", [np.zeros((0, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)])
def test_nothing_counted_is_nan(truth):
    """No image, or no labelled pixel: NaN, neither 0 nor 1, and no warning."""
    miou, iou = lib.iou_scores(lib.confusion_matrix(truth, truth))
    assert np.isnan(miou) and np.isnan(iou).all()


def test_absent_class_is_left_out_of_the_mean():
    """A class neither true nor predicted has no IoU; it counts neither as 1 nor as 0."""
    truth, pred = np.array([1, 1, 2, 2], np.uint8), np.array([1, 1, 2, 1], np.uint8)
    miou, iou = lib.iou_scores(lib.confusion_matrix(truth, pred))
    assert miou == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert np.isnan(iou[[0, 3, 4]]).all()


def test_false_alarm_alone_counts_as_zero():
    """A class predicted but never true has IoU 0 and is in the mean."""
    miou, iou = lib.iou_scores(lib.confusion_matrix(np.array([1, 1], np.uint8), np.array([1, 4], np.uint8)))
    assert iou[4] == 0 and miou == 0.25


def test_whole_set_is_not_the_mean_of_images():
    """One confusion matrix over all images: 6 of 8 pixels right is (6/8 + 0) / 2 = 3/8; the mean of images is
    5/8."""
    truth = np.ones((2, 1, 4), np.uint8)
    pred = np.array([[[1, 1, 1, 1]], [[1, 1, 2, 2]]], np.uint8)
    assert lib.iou_scores(lib.confusion_matrix(truth, pred))[0] == 3 / 8
    parts = [lib.confusion_matrix(t, p) for t, p in zip(truth, pred, strict=True)]
    assert (sum(parts) == lib.confusion_matrix(truth, pred)).all()
    assert np.mean([lib.iou_scores(part)[0] for part in parts]) == 5 / 8


def test_confusion_rows_are_the_truth():
    """One pixel of truth 2 predicted as 4 stands in row 2, column 4; the counts are int64."""
    confusion = lib.confusion_matrix(np.array([2], np.uint8), np.array([4], np.uint8))
    assert confusion[2, 4] == 1 == confusion.sum() and confusion.dtype == np.int64


def test_confusion_does_not_overflow_small_types():
    """uint8 labels of 20 classes: row 19 times 20 is beyond 255 and still lands in its cell."""
    one = np.array([19], np.uint8)
    assert lib.confusion_matrix(one, one, 20)[19, 19] == 1


def test_iou_leaves_its_argument_alone():
    """Scoring with ignore_class does not empty the caller's matrix (it is shown in the report afterwards)."""
    confusion = np.full((5, 5), 3)
    lib.iou_scores(confusion)
    assert (confusion == 3).all()


def noisy_rock(share):
    """2,000 images of one row: probabilities that are right on average, rock likely at a few pixels only."""
    rng = np.random.default_rng(0)
    p = np.zeros((2000, 5, 1, 64), np.float32)
    p[:, 4] = np.where(rng.random((2000, 1, 64)) < 0.03, share, 0.001)
    p[:, 1] = 1 - p[:, 4]
    truth = np.where(rng.random((2000, 1, 64)) < p[:, 4], 4, 1).astype(np.uint8)
    return p.repeat(4, 2).repeat(4, 3), truth.repeat(4, 1).repeat(4, 2)


@pytest.mark.parametrize("share,taken", [(0.4, True), (0.02, False)])
def test_factors_take_the_unlikely_where_it_pays(share, taken):
    """Rock that is never the likeliest is taken where every second or third such pixel is rock, and the score
    rises; where it is one in fifty it is not; common classes keep their factor of 1."""
    probs, truth = noisy_rock(share)
    factors, peaks = rule = lib.fit_rule(probs, truth)
    before, after = (lib.iou_scores(lib.confusion_matrix(truth, lib.decide(probs, r, 1)))[0]
                     for r in (lib.PLAIN, rule))
    assert factors[:4] == [1] * 4 and (factors[4] > 1) == taken
    assert peaks == [0] * 5  # no rock is ever likelier than 0.4 here: to ask for more would lose them all
    assert (after > before + 0.1) == taken and after >= before


def test_peaks_are_asked_where_only_they_tell_rocks():
    """Rocks of 0.4, 0.9, 0.4 among false ones of 0.6, 0.6: no factor tells them apart, the peak does."""
    p, truth = np.full((64, 5, 1, 64), 0.001, np.float32), np.ones((64, 1, 64), np.uint8)
    p[:, 4, 0, 8:11], p[:, 4, 0, 40:42] = (0.4, 0.9, 0.4), 0.6
    truth[:24, 0, 8:11] = 4
    p[24:, 4, 0, 8:11] = 0.001
    p[:, 1] = 1 - p[:, 4]
    probs, truth = (x.repeat(4, -2).repeat(4, -1) for x in (p, truth))
    rule = lib.fit_rule(probs, truth)
    assert rule[0][:4] == [1] * 4 and rule[0][4] > 1 and rule[1] == [0, 0, 0, 0, 0.8]
    np.testing.assert_array_equal(lib.decide(probs, rule, 1), truth)


def test_decide_in_parts_is_argmax():
    """600 images are decided 256 at a time: the labels of one argmax, never below the first class."""
    rng = np.random.default_rng(0)
    probs, factors = rng.integers(0, 256, (600, 5, 2, 3)).astype(np.uint8), np.float32([9, 1, 2, 0.5, 3])
    for first in (0, 1):
        want = (probs[:, first:] * factors[first:, None, None]).argmax(1) + first
        np.testing.assert_array_equal(lib.decide(probs, (factors, [0] * 5), first), want)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_part_without_its_peak_goes_to_the_next_likeliest(scale):
    """One row of rock 0.5, 0.6, 0.9 | soil | 0.6, 0.7, of any scale: with a peak of 0.8 the second rock is
    sand, the next likeliest. The next image, whose rock is at the same pixels, does not lend its peak."""
    rock = np.float32([[0.5, 0.6, 0.9, 0.1, 0.6, 0.7], [0.1, 0.1, 0.1, 0.1, 0.9, 0.9]])
    probs = np.zeros((2, 5, 1, 6), np.float32)
    probs[:, 4, 0], probs[:, 1, 0], probs[:, 3, 0] = rock, 0.2 * (1 - rock), 0.8 * (1 - rock)
    probs[0, 1, 0, 3], probs[0, 3, 0, 3] = 0.9, 0
    got = lib.decide(np.uint16(scale * 200 * probs), ([1] * 5, [0, 0, 0, 0, 0.8]), 1)
    np.testing.assert_array_equal(got[:, 0], [[4, 4, 4, 1, 3, 3], [3, 3, 3, 3, 4, 4]])


def test_a_factor_does_not_lower_the_peak():
    """With a factor of 4 a rock of 0.3 grows from a peak of 0.8, and not without one."""
    probs = np.zeros((1, 5, 1, 5), np.float32)
    probs[0, 4, 0] = 0.3, 0.8, 0.1, 0.3, 0.3
    probs[0, 1, 0] = 1 - probs[0, 4, 0]
    got = lib.decide(probs, ([1, 1, 1, 1, 4], [0, 0, 0, 0, 0.8]), 1)
    np.testing.assert_array_equal(got[0, 0], [4, 4, 1, 1, 1])


@pytest.mark.parametrize("share,helps", [(0.4, True), (0.02, False)])
def test_a_fold_is_scored_by_the_others_rule(share, helps):
    """Where rules help, each fold's labels come by the rule that suits the others: rocks of 0.3, which are in
    one fold alone, are not found there. The submission's rule suits all. Where rules do not help all are
    plain. Images of no fold get no label, and nobody asks theirs."""
    probs, masks = (x[:600] for x in noisy_rock(share))
    fold_of = np.arange(600) % 4 - 1
    lonely = np.flatnonzero(fold_of == 0)[::2]
    probs[lonely, 4, :, :4], probs[lonely, 1, :, :4], masks[lonely, :, :4] = 0.3, 0.7, 4
    probs = np.rint(255 * probs).astype(np.uint8)
    masks[fold_of < 0] = 4  # if they were asked, rock would be everywhere
    labels, scores = lib.score_step(probs, masks, fold_of, 3, 1, True)
    scored, want = fold_of >= 0, np.zeros_like(masks)
    for fold in range(3):
        own, others = fold_of == fold, scored & (fold_of != fold)
        rule = lib.fit_rule(probs[others], masks[others]) if helps else lib.PLAIN
        want[own] = lib.clean_masks(lib.decide(probs[own], rule, 1))
    np.testing.assert_array_equal(labels, want)
    assert (labels[scored] == 4).any() == helps and not (labels[lonely, :, :4] == 4).any()
    assert scores["rule"] == (lib.fit_rule(probs[scored], masks[scored]) if helps else lib.PLAIN)
    expected = lib.fold_scores(masks, want, fold_of, 3) | lib.calibration(probs[scored], masks[scored])
    assert set(scores) == {*expected, "rule"}
    for name, value in expected.items():
        np.testing.assert_array_equal(scores[name], value, name)
    plain, others = lib.score_step(probs, masks, fold_of, 3, 1, False)
    assert others["rule"] == lib.PLAIN and (plain == labels).all() == (not helps)


class Echo(torch.nn.Module):
    """Logits x and -x of an image x."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # its device is the model's

    def forward(self, x):
        return [torch.cat([x, -x], 1)]


def test_validation_by_hand():
    """Classes 1 and 2 with a probability of 3/4: a right pixel costs ln 4/3, a wrong one ln 4, background and
    what is ignored nothing; batches of two images and one. Ignored pixels are in no matrix, background is."""
    x = math.log(3) / 2 * torch.tensor([[1.0, 1], [1, -1], [-1, -1]])[:, None, None]
    y = torch.tensor([[1, 2], [1, 0], [2, -1]], dtype=torch.int8)[:, None]
    got = lib.evaluate(Echo(), zip(x.split(2), y.split(2), strict=True), torch.float32, 1, gamma=0.0)
    right, wrong = math.log(4 / 3), math.log(4)
    assert got["val_loss"] == pytest.approx((2 * (2 * right + wrong) / 3 + right) / 3)
    want = np.zeros((5, 5), int)
    want[1, 1], want[2, 1], want[0, 2], want[2, 2] = 2, 1, 1, 1
    assert got["confusion"] == want.tolist()
    assert got["score"] == pytest.approx((2 / 3 + 1 / 2) / 2)


# ------------------------------------------------------------------------------ calibration


def test_calibration_by_hand():
    """Eight labelled pixels: four at 0.8 of which one is right, four at 1.0 of which all are. The error is
    (4·0.55 + 0) / 8; both bins hold half; the three errors are all among the least sure half, so a fifth of
    the pixels, spread evenly in its bin, holds at least 0.4 of them. Unlabelled pixels count for nothing."""
    probs = np.zeros((1, 3, 1, 12), np.uint8)
    probs[0, 1, 0, :4], probs[0, 1, 0, 4:] = 204, 255
    truth = np.array([1, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]).reshape(1, 1, 12)
    got = lib.calibration(probs, truth)
    assert got["ece"] == pytest.approx(4 * 0.55 / 8)
    bins = [row for row in got["reliability"] if row[2]]
    assert bins == [[0.8, 0.25, 0.5], [1.0, 1.0, 0.5]]
    assert 0.4 <= got["least_sure_errors"] <= 1


def test_least_sure_errors_by_hand():
    """Ten pixels of rising confidence, wrong at the two least sure ones and at the last: two of three."""
    probs = np.zeros((1, 2, 1, 10), np.uint8)
    probs[0, 1, 0] = np.arange(130, 230, 10)
    truth = np.array([2, 2, 1, 1, 1, 1, 1, 1, 1, 2]).reshape(1, 1, 10)
    assert lib.calibration(probs, truth)["least_sure_errors"] == pytest.approx(2 / 3)


def test_calibration_without_a_label_or_an_error():
    """Nothing labelled: NaN, no exception; nothing wrong: no share of errors, ece still a number."""
    probs = np.full((1, 2, 1, 4), 255, np.uint8)
    probs[:, 0] = 0
    assert np.isnan(lib.calibration(probs, np.zeros((1, 1, 4)))["least_sure_errors"])
    assert lib.calibration(probs, np.ones((1, 1, 4)))["ece"] == 0


@pytest.mark.filterwarnings("error")
def test_a_fold_without_labels_does_not_take_the_spread_along():
    """Of three folds one has no labelled pixel: pooled score and spread are those of the other two."""
    truth = np.uint8([[[1, 2]], [[1, 2]], [[0, 0]]])
    labels = np.uint8([[[1, 2]], [[1, 1]], [[1, 1]]])
    scores = lib.fold_scores(truth, labels, np.arange(3), 3)
    assert scores["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["fold_std"] == pytest.approx(np.std([1, 1 / 4]))
    assert np.isnan(lib.fold_scores(truth[2:], labels[2:], np.zeros(1), 1)["fold_std"])


def test_rare_classes_are_elected():
    """A rare class needs half of the voters, two at least if there are two, whatever the sums say; elsewhere
    the likeliest other class counts, never the background that nobody learnt."""
    sums = np.array([0, 9, 5, 0, 99], np.uint16)[None, :, None, None].repeat(5, 3)
    votes = np.zeros((1, 5, 1, 5), np.uint8)
    votes[0, 4, 0] = range(5)
    votes[0, 2, 0] = 4 - votes[0, 4, 0]  # of a common class nobody counts them
    rare = np.arange(5) == 4
    assert lib.elect(sums, votes, 1, rare, 1)[0, 0].tolist() == [1, 4, 4, 4, 4]
    assert lib.elect(sums, votes, 2, rare, 1)[0, 0].tolist() == [1, 1, 4, 4, 4]
    assert lib.elect(sums, votes, 4, rare, 1)[0, 0].tolist() == [1, 1, 4, 4, 4]
    assert lib.elect(sums, votes, 5, rare, 1)[0, 0].tolist() == [1, 1, 1, 4, 4]
    assert lib.elect(sums, votes, 4, rare & False, 1)[0, 0].tolist() == [4] * 5
    assert lib.elect(sums * 0, votes, 9, np.arange(5) != 2, 1)[0, 0].tolist() == [2] * 5
    assert lib.elect(sums, votes, 4, np.arange(5) == 2, 1)[0, 0].tolist() == [2, 2, 2, 4, 4]
    assert lib.elect(sums, votes, 4, np.isin(range(5), (2, 4)), 1)[0, 0].tolist() == [2, 2, 2, 4, 4]
    assert lib.elect(sums, votes, 1, rare, 0).dtype == np.uint8


@pytest.mark.parametrize("peak", [0.0, 0.8])
@pytest.mark.parametrize("first_class", [0, 1])
def test_one_voter_decides_as_alone(peak, first_class):
    """Of one network the election changes nothing."""
    probs = np.random.default_rng(0).dirichlet([0.3] * 5, (3, 8, 16)).transpose(0, 3, 1, 2)
    probs = (255 * probs).round().astype(np.uint8)
    labels = lib.decide(probs, [[1, 1, 1, 1, 2], [0, 0, 0, 0, peak]], first_class)
    votes = (labels[:, None] == np.arange(5)[:, None, None]).astype(np.uint8)
    np.testing.assert_array_equal(lib.elect(probs, votes, 1, np.arange(5) == 4, first_class), labels)
