"""What assemble_frames promises, on drawn frames; and how frames are looked at, learnt from and predicted."""
import types

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import lib
import solve
from lib import assemble_frames

STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def draw_frame(rng, height, width):
    """A uint8 frame of pebbles, hills and noise, with a light of its own."""
    scales = ((1.0, 6), (3.0, rng.uniform(3, 14)), (25.0, 10))
    ground = sum(a * gaussian_filter(rng.standard_normal((height, width)), s) * s * 2 for s, a in scales)
    ground += rng.uniform(60, 160) + rng.uniform(-0.1, 0.1) * np.arange(height)[:, None]
    return np.clip(ground + rng.standard_normal((height, width)), 1, 255).astype(np.uint8)


def cut_frames(count, rows, columns, height=32, width=64, seed=0):
    """Shuffled tiles (N, height, width) of `count` frames and their true neighbours (N, 4)."""
    rng = np.random.default_rng(seed)
    tiles, truth = [], []
    for _ in range(count):
        frame, first = draw_frame(rng, rows * height, columns * width), len(tiles)
        for r in range(rows):
            for c in range(columns):
                tiles.append(frame[r * height:(r + 1) * height, c * width:(c + 1) * width])
                truth.append([first + (r + dr) * columns + c + dc
                              if 0 <= r + dr < rows and 0 <= c + dc < columns else -1 for dr, dc in STEPS])
    order = rng.permutation(len(tiles))
    truth, inverse = np.array(truth)[order], np.argsort(order)
    return np.stack(tiles)[order], np.where(truth >= 0, inverse[truth], -1)


@pytest.fixture(scope="module")
def solved():
    tiles, truth = cut_frames(12, 4, 4)
    return tiles, truth, *assemble_frames(tiles)


def assert_consistent(neighbours, place):
    """Every link stands in both tiles' rows and leads one step on, and no two tiles share a place."""
    for side in range(4):
        a = np.flatnonzero(neighbours[:, side] >= 0)
        assert (neighbours[neighbours[a, side], side ^ 1] == a).all()
    frame, row, column = place
    placed = (neighbours >= 0).any(1)
    assert ((frame >= 0) == placed).all()
    assert len(np.unique(place[:, placed], axis=1).T) == placed.sum()
    assert set(frame[placed]) == set(range(frame.max(initial=-1) + 1))
    for side, (dr, dc) in enumerate(STEPS):
        a = np.flatnonzero(neighbours[:, side] >= 0)
        b = neighbours[a, side]
        assert (frame[a] == frame[b]).all()
        assert (row[a] + dr == row[b]).all() and (column[a] + dc == column[b]).all()


def test_a_frame_is_not_joined_to_itself():
    """Two tiles side by side, and a link that says the second lies below the first as well: it is ignored."""
    unlisted = np.full((2, 2), -2.5)
    right, below = ((np.array([0]), np.array([1]), np.array([odds]), unlisted, 0.0) for odds in (12.0, 11.0))
    neighbours, _, place = lib._assemble(2, [right, below], (8, 8), 3.5)
    assert_consistent(neighbours, place)
    assert neighbours.tolist() == [[1, -1, -1, -1], [-1, 0, -1, -1]]


def test_shuffled_frames_are_put_back(solved):
    """Precision at least 0.99 at recall at least 0.9 on 12 drawn frames of 4 x 4 tiles."""
    _, truth, found, confidence, _ = solved
    right = ((found == truth) & (truth >= 0)).sum()
    assert right / (truth >= 0).sum() >= 0.9
    assert right / (found >= 0).sum() >= 0.99
    assert found.dtype == np.int32 and confidence.dtype == np.float32
    assert ((confidence > 0.5) == (found >= 0)).all() and confidence.max() <= 1


def test_links_are_symmetric_and_frames_do_not_overlap(solved):
    """Right of a is b exactly when left of b is a; one tile a cell."""
    assert_consistent(solved[2], solved[4])


def test_same_input_same_answer(solved):
    """A second run gives the same bytes."""
    once, again = (assemble_frames(solved[0][:64])[:2] for _ in range(2))
    assert (once[0] == again[0]).all() and (once[1] == again[1]).all()


