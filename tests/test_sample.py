"""The embedded sample: small, complete, and drawn again bit for bit."""

import hashlib
import importlib.util

import numpy as np
import pytest
from conftest import ROOT

import lib

SAMPLE = ROOT / "data" / "sample.npz"
SHA256 = {
    "training_set": "617d596e827300a0",
    "test_set": "f22b6411fdcd453f",
    "test_labels": "cf9d8e8f56e15a23",
}
SHAPES = {"training_set": (240, 2, 64, 128), "test_set": (80, 64, 128), "test_labels": (80, 64, 128)}


@pytest.fixture(scope="module")
def sample():
    with np.load(SAMPLE) as archive:
        return dict(archive)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_the_file_is_small():
    """At most 3 MB are committed."""
    assert SAMPLE.stat().st_size <= 3_000_000


def test_the_file_holds_the_known_arrays(sample):
    """Three uint8 arrays of the competition's layout with the known checksums, and nothing else."""
    assert {k: v.shape for k, v in sample.items()} == SHAPES
    assert all(v.dtype == np.uint8 for v in sample.values())
    assert {k: digest(v) for k, v in sample.items()} == SHA256


def test_the_script_draws_the_same_arrays():
    """make_sample.build() gives the committed arrays bit for bit."""
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "data" / "make_sample.py")
    make_sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_sample)
    assert {k: digest(v) for k, v in make_sample.build().items()} == SHA256


def test_the_sample_resembles_the_competition(sample):
    """Values 2 to 254, all five labels, twelve intruders with one shared mask, and the loader has nothing to
    say."""
    images, masks = sample["training_set"].swapaxes(0, 1)
    assert images.min() >= 2 and images.max() <= 254 and set(np.unique(masks)) == set(range(5))
    counts = np.unique(masks.reshape(len(masks), -1), axis=0, return_counts=True)[1]
    assert (counts == 12).sum() == 1
    data = lib.load_data(SAMPLE)
    assert data.notes == [] and len(data.test_labels) == 80


def test_the_samples_frames_are_put_back(sample):
    """Ten frames of 8 × 4 tiles, each apart from the others, and at most 3 % of the tiles alone."""
    images, masks = sample["training_set"].swapaxes(0, 1)
    taken = lib.find_outliers(images, masks)["index"]
    tiles = np.concatenate([np.delete(images, taken, 0), sample["test_set"]])
    place = lib.assemble_frames(tiles)[2]
    assert place[0].max() + 1 == 10
    assert np.bincount(place[0, place[0] >= 0]).max() <= 32 and (place[0] < 0).mean() <= 0.03
    assert place[1].max() < 8 and place[2].max() < 4
