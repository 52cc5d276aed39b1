"""Files that are whole or not there, and know their own checksum."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import lib


class Evil:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def state(epoch):
    return {
        "epoch": epoch,
        "best": None,
        "history": [{"loss": 0.5, "lr": 1e-3}],
        "done": False,
        "weights": {"w": torch.arange(6.0).reshape(2, 3) + epoch},
    }


def saved(tmp_path, *epochs):
    path = tmp_path / "c.pt"
    for epoch in epochs:
        lib.save_checkpoint(path, state(epoch))
    return path


def load(path):
    """Return what load_checkpoint gives, and the lines that it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        got = lib.load_checkpoint(path)
    return got, out.getvalue().splitlines()


def test_round_trip(tmp_path):
    """What was saved is loaded, plain values and tensors, without a word."""
    got, said = load(saved(tmp_path, 3))
    assert torch.equal(got["weights"].pop("w"), torch.arange(6.0).reshape(2, 3) + 3)
    assert got == {
        "epoch": 3,
        "best": None,
        "history": [{"loss": 0.5, "lr": 1e-3}],
        "done": False,
        "weights": {},
    }
    assert said == []


def test_optimizer_and_model_go_on_alike(tmp_path):
    """A model and an AdamW loaded from a checkpoint take the same next step, bit for bit, as those that went
    on."""
    torch.manual_seed(0)

    def parts():
        model = lib.UNet(1, 4, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32))[0].square().mean().backward()
        optimizer.step()

    one = parts()
    step(*one)
    lib.save_checkpoint(tmp_path / "c.pt", {"model": one[0].state_dict(), "optimizer": one[1].state_dict()})
    two, loaded = parts(), load(tmp_path / "c.pt")[0]
    two[0].load_state_dict(loaded["model"])
    two[1].load_state_dict(loaded["optimizer"])
    step(*one)
    step(*two)
    for a, b in zip(one[0].state_dict().values(), two[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_no_file_is_none(tmp_path):
    """Nothing there: None, and no message."""
    assert load(tmp_path / "c.pt") == (None, [])


def test_the_last_one_counts(tmp_path):
    """Of two saves the second is loaded, and nothing but its file is there."""
    path = saved(tmp_path, 1, 2)
    assert load(path)[0]["epoch"] == 2 and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_one_flipped_bit_anywhere(tmp_path):
    """200 bits, one at a time, checksum included: nothing is loaded and one line names the file."""
    path = saved(tmp_path, 1)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(40), *rng.integers(40, len(raw), 159).tolist(), len(raw) - 1]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        got, said = load(path)
        assert got is None, f"byte {at}"
        assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0]


def evil_bytes(marker):
    return pickle.dumps(Evil(marker), protocol=2)  # torch's own protocol


DAMAGED = {
    "empty": lambda raw, evil: b"",
    "one_byte": lambda raw, evil: raw[:1],
    "checksum_only": lambda raw, evil: raw[:32],
    "half": lambda raw, evil: raw[: len(raw) // 2],
    "last_byte_missing": lambda raw, evil: raw[:-1],
    "grown": lambda raw, evil: raw + b"\0",
    "text": lambda raw, evil: b"this is not a checkpoint at all, only some words in a file of text\n",
    "zeros": lambda raw, evil: bytes(len(raw)),
    "torch_save": lambda raw, evil: raw[32:],
    "evil_pickle": lambda raw, evil: evil,
    "evil_pickle_behind_its_checksum": lambda raw, evil: hashlib.sha256(evil).digest() + evil,
    "evil_torch_save_behind_its_checksum": lambda raw, evil: None,  # made below: it needs torch.save
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_anything_else_is_refused_and_never_executed(tmp_path, kind):
    """Empty, cut, text, foreign or evil: nothing is loaded, one line names the file, which stays as it is,
    and no pickle runs."""
    path, marker = saved(tmp_path, 1), tmp_path / "executed"
    evil = evil_bytes(marker)
    if kind == "evil_torch_save_behind_its_checksum":
        buffer = io.BytesIO()
        torch.save({"epoch": 9, "x": Evil(marker)}, buffer)
        damaged = hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
    else:
        damaged = DAMAGED[kind](path.read_bytes(), evil)
    path.write_bytes(damaged)
    got, said = load(path)
    assert not marker.exists()
    assert got is None and len(said) == 1 and str(path) in said[0] and "damaged" in said[0]
    assert path.read_bytes() == damaged and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_evil_pickle_would_work(tmp_path):
    """The payload used above does create its file in Python's own loader: the test can fail."""
    pickle.loads(evil_bytes(tmp_path / "executed")).close()
    assert (tmp_path / "executed").exists()


def test_a_save_after_damage_is_a_good_one(tmp_path):
    """Where a damaged file lies, and half of one that a kill left, a new checkpoint takes their place."""
    path = saved(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "c.pt.tmp").write_bytes(b"half of a new checkpoi")
    lib.save_checkpoint(path, state(2))
    got, said = load(path)
    assert got["epoch"] == 2 and said == [] and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_killed_before_the_new_one_has_its_name(tmp_path, monkeypatch, where):
    """A kill after the bytes are written and before the new file has its name: the old one is loaded."""
    path = saved(tmp_path, 1)

    class Died(BaseException):
        pass

    def die(*_):
        raise Died

    monkeypatch.setattr(os, where, die)
    with pytest.raises(Died):
        lib.save_checkpoint(path, state(2))
    assert load(path)[0]["epoch"] == 1


@pytest.mark.parametrize(
    "writer",
    [
        lambda path: lib.write_json(path, {"a": 2}),
        lambda path: lib.write_submission(path, np.ones((3, 2, 2), np.uint8)),
    ],
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, writer, where):
    """ENOSPC when the bytes go to the disk: the error comes out, and the old file is whole under its name."""
    path = tmp_path / "file"
    path.write_text('{"a": 1}')

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space"):
        writer(path)
    assert path.read_text() == '{"a": 1}'


def test_full_disk_while_saving_a_checkpoint(tmp_path, monkeypatch):
    """The same for a checkpoint: what was saved before is what is loaded."""
    path = saved(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lib.save_checkpoint(path, state(2))
    assert load(path)[0]["epoch"] == 1


def test_error_in_the_middle_leaves_the_old_file(tmp_path):
    """An exception while the new file is being written: the old bytes stay under the name."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), lib.atomic_write(path) as f:
        f.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old"


def test_killed_while_saving(tmp_path):
    """kill -9 in the middle of a loop of saves: the newest checkpoint reported as saved, or a newer one, is
    there whole."""
    path = tmp_path / "c.pt"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, lib; from pathlib import Path\n"
        "for e in range(10**6):\n"
        "    lib.save_checkpoint(Path(sys.argv[2]), {'epoch': e, 'w': torch.full((300_000,), float(e))})\n"
        "    print(e, flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(8):
            known = int(child.stdout.readline())
        child.kill()  # wherever it is now
        rest = [int(line) for line in child.stdout.read().split() if line.isdigit()]
    finally:
        child.kill()
        child.wait()
    got, said = load(path)
    assert said == [] and got["epoch"] >= max([known, *rest]) and (got["w"] == got["epoch"]).all()


def test_json_is_whole_and_readable(tmp_path):
    """write_json writes what json reads back; no temporary file stays."""
    lib.write_json(tmp_path / "m.json", {"a": [1, 2.5], "b": None})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": [1, 2.5], "b": None}
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
