"""Section 13: files that are whole or not there, and know their own checksum; the state folder."""
from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from kit import ROOT

import lib

SAVE_FOR_EVER = """
import sys, torch, lib
from pathlib import Path
for e in range(10**6):
    state = {"epoch": e, "w": torch.full((300_000,), float(e))}
    lib.save_checkpoint(Path(sys.argv[1]), state)
    print(e, flush=True)
"""


class Evil:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def state(epoch):
    """Return plain values and a tensor."""
    return {"epoch": epoch, "best": None, "history": [{"loss": 0.5, "lr": 1e-3}],
            "w": torch.arange(6.0).reshape(2, 3) + epoch}


def torch_bytes(value):
    """Return what torch.save writes of it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path):
    """A checkpoint of epoch 1."""
    lib.save_checkpoint(tmp_path / "c.pt", state(1))
    return tmp_path / "c.pt"


def is_refused(path, capsys):
    """Return whether nothing is loaded and one line names the file."""
    got, said = lib.load_checkpoint(path), capsys.readouterr().out
    return got is None and said.count("\n") == 1 and f"{path}: damaged" in said


def test_what_was_saved_is_loaded(path, capsys):
    """Plain values and tensors, without a word, the last save alone; no file is None."""
    (path.parent / "c.pt.tmp").write_bytes(b"half of a new checkpoi")  # as a kill leaves it
    lib.save_checkpoint(path, state(2))
    got = lib.load_checkpoint(path)
    assert torch.equal(got.pop("w"), torch.arange(6.0).reshape(2, 3) + 2)
    assert got == {"epoch": 2, "best": None, "history": [{"loss": 0.5, "lr": 1e-3}]}
    assert os.listdir(path.parent) == ["c.pt"]
    assert lib.load_checkpoint(path.with_name("d.pt")) is None and capsys.readouterr().out == ""


@pytest.mark.fault(41)
def test_one_flipped_bit_anywhere(path, capsys):
    """100 bits, one at a time, checksum included: nothing is loaded and one line names the file."""
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for at in [*range(0, 40, 4), *rng.integers(40, len(raw), 89).tolist(), len(raw) - 1]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert is_refused(path, capsys), f"byte {at}"


@pytest.mark.fault(41)
@pytest.mark.parametrize("damage", [
    lambda raw, evil: b"", lambda raw, evil: raw[:32], lambda raw, evil: raw[:-1],
    lambda raw, evil: b"only some words in a file of text\n", lambda raw, evil: raw[32:],
    lambda raw, evil: hashlib.sha256(pickle.dumps(evil, 2)).digest() + pickle.dumps(evil, 2),
    lambda raw, evil: hashlib.sha256(torch_bytes(evil)).digest() + torch_bytes(evil)])
def test_anything_else_is_refused_and_never_executed(path, capsys, damage):
    """Empty, cut, text, foreign or evil, though its checksum is right: nothing is loaded, one line
    names the file, which stays as it is, and no pickle runs."""
    marker = path.with_name("executed")
    damaged = damage(path.read_bytes(), Evil(marker))
    path.write_bytes(damaged)
    assert is_refused(path, capsys)
    assert not marker.exists() and path.read_bytes() == damaged


def test_the_evil_pickle_would_work(tmp_path):
    """The payload used above does create its file in Python's own loader: the test can fail."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed"), 2)).close()
    assert (tmp_path / "executed").exists()


@pytest.mark.fault(37, 38)
@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   KeyboardInterrupt()])
@pytest.mark.parametrize("write", [
    lambda path: lib.save_checkpoint(path, state(2)), lambda path: lib.write_json(path, {"a": 2}),
    lambda path: lib.write_submission(path, np.ones((3, 2, 2), np.uint8))])
def test_the_old_file_stays_whole(path, monkeypatch, write, error, where):
    """A full disk or a signal before the new file has its name: the error comes out, naming the
    file, the old bytes are there, and no half of a file takes the last room."""
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)) as raised:
        write(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["c.pt"]
    assert isinstance(error, KeyboardInterrupt) or raised.value.filename == str(path)


@pytest.mark.slow
@pytest.mark.fault(37)
def test_killed_while_saving(tmp_path, capsys):
    """kill -9 in the middle of a loop of saves: the newest checkpoint reported as saved, or a newer
    one, is there whole."""
    path = tmp_path / "c.pt"
    child = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path)], text=True, cwd=ROOT,
                             stdout=subprocess.PIPE)
    known = [int(child.stdout.readline()) for _ in range(8)]
    child.kill()  # wherever it is now
    known += [int(line) for line in child.communicate()[0].split("\n")[:-1]]
    got = lib.load_checkpoint(path)
    assert capsys.readouterr().out == ""
    assert got["epoch"] >= max(known) and (got["w"] == got["epoch"]).all()


