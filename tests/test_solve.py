"""The command: its flags, a whole run on tiny data, what a kill leaves, what a wrong start says."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tiny_arrays
from test_frames import cut_frames
from test_metric import keras_mean_iou

import lib
import solve

FAST = [
    "--folds",
    "2",
    "--width",
    "4",
    "--epochs",
    "2",
    "--rare-repeat",
    "8",  # so few images: steps come from showing them again
    "--lr",
    "0.02",
    "--ema-decay",
    "0.8",
    "--no-clean",
    "--device",
    "cpu",
    "--precision",
    "float32",
]
LONG = [*FAST[:4], "--epochs", "5", *FAST[6:]]


def start(argv):
    """Run main in this process; return its exit status and what it wrote to both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = solve.main([str(word) for word in argv])
    return status, out.getvalue(), err.getvalue()


def refused(argv, *expected):
    """Assert that argv ends with status 2 and one sentence that holds all of expected."""
    status, out, err = start(argv)
    assert (
        status == 2 and err.startswith("solve.py: ") and err.count("\n") == 1 and "Traceback" not in out + err
    )
    for part in expected:
        assert part in err


def write(folder, name="mars.npz", **changed):
    arrays = {k: v for k, v in {**tiny_arrays(), **changed}.items() if v is not None}
    np.savez(folder / name, **arrays)
    return folder / name


def strict_json(path):
    """Return what a JSON file holds; NaN and Infinity, which are no JSON, raise."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One whole run on the tiny data, two epochs: (folder of --out, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    status, out, err = start(["--data", write(folder), "--out", folder / "out", *FAST])
    assert status == 0, err
    return folder / "out", out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of five epochs a network that nobody disturbed: (data file, folder of --out)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = write(folder)
    status, _, err = start(["--data", data, "--out", folder / "out", *LONG])
    assert status == 0, err
    return data, folder / "out"


SAVE_EACH_EPOCH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import lib, solve
lib.SAVE_SECONDS = 0
sys.exit(solve.main(sys.argv[1:]))
"""


def stop_in_training(argv, out, sig, *files):
    """Start the command as a process of its own, send sig once these files of its state are there: (status,
    stderr)."""
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_EACH_EPOCH, *map(str, argv)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        limit = time.monotonic() + 300
        while not all((out / "state" / file).exists() for file in ("stage1_fold0.pt", *files)):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.002)
        child.send_signal(sig)
        err = child.communicate(timeout=120)[1]
    finally:
        child.kill()
        child.wait()
    assert not (out / "submission.csv").exists()  # it was in the middle
    return child.returncode, err


@pytest.fixture(scope="module")
def killed(tmp_path_factory, uninterrupted):
    """What kill -9 leaves of that run in the middle of training, after a checkpoint of each network: folder
    of --out."""
    out = tmp_path_factory.mktemp("killed") / "out"
    code, _ = stop_in_training(
        ["--data", uninterrupted[0], "--out", out, *LONG], out, signal.SIGKILL, "stage1_fold1.pt"
    )
    assert code == -signal.SIGKILL
    return out


# ------------------------------------------------------------------------------ flags


def test_no_flags_are_the_defaults(monkeypatch):
    """parse([]) is Config(): what the class says is what runs."""
    assert solve.parse([]) == solve.Config()


def test_every_flag_is_read():
    """--flag value, --flag=value and switches end in their fields with their types."""
    cfg = solve.parse(
        [
            "--data",
            "a b.npz",
            "--out=x",
            "--max-hours",
            "1.5",
            "--folds=3",
            "--no-clean",
            "--fresh",
            "--lr",
            "1e-3",
        ]
    )
    assert (cfg.data, cfg.out, cfg.max_hours, cfg.folds, cfg.clean, cfg.fresh, cfg.lr) == (
        "a b.npz",
        "x",
        1.5,
        3,
        False,
        True,
        1e-3,
    )


@pytest.mark.parametrize(
    "given,nearest",
    [
        ("--epoch", "--epochs"),
        ("--maxhours", "--max-hours"),
        ("--fold", "--folds"),
        ("--no-cleaning", "--no-clean"),
        ("--learning-rate", "--lr"),
        ("--batchsize=4", "--batch-size"),
        ("--ema-deca", "--ema-decay"),
    ],
)
def test_unknown_flag_names_the_nearest(given, nearest):
    """Fault 52: a mistyped or abbreviated flag is an error that names the right one."""
    if given == "--learning-rate":
        nearest = "--"  # nothing is near enough to promise which
    refused([given, "3"], given.split("=")[0], nearest, "--help")


