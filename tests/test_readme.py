"""What the README promises: its options, its figures of the sample, its ways to change the kit."""
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_arrays
from test_solve import FAST

import lib
import solve

README = (ROOT / "README.md").read_text()


def test_every_option_is_explained():
    """Each flag of --help stands in the README's section on options, in the table with its default, and no
    flag stands in the README that is none."""
    flags = {}
    for f in dataclasses.fields(solve.Config):
        if f.metadata:
            flags[f"--{'no-' * (f.default is True)}{f.name.replace('_', '-')}"] = f.default
    section = README[README.index("## Options") : README.index("## When something is wrong")]
    for flag, default in flags.items():
        assert f"`{flag}`" in section, flag
        row = next((row for row in section.splitlines() if row.startswith("|") and f"`{flag}`" in row), None)
        if row and default and not isinstance(default, bool):
            assert f"{default:g}" in row if isinstance(default, float) else str(default) in row, flag
    torchrun = {f"--{name}" for name in ("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port")}
    known = {*flags, *torchrun, "--help"}
    assert set(re.findall(r"(?<!\w)--[a-z][a-z_-]+", README)) <= known


def test_every_figure_of_metrics_json_is_explained(tmp_path):
    """Each key of a run with test labels stands in submission/README.md, the step's name replaced by STEP."""
    np.savez(tmp_path / "mars.npz", **tiny_arrays())
    assert solve.main(["--data", str(tmp_path / "mars.npz"), "--out", str(tmp_path / "out"), *FAST]) == 0
    keys = json.loads((tmp_path / "out" / "metrics.json").read_text())
    explained = {*re.findall(r"`(\w+)`", (ROOT / "submission" / "README.md").read_text())}
    assert {re.sub("stage[12]|frames", "STEP", key) for key in keys} <= explained


def test_the_loss_in_the_readme(monkeypatch):
    """Its Dice loss is 0 for a sure and right answer, 1 for a sure and wrong one, ignores -1, and learns."""
    scope = {"F": F}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], scope)
    target = torch.tensor([[[0, 1, -1, 1]]])
    right = F.one_hot(target.clamp_min(0), 2).movedim(-1, 1).float() * 200
    assert scope["dice_loss"](right, target, gamma=0.0, alpha=1.0).item() == pytest.approx(0, abs=1e-6)
    assert scope["dice_loss"](right.flip(1), target).item() == pytest.approx(1, abs=1e-6)
    logits = [torch.randn(1, 2, 8 // 2**i, 8 // 2**i, requires_grad=True) for i in range(3)]
    monkeypatch.setattr(lib, "focal_loss", scope["dice_loss"])
    lib.deep_supervision_loss(logits, torch.ones(1, 8, 8).long(), (0.1, 0.1), gamma=0.0).backward()
    assert all(one.grad.abs().sum() > 0 for one in logits)


def test_a_sixth_class_is_a_name_and_a_colour(tmp_path):
    """With one more entry in CLASSES and PALETTE a file with labels 0 to 5 goes through the whole run."""
    source = (ROOT / "lib.py").read_text()
    more = source.replace('"Big Rock")', '"Big Rock", "Ice")')
    more = more.replace("(255, 255, 255)]", "(255, 255, 255), (0, 255, 0)]")
    assert more.count("Ice") == 1 and more.count("(0, 255, 0)") == 1
    (tmp_path / "lib.py").write_text(more)
    (tmp_path / "solve.py").write_text((ROOT / "solve.py").read_text())
    arrays = tiny_arrays()
    arrays["training_set"][:, 1, -8:, :16] = 5
    np.savez(tmp_path / "mars.npz", **arrays)
    argv = [sys.executable, "solve.py", "--data", "mars.npz", "--out", "out", *FAST]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["stage1_iou"]) == 6 and metrics["stage2_iou"][5] is not None


@pytest.mark.long
def test_the_samples_score_and_time(tmp_path):
    """python solve.py --data data/ scores on the sample's test labels what the README says, within .06, in at
    most one and a half times the minutes."""
    wanted = r"([\d.]+) minutes on two cores, with a test score of (\.\d+)"
    minutes, score = re.search(wanted, " ".join(README.split())).groups()
    argv = [sys.executable, ROOT / "solve.py", "--data", ROOT / "data", "--out", tmp_path / "out"]
    done = subprocess.run(argv)
    assert done.returncode == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["test_miou"] == pytest.approx(float(score), abs=0.06)
    assert metrics["minutes"] <= 1.5 * float(minutes)
