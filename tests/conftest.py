"""What all tests share: the path to the kit, fixtures, and the markers slow and fault."""
from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # of the subprocesses too: other threads, other last bits

import kit  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """The factory of tiny data sets, arrays by key."""
    return kit.tiny_arrays


@pytest.fixture
def write_npz(tmp_path):
    """A function that writes arrays to tmp_path/name and returns the path."""

    def write(name: str = "mars.npz", compressed: bool = False, **arrays) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished tiny run, data in mars.npz, output in out: not to be changed."""
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def finished_stage1(tmp_path_factory) -> Path:
    """The same of a run without a second stage."""
    return finish(tmp_path_factory.mktemp("finished_stage1"), "--stages", "1")


def finish(folder: Path, *flags: str) -> Path:
    """Run on tiny data in the folder, with --save-probs, and return the folder."""
    np.savez(folder / "mars.npz", **kit.tiny_arrays())
    status, _, err = kit.run_main(folder / "mars.npz", folder / "out", "--save-probs", *flags)
    assert status == 0, err
    return folder


@pytest.fixture
def finished_copy(finished, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long by nature; run by pytest tests/ -m slow")
    config.addinivalue_line("markers", "fault(*rows): guards rows of the list of faults")


def pytest_collection_modifyitems(config, items):
    """Leave out the slow tests unless they are asked for."""
    if "slow" not in (config.option.markexpr or ""):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
