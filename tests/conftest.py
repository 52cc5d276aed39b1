"""What all tests share: the path to the kit, and a tiny data set in the competition's layout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of the subprocesses too: other threads, other last bits

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

GREY = np.array([20, 60, 110, 160, 230])  # of each class: one threshold away from its neighbours


def tiny_arrays(n: int = 24, m: int = 6, h: int = 32, w: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Return tiles of two or three classes side by side under an unlabelled strip; every fourth holds a 6×6
    rock."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n + m, h, w), np.uint8)
    for i, mask in enumerate(masks):
        left, right = rng.permutation([1, 2, 3])[:2]
        cut = int(rng.integers(w // 4, 3 * w // 4 + 1))
        mask[h // 8 :, :cut], mask[h // 8 :, cut:] = left, right
        if i % 4 == 0:
            y, x = rng.integers(h // 8, max(h // 8 + 1, h - 6)), rng.integers(0, max(1, w - 6))
            mask[y : y + 6, x : x + 6] = 4
    images = (GREY[masks] + rng.integers(-12, 13, masks.shape)).astype(np.uint8)
    return {
        "training_set": np.stack([images[:n], masks[:n]], 1),
        "test_set": images[n:],
        "test_labels": masks[n:],
    }


@pytest.fixture
def tiny():
    """The factory of tiny data sets, arrays by key."""
    return tiny_arrays


@pytest.fixture
def write_npz(tmp_path):
    """A function that writes arrays to tmp_path/name and returns the path."""

    def write(name: str = "mars.npz", compressed: bool = False, **arrays) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return write


def pytest_configure(config):
    """Register the marker of tests that are run by hand: pytest tests/ -m long."""
    config.addinivalue_line("markers", "long: takes minutes; left out unless asked for by -m long")


def pytest_collection_modifyitems(config, items):
    """Leave out the long tests unless they are asked for."""
    if "long" not in (config.option.markexpr or ""):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: pytest tests/ -m long"))


def pytest_terminal_summary(terminalreporter):
    """Count the bad inputs that test_faults tried: each of its tests but those on the file itself is one."""
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, ())]
    done = [one for one in reports if "test_faults.py::test_" in one.nodeid and "_row" not in one.nodeid]
    if done:
        terminalreporter.write_line(f"faults: {len(done)} bad inputs tried")
