"""Opening and closing per class."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lib

KERNEL = np.ones((3, 3), np.uint8)
blobs = hnp.arrays(
    np.uint8, st.tuples(st.just(1), st.integers(1, 8), st.integers(1, 8)), elements=st.integers(0, 4)
).map(lambda m: m.repeat(2, 1).repeat(2, 2))  # 2×2 blobs: some are opened away, some are not
specks = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12)),
    elements=st.sampled_from([0, 1, 1, 1, 1, 2, 2, 3, 4]),
)
both = st.one_of(blobs, specks)


@settings(max_examples=300, deadline=None)
@given(both, st.permutations(range(5)))
def test_relabelling_commutes(masks, numbering):
    """Renumbering the classes and cleaning gives what cleaning and renumbering gives: no class comes before
    another."""
    new = np.array(numbering, np.uint8)
    np.testing.assert_array_equal(lib.clean_masks(new[masks]), new[lib.clean_masks(masks)])


@settings(max_examples=200, deadline=None)
@given(both)
def test_no_class_vanishes_and_none_appears(masks):
    """Every image keeps exactly the classes it had."""
    for before, after in zip(masks, lib.clean_masks(masks), strict=True):
        assert set(np.unique(before)) == set(np.unique(after))


@settings(max_examples=100, deadline=None)
@given(both)
def test_mirrored_masks_give_mirrored_results(masks):
    """Cleaning commutes with both mirrors: a 3×3 square has no preferred side."""
    np.testing.assert_array_equal(
        lib.clean_masks(masks[:, ::-1, ::-1]), lib.clean_masks(masks)[:, ::-1, ::-1]
    )


def test_grey_morphology_would_depend_on_the_numbering():
    """The published way, grey opening and closing on the ids, fails test_relabelling_commutes: the test can
    fail."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 5, (16, 16)).astype(np.uint8)
    new = np.array([3, 1, 4, 0, 2], np.uint8)

    def grey(m):
        return cv2.morphologyEx(cv2.morphologyEx(m, cv2.MORPH_OPEN, KERNEL), cv2.MORPH_CLOSE, KERNEL)

    assert (grey(new[mask]) != new[grey(mask)]).any()


def test_rare_class_of_one_pixel_survives():
    """A single pixel of rock, the image's only one, is left where it is: opening may not wipe a class out."""
    mask = np.ones((1, 9, 9), np.uint8)
    mask[0, 4, 4] = 4
    np.testing.assert_array_equal(lib.clean_masks(mask), mask)


def test_speck_beside_a_block_of_its_class_goes():
    """With a 3×3 block of rock elsewhere, the lone pixel is noise and becomes what surrounds it; the block
    stays."""
    mask = np.ones((1, 12, 12), np.uint8)
    mask[0, 3:6, 3:6] = 4
    mask[0, 9, 9] = 4
    want = mask.copy()
    want[0, 9, 9] = 1
    np.testing.assert_array_equal(lib.clean_masks(mask), want)


def test_two_classes_equal_opencv():
    """With specks and holes apart from each other, the result is OpenCV's opening and then closing of either
    class."""
    mask = np.full((40, 60), 1, np.uint8)
    mask[5:30, 30:55] = 3
    mask[[10, 20, 34], [5, 15, 50]] = 3  # specks of sand on soil
    mask[12, 40] = mask[20, 45:47] = 1  # holes of soil in sand
    got = lib.clean_masks(mask[None])[0]
    for c in (1, 3):
        layer = (mask == c).astype(np.uint8)
        want = cv2.morphologyEx(cv2.morphologyEx(layer, cv2.MORPH_OPEN, KERNEL), cv2.MORPH_CLOSE, KERNEL)
        np.testing.assert_array_equal(got == c, want == 1)
    assert (got != mask).sum() == 3 + 3  # three specks, three pixels of holes, nothing else


def test_blocks_are_left_alone():
    """Masks made of blocks of 3×3 and larger do not change, corners and borders included."""
    masks = np.arange(35, dtype=np.uint8).reshape(1, 5, 7) % 5
    masks = masks.repeat(3, 1).repeat(4, 2)
    np.testing.assert_array_equal(lib.clean_masks(masks), masks)


def test_second_pass_changes_nothing_on_clean_cases():
    """On specks and holes apart from each other one pass is enough."""
    mask = np.full((1, 30, 30), 2, np.uint8)
    mask[0, 3:20, 3:20] = 1
    mask[0, [6, 24, 26], [6, 8, 24]] = 2, 1, 1
    once = lib.clean_masks(mask)
    assert (once != mask).sum() == 3
    np.testing.assert_array_equal(lib.clean_masks(once), once)


@pytest.mark.parametrize("value", range(5))
def test_single_class_is_untouched(value):
    """An image of one class, background included, comes back as it is."""
    mask = np.full((2, 5, 7), value, np.uint8)
    np.testing.assert_array_equal(lib.clean_masks(mask), mask)


def test_images_do_not_touch_each_other():
    """Cleaning a stack is cleaning each image alone: class 4's block in one does not doom the speck in the
    other."""
    masks = np.ones((2, 12, 12), np.uint8)
    masks[0, 2:6, 2:6] = 4
    masks[1, 5, 5] = 4
    np.testing.assert_array_equal(
        lib.clean_masks(masks), np.concatenate([lib.clean_masks(m[None]) for m in masks])
    )
    assert lib.clean_masks(masks)[1, 5, 5] == 4


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, np.uint8])
def test_any_integer_type(dtype):
    """Fault 27: integer masks that OpenCV would refuse are cleaned like uint8 ones, and keep their type."""
    mask = np.ones((1, 12, 12), np.uint8)
    mask[0, 3:6, 3:6] = mask[0, 9, 9] = 2
    got = lib.clean_masks(mask.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, lib.clean_masks(mask))


def test_argument_is_not_changed():
    """The masks passed in stay as they are (stage 1's raw answer is scored too)."""
    mask = np.ones((1, 9, 9), np.uint8)
    mask[0, :3, :3] = mask[0, 7, 7] = 4
    before = mask.copy()
    lib.clean_masks(mask)
    np.testing.assert_array_equal(mask, before)
