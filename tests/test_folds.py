"""Folds: every image once, copies together, rare images spread evenly."""
import numpy as np
import pytest

import lib


def tiles(n, seed=0):
    """Return n different images 8×16 and masks, each of one class of 0 to 3 all over."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 8, 16), dtype=np.uint8)
    return images, rng.integers(0, 4, (n, 1, 1)).repeat(8, 1).repeat(16, 2).astype(np.uint8)


@pytest.mark.parametrize("n,folds", [(101, 3), (7, 5), (2, 2)])
def test_every_image_is_validated_once(n, folds):
    """Each image has one fold of 0..K-1, no fold is empty, and sizes differ by at most one. The
    same seed gives the same folds, another seed others; NumPy's global state is nothing."""
    fold_of = lib.make_folds(*tiles(n), folds, 0)
    sizes = np.bincount(fold_of, minlength=folds)
    assert len(sizes) == folds and sizes.sum() == n and sizes.max() - sizes.min() <= 1
    np.random.seed(n)
    assert (fold_of == lib.make_folds(*tiles(n), folds, 0)).all()
    assert n < 9 or (fold_of != lib.make_folds(*tiles(n), folds, 1)).any()


@pytest.mark.parametrize("seed", range(3))
def test_rare_images_and_classes_are_spread_evenly(seed):
    """Of 63 rock images among 1,000 (as in the competition) each of 5 folds holds 12 or 13, and of
    each dominant class the same, up to one image with rock and one without. Background under 2 %
    of the pixels is no rare class."""
    images, masks = tiles(1000, seed)
    masks[masks == 0] = 1
    masks[::2, -1, -1] = 0
    rocks = np.random.default_rng(seed).permutation(1000)[:63]
    masks[rocks, 3, 3] = 4
    assert lib.rare_classes(masks).tolist() == [False] * 4 + [True]
    fold_of = lib.make_folds(images, masks, 5, seed)
    assert np.ptp(np.bincount(fold_of[rocks], minlength=5)) <= 1
    for c in (1, 2, 3):
        assert np.ptp(np.bincount(fold_of[masks[:, 0, 0] == c], minlength=5)) <= 2


@pytest.mark.fault(18)
@pytest.mark.parametrize("folds", [1, 3])
def test_copies_share_a_fold(folds):
    """Equal images are never on both sides of a split, whatever their masks say."""
    images, masks = tiles(60)
    images = np.concatenate([images, images[:30]])
    fold_of = lib.make_folds(images, np.concatenate([masks, 3 - masks[:30]]), folds, 0)
    np.testing.assert_array_equal(fold_of[60:], fold_of[:30])


@pytest.mark.fault(12)
@pytest.mark.parametrize("n,validated", [(2, (1, 1)), (6, (1, 1)), (1000, (130, 170))])
def test_one_fold_is_a_split_of_15_percent(n, validated):
    """One validation set of 13 to 17 %, stratified, all others -1; of few images it has one."""
    images, masks = tiles(n)
    masks[:n // 16, 3, 3] = 4
    fold_of = lib.make_folds(images, masks, 1, 0)
    assert set(fold_of) == {-1, 0}
    assert validated[0] <= (fold_of == 0).sum() <= validated[1]
    assert n < 1000 or 8 <= (fold_of[:n // 16] == 0).sum() <= 10


@pytest.mark.fault(12)
def test_fewer_images_than_folds_is_refused():
    """3 images, or 3 different ones among 9, can't make 5 folds; both numbers are named."""
    images, masks = tiles(3)
    for copies in (1, 3):
        with pytest.raises(lib.UserError, match="5.*3"):
            lib.make_folds(images.repeat(copies, 0), masks.repeat(copies, 0), 5, 0)