def test_frames_with_half_their_tiles_missing():
    """With half the tiles gone, precision stays at least 0.95 and most links that are left are found."""
    tiles, truth = cut_frames(50, 4, 4, seed=1)
    kept = np.sort(np.random.default_rng(0).permutation(len(tiles))[:len(tiles) // 2])
    inverse = np.full(len(tiles) + 1, -1)
    inverse[kept] = np.arange(len(kept))
    truth = inverse[truth[kept]]
    found, *_ = assemble_frames(tiles[kept])
    right = ((found == truth) & (truth >= 0)).sum()
    assert right / (found >= 0).sum() >= 0.95
    assert right / (truth >= 0).sum() >= 0.7


def test_unrelated_tiles_stay_alone():
    """At most 1 % of tiles of different frames get a neighbour."""
    tiles, _ = cut_frames(200, 1, 1, seed=2)
    assert (assemble_frames(tiles)[0] >= 0).any(1).mean() <= 0.01


def test_black_flat_and_repeated_tiles_do_not_link(solved):
    """Black tiles, saturated sky and copies of one tile get no neighbour among themselves."""
    tiles, _ = cut_frames(100, 1, 1, seed=3)
    odd = np.concatenate([np.zeros((8, 32, 64)), np.full((8, 32, 64), 255), np.repeat(tiles[:1], 8, 0)])
    found, *_ = assemble_frames(np.concatenate([tiles, odd.astype(np.uint8)]))
    assert (found >= 0).any(1).mean() <= 0.01
    assert (found[100:] < 0).all()


def test_bright_frame_edges_do_not_glue_frames(solved):
    """Frames whose first and last rows are 1.5 times as bright are not stacked on one another."""
    rng = np.random.default_rng(4)
    frames = np.stack([draw_frame(rng, 64, 64) for _ in range(60)])
    frames[:, [0, -1]] = np.clip(frames[:, [0, -1]] * 1.5, 0, 255)
    found, *_ = assemble_frames(frames.reshape(120, 32, 64))
    assert (found[::2, 3] < 0).all() and (found[1::2, 2] < 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_tiles(count):
    """No tile, one tile and two tiles are no error."""
    found, confidence, place = assemble_frames(cut_frames(3, 1, 1)[0][:count])
    assert found.shape == confidence.shape == (count, 4)
    assert_consistent(found, place)


@pytest.mark.parametrize("size", [(65, 127), (17, 16), (8, 200)])
def test_odd_sizes(size):
    """Tiles of odd, tiny and lopsided size are no error; too small ones (under 16 pixels) stay alone."""
    tiles, truth = cut_frames(6, 2, 2, *size, seed=5)
    found, _, place = assemble_frames(tiles)
    assert_consistent(found, place)
    if min(size) < 16:
        assert (found < 0).all()


# ------------------------------------------------------------------------------ Frames

CORNER = np.array([[0, 0, 0, -1], [0, 0, 1, 0], [0, 1, 0, 0]])  # a corner of three tiles, and one tile alone


def test_a_missing_tile_is_a_mirror_image_of_the_one_above():
    """Two rows of two, the last missing, in a ring: each cell shows what the one next to it does, mirrored
    across the edge between them, and only the three tiles themselves lie where they are seen."""
    frames = lib.Frames.lay_out(CORNER, 4)
    assert frames.size.tolist() == [[2, 2], [1, 1]] and frames.source.shape == (2, 4, 4)
    assert frames.source[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 2, 1]]
    where = np.zeros((4, 4), bool)
    where[1, 1] = where[1, 2] = where[2, 1] = True
    np.testing.assert_array_equal(frames.known[0], where)
    # the missing one is tile 1 upside down; the ring goes on below it as tile 2 does, beside it as it does
    assert frames.upside_down[0].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0]]
    assert frames.left_right[0].int().tolist() == [[1, 0, 0, 1]] * 3 + [[1, 0, 1, 1]]


def test_lone_tiles_are_frames_of_one():
    """A tile that find_frames left alone, and each tile where nobody looked, has a frame of its own."""
    frames = lib.Frames.lay_out(CORNER, 4)
    assert frames.place.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert (frames.source[1, :3, :3] == 3).all() and frames.known[1].sum() == 1
    frames = lib.Frames.lay_out(None, 3)
    assert frames.place.tolist() == [[0, 1, 2], [0] * 3, [0] * 3] and frames.size.tolist() == [[1, 1]] * 3
    assert (frames.source == torch.arange(3)[:, None, None]).all()


