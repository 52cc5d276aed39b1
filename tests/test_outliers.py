"""Claims about the cleaning: which images are taken out, which stay, and what is refused."""
from __future__ import annotations

import concurrent.futures
import warnings

import numpy as np
import outlier_sets
import pytest
import torch
from kit import ROOT

import lib

SAMPLE = ROOT / "data" / "sample.npz"


def ignore(sentence):
    """A log() for tests that look at the table only."""


@pytest.fixture(scope="module")
def tiles():
    """Images and masks of 120 tiles of the sample, without its twelve outliers of one mask."""
    train = np.load(SAMPLE)["training_set"]
    _, mask, counts = np.unique(train[:, 1].reshape(len(train), -1), axis=0, return_inverse=True,
                                return_counts=True)
    train = train[counts[mask.ravel()] != 12][:120]
    return train[:, 0].copy(), train[:, 1].copy()


@pytest.fixture(scope="module")
def drawn(tiles):
    """Images, masks and outliers: 15 % of the tiles have a head pasted in."""
    return outlier_sets.make_set(*tiles, len(tiles[0]), 0.15, 3)


@pytest.fixture(scope="module")
def found(drawn):
    """The table of what is taken out of the drawn set."""
    return lib.find_outliers(*drawn[:2], log=ignore)


def test_a_clean_set_loses_nothing(tiles):
    """No image is taken out of a set without outliers."""
    assert lib.find_outliers(*tiles, log=ignore).empty


def test_most_outliers_are_found(drawn, found):
    """Of 15 % outliers, mirrored, tilted, stretched, nine in ten are found, and nothing else."""
    right = np.isin(found["index"], drawn[2])
    assert right.all() and right.sum() >= 0.9 * len(drawn[2])


def test_columns(found):
    """The table has ascending indices, the number of exemplars that share an object, and the
    autoencoder's error."""
    assert list(found.columns) == ["index", "links", "autoencoder_error"]
    assert found["index"].is_monotonic_increasing and (found["links"] >= 1).all()
    assert np.isfinite(found["autoencoder_error"]).all()


@pytest.mark.parametrize("width", [128, 64])
def test_mirrored_copies_stay(tiles, width):
    """Of tiles that are there once more, mirrored, as augmentation does it, one of 16 may go."""
    images, masks = (x[:60, :, :width] for x in tiles)
    images, masks = (np.concatenate([x, x[:8, :, ::-1]]) for x in (images, masks))
    assert len(lib.find_outliers(images, masks, log=ignore)) <= 1


@pytest.mark.slow
def test_user_template_finds_its_copies(tiles):
    """With a picture of the head, 6 heads among the images are found, and nothing else."""
    images, masks, outliers = outlier_sets.make_set(*tiles, len(tiles[0]), 0.1, 0)
    head = np.uint8(np.where(outlier_sets.head() < 0, 90, outlier_sets.head()))
    template = head[::4, ::4]
    found = lib.find_outliers(images, masks, template, log=ignore)
    assert np.isin(found["index"], outliers).all() and len(found) > 0.5 * len(outliers)


@pytest.mark.fault(20, 21)
@pytest.mark.parametrize(("shape", "word"), [((20, 20), " 0 points"), ((65, 20), "larger")])
def test_unfit_template_is_an_error(tiles, shape, word):
    """A flat template, and one that is larger than the images, are the user's mistakes."""
    template = np.full(shape, 128, np.uint8)
    with pytest.raises(lib.UserError, match=word):
        lib.find_outliers(*tiles, template)


@pytest.mark.fault(24)
def test_a_whole_class_never_goes(drawn, found):
    """Outliers that alone hold a class stay, and a sentence names the class."""
    images, masks, _ = drawn
    masks = np.minimum(masks, 3)
    masks[found["index"], 0, 0] = 4
    sentences = []
    lib_found = lib.find_outliers(images, masks, log=sentences.append)
    assert (masks[np.delete(range(len(masks)), lib_found["index"])] == 4).any()
    assert any("class 4" in sentence for sentence in sentences)


@pytest.mark.slow
@pytest.mark.fault(24)
def test_more_than_the_share_never_goes(tiles):
    """Of a set of which half shows one object, no more than MAX_SHARE is taken out."""
    images, masks, outliers = outlier_sets.make_set(*tiles, len(tiles[0]), 0.5, 0)
    found = lib.find_outliers(images, masks, log=ignore)
    assert len(found) <= lib.MAX_SHARE * len(images)


@pytest.mark.fault(25)
def test_a_diverged_autoencoder_is_said(drawn, found, monkeypatch):
    """A loss that is NaN costs the order of the candidates and a sentence, not the run."""
    monkeypatch.setattr(lib.F, "mse_loss", lambda x, y: (x - y).mean() * float("nan"))
    sentences = []
    again = lib.find_outliers(*drawn[:2], log=sentences.append)
    assert again["index"].equals(found["index"])  # 120 images are all candidates
    assert len(sentences) == 1 and "autoencoder" in sentences[0]


def test_copies_go_with_their_outlier(drawn, found):
    """Exact copies of outliers, which are not compared, are taken out too."""
    again = found["index"][:3]
    images, masks = (np.concatenate([x, x[again]]) for x in drawn[:2])
    index = lib.find_outliers(images, masks, log=ignore)["index"].tolist()
    assert index == [*found["index"], *range(len(drawn[0]), len(images))]


@pytest.mark.slow
def test_threads_do_not_matter(drawn, found):
    """A map of several threads gives the same table, and the random state is left as it was."""
    state = torch.get_rng_state()
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        again = lib.find_outliers(*drawn[:2], log=ignore, pmap=executor.map)
    assert again.equals(found)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(2, 8, 8), (12, 65, 127)])
def test_odd_sets(shape):
    """Few or small images, constant ones and duplicates give a table without a warning."""
    noise = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    masks = np.ones(shape, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (noise, noise * 0 + 7, np.repeat(noise[:1], len(noise), 0)):
            assert lib.find_outliers(images, masks, log=ignore).empty
            assert lib.find_outliers(images, masks * 0, log=ignore).empty


@pytest.mark.fault(22, 23)
def test_other_types_are_converted():
    """Images of float64, masks of int64 are as good as bytes; a NaN is black."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 64)).astype(np.uint8)
    masks = rng.integers(0, 5, (12, 32, 64)).astype(np.uint8)
    images[3, 4, 5] = 0
    wide = images.astype(np.float64)
    wide[3, 4, 5] = np.nan
    found = lib.find_outliers(wide, masks.astype(np.int64), log=ignore)
    assert found.equals(lib.find_outliers(images, masks, log=ignore))
