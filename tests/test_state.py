"""What a run keeps and what it leaves alone."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lib
import solve

ROOT = Path(__file__).parent.parent


def test_fresh_spares_foreign_files(tmp_path):
    """--fresh throws the kit's own state away and no file of anybody else."""
    state = lib.open_state(tmp_path, {"seed": 0}, False, lib.Ranks())[0]
    (state / "notes.txt").write_text("mine")
    (state / "stage1_fold0.pt").write_text("ours")
    lib.open_state(tmp_path, {"seed": 1}, True, lib.Ranks())
    assert (state / "notes.txt").read_text() == "mine" and not (state / "stage1_fold0.pt").exists()


@pytest.mark.parametrize("name", ["identity.json", "plan.json"])
def test_damaged_state_is_one_sentence(tmp_path, name):
    """A torn JSON file is a UserError that names it and the cure."""
    (tmp_path / name).write_text('{"seed": ')
    with pytest.raises(lib.UserError, match=f"{name}.*--fresh"):
        lib.read_json(tmp_path / name)


def test_changed_code_is_named(tmp_path, capsys):
    """A run that goes on with other code than it began with says so in a line; with the same it says nothing,
    and what a notebook's cell has no file of is left out."""
    code = tmp_path / "code.py"
    code.write_text("a = 1")
    for _ in range(2):
        lib.note_code(tmp_path, code, None)
        assert capsys.readouterr().out == ""
    code.write_text("a = 2")
    lib.note_code(tmp_path, code, None)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "code has changed" in said and "--fresh" in said


def test_an_ascii_terminal_does_not_crash():
    """The help holds ─ and ×; a terminal that cannot show them gets ? instead."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, ROOT / "solve.py", "-h"]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and b"?" in done.stdout and not done.stderr


def test_an_edited_report_does_not_change_the_cleaning(tmp_path):
    """What the cleaning decided holds on resume, whatever becomes of outliers.csv."""
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8)).astype(np.uint8)
    data = lib.Data(Path("x"), "", images, images % 5, images[:0], images[:0])
    state = lib.open_state(tmp_path, {}, False, lib.Ranks())[0]
    lib.write_json(state / "cleaned.json", {"index": [2]})
    pd.DataFrame({"index": [0, 1], "reasons": ["masks", "masks"]}).to_csv(tmp_path / "outliers.csv")
    lib.clean_data(data, state, "", 0, lib.Ranks())
    np.testing.assert_array_equal(data.images, np.delete(images, 2, 0))
    np.testing.assert_array_equal(data.outlier_images, images[2:3])


def test_labels_too_sparse_to_score_still_give_a_submission(tmp_path):
    """One labelled pixel an image, off the grid the evidence is fitted on: a submission all the same."""
    rng = np.random.default_rng(0)
    train = rng.integers(1, 255, (12, 2, 16, 32)).astype(np.uint8)
    train[:, 1] = 0
    train[:, 1, 3, 3] = 1 + np.arange(12) % 3
    np.savez(tmp_path / "m.npz", training_set=train, test_set=train[:3, 0])
    flags = ["--folds", "2", "--width", "4", "--epochs", "1", "--no-clean", "--precision", "float32"]
    assert solve.main(["--data", str(tmp_path / "m.npz"), "--out", str(tmp_path / "o"), *flags]) == 0
    assert (tmp_path / "o" / "submission.csv").exists()
