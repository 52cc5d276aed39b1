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
import torch.nn.functional as F
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


def stop_in_training(argv, out, sig, *files):
    """Start the command as a process of its own, send sig once these files of its state are there: (status,
    stderr)."""
    child = subprocess.Popen(
        [sys.executable, ROOT / "solve.py", *map(str, argv)],
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
    """What kill -9 leaves of that run in the middle of training, after its second checkpoint: folder of
    --out."""
    out = tmp_path_factory.mktemp("killed") / "out"
    code, _ = stop_in_training(
        ["--data", uninterrupted[0], "--out", out, *LONG], out, signal.SIGKILL, "stage1_fold0.pt.prev"
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
        (["--witnesses", "masks,me"], "--witnesses"),
        (["--witnesses", ""], "--witnesses"),
        (["--lr"], "--lr"),
        (["--fresh=1"], "--fresh"),
        (["--folds", "100"], "one 15 % split"),  # sums of probabilities have 16 bits
        (["--group-frames", "--no-frames"], "--group-frames"),
        (["--group-frames", "--recipe", "paper"], "--group-frames"),
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
    """What the report and the torchrun line print parses into the same choices, whatever the recipe."""
    cfg = solve.parse(words.split())
    printed = lib.to_flags(cfg, solve.RECIPES[cfg.recipe])
    assert solve.parse(printed) == cfg and sorted(printed) == sorted(words.split())


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
    """In both stages fit trains on all images but its fold's, and stage 2's network k starts from the best
    weights of stage 1's network k: any other has seen fold k."""
    trained, parents, real = [], {}, solve.new_training

    def train(run, parts, view, targets, index, key, *rest, train=solve.train_one_epoch):
        if key[0]:  # 0: the plan's measurement
            trained.append(key)
            assert index.tolist() == np.flatnonzero(run.fold_of != key[1]).tolist()
        return train(run, parts, view, targets, index, key, *rest)

    def watched(run, stage, fold, channels=1, parent=None):
        parents[stage, fold] = parent and copy.deepcopy(parent.state_dict())
        return real(run, stage, fold, channels, parent)

    monkeypatch.setattr(solve, "train_one_epoch", train)
    monkeypatch.setattr(solve, "new_training", watched)
    assert start(["--data", write(tmp_path), "--out", tmp_path / "out", *FAST])[0] == 0
    assert {key[:2] for key in trained} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    for fold in (0, 1):
        best = lib.load_checkpoint(tmp_path / "out" / "state" / f"stage1_fold{fold}.pt")["best"]
        assert parents[1, fold] is None
        assert all(torch.equal(value, best[name]) for name, value in parents[2, fold].items())


def test_sums_of_folds_do_not_overflow(monkeypatch):
    """Three folds of 200/255 are 600, with any NumPy: a byte would hold 88."""
    said = np.full((2, 5, 4, 4), 200, np.uint8)
    monkeypatch.setattr(solve, "predict", lambda *_: said.copy())
    tiles = torch.zeros(2, 4, 4, dtype=torch.uint8)
    run = SimpleNamespace(
        test_images=tiles,
        ranks=lib.Ranks(),
        mine=range,
        cfg=solve.Config(),
        data=SimpleNamespace(masks=tiles),
    )
    sums, votes = solve.predict_test(run, [[[None]] * 3], None, lib.PLAIN, slice(0, 2))
    assert sums.dtype == np.uint16 and (sums == 600).all()
    assert (votes == (np.arange(5) == 1)[:, None, None] * 3).all()  # of equals the first


def test_stage_2_leaves_rare_classes_as_they_were(run, monkeypatch):
    """Of the rock, its only rare class, a second network says nothing, whatever it sees; on the test set the
    sums over folds hold stage 1's probability of rock, and the rest as stage 2 shares it out."""
    for fold in (0, 1):
        model = lib.UNet(6, 4, 4, 3, 2, context=True)
        model.load_state_dict(lib.load_checkpoint(run[0] / "state" / f"stage2_fold{fold}.pt")["best"])
        with torch.inference_mode():
            probs = model.eval()(torch.randn(8, 6, 32, 64))[0].softmax(1)
        assert probs[:, 3].max() < 1e-3 < probs[:, :3].amax((0, 2, 3)).min()
    probs = 255 * np.random.default_rng(0).dirichlet(np.ones(4), (2, 2, 4, 4))  # of two stages, two images
    first, second = np.pad(probs, [(0, 0)] * 4 + [(1, 0)]).round().astype(np.uint8).transpose(0, 1, 4, 2, 3)
    monkeypatch.setattr(solve, "predict", lambda run, models, *_: models[0])
    tiles, is_rare = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.arange(5) == 4
    fake = SimpleNamespace(
        test_images=tiles,
        ranks=lib.Ranks(),
        mine=range,
        cfg=solve.Config(),
        is_rare=is_rare,
        device=torch.device("cpu"),
        data=SimpleNamespace(masks=tiles),
    )
    sums, _ = solve.predict_test(fake, [[[first]] * 2, [[second]] * 2], None, lib.PLAIN, slice(0, 2))
    np.testing.assert_array_equal(sums[:, 4], 2 * first[:, 4].astype(int))
    share = (255.0 - first[:, 4:]) / second[:, 1:4].sum(1, keepdims=True)
    np.testing.assert_allclose(sums[:, 1:4], 2 * share * second[:, 1:4], atol=1.01)


def test_a_second_stage_in_vain_is_dropped(tmp_path, run, monkeypatch):
    """Where stage 2 is worse out of fold the submission is stage 1's, and nothing asks stage 2 of the test
    set; the report still shows both."""
    real, asked = solve.score, []

    def worse(run, *rest):
        real(run, *rest)
        run.metrics["stage2_miou"] = -1.0

    def watched(run, networks, *rest, predict=solve.predict_test):
        asked.append(len(networks))
        return predict(run, networks, *rest)

    monkeypatch.setattr(solve, "score", worse)
    monkeypatch.setattr(solve, "predict_test", watched)
    out = shutil.copytree(run[0], tmp_path / "out")
    assert start(["--data", write(tmp_path), "--out", out, *FAST])[0] == 0
    metrics = strict_json(out / "metrics.json")
    assert metrics["submitted"] == "stage1" and set(asked) == {1}
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
    assert int(re.search(r"stage 1 +fold 0 +epoch (\d+)/5", out)[1]) >= 3  # two epochs were not lost
    same_as(whole, tmp_path / "out")


@pytest.mark.parametrize("sig,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(tmp_path, uninterrupted, sig, status):
    """Fault 36: SIGTERM ends with 143 and Ctrl-C with 130, one sentence each, and the checkpoint can be
    loaded."""
    argv = ["--data", uninterrupted[0], "--out", tmp_path / "out", *LONG]
    code, err = stop_in_training(argv, tmp_path / "out", sig)
    assert code == status
    assert err.count("\n") == 1 and "the same command goes on" in err
    assert lib.load_checkpoint(tmp_path / "out" / "state" / "stage1_fold0.pt")["history"]


def test_finished_run_goes_straight_to_the_prediction(run):
    """Fault 46: the same command once more trains nothing and leaves the same bytes."""
    out, _ = run
    before = (out / "submission.csv").read_bytes()
    status, printed, err = start(["--data", out.parent / "mars.npz", "--out", out, *FAST])
    assert status == 0, err
    assert not re.search(r"stage \d +fold \d+ +epoch", printed)
    assert (out / "submission.csv").read_bytes() == before


def test_an_earlier_output_attached_on_kaggle_is_gone_on_with(tmp_path, uninterrupted, killed, monkeypatch):
    """A killed run's output below /kaggle/input, another one's beside it: a new --out takes over the one of
    the same data and options, trains no epoch of it again, and ends in the bytes of an uninterrupted run."""
    shutil.copytree(killed, tmp_path / "input" / "earlier" / "submission")
    other = tmp_path / "input" / "another" / "state"
    other.mkdir(parents=True)
    (other / "identity.json").write_text('{"seed": 9}')
    monkeypatch.setattr(lib, "KAGGLE_INPUT", tmp_path / "input")
    status, printed, err = start(["--data", uninterrupted[0], "--out", tmp_path / "out", *LONG])
    assert status == 0, err
    assert "taking over" in printed and "stage 1  fold 0  epoch 1/" not in printed
    same_as(uninterrupted[1], tmp_path / "out")


def test_flipped_bit_in_a_checkpoint_is_survived(tmp_path, uninterrupted, killed):
    """Fault 41: the newest checkpoint is damaged too; the run says so, goes on from the one before, and ends
    the same."""
    data, whole = uninterrupted
    shutil.copytree(killed, tmp_path / "out")
    file = tmp_path / "out" / "state" / "stage1_fold0.pt"
    if not file.exists():  # the kill came between the two renames
        os.replace(file.with_name(file.name + ".prev"), file)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    status, out, err = start(["--data", data, "--out", tmp_path / "out", *LONG])
    assert status == 0, err
    assert "damaged" in out and "stage1_fold0.pt" in out
    same_as(whole, tmp_path / "out")


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
    assert calls == {"load": [("torch", "True")], "loads": [("json", None)] * 3}


def test_patches_are_pasted_in_the_first_stage_only(tmp_path, tiny, write_npz):
    """--paste 1 changes images of stage 1; stage 2's, which carry a prior, come as they are or mirrored."""
    argv = ["--data", write_npz(**tiny()), "--out", tmp_path / "out", *FAST, "--paste", "1"]
    run = solve.open_run(solve.parse(list(map(str, argv))))
    run.cfg = dataclasses.replace(run.cfg, geometric=(), light=0.0)  # what else changes every image
    every = torch.arange(len(run.images))
    donors = every[(run.masks == 4).flatten(1).any(1)]
    probs = np.full((len(every), 5, *run.images.shape[1:]), 51, np.uint8)
    views = solve.View(run.images, paste=1.0), solve.second_view(run, run.images, probs, None)
    changed = []
    for view in views:
        gen = torch.Generator().manual_seed(0)
        x, y = solve.training_batch(run, view, run.masks, every, donors, gen)
        plain = solve.network_input(run, view, every)[:, :1]
        same = [
            any(torch.equal(x[i, :1], image) and torch.equal(y[i], mask) for image, mask in pair)
            for i, pair in enumerate(
                [(p, m), (p.flip(-1), m.flip(-1))] for p, m in zip(plain, run.masks, strict=True)
            )
        ]
        changed.append(len(same) - sum(same))
    assert changed[0] > len(every) // 2 and changed[1] == 0


def test_stage_1_begins_on_small_images(tmp_path, tiny, write_npz, monkeypatch):
    """Of three epochs of stage 1 the first two see tiles of half the side, rounded up, with pasted patches,
    the last one and stage 2 whole ones without; what the small ones learnt is never the best of a network
    that has seen whole ones."""
    seen, real = [], solve.train_one_epoch

    def watched(run, parts, view, targets, index, key, *rest):
        assert view.images.shape == targets.shape
        seen.append((*key, view.images.shape[1], view.paste))
        return real(run, parts, view, targets, index, key, *rest)

    monkeypatch.setattr(solve, "train_one_epoch", watched)
    argv = ["--data", write_npz(**tiny(h=65, w=127)), "--out", tmp_path / "out", *FAST, "--epochs", "3"]
    assert start(argv)[0] == 0
    for fold in (0, 1):
        for stage, want in ((1, [[33, 0.5], [33, 0.5], [65, 0]]), (2, [[65, 0]] * 3)):
            assert [rest for s, k, _, *rest in seen if (s, k) == (stage, fold)] == want
        assert lib.load_checkpoint(tmp_path / "out" / "state" / f"stage1_fold{fold}.pt")["best_epoch"] == 3


@pytest.mark.parametrize("slow, epochs", [(1.0, 20), (2.0, 17), (4.0, 13)])
def test_the_rate_has_fallen_when_the_time_is_up(write_npz, tiny, tmp_path, monkeypatch, slow, epochs):
    """Twenty epochs are planned for 20 s: whatever the whole images cost, and though one epoch takes 3 s, the
    last one before the deadline has the last rate of a shorter schedule."""
    argv = ["--data", write_npz(**tiny()), "--out", tmp_path / "out", *FAST, "--epochs", "20"]
    run = solve.open_run(solve.parse(list(map(str, argv))))
    run.cfg, now = dataclasses.replace(run.cfg, small_share=0.5), [0.0]
    run.clock = SimpleNamespace(used=lambda: now[0], save=lambda: None)

    def attempt(*args):
        epoch = args[-1][2]
        now[0] += 0.6 if epoch <= 10 else 3.0 if (epoch, slow) == (12, 1.0) else slow
        return {"loss": 1.0, "val_loss": 1.0, "score": epoch / 99}

    monkeypatch.setattr(solve, "attempt", attempt)
    monkeypatch.setattr(solve.time, "monotonic", lambda: now[0])
    run.plan["epoch_seconds"] = [1.0, 1.0]
    solve.fit(run, 1, 0, solve.View(run.images), run.masks, 20.0)
    history = run.histories[1, 0]
    assert len(history) == epochs and now[0] <= 20.0
    assert history[-1]["lr"] == pytest.approx(run.cfg.lr / (run.cfg.cooldown * epochs))


def test_the_first_process_decides_threads_precision_and_plan(write_npz, tiny, tmp_path, monkeypatch):
    """The second of two processes trains in the precision that the first has chosen, here one that no CPU
    would choose, and by the plan that the first has written, not by its own."""
    told = {"threads": 1, "precision": "float16"}
    made = {"folds": 2, "seeds": 1, "width": 4, "epochs": [1, 1], "epoch_seconds": [1.0, 1.0],
            "predict_seconds": 1.0, "train_images_per_second": 1.0}
    written = iter([None, told, {**told, **made}])

    def share(path, progress):
        if path.name == "plan.json" and (plan := next(written)):
            lib.write_json(path, plan)

    ranks = SimpleNamespace(world=2, rank=1, barrier=int, share=share, stdout=sys.stdout, sum=lambda a: a,
                            gather=lambda value: np.full(2, value))
    monkeypatch.setattr(solve, "make_plan", lambda run: {**run.plan, **made, "width": 99})
    argv = ["--data", write_npz(**tiny()), "--out", tmp_path / "out", *FAST]
    run = solve.open_run(solve.parse(list(map(str, argv))), ranks)
    assert (run.dtype, run.plan) == (torch.float16, {**told, **made})


def test_networks_see_around_their_tile(tmp_path, monkeypatch):
    """Where frames are found a run of both stages sees each tile with a margin of its neighbours' pixels, on
    which nothing is labelled and for which nothing is submitted; Config.surroundings turns it off."""
    images, _ = cut_frames(6, 3, 2, 64, 128)
    masks = (1 + (images > 110)).astype(np.uint8)
    file = write(tmp_path, training_set=np.stack([images[:24], masks[:24]], 1), test_set=images[24:],
                 test_labels=masks[24:])
    seen, real = [], solve.write_outputs
    monkeypatch.setattr(solve, "write_outputs", lambda run, stages: seen.append(run) or real(run, stages))
    argv = ["--data", file, "--out", tmp_path / "out", *FAST]
    status, out, err = start(argv)
    assert status == 0, err
    run, metrics = seen[0], strict_json(tmp_path / "out" / "metrics.json")
    assert run.margin == metrics["margin"] == 32 and "margin 32" in out
    tiles = torch.cat([run.images, run.test_images])
    np.testing.assert_array_equal(tiles, lib.surroundings(images, run.place, 32))
    assert (run.neighbours >= 0).any(1).mean() > 0.8  # else there is nothing to see
    assert torch.equal(run.masks, F.pad(torch.from_numpy(masks[:24]).char(), (32,) * 4, value=-1))
    assert {"stage1", "frames", "stage2"} <= set(run.labels) and metrics["test_miou"] > 0.3
    view = solve.second_view(run, run.images, np.full((24, 5, 64, 128), 51, np.uint8), run.evidence.known)
    x = solve.network_input(run, view, slice(2))
    assert x.shape == (2, 1 + 4 + 1 + 8, 128, 192) and x[:, 1:, :32].abs().max() == 0
    inside = solve.network_input(dataclasses.replace(run, plan=run.plan | {"margin": 0}),
                                 dataclasses.replace(view, images=view.images[:, 32:-32, 32:-32]), slice(2))
    assert torch.equal(x[..., 32:-32, 32:-32], inside)
    alone = dataclasses.replace(run.cfg, surroundings=False, out=str(tmp_path / "alone"))
    assert solve.open_run(alone).images.shape == (24, 64, 128)


def test_images_of_rare_classes_are_shown_again(tmp_path, tiny, write_npz, monkeypatch):
    """An epoch shows an image with a rare class rare_repeat times, others once; those are the donors."""
    argv = ["--data", write_npz(**tiny()), "--out", tmp_path / "out", *FAST]
    run = solve.open_run(solve.parse(list(map(str, argv))))
    run.masks[:] = 1
    run.masks[3, 5, 5], run.masks[4, :9, 0], run.masks[7, 0, 0] = 4, 2, -1
    run.is_rare, shown = torch.isin(torch.arange(5), torch.tensor([2, 4])), []
    real = solve.training_batch

    def batch(run, view, targets, index, donors, gen):
        shown.extend(index.tolist())
        assert donors.tolist() == [3, 4]
        return real(run, view, targets, index, donors, gen)

    monkeypatch.setattr(solve, "training_batch", batch)
    parts, every = solve.new_training(run, 1, 0), torch.arange(len(run.images))
    solve.train_one_epoch(run, parts, solve.View(run.images), run.masks, every, (1, 0, 1))
    counts = np.bincount(shown)
    assert counts[[3, 4]].tolist() == [8, 8] and (np.delete(counts, [3, 4]) == 1).all()
