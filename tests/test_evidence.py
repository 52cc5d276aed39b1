"""What the frames say: canvases, pooled evidence, and that no hidden label is heard."""
import json
import shutil

import ablation
import numpy as np
import pytest
import torch
from test_frames import cut_frames

import lib
import solve

PLACE = np.array([[0, 0, 0, -1], [0, 0, 1, 0], [0, 1, 0, 0]])  # a corner of three tiles, and one tile alone


def cells(*labels):
    """Return class shares (T, 5, 2, 4) of tiles, each of one label; all 0 for label 0."""
    shares = np.zeros((len(labels), 5, 2, 4), np.float32)
    for tile, label in zip(shares, labels, strict=True):
        tile[label] = label > 0
    return shares


def draw(seed=0, frames=4):
    """Return place and class shares of cells of `frames` frames of 2 × 3 tiles, each tile of one label."""
    rng = np.random.default_rng(seed)
    n = 6 * frames
    place = np.stack([np.repeat(np.arange(frames), 6), np.tile([0, 0, 0, 1, 1, 1], frames),
                      np.tile([0, 1, 2], 2 * frames)])
    return place, cells(*rng.integers(1, 5, n))


def test_canvas_puts_tiles_where_they_lie():
    """Row-major frames of equal extent, 0 where no tile is; a tile alone is on none."""
    tiles = np.arange(1, 5)[:, None, None, None] * np.ones((4, 1, 2, 3), np.int64)
    canvas = lib.frame_canvas(tiles, PLACE)
    assert canvas.shape == (1, 1, 2, 2, 2, 3)
    np.testing.assert_array_equal(canvas.reshape(4, 6)[:, ::3], [[1, 2], [1, 2], [3, 0], [3, 0]])


def test_pooling_counted_cell_by_cell():
    """Each cell gets exp(-distance / reach) of every cell of its frame, half as steep across."""
    values = np.random.default_rng(1).random((4, 2, 2, 4)).astype(np.float32)
    pooled = lib.pool_frames(values, PLACE, 3.0)
    expected = np.zeros_like(values)
    down, across = np.tanh(0.5 / 3), np.tanh(0.5 / 6)
    for t, o in ((t, o) for t in range(3) for o in range(3)):
        for y, x, v, u in np.ndindex(2, 4, 2, 4):
            dy = abs(2 * (PLACE[1, t] - PLACE[1, o]) + y - v)
            dx = abs(4 * (PLACE[2, t] - PLACE[2, o]) + x - u)
            expected[t, :, y, x] += down * across * np.exp(-dy / 3 - dx / 6) * values[o, :, v, u]
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-7)


def test_pooling_of_endless_ground_sums_to_one():
    """In the middle of a large frame of ones all cells weigh 1 together; at its edge, where half of the
    ground is missing, about a half."""
    place = np.stack([np.zeros(81, int), np.repeat(np.arange(9), 9), np.tile(np.arange(9), 9)])
    pooled = lib.pool_frames(np.ones((81, 1, 8, 16), np.float32), place, 2.0)
    np.testing.assert_allclose(pooled[40, 0], 1, atol=1e-4)
    np.testing.assert_allclose(pooled[4, 0, 0, 8], (1 + np.tanh(0.25)) / 2, atol=1e-4)  # its row, and below


RARE = np.arange(5) == 4


def test_evidence_counted_by_hand():
    """The labels that may be seen speak, a tile's own among them; nobody of a tile alone, of background,
    or of a rare class that is nowhere."""
    truth, seen = cells(2, 1, 1, 3), np.array([True, True, False, False])
    ratios = lib.frame_ratios(truth, seen, RARE, PLACE)
    assert ratios.shape == (4, 5, 2, 4) and ratios.dtype == np.float32
    pooled = lib.pool_frames(cells(2, 1, 0, 0), PLACE, lib.REACH)
    base = np.array([0, 0.5, 0.5, 0, 0])[:, None, None] + 1e-6  # of the labels seen: one tile each
    expected = np.log((pooled + 0.02 * base) / ((pooled.sum(1, keepdims=True) + 0.02) * base))
    np.testing.assert_allclose(ratios[:, 1:4], expected[:, 1:4], rtol=1e-4, atol=1e-4)
    assert (ratios[0, 2] > 0.02).all() and (ratios[1, 1] > 0.02).all()  # each tile's own label
    assert (ratios[2, 2] > 0.02).all() and (ratios[2, 1] < 0).all()  # hidden: of what lies above alone
    assert (ratios[:, 0] == 0).all() and (ratios[:, RARE] <= 0).all()
    np.testing.assert_allclose(ratios[3], 0, atol=1e-3)


