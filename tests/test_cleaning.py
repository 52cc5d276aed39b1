"""Claims about the cleaning: which images go out, which stay, and what is refused."""
import warnings

import cv2
import numpy as np
import pytest
import torch

import lib

HEIGHT, WIDTH = 64, 128


def ground(count, seed=0, height=HEIGHT, width=WIDTH):
    """Blurred noise, uint8 (count,H,W), and masks that are labelled all over."""
    rng = np.random.default_rng(seed)
    images = [cv2.GaussianBlur(rng.normal(0, 60, (height, width)), (0, 0), 1.5) + 90 for _ in range(count)]
    return np.clip(images, 1, 254).astype(np.uint8), np.ones((count, height, width), np.uint8)


def drawing():
    """A face of 32x32 pixels without any symmetry."""
    face = np.full((32, 32), 200, np.uint8)
    cv2.circle(face, (9, 10), 6, 20, -1)
    cv2.rectangle(face, (19, 4), (28, 12), 90, -1)
    cv2.line(face, (5, 27), (26, 20), 10, 3)
    return face


def intruders(count=100, pasted=10):
    """Ground with the drawing in the first images, mirrored in all four ways."""
    images, masks = ground(count)
    for i in range(pasted):
        flip = drawing()[:: (-1) ** i, :: (-1) ** (i // 2)]
        y, x = 3 * i, 9 * i
        images[i, y : y + 32, x : x + 32] = flip
    return images, masks


def silent(sentence):
    """A log() for tests that look at the table only."""


def no_suspects(images):
    return np.zeros(len(images), bool)


def intricate():
    """A mask whose outlines have many vertices."""
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    for x in range(8, WIDTH, 16):
        cv2.fillPoly(mask, [np.array([(x, 8), (x + 6, 30), (x, 56), (x - 6, 30)])], 2)
    return mask


def test_mirrored_template_found():
    """A given template is found in every image that shows it, plain, left-right, upside down or both."""
    images, masks = intruders()
    scores = lib.template_scores(images, masks, no_suspects(images), drawing())
    assert set(np.argsort(-scores)[:10]) == set(range(10))
    assert scores[:10].min() > 2 * scores[10:].max()


def test_template_discovered_from_the_images():
    """With no template and no other witness, exactly the ten images with one drawing go out."""
    images, masks = intruders()
    found = lib.find_outliers(images, masks, ("template",), log=silent)
    assert found["index"].tolist() == list(range(10))
    assert set(found["reasons"]) == {"template"} and found["autoencoder_score"].isna().all()


def test_brightness_of_a_template_does_not_matter():
    """Half the contrast and another brightness: still the highest ten scores."""
    images, masks = intruders()
    scores = lib.template_scores(images, masks, no_suspects(images), drawing() // 2 + 60)
    assert set(np.argsort(-scores)[:10]) == set(range(10))


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.fault(20)
def test_flat_template_refused(level):
    """A flat template is an error: OpenCV's correlation with it is 1.0 everywhere."""
    images, masks = ground(8)
    with pytest.raises(lib.UserError, match="flat"):
        lib.find_outliers(images, masks, ("template",), np.full((20, 20), level, np.uint8))


@pytest.mark.parametrize("shape", [(65, 20), (20, 129)])
@pytest.mark.fault(21)
def test_too_large_template_refused(shape):
    """A template higher or wider than the images is an error: OpenCV would swap the two in silence."""
    images, masks = ground(8)
    template = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    with pytest.raises(lib.UserError, match="larger"):
        lib.find_outliers(images, masks, ("template",), template)


@pytest.mark.fault(22)
def test_nan_gives_no_nan():
    """NaN pixels in an image, and in a template, leave every score a number."""
    images, masks = intruders(30)
    images = images.astype(np.float32)
    images[20, 10:20, 10:20] = np.nan
    template = drawing().astype(np.float32)
    template[0, 0] = np.nan
    assert np.isfinite(lib.template_scores(images, masks, no_suspects(images), template)).all()
    assert np.isfinite(lib.autoencoder_scores(images, masks)).all()


def test_repeated_simple_masks_kept():
    """One class all over, or one straight border, level or slanting, repeats by chance: nothing goes out."""
    images, masks = ground(40)
    masks[10:14, 32:] = 2
    masks[14:18] += np.uint8(np.add.outer(1.3 * np.arange(HEIGHT), 0.7 * np.arange(WIDTH)) > 80)
    assert lib.find_outliers(images, masks, ("masks",)).empty


def test_repeated_intricate_masks_taken():
    """An intricate mask on three images, once mirrored, takes out these three; on a single image it stays."""
    images, masks = ground(40)
    masks[:, :5] = 2
    masks[3] = masks[20] = intricate()
    masks[30] = intricate()[::-1]
    masks[35] = np.roll(intricate(), 3, axis=0)
    found = lib.find_outliers(images, masks, ("masks",))
    assert found["index"].tolist() == [3, 20, 30] and found["mask_copies"].tolist() == [3, 3, 3]


def test_image_given_twice_kept():
    """The same image with the same intricate mask is a copy, not an intruder."""
    images, masks = ground(40)
    masks[:, :5] = 2
    masks[3] = masks[20] = intricate()
    images[3] = images[20]
    assert lib.find_outliers(images, masks, ("masks",)).empty


@pytest.mark.fault(24)
def test_insane_cut_refused():
    """A cut of half the images takes out none of them and says so in one sentence."""
    images, masks = ground(20)
    masks[:, :5] = 2
    masks[:10] = intricate()
    said = []
    assert lib.find_outliers(images, masks, ("masks",), log=said.append).empty
    assert len(said) == 1 and "10 of 20" in said[0]


@pytest.mark.fault(24)
def test_whole_class_refused():
    """A cut of 2 of 40 images that alone hold class 4 takes out none of them and names the class."""
    images, masks = ground(40)
    masks[:, :5] = 2
    masks[3] = masks[20] = intricate()
    masks[[3, 20], 60, 60] = 4
    said = []
    assert lib.find_outliers(images, masks, ("masks",), log=said.append).empty
    assert len(said) == 1 and "class 4" in said[0]


@pytest.mark.fault(25)
def test_diverged_autoencoder_left_out(monkeypatch):
    """A loss that is NaN costs that witness and a sentence, not the table."""
    monkeypatch.setattr(lib.F, "mse_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    images, masks = ground(40)
    masks[:, :5] = 2
    masks[3] = masks[20] = intricate()
    said = []
    found = lib.find_outliers(images, masks, ("masks", "autoencoder"), log=said.append)
    assert found["index"].tolist() == [3, 20] and found["autoencoder_score"].isna().all()
    assert len(said) == 1 and "autoencoder" in said[0]


def test_autoencoder_finds_what_is_foreign():
    """The ten images with a drawing on labelled ground have the ten highest scores, all above the cut."""
    images, masks = intruders(60)
    scores = lib.autoencoder_scores(images, masks)
    assert set(np.argsort(-scores)[:10]) == set(range(10))
    assert scores[:10].min() > lib.CUTS["autoencoder"]


def test_autoencoder_leaves_the_unlabelled_alone():
    """What nobody labelled is no evidence: without labels around them the drawings are ordinary images."""
    images, masks = intruders(60)
    for i in range(10):
        masks[i, max(0, 3 * i - 12) : 3 * i + 44, max(0, 9 * i - 12) : 9 * i + 44] = 0
    assert np.median(lib.autoencoder_scores(images, masks)[:10]) < 1


def test_same_seed_same_table():
    """Two calls with one seed give the same table, and the caller's random state is left as it was."""
    images, masks = intruders(50, 5)
    state = torch.get_rng_state()
    first, second = (lib.find_outliers(images, masks, seed=3, log=silent) for _ in range(2))
    assert first.equals(second) and len(first)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 128), (5, 9, 40), (30, 65, 127)])
def test_small_and_odd_sets_raise_no_warning(count, height, width):
    """Few images, odd sizes, and black or constant ones: a table, no crash, no warning."""
    images, masks = ground(count, height=height, width=width)
    images[0], images[count // 2] = 0, 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lib.find_outliers(images, masks, log=silent)
        constant = lib.find_outliers(np.full_like(images, 7), masks * 0, log=silent)
    assert len(found) <= 0.15 * count and constant.empty
    assert list(found.columns) == ["index", "reasons", "mask_copies", "autoencoder_score", "template_score"]


@pytest.mark.fault(23)
def test_float64_images_are_as_good_as_bytes():
    """OpenCV takes no int64 and mixes no types: images of float64, masks of int64 are converted."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 64)).astype(np.uint8)
    masks = rng.integers(0, 5, (12, 32, 64)).astype(np.uint8)
    wide = lib.find_outliers(images.astype(np.float64), masks.astype(np.int64))
    assert wide.equals(lib.find_outliers(images, masks))
