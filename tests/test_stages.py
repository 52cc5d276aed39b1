"""What follows the training: both stages' answers, the frames' context, and all that is written."""
from __future__ import annotations

import dataclasses
import json
import re
import types

import kit
import numpy as np
import pytest
import torch

import lib
import solve


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A planned run on tiles without frames, nothing trained."""
    return kit.open_run(tmp_path_factory.mktemp("shared"))


def write(file, arrays):
    """Write arrays to an .npz and return its path."""
    np.savez(file, **arrays)
    return file


def files_of(folder):
    """Return name → bytes of a folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def go_on(folder, *flags):
    """Go on with the finished run in folder; return status, what was printed, and the metrics."""
    status, out, err = kit.run_main(folder / "mars.npz", folder / "out", *flags)
    metrics = folder / "out" / "metrics.json"
    return status, out + err, json.loads(metrics.read_text()) if metrics.exists() else None


# ------------------------------------------------------------------------------------- the answers


def concluding(shared, fold_of, probs):
    """Return a run on tiles of 8 × 8, labelled soil, then unlabelled test tiles, that has concluded
    each fold's probs (folds, T, C), the same in all pixels of a tile."""
    n = len(fold_of)
    data = dataclasses.replace(shared.data, masks=np.ones((n, 8, 8), np.uint8),
                               test_images=np.zeros((probs.shape[1] - n, 8, 8), np.uint8))
    tiles = types.SimpleNamespace(frames=lib.Frames.lay_out(None, probs.shape[1]))
    run = dataclasses.replace(shared, data=data, fold_of=np.array(fold_of), metrics={}, steps=[],
                              is_rare=np.arange(5) == 4, tiles=tiles)
    solve.conclude(run, "step", np.tile(probs[..., None, None], (8, 8)))
    return run


def test_a_tile_is_scored_by_its_fold_and_a_test_tile_answered_by_all(shared, capsys):
    """Two folds. Of training tiles the own fold counts, whatever the other says; of test tiles the
    mean, and a rare class only where that is .5 somewhere. Three of four soil tiles are right: IoU
    .75 and, of bedrock, 0: mean .375; by fold 1 and (.5 + 0) / 2."""
    probs = np.zeros((2, 7, 5), np.uint8)
    probs[0, [0, 1], 1] = probs[1, 2, 1] = probs[1, 3, 2] = 250
    probs[1, [0, 1], 3] = probs[0, [2, 3], 3] = 255              # the other folds
    probs[0, 4, 2], probs[1, 4, 3], probs[1, 4, 2] = 100, 150, 60  # means: bedrock 80, sand 75
    probs[:, 5, 4], probs[:, 5, 1] = [255, 20], [0, 115]           # rock 137.5, soil 57.5
    probs[:, 6, 4], probs[:, 6, 1] = [200, 20], [0, 115]           # rock 110, too few
    run = concluding(shared, [0, 0, 1, 1], probs)
    (step,) = run.steps
    assert step.name == "step" and step.labels[:, 0, 0].tolist() == [1, 1, 1, 2]
    assert (step.probs.max(1) == 250).all() and (step.labels == step.labels[:, :1, :1]).all()
    assert step.tests[:, 0, 0].tolist() == [2, 4, 1]
    assert step.test_probs[0, :, 0, 0].tolist() == [0, 0, 80, 75, 0]
    assert run.metrics["step_iou"][1:3] == [0.75, 0] and run.metrics["step_miou"] == 0.375
    assert run.metrics["step_fold_miou"] == [1, 0.25]
    assert "step out of fold: 0.3750" in capsys.readouterr().out


def test_one_split_scores_what_it_validates(shared):
    """Images that no network validated are background, unscored; no thresholds are fitted."""
    probs = np.full((1, 5, 5), 20, np.uint8)
    probs[0, :, 4] = 100
    run = concluding(shared, [0, -1, -1, -1], probs)
    assert run.steps[0].labels[:, 0, 0].tolist() == [4, 0, 0, 0]
    assert run.metrics["step_factors"] == [1] * 5 and run.steps[0].tests[0, 0, 0] == 4
    assert run.metrics["step_iou"][1] == 0 == run.metrics["step_miou"]