def test_a_rock_is_heard_of_across_the_border_only():
    """A neighbour to the right that is all rock makes rock likelier in the cells at that border by pooling
    within RARE_REACH, counted cell by cell, and less so in each cell further away."""
    seen = np.array([False, True, True, False])
    ratios = lib.frame_ratios(cells(1, 4, 1, 1), seen, RARE, PLACE)[0, 4]
    near = lib.pool_frames(cells(0, 4, 1, 0), PLACE, lib.RARE_REACH)[0]
    expected = np.log((near[4] + 0.02 / 2) / ((near.sum(0) + 0.02) / 2))
    np.testing.assert_allclose(ratios, expected, atol=1e-3)
    assert (ratios[:, -1] > 0.2).all() and (np.diff(ratios[0]) > 0.1).all()


def test_hidden_labels_are_not_heard():
    """Whatever the hidden labels are, no evidence changes: the fold that is scored stays unseen."""
    place, truth = draw()
    seen = np.arange(len(truth)) % 5 > 0
    other = truth.copy()
    other[~seen] = np.roll(other[~seen], 1, 1)
    before = lib.frame_ratios(truth, seen, RARE, place)
    np.testing.assert_array_equal(before, lib.frame_ratios(other, seen, RARE, place))
    shown = lib.frame_ratios(truth, seen | True, RARE, place)
    assert not np.array_equal(before, shown)  # known labels do speak
    assert not np.array_equal(shown, lib.frame_ratios(other, seen | True, RARE, place))


def test_each_fold_hears_the_labels_of_the_others():
    """frame_evidence tells fold k what the labels of all other training tiles say: a label that changes is
    heard by every fold but its own, of test tiles too; pixels become cells of their shares."""
    place, n = draw()[0], 18  # the last frame's six tiles are test tiles; two of its places are the others'
    place[:, -2:], place[:, :2] = place[:, :2].copy(), place[:, -2:].copy()
    masks = np.random.default_rng(1).integers(1, 4, (n, 1, 1)).repeat(16, 1).repeat(32, 2).astype(np.uint8)
    fold_of = np.arange(n) % 3
    heard = lib.frame_evidence(masks, fold_of, place)
    assert heard.shape == (3, 24, 5, 2, 4)
    truth = cells(*masks[:, 0, 0], *[0] * 6)
    for fold in range(3):
        seen = np.append(fold_of != fold, np.zeros(6, bool))
        want = lib.frame_ratios(truth, seen, np.zeros(5, bool), place)
        np.testing.assert_allclose(heard[fold], want, atol=1e-5)
    changed = masks.copy()
    changed[3:12:3] = changed[3:12:3] % 3 + 1  # of fold 0, in the first two frames
    after = lib.frame_evidence(changed, fold_of, place)
    np.testing.assert_array_equal(after[0], heard[0])
    for fold in (1, 2):
        assert np.abs(after[fold] - heard[fold])[3:12].max() > 0.1  # of the tiles
        assert np.abs(after[fold] - heard[fold])[-2:].max() > 0.1   # of test tiles of the first frame


def test_evidence_is_believed_as_much_as_suits():
    """Sand 200 : 55 against soil. Where soil is true the evidence says so by 1.0, where it is not by 0.7:
    ln(200/55) = 1.29 is passed by 1.5 · 1.0 and not by 1.5 · 0.7; evidence of nothing is not believed."""
    probs, masks = np.zeros((2, 5, 8, 8), np.uint8), np.ones((2, 8, 8), np.uint8)
    probs[:, 3], probs[:, 1], masks[1] = 200, 55, 3
    evidence = np.zeros((2, 5, 1, 1), np.float32)
    evidence[:, 1, 0, 0] = 1.0, 0.7
    assert lib.fit_strength(probs, evidence, masks) == 1.5
    assert lib.fit_strength(probs, 0 * evidence, masks) == 0


@pytest.mark.parametrize("first_class", [0, 1])
def test_reweighing_counted_by_hand(first_class):
    """Probabilities times exp(strength · evidence), summing to 255 again; classes below the first stay 0."""
    probs = np.zeros((300, 5, 4, 4), np.uint8)
    probs[:, first_class], probs[:, first_class + 1] = 51, 204
    evidence = np.zeros((300, 5, 2, 2), np.float32)
    evidence[:, first_class] = np.log(2)
    out = lib.reweigh(probs, evidence, 2, first_class)  # 51 · 4 = 204
    assert out[:, :first_class].sum() == 0
    np.testing.assert_allclose(out[299, first_class:first_class + 2, 0, 0], [127, 127], atol=1)
    assert abs(int(out[0, :, 0, 0].sum()) - 255) <= 2


