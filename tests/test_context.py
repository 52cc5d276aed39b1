"""Context: what the labels of a frame say of its other tiles, and that no hidden label is seen."""
import numpy as np
import pytest

import lib

# a frame of 2 × 2 tiles, the last of which is a test tile, a tile alone, and a frame apart that is
# large enough to make rock, class 4, rare
PLACE = np.array([[0, 0, 0, -1] + [1] * 100 + [0], [0, 0, 1, 0] + [3] * 100 + [1],
                  [0, 1, 0, 0, *range(100), 1]])
FOLD_OF = np.array([0, 1, 1, 0] + [2] * 100)


def masks_of(*labels):
    """Return masks (104, 16, 32) of one label each: the four given, and 50 times soil and sand."""
    labels = np.array([*labels, *[1, 3] * 50], np.uint8)
    return labels[:, None, None].repeat(16, 1).repeat(32, 2)


def gauss(apart, sigma):
    """Return the weight of a cell so far away."""
    whole = np.exp(-np.arange(-99, 100) ** 2 / (2 * sigma ** 2)).sum()
    return np.exp(-apart ** 2 / (2 * sigma ** 2)) / whole


def pool(values, t):
    """Return the mean around each cell of tile t, (C, h, w), of values (T, C, h, w), by loops."""
    _, h, w = values.shape[1:]
    out = np.zeros(values.shape[1:])
    for o in np.flatnonzero(PLACE[0] == PLACE[0, t]):
        for y, x, v, u in np.ndindex(h, w, h, w):
            dy = h * (PLACE[1, t] - PLACE[1, o]) + y - v
            dx = w * (PLACE[2, t] - PLACE[2, o]) + x - u
            out[:, y, x] += gauss(dy, lib.REACH) * gauss(dx, lib.REACH) * values[o, :, v, u]
    return out


def test_canvas_puts_tiles_where_they_lie():
    """Row-major frames of equal extent, 0 where no tile is; a tile alone is on none."""
    place = np.array([[0, 0, 0, -1], [0, 0, 1, 0], [0, 1, 0, 0]])
    tiles = np.arange(1, 5)[:, None, None, None] * np.ones((4, 1, 2, 3), np.int64)
    canvas = lib.frame_canvas(tiles, place)
    assert canvas.shape == (1, 1, 2, 2, 2, 3)
    assert canvas.reshape(4, 6)[:, ::3].tolist() == [[1, 2], [1, 2], [3, 0], [3, 0]]


def test_pooling_counted_cell_by_cell():
    """Each cell gets a Gaussian's share of every cell of its frame; a tile alone gets nothing."""
    values = np.random.default_rng(1).random((105, 2, 2, 4)).astype(np.float32)
    pooled = lib.pool_frames(values, PLACE)
    for t in (0, 1, 104):
        np.testing.assert_allclose(pooled[t], pool(values, t), rtol=1e-3, atol=1e-4)
    assert not pooled[3].any()


def test_pooling_of_endless_ground_sums_to_one():
    """In the middle of a large frame of ones all cells weigh 1 together; at its edge, where half of
    the ground is missing, about a half."""
    place = np.array([[0] * 81, np.repeat(np.arange(9), 9), np.tile(np.arange(9), 9)])
    pooled = lib.pool_frames(np.ones((81, 1, 8, 16), np.float32), place)
    np.testing.assert_allclose(pooled[40, 0], 1, atol=1e-4)
    # its own row, and those below
    np.testing.assert_allclose(pooled[4, 0, 0, 8], (1 + gauss(0, lib.REACH)) / 2, atol=1e-4)


def test_log_ratios_counted_by_hand():
    """Of each fold: the share nearby over the overall share, of the labels of other folds alone;
    0 of background, and of a tile alone."""
    masks = masks_of(2, 1, 0, 3)
    masks[2, :8] = 3  # the upper half of the tile below
    ratios = lib.context_log_ratios(masks, FOLD_OF, PLACE)
    assert ratios.shape == (3, 105, 5, 2, 4) and ratios.dtype == np.float32
    for fold in range(2):
        seen = np.zeros((105, 5, 2, 4))
        for tile in np.flatnonzero(fold != FOLD_OF):
            for label in (1, 2, 3):
                seen[tile, label] = masks[tile, ::8, ::8] == label
        overall = (seen.sum((0, 2, 3)) / seen.sum())[:, None, None] + 1e-6
        for tile in (0, 1, 104):
            near = pool(seen, tile)
            wanted = np.log((near + 0.02 * overall) / ((near.sum(0) + 0.02) * overall))
            # SciPy cuts the Gaussian off at four standard deviations
            np.testing.assert_allclose(ratios[fold, tile, 1:4:2], wanted[1:4:2], atol=1e-3)
    assert (ratios[:, :, 0] == 0).all()
    np.testing.assert_allclose(ratios[:, 3], 0, atol=1e-3)