@pytest.fixture(scope="module")
def drawn():
    """Frames of 3 × 3 tiles without the middle one, of 1 × 2 and of one tile, their tiles (11, 4, 6), and
    their canvases by hand, the middle being a mirror image of what is above."""
    place = [(0, r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    place += [(1, 0, 0), (1, 0, 1), (-1, 0, 0)]
    tiles = np.random.default_rng(0).permutation(264).astype(np.int64).reshape(11, 4, 6)
    order = np.random.default_rng(1).permutation(11)  # as find_frames: in no order
    place, tiles = np.array(place).T[:, order], tiles[order]
    at = dict(zip(map(tuple, place.T.tolist()), tiles, strict=True))
    grid = [[at.get((0, r, c)) for c in range(3)] for r in range(3)]
    grid[1][1] = grid[0][1][::-1]
    canvases = [np.block(grid), np.block([[at[1, 0, 0], at[1, 0, 1]]]), at[-1, 0, 0]]
    return lib.Frames.lay_out(place, 11), tiles, canvases


def test_windows_see_what_lies_there_and_mirrors_of_it(drawn):
    """Of windows on an edge, a corner, over the hole, and around whole frames: the pixels of the canvas
    padded symmetrically; "known" is what is neither outside nor in the hole."""
    frames, tiles, canvases = drawn
    windows = [(0, -4, -6), (0, 8, 12), (0, 2, 3), (0, 5, -3), (1, -3, 7), (2, -4, -6), (2, 0, 0)]
    frame, top, left = torch.tensor(windows).T
    seen, known = frames.pixels(frame, top, left, (8, 11), (4, 6))
    hole = np.ones((12, 18), bool)
    hole[4:8, 6:12] = False
    for (f, y, x), pixels, there in zip(windows, tiles.ravel()[seen], known, strict=True):
        part = slice(y + 4, y + 12), slice(x + 6, x + 17)
        want = np.pad(canvases[f], ((4, 4), (6, 6)), "symmetric")[part]
        lies = np.pad(hole if f == 0 else np.ones(canvases[f].shape, bool), ((4, 4), (6, 6)))[part]
        h, w = want.shape  # a window may be larger than a small frame and its ring
        np.testing.assert_array_equal(pixels[:h, :w], want)
        np.testing.assert_array_equal(there[:h, :w], lies)
        assert h * w > 24


@pytest.mark.parametrize("tiles_at_once", [1, 9, 1000])
def test_each_wanted_tile_is_answered_once(drawn, tiles_at_once):
    """Batches hold every frame with a wanted tile once and no other, of one size each; cut out of their
    canvases, each tile comes once, with its own pixels."""
    frames, tiles, canvases = drawn
    lone = frames.place[0].numpy() == 2
    for wanted, asked in ((np.ones(11, bool), [0, 1, 2]), (lone, [2]), (~lone, [0, 1]), (lone & False, [])):
        batches = frames.batches(wanted, tiles_at_once)
        assert sorted(np.concatenate([[], *batches]).tolist()) == asked
        answered = []
        for batch in batches:
            index, parts = frames.cut(batch, np.stack([np.stack([canvases[f], -canvases[f]]) for f in batch]))
            np.testing.assert_array_equal(parts, np.stack([tiles[index], -tiles[index]], 1))
            answered += index.tolist()
        assert sorted(answered) == np.flatnonzero(np.isin(frames.place[0], asked)).tolist()


def test_batches_are_of_one_size_and_no_larger_than_asked():
    """Of 30 frames of 2 × 2 tiles and 30 lone tiles, at most 10 tiles at once: 2 frames, or 10 tiles."""
    place = np.array([(f, r, c) for f in range(30) for r in range(2) for c in range(2)] + [(-1, 0, 0)] * 30).T
    batches = lib.Frames.lay_out(place, 150).batches(np.ones(150, bool), 10)
    assert sorted(map(len, batches)) == [2] * 15 + [10] * 3
    assert sorted(np.concatenate(batches)) == list(range(60))


# ------------------------------------------------------------------------------ windows

def stage_input(drawn, window, **more):
    """The drawn frames as a stage's input. The image is a pixel's number mod 256, the label its tile's fold
    plus 1; the tiles of fold -2 have none."""
    fold_of = torch.arange(11) % 3
    fold_of[9:] = -2
    number = torch.arange(264).reshape(11, 4, 6)
    targets = torch.where(fold_of < 0, -1, fold_of + 1).to(torch.int8)[:, None, None].repeat(1, 4, 6)
    return lib.StageInput(drawn[0], 0, window, (number % 256).byte(), 0.0, 1.0, targets, fold_of,
                          torch.arange(5) == 4, **more)


def find_tile(data, tile, x, y):
    """Assert that the whole tile is in the window x (h, w), in one place, and return its labels there."""
    (h, w), image = data.images.shape[1:], data.images[tile].float()
    at = [(i, j) for i in range(x.shape[0] - h + 1) for j in range(x.shape[1] - w + 1)
          if torch.equal(x[i:i + h, j:j + w], image)]
    assert len(at) == 1
    (i, j), = at
    return y[i:i + h, j:j + w], at[0]


def test_training_windows_hold_their_tile_and_no_label_held_out(drawn):
    """A window lies anywhere with the tile wholly inside, at every place in time; the labels are those of
    all tiles in it but of the held-out fold and of no test tile, and mirrored pixels have none."""
    data, gen, places = stage_input(drawn, (7, 10)), torch.Generator().manual_seed(0), set()
    tiles = torch.arange(11).repeat(60)
    x, y = data.windows(tiles, 1, 1, gen)
    assert x.shape == (660, 1, 7, 10) and y.shape == (660, 7, 10) and y.dtype == torch.int8
    for tile, image, labels in zip(tiles.tolist(), x[:, 0], y, strict=True):
        own, place = find_tile(data, tile, image, labels)
        assert (own == (data.fold_of[tile] + 1 if data.fold_of[tile] in (0, 2) else -1)).all()
        places.add(place)
    assert places == {(i, j) for i in range(4) for j in range(5)}
    assert set(y.unique().tolist()) == {-1, 1, 3}
    known = (y > 0) & (x[:, 0] >= 8)  # smaller numbers are on two tiles
    assert torch.equal(y[known].long(), data.fold_of[x[:, 0][known].long() // 24] + 1)
    assert (y[data.fold_of[tiles] == 0] == 3).any()  # neighbours' labels count
    numbers = [image[there].tolist() for image, there in zip(x[:, 0], known, strict=True)]
    assert all(len(set(seen)) == len(seen) for seen in numbers)  # a mirrored pixel's would count twice


def test_windows_of_a_second_stage_have_the_labels_of_one_fold(drawn):
    """With same_fold a window's labels are those of its tile's fold, in neighbours too; a test tile's has
    none."""
    data, gen = stage_input(drawn, (8, 12), same_fold=True), torch.Generator().manual_seed(0)
    tiles = torch.arange(11).repeat(60)
    _, y = data.windows(tiles, 1, -9, gen)
    for tile, fold in enumerate(data.fold_of.tolist()):
        assert set(y[tiles == tile].unique().tolist()) - {-1} == ({fold + 1} if fold >= 0 else set())
    counts = (y >= 0).sum((1, 2))[data.fold_of[tiles] >= 0]
    assert counts.min() == 24 < counts.max()  # its own pixels, and some of neighbours of the same fold


def test_validation_sees_around_a_tile_and_counts_its_labels_alone(drawn):
    """The tile is in the middle, what lies around it is seen, and only its own pixels have labels."""
    data = stage_input(drawn, (8, 12))
    x, y = data.windows(torch.arange(9), 1)
    for tile in range(9):
        own, place = find_tile(data, tile, x[tile, 0], y[tile])
        assert place == (2, 3) and (own == data.fold_of[tile] + 1).all()
    assert ((y >= 0).sum((1, 2)) == 24).all()


class Copy(torch.nn.Module):
    """Soil for white pixels, bedrock for black ones: its input, in the logits of four classes."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # its device is the model's

    def forward(self, x):
        return [torch.cat([x, -x, torch.full_like(x, -99), torch.full_like(x, -99)], 1)]


@pytest.mark.parametrize("rim", [0, 3])
def test_predicted_frames_give_each_tile_its_own_pixels(drawn, rim, monkeypatch):
    """A network that copies its input, asked for whole frames with a rim, says of each tile what is drawn on
    it; of each fold it is asked only of frames that hold its own tiles or test tiles."""
    monkeypatch.setattr(lib, "fused", lambda model: model)
    data = stage_input(drawn, (4, 6))
    data.rim, data.mean, data.std = rim, 127.5, 12.75
    data.fold_of = torch.tensor([0, 1, -2])[drawn[0].place[0]]
    run = types.SimpleNamespace(cfg=solve.Config(data=""), dtype=torch.float32,
                                workers=lib.Workers([torch.device("cpu")], 2))
    said = solve.predict(run, [[Copy()], [Copy()]], data)
    assert said.shape == (2, 11, 5, 4, 6) and said.dtype == np.uint8
    want = 255 * torch.sigmoid(2 * (data.images.float() - 127.5) / 12.75).numpy()
    for fold in range(2):
        asked = np.isin(drawn[0].place[0], (fold, 2))
        np.testing.assert_allclose(said[fold, asked, 1], want[asked], atol=0.51)
        np.testing.assert_allclose(said[fold, asked, 2], 255 - want[asked], atol=0.51)
        assert not said[fold, ~asked].any() and not said[:, :, [0, 3, 4]].any()