def test_saved_probabilities_are_those_of_the_networks(finished_stage1):
    """Out of fold each image's probabilities are those of the network that never saw it, the test
    set's the mean of all: asked of the networks by hand, with their mirrored copies."""
    saved, arrays = np.load(finished_stage1 / "out" / "probabilities.npz"), kit.tiny_arrays()
    images, masks = arrays["training_set"].swapaxes(0, 1)
    fold_of = lib.make_folds(images, masks, 2, 0)
    assert set(fold_of) == {0, 1}
    networks, wanted = lib.load_networks(finished_stage1 / "out"), []
    for net in "stage1_fold0", "stage1_fold1":
        x = torch.from_numpy((np.concatenate([images, arrays["test_set"]]) - images.mean())
                             / images.std()).float()[:, None]
        with torch.inference_mode():
            plain, mirrored = (networks[net](own)[0].softmax(1) for own in (x, x.flip(-1)))
        wanted.append(255 * (plain + mirrored.flip(-1)).numpy() / 2)
    own = np.where((fold_of == 0)[:, None, None, None], *(probs[:24] for probs in wanted))
    np.testing.assert_allclose(saved["out_of_fold"][:, 1:], own, atol=0.6)
    np.testing.assert_allclose(saved["test"][:, 1:], np.mean(wanted, 0)[24:], atol=1.1)
    assert not saved["out_of_fold"][:, 0].any() and not saved["test"][:, 0].any()


def test_the_last_lines_are_metrics_json(finished_copy):
    """A run ends in `key: value` lines of what metrics.json holds, and before them names each file
    that it has written; not to a terminal it never moves back."""
    status, out, metrics = go_on(finished_copy, "--save-probs")
    assert status == 0 and "\r" not in out and "\x1b" not in out
    keys = [key for key in metrics if not key.endswith("confusion")]
    lines = out.rstrip().splitlines()
    block = dict(line.split(": ", 1) for line in lines[-len(keys):])
    assert [*block] == keys and float(block["stage1_miou"]) == round(metrics["stage1_miou"], 4)
    listed = re.search(r"^written: (.*)$", out, re.M)[1].split()
    assert listed == sorted(str(p) for p in (finished_copy / "out").glob("*.*"))


LEARN = ("--no-clean", "--no-frames", "--epochs", "20", "--lr", "0.01", "--width", "8")


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Tiles that a threshold could tell apart are learnt, far above what one class everywhere
    scores, and without a warning."""
    file = write(tmp_path / "mars.npz", kit.tiny_arrays(48))
    status, out, _ = kit.run_main(file, tmp_path, *LEARN)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert status == 0 and "warning" not in out
    assert metrics["stage1_miou"] > 0.4 and metrics["test_miou"] > 0.4


@pytest.mark.slow
@pytest.mark.fault(59)
def test_labels_of_other_images_are_noticed(tmp_path):
    """Where the masks belong to other images a line says what the score usually means."""
    arrays = kit.tiny_arrays(48)
    order = np.random.default_rng(1).permutation(48)
    arrays["training_set"][:, 1] = arrays["training_set"][order, 1]
    _, out, _ = kit.run_main(write(tmp_path / "mars.npz", arrays), tmp_path, *LEARN)
    assert "are the labels those of these images" in out


# ------------------------------------------------------------------------------------- the context


PLACE = np.int32([[0] * 12 + [1] * 12 + [2] * 6, [*range(3)] * 10, np.arange(30) % 12 // 3])


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """A planned run on tiles in three frames, the last one of test tiles."""
    return kit.open_run(tmp_path_factory.mktemp("framed"), place=PLACE)


def test_the_context_is_added_to_every_tile(framed, capsys):
    """It multiplies all folds' probabilities by what the labels of a tile's frame say, with a
    weight fitted out of fold, is concluded as a step of its own, and is handed to stage 2."""
    run = dataclasses.replace(framed, metrics={}, steps=[])
    probs = np.random.default_rng(0).dirichlet(np.ones(4), (2, 30, 32, 64)).transpose(0, 1, 4, 2, 3)
    before = lib.to_bytes(np.pad(probs, [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)]))
    probs = before.copy()
    log_ratios = solve.add_context(run, probs)
    weight = float(re.search(r"context weight ([\d.]+)", capsys.readouterr().out)[1])
    assert log_ratios.shape == (2, 30, 5, 4, 8) and weight > 0
    assert [step.name for step in run.steps] == ["frames"] and "frames_miou" in run.metrics
    for fold in (0, 1):
        want = lib.apply_context(lib.from_bytes(before[fold]), log_ratios[fold], weight)
        np.testing.assert_array_equal(probs[fold], lib.to_bytes(want))


def test_without_frames_or_folds_there_is_no_context(shared, framed):
    """Tiles alone, and one split, whose training labels have no fold to be hidden from."""
    probs = np.full((2, 30, 5, 32, 64), 51, np.uint8)
    assert solve.add_context(shared, probs) is None
    assert solve.add_context(framed, probs[:1]) is None
    assert (probs == 51).all() and not shared.steps and not framed.steps


def test_a_run_in_frames_has_three_steps(tmp_path):
    """Stage 1, the context and stage 2, whose networks see an image, four classes, a confidence and
    four classes' context in blocks of 2 × 2 pixels; with --folds 1 the context is left out."""
    for folds, steps, channels in (("2", ["stage1", "frames", "stage2"], 40),
                                   ("1", ["stage1", "stage2"], 24)):
        folder = tmp_path / folds
        folder.mkdir()
        kit.open_run(folder, "--folds", folds, place=PLACE)
        status, out, metrics = go_on(folder, "--no-clean", "--folds", folds)
        assert status == 0, out
        assert [key[:-8] for key in metrics if key.endswith("_factors")] == steps
        network = lib.load_networks(folder / "out")["stage2_fold0"]
        assert network.encoder[0][0].weight.shape[1] == channels