@pytest.mark.parametrize(
    "argv,expected",
    [
        (["--folds", "-1"], "--folds"),
        (["--folds", "two"], "--folds"),
        (["--folds", "2.5"], "--folds"),
        (["--width", "-4"], "--width"),
        (["--epochs", "-1"], "--epochs"),
        (["--stages", "3"], "--stages"),
        (["--stages", "0"], "--stages"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr", "0"], "--lr"),
        (["--lr", "1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--gamma", "-1"], "--gamma"),
        (["--gamma", "inf"], "--gamma"),
        (["--rare-repeat", "0"], "--rare-repeat"),
        (["--paste", "1.1"], "--paste"),
        (["--patience", "0"], "--patience"),
        (["--ema-decay", "1"], "--ema-decay"),
        (["--max-hours", "-1"], "--max-hours"),
        (["--max-hours", "nan"], "--max-hours"),
        (["--max-hours", "inf"], "--max-hours"),
        (["--seed", "-1"], "--seed"),
        (["--device", "tpu"], "--device"),
        (["--device", "cpux"], "--device"),
        (["--device", "cuda:x"], "--device"),
        (["--precision", "half"], "--precision"),
        (["--recipe", "papers"], "--recipe"),
        (["--lr"], "--lr"),
        (["--fresh=1"], "--fresh"),
        (["--folds", "100"], "one 15 % split"),  # sums of probabilities have 16 bits
        (["--group-frames"], "--group-frames"),  # tests/ablation.py
        (["--witnesses", "masks"], "--witnesses"),
        (["mars.npz"], "mars.npz"),
        (["-x"], "-x"),
    ],
)
def test_bad_value_is_one_sentence(argv, expected):
    """Values out of range or of the wrong type, and words that are no flag: status 2, one line that names
    it."""
    refused(argv, expected)


def test_paper_recipe_is_the_published_one():
    """--recipe paper is section 5 of the facts, value by value; the rest of the program is the same."""
    cfg = solve.parse(["--recipe", "paper"])
    want = dict(
        folds=1,
        lr=5e-4,
        batch_size=32,
        most_epochs=300,
        patience=25,
        gamma=3.0,
        alpha=0.25,
        level_weights=(0.2, 0.3, 0.5),
        geometric=(0.2, 0.2, 60.0),
        flip_vertical=True,
        first_class=0,
        refine="background",
        select="loss",
        ema_decay=0.0,
        tta=False,
        weight_decay=0.0,
        cooldown=0.0,
        small_share=0.0,
        rare_repeat=1,
        stages=2,
    )
    assert {k: getattr(cfg, k) for k in want} == want and cfg.light > 0


def test_flags_beat_the_recipe():
    """A flag given beside --recipe paper counts, wherever it stands."""
    for argv in (["--folds", "5", "--recipe", "paper"], ["--recipe", "paper", "--folds", "5"]):
        cfg = solve.parse(argv)
        assert cfg.folds == 5 and cfg.gamma == 3.0


@pytest.mark.parametrize("words", [
    "", "--recipe paper", "--recipe paper --gamma 0.0 --rare-repeat 8 --seed 3",
    "--no-clean --max-hours 0.5 --out a~b", "--no-frames --fresh --width 8"])
def test_the_command_printed_is_the_one_given(words):
    """What the report prints parses into the same choices, whatever the recipe."""
    cfg = solve.parse(words.split())
    printed = shlex.split(lib.to_command(cfg, solve.RECIPES[cfg.recipe]))
    assert printed[:2] == ["python", "solve.py"]
    assert solve.parse(printed[2:]) == cfg and sorted(printed[2:]) == sorted(words.split())


def test_config_is_frozen():
    """Nothing can change a choice in the middle of a run."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        solve.parse([]).folds = 3


def test_help_lists_every_flag_with_its_meaning(capsys, monkeypatch):
    """--help ends with status 0 and shows at most 25 flags, each with a text, in groups on one screen of 50
    lines."""
    monkeypatch.setenv("COLUMNS", "100")
    assert solve.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") <= 50
    for heading in ("input and output", "cleaning and frames", "engine", "size of the work", "training"):
        assert f"\n{heading}" in shown
    flags = [f for f in dataclasses.fields(solve.Config) if f.metadata]
    assert 10 < len(flags) <= 25
    for f in flags:
        assert f.name.replace("_", "-") in shown and f.metadata["help"]


# ------------------------------------------------------------------------------ a whole run


def test_outputs_exist(run):
    """submission.csv, its zip, the report and the metrics are there, and no temporary file is left."""
    out, _ = run
    names = {p.name for p in out.iterdir()}
    assert {"submission.csv", "submission.zip", "report.html", "metrics.json"} <= names
    assert not [p for p in out.rglob("*.tmp")]


def test_submission_is_valid_for_any_reader(run):
    """Pandas reads 6 rows, id 0 to 5, columns 0 to 2047, all labels 1 to 4: never a 0. The zip holds the same
    bytes."""
    out, _ = run
    frame = pd.read_csv(out / "submission.csv")
    assert list(frame.columns) == ["id", *map(str, range(32 * 64))] and frame["id"].tolist() == list(range(6))
    labels = frame.drop(columns="id").to_numpy()
    assert labels.min() >= 1 and labels.max() <= 4
    np.testing.assert_array_equal(lib.check_submission(out / "submission.csv", 6, 32 * 64), labels)
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.read("submission.csv") == (out / "submission.csv").read_bytes()


def test_last_lines_are_metrics_json(run):
    """The run ends in a block of `key: value` that holds what metrics.json holds (confusion matrices
    apart)."""
    out, printed = run
    metrics = strict_json(out / "metrics.json")
    lines = [line for line in printed.splitlines() if not line.startswith("written: ")]
    keys = [key for key in metrics if not key.endswith(("confusion", "reliability"))]
    block = dict(line.split(": ", 1) for line in lines[-len(keys) :])
    assert list(block) == keys
    for key in keys:
        value = metrics[key]
        if isinstance(value, float):
            assert float(block[key]) == pytest.approx(value, abs=6e-5)
        elif isinstance(value, list):
            shown = json.loads(block[key].replace("nan", "null").replace("None", "null"))
            np.testing.assert_allclose(np.array(shown, float), np.array(value, float), atol=6e-5)
        else:
            assert block[key] == str(value)


def test_written_files_are_listed(run):
    """Every file in --out has its line `written: path`, and only what exists has one."""
    out, printed = run
    listed = re.findall(r"^written: (.*)$", printed, re.M)
    assert sorted(listed) == sorted(str(p) for p in out.iterdir() if p.is_file())


def test_confusion_covers_every_training_pixel_once(run):
    """The pooled out-of-fold matrices' rows are the training masks' class counts, for both stages."""
    metrics = strict_json(run[0] / "metrics.json")
    counts = np.bincount(tiny_arrays()["training_set"][:, 1].ravel(), minlength=5)
    for stage in (1, 2):
        np.testing.assert_array_equal(np.sum(metrics[f"stage{stage}_confusion"], 1), counts)


def probabilities(out, stage, fold, images):
    """Return a saved stage-1 network's probabilities in 1/255, mean with the mirrored copy's, written
    plainly."""
    model = lib.UNet(1, 4, 4, 3, 2, context=True)
    model.load_state_dict(lib.load_checkpoint(out / "state" / f"stage{stage}_fold{fold}.pt")["best"])
    model.eval()
    train = tiny_arrays()["training_set"][:, 0]
    x = ((torch.from_numpy(images).float() - float(train.mean())) / float(train.std()))[:, None]
    with torch.inference_mode():
        probs = (model(x)[0].softmax(1) + model(x.flip(-1))[0].softmax(1).flip(-1)) / 2
    return (probs * 255).round().numpy()


def test_scores_are_out_of_fold(run):
    """Stage 1's scores come again from its saved networks, each asked about the images that it never saw, and
    no others; what a fold's rare classes are multiplied by was fitted to the other fold, and counts only
    where the score is better for it."""
    out, _ = run
    images, masks = tiny_arrays()["training_set"].swapaxes(0, 1)
    fold_of = lib.make_folds(images, masks, 2, 0)
    probs = np.zeros((len(masks), 5, *masks.shape[1:]), np.uint8)
    for fold in (0, 1):
        probs[fold_of == fold, 1:] = probabilities(out, 1, fold, images[fold_of == fold])
    tries = []
    for fitted in (False, True):
        pred = np.zeros_like(masks)
        for fold in (0, 1):
            mine = fold_of == fold
            rule = lib.fit_rule(probs[~mine], masks[~mine]) if fitted else lib.PLAIN
            pred[mine] = lib.clean_masks(lib.decide(probs[mine], rule, 1))
        tries.append(pred)
    pred = max(tries, key=lambda pred: keras_mean_iou(masks, pred, 5, 0))
    metrics = strict_json(out / "metrics.json")
    assert metrics["stage1_miou"] == pytest.approx(keras_mean_iou(masks, pred, 5, 0), abs=2e-3)
    assert metrics["stage1_paper_miou"] == pytest.approx(keras_mean_iou(masks, pred, 5, None), abs=2e-3)
    for fold in (0, 1):
        mine = fold_of == fold
        want = keras_mean_iou(masks[mine], pred[mine], 5, 0)
        assert metrics["stage1_fold_miou"][fold] == pytest.approx(want, abs=2e-3)


def test_test_labels_are_scored(run):
    """With test_labels in the file the submission's score is printed: the metric of submission.csv,
    recomputed."""
    out, _ = run
    pred = lib.check_submission(out / "submission.csv", 6, 32 * 64)
    want = keras_mean_iou(tiny_arrays()["test_labels"], pred, 5, 0)
    assert strict_json(out / "metrics.json")["test_miou"] == pytest.approx(want, abs=1e-9)


def test_one_stage_is_the_mean_over_folds(tmp_path):
    """--stages 1: the submission is what both networks' probabilities say together, recomputed from their
    files, and where big rock is what both answer by the rule of the report, cleaned."""
    status, _, err = start(["--data", write(tmp_path), "--out", tmp_path / "out", "--stages", "1", *FAST])
    assert status == 0, err
    assert not list((tmp_path / "out" / "state").glob("stage2*"))
    images = tiny_arrays()["test_set"]
    each = np.stack([probabilities(tmp_path / "out", 1, fold, images) for fold in (0, 1)])
    rule = strict_json(tmp_path / "out" / "metrics.json")["stage1_rule"]
    each = np.pad(each, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    rock = np.stack([lib.decide(probs, rule, 1) == 4 for probs in each]).all(0)
    want = np.where(rock, 4, each.sum(0)[:, :4].argmax(1)).astype(np.uint8)
    want = lib.clean_masks(want).reshape(6, -1)
    got = lib.check_submission(tmp_path / "out" / "submission.csv", 6, 32 * 64)
    assert (got == want).mean() > 0.998  # rounding of 1/255 may tip a pixel


def test_no_network_is_trained_or_started_on_its_own_fold(tmp_path, monkeypatch):
    """Both stages train on all images but the fold's, and stage 2's network k starts from the best weights
    of stage 1's network k: any other has seen fold k."""
    trained, parents, real = [], {}, solve.new_network

    def train(run, network, data, index, key, *rest, train=solve.train_one_epoch):
        if key[0]:  # 0: the plan's measurement
            trained.append(key)
            assert index.tolist() == np.flatnonzero(run.fold_of != key[1]).tolist()
        return train(run, network, data, index, key, *rest)

    def watched(run, stage, fold, channels=1, parent=None):
        parents[stage, fold] = parent and copy.deepcopy(parent.state_dict())
        return real(run, stage, fold, channels, parent)

    monkeypatch.setattr(solve, "train_one_epoch", train)
    monkeypatch.setattr(solve, "new_network", watched)
    assert start(["--data", write(tmp_path), "--out", tmp_path / "out", *FAST])[0] == 0
    assert {key[:2] for key in trained} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    for fold in (0, 1):
        best = lib.load_checkpoint(tmp_path / "out" / "state" / f"stage1_fold{fold}.pt")["best"]
        assert parents[1, fold] is None
        assert all(torch.equal(value, best[name]) for name, value in parents[2, fold].items())


def concluding(said, fold_of, **more):
    """A run whose last two tiles are of the test set, the others all soil, after a step in which each fold
    said this."""
    n = len(fold_of)
    data = SimpleNamespace(masks=np.ones((n, 4, 4), np.uint8), test_images=np.zeros((2, 4, 4), np.uint8))
    run = SimpleNamespace(cfg=solve.Config(), data=data, is_rare=np.arange(5) == 4, fold_of=np.array(fold_of),
                          helpers=lib.Workers([torch.device("cpu")], 2), metrics={}, steps=[], **more)
    solve.conclude(run, "step", said)
    return run


def test_sums_of_folds_do_not_overflow(monkeypatch):
    """Three folds of 200/255 are 600, with any NumPy: a byte would hold 88; and they are as sure as one."""
    real, sums = lib.elect, []
    monkeypatch.setattr(lib, "elect", lambda *args: sums.append(args[0]) or real(*args))
    (step,) = concluding(np.full((3, 5, 5, 4, 4), 200, np.uint8), [0, 1, 2]).steps
    assert sums[0].dtype == np.uint16 and sums[0].shape == (2, 5, 4, 4) and (sums[0] == 600).all()
    np.testing.assert_allclose(step.sure, [200 / 255] * 2)


def test_a_tile_is_scored_by_its_fold_and_a_test_tile_answered_by_all(capsys):
    """Two folds: of the training tiles, all soil, the right half of those that the own fold says are counted,
    whatever the other says; of the test tiles the mean decides, and a rock needs both."""
    said = np.zeros((2, 6, 5, 4, 4), np.uint8)
    said[0, [0, 1], 1] = said[1, 2, 1] = said[1, 3, 2] = 250  # the own folds: soil thrice, bedrock once
    said[1, [0, 1], 3] = said[0, [2, 3], 3] = 255             # the others: sand
    said[0, 4, 2], said[1, 4, 3], said[1, 4, 2] = 100, 150, 60  # of the mean 160 are bedrock, 150 sand
    said[0, 5, 4], said[1, 5, 4], said[0, 5, 1], said[1, 5, 1] = 255, 20, 0, 235  # one rock, one soil
    run = concluding(said, [0, 0, 1, 1])
    (step,) = run.steps
    assert step.name == "step" and (step.labels == np.array([1, 1, 1, 2])[:, None, None]).all()
    assert (step.confidence == 250).all()
    assert (step.tests == np.array([2, 1])[:, None, None]).all()
    np.testing.assert_allclose(step.sure, np.array([160, 275]) / 510)
    assert run.metrics["step_iou"][1:3] == [0.75, 0.0] and run.metrics["step_fold_miou"] == [1.0, 0.25]
    assert "step out of fold: 0.3750" in capsys.readouterr().out


def test_stage_2_leaves_rare_classes_as_they_were(run):
    """Of the rock, its only rare class, a second network says nothing, whatever it sees; what is answered
    holds stage 1's probability of rock, and the rest as stage 2 shares it out."""
    for fold in (0, 1):
        model = lib.UNet(6, 4, 4, 3, 2, context=True)
        model.load_state_dict(lib.load_checkpoint(run[0] / "state" / f"stage2_fold{fold}.pt")["best"])
        with torch.inference_mode():
            probs = model.eval()(torch.randn(8, 6, 32, 64))[0].softmax(1)
        assert probs[:, 3].max() < 1e-3 < probs[:, :3].amax((0, 2, 3)).min()
    probs = 255 * np.random.default_rng(0).dirichlet(np.ones(4), (2, 3, 2, 4, 4))  # stages, folds, two tiles
    probs = np.pad(probs, [(0, 0)] * 5 + [(1, 0)]).round().astype(np.uint8)
    first, second = probs.transpose(0, 1, 2, 5, 3, 4)
    fake = SimpleNamespace(cfg=solve.Config(), is_rare=np.arange(5) == 4,
                           helpers=lib.Workers([torch.device("cpu")], 2))
    kept = second.copy()
    solve.keep_first(fake, None, first, kept)
    np.testing.assert_array_equal(kept[:, :, 4], first[:, :, 4])
    share = (255.0 - first[:, :, 4:]) / second[:, :, 1:4].sum(2, keepdims=True)
    np.testing.assert_allclose(kept[:, :, 1:4], share * second[:, :, 1:4], atol=0.51)


def test_the_published_stage_2_fills_in_background_alone():
    """Where a fold's view of the cleaned mask was background its second answer counts, else its first."""
    cleaned = torch.tensor([[0, 3], [2, 0]], dtype=torch.uint8)[:, None, None]  # two folds, one tile of 1 × 2
    first, second = (np.full((2, 1, 5, 1, 2), value, np.uint8) for value in (10, 20))
    fake = SimpleNamespace(cfg=solve.parse(["--recipe", "paper"]),
                           helpers=lib.Workers([torch.device("cpu")], 2))
    solve.keep_first(fake, SimpleNamespace(cleaned=cleaned), first, second)
    assert (second == np.array([[20, 10], [10, 20]])[:, None, None, None]).all()


def test_a_second_stage_in_vain_is_dropped(tmp_path, run, monkeypatch):
    """Where stage 2 is worse out of fold the submission is stage 1's; the report still shows both."""
    real, steps = solve.conclude, []

    def worse(run, name, said):
        real(run, name, said)
        if name == "stage2":
            run.metrics["stage2_miou"] = -1.0
        steps[:] = run.steps

    monkeypatch.setattr(solve, "conclude", worse)
    out = shutil.copytree(run[0], tmp_path / "out")
    assert start(["--data", write(tmp_path), "--out", out, *FAST])[0] == 0
    assert strict_json(out / "metrics.json")["submitted"] == "stage1"
    assert [step.name for step in steps] == ["stage1", "stage2"]
    submitted = lib.check_submission(out / "submission.csv", 6, 32 * 64)
    np.testing.assert_array_equal(submitted, steps[0].tests.reshape(6, -1))
    assert not np.array_equal(steps[0].tests, steps[1].tests)
    assert "stage2" in (out / "report.html").read_text()


def test_it_learns(uninterrupted):
    """Five epochs on tiles that a threshold could tell apart: far above the 0.1 of one class everywhere."""
    metrics = strict_json(uninterrupted[1] / "metrics.json")
    assert metrics["stage1_miou"] > 0.4 and metrics["test_miou"] > 0.4


def test_report_needs_no_network(run):
    """report.html holds both stages and its pictures, and refers to nothing outside itself."""
    page = (run[0] / "report.html").read_text()
    assert "stage1" in page and "stage2" in page and "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_paper_recipe_runs(tmp_path):
    """--recipe paper: one split, background learnt and predicted, both metrics for both stages."""
    argv = ["--data", write(tmp_path), "--out", tmp_path / "out", "--recipe", "paper", *FAST[2:6], *FAST[12:]]
    status, _, err = start(argv)
    assert status == 0, err
    metrics = strict_json(tmp_path / "out" / "metrics.json")
    assert metrics["recipe"] == "paper" and metrics["folds"] == 1
    assert {f"stage{s}_{k}" for s in (1, 2) for k in ("miou", "paper_miou")} <= set(metrics)
    lib.check_submission(tmp_path / "out" / "submission.csv", 6, 32 * 64, 0)


def test_file_without_test_set(tmp_path):
    """Fault 10: it trains and is scored; no submission is written, and a line says so."""
    argv = ["--data", write(tmp_path, test_set=None, test_labels=None), "--out", tmp_path / "out", *FAST]
    status, out, err = start(argv)
    assert status == 0, err
    assert "no submission" in out
    assert not (tmp_path / "out" / "submission.csv").exists()
    assert strict_json(tmp_path / "out" / "metrics.json")["stage1_miou"] > 0


def test_odd_size_runs(tmp_path):
    """Fault 19: tiles of 33×65 go through both stages into a submission of 2,145 columns."""
    data = tmp_path / "odd.npz"
    np.savez(data, **tiny_arrays(8, 3, 33, 65))
    status, _, err = start(["--data", data, "--out", tmp_path / "out", *FAST])
    assert status == 0, err
    lib.check_submission(tmp_path / "out" / "submission.csv", 3, 33 * 65)


def test_absent_and_lonely_classes(tmp_path):
    """Fault 17: no sand at all, rock on one image only: every mean is a number, and metrics.json is JSON."""
    train = tiny_arrays()["training_set"].copy()
    train[:, 1][train[:, 1] >= 3] = 1
    train[3, 1, 20:26, 20:26] = 4
    status, out, err = start(
        ["--data", write(tmp_path, training_set=train), "--out", tmp_path / "out", *FAST]
    )
    assert status == 0, err
    assert "class 3 (Sand)" in out
    metrics = strict_json(tmp_path / "out" / "metrics.json")
    for stage in (1, 2):
        for key in ("miou", "paper_miou", "fold_std"):
            assert 0 <= metrics[f"stage{stage}_{key}"] <= 1
        assert all(0 <= v <= 1 for v in metrics[f"stage{stage}_fold_miou"])


def test_two_images_are_enough(tmp_path):
    """Fault 12: the smallest data set, below the batch and the default folds, gets its submission."""
    data = tmp_path / "two.npz"
    np.savez(data, **tiny_arrays(2, 1))
    status, _, err = start(["--data", data, "--out", tmp_path / "out", *FAST])
    assert status == 0, err
    lib.check_submission(tmp_path / "out" / "submission.csv", 1, 32 * 64)


def test_more_folds_than_images_is_refused(tmp_path):
    """Fault 12: --folds 99 on 24 images is a sentence that names both numbers."""
    refused(["--data", write(tmp_path), "--out", tmp_path / "out", "--folds", "99", *FAST[2:]], "99", "24")


def test_copies_that_leave_a_fold_empty_are_refused(tmp_path):
    """Fault 12: 24 copies of one image can't be split in two; the sentence says so instead of blaming the
    rate."""
    train = np.repeat(tiny_arrays()["training_set"][:1], 24, 0)
    status, _, err = start(["--data", write(tmp_path, training_set=train), "--out", tmp_path / "out", *FAST])
    assert status == 2 and err.count("\n") == 1 and "--lr" not in err


# ------------------------------------------------------------------------------ time


def test_no_time_still_gives_a_submission(tmp_path):
    """Fault 47: --max-hours 0 trains a moment and writes a checked submission without a 0 all the same."""
    argv = [
        "--data",
        write(tmp_path),
        "--out",
        tmp_path / "out",
        "--max-hours",
        "0",
        "--no-clean",
        "--width",
        "4",
    ]
    status, _, err = start(argv)
    assert status == 0, err
    lib.check_submission(tmp_path / "out" / "submission.csv", 6, 32 * 64)


def test_budget_over_at_resume(tmp_path, uninterrupted, killed):
    """Fault 47: a killed run that goes on with no time left ends at once with a submission of what it has."""
    shutil.copytree(killed, tmp_path / "out")
    status, _, err = start(["--data", uninterrupted[0], "--out", tmp_path / "out", *LONG, "--max-hours", "0"])
    assert status == 0, err
    lib.check_submission(tmp_path / "out" / "submission.csv", 6, 32 * 64)


# ------------------------------------------------------------------------------ going on, and refusing to


def same_as(whole, out):
    """Assert that two runs' submissions are the same bytes, and their metrics the same but for the
    minutes."""
    assert (out / "submission.csv").read_bytes() == (whole / "submission.csv").read_bytes()
    one, two = (strict_json(folder / "metrics.json") for folder in (out, whole))
    assert {k: v for k, v in one.items() if k != "minutes"} == {
        k: v for k, v in two.items() if k != "minutes"
    }


def test_killed_run_ends_in_the_same_bytes(tmp_path, uninterrupted, killed):
    """kill -9 in the middle of training, then the same command: everything is as in the run that nobody
    disturbed."""
    data, whole = uninterrupted
    shutil.copytree(killed, tmp_path / "out")
    status, out, err = start(["--data", data, "--out", tmp_path / "out", *LONG])
    assert status == 0, err
    assert "going on" in out and "damaged" not in out
    assert int(re.search(r"stage 1  epoch (\d+)/5", out)[1]) >= 2  # what was saved was not lost
    same_as(whole, tmp_path / "out")


@pytest.mark.parametrize("sig,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(tmp_path, uninterrupted, sig, status):
    """Fault 36: SIGTERM ends with 143 and Ctrl-C with 130, one sentence each, and the checkpoint can be
    loaded."""
    argv = ["--data", uninterrupted[0], "--out", tmp_path / "out", *LONG]
    code, err = stop_in_training(argv, tmp_path / "out", sig)
    assert code == status
    assert err.count("\n") == 1 and "the same command, without --fresh, goes on" in err
    assert lib.load_checkpoint(tmp_path / "out" / "state" / "stage1_fold0.pt")["history"]


def test_finished_run_goes_straight_to_the_prediction(run):
    """Fault 46: the same command once more trains nothing and leaves the same bytes."""
    out, _ = run
    before = (out / "submission.csv").read_bytes()
    status, printed, err = start(["--data", out.parent / "mars.npz", "--out", out, *FAST])
    assert status == 0, err
    assert "stage1 out of fold" in printed and not re.search(r"stage \d +epoch", printed)
    assert (out / "submission.csv").read_bytes() == before


def test_flipped_bit_in_a_checkpoint_is_survived(tmp_path, uninterrupted, killed):
    """Fault 41: a checkpoint is damaged; the run says so, trains that network again, and ends the same."""
    data, whole = uninterrupted
    shutil.copytree(killed, tmp_path / "out")
    file = tmp_path / "out" / "state" / "stage1_fold0.pt"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    status, out, err = start(["--data", data, "--out", tmp_path / "out", *LONG])
    assert status == 0, err
    assert "damaged" in out and "stage1_fold0.pt" in out and "stage 1  epoch 1/5" in out
    same_as(whole, tmp_path / "out")


def test_changed_code_is_said(run, tmp_path):
    """Fault 61: networks of another version of the code are used, and a line says so and names --fresh;
    without a change there is none."""
    out = shutil.copytree(run[0], tmp_path / "out")
    argv = ["--data", write(tmp_path), "--out", out, *FAST]
    assert "the code has changed" not in start(argv)[1]
    lib.write_json(out / "state" / "code.json", {"sha256": "another"})
    status, printed, _ = start(argv)
    assert status == 0 and re.search("the code has changed since.*--fresh", printed)


def test_the_plan_is_kept_on_resume(run, tmp_path, monkeypatch):
    """A run that goes on measures nothing: the plan that was made is the plan, however slow the machine is
    now."""
    out = shutil.copytree(run[0], tmp_path / "out")
    before = (out / "state" / "plan.json").read_text()
    monkeypatch.setattr(solve, "measure_speed", None)
    assert start(["--data", write(tmp_path), "--out", out, *FAST])[0] == 0
    assert (out / "state" / "plan.json").read_text() == before


def test_other_data_in_the_same_folder(tmp_path):
    """Fault 42: a run on other data in the same --out is refused, the field named; --fresh goes on; --out
    DIR2 too."""
    first, second = write(tmp_path), tmp_path / "other.npz"
    np.savez(second, **tiny_arrays(seed=5))
    fast = [*FAST, "--stages", "1", "--out", tmp_path / "out"]
    assert start(["--data", first, *fast])[0] == 0
    before = (tmp_path / "out" / "submission.csv").read_bytes()
    refused(["--data", second, *fast], "data_sha256", "--fresh", str(tmp_path / "out"))
    assert (tmp_path / "out" / "submission.csv").read_bytes() == before
    status, printed, err = start(["--data", second, *fast, "--fresh"])
    assert status == 0, err
    assert re.search(r"epoch 1/2", printed) and (tmp_path / "out" / "submission.csv").read_bytes() != before


@pytest.mark.parametrize(
    "change",
    [
        ["--width", "5"],
        ["--folds", "3"],
        ["--seed", "1"],
        ["--lr", "0.01"],
        ["--recipe", "paper"],
        ["--epochs", "3"],
    ],
)
def test_other_configuration_in_the_same_folder(run, change):
    """Fault 42: every flag that changes the answer is refused by name when --out holds another run."""
    out, _ = run
    expected = "" if change[0] == "--recipe" else change[0].strip("-")
    refused(
        ["--data", out.parent / "mars.npz", "--out", out, *FAST, *change], expected, "holds a run", "--fresh"
    )


def test_out_that_cannot_be_written(tmp_path):
    """Fault 39: --out below a file is one sentence."""
    (tmp_path / "file").write_text("mine")
    refused(
        ["--data", write(tmp_path), "--out", tmp_path / "file" / "out", *FAST], "--out", "cannot be written"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_fresh_leaves_other_files_alone(tmp_path):
    """--fresh throws away the run's own state, not a folder or file of the user's in --out."""
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "notes.txt").write_text("keep")
    status, _, err = start(
        ["--data", write(tmp_path), "--out", tmp_path / "out", "--fresh", "--stages", "1", *FAST]
    )
    assert status == 0, err
    assert (tmp_path / "out" / "mine" / "notes.txt").read_text() == "keep"


def test_signals_are_given_back():
    """After main the process has its own SIGTERM handler again: a notebook lives on."""
    before = signal.getsignal(signal.SIGTERM)
    refused(["--nonsense"])
    assert signal.getsignal(signal.SIGTERM) is before


WATCH = """
import os, sys
sys.path.insert(0, sys.argv[1])
out = os.path.realpath(sys.argv[2])
seen = []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        mode, flags = args[1] or "", args[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(os.path.realpath(os.fsdecode(args[0])))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
        seen.append(os.path.realpath(os.fsdecode(args[0])))
    elif event == "os.rename":
        seen.extend(os.path.realpath(os.fsdecode(a)) for a in args[:2])
    elif event in ("socket.__new__", "socket.connect", "socket.getaddrinfo", "socket.bind",
                   "subprocess.Popen", "os.system", "pickle.find_class"):
        seen.append(event + " " + repr(args)[:200])
sys.addaudithook(hook)
import solve
status = solve.main(sys.argv[3:])
allowed = (out + os.sep, "/dev/", os.environ["TORCHINDUCTOR_CACHE_DIR"])
bad = [s for s in seen if not (s == out or s.startswith(allowed))]
print("AUDIT", status, len(seen), bad)
"""


def test_nothing_is_written_outside_out(tmp_path):
    """Python's own audit of a whole run: no file outside --out is opened for writing, no socket is made, no
    other process started, no pickle loaded.

    (PyTorch itself makes one empty folder for compiled code, unless told where there is one.)
    """
    data = write(tmp_path)
    (tmp_path / "cwd").mkdir()
    before = {p: p.stat().st_mtime_ns for p in [*tmp_path.rglob("*"), *ROOT.glob("*"), *ROOT.glob("data/*")]}
    done = subprocess.run(
        [
            sys.executable,
            "-B",
            "-c",
            WATCH,
            ROOT,
            tmp_path / "out",
            "--data",
            data,
            "--out",
            tmp_path / "out",
            *FAST,
        ],
        cwd=tmp_path / "cwd",
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "TMPDIR": str(tmp_path / "cwd"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"),
        },
    )
    status, count, bad = re.search(r"AUDIT (\d+) (\d+) (.*)", done.stdout).groups()
    assert status == "0", done.stderr
    assert int(count) > 10 and bad == "[]"
    assert all(p.stat().st_mtime_ns == when for p, when in before.items() if p.is_file())
    assert list((tmp_path / "cwd").iterdir()) == []


def test_no_pickle_can_be_loaded():
    """In the source: torch.load with weights_only=True, no pickle.load, no np.load and no allow_pickle."""
    calls = {"load": [], "loads": []}
    for file in ("lib.py", "solve.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            name = getattr(getattr(node, "func", None), "attr", None)
            if name in calls:
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                calls[name].append((ast.unparse(node.func.value), keywords.get("weights_only")))
            assert getattr(node, "arg", None) != "allow_pickle"
    assert calls == {"load": [("torch", "True")] * 2, "loads": [("json", None)] * 3}


def opened(tmp_path, write_npz, tiny, *flags):
    """Return a run on tiny data, opened and planned."""
    argv = ["--data", write_npz(**tiny()), "--out", tmp_path / "out", *FAST, *flags]
    return solve.open_run(solve.parse(list(map(str, argv))))


def test_patches_are_pasted_in_the_first_stage_only(tmp_path, tiny, write_npz):
    """--paste 1 changes images of stage 1; stage 2's, which carry a prior, come as they are or mirrored."""
    run = opened(tmp_path, write_npz, tiny, "--paste", "1")
    run.cfg = dataclasses.replace(run.cfg, geometric=(), light=0.0)  # what else changes every image
    every = torch.arange(len(run.data.images))
    donors = every[run.tiles.holds_rare[every]]
    assert donors.tolist() == list(range(0, 24, 4))
    assert run.tiles.paste == 1.0  # no small images: so small they are themselves
    said, changed = np.full((2, 30, 5, 32, 64), 51, np.uint8), []
    for data in run.tiles, solve.second_input(run, said, None):
        gen = torch.Generator().manual_seed(0)
        x, y = solve.training_batch(run, data, 5, every, donors, gen)  # there is no fold 5
        plain, masks = data.windows(every, 1)
        same = [any(torch.equal(x[i, :1], image) and torch.equal(y[i], mask)
                    for image, mask in [(p, m), (p.flip(-1), m.flip(-1))])
                for i, (p, m) in enumerate(zip(plain[:, :1], masks, strict=True))]
        changed.append(len(same) - sum(same))
    assert changed[0] > len(every) // 2 and changed[1] == 0


def test_a_fold_is_asked_of_its_own_tiles_and_the_test_set(tmp_path, tiny, write_npz):
    """Of tiles alone: probabilities that make up 255 where a fold answers, 0 for the other fold's tiles."""
    run = opened(tmp_path, write_npz, tiny)
    models = [[solve.new_network(run, 1, fold).ema.model.eval()] for fold in (0, 1)]
    sums = solve.predict(run, models, run.tiles).astype(int).sum(2)
    for fold in (0, 1):
        asked = np.append(run.fold_of == fold, [True] * 6)
        assert (np.abs(sums[fold, asked] - 255) <= 2).all() and (sums[fold, ~asked] == 0).all()


def test_stage_1_begins_on_small_images(tmp_path, tiny, write_npz, monkeypatch):
    """Of three epochs of stage 1 the first two see tiles of half the side, rounded up, with pasted patches,
    the last one and stage 2 whole ones without; what the small ones learnt is never the best of a network
    that has seen whole ones."""
    seen, real = [], solve.train_one_epoch

    def watched(run, network, data, index, key, *rest):
        assert data.images.shape == data.targets.shape
        seen.append((*key, data.images.shape[1], data.paste))
        return real(run, network, data, index, key, *rest)

    monkeypatch.setattr(solve, "train_one_epoch", watched)
    argv = ["--data", write_npz(**tiny(h=65, w=127)), "--out", tmp_path / "out", *FAST, "--epochs", "3"]
    assert start(argv)[0] == 0
    for fold in (0, 1):
        for stage, want in ((1, [[33, 0.5], [33, 0.5], [65, 0]]), (2, [[65, 0]] * 3)):
            assert [rest for s, k, _, *rest in seen if (s, k) == (stage, fold)] == want
        assert lib.load_checkpoint(tmp_path / "out" / "state" / f"stage1_fold{fold}.pt")["best_epoch"] == 3


@pytest.mark.parametrize("slow, epochs", [(1.0, 20), (2.0, 15), (4.0, 12)])
def test_the_rate_has_fallen_when_the_time_is_up(write_npz, tiny, tmp_path, monkeypatch, slow, epochs):
    """Twenty epochs of two networks are planned for 34 s: whatever the whole images cost, and though one
    epoch takes 3 s, both networks come equally far, and the last epoch before the deadline has the last
    rate of a shorter schedule."""
    run, now = opened(tmp_path, write_npz, tiny, "--epochs", "20"), [0.0]
    run.cfg = dataclasses.replace(run.cfg, small_share=0.5)
    run.plan = dataclasses.replace(run.plan, epoch_seconds=((0.6, 1.0), (1.0, 1.0)), predict_seconds=0.0)
    run.clock = SimpleNamespace(used=lambda: now[0], save_now_and_then=lambda: None)

    def train(run, network, data, index, key):
        now[0] += 0.6 if key[2] <= 10 else 3.0 if key == (1, 0, 12) and slow == 1 else slow
        return 1.0

    def validate(run, network, *_):
        figure = float(len(network.history))
        return {"val_loss": 1.0, "score": 0.5, "confusion": [[1] * 5] * 5, "figure": figure}

    monkeypatch.setattr(solve, "train_one_epoch", train)
    monkeypatch.setattr(solve, "validate", validate)
    monkeypatch.setattr(solve.time, "monotonic", lambda: now[0])
    solve.train_stage(run, 1, run.tiles, 34.0)
    assert [len(history) for history in run.histories.values()] == [epochs] * 2 and now[0] <= 34.0
    for history in run.histories.values():
        assert history[-1]["lr"] == pytest.approx(run.cfg.lr / (run.cfg.cooldown * epochs))


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """A run of both stages on tiles that are put back together: (the Run, what each stage's networks said,
    what was printed, the tiles, their masks)."""
    images, _ = cut_frames(6, 3, 2, 64, 128)
    masks = (1 + (images > 110)).astype(np.uint8)
    folder, seen, real = tmp_path_factory.mktemp("framed"), [], solve.predict
    file = write(folder, training_set=np.stack([images[:24], masks[:24]], 1), test_set=images[24:],
                 test_labels=masks[24:])

    def watched(run, *rest):
        said = real(run, *rest)
        seen.extend((run, said.copy()))  # the frames' evidence is added in place
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "predict", watched)
        status, out, err = start(["--data", file, "--out", folder / "out", *FAST])
    assert status == 0, err
    return seen[0], seen[1::2], out, images, masks


def test_networks_see_around_their_tile(framed):
    """Where frames are found a run of all steps trains on windows larger than a tile, with the labels of the
    tiles there but for those of the fold held out; a tile is validated in the middle, on its own labels."""
    run, _, out, _, masks = framed
    metrics = strict_json(run.state.parent / "metrics.json")
    assert run.plan.around == metrics["around"] == 32 and "around 32" in out
    assert [step.name for step in run.steps] == ["stage1", "frames", "stage2"] and metrics["test_miou"] > 0.3
    assert (run.place[0] >= 0).mean() > 0.8  # else there is nothing to see
    mine, others = (torch.from_numpy(np.flatnonzero(run.fold_of == fold)) for fold in (0, 1))
    for held_out, seen in ((0, False), (5, True)):
        x, y = run.tiles.windows(others, 1, held_out, torch.Generator().manual_seed(0))
        assert x.shape == (len(others), 1, 96, 160) and y.shape == (len(others), 96, 160)
        assert ((y >= 0).sum((1, 2)) >= 64 * 128).all()  # the tile itself is always inside
        hidden = dataclasses.replace(run.tiles, targets=run.tiles.targets.clone())
        hidden.targets[mine] = 0
        assert (hidden.windows(others, 1, held_out, torch.Generator().manual_seed(0))[1] == 0).any() == seen
    y = run.tiles.windows(mine, 1)[1]
    assert torch.equal(y[:, 16:-16, 16:-16], torch.from_numpy(masks)[mine].char())
    assert ((y >= 0).sum((1, 2)) == 64 * 128).all()


def test_whole_frames_are_predicted(framed):
    """What network 0 says of a whole frame comes again from its file, its image padded by hand with eight
    mirrored pixels; tile by tile the answers would be others."""
    run, said, _, images, _ = framed
    frame = next(f for f in range(6) if (run.place[0] == f).sum() == 6)
    inside, model = np.flatnonzero(run.place[0] == frame), lib.UNet(1, 4, 4, 3, 2, context=True)
    model.load_state_dict(lib.load_checkpoint(run.state / "stage1_fold0.pt")["best"])
    image = np.zeros((192, 256), np.uint8)
    for tile in inside:
        y, x = run.place[1:, tile] * (64, 128)
        image[y:y + 64, x:x + 128] = images[tile]
    pixels = torch.from_numpy(np.pad(image, 8, "symmetric")).float()[None, None]
    x = (pixels - run.data.mean) / run.data.std
    with torch.inference_mode():
        probs = [model.eval()(one)[0].softmax(1) for one in (x, x.flip(-1))]
    want = 255 * (probs[0] + probs[1].flip(-1))[0, :, 8:-8, 8:-8].numpy() / 2
    for tile in inside:
        y, x = run.place[1:, tile] * (64, 128)
        got = said[0][0, tile].astype(float)
        np.testing.assert_allclose(got[1:], want[:, y:y + 64, x:x + 128], atol=1.01)
        assert (got[0] == 0).all()


def test_the_second_network_sees_the_view_of_its_fold(framed):
    """Channels of stage 2: the image, four classes of the cleaned mask and its confidence as the fold of the
    window's tile had them, on the whole window, and four of the frames' evidence. Only labels of that fold
    are learnt: of others the evidence has told."""
    run, said, *_ = framed
    heard = np.arange(2 * 36 * 5 * 8 * 16, dtype=np.float32).reshape(2, 36, 5, 8, 16)
    second = solve.second_input(run, said[0], heard)
    for fold in (0, 1):
        tile = int(np.flatnonzero(run.fold_of == fold)[0])
        x = second.windows(torch.tensor([tile]), 1)[0]
        assert x.shape == (1, 1 + 4 + 1 + 4, 96, 160) and (x[0, 1:5].sum(0) == 1).all()
        x = x[0, :, 16:-16, 16:-16].numpy()
        mask = lib.clean_masks(said[0][fold, tile, 1:].argmax(0)[None].astype(np.uint8) + 1)[0]
        np.testing.assert_array_equal(x[1:5].argmax(0) + 1, mask)
        np.testing.assert_allclose(x[5], said[0][fold, tile].max(0) / 255, rtol=1e-6)
        np.testing.assert_allclose(x[6:], heard[fold, tile, 1:].repeat(8, 1).repeat(8, 2) / 3, rtol=1e-6)
    own, other = (torch.from_numpy(np.flatnonzero(run.fold_of == fold)) for fold in (0, 1))
    marked = second.targets.clone()
    marked[other] = 0
    y = dataclasses.replace(second, targets=marked).windows(own, 1, 5, torch.Generator().manual_seed(0))[1]
    assert (y != 0).all() and ((y > 0).sum((1, 2)) > 64 * 128).any()


def test_tiles_alone_are_their_own_windows(tmp_path, tiny, write_npz):
    """Without frames there is nothing around a tile, and no rim: what is trained on is the tile."""
    run = opened(tmp_path, write_npz, tiny)
    assert run.plan.around == 0 and run.tiles.rim == 0 and run.tiles.window == (32, 64)


def test_one_split_has_no_labels_for_the_frames(tmp_path, framed):
    """--folds 1: no evidence of frames is asked for, and stage 2 sees none."""
    file = framed[0].data.path
    argv = ["--data", file, "--out", tmp_path / "out", *FAST, "--folds", "1", "--epochs", "1"]
    assert start(argv)[0] == 0
    metrics = strict_json(tmp_path / "out" / "metrics.json")
    assert "stage2_miou" in metrics and "frames_miou" not in metrics
    best = lib.load_checkpoint(tmp_path / "out" / "state" / "stage2_fold0.pt")["best"]
    assert best["encoder.0.0.weight"].shape[1] == (1 + 4 + 1) * 4  # of 2 × 2 pixels


def test_images_of_rare_classes_are_shown_again(tmp_path, tiny, write_npz, monkeypatch):
    """An epoch shows an image with a rare class rare_repeat times, others once, and the last batch is filled
    up with the first images; those with a rare class are the donors."""
    run = opened(tmp_path, write_npz, tiny)
    masks = torch.ones_like(run.tiles.targets)
    masks[3, 5, 5], masks[4, :9, 0], masks[7, 0, 0] = 4, 2, -1
    rare, shown = torch.isin(torch.arange(5), torch.tensor([2, 4])), []
    data = dataclasses.replace(run.tiles, targets=masks, is_rare=rare)
    real = solve.training_batch

    def batch(run, data, fold, tiles, donors, gen):
        shown.append(tiles.tolist())
        assert donors.tolist() == [3, 4] and fold == 0
        return real(run, data, fold, tiles, donors, gen)

    monkeypatch.setattr(solve, "training_batch", batch)
    network, every = solve.new_network(run, 1, 0), torch.arange(24)
    solve.train_one_epoch(run, network, data, every, (1, 0, 1))
    assert list(map(len, shown)) == [4] * 10
    order = np.concatenate(shown)
    counts = np.bincount(order[:22 + 2 * 8])
    assert counts[[3, 4]].tolist() == [8, 8] and (np.delete(counts, [3, 4]) == 1).all()
    assert order[38:].tolist() == order[:2].tolist()