def test_kept_classes_counted_by_hand():
    """Of a kept class the old probability; the others, in their new proportions, make up the rest of 255."""
    before, after = np.zeros((300, 5, 1, 1), np.uint8), np.zeros((300, 5, 1, 1), np.uint8)
    before[:, 1:, 0, 0], after[:, 1:, 0, 0] = [55, 50, 50, 100], [40, 120, 40, 55]
    out = lib.keep_classes(before, after, RARE)
    assert (out[:, :, 0, 0] == [0, 31, 93, 31, 100]).all()
    np.testing.assert_array_equal(lib.keep_classes(before, after, ~RARE)[:, :4], before[:, :4])
    before[:, :, 0, 0] = [0, 0, 0, 128, 128]  # rounded up: nothing is left, and nothing wraps to 255
    assert (lib.keep_classes(before, after, np.arange(5) > 2)[:, :3] == 0).all()
    after[:, 1:4] = 0
    assert (lib.keep_classes(before, after, RARE)[:, 4] == 128).all()  # nobody to share, and no NaN


def test_cells_are_means_of_pixels():
    """8 × 8 pixels a cell; a side that 8 does not divide gets the nearest number of cells."""
    shares = np.random.default_rng(0).integers(0, 255, (3, 2, 16, 24)).astype(np.uint8)
    expected = shares.reshape(3, 2, 2, 8, 3, 8).mean((3, 5))
    np.testing.assert_allclose(lib.to_cells(shares), expected, rtol=1e-5)
    assert lib.to_cells(np.ones((2, 1, 65, 3), np.uint8)).shape == (2, 1, 8, 1)


# ------------------------------------------------------------------------------ a whole run

ARGS = ["--folds", "2", "--width", "4", "--epochs", "2", "--stages", "1", "--no-clean", "--max-hours", "1"]


@pytest.fixture(scope="module")
def frames_npz(tmp_path_factory):
    """14 drawn frames of 4 × 4 tiles, each frame of one class that no pixels tell; 60 % known."""
    tiles, neighbours = cut_frames(14, 4, 4, 16, 32, seed=7)
    label = np.zeros(len(tiles), np.uint8)
    for first in range(len(tiles)):
        if not label[first]:
            members, label[first] = [first], 1 + first % 3
            for tile in members:
                new = [o for o in neighbours[tile] if o >= 0 and not label[o]]
                label[new] = label[first]
                members += new
    masks = np.broadcast_to(label[:, None, None], tiles.shape)
    path, n = tmp_path_factory.mktemp("frames") / "frames.npz", 134
    train = np.stack([tiles[:n], masks[:n]], 1)
    np.savez(path, training_set=train, test_set=tiles[n:], test_labels=masks[n:])
    return path


@pytest.fixture(scope="module")
def runs(frames_npz, tmp_path_factory):
    """Metrics by name of two runs on them: as it comes, and without frames."""
    results = {}
    for name, flags in {"with": [], "without": ["--no-frames"]}.items():
        out = tmp_path_factory.mktemp(name) / "out"
        assert solve.main(["--data", str(frames_npz), "--out", str(out), *ARGS, *flags]) == 0
        results[name] = json.loads((out / "metrics.json").read_text()), out
    return results


def test_frames_raise_the_score_without_training(runs):
    """What no tile shows by itself its frame tells: far better out of fold and on the test set."""
    metrics, _ = runs["with"]
    assert metrics["submitted"] == "frames"
    assert metrics["frames_miou"] > metrics["stage1_miou"] + 0.2
    assert metrics["test_miou"] > runs["without"][0]["test_miou"] + 0.2


def test_the_second_stage_hears_the_frames(frames_npz, tmp_path, monkeypatch):
    """Its input holds the evidence: of a training tile what frames say while the labels of its fold are
    hidden, whatever they are; each fold asks of test tiles what they say to itself."""
    calls, inputs, real, find = [], [], solve.second_input, lib.frame_evidence
    monkeypatch.setattr(lib, "frame_evidence", lambda *args: calls.append((args, find(*args))) or calls[0][1])
    monkeypatch.setattr(solve, "second_input", lambda *args: inputs.append(real(*args)) or inputs[0])
    at = ARGS.index("--stages")
    argv = ["--data", str(frames_npz), "--out", str(tmp_path / "out"), *ARGS[:at], *ARGS[at + 2:]]
    assert solve.main(argv) == 0
    ((masks, fold_of, place, _), evidence), (data,) = *calls, inputs
    truth = cells(*masks[:, 0, 0], *[0] * (place.shape[1] - len(masks)))
    hidden = np.append(fold_of == 1, np.ones(place.shape[1] - len(masks), bool))
    heard = lib.frame_ratios(truth, ~hidden, lib.rare_classes(masks), place)
    np.testing.assert_allclose(evidence[1], heard, atol=1e-5)
    some = torch.from_numpy(np.flatnonzero(fold_of == 1)[:9])
    at = (data.window[0] - 16) // 2  # of the tile in its window; a cell of it has 8 × 8 pixels
    seen = data.windows(some, 1)[0][:, 6:, at:at + 16:8, at:at + 32:8]  # after image, mask, confidence
    np.testing.assert_allclose(3 * seen, evidence[1, some, 1:], atol=1e-5)
    tests = torch.arange(len(masks), len(fold_of) + 9)
    spots = data.frames.place[:, tests] * torch.tensor([[1], [16], [32]])
    pixels, _ = data.frames.pixels(*spots, (16, 32), (16, 32))
    for view in range(2):
        asked = data.look(pixels, torch.full((9, 1, 1), view), 1)[:, 6:, ::8, ::8]
        np.testing.assert_allclose(3 * asked, evidence[view, tests, 1:], atol=1e-5)
    weight = lib.load_checkpoint(tmp_path / "out" / "state" / "stage2_fold0.pt")["best"]["encoder.0.0.weight"]
    assert weight.shape[1] == (1 + 4 + 1 + 4) * 4  # image, mask, confidence, evidence, of 2 × 2 pixels