# -------------------------------------------------------------------------------------- the stages


def test_the_second_network_sees_what_its_fold_predicted(shared):
    """Its channels: the image, four classes of the cleaned mask and its confidence as the fold of
    the tile had them, and the context; rare classes are not learnt again."""
    probs = np.random.default_rng(0).integers(0, 255, (2, 30, 5, 32, 64)).astype(np.uint8)
    probs[:, :, 0] = 0
    log_ratios = np.arange(2 * 30 * 5 * 4 * 8, dtype=np.float32).reshape(2, 30, 5, 4, 8)
    second = solve.second_input(shared, probs, log_ratios)
    for fold in (0, 1):
        tile = int(np.flatnonzero(shared.fold_of == fold)[0])
        x = second.windows(torch.tensor([tile]))[0][0].numpy()
        assert x.shape == (1 + 4 + 1 + 4, 32, 64) and (x[1:5].sum(0) == 1).all()
        np.testing.assert_allclose(x[0], (shared.data.images[tile] - second.mean) / second.std,
                                   rtol=1e-4, atol=1e-5)
        mask = lib.clean_masks(probs[fold, tile].argmax(0)[None].astype(np.uint8))[0]
        np.testing.assert_array_equal(x[1:5].argmax(0) + 1, mask)
        np.testing.assert_allclose(x[5], probs[fold, tile].max(0) / 255, rtol=1e-6)
        want = log_ratios[fold, tile, 1:].repeat(8, 1).repeat(8, 2) / 3
        np.testing.assert_allclose(x[6:], want, rtol=1e-6)
    assert shared.is_rare.tolist() == [False] * 4 + [True]
    masks = torch.from_numpy(shared.data.masks).char()
    assert torch.equal(second.targets[:24], torch.where(masks == 4, -1, masks))
    assert second.paste == 0


def test_the_second_network_goes_on_and_leaves_rare_classes_alone(shared):
    """It begins as the stage-1 network of its fold, of the same answer but for the rock, its only
    rare class, of which it says nothing, whatever it sees."""
    parent = solve.new_network(shared, 1, 1).model
    network = solve.new_network(shared, 2, 1, 6, parent).model
    x = torch.randn(8, 6, 32, 64)
    with torch.inference_mode():
        first = parent.eval()(x[:, :1])[0][:, :3].softmax(1)
        second = network.eval()(x)[0].softmax(1)
    torch.testing.assert_close(second[:, :3], first, atol=1e-4, rtol=1e-3)
    assert second[:, 3].max() < 1e-3


def test_stage_2_keeps_the_rare_classes(shared):
    """What is answered holds stage 1's probability of rock; stage 2 shares out the rest."""
    probs = 255 * np.random.default_rng(0).dirichlet(np.ones(4), (2, 3, 2, 4, 4))
    probs = np.pad(probs, [(0, 0)] * 5 + [(1, 0)]).round().astype(np.uint8)
    before, after = probs.transpose(0, 1, 2, 5, 3, 4)  # of 3 folds, 2 tiles
    kept = after.copy()
    solve.keep_first(shared, None, before, kept)
    np.testing.assert_allclose(kept[:, :, 4], before[:, :, 4], atol=1)
    share = (255.0 - before[:, :, 4:]) / after[:, :, 1:4].sum(2, keepdims=True)
    np.testing.assert_allclose(kept[:, :, 1:4], share * after[:, :, 1:4], atol=1.1)