@pytest.mark.fault(44)
def test_json_is_whole_and_readable(tmp_path):
    """write_json writes what json reads back, NaN as null."""
    lib.write_json(tmp_path / "m.json", {"a": [1, 2.5, float("nan")], "b": None})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": [1, 2.5, None], "b": None}
    assert os.listdir(tmp_path) == ["m.json"]


# --------------------------------------------------------------------------------- the state folder

def open_state(out, fresh=False, **identity):
    """Open the state of a run of one process, and return its folder."""
    folder, lock = lib.open_state(out, identity, fresh, lib.Ranks())
    lock.close()
    return folder


@pytest.mark.fault(42)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path, capsys):
    """The same identity goes on, tuples and all; another value, another field, or networks without
    an identity are sentences, and nothing is lost; --fresh begins anew."""
    folder = open_state(tmp_path, seed=0, sizes=(1, 2))
    (folder / "stage1_fold0.pt").write_text("a network")
    assert open_state(tmp_path, seed=0, sizes=(1, 2)) == folder
    said = capsys.readouterr().out.splitlines()
    assert said == [f"a new run in {tmp_path}", f"going on with the run in {tmp_path}"]
    for other in ({"seed": 1, "sizes": (1, 2)}, {"seed": 0, "sizes": (1, 2), "depth": 5}):
        name = re.compile("seed = 0, this one has 1|depth = None, this one has 5")
        with pytest.raises(lib.UserError, match=name):
            open_state(tmp_path, **other)
    assert (folder / "stage1_fold0.pt").exists()
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-9]), os.unlink):
        damage(folder / "identity.pt")
        with pytest.raises(lib.UserError, match="without their identity.pt.*--fresh"):
            open_state(tmp_path, seed=0)
    assert open_state(tmp_path, fresh=True, seed=0) and not (folder / "stage1_fold0.pt").exists()


def test_fresh_spares_foreign_files(tmp_path):
    """--fresh throws the kit's own state away and no file of anybody else; a process that torchrun
    starts again goes on."""
    folder = open_state(tmp_path, seed=0)
    for name in ("notes.txt", "stage1_fold0.pt", "frames_1.pt", "plan.pt", "c.pt.tmp"):
        (folder / name).write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        open_state(tmp_path, fresh=True, seed=0)
    assert (folder / "stage1_fold0.pt").exists()
    open_state(tmp_path, fresh=True, seed=1)
    assert sorted(os.listdir(folder)) == ["identity.pt", "lock", "notes.txt"]


@pytest.mark.fault(39)
def test_a_folder_that_cannot_be_written(tmp_path):
    """--out below a file is a sentence."""
    (tmp_path / "file").touch()
    with pytest.raises(lib.UserError, match="file: cannot be written .*; choose another folder"):
        open_state(tmp_path / "file")


@pytest.mark.fault(40)
def test_two_runs_in_one_folder(tmp_path):
    """While another process works there, a second one is refused before it throws anything away."""
    code = ("import sys, lib, pathlib; file = lib.lock_folder(pathlib.Path(sys.argv[1])); "
            "print(flush=True); input()")
    folder = open_state(tmp_path, seed=0)
    (folder / "stage1_fold0.pt").touch()
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline()
    with pytest.raises(lib.UserError, match="another run works in"):
        open_state(tmp_path, fresh=True, seed=0)
    other.communicate(b"\n")
    assert (folder / "stage1_fold0.pt").exists() and open_state(tmp_path, seed=0) == folder


@pytest.mark.fault(61)
def test_changed_code_is_named(tmp_path, capsys):
    """A run that goes on with other code than it began with says so in a line; with the same it
    says nothing, and what a notebook's cell has no file of is left out."""
    code = tmp_path / "code.py"
    code.write_text("a = 1")
    for _ in range(2):
        lib.note_code(tmp_path, code, None)
        assert capsys.readouterr().out == ""
    code.write_text("a = 2")
    lib.note_code(tmp_path, code, None)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "code has changed" in said and "--fresh" in said


@pytest.mark.fault(26)
def test_an_edited_report_does_not_change_the_cleaning(tmp_path):
    """What the cleaning decided holds on resume, whatever becomes of outliers.csv."""
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8)).astype(np.uint8)
    data = lib.Data("x", "", images, images % 5, images[:0])
    folder = open_state(tmp_path)
    lib.save_checkpoint(folder / "cleaned.pt", {"index": [2]})
    (tmp_path / "outliers.csv").write_text("index,shared\n0,9\n1,9\n")
    lib.clean_data(data, folder, "", 0, lib.Ranks())
    np.testing.assert_array_equal(data.images, np.delete(images, 2, 0))
