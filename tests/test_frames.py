"""Frames, put back together from drawn tiles; how windows of them are seen, and predicted."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import lib
from lib import Frames, assemble_frames

STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # to the tile to the right, to the left, below, above


def draw_frame(rng, height, width):
    """Return a uint8 frame of pebbles, hills and noise, with a brightness of its own."""
    ground = np.zeros((height, width))
    for scale, contrast in ((1.0, 6), (3.0, rng.uniform(3, 14)), (25.0, 10)):
        noise = rng.standard_normal((height, width))
        ground += contrast * gaussian_filter(noise, scale) * scale * 2
    ground += rng.uniform(60, 160) + rng.uniform(-0.1, 0.1) * np.arange(height)[:, None]
    return np.clip(ground + rng.standard_normal((height, width)), 1, 255).astype(np.uint8)


def neighbours_of(place):
    """Return which tile lies to the right, left, below and above each, int (N, 4), -1: none."""
    tile_at = {tuple(position): tile for tile, position in enumerate(place.T.tolist())}
    found = np.full((place.shape[1], 4), -1)
    for tile, (frame, row, column) in enumerate(place.T.tolist()):
        for side, (down, right) in enumerate(STEPS):
            if frame >= 0:
                found[tile, side] = tile_at.get((frame, row + down, column + right), -1)
    return found


def cut_frames(count, rows, columns, height=32, width=64, seed=0):
    """Return shuffled tiles (N, height, width) of frames and their true neighbours (N, 4)."""
    rng = np.random.default_rng(seed)
    drawn = [draw_frame(rng, rows * height, columns * width) for _ in range(count)]
    grid = np.stack(drawn).reshape(count, rows, height, columns, width).swapaxes(2, 3)
    order = rng.permutation(count * rows * columns)
    place = np.indices((count, rows, columns)).reshape(3, -1)[:, order]
    return grid.reshape(-1, height, width)[order], neighbours_of(place)


def precision_recall(place, truth):
    found = neighbours_of(place)
    right = ((found == truth) & (truth >= 0)).sum()
    return right / (found >= 0).sum(), right / (truth >= 0).sum()


def assert_consistent(place):
    """Frames are numbered from 0 and begin at row and column 0; no two tiles are in one place."""
    placed = place[:, place[0] >= 0]
    assert place.dtype == np.int32 and (place[:, place[0] < 0] == [[-1], [0], [0]]).all()
    assert len(np.unique(placed, axis=1).T) == placed.shape[1]
    assert set(placed[0]) == set(range(placed[0].max(initial=-1) + 1))
    for frame in set(placed[0]):
        assert (placed[1:, placed[0] == frame].min(1) == 0).all()


def test_shuffled_frames_are_put_back():
    """Precision is at least 0.99, recall at least 0.9, on 12 drawn frames of 4 × 4 tiles; the same
    tiles give the same places."""
    tiles, truth = cut_frames(12, 4, 4)
    place = assemble_frames(tiles)
    assert_consistent(place)
    assert (assemble_frames(tiles) == place).all()
    precision, recall = precision_recall(place, truth)
    assert precision >= 0.99 and recall >= 0.9


def test_a_frame_is_not_joined_to_itself():
    """Of two pairs of the same tiles, side by side and one below the other, the likelier holds."""
    links = [[(15.0, 0, 1)], [(14.0, 0, 1)]]
    assert lib._grow_frames(2, links, [0.0, 0.0]) == [{(0, 0): 0, (0, 1): 1}]


def test_frames_with_half_their_tiles_missing():
    """With half the tiles gone precision is at least 0.95, recall of what is left at least 0.7."""
    tiles, truth = cut_frames(50, 4, 4, seed=1)
    kept = np.random.default_rng(0).permutation(len(tiles))[:len(tiles) // 2]
    number = np.full(len(tiles) + 1, -1)
    number[kept] = np.arange(len(kept))
    precision, recall = precision_recall(assemble_frames(tiles[kept]), number[truth[kept]])
    assert precision >= 0.95 and recall >= 0.7


def test_unrelated_tiles_stay_alone():
    """At most 1 % of 200 tiles of different frames get a neighbour."""
    tiles, _ = cut_frames(200, 1, 1, seed=2)
    assert (assemble_frames(tiles)[0] >= 0).mean() <= 0.01


@pytest.mark.fault(15, 18)
def test_black_flat_and_repeated_tiles_stay_alone():
    """None of them gets a neighbour, and at most one pair of 100 tiles of different frames is
    joined: a join need only be likelier than not."""
    tiles, _ = cut_frames(100, 1, 1, seed=3)
    black, white = np.zeros_like(tiles[:8]), np.full_like(tiles[:8], 255)
    frame = assemble_frames(np.concatenate([tiles, black, white, tiles[:1].repeat(8, 0)]))[0]
    assert (frame >= 0).sum() <= 2 and (frame[100:] < 0).all()


def test_bright_frame_edges_do_not_match():
    """Frames whose first and last rows are 1.5 times as bright are not put on one another."""
    rng = np.random.default_rng(4)
    frames = np.stack([draw_frame(rng, 64, 64) for _ in range(60)])
    frames[:, [0, -1]] = np.clip(frames[:, [0, -1]] * 1.5, 0, 255)
    found = neighbours_of(assemble_frames(frames.reshape(120, 32, 64)))
    assert (found[::2, 3] < 0).all() and (found[1::2, 2] < 0).all()


@pytest.mark.fault(12, 15, 19)
def test_few_flat_tiny_and_odd_tiles_are_no_error():
    """0 to 5 tiles, tiles of one value, and sizes such as 65×127; alone are those nothing can be
    fitted to: of one value, or under 16 pixels."""
    for count in range(6):
        assert_consistent(assemble_frames(cut_frames(6, 1, 1)[0][:count]))
    assert (assemble_frames(np.full((20, 32, 64), 200, np.uint8))[0] < 0).all()
    for size in ((65, 127), (17, 16), (8, 200)):
        place = assemble_frames(cut_frames(6, 2, 2, *size, seed=5)[0])
        assert_consistent(place)
        assert min(size) >= 16 or (place[0] < 0).all()


@pytest.mark.fault(41)
def test_frames_are_found_once_for_each_test_set(tmp_path, capsys):
    """They are kept, and used again, beside those of another test set; a damaged file is made
    again. Without one frame there is no place at all."""
    tiles, _ = cut_frames(3, 3, 3)
    args = tmp_path, torch.device("cpu"), lib.Ranks()
    one, other = (SimpleNamespace(images=tiles[:20], test_images=part)
                  for part in (tiles[20:], tiles[24:]))
    place = lib.find_frames(one, *args)
    assert (place == assemble_frames(tiles)).all() and "into 3 frames" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert lib.find_frames(other, *args).shape == (3, 23) and len(list(tmp_path.iterdir())) == 2
    lib.save_checkpoint(file, {"place": torch.from_numpy(place[:, ::-1].copy())})
    assert (lib.find_frames(one, *args) == place[:, ::-1]).all()
    file.write_bytes(file.read_bytes()[:-1])
    assert (lib.find_frames(one, *args) == place).all() and "damaged" in capsys.readouterr().out
    lone = SimpleNamespace(images=cut_frames(20, 1, 1)[0], test_images=tiles[:0])
    assert lib.find_frames(lone, *args) is None


# ------------------------------------------------------------------------------ Frames

CORNER = np.array([[0, 0, 0, -1], [0, 0, 1, 0], [0, 1, 0, 0]])  # three tiles, and one tile alone


def test_a_missing_tile_is_a_mirror_image_of_the_nearest():
    """Two rows of two, the last missing, in a ring: each cell shows the nearest tile, turned over
    once for each edge between them, and only the three tiles themselves are known."""
    frames = Frames.lay_out(CORNER, 4)
    assert frames.size.tolist() == [[2, 2], [1, 1]] and frames.tile_at.shape == (2, 4, 4)
    assert frames.known[0].nonzero().tolist() == [[1, 1], [1, 2], [2, 1]]
    seen = torch.stack([frames.tile_at, frames.upside_down, frames.left_right])[:, 0]
    # the missing one is as near to tile 1 above as to tile 2 beside it, and so is the ring's corner
    assert seen[:, 2, 2].tolist() in ([1, 1, 0], [2, 0, 1])
    assert seen[:, 3, 3].tolist() in ([1, 0, 1], [2, 1, 0])
    seen[:, [2, 3], [2, 3]] = 9
    tile_at, upside_down, left_right = seen.tolist()
    assert tile_at == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 9, 1], [2, 2, 2, 9]]
    assert upside_down == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 9, 1], [1, 1, 1, 9]]
    assert left_right == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 9, 1], [1, 0, 1, 9]]


def test_lone_tiles_are_frames_of_one():
    """A tile without neighbours, and each tile where nobody looked, has a frame of its own. The
    area counts rims and missing tiles: of 10 × 20 pixels, with a rim of 5, 30 × 50 and 20 × 30."""
    frames = Frames.lay_out(CORNER, 4)
    assert frames.place.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert (frames.tile_at[1, :3, :3] == 3).all() and frames.known[1].sum() == 1
    assert frames.area((10, 20), 5) == 2100 / 200 and frames.area((10, 20), 0) == 5
    frames = Frames.lay_out(None, 3)
    assert frames.place.tolist() == [[0, 1, 2], [0] * 3, [0] * 3]
    assert (frames.tile_at == torch.arange(3)[:, None, None]).all()


@pytest.fixture(scope="module")
def drawn():
    """Frames of 3 × 3 tiles without the middle one, of 1 × 2 and of one tile, shuffled, their
    tiles (11, 4, 6), and canvases by hand, the middle being a mirror image of what is beside it."""
    place = [(0, r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    place += [(1, 0, 0), (1, 0, 1), (-1, 0, 0)]
    place = np.array(place).T[:, np.random.default_rng(1).permutation(11)]
    tiles = np.random.default_rng(0).permutation(264).reshape(11, 4, 6)
    frames = Frames.lay_out(place, 11)
    at = dict(zip(map(tuple, place.T.tolist()), tiles, strict=True))
    grid = [[at.get((0, r, c)) for c in range(3)] for r in range(3)]
    nearest = tuple(frames.place[1:, frames.tile_at[0, 2, 2]].tolist())  # of four equally near
    mirror = {(0, 1): (-1, 1), (2, 1): (-1, 1), (1, 0): (1, -1), (1, 2): (1, -1)}[nearest]
    grid[1][1] = at[(0, *nearest)][::mirror[0], ::mirror[1]]
    return frames, tiles, [np.block(grid), np.block([at[1, 0, 0], at[1, 0, 1]]), at[-1, 0, 0]]


def test_windows_see_what_lies_there_and_mirrors_of_it(drawn):
    """Of windows on an edge, a corner, over the hole, and around whole frames: the pixels of the
    canvas padded symmetrically; "known" is what is neither outside nor in the hole."""
    frames, tiles, canvases = drawn
    windows = [(0, -4, -6), (0, 8, 12), (0, 2, 3), (0, 5, -3), (1, -3, 7), (2, -4, -6), (2, 0, 0)]
    seen, known = frames.pixels(*torch.tensor(windows).T, (8, 11), (4, 6))
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


def test_each_wanted_tile_is_predicted_once(drawn):
    """Batches hold every frame with a wanted tile once and no other, of one size each; cut out of
    their canvases, each tile comes once, with its own pixels."""
    frames, tiles, canvases = drawn
    lone = frames.place[0].numpy() == 2
    for wanted, asked in ((lone | ~lone, [0, 1, 2]), (~lone, [0, 1]), (lone & False, [])):
        batches = frames.batches(wanted, 1000)
        assert sorted(np.concatenate([[], *batches]).tolist()) == asked
        predicted = []
        for batch in batches:
            values = np.stack([np.stack([canvases[f], -canvases[f]]) for f in batch])
            index, parts = frames.split(batch, values)
            np.testing.assert_array_equal(parts, np.stack([tiles[index], -tiles[index]], 1))
            predicted += index.tolist()
        assert sorted(predicted) == np.flatnonzero(np.isin(frames.place[0], asked)).tolist()


def test_batches_are_of_one_size_and_no_larger_than_asked():
    """Of 30 frames of 2 × 2 tiles and 30 lone tiles, at most 10 tiles: 2 frames, or 10 tiles."""
    place = np.indices((30, 2, 2)).reshape(3, -1)
    place = np.concatenate([place, np.repeat([[-1], [0], [0]], 30, 1)], 1)
    batches = Frames.lay_out(place, 150).batches(np.ones(150, bool), 10)
    assert sorted(map(len, batches)) == [2] * 15 + [10] * 3
    assert sorted(np.concatenate(batches)) == list(range(60))