def test_a_rock_counts_across_the_border_only():
    """A neighbour to the right that is all rock makes rock likelier in the cells at that border, by
    pooling within REACH, and less so in each cell further away."""
    masks = masks_of(1, 4, 1, 1)
    assert lib.rare_classes(masks).tolist() == [False] * 4 + [True]
    ratios = lib.context_log_ratios(masks, FOLD_OF, PLACE)[0, 0, 4]  # tile 0's own label is hidden
    seen = np.zeros((105, 2, 2, 4))
    seen[1, 1] = seen[2, 0] = 1
    near, overall = pool(seen, 0), 1 / 102 + 1e-6
    wanted = np.log((near[1] + 0.02 * overall) / ((near.sum(0) + 0.02) * overall))
    np.testing.assert_allclose(ratios, wanted, atol=1e-3)
    assert (ratios[:, -1] > 2).all() and (np.diff(ratios[0]) > 0.1).all()


def test_the_labels_of_a_fold_are_hidden_from_it():
    """Whatever they are, nothing changes for that fold, in its own tiles and test tiles; for others
    it does."""
    before = lib.context_log_ratios(masks_of(2, 1, 1, 3), FOLD_OF, PLACE)
    after = lib.context_log_ratios(masks_of(2, 3, 2, 3), FOLD_OF, PLACE)
    np.testing.assert_array_equal(before[1], after[1])
    for fold in (0, 2):
        for tile in (0, 104):
            assert np.abs(before[fold, tile] - after[fold, tile]).max() > 0.1


def test_frames_tell_what_no_tile_shows():
    """Where each frame has one class and the networks know nothing, context out of fold is right in
    over 95 % of the pixels; with the tiles at random places, the control, in under 60 %."""
    rng, frame = np.random.default_rng(0), np.repeat(np.arange(30), 8)
    masks = np.uint8(1 + frame % 3)[:, None, None].repeat(16, 1).repeat(32, 2)
    place = np.array([frame, np.tile(np.repeat([0, 1], 4), 30), np.tile(np.arange(4), 60)])
    fold_of, probs = rng.permutation(240) % 3, np.full((240, 5, 16, 32), 0.25, np.float32)
    shares = {}
    for name, at in (("found", place), ("random", rng.permutation(place, axis=1))):
        ratios = lib.context_log_ratios(masks, fold_of, at)[fold_of, np.arange(240)]
        shares[name] = (lib.apply_context(probs, ratios, 1.0).argmax(1) == masks).mean()
    assert shares["found"] > 0.95 and shares["random"] < 0.6


def test_the_weight_that_suits_is_fitted():
    """Sand 200 : 55 against soil. Where soil is true the context says so by 2.8, where it is not by
    2.4: ln(200/55) = 1.29 is passed by 0.5 · 2.8, and not by 0.5 · 2.4; of nothing it is 0."""
    probs, masks = np.zeros((2, 5, 8, 8), np.uint8), np.ones((2, 8, 8), np.uint8)
    probs[:, 3], probs[:, 1], masks[1] = 200, 55, 3
    ratios = np.zeros((2, 5, 1, 1), np.float32)
    ratios[:, 1, 0, 0] = 2.8, 2.4
    assert lib.fit_context_weight(probs, ratios, masks) == 0.5
    assert lib.fit_context_weight(probs, 0 * ratios, masks) == 0


def test_applying_counted_by_hand():
    """Probabilities times exp(weight · log-ratio), normalised: .2 · 4 = .8; background stays 0."""
    probs = np.zeros((2, 5, 4, 4), np.float32)
    probs[:, 0], probs[:, 1], probs[:, 2] = 0.5, 0.2, 0.8
    ratios = np.zeros((2, 5, 2, 2), np.float32)
    ratios[:, 1] = np.log(2)
    out = lib.apply_context(probs, ratios, 2)
    # classes 3 and 4 count as .002, which a byte cannot tell from 0
    wanted = np.array([0, 0.8, 0.8, 0.002, 0.002]) / 1.604
    np.testing.assert_allclose(out[1, :, 0, 0], wanted, rtol=1e-5)


@pytest.mark.fault(17)
def test_kept_classes_counted_by_hand():
    """Of a kept class the old probability; the others share the rest in their new proportions. With
    no rest, or nobody to share it, there is no NaN."""
    rare = np.arange(5) == 4
    before, after = np.zeros((2, 5, 1, 1), np.float32), np.zeros((2, 5, 1, 1), np.float32)
    before[:, 1:, 0, 0], after[:, 1:, 0, 0] = [0.2, 0.2, 0.2, 0.4], [0.1, 0.5, 0.2, 0.2]
    out = lib.keep_classes(before, after, rare)[1, :, 0, 0]
    np.testing.assert_allclose(out, [0, 0.075, 0.375, 0.15, 0.4], rtol=1e-5)
    before[:, :, 0, 0] = rare
    assert (lib.keep_classes(before, after, rare)[1, :, 0, 0] == rare).all()
    before[:, 4], after[:, 1:4] = 0.4, 0
    assert (lib.keep_classes(before, after, rare)[:, :, 0, 0] == np.float32(0.4) * rare).all()


@pytest.mark.fault(19)
def test_cells_are_means_of_pixels():
    """8 × 8 pixels a cell; a side that 8 does not divide gets the nearest number of cells."""
    masks = np.random.default_rng(0).integers(0, 5, (3, 16, 24)).astype(np.uint8)
    shares = lib.class_cells(masks)
    for c in range(5):
        wanted = (masks == c).reshape(3, 2, 8, 3, 8).mean((2, 4))
        np.testing.assert_allclose(shares[:, c], wanted, rtol=1e-5)
    assert lib.class_cells(np.zeros((2, 65, 3), np.uint8)).shape == (2, 5, 8, 1)
