"""Folds: every image once, copies together, rare images spread evenly."""

import numpy as np
import pytest

import lib


def tiles(n, rare_every=0, seed=0):
    """n distinct images 8×16 of one dominant class each; every rare_every-th holds a pixel of rock."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 8, 16), dtype=np.uint8)
    masks = np.broadcast_to(rng.integers(0, 4, (n, 1, 1)), images.shape).astype(np.uint8)
    if rare_every:
        masks[::rare_every, 0, 0] = 4
    return images, masks


@pytest.mark.parametrize("n,folds", [(100, 5), (101, 3), (7, 5), (5, 5), (2, 2)])
def test_every_image_is_validated_exactly_once(n, folds):
    """Each image has one fold of 0..K-1, no fold is empty, and sizes differ by at most one."""
    fold_of = lib.make_folds(*tiles(n), folds, 0)
    sizes = np.bincount(fold_of, minlength=folds)
    assert fold_of.shape == (n,) and fold_of.min() == 0 and len(sizes) == folds
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_rare_images_are_spread_evenly(seed):
    """Of 63 rock images among 1,000 (as in the competition) each of 5 folds holds 12 or 13."""
    images, masks = tiles(1000, seed=seed)
    masks[np.random.default_rng(seed).permutation(1000)[:63], 3, 3] = 4
    held = np.bincount(lib.make_folds(images, masks, 5, seed), (masks == 4).any((1, 2)), 5)
    assert held.sum() == 63 and held.max() - held.min() <= 1


def test_dominant_classes_are_spread_evenly():
    """Of each dominant class every fold holds the same share, one image more or less."""
    images, masks = tiles(400)
    fold_of = lib.make_folds(images, masks, 4, 0)
    for c in range(4):
        held = np.bincount(fold_of[masks[:, 0, 0] == c], minlength=4)
        assert held.max() - held.min() <= 1


@pytest.mark.parametrize("folds", [1, 3, 5])
def test_copies_share_a_fold(folds):
    """Equal images are never on both sides of a split, whatever their masks say."""
    images, masks = tiles(60, 4)
    images, masks = (
        np.concatenate([images, images[:30], images[:10]]),
        np.concatenate([masks, 3 - masks[:30] % 4, masks[:10]]),
    )
    fold_of = lib.make_folds(images, masks, folds, 0)
    np.testing.assert_array_equal(fold_of[60:90], fold_of[:30])
    np.testing.assert_array_equal(fold_of[90:], fold_of[:10])


@pytest.mark.parametrize("n", [20, 100, 2505])
def test_one_fold_is_a_split_of_15_percent(n):
    """folds = 1: one validation set of 13 to 17 %, all others -1: trained on, never validated."""
    fold_of = lib.make_folds(*tiles(n), 1, 0)
    assert set(fold_of) == {-1, 0}
    assert 0.13 <= (fold_of == 0).mean() <= 0.17


def test_one_fold_is_stratified():
    """folds = 1 on 63 rock images: the validation set gets its share of them, 8 to 10."""
    images, masks = tiles(1000)
    masks[:63, 3, 3] = 4
    assert 8 <= (lib.make_folds(images, masks, 1, 0)[:63] == 0).sum() <= 10


@pytest.mark.parametrize("n", [2, 3, 6])
def test_one_fold_of_few_images_has_both_sides(n):
    """With 2 images one validates and the other trains."""
    fold_of = lib.make_folds(*tiles(n), 1, 0)
    assert (fold_of == 0).sum() == 1 and (fold_of == -1).sum() == n - 1


def test_fewer_images_than_folds_is_refused():
    """Fault 12: 3 images, or 3 different ones among 9, can't make 5 folds; both numbers are named."""
    images, masks = tiles(3)
    for copies in (1, 3):
        with pytest.raises(lib.UserError, match="5.*3"):
            lib.make_folds(np.concatenate([images] * copies), np.concatenate([masks] * copies), 5, 0)


def test_same_seed_same_folds_other_seed_others():
    """The split depends on the seed and on nothing else: not on a call before, nor on NumPy's global
    state."""
    images, masks = tiles(200, 10)
    np.random.seed(1)
    first = lib.make_folds(images, masks, 5, 3)
    np.random.seed(2)
    np.testing.assert_array_equal(first, lib.make_folds(images, masks, 5, 3))
    assert (first != lib.make_folds(images, masks, 5, 4)).any()


@pytest.mark.parametrize("seed", range(4))
def test_little_background_does_not_make_images_rare(seed):
    """A background under 2 % of the pixels is no rare class: 12 rock images stay three to a fold."""
    images, masks = tiles(300)
    masks[masks == 0] = 1
    masks[::2, -1, -1] = 0
    masks[np.random.default_rng(seed).permutation(300)[:12], 3, 3] = 4
    held = np.bincount(lib.make_folds(images, masks, 4, seed), (masks == 4).any((1, 2)), 4)
    np.testing.assert_array_equal(held, [3, 3, 3, 3])
