"""Augmentation on whole batches: image and mask move together, and everything follows from the generator's
key."""

import itertools

import pytest
import torch

import lib

CPU = torch.device("cpu")


def gen(*key):
    return lib.generator(CPU, *(key or (0,)))


def batch(b=8, h=32, w=64, seed=0, block=8):
    """Blocks of 8×8 of one label each; the image is the label itself, in two channels."""
    y = torch.randint(1, 5, (b, h // block, w // block), generator=torch.Generator().manual_seed(seed))
    y = y.repeat_interleave(block, 1).repeat_interleave(block, 2).to(torch.int8)
    x = y.float()[:, None]
    return torch.cat([x, 10 * x], 1), y


def inside(y):
    """True where all eight neighbours are there and have the pixel's own label: there interpolation mixes
    nothing."""
    y = torch.nn.functional.pad(y.float()[:, None], (1, 1, 1, 1), value=-1)
    low = -torch.nn.functional.max_pool2d(-y, 3, 1)
    return (low == torch.nn.functional.max_pool2d(y, 3, 1))[:, 0]


def assert_together(x, y):
    """Wherever no border is near, the image shows the label, in both channels."""
    where = inside(y)
    assert where.float().mean() > 0.3
    torch.testing.assert_close(x[:, 0][where], y[where].float(), atol=2e-2, rtol=0)
    torch.testing.assert_close(x[:, 1][where], 10 * y[where].float(), atol=2e-1, rtol=0)


@pytest.mark.parametrize("dim", [-1, -2])
def test_flip_moves_image_and_mask_together(dim):
    """Every image is either untouched or mirrored along dim, its mask likewise; of 64 both kinds occur."""
    x, y = batch(64)
    fx, fy = lib.flip(x, y, dim, gen())
    torch.testing.assert_close(fx[:, 0], fy.float(), atol=0, rtol=0)
    same = torch.tensor([torch.equal(a, b) for a, b in zip(fx, x, strict=True)])
    mirrored = torch.tensor([torch.equal(a, b.flip(dim)) for a, b in zip(fx, x, strict=True)])
    assert (same | mirrored).all() and 16 < mirrored.sum() < 48
    assert fy.dtype == torch.int8


@pytest.mark.parametrize(
    "shift,scale,degrees", [(0.2, 0.0, 0.0), (0.0, 0.2, 0.0), (0.0, 0.0, 60.0), (0.2, 0.2, 60.0)]
)
def test_affine_moves_image_and_mask_together(shift, scale, degrees):
    """After shift, zoom and turn the mask still describes the image; labels stay whole numbers of their
    type."""
    x, y = batch(16)
    ax, ay = lib.affine(x, y, gen(), shift, scale, degrees, p=1.0)
    assert (ax - x).abs().flatten(1).amax(1).gt(0.5).all()  # every image moved
    assert ax.shape == x.shape and ay.dtype == torch.int8 and set(ay.unique().tolist()) <= {1, 2, 3, 4}
    assert_together(ax, ay)


def test_affine_leaves_about_half_alone():
    """With p = ½ an image is either exactly as it was or moved; of 64, 16 to 48 are moved."""
    x, y = batch(64)
    ax, ay = lib.affine(x, y, gen(), 0.2, 0.2, 60.0)
    moved = (ay != y).flatten(1).any(1)
    assert 16 < moved.sum() < 48
    torch.testing.assert_close(ax[~moved], x[~moved], atol=1e-4, rtol=0)


def test_turning_keeps_circles_round():
    """A disc turned by up to 60° on a 32×64 tile stays a disc of its area: the aspect ratio is taken care
    of."""
    v, u = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    y = ((u**2 + v**2) < 100).to(torch.int8).expand(16, 32, 64)
    _, ay = lib.affine(y.float()[:, None], y, gen(), 0.0, 0.0, 60.0, p=1.0)
    seen = u**2 + v**2 < 15**2  # further out the mirrored border shows
    assert ((ay != y) & seen).sum((1, 2)).max() <= 25  # a few of the rim's 60 pixels


def test_shift_goes_both_ways_and_no_further():
    """A shift of 0.2 moves a bright column by at most a fifth of the width, to the left and to the right."""
    y = torch.ones(64, 32, 60, dtype=torch.int8)
    y[:, :, 30] = 2
    _, ay = lib.affine(y.float()[:, None], y, gen(), 0.2, 0.0, 0.0, p=1.0)
    at = (ay == 2).any(1).float().argmax(1)
    assert at.min() >= 30 - 13 and at.max() <= 30 + 13
    assert (at < 24).any() and (at > 36).any()


def test_light_changes_the_grey_alone():
    """Brightness and contrast are one line per image on channel 0; other channels are bit for bit the
    same."""
    x, _ = batch(32)
    jx = lib.jitter_light(x, gen(), 0.2)
    assert torch.equal(jx[:, 1:], x[:, 1:])
    changed = (jx[:, 0] != x[:, 0]).flatten(1).any(1)
    assert 8 <= changed.sum() <= 24
    for before, after in zip(x[changed, 0], jx[changed, 0], strict=True):
        one, four = after[before == 1], after[before == 4]
        slope = (four.mean() - one.mean()) / 3
        assert one.std() < 1e-5 and 0.8 <= slope <= 1.2 and abs(one.mean() - slope) <= 0.4 + 1e-5


def rocks(b=8, h=32, w=64):
    """Targets of soil, grey 1; donors with a 9×9 rock, grey 50 on ground of grey 30, in the middle of the
    tile."""
    y, donor_y = torch.ones(b, h, w, dtype=torch.int8), torch.zeros(b, h, w, dtype=torch.int8)
    donor_y[:, h // 2 - 4 : h // 2 + 5, w // 2 - 4 : w // 2 + 5] = 4
    donor_x = torch.where(donor_y > 0, 50.0, 30.0)[:, None]
    return y.float()[:, None], y, donor_x, donor_y


def test_pasted_pixels_and_labels_move_together():
    """Inside the new labels the donor's pixels stand, also at the tile's border; two pixels outside nothing
    changed."""
    x, y, donor_x, donor_y = rocks(32)
    px, py = lib.paste_rare(x, y, donor_x, donor_y, gen(), 1.0)
    new = (py != y)[:, None].float()
    assert new.flatten(1).any(1).float().mean() > 0.5 and py.dtype == torch.int8
    grown = torch.nn.functional.max_pool2d(new, 3, 1, 1)
    torch.testing.assert_close(px[grown == 0], x[grown == 0], atol=0, rtol=0)
    core = 1 - torch.nn.functional.max_pool2d(1 - new, 5, 1, 2) > 0  # two pixels from what was not pasted
    assert core.sum() > 100
    assert px[core].min() >= 40  # where the tile cuts the rock its own soft edge may show, the ground's 1 not
    core[..., [0, -1], :] = core[..., [0, -1]] = False
    torch.testing.assert_close(px[core], torch.full_like(px[core], 50.0), atol=1e-3, rtol=0)


def test_pasted_labels_are_the_donors():
    """Labels that change change to a label of the donor; all others stay, unlabelled pixels included."""
    x, y, donor_x, donor_y = rocks(32)
    y[:, ::2] = 0
    donor_y[16:][donor_y[16:] > 0] = 3
    _, py = lib.paste_rare(x, y, donor_x, donor_y, gen(), 1.0)
    assert set(py[:16][py[:16] != y[:16]].tolist()) == {4} and set(py[16:][py[16:] != y[16:]].tolist()) == {3}


def test_only_marked_pixels_are_pasted():
    """A donor without marked labels gives nothing, whatever its pixels are."""
    x, y, donor_x, donor_y = rocks()
    px, py = lib.paste_rare(x, y, donor_x, torch.zeros_like(donor_y), gen(), 1.0)
    assert torch.equal(px, x) and torch.equal(py, y)


def test_nothing_on_unlabelled_images():
    """Images without any label, sky or rover, get no rock; the labelled ones beside them do."""
    x, y, donor_x, donor_y = rocks(32)
    y[::2] = 0
    px, py = lib.paste_rare(x, y, donor_x, donor_y, gen(), 1.0)
    assert torch.equal(px[::2], x[::2]) and torch.equal(py[::2], y[::2])
    assert (py[1::2] == 4).any()


def test_paste_scales_by_no_more_than_it_says():
    """A 9×9 rock comes in sizes of 0.7² to 1.4² its area, where it is not cut by the border."""
    x, y, donor_x, donor_y = rocks(64)
    _, py = lib.paste_rare(x, y, donor_x, donor_y, gen(), 1.0)
    whole = ~((py == 4)[:, [0, -1]].flatten(1).any(1) | (py == 4)[:, :, [0, -1]].flatten(1).any(1))
    area = (py == 4).flatten(1).sum(1)[whole & (py == 4).flatten(1).any(1)].float()
    assert len(area) > 20
    assert area.min() >= 0.6**2 * 81 and area.max() <= 1.5**2 * 81 and area.max() > 2 * area.min()


def test_arguments_stay_as_they_are():
    """No function writes into the batch it was given: views of the data set are passed in."""
    x, y, donor_x, donor_y = rocks()
    before = [t.clone() for t in (x, y, donor_x, donor_y)]
    lib.paste_rare(x, y, donor_x, donor_y, gen(), 1.0)
    lib.flip(x, y, -1, gen())
    lib.affine(x, y, gen(), 0.2, 0.2, 60.0)
    lib.jitter_light(x, gen(), 0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, donor_x, donor_y), strict=True))


def test_probability_0_changes_nothing():
    """p = 0: affine, light and paste return the batch as it was."""
    x, y, donor_x, donor_y = rocks()
    px, py = lib.paste_rare(x, y, donor_x, donor_y, gen(), 0.0)
    assert torch.equal(px, x) and torch.equal(py, y)
    assert torch.equal(lib.jitter_light(x, gen(), 0.5, 0.0), x)
    bx, by = batch()
    ax, ay = lib.affine(bx, by, gen(), 0.2, 0.2, 60.0, 0.0)
    torch.testing.assert_close(ax, bx, atol=1e-4, rtol=0)
    assert torch.equal(ay, by)


def everything(*key):
    """Return a batch after all augmentations with one generator."""
    x, y, donor_x, donor_y = rocks(16)
    g = gen(*key)
    x, y = lib.paste_rare(x, y, donor_x, donor_y, g, 0.5)
    x, y = lib.flip(x, y, -1, g)
    x, y = lib.affine(x, y, g, 0.2, 0.2, 60.0)
    return lib.jitter_light(x, g, 0.2), y


def test_same_key_same_batch():
    """The same (seed, stage, fold, epoch) gives the same batch, bit for bit, whatever torch drew in
    between."""
    torch.manual_seed(1)
    first = everything(0, 1, 2, 3)
    torch.manual_seed(2)
    second = everything(0, 1, 2, 3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], everything(0, 1, 2, 4)[0])


def test_different_keys_different_streams():
    """All 1,296 keys with entries 0 to 5 start elsewhere: seed 0 epoch 1 is not seed 1 epoch 0, as with seed
    + epoch."""
    keys = list(itertools.product(range(6), repeat=4))
    draws = {tuple(torch.rand(3, generator=gen(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
