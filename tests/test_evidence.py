"""What the frames say: weights, pooled evidence, and that no hidden label is heard."""
import numpy as np
import pytest

import lib

PLACE = np.array([[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]])  # a corner of three tiles, and one tile alone


def tiles(labels):
    """Return masks (N, 4, 4), each of one label."""
    return np.repeat(np.array(labels, np.uint8), 16).reshape(-1, 4, 4)


def test_weights_fall_with_the_steps_and_end_at_the_frame():
    """exp(-steps / reach) inside a frame, 0 on the tile itself and between frames."""
    weights = lib.frame_weights(PLACE, 2.0).toarray()
    near, far = np.exp(-0.5), np.exp(-1.0)
    expected = [[0, near, near, 0], [near, 0, far, 0], [near, far, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(weights, expected)


def test_evidence_counted_by_hand():
    """One neighbour of soil at one step against overall shares of ½ soil and ½ bedrock."""
    weights = lib.frame_weights(PLACE[:, [0, 1, 3]], 1.0)
    masks = tiles([2, 1, 0])  # bedrock, soil; the third alone and without labels
    ratio = lib.frame_log_ratio(weights, np.zeros((3, 5)), masks, np.zeros(3, bool), 1)
    w = np.exp(-1.0)
    pooled_soil = (w + 0.05) / (w + 0.1)
    np.testing.assert_allclose(ratio[0, 1], np.log(pooled_soil / 0.5), rtol=1e-5)
    np.testing.assert_allclose(ratio[0, 2], np.log((1 - pooled_soil) / 0.5), rtol=1e-5)
    np.testing.assert_allclose(ratio[2], 0, atol=1e-6)  # nobody speaks of a tile alone


def test_hidden_labels_are_not_heard():
    """Whatever the hidden labels are, no evidence changes: the fold that is scored stays unseen."""
    rng = np.random.default_rng(0)
    place = np.stack([np.repeat(np.arange(4), 6), np.tile([0, 0, 0, 1, 1, 1], 4), np.tile([0, 1, 2], 8)])
    weights, said = lib.frame_weights(place, 2.0), rng.dirichlet(np.ones(5), 24)
    hidden = np.arange(20) % 5 == 0  # 20 training tiles, 4 test tiles
    masks = rng.integers(0, 4, (20, 4, 4)).astype(np.uint8)
    other = masks.copy()
    other[hidden] = rng.integers(0, 4, (4, 4, 4))
    assert not np.array_equal(masks, other)
    before = lib.frame_log_ratio(weights, said, masks, hidden, 1)
    np.testing.assert_array_equal(before, lib.frame_log_ratio(weights, said, other, hidden, 1))
    shown = lib.frame_log_ratio(weights, said, masks, np.zeros(20, bool), 1)
    assert not np.array_equal(before, shown)  # known labels do speak


def test_rare_classes_are_left_alone():
    """A class under 2 % of the labelled pixels keeps a log-ratio of 0."""
    masks = tiles([1, 1, 2])
    masks = np.concatenate([masks, np.ones((9, 4, 4), np.uint8)])
    masks[0, 0, 0] = 4  # 1 of 192 pixels
    place = np.stack([np.zeros(12, int), np.zeros(12, int), np.arange(12)])
    weights = lib.frame_weights(place, 2.0)
    ratio = lib.frame_log_ratio(weights, np.zeros((12, 5)), masks, np.zeros(12, bool), 1)
    assert (ratio[:, 4] == 0).all() and (ratio[:, 1] != 0).any()


@pytest.mark.parametrize("first_class", [0, 1])
def test_reweighing_counted_by_hand(first_class):
    """Probabilities times exp(ratio), summing to 255 again; classes below the first stay 0."""
    probs = np.zeros((300, 5, 1, 1), np.uint8)
    probs[:, first_class:first_class + 2] = [[[51]], [[204]]]
    ratio = np.zeros((300, 5))
    ratio[:, first_class] = np.log(4)
    out = lib.reweigh(probs, ratio, first_class)
    assert out[:, :first_class].sum() == 0
    np.testing.assert_allclose(out[299, first_class:first_class + 2, 0, 0], [127, 127], atol=1)
    assert abs(int(out[0].sum()) - 255) <= 2
