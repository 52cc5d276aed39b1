"""What the README promises: its options, names, recipes and figures."""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import ROOT, TINY, tiny_arrays

import lib
import solve

README = (ROOT / "README.md").read_text()
OUTPUTS = (ROOT / "submission" / "README.md").read_text()
RECIPES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_option_is_explained():
    """Each flag of --help stands among the options, in the list with its default, and the README
    names no other flag."""
    section = README[README.index("## Options"):]
    known = {"--help", *re.findall(r"--\w+(?==)", README)}  # torchrun's have a =
    for f in dataclasses.fields(solve.Config):
        if f.metadata:
            flag = f"--{'no-' * (f.default is True)}{f.name.replace('_', '-')}"
            known.add(flag)
            assert f"`{flag}`" in section or f"{flag} " in README, flag
            row = re.search(rf"^- .*`{flag}`.*", section, re.M)
            if row and f.default and not isinstance(f.default, bool):
                shown = f"{f.default:g}" if isinstance(f.default, float) else str(f.default)
                assert shown in row[0].partition("):")[0], flag
    assert {*re.findall(r"(?<!\w)--[a-z][a-z_-]+", README)} <= known


def test_every_name_exists():
    """Each lib.x, solve.x, link and command of the README is there."""
    for module, name in re.findall(r"\b(lib|solve)\.(\w+)", README):
        assert name == "py" or hasattr(sys.modules[module], name), name
    files = re.findall(r"\]\(([\w./]+)\)|(?:python|pytest|pip install -r) ([\w./]+)", README)
    assert len(files) > 5
    for link, argument in files:
        assert (ROOT / (link or argument)).exists()


def test_every_output_is_explained(finished):
    """Each key of a run with test labels, and each file, stands in submission/README.md; the step's
    name is STEP there."""
    explained = {*re.findall(r"`([\w.]+)/?`", OUTPUTS)}
    keys = json.loads((finished / "out" / "metrics.json").read_text())
    assert {re.sub("stage[12]|frames", "STEP", key) for key in keys} <= explained
    assert {path.name for path in (finished / "out").iterdir()} <= explained


def test_the_recipes_after_a_run(finished_copy, monkeypatch):
    """The mean of a run and itself is its submission, and a network of a run labels an image."""
    for name in ("run1", "run2", "submission"):
        (finished_copy / name).symlink_to(finished_copy / "out")
    monkeypatch.chdir(finished_copy)
    image = tiny_arrays()["test_set"][0]
    scope = {"np": np, "torch": torch, "lib": lib, "Path": Path, "image": image, "mean": 90.0,
             "std": 60.0}
    exec(RECIPES[0], scope)
    assert Path("ensemble.csv").read_bytes() == Path("run1/submission.csv").read_bytes()
    assert scope["labels"].shape == (1, 32, 64) and scope["labels"].min() >= 1


@pytest.mark.slow
def test_a_sixth_class_is_a_name_and_a_colour(tmp_path):
    """With one more entry in CLASSES and PALETTE labels 0 to 5 go through the whole run."""
    source = (ROOT / "lib.py").read_text().replace('"Big Rock")', '"Big Rock", "Ice")')
    source = source.replace("(255, 255, 255)])", "(255, 255, 255), (0, 255, 0)])")
    (tmp_path / "lib.py").write_text(source)
    (tmp_path / "solve.py").write_text((ROOT / "solve.py").read_text())
    arrays = tiny_arrays()
    arrays["training_set"][:, 1, -8:, :16] = 5
    np.savez(tmp_path / "mars.npz", **arrays)
    argv = [sys.executable, "solve.py", "--data", "mars.npz", "--out", "out", *TINY]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["stage1_iou"]) == 6 and metrics["stage2_iou"][5] is not None


@pytest.mark.slow
def test_the_samples_score_and_time(tmp_path):
    """python solve.py --data data/ scores on the sample's test labels what the README says, within
    .06, in at most one and a half times the minutes."""
    wanted = r"([\d.]+) minutes on two cores, with a test score of (\.\d+)"
    minutes, score = re.search(wanted, " ".join(README.split())).groups()
    sample = ROOT / "data" / "sample.npz"
    argv = [sys.executable, ROOT / "solve.py", "--data", sample, "--out", tmp_path / "out"]
    subprocess.run(argv, check=True)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["test_miou"] == pytest.approx(float(score), abs=0.06)
    assert metrics["minutes"] <= 1.5 * float(minutes)
