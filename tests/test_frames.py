"""What find_neighbours promises, on drawn frames."""
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import lib
from lib import assemble_frames, find_neighbours

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
    once, again = (find_neighbours(solved[0][:64]) for _ in range(2))
    assert (once[0] == again[0]).all() and (once[1] == again[1]).all()


def test_frames_with_half_their_tiles_missing():
    """With half the tiles gone, precision stays at least 0.95 and most links that are left are found."""
    tiles, truth = cut_frames(50, 4, 4, seed=1)
    kept = np.sort(np.random.default_rng(0).permutation(len(tiles))[:len(tiles) // 2])
    inverse = np.full(len(tiles) + 1, -1)
    inverse[kept] = np.arange(len(kept))
    truth = inverse[truth[kept]]
    found, _ = find_neighbours(tiles[kept])
    right = ((found == truth) & (truth >= 0)).sum()
    assert right / (found >= 0).sum() >= 0.95
    assert right / (truth >= 0).sum() >= 0.7


def test_unrelated_tiles_stay_alone():
    """At most 1 % of tiles of different frames get a neighbour."""
    tiles, _ = cut_frames(200, 1, 1, seed=2)
    assert (find_neighbours(tiles)[0] >= 0).any(1).mean() <= 0.01


def test_black_flat_and_repeated_tiles_do_not_link(solved):
    """Black tiles, saturated sky and copies of one tile get no neighbour among themselves."""
    tiles, _ = cut_frames(100, 1, 1, seed=3)
    odd = np.concatenate([np.zeros((8, 32, 64)), np.full((8, 32, 64), 255), np.repeat(tiles[:1], 8, 0)])
    found, _ = find_neighbours(np.concatenate([tiles, odd.astype(np.uint8)]))
    assert (found >= 0).any(1).mean() <= 0.01
    assert (found[100:] < 0).all()


def test_bright_frame_edges_do_not_glue_frames(solved):
    """Frames whose first and last rows are 1.5 times as bright are not stacked on one another."""
    rng = np.random.default_rng(4)
    frames = np.stack([draw_frame(rng, 64, 64) for _ in range(60)])
    frames[:, [0, -1]] = np.clip(frames[:, [0, -1]] * 1.5, 0, 255)
    found, _ = find_neighbours(frames.reshape(120, 32, 64))
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


def test_surroundings_are_the_pixels_around_a_tile():
    """On a frame cut by hand: pixels of all eight neighbours, mirrored ones beyond the frame and where a tile
    is missing; a tile of no frame is mirrored all around."""
    frame = np.random.default_rng(0).integers(0, 256, (3 * 16, 3 * 32), dtype=np.uint8)
    place = np.array([(0, r, c) for r in range(3) for c in range(3) if (r, c) != (1, 2)] + [(-1, 0, 0)]).T
    tiles = np.stack([frame[r * 16:r * 16 + 16, c * 32:c * 32 + 32] for _, r, c in place.T])
    larger = lib.surroundings(tiles, place, 4)
    assert larger.shape == (9, 24, 40) and larger.dtype == np.uint8
    middle = larger[4]  # row 1, column 1: all but the tile to its right are there
    np.testing.assert_array_equal(middle[:, :-4], frame[12:36, 28:64])
    np.testing.assert_array_equal(middle[4:-4, -4:], tiles[4][:, -2:-6:-1])
    np.testing.assert_array_equal(middle[:4, -4:], frame[12:16, 64:68])
    corner = larger[0]
    np.testing.assert_array_equal(corner[4:, 4:], frame[:20, :36])
    np.testing.assert_array_equal(corner[:4, 4:-4], tiles[0][4:0:-1])
    np.testing.assert_array_equal(larger[8], np.pad(tiles[8], 4, "reflect"))