def test_the_published_stage_2_fills_in_background_alone(shared):
    """It learns and answers only where its fold's cleaned mask said background, and sees of that
    mask a flag; its networks begin anew."""
    run = dataclasses.replace(shared, cfg=solve.parse(["--recipe", "paper"]))
    probs = np.zeros((2, 30, 5, 32, 64), np.uint8)
    probs[0, :, 0, :, :32] = probs[0, :, 2, :, 32:] = probs[1, :, 3] = 200
    second = solve.second_input(run, probs, None)
    tile = int(np.flatnonzero(run.fold_of == 0)[0])
    x, y = second.windows(torch.tensor([tile]))
    assert x.shape[1] == 2 and (x[0, 1, :, :32] == 0).all() and (x[0, 1, :, 32:] == -1).all()
    assert (y[0, :, :32] >= 0).all() and (y[0, :, 32:] == -1).all()
    before, after = (np.full((2, 30, 5, 32, 64), value, np.uint8) for value in (10, 20))
    solve.keep_first(run, second, before, after)
    assert (after[0, ..., :32] == 20).all() and (after[0, ..., 32:] == 10).all()
    assert (after[1] == 10).all()


@pytest.mark.parametrize("recipe, submitted", [("best", "stage1"), ("paper", "stage2")])
def test_a_second_stage_in_vain_is_dropped(tmp_path, monkeypatch, recipe, submitted):
    """Where stage 2 is worse out of fold the submission is stage 1's; as published it is the last
    one's all the same. The report shows both."""
    real, steps = solve.conclude, []

    def worse(run, name, probs):
        real(run, name, probs)
        if name == "stage2":
            run.metrics["stage2_miou"] = -1.0
            run.steps[1].tests = 1 + run.steps[0].tests % 4
        steps[:] = run.steps

    monkeypatch.setattr(solve, "conclude", worse)
    kit.open_run(tmp_path, "--recipe", recipe)
    status, out, metrics = go_on(tmp_path, "--no-clean", "--no-frames", "--recipe", recipe)
    assert status == 0 and metrics["submitted"] == submitted
    labels = lib.check_submission(tmp_path / "out" / "submission.csv", 6, 32 * 64, 0)
    np.testing.assert_array_equal(labels, steps[submitted == "stage2"].tests.reshape(6, -1))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "stage1" in page and "stage2" in page


@pytest.mark.fault(47)
def test_no_time_for_stage_2(finished_copy):
    """A run that goes on when 4/5 of stage 2's time are over leaves it out, unless it has begun."""
    state = finished_copy / "out" / "state"
    lib.save_checkpoint(state / "clock.pt", {"seconds": 3500.0})
    status, out, metrics = go_on(finished_copy)
    assert status == 0 and "stage2_miou" in metrics
    for file in state.glob("stage2*"):
        file.unlink()
    status, out, metrics = go_on(finished_copy)
    assert status == 0 and "no stage 2: the time is up" in out
    assert "stage2_miou" not in metrics and not [*state.glob("stage2*")]


def test_one_stage(tmp_path):
    """--stages 1 trains no second networks."""
    kit.open_run(tmp_path, "--stages", "1")
    status, out, metrics = go_on(tmp_path, "--no-clean", "--no-frames", "--stages", "1")
    assert not [*(tmp_path / "out" / "state").glob("stage2*")] and "stage2_miou" not in metrics
    assert status == 0 and "stage 2" not in out


# --------------------------------------------------------------------------------- another test set


def test_another_test_set(finished_copy):
    """--test writes the finished networks' submission of another file beside the first one; nothing
    else of the run is changed. Of the same images it is the same."""
    arrays, out = kit.tiny_arrays(), finished_copy / "out"
    shown = {"test_set": np.concatenate([arrays["test_set"], arrays["training_set"][:2, 0]]),
             "test_labels": np.concatenate([arrays["test_labels"], arrays["training_set"][:2, 1]])}
    np.savez(finished_copy / "other.npz", **shown)
    before, state = files_of(out), files_of(out / "state")
    status, printed, _ = go_on(finished_copy, "--test", str(finished_copy / "other.npz"))
    assert status == 0, printed
    labels = lib.check_submission(out / "submission_other.csv", 8, 32 * 64)
    first = lib.check_submission(out / "submission.csv", 6, 32 * 64)
    np.testing.assert_array_equal(labels[:6], first)
    score = json.loads((out / "metrics_other.json").read_text())["test_miou"]
    assert score == pytest.approx(kit.keras_mean_iou(shown["test_labels"].reshape(8, -1), labels))
    now, after = files_of(out), files_of(out / "state")
    assert now.keys() - before.keys() == {"submission_other.csv", "submission_other.zip",
                                          "metrics_other.json"}
    assert all(now[name] == content for name, content in before.items())
    assert all(after[name] == content for name, content in state.items() if name[:5] == "stage")