def test_frames_stay_if_the_second_stage_fails(frames_npz, tmp_path, monkeypatch, capsys):
    """Memory that runs out while stage 2 is scored costs stage 2 alone: the frames' evidence is submitted,
    and the status says that something is missing."""
    calls, real = [], lib.calibration

    def third_fails(*args):  # of stage 1, frames, stage 2
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no")
        return real(*args)

    monkeypatch.setattr(lib, "calibration", third_fails)
    at = ARGS.index("--stages")
    argv = ["--data", str(frames_npz), "--out", str(tmp_path / "out"), *ARGS[:at], *ARGS[at + 2:]]
    assert solve.main(argv) == 3
    printed = capsys.readouterr().out
    assert "submitted: frames" in printed and "degraded: MemoryError: no" in printed


def test_without_frames_nothing_breaks(runs):
    """--no-frames learns and submits the tiles as they are, with nothing around them."""
    metrics, out = runs["without"]
    assert metrics["submitted"] == "stage1" and "frames_miou" not in metrics
    assert metrics["around"] == 0 < runs["with"][0]["around"]
    assert lib.check_submission(out / "submission.csv", 90, 16 * 32).shape == (90, 512)


def test_frames_are_found_once(runs, frames_npz, tmp_path, monkeypatch):
    """A run that goes on keeps the frames it found; a damaged file only means to find them again."""
    out = shutil.copytree(runs["with"][1], tmp_path / "out")
    command = ["--data", str(frames_npz), "--out", str(out), *ARGS]
    whole, calls = (out / "submission.csv").read_bytes(), []
    find = lib.assemble_frames
    monkeypatch.setattr(lib, "assemble_frames", lambda *args: calls.append(args) or find(*args))
    assert solve.main(command) == 0 and not calls
    file = out / "state" / "frames.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert solve.main(command) == 0 and len(calls) == 1
    lib.save_checkpoint(file, {"of": "other tiles"})
    assert solve.main(command) == 0 and len(calls) == 2
    assert (out / "submission.csv").read_bytes() == whole


def test_ablation_needs_a_run_and_spares_it(runs, frames_npz, tmp_path, capsys):
    """Without a run it says so and begins none; --fresh, among "the same options", throws nothing away."""
    with pytest.raises(lib.UserError, match="holds no run"):
        ablation.main(["--data", str(frames_npz), "--out", str(tmp_path / "new"), *ARGS])
    assert not (tmp_path / "new").exists()
    out = shutil.copytree(runs["with"][1], tmp_path / "out")
    assert ablation.main(["--data", str(frames_npz), "--out", str(out), *ARGS, "--fresh"])
    assert (out / "state" / "stage1_fold0.pt").exists()


def test_report_shows_frames(runs):
    """The report has the pictures of the largest frames; without frames it has none."""
    page = (runs["with"][1] / "report.html").read_text()
    assert "Camera frames" in page and "known labels" in page
    assert "Camera frames" not in (runs["without"][1] / "report.html").read_text()


def test_random_places_give_nothing(runs, frames_npz):
    """The control, as tests/ablation.py runs it: with the tiles at random places the gain is gone."""
    out = runs["with"][1]
    cfg = ["--data", str(frames_npz), "--out", str(out), *ARGS]
    scores = ablation.main(cfg)
    assert scores["stage 1"] == runs["with"][0]["stage1_miou"]
    assert scores["with frames"] == runs["with"][0]["frames_miou"]
    for draw in range(3):  # two epochs teach less than to guess the commonest class: chance is a gain here
        assert scores[f"at random places, draw {draw}"] < scores["with frames"] - 0.3
