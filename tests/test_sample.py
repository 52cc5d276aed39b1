"""The embedded sample: small, complete, and drawn again bit for bit."""
from __future__ import annotations

import hashlib
import runpy

import numpy as np
import pytest
from kit import ROOT

import lib

SAMPLE = ROOT / "data" / "sample.npz"
SHA256 = {"training_set": "617d596e827300a0", "test_set": "f22b6411fdcd453f",
          "test_labels": "cf9d8e8f56e15a23"}


def digests(arrays: dict) -> dict:
    return {key: hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]
            for key, array in arrays.items()}


def test_the_sample_resembles_the_competition():
    """At most 3 MB of known arrays: values 2 to 254, all five labels, twelve outliers that share a
    mask; and the loader has nothing to say."""
    with np.load(SAMPLE) as archive:
        assert digests(dict(archive)) == SHA256
    data = lib.load_data(SAMPLE)
    assert data.images.shape == (240, 64, 128) and data.test_images.shape == (80, 64, 128)
    assert data.images.min() >= 2 and data.images.max() <= 254
    assert set(np.unique(data.masks)) == set(range(5))
    counts = np.unique(data.masks.reshape(240, -1), axis=0, return_counts=True)[1]
    assert (counts == 12).sum() == 1
    assert data.notes == [] and data.test_labels is not None
    assert SAMPLE.stat().st_size <= 3_000_000


@pytest.mark.slow
def test_the_script_draws_the_same_arrays():
    """make_sample.build() gives the committed arrays bit for bit."""
    script = runpy.run_path(str(ROOT / "data" / "make_sample.py"))
    assert digests(script["build"]()) == SHA256


@pytest.mark.slow
def test_the_samples_frames_are_put_back():
    """Without its outliers: ten frames of 8×4 tiles, and at most 3 % of the tiles alone."""
    data = lib.load_data(SAMPLE)
    taken = lib.find_outliers(data.images, data.masks)["index"]
    tiles = np.concatenate([np.delete(data.images, taken, 0), data.test_images])
    place = lib.assemble_frames(tiles)
    assert place[0].max() + 1 == 10 and (place[0] < 0).mean() <= 0.03
    assert place[1].max() < 8 and place[2].max() < 4