def test_another_test_set_needs_a_finished_run(tmp_path):
    """--test on a run whose networks are not trained is a sentence, and trains nothing."""
    kit.open_run(tmp_path)
    np.savez(tmp_path / "other.npz", test_set=kit.tiny_arrays()["test_set"])
    status, printed, metrics = go_on(tmp_path, "--no-clean", "--no-frames", "--test",
                                     str(tmp_path / "other.npz"))
    assert status == 2 and metrics is None
    assert re.search("--test: .*finish.* the run .*without --test", printed)
    assert not [*(tmp_path / "out").rglob("stage1*")]


# ---------------------------------------------------------------------------- a mistake in the code


@pytest.mark.fault(60)
@pytest.mark.parametrize("module, name, call", [
    (solve, "add_context", 1), (solve, "train_stage", 2), (lib, "predict_unseen", 2),
    (solve, "conclude", 2), (lib, "describe_test", 1), (lib, "write_report", 1),
    (np, "savez", 1)])
def test_a_mistake_after_stage_1_costs_only_what_it_spoils(finished_copy, finished_stage1,
                                                           monkeypatch, module, name, call):
    """A NameError in any part that follows: its traceback, "degraded" in metrics.json, status 3,
    and the submission of what there is: until stage 2 has ended, stage 1's. The same command, the
    mistake mended, ends well."""
    submission = finished_copy / "out" / "submission.csv"
    before = submission.read_bytes()
    best = json.loads((finished_copy / "out" / "metrics.json").read_text())["submitted"]
    if call == 2 or name == "add_context":
        best = "stage1"
        before = (finished_stage1 / "out" / "submission.csv").read_bytes()
    submission.unlink()
    error = NameError("name 'contxt' is not defined")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kit.failing(getattr(module, name), error, call))
        status, printed, metrics = go_on(finished_copy, "--save-probs")
    assert status == 3 and "Traceback (most recent call last)" in printed
    assert metrics["degraded"] == "NameError: name 'contxt' is not defined"
    assert metrics["submitted"] == best and f"degraded: {metrics['degraded']}" in printed
    assert submission.read_bytes() == before
    status, _, metrics = go_on(finished_copy)
    assert status == 0 and "degraded" not in metrics


def test_a_mistake_in_stage_1_is_raised_as_it_is(finished_copy, monkeypatch):
    """Before there is anything to submit a mistake in the code comes out with its traceback."""
    monkeypatch.setattr(solve, "conclude", kit.failing(solve.conclude, KeyError("wrong")))
    with pytest.raises(KeyError, match="wrong"):
        go_on(finished_copy)


# ------------------------------------------------------------------------------- the paper's recipe


def test_the_paper_recipe_is_the_published_one():
    """--recipe paper is section 5 of the facts, value by value; flags beside it count."""
    cfg = solve.parse(["--recipe", "paper"])
    want = dict(folds=1, lr=5e-4, batch_size=32, most_epochs=300, patience=25, gamma=3.0,
                alpha=0.25, level_weights=(0.2, 0.3, 0.5), geometric=(0.2, 0.2, 60.0), stages=2,
                flip_vertical=True, first_class=0, refine="background", monitor="loss",
                ema_decay=0.0, tta=False, weight_decay=0.0, cooldown=0.0, half_sized=0.0,
                oversample=1, shuffle=1, global_context=False, frames=False,
                thresholds=((1.0, 0.0),))
    assert {name: getattr(cfg, name) for name in want} == want and cfg.jitter > 0
    for argv in (["--folds", "5", "--recipe", "paper"], ["--recipe", "paper", "--folds", "5"]):
        assert (solve.parse(argv).folds, solve.parse(argv).gamma) == (5, 3.0)


def test_the_paper_recipe_runs(tmp_path):
    """One split, background learnt and predicted, both metrics for both stages."""
    kit.open_run(tmp_path, "--recipe", "paper", "--folds", "1")
    status, out, metrics = go_on(tmp_path, "--no-clean", "--no-frames", "--recipe", "paper",
                                 "--folds", "1")
    assert status == 0, out
    assert metrics["recipe"] == "paper" and metrics["folds"] == 1
    assert {f"stage{s}_{key}" for s in (1, 2) for key in ("miou", "paper_miou")} <= {*metrics}
    labels = lib.check_submission(tmp_path / "out" / "submission.csv", 6, 32 * 64, 0)
    assert metrics["test_shares"][0] == pytest.approx((labels == 0).mean(), abs=1e-5)
