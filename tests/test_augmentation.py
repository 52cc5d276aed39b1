"""Augmentation of whole batches: image and mask move together, by the generator's key alone."""
from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lib


def gen(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(lib.seed_of(*(key or (0,))))


def blocks(b: int, rows: int = 4, columns: int = 8, seed: int = 0, side: int = 8) -> lib.Batch:
    """Return blocks of one label each; the image's two channels are the label and ten times it."""
    y = torch.randint(1, 5, (b, rows, columns), generator=gen(seed))
    y = y.repeat_interleave(side, 1).repeat_interleave(side, 2).to(torch.int8)
    return torch.stack([y.float(), 10 * y.float()], 1), y


def assert_together(x: torch.Tensor, y: torch.Tensor) -> None:
    """Assert that, wherever all eight neighbours have its label, a pixel shows its label."""
    around = F.pad(y.float()[:, None], (1, 1, 1, 1), value=-1)
    where = (-F.max_pool2d(-around, 3, 1) == F.max_pool2d(around, 3, 1))[:, 0]
    assert where.float().mean() > 0.3
    torch.testing.assert_close(x[:, 0][where], y[where].float(), atol=2e-2, rtol=0)
    torch.testing.assert_close(x[:, 1][where], 10 * y[where].float(), atol=2e-1, rtol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(2, 5), st.integers(3, 6), st.floats(0, 0.3),
       st.floats(0, 0.3), st.floats(0, 90))
def test_image_and_mask_move_together(seed, rows, columns, shift, scale, degrees):
    """After mirrors and affine maps of any strength the image still shows the labels, whole numbers
    of the same type, on tiles of any size."""
    x, y = blocks(4, rows, columns, seed, 12)
    shape, g = x.shape, gen(seed, 1)
    x, y = lib.flip(*lib.flip(x, y, -1, g), -2, g)
    x, y = lib.affine(x, y, g, shift, scale, degrees)
    assert x.shape == shape and y.dtype == torch.int8 and set(y.unique().tolist()) <= {1, 2, 3, 4}
    assert_together(x, y)


@pytest.mark.parametrize("dim", [-1, -2])
def test_flip_mirrors_about_half(dim):
    """Each image and its mask are untouched or mirrored along dim; of 64 each 16 to 48."""
    x, y = blocks(64)
    fx, fy = lib.flip(x, y, dim, gen())
    pairs = list(zip(fx, x, fy, y, strict=True))
    same = [torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in pairs]
    mirrored = [torch.equal(a, b.flip(dim)) and torch.equal(c, d.flip(dim)) for a, b, c, d in pairs]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 16 < sum(mirrored) < 48


def test_affine_moves_about_half():
    """With p = ½ an image is as it was or moved, 16 to 48 of 64; with p = 1 every one is moved."""
    x, y = blocks(64)
    ax, ay = lib.affine(x, y, gen(), 0.2, 0.2, 60.0)
    moved = (ay != y).flatten(1).any(1)
    assert 16 < moved.sum() < 48
    torch.testing.assert_close(ax[~moved], x[~moved], atol=1e-4, rtol=0)
    assert (lib.affine(x, y, gen(), 0.2, 0.2, 60.0, p=1.0)[1] != y).flatten(1).any(1).all()


def test_turning_keeps_circles_round():
    """A disc turned by up to 60° on a 32×64 tile stays that disc: the aspect ratio is accounted
    for."""
    v, u = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    y = ((u**2 + v**2) < 100).to(torch.int8).expand(16, 32, 64)
    _, ay = lib.affine(y.float()[:, None], y, gen(), 0.0, 0.0, 60.0, p=1.0)
    seen = u**2 + v**2 < 15**2  # further out the mirrored border shows
    assert 0 < ((ay != y) & seen).sum((1, 2)).max() <= 25  # a few of the rim's 60 pixels


def test_a_shift_goes_both_ways_and_no_further():
    """A shift of 0.2 moves a column by at most 12 of 60 pixels, to the left and to the right."""
    y = torch.ones(64, 32, 60, dtype=torch.int8)
    y[:, :, 30] = 2
    _, ay = lib.affine(y.float()[:, None], y, gen(), 0.2, 0.0, 0.0, p=1.0)
    at = (ay == 2).any(1).float().argmax(1)
    assert 17 <= at.min() < 24 and 36 < at.max() <= 43


def test_jitter_is_a_line_on_the_grey_alone():
    """Contrast is a factor of 0.8 to 1.2, brightness an addend of up to 0.4, of channel 0 of about
    half the images; other channels stay bit for bit."""
    x, _ = blocks(32)
    jx = lib.jitter(x, gen(), 0.2)
    assert torch.equal(jx[:, 1:], x[:, 1:])
    changed = (jx[:, 0] != x[:, 0]).flatten(1).any(1)
    assert 8 <= changed.sum() <= 24
    for before, after in zip(x[changed, 0], jx[changed, 0], strict=True):
        one, four = after[before == 1], after[before == 4]
        slope = (four.mean() - one.mean()) / 3
        assert one.std() < 1e-5 and four.std() < 1e-5 and 0.8 <= slope <= 1.2
        assert abs(one.mean() - slope) <= 0.4 + 1e-5


# --------------------------------------------------------------------------------- copy-paste

def rocks(b: int = 32) -> tuple[torch.Tensor, ...]:
    """Return soil of grey 1, and donors with a 9×9 rock of grey 50 amid ground of grey 30."""
    y, donor_y = torch.ones(2, b, 32, 64, dtype=torch.int8)
    donor_y = donor_y * 0
    donor_y[:, 12:21, 28:37] = 4
    donor_x = torch.where(donor_y > 0, 50.0, 30.0)[:, None]
    return y.float()[:, None], y, donor_x, donor_y


def test_pasted_pixels_and_labels_move_together():
    """Inside new labels stand the donor's pixels; two pixels outside them nothing changed."""
    x, y, donor_x, donor_y = rocks()
    px, py = lib.copy_paste(x, y, donor_x, donor_y, gen(), 1.0)
    new = (py != y)[:, None].float()
    assert new.flatten(1).any(1).float().mean() > 0.5 and py.dtype == torch.int8
    far = F.max_pool2d(new, 3, 1, 1) == 0
    assert torch.equal(px[far], x[far])
    core = F.max_pool2d(1 - new, 5, 1, 2) == 0  # two pixels from what was not pasted
    assert core.sum() > 100 and px[core].min() >= 40  # at the tile's border its soft edge may show
    core[..., [0, -1], :] = core[..., [0, -1]] = False
    torch.testing.assert_close(px[core], torch.full_like(px[core], 50.0), atol=1e-3, rtol=0)


def test_pasted_labels_are_the_donors():
    """A label that changes becomes the donor's; all others stay, unlabelled pixels included; a
    donor without a mark gives nothing, whatever its pixels are."""
    x, y, donor_x, donor_y = rocks()
    y[:, ::2] = 0
    donor_y[8:16][donor_y[8:16] > 0] = 3
    donor_y[16:] = 0
    px, py = lib.copy_paste(x, y, donor_x, donor_y, gen(), 1.0)
    assert set(py[:8][py[:8] != y[:8]].tolist()) == {4}
    assert set(py[8:16][py[8:16] != y[8:16]].tolist()) == {3}
    assert torch.equal(px[16:], x[16:]) and torch.equal(py[16:], y[16:])


def test_nothing_is_pasted_on_unlabelled_images():
    """Images without any label, of sky or rover, get no rock; labelled ones beside them do."""
    x, y, donor_x, donor_y = rocks()
    y[::2] = 0
    px, py = lib.copy_paste(x, y, donor_x, donor_y, gen(), 1.0)
    assert torch.equal(px[::2], x[::2]) and torch.equal(py[::2], y[::2])
    assert (py[1::2] == 4).any()


def test_pasting_scales_by_no_more_than_it_says():
    """A 9×9 rock that no border cuts comes in 0.7² to 1.4² times its area."""
    x, y, donor_x, donor_y = rocks(64)
    rock = lib.copy_paste(x, y, donor_x, donor_y, gen(), 1.0)[1] == 4
    inside = rock[:, 1:-1, 1:-1].sum((1, 2))
    area = inside[(inside == rock.sum((1, 2))) & (inside > 0)].float()
    assert len(area) > 20 and area.max() > 2 * area.min()
    assert area.min() >= 0.6**2 * 81 and area.max() <= 1.5**2 * 81


def test_probability_0_changes_nothing():
    """With p = 0 affine, jitter and copy_paste return the batch as it was."""
    x, y, donor_x, donor_y = rocks()
    px, py = lib.copy_paste(x, y, donor_x, donor_y, gen(), 0.0)
    assert torch.equal(px, x) and torch.equal(py, y)
    assert torch.equal(lib.jitter(x, gen(), 0.5, 0.0), x)
    bx, by = blocks(8)
    ax, ay = lib.affine(bx, by, gen(), 0.2, 0.2, 60.0, 0.0)
    torch.testing.assert_close(ax, bx, atol=1e-4, rtol=0)
    assert torch.equal(ay, by)


# ------------------------------------------------------------------------------------ the key

def augmented(inputs: tuple[torch.Tensor, ...], *key: int) -> lib.Batch:
    """Return the inputs, of rocks(), after all augmentations by one generator."""
    g = gen(*key)
    x, y = lib.copy_paste(*inputs, g, 0.5)
    x, y = lib.affine(*lib.flip(x, y, -1, g), g, 0.2, 0.2, 60.0)
    return lib.jitter(x, g, 0.2), y


def test_the_key_alone_decides():
    """Of one (seed, stage, network, epoch) comes one batch, bit for bit, whatever torch drew in
    between, of another one another; what was passed in, views of the data set, stays."""
    inputs = rocks(16)
    before = [tensor.clone() for tensor in inputs]
    torch.manual_seed(1)
    first = augmented(inputs, 0, 1, 2, 3)
    torch.manual_seed(2)
    second = augmented(inputs, 0, 1, 2, 3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], augmented(inputs, 0, 1, 2, 4)[0])
    assert all(map(torch.equal, before, inputs))


def test_different_keys_are_different_seeds():
    """All 1,296 keys of numbers 0 to 5 differ: seed 0 in epoch 1 is not seed 1 in epoch 0."""
    seeds = {lib.seed_of(*key) for key in itertools.product(range(6), repeat=4)}
    assert len(seeds) == 1296 and max(seeds) < 2**63
