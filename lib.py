"""What is true of the Mars-terrain task, in the order of the data's way through a run.

    1. data          find, check and load the competition's .npz, fingerprint
    2. outliers      images that are no Mars: an autoencoder, and points that they share
    3. frames        the camera frames, put back together from the shuffled tiles
    4. context       what the labels of a frame say of its other tiles
    5. folds         stratified, copies kept together
    6. augmentation  whole batches on the device: flips, affine, jitter, copy-paste
    7. network       the paper's U-Net: gated skips, deep supervision
    8. loss          focal loss
    9. morphology    opening and closing per class
    10. metric       confusion matrix, the competition's mean IoU and the paper's
    11. engine       flags, clock, devices, workers, a network in training, prediction
    12. ranks        the processes that torchrun started
    13. checkpoints  atomic files that know their own checksum
    14. submission   the CSV as bytes, and its checker
    15. report       one self-contained HTML page, a figure, the history

Arrays are NumPy on the host and torch on the device. Images and masks are uint8 (N, H, W).
Nothing here decides anything: every choice is an argument, and solve.py makes it. Nothing runs
at import.
"""
from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import hashlib
import html
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import timeit
import traceback
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import scipy.ndimage
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

CLASSES = ("Background", "Soil", "Bedrock", "Sand", "Big Rock")
NUM_CLASSES = len(CLASSES)
PALETTE = np.uint8([(32, 32, 36), (150, 85, 25), (86, 150, 210), (240, 205, 110), (255, 255, 255)])
KEYS = ("training_set", "test_set", "test_labels")  # of the competition's file
KAGGLE_INPUT = Path("/kaggle/input")                # read-only
SAVE_SECONDS = 30                                   # between two checkpoints of a network
MAX_BYTES = 8 << 30  # of arrays in memory: the competition's file is 0.43 GB
TEST_FOLD = -2       # fold_of a test tile; -1: of a tile that validates no network
CHUNK = 256          # tiles whose probabilities are held as floats at once: 42 MB


class UserError(Exception):
    """A mistake the user can mend: main() prints it as one sentence and exits with status 2."""


# ----------------------------------------------------------------------------------------- 1. data

@dataclass
class Data:
    """The competition's file, checked. Images and masks are uint8 (N, H, W)."""

    path: Path
    sha256: str
    images: np.ndarray
    masks: np.ndarray
    test_images: np.ndarray     # (M, H, W); M may be 0
    test_labels: np.ndarray | None = None
    mean: float = 0.0           # of the training images' grey values
    std: float = 1.0
    notes: list[str] = field(default_factory=list)  # warnings to be printed


def user_path(path: str | Path) -> Path:
    """Return a path, ~ replaced by the user's home; UserError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no user of that name has a home here") from None


def find_data_file(path: str | Path) -> Path:
    """Return the file a path stands for: in a folder mars_for_students.npz, else the only other."""
    path = user_path(path)
    if path.is_file():
        return path
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in (".npz", ".zip")
             and not file.name.startswith(("._", "submission", "probabilities"))
             and file.is_file()]  # macOS adds ._x.npz; a run's own outputs are no data
    named = [file for file in files if file.name.lower() == "mars_for_students.npz"]
    best = named or [file for file in files if file.name.lower() != "sample.npz"] or files
    if len(best) == 1:
        return best[0]
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    there = best or [*sorted(folder.iterdir())[:12], *sorted(KAGGLE_INPUT.rglob("*.npz"))]
    fault = f"{len(best)} .npz files, name one" if best else "no such file, or no .npz in it"
    raise UserError(f"{path}: {fault}; wanted is the competition's mars_for_students.npz, "
                    f"there is {', '.join(map(str, there[:18])) or 'nothing'}")


def read_npz(path: Path, wanted: str = "training_set") -> dict[str, np.ndarray]:
    """Return those of the competition's KEYS that an .npz, or the one in Kaggle's .zip, holds."""
    arrays, packed = {}, path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if "._" not in name]  # macOS adds ._x.npz
            inner = [name for name in names if name.lower().endswith(".npz")]
            npz = zipfile.ZipFile(archive.open(inner[0])) if len(inner) == 1 else archive
            unpacked = sum(member.file_size for member in npz.infolist())
            if unpacked > min(MAX_BYTES, max(64 << 20, 250 * packed)):  # real tiles: 20 * packed
                raise UserError(f"{path}: {packed} bytes would unpack to {unpacked}: refused")
            found = [name.removesuffix(".npy") for name in npz.namelist()]
            if wanted not in found:
                raise UserError(f"{path}: {wanted} is missing, found {', '.join(found) or 0}")
            for key in set(KEYS).intersection(found):
                with npz.open(f"{key}.npy") as stream:
                    np.lib.format.read_magic(stream)
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                    if dtype.kind not in "biuf":
                        raise UserError(f"{path}: {key} is {dtype}, not numbers; never unpickled")
                    order = "F" if fortran else "C"  # a header may claim more than there is
                    arrays[key] = np.ndarray(shape, dtype, stream.read(), order=order)
            return arrays
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise nearly anything on a damaged file
        raise UserError(f"{path}: {packed} bytes, cut short or damaged, or not an .npz (empty, a "
                        f"web page, an .npy?); log in, fetch it again ({e!r:.120})") from None


def load_data(path: str | Path, other: str = "") -> Data:
    """Load and check a file: training_set (N, 2, H, W), images and labels; optional are test_set
    and test_labels, both (M, H, W). Of any numeric dtype. Raises UserError.

    Args: other, a file whose test_set and test_labels take the place of the first one's.
    """
    path = test_path = find_data_file(path)
    arrays = read_npz(path)
    train = arrays["training_set"]
    check_shape(f"{path}: training_set", train, (0, 2, 0, 0))
    masks = to_labels(train[:, 1], f"{path}: training_set[:, 1]")
    if "test_set" in arrays:
        check_shape(f"{path}: test_set", arrays["test_set"], (0, *train.shape[2:]))
    sets = {"training_set[:, 0]": train[:, 0], "test_set": arrays.get("test_set", train[:0, 0])}
    scale = common_scale(path, sets)
    if other:
        test_path = find_data_file(other)
        arrays = read_npz(test_path, "test_set")
        check_shape(f"{test_path}: test_set", arrays["test_set"], (0, *train.shape[2:]))
        sets["test_set"] = arrays["test_set"]
        ends = {f"the scale of {path}": np.array(scale)[:, None, None]}
        low, high = common_scale(test_path, ends | {"test_set": arrays["test_set"]})
        if high - low > 1.1 * (scale[1] - scale[0]):  # a little more is clipped
            raise UserError(f"{test_path}: test_set lies far outside {scale}, the scale of {path}")
    images, test_images = (to_uint8(x, scale) for x in sets.values())
    sha256 = hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
    data = Data(path, sha256, images, masks, test_images,
                mean=float(images.mean()), std=max(1.0, float(images.std())))
    if len(test_images) == 0:
        data.notes.append("no test_set in the file: there will be scores and no submission")
    elif "test_labels" in arrays:
        check_shape(f"{test_path}: test_labels", arrays["test_labels"], test_images.shape)
        data.test_labels = to_labels(arrays["test_labels"], f"{test_path}: test_labels")
    constant = (images.min((1, 2)) == images.max((1, 2))).sum()
    if len(images) < 2 or constant == len(images) or not masks.any():
        raise UserError(f"{path}: nothing to learn: at least 2 images are needed, not all of a "
                        "constant grey, and not every training pixel labelled 0 (background)")
    absent = [CLASSES[c] for c in range(1, NUM_CLASSES) if not (masks == c).any()]
    copies = {image.tobytes() for image in images} & {image.tobytes() for image in test_images}
    if absent or copies or constant:
        data.notes.append(f"on no training pixel: {', '.join(absent) or 'no class'}; {constant} "
                          f"training images are constant; {len(copies)} test images are copies")
    return data


def check_shape(name: str, array: np.ndarray, wanted: tuple) -> None:
    """Raise UserError if an array is empty or of another shape than wanted, where 0 is any size."""
    orders = itertools.permutations(range(len(wanted))) if array.ndim == len(wanted) else []
    fitting = [order for order in orders if all(
        want in (0, array.shape[axis]) for want, axis in zip(wanted, order, strict=True))]
    if array.size == 0 or tuple(range(array.ndim)) not in fitting:
        cure = f"; transpose{fitting[0]} would fit" if fitting else ""
        raise UserError(f"{name} has shape {array.shape}; expected {wanted}, 0: any size{cure}")


def to_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Return labels as contiguous uint8; UserError if there are other numbers than 0 to 4."""
    bad = ~np.isin(labels, range(NUM_CLASSES))
    if not bad.any():
        return labels.astype(np.uint8, order="C")
    values, images = np.unique(labels), np.flatnonzero(bad.any((1, 2)))
    cures = {"labels - 1": [1, 2, 3, 4, 5],
             f"np.rint(labels / {values[-1] / 4:g})": values[-1] / 4 * np.arange(5),
             "np.where(labels == 255, 0, labels + 1)": [0, 1, 2, 3, 255]}  # NASA's numbers
    cure = "if these are the images, swap them: training_set[:, ::-1]"
    for expression, numbers in cures.items():
        if len(values) == len(numbers) and np.allclose(values, numbers):
            cure = f"{expression} turns them into ours"
    raise UserError(f"{name}: {bad.sum()} pixels in {len(images)} images (as {images[:5].tolist()}"
                    f") hold {np.unique(labels[bad])[:6].tolist()}, not labels 0 to 4; {cure}")


def common_scale(path: Path, sets: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the values that become grey 0 and 255 in all sets of images: 0 and 255, unless a value
    lies outside. UserError for NaN, or sets of different scales.

    Sets of fractions, 0 to 1, keep that scale, see to_uint8.
    """
    for key, images in sets.items():
        good = np.isfinite(images).all((1, 2))
        if not good.all():
            raise UserError(f"{path}: {key}: NaN or infinite pixels, first in image "
                            f"{good.argmin()}; replace them or drop the image")
    ends = {key: (float(x.min()), float(x.max())) for key, x in sets.items() if x.size}
    low = min(0.0, *(least for least, _ in ends.values()))
    high = max(0.0 if low else 255.0, *(most for _, most in ends.values()))
    for key, (least, most) in ends.items():
        white = 1 if is_fraction(sets[key], low) else high - low
        if 0 < (most - least) * 255 < 16 * white and len(ends) > 1:  # under 16 grey values
            raise UserError(f"{path}: the sets are not of one scale, from least to most: {ends}; "
                            "map both to 0 to 255")
    return low, high


def is_fraction(images: np.ndarray, low: float) -> bool:
    """Return whether 1 is white in images, of a scale that begins at low."""
    return low == 0 and images.dtype.kind in "bf" and images.size > 0 and images.max() <= 1


def to_uint8(images: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Return images of any numeric dtype as contiguous uint8 of a common_scale; fractions 0 to 1
    are multiplied by 255."""
    low, high = (0, 1) if is_fraction(images, scale[0]) else scale
    whole = np.empty(images.shape, np.uint8)
    for i, image in enumerate(images):  # one at a time: float64 is eight times as large
        grey = (image.astype(np.float64) - low) * 255 / (high - low)
        whole[i] = np.rint(grey).clip(0, 255)
    return whole


def fingerprint(data: Data) -> dict:
    """Return what identifies and describes the data; pixel_share has a value for each class."""
    shares = np.bincount(data.masks.ravel(), minlength=NUM_CLASSES) / data.masks.size
    return {"file": data.path.name, "sha256": data.sha256, "train_images": len(data.images),
            "test_images": len(data.test_images), "image_height": data.images.shape[1],
            "image_width": data.images.shape[2], "pixel_share": shares.round(5).tolist()}


def describe(data: Data) -> list[str]:
    """Return the fingerprint and the notes in lines for people."""
    facts = [f"      {name} {value}" for name, value in fingerprint(data).items()]
    return [f"data: {data.path}", *facts, *(f"note: {note}" for note in data.notes)]


# ------------------------------------------------------------------------------------- 2. outliers
#
# Outliers are tiles with an object drawn in, at any size, tilt and light; Mars does not repeat
# itself. Two images are linked if one affine map carries local features (SIFT, Lowe 2004) of the
# one to like features of the other, and the pixels there correlate. Frames may show one scene
# twice, but never mirrored and hardly turned: the points that a turned link carries, or several
# links, are an object's, and what shares an object is an outlier. Where there are too many images
# to compare each with each, the autoencoder names the strangest ones, the candidates. Outliers
# among them are the exemplars that all images are compared with.

MAX_SHARE = 0.3            # a cut that takes out more of the images is likelier wrong than they are
CANDIDATES = 192           # the strangest images, compared with one another
EXEMPLARS = 42             # outliers that all images are compared with, at most
POINTS = 60                # of an image, the strongest
MATCHES = 4                # points that a link carries, at least
ALIKE, SURE = 0.85, 0.925  # cosine of matching descriptors, at least; of one match of a link
# where a descriptor's 4×4 histograms of 8 directions lie in that of the mirror image
MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1, :, -np.arange(8)].ravel()


def autoencoder_error(images: np.ndarray, masks: np.ndarray, seed: int) -> np.ndarray:
    """Return each image's largest reconstruction error, (N,); NaN if the training diverged.

    It is weighted by the labelled share: the rover is strange too, but unlabelled. The last bits
    depend on the number of threads, which main() sets to one.
    """
    height, width = (8 * round(min(8 * n / min(images.shape[1:]), 32)) for n in images.shape[1:])

    def shrink(layers: np.ndarray, factor: int) -> torch.Tensor:
        size = width // factor, height // factor
        small = [cv2.resize(np.float32(layer), size, interpolation=cv2.INTER_AREA)
                 for layer in layers]
        return torch.from_numpy(np.stack(small))[:, None]

    x = shrink(images, 2)
    x = (x - x.mean()) / (x.std() + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 5, 2, 2),
            nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1))
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(autoencoder.parameters(), 5e-3)
    for _ in range(100):
        batch = x[rng.integers(len(x), size=32)]
        loss = F.mse_loss(autoencoder(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = torch.cat([(autoencoder(part) - part) ** 2 for part in x.split(CHUNK)])
    error = F.avg_pool2d(error, 4) * shrink(masks > 0, 8) ** 2
    return F.avg_pool2d(error, 3, 1, 1).amax((1, 2, 3)).numpy()


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation of two vectors of grey values, 0 where one is flat."""
    x, y = x - x.mean(), y - y.mean()
    return x @ y / math.sqrt((x @ x) * (y @ y) + 1)


class Features:
    """The points of detail of images with masks, each uint8 (H, W), of the first one's scale."""

    def __init__(self, images: list[np.ndarray], masks: list[np.ndarray], pmap=map):
        self.scale = 64 / min(images[0].shape)
        self.points = np.zeros((len(images), POINTS, 2), np.float32)  # x, y in 64ths of a side
        self.labelled = np.zeros((len(images), POINTS), bool)
        self.descriptors = torch.zeros(len(images), POINTS, 128)      # 0: there is no such point
        self.small = list(pmap(lambda image: self.resize(image, 1), images))

        def detect(i: int) -> None:
            large = self.resize(images[i], 3)  # as objects may be small
            mask = cv2.resize(masks[i], large.shape[::-1], interpolation=cv2.INTER_NEAREST)
            sift = cv2.SIFT_create(POINTS, contrastThreshold=0.03)
            keypoints, found = sift.detectAndCompute(large, None)
            for k, keypoint in enumerate(keypoints[:POINTS]):
                column, row = map(int, keypoint.pt)
                self.points[i, k] = (np.array(keypoint.pt) - 1) / 3  # of pixels' centres
                self.labelled[i, k] = mask[row, column] > 0
                # Hellinger's distance in place of Euclid's (Arandjelović and Zisserman 2012)
                root = np.sqrt(found[k] / max(found[k].sum(), 1))
                self.descriptors[i, k] = torch.from_numpy(root)

        list(pmap(detect, range(len(images))))

    def resize(self, image: np.ndarray, factor: int) -> np.ndarray:
        """Return an image whose shorter side would be factor × 64 long if it were the first one."""
        scale = factor * self.scale
        size = [max(1, round(side * scale)) for side in image.shape[::-1]]
        smooth = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
        return cv2.resize(image, size, interpolation=smooth)

    def share_object(self, one: int, others: np.ndarray, whole: bool = False) -> np.ndarray:
        """Return which of the others share an object with an image, bool (len(others),): points
        that a turned link carries, or four links; the image is itself the object if whole."""
        carried = np.zeros((len(others), POINTS), bool)
        turned = np.zeros(len(others), bool)
        for k, first, partners in self.matches(one, others):
            if others[k] != one:
                fits, turns = self.link(one, first, others[k], partners)
                carried[k, first[fits]] = True
                turned[k] |= turns
        on_object = carried[turned].any(0) | (carried.sum(0) >= 4) | whole
        return (carried & on_object).sum(1) >= MATCHES

    def matches(self, one: int, others: np.ndarray):
        """Yield (index into others, points of one, their partners) wherever an image, or its mirror
        image, has points that are like another's. Pairs of points of which neither is labelled do
        not count: the rover's parts look alike."""
        own = self.descriptors[one]
        starts = range(0, len(others), 64)  # the likenesses of so many stay in the cache
        for start, descriptors in itertools.product(starts, (own, own[:, MIRRORED])):
            part = others[start:start + 64]
            likeness = self.descriptors[part] @ descriptors.T  # cosines (64, theirs, own)
            # to whom of the others' points is an own point the likeliest, and the reverse?
            most, partner = likeness.max(1)
            back = likeness.argmax(2).gather(1, partner)
            most, partner = most.numpy(), partner.numpy()
            good = (back == torch.arange(POINTS)).numpy() & (most > ALIKE)
            good &= self.labelled[one] | np.take_along_axis(self.labelled[part], partner, 1)
            enough = (good.sum(1) >= MATCHES) & (np.where(good, most, 0).max(1) > SURE)
            for k in np.flatnonzero(enough):
                first = np.flatnonzero(good[k])
                yield start + k, first, partner[k, first]

    def link(self, one: int, first: np.ndarray, other: int,
             second: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return which of an image's points one affine map carries to their partners, bool, none if
        there is no link; and whether the map mirrors, turns or resizes, of five points or more."""
        start, end = self.points[one, first], self.points[other, second]
        warp, fits = cv2.estimateAffine2D(start, end, ransacReprojThreshold=2, maxIters=100)
        no_link = np.zeros(len(first), bool), False
        if warp is None or fits.sum() < MATCHES:
            return no_link
        fits = fits[:, 0] > 0
        start, end = start[fits], end[fits]
        # a blob has several features: of those in one square of 2×2 one counts
        count = min(len(np.unique(np.rint(side / 2) @ (1, 1j))) for side in (start, end))
        long, short = np.linalg.svd(warp[:, :2], compute_uv=False)
        if count < MATCHES or long > 6 or short < 1 / 6 or long > 2.6 * short:
            return no_link
        large, small = self.small[one], self.small[other]
        if long * short > 1:  # whichever is larger is shrunk to the other's size
            large, small, end = small, large, start
            warp, long, short = cv2.invertAffineTransform(warp), 1 / short, 1 / long
        blurred = cv2.GaussianBlur(large, (0, 0), 0.01 + 0.5 * math.sqrt(1 / (long * short) - 1))
        moved = cv2.warpAffine(np.float32(blurred), warp, small.shape[::-1], borderValue=-1)
        area = cv2.fillConvexPoly(np.zeros_like(small), cv2.convexHull(np.int32(np.rint(end))), 1)
        overlap = moved >= 0
        there = (cv2.dilate(area, np.ones((7, 7))) > 0) & overlap
        same_image = overlap.mean() > 0.5 and correlation(moved[overlap], small[overlap]) > 0.95
        # the fewer the points, the better must the pixels agree
        if same_image or correlation(moved[there], small[there]) < 0.9 - 0.075 * count:
            return no_link
        return fits, fits.sum() > MATCHES and np.abs(warp[:, :2] - np.eye(2)).max() > 0.5


def find_outliers(images: np.ndarray, masks: np.ndarray, template: np.ndarray | None = None,
                  seed: int = 0, log=print, pmap=map) -> pd.DataFrame:
    """Return the images to take out: `index` (ascending); `links`, the exemplars that share an
    object with each; and `autoencoder_error`.

    Args: images, masks, (N, H, W); template, uint8 (h, w) in the images' pixels: the first
    exemplar, in place of those among the candidates.
    Raises: UserError if the template is larger than the images or has too few points.
    """
    if template is not None and (np.array(template.shape) > images.shape[1:]).any():
        raise UserError(f"the template, {template.shape}, is larger than the images, "
                        f"{images.shape[1:]}: crop a picture to the object")
    images, masks = np.uint8(np.nan_to_num(images)), np.uint8(masks)
    error = autoencoder_error(images, masks, seed)
    if np.isnan(error).any():
        log("cleaning: the autoencoder diverged; the first images are its candidates")
    first = {}  # of equal images
    original = np.array([first.setdefault(image.tobytes(), i) for i, image in enumerate(images)])
    different = np.unique(original)
    if template is None:
        features = Features(images, masks, pmap)
        candidates = different[np.argsort(-error[different], kind="stable")[:CANDIDATES]]
        new = np.zeros(0, int)
        for part in (candidates[k::3] for k in range(3)):
            if len(new) < EXEMPLARS:  # else these are enough
                rows = pmap(lambda one: features.share_object(one, candidates), part)
                new = np.append(new, part[[row.any() for row in rows]])[:EXEMPLARS]
    else:
        features = Features([*images, template], [*masks, np.ones_like(template)], pmap)
        if features.labelled[-1].sum() < 2 * MATCHES:
            raise UserError(f"the template has {features.labelled[-1].sum()} points of detail, "
                            f"{2 * MATCHES} are needed: crop a picture to the object")
        new = np.array([len(images)])
    exemplars, links = np.zeros(0, int), np.zeros(len(images) + (template is not None), int)
    rows, member = np.zeros((0, len(different)), bool), links > 0
    while len(new):
        exemplars = np.append(exemplars, new)
        shared = pmap(lambda one: features.share_object(one, different, one == len(images)), new)
        rows = np.vstack([rows, *shared])
        links[different] = rows.sum(0)
        links[len(images):] = 1  # the template
        # an exemplar without a link from another is none; one link in 40 may be by chance
        links[different] = rows[links[exemplars] > 0].sum(0)
        member = links[:len(images)] > len(exemplars) / 40
        new = np.setdiff1d(np.flatnonzero(member), exemplars)[:EXEMPLARS - len(exemplars)]
    outliers = np.flatnonzero(member[original])
    if too_much(outliers, masks, log):
        outliers = outliers[:0]
    return pd.DataFrame({"index": outliers, "links": links[original[outliers]],
                         "autoencoder_error": error[outliers]})


def too_much(outliers: np.ndarray, masks: np.ndarray, log) -> bool:
    """Return, and say, whether more than MAX_SHARE of the images, or all of a class, would go."""
    lost = np.setdiff1d(masks, np.delete(masks, outliers, 0))
    if len(outliers) <= MAX_SHARE * len(masks) and not len(lost):
        return False
    whole = f" and the whole of class {lost[0]}" if len(lost) else ""
    log(f"cleaning: {len(outliers)} of {len(masks)} images{whole} would go: refused")
    return True


def clean_data(data: Data, state: Path, template: str, seed: int, ranks: Ranks, pmap=map) -> None:
    """Take the outliers out of data's images and masks; outliers.csv beside state says why. It is
    decided once: a run that goes on trains on the same images."""
    start = time.monotonic()

    def decide() -> dict:
        example = cv2.imread(template, cv2.IMREAD_GRAYSCALE) if template else None
        if template and example is None:
            raise UserError(f"--template {template}: not a picture that OpenCV can read")
        found = find_outliers(data.images, data.masks, template=example, seed=seed, log=warn,
                              pmap=pmap)
        with atomic_write(state.parent / "outliers.csv") as f:
            f.write(found.to_csv(index=False).encode())
        return {"index": found["index"].tolist()}

    index = np.array(once(state / "cleaned.pt", ranks, decide)["index"], np.int64)
    say(f"cleaning: {len(index)} of {len(data.images)} training images are outliers "
        f"({state.parent / 'outliers.csv'}), {time.monotonic() - start:.0f} s")
    data.images = np.delete(data.images, index, 0)
    data.masks = np.delete(data.masks, index, 0)


# --------------------------------------------------------------------------------------- 3. frames
# Tiles are cells of camera frames. Pairs of borders are compared, and frames grow greedily
# (Gallagher 2012). x and y are the cosine spectra of what stands on a border's two sides: the log
# brightness of three lines and their log roughness, 4 values a frequency f.
# Model. Of neighbours z = (x, y) is Gaussian with mean 0 and covariance C[f]; of unrelated tiles
# with U[f], which is C[f] without the blocks between x and y. The log-likelihood ratio is, but for
# a constant, r = sum over f of z' Q[f] z / 2, where Q[f] = inverse(U[f]) - inverse(C[f]).
# Fit. A cut through the tiles is a border with known neighbours. C is fitted to some cuts. At more,
# each left part looks for its right part among those of half the tiles: half have no neighbour.
# A logistic regression learns a pair's log-odds from r and the pixels. The share s of real borders
# with a neighbour is found by expectation-maximisation (Saerens et al. 2002). At s = 1/2, as in the
# fit, one of N pairs is true: log-odds + log(N) is a log-likelihood ratio. The log-odds of a join
# are a pair's prior log-odds plus the ratios of all pairs that come to touch.

MAX_ROWS, MAX_COLUMNS = 8, 4  # of a frame: 1024×1024 pixels, cut into cells of 128×256


def _lines(tiles: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log brightness on both sides of a cut (at column 0: of two borders), nearest first,
    two (N, H, 4)."""
    before = tiles[:, :, [column - 1, column - 2, column - 3, column - 4]]
    after = tiles[:, :, [column, column + 1, column + 2, column + 3]]
    return torch.log(before.float() + 8), torch.log(after.float() + 8)  # 8: noise of dark pixels


def _spectra(lines: torch.Tensor) -> torch.Tensor:
    """Return the cosine spectra (N, H, 4) of three lines and of the log roughness across them."""
    roughness = torch.log((lines[:, :, :1] - lines[:, :, 1:2]).abs() + 0.01)
    k = torch.arange(lines.shape[1], device=lines.device)
    cosines = torch.cos(math.pi / len(k) * k[:, None] * (k + 0.5))
    return cosines @ torch.cat([lines[:, :, :3], roughness], 2)


def _fit_gaussian(tiles: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Return the forms Q (H, 8, 8), fitted to cuts."""
    pairs = [torch.cat([_spectra(side) for side in _lines(tiles, cut)], 2) for cut in cuts]
    z = torch.cat(pairs).double()
    covariance = torch.einsum("nfk,nfl->fkl", z, z) / len(z)
    # nearby frequencies are alike; frequency 0, the mean brightness, is not
    smooth = [covariance[max(1, f - 3):f + 4].mean(0) for f in range(1, len(covariance))]
    covariance[1:] = torch.stack(smooth)
    ridge = 1e-6 * covariance.diagonal(dim1=1, dim2=2).sum(1) + 1e-9  # black tiles have no variance
    covariance += ridge[:, None, None] * torch.eye(8).to(z)
    same_side = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).to(z)
    return (torch.linalg.inv(covariance * same_side) - torch.linalg.inv(covariance)).float()


def _candidates(before, after, forms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return likely pairs of borders, given by lines, as two indices (P,), and features (P, 8)."""
    x, y = _spectra(before), _spectra(after)
    ratios = torch.einsum("nfk,fkl->nfl", x, forms[:, :4, 4:]).flatten(1) @ y.flatten(1).T
    ratios += torch.einsum("nfk,fkl,nfl->n", x, forms[:, :4, :4], x)[:, None] / 2
    ratios += torch.einsum("nfk,fkl,nfl->n", y, forms[:, 4:, 4:], y) / 2
    count = min(10, *ratios.shape)  # 16 hold under 0.5 % more of the true pairs
    best_after, best_before = ratios.topk(count, 1), ratios.topk(count, 0)
    listed = torch.zeros_like(ratios, dtype=torch.bool)
    listed.scatter_(1, best_after.indices, True)
    listed.scatter_(0, best_before.indices, True)
    first, second = listed.nonzero(as_tuple=True)
    ratio = ratios[first, second]
    evidence = [ratio]
    for best in (best_after.values[first], best_before.values.T[second]):
        best_other = torch.where(ratio < best[:, 0], best[:, 0], best[:, 1])
        evidence.append(ratio - best_other)
    evidence = torch.asinh(torch.stack(evidence, 1) / 3)
    chunks = zip(first.split(8192), second.split(8192), strict=True)  # a pair's lines are 4 kB
    continuity = torch.cat([_continuity(before[i], after[j]) for i, j in chunks])
    return first, second, torch.cat([evidence, continuity], 1)


def _continuity(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return features (P, 5) of how the brightness goes on between lines (P, H, 4)."""
    sides = torch.stack([before, after])
    roughness = (sides[..., :3] - sides[..., 1:]).abs().mean(3) + 0.01
    step, inner_step = (before - after)[..., :2].unbind(2)
    jump = (1.5 * step - 0.5 * inner_step).abs()  # both sides drawn on to the border
    log_jump = (jump.mean(1) + 0.01).log()
    relative_jump = (jump / roughness.sum(0) + 0.1).log().mean(1)
    log_step = (step.mean(1).abs() + 0.003).log()
    return torch.stack([log_jump, relative_jump, log_step, *roughness.log().mean(2)], 1)


def _regress(known: torch.Tensor, truth: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return log-odds by logistic regression on products of two features, fitted to known pairs."""
    def products(x):
        x = ((x - known.mean(0)) / (known.std(0) + 1e-3)).clamp(-4, 4).double()
        x = torch.column_stack([x, torch.ones_like(x[:, 0])])
        i, j = torch.triu_indices(x.shape[1], x.shape[1])
        return x[:, i] * x[:, j]

    x, y = products(known), truth.double()
    weight = torch.zeros_like(x[0])
    for _ in range(12):  # Newton's method, with a ridge of 1
        p = torch.sigmoid(x @ weight)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + torch.eye(len(weight)).to(x)
        weight += torch.linalg.solve(hessian, x.T @ (y - p) - weight)
    # one border alone is never trusted further than 665 : 1
    return (products(features) @ weight).clamp(-30, 6.5)


def _usable(lines: torch.Tensor) -> torch.Tensor:
    """Return which borders, bool (N,), are neither flat sky nor a camera frame's edge."""
    outermost = lines[:, :, 0]
    flat = outermost.amax(1) - outermost.amin(1) < 0.02
    # Navcam frames' first and last rows are 1.5 times as bright, and would match. At 96 % of upper
    # and lower frame edges nearly all pixels step one way, elsewhere at under 0.5 %.
    low, high = (outermost - lines[:, :, 1]).quantile(lines.new_tensor([0.25, 0.75]), 1)
    return ~flat & (low <= 0.08) & (high >= -0.08)


def _find_links(tiles: torch.Tensor) -> tuple[list[tuple[float, int, int]], float]:
    """Return likely pairs (log-likelihood ratio, left tile, right tile) and the prior log-odds."""
    n, _, width = tiles.shape
    runs = max(1, min(12, 8000 // n))  # with 4 runs the log-odds of 240 tiles were too high
    cuts = np.linspace(4, width - 4, 2 * runs + 3).astype(int)[1:-1].tolist()
    forms = _fit_gaussian(tiles, cuts[::2])
    generator, known, truth = torch.Generator().manual_seed(0), [], []
    for cut in cuts[1::2]:
        before, after = _lines(tiles, cut)
        kept = torch.randperm(n, generator=generator)[:(n + 1) // 2].to(tiles.device)
        first, second, features = _candidates(before, after[kept], forms)
        # a lead alone would be trusted (71 % of 200 unrelated tiles joined): true cuts always lead
        hidden = torch.rand(len(features), 2, generator=generator) < 0.1
        features[:, 1:3].masked_fill_(hidden.to(tiles.device), 0)
        known.append(features)
        truth.append(kept[second] == first)
    right, left = _lines(tiles, column=0)
    first, second, features = _candidates(right, left, forms)
    usable = _usable(right)[first] & _usable(left)[second] & (first != second)
    log_odds = _regress(torch.cat(known), torch.cat(truth), features[usable]).cpu().numpy()
    first, second = first[usable].tolist(), second[usable].tolist()
    odds, share = np.bincount(first, np.exp(log_odds), n), 0.5
    for _ in range(50):
        share = np.clip((odds * share / (odds * share + 1 - share)).mean(), 1e-4, 0.95)
    ratios = (log_odds + math.log(n)).tolist()
    return list(zip(ratios, first, second, strict=True)), math.log(share / (1 - share) / n)


def _grow_frames(n: int, links: list[list], priors: list[float]) -> list[dict]:
    """Return the frames of two tiles or more, dicts from (row, column) to tile."""
    queue, ratios = [], {}
    for down, pairs in enumerate(links):
        for ratio, first, second in pairs:
            if ratio + priors[down] > -5:
                queue.append((-ratio, first, second, down, 1 - down))
            ratios[first, second, down, 1 - down] = ratio
            ratios[second, first, -down, down - 1] = ratio
    unlisted = -5  # the ratio of other pairs, of which 1 % of the true ones are
    frames = [{(0, 0): tile} for tile in range(n)]
    cell_of = {tile: (tile, 0, 0) for tile in range(n)}  # frame, row, column
    for least in (9, 3, 0):  # the surest first; what waits may become likely as more tiles touch
        waiting = []
        for link in sorted(queue):
            _, first, second, down, right = link
            into, row, column = cell_of[first]
            gone, old_row, old_column = cell_of[second]
            dr, dc = row + down - old_row, column + right - old_column
            cells = frames[into]
            moved = {(r + dr, c + dc): tile for (r, c), tile in frames[gone].items()}
            rows, columns = (max(line) - min(line) + 1 for line in zip(*cells, *moved, strict=True))
            too_large = rows > MAX_ROWS or columns > MAX_COLUMNS
            if into == gone or too_large or not cells.keys().isdisjoint(moved):
                continue
            log_odds = priors[down]
            for (r, c), tile in moved.items():
                for below, beside in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                    near = cells.get((r + below, c + beside))
                    if near is not None:
                        log_odds += ratios.get((tile, near, below, beside), unlisted)
            if log_odds < least:
                waiting.append(link)
                continue
            cells.update(moved)
            frames[gone] = {}
            cell_of.update((tile, (into, r, c)) for (r, c), tile in moved.items())
        queue = waiting
    return [cells for cells in frames if len(cells) > 1]


def assemble_frames(images: np.ndarray, device="cpu", pmap=map) -> np.ndarray:
    """Return each tile's frame, row and column, int32 (3, N); frame -1: without neighbours."""
    place = np.array([[-1], [0], [0]], np.int32).repeat(len(images), 1)
    if len(images) < 4 or min(images.shape[1:]) < 16:  # nothing can be fitted
        return place
    tiles = torch.from_numpy(images).to(device)
    beside, below = tiles, tiles.transpose(1, 2)
    links, priors = zip(*pmap(_find_links, (beside, below)), strict=True)
    for number, cells in enumerate(_grow_frames(len(images), links, priors)):
        members, positions = list(cells.values()), np.array(list(cells))
        place[0, members] = number
        place[1:, members] = (positions - positions.min(0)).T
    return place


def find_frames(data: Data, state: Path, device: torch.device, ranks: Ranks,
                pmap=map) -> np.ndarray | None:
    """Return assemble_frames' place (3, N + M) of the training and then the test tiles, None if all
    tiles are alone; found once, and kept in the folder state."""
    start = time.monotonic()
    tiles = np.concatenate([data.images, data.test_images])
    digest = hashlib.sha256(tiles).hexdigest()

    def find() -> dict:
        own_map = map if device.type == "cuda" else pmap  # a GPU has threads enough
        return {"place": torch.from_numpy(assemble_frames(tiles, device, own_map))}

    path = state / f"frames_{digest[:12]}.pt"  # another test set has frames of its own
    place = once(path, ranks, find)["place"].numpy()
    placed = 100 * np.mean(place[0] >= 0)
    say(f"frames: {placed:.0f} % of {place.shape[1]} tiles put back into {place[0].max() + 1} "
        f"frames, {time.monotonic() - start:.0f} s")
    return place if place[0].max() >= 0 else None


@dataclass(frozen=True)
class Frames:
    """Where tiles lie: a frame is a grid of cells, one a tile, and has a ring of cells around it.

    A cell of the ring, or one whose tile is missing, shows a mirror image of the nearest tile.
    """

    place: torch.Tensor        # int64 (3, T): each tile's frame, row and column
    size: torch.Tensor         # int64 (F, 2): rows and columns of each frame
    tile_at: torch.Tensor      # int64 (F, rows + 2, columns + 2): the tile seen, from row -1 on
    known: torch.Tensor        # bool, the same shape: the tile itself, not a mirror image
    upside_down: torch.Tensor  # bool, the same shape: how the image is mirrored
    left_right: torch.Tensor

    @classmethod
    def lay_out(cls, place: np.ndarray | None, num_tiles: int) -> Frames:
        """Return the grids of a place (3, T) of assemble_frames; None: each tile is a frame."""
        if place is None:
            place = np.repeat([[-1], [0], [0]], num_tiles, 1)
        frame, row, column = place.astype(np.int64)
        alone = frame < 0
        frame[alone] = frame.max() + 1 + np.arange(alone.sum())
        frame = np.unique(frame, return_inverse=True)[1]
        size = np.zeros((frame.max() + 1, 2), np.int64)
        np.maximum.at(size, frame, np.stack([row, column], 1) + 1)
        tile_at = np.full((len(size), *size.max(0) + 2), -1)
        tile_at[frame, row + 1, column + 1] = np.arange(num_tiles)
        known = tile_at >= 0
        # the distance between frames is so large that the nearest tile is of the same frame
        nearest = scipy.ndimage.distance_transform_edt(
            ~known, sampling=(1e4, 1, 1), return_distances=False, return_indices=True)
        apart = nearest - np.indices(known.shape)
        tables = (np.stack([frame, row, column]), size, tile_at[tuple(nearest)], known,
                  apart[1] % 2 == 1, apart[2] % 2 == 1)
        return cls(*map(torch.from_numpy, tables))

    def area(self, tile: tuple[int, int], rim: int) -> float:
        """Return the pixels of all frames, with so many pixels around each, in tiles."""
        pixels = (self.size.cpu().numpy() * tile + 2 * rim).prod(1).sum()
        return float(pixels / np.prod(tile))

    def to(self, device: torch.device) -> Frames:
        return Frames(*(table.to(device) for table in vars(self).values()))

    def pixels(self, frame: torch.Tensor, top: torch.Tensor, left: torch.Tensor,
               window: tuple[int, int], tile: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of all tiles' T·H·W pixels is seen where in windows of frames, int64
        (B, height, width), and whether it lies there, bool.

        Args: frame, top, left, integers (B,), top and left in pixels, at most a tile outside the
        frame; window and tile, height and width in pixels.
        """
        h, w = tile
        device = frame.device
        y = top[:, None] + torch.arange(window[0], device=device) + h  # row 0 is the ring's
        x = left[:, None] + torch.arange(window[1], device=device) + w
        cell = frame[:, None, None], (y // h)[:, :, None], (x // w)[:, None]
        y, x = (y % h)[:, :, None], (x % w)[:, None]
        y = torch.where(self.upside_down[cell], h - 1 - y, y)
        x = torch.where(self.left_right[cell], w - 1 - x, x)
        return (self.tile_at[cell] * h + y) * w + x, self.known[cell]

    def batches(self, wanted: np.ndarray, num_tiles: int) -> list[np.ndarray]:
        """Return the frames that hold a wanted tile, bool (T,), in arrays of frames of one size
        that hold about num_tiles tiles."""
        index = np.unique(self.place[0].cpu().numpy()[wanted])
        size = self.size.cpu().numpy()
        parts = []
        for rows, columns in np.unique(size[index], axis=0):
            same = index[(size[index] == (rows, columns)).all(1)]
            count = max(1, num_tiles // (rows * columns))
            parts += [same[start:start + count] for start in range(0, len(same), count)]
        return parts

    def join(self, frames: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return frames of one size, (B, C, rows · H, columns · W), of all tiles' values
        (T, C, H, W), mirrored where a tile is missing."""
        rows, columns = self.size[frames[0]].tolist()
        inside = torch.from_numpy(frames), slice(1, rows + 1), slice(1, columns + 1)
        tables = self.tile_at, self.upside_down, self.left_right
        tiles, upside_down, left_right = (table[inside].numpy() for table in tables)
        cells = values[tiles]  # (B, rows, columns, C, H, W)
        cells[upside_down] = cells[upside_down][..., ::-1, :]
        cells[left_right] = cells[left_right][..., ::-1]
        b, _, _, c, h, w = cells.shape
        return cells.transpose(0, 3, 1, 4, 2, 5).reshape(b, c, rows * h, columns * w)

    def split(self, frames: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tiles that lie in frames of one size, (K,), and their parts (K, C, H, W) of
        values of these frames, (B, C, rows · H, columns · W)."""
        rows, columns = self.size[frames[0]].tolist()
        b, c, height, width = values.shape
        grid = values.reshape(b, c, rows, height // rows, columns, width // columns)
        inside = torch.from_numpy(frames), slice(1, rows + 1), slice(1, columns + 1)
        known = self.known.cpu()[inside].numpy()
        tiles = self.tile_at.cpu()[inside].numpy()
        return tiles[known], grid.transpose(0, 2, 4, 1, 3, 5)[known]


# -------------------------------------------------------------------------------------- 4. context
#
# Where the labels of a frame's other tiles say "sand", a tile nearby is likelier to be sand. What
# they say is a log-ratio for each class and each cell of CELL × CELL pixels: the class's share
# among the labels nearby over its share among all labels. A weight times it is added to the
# log-probabilities; the weight is fitted out of fold. To fold k the labels of fold k are hidden.

CELL = 8     # pixels
REACH = 1.5  # cells: the standard deviation of a label's say; further off the network itself sees


def frame_canvas(tiles: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the frames of tiles (T, C, h, w) as (F, C, rows, h, columns, w), 0 without a tile."""
    inside = place[0] >= 0
    frame, row, column = place[:, inside]
    _, c, h, w = tiles.shape
    canvas = np.zeros((frame.max() + 1, c, row.max() + 1, h, column.max() + 1, w), tiles.dtype)
    canvas[frame, :, row, :, column] = tiles[inside]
    return canvas


def pool_frames(cells: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return for each cell its frame's cells nearby, float32 (T, C, h, w), weighted by a Gaussian
    of REACH and added up; the weights sum to 1. Without a frame, or a tile there, it is 0."""
    canvas = frame_canvas(cells, place)
    f, c, rows, h, columns, w = canvas.shape
    flat = canvas.reshape(f, c, rows * h, columns * w)
    flat = scipy.ndimage.gaussian_filter(flat, (0, 0, REACH, REACH), mode="constant")
    inside = place[0] >= 0
    frame, row, column = place[:, inside]
    pooled = np.zeros(cells.shape, np.float32)
    pooled[inside] = flat.reshape(canvas.shape)[frame, :, row, :, column]
    return pooled


def class_cells(masks: np.ndarray) -> np.ndarray:
    """Return the share of each class in each cell, float32 (N, C, h, w), of masks (N, H, W)."""
    size = [max(1, round(side / CELL)) for side in masks.shape[1:]]
    parts = []
    for part in torch.from_numpy(masks).split(CHUNK):
        one_hot = F.one_hot(part.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()
        parts.append(F.adaptive_avg_pool2d(one_hot, size).numpy())
    return np.concatenate(parts)


def context_log_ratios(masks: np.ndarray, fold_of: np.ndarray, place: np.ndarray,
                       pmap=map) -> np.ndarray:
    """Return each fold's log-ratios of all tiles' cells, float32 (folds, T, C, h, w).

    The overall shares count as a little ground nearby, so that few labels say little.
    Args: masks (N, H, W) of the first N tiles; fold_of (N,) of at least two folds; place (3, T).
    """
    more = place.shape[1] - len(masks)  # test tiles, without labels
    shares = np.pad(class_cells(masks), ((0, more), (0, 0), (0, 0), (0, 0)))
    shares[:, 0] = 0
    fold_of = np.pad(fold_of, (0, more), constant_values=TEST_FOLD)

    def one_fold(fold: int) -> np.ndarray:
        seen = shares * (fold_of != fold)[:, None, None, None]
        total = seen.sum((0, 2, 3))[:, None, None]
        overall = total / max(total.sum(), 1) + 1e-6
        near = pool_frames(seen, place)
        all_near = near.sum(1, keepdims=True)
        ratios = np.log((near + 0.02 * overall) / ((all_near + 0.02) * overall))
        ratios[:, 0] = 0
        return ratios

    return np.stack(list(pmap(one_fold, range(fold_of.max() + 1))))


def apply_context(probs: np.ndarray, log_ratios: np.ndarray, weight: float) -> np.ndarray:
    """Return probs (B, C, H, W) times exp(weight · log_ratios), normalised; background stays 0.

    Shape: log_ratios float32 (B, C, h, w), of any coarser grid.
    """
    fine = torch.from_numpy(weight * log_ratios)
    fine = F.interpolate(fine, probs.shape[2:], mode="bilinear").exp_().numpy()
    out = fine * np.maximum(probs, 0.002)  # a byte knows no less
    out[:, 0] = 0
    return out / out.sum(1, keepdims=True)


def fit_context_weight(probs: np.ndarray, log_ratios: np.ndarray, masks: np.ndarray,
                       pmap=map) -> float:
    """Return the weight, 0 to 1, of the best mean IoU of out-of-fold probs, bytes (N, C, H, W)."""
    truth = masks[:, 2::4, 2::4]
    coarse = from_bytes(probs[..., 2::4, 2::4])

    def score(weight: float) -> float:
        labels = apply_context(coarse, log_ratios, weight).argmax(1)
        return iou_scores(confusion_matrix(truth, labels))[0]

    weights = (0, 0.5, 1)  # 1.5 wins here, but not where whole frames are decided
    scores = list(pmap(score, weights))
    best = int(np.argmax(scores))  # of equals the smaller weight
    say(f"frames: context weight {weights[best]}, out of fold {scores[0]:.4f} → "
        f"{scores[best]:.4f} on a part of the pixels")
    return weights[best]


def keep_classes(before: np.ndarray, after: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return probabilities (B, C, H, W): of the classes kept, bool (C,), those before; the others
    share the rest as they do after."""
    rest = 1 - before[:, kept].sum(1, keepdims=True)
    others = np.maximum(after[:, ~kept].sum(1, keepdims=True), 1e-6)
    out = after * rest / others
    out[:, kept] = before[:, kept]
    return out


# ---------------------------------------------------------------------------------------- 5. folds

def rare_classes(masks: np.ndarray) -> np.ndarray:
    """Return which classes are rare, bool (NUM_CLASSES,): under 2 % of the labelled pixels."""
    counts = np.bincount(masks.ravel(), minlength=NUM_CLASSES)
    counts[0] = 0
    return (counts > 0) & (counts < 0.02 * counts.sum())


def make_folds(images: np.ndarray, masks: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, int (N,); fold k validates the networks trained on the others.

    Stratified by "holds a rare class" and by dominant class, because six rock images in a
    validation set decide nothing. Equal images share a fold. folds = 1 is one split: every
    7th image (14.3 %) is fold 0, the rest are -1.
    Raises: UserError if there are fewer different images than folds.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    n = len(images)
    group = np.unique(images.reshape(n, -1), axis=0, return_inverse=True)[1].ravel()
    counts = np.stack([np.bincount(group, (masks == c).sum((1, 2))) for c in range(NUM_CLASSES)], 1)
    if len(counts) < max(2, folds):
        raise UserError(f"--folds {folds}: only {len(counts)} training images differ")
    holds_rare = (counts[:, rare_classes(masks)] > 0).any(1)
    stratum = counts.argmax(1) + NUM_CLASSES * holds_rare
    order = rng.permutation(len(counts))
    order = order[np.argsort(stratum[order], kind="stable")]
    fold_of = np.empty(len(counts), np.int64)
    fold_of[order] = np.arange(len(order)) % (folds if folds > 1 else 7)
    if folds == 1:
        fold_of[fold_of > 0] = -1
    return fold_of[group]


# --------------------------------------------------------------------------------- 6. augmentation

Batch = tuple[torch.Tensor, torch.Tensor]  # x float (B, C, H, W), y integer labels (B, H, W)


def flip(x: torch.Tensor, y: torch.Tensor, dim: int, gen: torch.Generator) -> Batch:
    """Mirror each image and its mask with probability ½; dim -1 is left-right, -2 up-down."""
    who = torch.rand(len(x), device=x.device, generator=gen) < 0.5
    x = torch.where(who[:, None, None, None], x.flip(dim), x)
    return x, torch.where(who[:, None, None], y.flip(dim), y)


def affine(x: torch.Tensor, y: torch.Tensor, gen: torch.Generator, shift: float, scale: float,
           degrees: float, p: float = 0.5) -> Batch:
    """Move, zoom and turn each image with probability p, mirrored at the border.

    Args: shift, a share of the side; scale, ± about 1; degrees, ± about 0; each drawn uniformly.
    """
    b, _, h, w = x.shape
    u = torch.rand(5, b, device=x.device, generator=gen) * 2 - 1
    u = u * (u[4] < 2 * p - 1)
    angle = u[2] * (degrees * np.pi / 180)
    zoom = 1 / (1 + u[3] * scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # affine_grid works in coordinates of -1..1 on both sides, so a turn needs the aspect ratio
    theta = torch.stack([cos, sin * (h / w), u[0] * 2 * shift,
                         -sin * (w / h), cos, u[1] * 2 * shift], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), [b, 1, h, w], align_corners=False)
    x = F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)
    moved = F.grid_sample(y[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    return x, moved[:, 0].to(y.dtype)


def jitter(x: torch.Tensor, gen: torch.Generator, amount: float, p: float = 0.5) -> torch.Tensor:
    """Change brightness and contrast of channel 0 by up to ± amount, each with probability p."""
    u = torch.rand(3, len(x), 1, 1, device=x.device, generator=gen) * 2 - 1
    u = u * (u[2] < 2 * p - 1)
    image = x[:, 0] * (1 + amount * u[0]) + 2 * amount * u[1]
    return torch.cat([image[:, None], x[:, 1:]], 1)


def copy_paste(x: torch.Tensor, y: torch.Tensor, donor_x: torch.Tensor, donor_y: torch.Tensor,
               gen: torch.Generator, p: float) -> Batch:
    """Paste what donor_y marks (labels above 0, one donor an image) into x, y with probability p.

    All channels and the label move together: mirrored, scaled by 0.7 to 1.4, shifted, feathered
    over 3 pixels. Images without any label stay. Donors must come from the training split of x.
    Shape: x, donor_x (B, C, H, W) float; y, donor_y (B, H, W) integer labels.
    """
    b, _, h, w = x.shape
    u = torch.rand(6, b, device=x.device, generator=gen)
    zoom = 1 / (0.7 * 2 ** u[0])
    mirror = torch.where(u[1] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(zoom)
    theta = torch.stack([zoom * mirror, zero, 1.6 * u[2] - 0.8, zero, zoom, 0.8 * u[3] - 0.4], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), [b, 1, h, w], align_corners=False)
    patch = F.grid_sample(donor_x, grid, align_corners=False)
    label = F.grid_sample(donor_y[:, None].float(), grid, mode="nearest", align_corners=False)
    pasted = (u[4] < p) & (y > 0).flatten(1).any(1)
    label = label * pasted[:, None, None, None]
    alpha = F.avg_pool2d((label > 0).float(), 3, 1, 1, count_include_pad=False)
    label = label[:, 0].to(y.dtype)
    return x + alpha * (patch - x), torch.where(label > 0, label, y)


# -------------------------------------------------------------------------------------- 7. network

def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3×3 convolutions, each with batch norm, which makes a bias redundant, and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class GatedSkip(nn.Module):
    """Joins an encoder level, dimmed by a one-channel sigmoid gate, with the decoder's ReLU(1×1).

    Shape: both (B, C, H, W) → (B, 2C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Conv2d(channels, 1, 1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([skip * torch.sigmoid(self.gate(skip)), F.relu(self.mix(x))], 1)


class GlobalContext(nn.Module):
    """Adds a function of the whole image's mean to every position (Cao et al. 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.mix.weight)  # at first it adds nothing
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(F.relu(self.norm(x.mean((2, 3)))))[:, :, None, None]


class UNet(nn.Module):
    """The paper's U-Net: widths w, 2w, 4w, …, gated skips, an output on each decoder level.

    With width 64, depth 4 and one channel it has the paper's 31.4 M parameters. shuffle 2 turns
    blocks of 2×2 pixels into channels at the input and back at each output, so that no layer
    works at the full size: 2.1 times the images/s at as many parameters (Shi et al. 2016).
    Shape: (B, in_channels, H, W), any H, W ≥ 1 → list of logits (B, num_classes, ·, ·): the full
    H, W, and in training also 1/2, 1/4, … of the size padded to a multiple of shuffle · 2^depth.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int = 4,
                 shuffle: int = 1, global_context: bool = False):
        super().__init__()
        self.shape = {"in_channels": in_channels, "num_classes": num_classes, "width": width,
                      "depth": depth, "shuffle": shuffle, "global_context": global_context}
        self.depth, self.shuffle = depth, shuffle
        *widths, bottleneck = [width * 2 ** i for i in range(depth + 1)]
        channels = [in_channels * shuffle ** 2, *widths, bottleneck]
        self.encoder = nn.ModuleList(conv_block(*pair) for pair in itertools.pairwise(channels))
        self.context = GlobalContext(bottleneck) if global_context else nn.Identity()
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths)
        self.skip = nn.ModuleList(GatedSkip(w) for w in widths)
        self.decoder = nn.ModuleList(conv_block(2 * w, w) for w in widths)
        self.heads = nn.ModuleList(nn.Conv2d(w, num_classes * shuffle ** 2, 1) for w in widths)

    def initialise_from(self, other: UNet) -> None:
        """Copy a network of fewer input channels; the weights of the other channels are 0."""
        weights, first = other.state_dict(), "encoder.0.0.weight"
        extra = self.encoder[0][0].in_channels - other.encoder[0][0].in_channels
        self.load_state_dict(weights | {first: F.pad(weights[first], (0, 0, 0, 0, 0, extra))})

    @torch.no_grad()
    def mask_classes(self, classes: torch.Tensor) -> None:
        """Never predict classes, bool (num_classes,), until training says otherwise."""
        masked = classes.repeat_interleave(self.shuffle ** 2)
        for head in self.heads:
            head.weight[masked] = 0
            head.bias[masked] = -20

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        h, w = x.shape[-2:]
        step = self.shuffle * 2 ** self.depth
        x = F.pad(x, (0, -w % step, 0, -h % step), mode="replicate")
        x = F.pixel_unshuffle(x, self.shuffle)
        skips, logits = [], []
        for i, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        x = self.context(x)
        for i in reversed(range(self.depth)):
            x = self.decoder[i](self.skip[i](skips[i], self.up[i](x)))
            if self.training or i == 0:
                logits.append(F.pixel_shuffle(self.heads[i](x), self.shuffle))
        logits[-1] = logits[-1][..., :h, :w]
        return logits[::-1]


# ----------------------------------------------------------------------------------------- 8. loss

def focal_loss(logits: torch.Tensor, target: torch.Tensor, gamma: float, alpha: float = 1.0,
               ignore_index: int = -1) -> torch.Tensor:
    """Return the mean of -α (1 - p)^γ log p over pixels not of ignore_index; 0 if there are none.

    γ = 0 and α = 1 is cross-entropy.
    Shape: logits (B, C, H, W) any float type; target (B, H, W) integer.
    Source: Lin et al. 2017, equation 5 (the paper's equation 1).
    """
    counted = target != ignore_index
    index = torch.where(counted, target, 0).long()[:, None]
    log_p = F.log_softmax(logits.float(), 1).gather(1, index)[:, 0]
    loss = -alpha * log_p
    if gamma:
        # clamped: (1 - p)^γ has an infinite slope at p = 1 for γ < 1, and inf × 0 is NaN
        loss = loss * (-torch.expm1(log_p)).clamp_min(1e-6) ** gamma
    return (loss * counted).sum() / counted.sum().clamp_min(1)


def deep_supervision_loss(logits: list[torch.Tensor], target: torch.Tensor,
                          level_weights: tuple[float, ...], **loss_args) -> torch.Tensor:
    """Return the weighted sum of focal_loss over the outputs; targets are every 2^i-th pixel."""
    loss = focal_loss(logits[0], target, **loss_args)
    for i, (output, level_weight) in enumerate(zip(logits[1:], level_weights, strict=False), 1):
        step = 2 ** i
        coarse = target[:, step // 2::step, step // 2::step]
        output = output[..., :coarse.shape[1], :coarse.shape[2]]
        loss = loss + level_weight * focal_loss(output, coarse, **loss_args)
    return loss


# ----------------------------------------------------------------------------------- 9. morphology

def clean_masks(masks: np.ndarray) -> np.ndarray:
    """Return masks (N, H, W), labels below 256, after opening, then closing, of each class.

    A pixel that its class's opening takes away goes to the one class whose closing claims it, and
    otherwise keeps its label; a class that opening would wipe out of an image stays. No class
    comes before another, as in grey morphology, whose result depends on the classes' numbers.
    """
    kernel = np.ones((3, 3), np.uint8)
    out = masks.copy()
    for mask, cleaned in zip(masks, out, strict=True):
        kept, claims, claimant = np.zeros((3, *mask.shape), np.uint8)
        for c in np.unique(mask):
            own = np.uint8(mask == c)
            opened = cv2.morphologyEx(own, cv2.MORPH_OPEN, kernel)
            if not opened.any():
                opened = own
            closed = cv2.morphologyEx(opened, cv2.MORPH_CLOSE, kernel)
            kept |= opened
            claims += closed
            claimant += np.uint8(c) * closed
        moved = (kept == 0) & (claims == 1)
        cleaned[moved] = claimant[moved]
    return out


# -------------------------------------------------------------------------------------- 10. metric

def confusion_matrix(truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Return the int64 (C, C) pixel counts of all that is given: rows the truth, columns pred."""
    truth, pred = truth.ravel(), pred.ravel()
    counts = np.zeros(NUM_CLASSES ** 2, np.int64)
    for i in range(0, len(truth), 2 ** 22):  # in parts: NumPy counts 8 bytes a pixel
        index = truth[i:i + 2 ** 22].astype(np.int64) * NUM_CLASSES + pred[i:i + 2 ** 22]
        counts += np.bincount(index, minlength=NUM_CLASSES ** 2)
    return counts.reshape(NUM_CLASSES, NUM_CLASSES)


def iou_scores(confusion: np.ndarray, ignore_class: int | None = 0) -> tuple[float, np.ndarray]:
    """Return the mean IoU and each class's, NaN for a class neither true nor predicted anywhere.

    ignore_class=0 is the competition's metric, Keras MeanIoU(ignore_class=0): pixels whose truth
    is 0 count for nothing, yet a 0 predicted elsewhere adds a class of IoU 0 to the mean. None is
    the paper's plain mean over all classes. NaN if nothing was counted.
    """
    counts = confusion.astype(np.float64)
    if ignore_class is not None:
        counts[ignore_class] = 0
    hit = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    iou = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    return (float(np.nanmean(iou)) if union.any() else math.nan), iou


IN_ONE_IMAGE = np.zeros((3, 3, 3), bool)  # what touches: the four neighbours of the same image
IN_ONE_IMAGE[1] = scipy.ndimage.generate_binary_structure(2, 1)


def to_bytes(probs):
    """Return probabilities, an array or tensor, as uint8, in 1/255: 2.6 GB for five folds."""
    if isinstance(probs, torch.Tensor):
        return (probs * 255).round().to(torch.uint8)
    return np.rint(probs * 255).astype(np.uint8)


def map_slices(function, count: int, size: int = CHUNK, pmap=map) -> list:
    """Return [function(slice)] of slices that cover count tiles, few enough each for floats."""
    return list(pmap(function, [slice(i, min(i + size, count)) for i in range(0, count, size)]))


def from_bytes(stored: np.ndarray) -> np.ndarray:
    """Return probabilities, float32, of to_bytes."""
    return stored * np.float32(1 / 255)


NO_THRESHOLDS = np.stack([np.ones(NUM_CLASSES), np.zeros(NUM_CLASSES)])


def apply_thresholds(probs: np.ndarray, thresholds: np.ndarray, first_class: int) -> np.ndarray:
    """Return labels uint8 (B, H, W) of probabilities (B, C, H, W), given each class's factor and
    peak, (2, C): the class, from first_class on, of the largest probability times its factor. Of a
    class with a peak a connected part that nowhere is that probable goes to the next class
    (hysteresis: Canny 1986)."""
    factors, peaks = thresholds
    weighted = probs * np.float32(factors[:, None, None])
    weighted[:, :first_class] = -1
    labels = weighted.argmax(1)
    for c in np.flatnonzero(peaks):
        own = labels == c
        sure = own & (probs[:, c] >= peaks[c])
        gone = own & ~scipy.ndimage.binary_propagation(sure, IN_ONE_IMAGE, own)
        weighted[:, c][gone] = -1
        labels[gone] = weighted.transpose(0, 2, 3, 1)[gone].argmax(1)
    return labels.astype(np.uint8)


def cleaned_labels(probs: np.ndarray, frames: Frames, wanted: np.ndarray, thresholds: np.ndarray,
                   first_class: int, pmap=map) -> np.ndarray:
    """Return the labels of apply_thresholds, cleaned, uint8 (T, H, W), of the frames that hold a
    wanted tile, bool (T,), else 0. Probs are bytes (T, C, H, W).

    Frames are looked at whole: a rock that a tile's border cuts is one part.
    """
    labels = np.zeros((len(probs), *probs.shape[2:]), np.uint8)
    frames = frames.to(torch.device("cpu"))

    def label_frames(index: np.ndarray) -> None:
        whole = apply_thresholds(from_bytes(frames.join(index, probs)), thresholds, first_class)
        tiles, parts = frames.split(index, clean_masks(whole)[:, None])
        labels[tiles] = parts[:, 0]

    list(pmap(label_frames, frames.batches(wanted, CHUNK)))
    return labels


def cleaned_likeliest(probs: np.ndarray, frames: Frames, first_class: int,
                      pmap=map) -> np.ndarray:
    """Return each fold's likeliest classes, cleaned, uint8 (folds, T, H, W), of probs, bytes."""
    every = np.ones(probs.shape[1], bool)
    return np.stack([cleaned_labels(own, frames, every, NO_THRESHOLDS, first_class, pmap)
                     for own in probs])


def cleaned_out_of_fold(probs: np.ndarray, frames: Frames, fold_of: np.ndarray,
                        thresholds: np.ndarray, first_class: int, pmap=map) -> np.ndarray:
    """Return the cleaned_labels of the training tiles, uint8 (N, H, W), each by its own fold's
    probs (folds, T, C, H, W); 0 of a tile without a fold."""
    labels = np.zeros((len(fold_of), *probs.shape[3:]), np.uint8)
    for fold, own in enumerate(probs):
        wanted = np.arange(len(own)) < len(labels)
        wanted[:len(labels)] = fold_of == fold
        decided = cleaned_labels(own, frames, wanted, thresholds, first_class, pmap)
        labels[fold_of == fold] = decided[wanted]
    return labels


def mean_of_folds(probs: np.ndarray) -> np.ndarray:
    """Return the mean over folds, bytes (M, C, H, W), of bytes (folds, M, C, H, W)."""
    total = probs.sum(0, dtype=np.uint16)  # 1 GB of the competition's, so changed in place
    total += len(probs) // 2               # to round
    total //= len(probs)
    return total.astype(np.uint8)


def decide_out_of_fold(probs: np.ndarray, masks: np.ndarray, frames: Frames, fold_of: np.ndarray,
                       candidates: np.ndarray, first_class: int,
                       pmap=map) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of cleaned_out_of_fold, each fold's by those of the candidates, thresholds
    (K, 2, C), that score best on the other folds; and those that score best on all, (2, C).

    The IoU J of a class is best where all pixels above about J / (1 + J) are taken, long before
    the class is the likeliest (for F1 that is Lipton et al. 2014).
    """
    folds = range(len(probs))
    tried = [cleaned_out_of_fold(probs, frames, fold_of, thresholds, first_class, pmap)
             for thresholds in candidates]
    counts = np.stack([[confusion_matrix(masks[fold_of == k], labels[fold_of == k]) for k in folds]
                       for labels in tried])
    total = counts.sum(1)
    labels = np.zeros_like(masks)
    for k in folds:
        others = [iou_scores(count)[0] for count in total - counts[:, k]]
        labels[fold_of == k] = tried[np.argmax(others)][fold_of == k]  # of equals the first
    return labels, candidates[np.argmax([iou_scores(count)[0] for count in total])]


def score_folds(masks: np.ndarray, labels: np.ndarray, fold_of: np.ndarray, folds: int) -> dict:
    """Return both metrics of out-of-fold labels, pooled over the folds, and their spread."""
    each = [confusion_matrix(masks[fold_of == k], labels[fold_of == k]) for k in range(folds)]
    pooled = np.sum(each, 0)
    miou, iou = iou_scores(pooled)
    fold_mious = np.array([iou_scores(one)[0] for one in each])
    finite = fold_mious[np.isfinite(fold_mious)]  # a fold may have nothing labelled
    return {"miou": miou, "iou": iou.tolist(), "paper_miou": iou_scores(pooled, None)[0],
            "fold_miou": fold_mious.tolist(),
            "fold_std": float(finite.std()) if len(finite) else math.nan,
            "confusion": pooled.tolist()}


# -------------------------------------------------------------------------------------- 11. engine

def option(default, text: str, choices: tuple | None = None, least: float = 0, most: float = 1e18,
           group: str = ""):
    """Return a dataclass field that parse_flags makes a flag of, below the heading group."""
    return field(default=default, metadata={"help": text, "choices": choices, "group": group,
                                            "least": least, "most": most})


def parse_flags(config: type, argv: list[str], description: str) -> dict:
    """Return field → value of the flags in argv, for a dataclass whose flags option() made; raise
    UserError for a fault in them."""
    parser = argparse.ArgumentParser(
        description=description, usage="%(prog)s [options]", allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    section = parser
    fields = {f.name: f for f in dataclasses.fields(config) if f.metadata}
    for name, f in fields.items():
        about, flag = f.metadata, name.replace("_", "-")
        if about["group"]:
            section = parser.add_argument_group(about["group"])
        if isinstance(f.default, bool):  # the flag turns it over
            section.add_argument(f"--no-{flag}" if f.default else f"--{flag}", dest=name,
                                 action="store_const", const=not f.default, help=about["help"])
        else:
            section.add_argument(f"--{flag}", type=type(f.default), choices=about["choices"],
                                 metavar=str(f.default) or "FILE", help=about["help"])
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see --help") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, 1, 0.4)
        cure = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{cure}; see --help")
    given = vars(given)
    for name, value in given.items():
        about, flag = fields[name].metadata, name.replace("_", "-")
        if not isinstance(value, str) and not about["least"] <= value <= about["most"]:
            raise UserError(f"--{flag} {value}: out of range ({about['help']}); see --help")
    return given


def run_command(command) -> int:
    """Return the exit status of command(): its own, 2 after a user's mistake or a full disk, told
    in one sentence, 130 after Ctrl-C, 143 after SIGTERM. Signals are given back."""
    before = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not; ASCII gets ? for ±
            # one write a line: torchrun's processes share a pipe
            stream.reconfigure(errors="replace", line_buffering=True, write_through=False)
    with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return command()
    except (UserError, OSError) as e:  # OSError: a full disk, a folder in a file's place
        print(f"solve.py: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as e:
        status = 130 if isinstance(e, KeyboardInterrupt) else e.code
        if status:  # --help leaves with 0
            print("solve.py: stopped; the same command, without --fresh, goes on from the last "
                  "checkpoint", file=sys.stderr)
        return status
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def pick_devices(name: str = "auto") -> tuple[list[torch.device], str]:
    """Return the devices to train on, all usable GPUs or the CPU, and the reason.

    A GPU must pass a real convolution forward and backward: is_available() is True on a P100 for
    which today's builds hold no kernels. Several ranks of one machine share its GPUs.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: it is auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return [torch.device("cpu")], "asked for"
    if name != "auto" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if ":" in name:
        gpus = [torch.device(name)]
    rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    usable, reason = [], "there is none"
    for gpu in gpus[rank::ranks] or gpus:
        try:
            images = torch.zeros(2, 1, 8, 8, device=gpu)
            nn.Conv2d(1, 8, 3, device=gpu)(images).sum().backward()
            torch.cuda.synchronize(gpu)
            usable.append(gpu)
        except (RuntimeError, AssertionError) as e:  # AssertionError: a build without CUDA
            reason = str(e).splitlines()[0][:80]
    if not usable:
        cure = "on Kaggle: Settings, Accelerator, GPU T4 x2"
        return [torch.device("cpu")], f"no usable GPU: {reason}; {cure}"
    usable.sort(key=torch.cuda.get_device_capability)  # the precision suits the first one
    return usable, ", ".join(torch.cuda.get_device_name(gpu) for gpu in usable)


def pick_precision(device: torch.device, name: str = "auto") -> tuple[torch.dtype, str]:
    """Return the autocast type and the reason: by a GPU's capability (a T4 only emulates bf16,
    whatever is_bf16_supported() says), by a timed convolution on a CPU."""
    if name != "auto":
        return getattr(torch, name), "as asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
        return dtype, f"compute capability {major}.{minor}"
    conv = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 32, 64, 128).to(memory_format=torch.channels_last)

    def seconds(dtype: torch.dtype) -> float:
        step = autocast(device, dtype)(lambda: conv(x).float().mean().backward())
        return float(np.median(timeit.repeat(step, number=1, repeat=6)))

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    dtype = torch.bfloat16 if ratio > 1.1 else torch.float32
    return dtype, f"bfloat16 has {ratio:.1f}× float32's speed on this processor"


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the autocast context of the device; float32 turns it off."""
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype if low else None, enabled=low)


def seed_of(*key: int) -> int:
    """Return a seed that depends on the whole key: with (seed, stage, network, epoch) no state of
    a generator need be saved."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) >> 1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: activations of megabytes, given back to the kernel after each
    use, are zeroed again. Measured at width 16: training +10 %, prediction +40 %."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no block has pages of its own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


class Clock:
    """Counts the seconds of a run over all its starts, and holds them against --max-hours."""

    def __init__(self, path: Path, max_hours: float):
        self.path, self.limit = path, max(1.0, max_hours * 3600)
        self.start, self.saved = time.monotonic(), -math.inf
        self.before = 3.0  # importing torch takes three
        if path.exists():
            before = load_checkpoint(path)
            if before is None:
                raise UserError(f"{path}: damaged, so the time left is unknown; begin anew with "
                                "--fresh")
            self.before = before["seconds"]

    def used(self) -> float:
        return self.before + time.monotonic() - self.start

    def minutes_until(self, share: float) -> float:
        """Return the minutes until a share of the limit is over."""
        return max(0.0, share * self.limit - self.used()) / 60

    def save_now_and_then(self) -> None:
        """Write down the seconds used, at most every ten seconds."""
        if time.monotonic() - self.saved > 10:
            self.saved = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk: what is in memory can still win
                save_checkpoint(self.path, {"seconds": self.used()})


@dataclass(frozen=True)
class Task:
    """What there is to do and to do it with, as far as its cost depends on it."""

    images: int     # of the training set
    shown: float    # how often one is shown in an epoch of stage 1, with oversampling
    height: int     # of a tile
    width: int
    area: float     # of all frames with their rims, in tiles: what each network predicts
    frames: bool    # whether any were found
    cores: int
    gpus: int = 0
    ranks: int = 1  # of torchrun, all like this one

    @property
    def max_width(self) -> int:
        """Of networks: wider ones learn few images by heart. Of 228, in the same time, width 12
        scores .655 out of fold and .636 on the test set, 16 scores .646 and .621 (three runs)."""
        return max(8, self.images // 64 * 4)


def relative_speed(task: Task, plan) -> float:
    """Return the training images/s of all workers of a plan, but for a factor. 1.7 and .4 are
    measured on CPUs, where two threads inside each operation do the work of 1.3 workers; the .4 of
    the workers on an H200, where 1, 2 and 5 at once train 9,205, 12,799 and 16,510 images/s."""
    if task.gpus:
        busy = min(task.gpus, plan.workers)
        together = busy * (plan.workers / busy) ** 0.4
    else:
        together = plan.workers * plan.threads ** 0.4
    window = (task.height + plan.padding) * (task.width + plan.padding)
    return together / (window * plan.width ** 1.7)


class Stopped(Exception):
    """Ends what a worker does, after a signal or another worker's error; nobody else sees it."""


class Workers:
    """Threads of one process that share its work: PyTorch and OpenCV release Python's lock.

    On 2 cores two workers of one thread each train 1.5 times as fast as two threads inside each
    operation. Which worker does what changes no bit of the results; the threads inside an
    operation do. Args: devices, GPUs, each for one worker or several, or the CPU; count, of
    workers; threads, inside each of their operations; clock, that is saved now and then.
    """

    def __init__(self, devices: list[torch.device], count: int, threads: int = 1,
                 clock: Clock | None = None):
        self.devices = (devices * count)[:count]
        self.threads, self.clock = threads, clock
        self.stopping = threading.Event()

    def check(self) -> None:
        """End the calling worker's work if the others have been ended; called between steps."""
        if self.stopping.is_set():
            raise Stopped

    def run(self, work, meanwhile=lambda: None) -> None:
        """Call work(device) in every worker, and meanwhile() now and then, until all are done.

        An error in one, or a signal, ends the others at their next check() and is raised here.
        """
        def guarded(device: torch.device) -> None:
            torch.set_num_threads(self.threads)  # holds for the calling thread alone
            try:
                with contextlib.suppress(Stopped), on_stream(device):
                    work(device)
            except BaseException:
                self.stopping.set()
                raise

        self.stopping.clear()
        with concurrent.futures.ThreadPoolExecutor(len(self.devices)) as pool:  # waits for all
            try:
                futures = [pool.submit(guarded, device) for device in self.devices]
                # signals reach the main thread alone, between two looks
                busy = True
                while busy:
                    if self.clock is not None:
                        self.clock.save_now_and_then()
                    meanwhile()
                    busy = concurrent.futures.wait(futures, 0.1).not_done
            finally:
                self.stopping.set()
        self.stopping.clear()
        for future in futures:
            future.result()  # raises its error

    def map(self, function, items) -> list:
        """Return [function(item) for item in items]; each free worker takes the next item."""
        items = list(items)
        results = [None] * len(items)
        waiting = iter(range(len(items)))
        lock = threading.Lock()

        def work(device: torch.device) -> None:
            while True:
                self.check()
                with lock:
                    i = next(waiting, None)
                if i is None:
                    return
                results[i] = function(items[i])

        self.run(work)
        return results


@contextlib.contextmanager
def on_stream(device: torch.device):
    """Let the calling thread's work on a GPU run beside that of others, begin after what was done
    before, and be done when it leaves."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):  # and its device
        yield
    stream.synchronize()


_launching = threading.Lock()


def alone(device: torch.device):
    """Return a context in which only one of a GPU's threads launches kernels one by one, or
    captures them: cuDNN's search for an algorithm in another thread would spoil a capture."""
    return contextlib.nullcontext() if device.type == "cpu" else _launching


class Replayed:
    """A training step, step(tiles), that a GPU replays: its hundreds of kernels launch at once.

    After three calls of a thread it is captured. What varies must lie in the same tensors each
    time: tiles, learning rate, generator. On a CPU, or where capture fails, it stays as it is.
    Source: PyTorch's notes on CUDA graphs.
    """

    def __init__(self, step, generator: torch.Generator):
        self.step, self.generator = step, generator
        self.graph, self.tiles = None, None
        self.calls = collections.Counter()  # of each thread: cuDNN chooses its algorithms for each
        self.capture_after = 3 if generator.device.type == "cuda" else math.inf

    def __call__(self, tiles: torch.Tensor) -> None:
        thread = threading.get_ident()
        if self.graph is None:
            with alone(tiles.device):
                if self.calls[thread] >= self.capture_after:
                    self.capture(tiles)
                if self.graph is None:
                    self.calls[thread] += 1
                    self.step(tiles)
                    return
        self.tiles.copy_(tiles)
        self.graph.replay()

    def capture(self, tiles: torch.Tensor) -> None:
        """Note what the step launches; nothing of it runs."""
        graph, self.tiles = torch.cuda.CUDAGraph(), tiles.clone()
        try:
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(),
                                  capture_error_mode="thread_local"):
                self.step(self.tiles)
            self.graph = graph
        except RuntimeError as e:
            warn(f"going on without a CUDA graph ({str(e).splitlines()[0][:100]})")
            self.capture_after = math.inf


class EMA(nn.Module):
    """The exponential moving average of a network's weights and batch-norm statistics."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.model, self.decay = copy.deepcopy(model), decay
        self.register_buffer("steps", torch.zeros((), device=next(model.parameters()).device))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move 1 - decay of the way to model's values; decay 0 copies them."""
        averages, current = (
            [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
            for net in (self.model, model))
        self.steps += 1
        # at first less than decay: short runs must forget their random start
        decay = ((1 + self.steps) / (10 + self.steps)).clamp_max(self.decay)
        torch._foreach_mul_(averages, decay)  # not a step towards them: 0 is to copy, bit for bit
        torch._foreach_add_(averages, torch._foreach_mul(current, 1 - decay))


@dataclass(eq=False)
class StageInput:
    """What the networks of a stage look at and learn: T tiles in their frames, training tiles
    first. In stage 2 also what the stage-1 networks of each fold predicted there (V folds).

    Networks are trained on windows of the frames around single tiles, and predict whole frames.
    """

    frames: Frames
    rim: int                    # mirrored pixels around a frame that is predicted
    padding: int                # context padding: pixels of a window beyond its tile
    images: torch.Tensor        # uint8 (T, H, W)
    mean: float                 # of the training images' grey values
    std: float
    targets: torch.Tensor       # int8 (T, H, W); -1: ignored, as of test tiles
    fold_of: torch.Tensor       # int64 (T,): of a test tile TEST_FOLD
    is_rare: torch.Tensor       # bool (NUM_CLASSES,)
    first_class: int            # of the networks' outputs; 1: background is never predicted
    paste: float = 0.0          # share of the windows trained on that get rare classes pasted
    predicted: torch.Tensor | None = None   # classes, cleaned, uint8 (V, T, H, W)
    confidence: torch.Tensor | None = None  # the largest probability, bytes (V, T, H, W)
    context: torch.Tensor | None = None     # log-ratios, float (V, T, outputs, h, w)

    def __post_init__(self):
        rare = self.is_rare.nonzero().flatten().to(self.targets.dtype)  # never class 0
        self.holds_rare = torch.isin(self.targets, rare).flatten(1).any(1)  # bool (T,)

    @classmethod
    def of_tiles(cls, data: Data, place: np.ndarray | None, fold_of: np.ndarray,
                 is_rare: np.ndarray, rim: int, padding: int, first_class: int, paste: float,
                 device: torch.device) -> StageInput:
        """Return stage 1's input on a device: training tiles, of fold_of (N,), then test tiles, at
        their place (3, N + M); without a place there is no rim."""
        tiles = np.concatenate([data.images, data.test_images])
        targets = np.full(tiles.shape, -1, np.int8)
        targets[:len(data.masks)] = data.masks
        folds = np.full(len(tiles), TEST_FOLD)
        folds[:len(data.masks)] = fold_of
        arrays = (torch.from_numpy(array) for array in (tiles, targets, folds, is_rare))
        tiles, targets, folds, is_rare = arrays
        frames = Frames.lay_out(place, len(tiles))
        return cls(frames, 0 if place is None else rim, padding, tiles, data.mean, data.std,
                   targets, folds, is_rare, first_class, paste).to(device)

    def to(self, device: torch.device) -> StageInput:
        """Return a copy on that device, or itself if it is there."""
        if self.images.device == device:
            return self
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{
            name: value.to(device) for name, value in values.items() if hasattr(value, "to")})

    def halved(self, paste: float) -> StageInput:
        """Return images and targets of half the side, rounded up, for progressive resizing."""
        images = F.avg_pool2d(self.images.float(), 2, ceil_mode=True).round().byte()
        targets = self.targets[:, ::2, ::2].contiguous()
        return dataclasses.replace(self, images=images, targets=targets, paste=paste,
                                   padding=-(-self.padding // 2))

    def windows(self, tiles: torch.Tensor, gen: torch.Generator | None = None,
                held_out: int = TEST_FOLD) -> Batch:
        """Return windows around tiles and their labels.

        With gen, for training: at a random place around the tile, with the labels of all tiles
        whose fold is not held_out. In stage 2, whose inputs are those of the tile's fold, labels
        of that fold alone. Without gen, for validation: the tile in the middle, its labels alone.
        """
        frame, row, column = self.frames.place[:, tiles]
        h, w = self.images.shape[1:]
        shift = torch.full((2, len(tiles)), 0.5, device=tiles.device)
        if gen is not None:
            shift = torch.rand(2, len(tiles), device=tiles.device, generator=gen)
        top, left = (shift * (self.padding + 1)).long()
        window = h + self.padding, w + self.padding
        pixels, known = self.frames.pixels(frame, row * h - top, column * w - left, window, (h, w))
        tile = pixels // (h * w)
        own_fold = self.fold_of[tiles][:, None, None]
        if gen is None:
            counted = tile == tiles[:, None, None]
        elif self.predicted is None:
            counted = self.fold_of[tile] != held_out
        else:
            counted = self.fold_of[tile] == own_fold
        y = torch.where(known & counted, self.targets.flatten()[pixels], -1)
        return self.look(pixels, own_fold.clamp_min(0)), y

    def whole_frames(self, frames: torch.Tensor, fold: int) -> torch.Tensor:
        """Return the input of frames of one size, (B,), with their rims, as a fold's networks
        see it."""
        h, w = self.images.shape[1:]
        rows, columns = self.frames.size[frames[0]].tolist()
        window = rows * h + 2 * self.rim, columns * w + 2 * self.rim
        corner = torch.full_like(frames, -self.rim)
        pixels, _ = self.frames.pixels(frames, corner, corner, window, (h, w))
        return self.look(pixels, torch.full_like(frames, fold)[:, None, None])

    def look(self, pixels: torch.Tensor, seen_by: torch.Tensor) -> torch.Tensor:
        """Return the input, float (B, C, h, w), of some of all tiles' T·H·W pixels, (B, h, w).

        Stage 1: the standardised image. Stage 2: also what the folds seen_by, (B, 1, 1), predicted,
        one-hot, their confidence and the context; or, as published, without a confidence, a flag
        that is 0 where stage 1 said background and -1 elsewhere.
        """
        h, w = self.images.shape[1:]
        x = [((self.images.flatten()[pixels].float() - self.mean) / self.std)[:, None]]
        if self.predicted is not None:
            where = pixels + seen_by * self.images.numel()
            predicted = self.predicted.flatten()[where][:, None]
            if self.confidence is None:
                return torch.cat([*x, -(predicted != 0).float()], 1)
            classes = torch.arange(self.first_class, NUM_CLASSES, device=pixels.device)
            x.append((predicted == classes[:, None, None]).float())
            x.append(self.confidence.flatten()[where][:, None].float() / 255)
        if self.context is not None:
            rows, columns = self.context.shape[3:]
            row = pixels // w % h * rows // h
            column = pixels % w * columns // w
            near = self.context[seen_by, pixels // (h * w), :, row, column]
            x.append(near.permute(0, 3, 1, 2) / 3)
        return torch.cat(x, 1)


@dataclass(eq=False)
class TrainingState:
    """One network in training and all that training changes; it saves and loads itself."""

    path: Path                # its checkpoint
    model: UNet
    ema: EMA                  # what is validated and used
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of an epoch's order and augmentation, seeded anew for each
    lr: torch.Tensor          # where a GPU's graph finds the learning rate
    sums: torch.Tensor        # of the losses of good steps since they were zeroed, and these steps
    history: list[dict] = field(default_factory=list)  # one record an epoch
    best: dict | None = None  # the EMA's weights after the best epoch
    best_figure: float = -math.inf
    best_epoch: int = 0
    finished: bool = False
    saved: float = field(default_factory=time.monotonic)  # when
    steps: dict = field(default_factory=dict)  # StageInput → Replayed, the step on it

    @classmethod
    def begin(cls, path: Path, model: UNet, device: torch.device, dtype: torch.dtype,
              weight_decay: float, ema_decay: float) -> TrainingState:
        """Return model, on the device, with nothing learnt yet."""
        model = model.to(device, memory_format=torch.channels_last)
        gpu = device.type == "cuda"
        lr = torch.zeros((), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr if gpu else 0.0, fused=True,
                                      weight_decay=weight_decay, capturable=gpu)
        # only float16 needs a scale, but all need its way to leave out a step; at the usual 2^16
        # the first ones may all overflow
        scaler = torch.amp.GradScaler(device.type, 2.0**10 if dtype == torch.float16 else 1.0)
        return cls(path, model, EMA(model, ema_decay), optimizer, scaler,
                   torch.Generator(device), lr, torch.zeros(2, device=device))

    @property
    def device(self) -> torch.device:
        return self.sums.device

    def set_lr(self, value: float) -> None:
        """Set the learning rate, on a GPU in the tensor that a captured step reads."""
        self.lr.fill_(value)
        gpu = self.device.type == "cuda"
        for group in self.optimizer.param_groups:  # of a checkpoint they may be another device's
            group["capturable"] = gpu
            group["lr"] = self.lr if gpu else value

    PARTS = ("model", "ema", "optimizer", "scaler")
    FACTS = ("history", "best", "best_figure", "best_epoch", "finished")

    def state_dict(self) -> dict:
        """Return plain values and tensors; of a finished network only what is still used."""
        state = {name: getattr(self, name) for name in self.FACTS} | {"shape": self.model.shape}
        if not self.finished:
            state |= {name: getattr(self, name).state_dict() for name in self.PARTS}
        return state

    def load_state_dict(self, state: dict) -> None:
        for name in self.FACTS:
            setattr(self, name, state[name])
        for name in self.PARTS if not self.finished else ():
            getattr(self, name).load_state_dict(state[name])
        if self.finished:
            self.best_network()  # an error if it is another network's

    def best_network(self) -> UNet:
        """Return the averaged network with the weights of its best epoch, to predict with."""
        self.ema.model.load_state_dict(self.best)
        return self.ema.model.eval()

    def keep_if_best(self, figure: float) -> None:
        """Keep the averaged weights if their figure is above the best so far, or both are -inf:
        any later ones will beat them."""
        if figure > self.best_figure or figure == self.best_figure == -math.inf:
            self.best = copy.deepcopy(self.ema.model.state_dict())
            self.best_epoch, self.best_figure = len(self.history), figure

    def save(self) -> None:
        """Write the checkpoint; without room for it the run goes on, as it can still end well."""
        try:
            save_checkpoint(self.path, self.state_dict())
        except OSError as e:
            warn(f"{self.path}: not saved ({e.strerror}); going on without")
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Go on from the checkpoint, if there is a good one."""
        state = load_checkpoint(self.path)
        if state is None:
            return
        try:
            self.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            reason = str(e).splitlines()[0][:80]
            raise UserError(f"{self.path}: of other code or another network ({reason}); put that "
                            "back, or begin anew with --fresh") from e

    def step(self, x: torch.Tensor, dtype: torch.dtype, criterion) -> None:
        """Take one optimizer step down the loss, criterion(logits) of x, and count it in sums.

        A step whose gradient is not finite changes no weight and no statistic. Nothing waits for
        the device.
        """
        statistics = [t for t in self.model.buffers() if t.is_floating_point()]  # batch norm's
        before = [t.clone() for t in statistics]
        with autocast(x.device, dtype):
            logits = self.model(x)
        loss = criterion(logits)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0, foreach=True)
        self.scaler.step(self.optimizer)  # unless a gradient is inf or NaN
        self.scaler.update()
        good = torch.isfinite(norm)
        for now, old in zip(statistics, before, strict=True):  # the forward pass has changed them
            now.copy_(torch.where(good, now, old))
        self.ema.update(self.model)
        self.sums += torch.stack([torch.where(good, loss.detach(), 0), good])


def measure_speed(workers: Workers, networks: list[TrainingState], train) -> float:
    """Return the images/s that all workers train at once, each one of the networks.

    The faster of two short times counts: a moment's disturbance is not to shrink a whole run.
    Args: train, a function that trains a network for some steps and returns that of the images.
    """
    waiting, speeds = list(networks), []
    lock = threading.Lock()

    def work(device: torch.device) -> None:
        with lock:
            network = next(network for network in waiting if network.device == device)
            waiting.remove(network)
        rates = []
        for steps in (8, 32, 32) if device.type == "cuda" else (2, 4, 4):  # at first it warms up
            start = time.perf_counter()
            with explained("measuring the speed"):
                images = train(network, steps)
            rates.append(images / (time.perf_counter() - start))
        speeds.append(max(rates[1:]))

    workers.run(work)
    return sum(speeds)


def train_side_by_side(networks: list[TrainingState], advance, workers: Workers,
                       progress: Progress) -> None:
    """Let workers train networks until all are finished, each for an epoch at a time.

    The free worker takes the network that has come least far, so that all come equally far.
    Args: advance, a function that trains a network for its next epoch and notes that in its
    history, and whether it is finished.
    """
    lock, busy = threading.Lock(), []

    def take(device: torch.device) -> TrainingState | None:
        with lock:
            free = [network for network in networks if network not in busy
                    and network.device == device and not network.finished]
            network = min(free, key=lambda network: len(network.history), default=None)
            busy.append(network)
            return network

    def work(device: torch.device) -> None:
        while network := take(device):
            with explained(f"{network.path.stem}, epoch {len(network.history) + 1}"):
                advance(network)
                if device.type == "cuda":  # another stream may take it next
                    torch.cuda.current_stream(device).synchronize()
            if network.finished:
                network.steps.clear()  # graphs and their memory
            if network.finished or time.monotonic() - network.saved > SAVE_SECONDS:
                network.save()  # still busy: nobody trains it meanwhile
            with lock:
                busy.remove(network)

    workers.run(work, progress.show)
    progress.show()
    progress.close()


class Progress:
    """Shows a stage's training: a line an epoch; on a terminal a bar, if tqdm is there."""

    def __init__(self, title: str, networks: list[TrainingState], epochs: int, minutes_left):
        self.title, self.networks, self.epochs = title, networks, epochs
        self.minutes_left, self.bar = minutes_left, None
        self.shown = min((len(network.history) for network in networks), default=0)
        if getattr(sys.stdout, "isatty", bool)():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm
                self.bar = tqdm(desc=title, total=epochs, initial=self.shown, unit="epoch",
                                file=sys.stdout)

    def show(self) -> None:
        """Show each epoch that all networks have behind them, if it was not shown before."""
        histories = [network.history for network in self.networks]
        going = [len(network.history) for network in self.networks if not network.finished]
        reached = min(going) if going else max(map(len, histories), default=0)
        while self.shown < reached:
            self.shown += 1
            records = [history[:self.shown][-1] for history in histories]
            losses = [record["loss"] for record in records]
            scores = [record["score"] for record in records]
            pooled, iou = iou_scores(np.sum([record["confusion"] for record in records], 0))
            classes = [f"  {name} {x:.3f}" for name, x in zip(CLASSES[1:], iou[1:], strict=True)]
            figures = (f"loss {np.mean(losses):.4f}  score {pooled:.4f} ({np.mean(scores):.4f} ± "
                       f"{np.std(scores):.4f}){''.join(classes)}")
            if self.bar is None:
                say(f"{self.title}  epoch {self.shown}/{self.epochs}  {figures}  at most "
                    f"{self.minutes_left():.1f} min left")
            else:
                self.bar.set_postfix_str(figures, refresh=False)
                self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@torch.inference_mode()
def evaluate(model: UNet, batches, dtype: torch.dtype, first_class: int, criterion) -> dict:
    """Return "val_loss", the mean of criterion(logits, target) over the images; "score", the
    competition's mean IoU; and the "confusion" that it comes from, (C, C) rows the truth.

    Args: batches of images, float (B, C, H, W), and labels, integers (B, H, W), -1 ignored, on
    the model's device; first_class, the class of the model's first output.
    """
    model.eval()
    device = next(model.parameters()).device
    loss, count = torch.zeros((), device=device), 0
    pairs = torch.zeros(NUM_CLASSES ** 2, dtype=torch.int64, device=device)
    for x, y in batches:
        with alone(device), autocast(device, dtype):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        y = y.long()
        loss += criterion(logits, (y - first_class).clamp_min(-1)) * len(y)
        count += len(y)
        pair = y * NUM_CLASSES + logits[0].argmax(1) + first_class
        pairs += torch.bincount(pair[y >= 0], minlength=NUM_CLASSES ** 2)
    confusion = pairs.view(NUM_CLASSES, NUM_CLASSES).cpu().numpy()
    return {"val_loss": float(loss / count), "score": iou_scores(confusion)[0],
            "confusion": confusion.tolist()}


@torch.inference_mode()
def predict_probs(models: list[UNet], x: torch.Tensor, dtype: torch.dtype,
                  tta: bool) -> torch.Tensor:
    """Return the mean class probabilities, float (B, num_classes, H, W), of models on x; tta: also
    on its mirror image. Each model computes on the device where it is."""
    total = 0
    for model in models:
        own = x.to(next(model.parameters()).device, memory_format=torch.channels_last)
        for dims in ([], [-1]) if tta else ([],):
            with autocast(own.device, dtype):
                logits = model(own.flip(dims))[0]
            total = total + torch.softmax(logits.float(), 1).flip(dims).to(x.device)
    return total / (len(models) * (1 + tta))


def predict_unseen(stage: list[list[UNet]], data: StageInput, dtype: torch.dtype, tta: bool,
                  workers: Workers) -> np.ndarray:
    """Return each fold's mean probabilities of all tiles, bytes (folds, T, C, H, W), from whole
    frames with their rims: 2.6 GB of the competition's 12,600 tiles and five folds. A fold does
    not predict frames that hold neither its own tiles nor test tiles: there 0 stays.

    Args: stage, the networks of each fold.
    """
    fold_of, device, rim = data.fold_of.cpu().numpy(), data.images.device, data.rim
    most_tiles = 64 if device.type == "cpu" else 256  # at once
    probs = np.zeros((len(stage), len(fold_of), NUM_CLASSES, *data.images.shape[1:]), np.uint8)

    def predict_frames(part: tuple[int, np.ndarray]) -> None:
        fold, frames = part

        def batch_probs(batch: torch.Tensor) -> torch.Tensor:
            x = data.whole_frames(batch, fold)
            means = predict_probs(stage[fold], x, dtype, tta)
            height, width = means.shape[2:]
            return to_bytes(means[..., rim:height - rim, rim:width - rim])

        batch_size = max(1, most_tiles // int(data.frames.size[int(frames[0])].prod()))
        whole = in_batches(batch_probs, torch.from_numpy(frames).to(device), batch_size)
        tiles, values = data.frames.split(frames, whole)
        probs[fold, tiles, data.first_class:] = values

    workers.map(predict_frames, [
        (fold, frames) for fold in range(len(stage))
        for frames in data.frames.batches((fold_of == fold) | (fold_of < 0), 256)])
    return probs


def in_batches(function, items: torch.Tensor, batch_size: int) -> np.ndarray:
    """Return function's results of all items, joined; batches are halved while memory is short."""
    results, i = [], 0
    while i < len(items):
        try:
            results.append(function(items[i:i + batch_size]).cpu().numpy())
            i += batch_size
        except RuntimeError as e:
            if not lacks_memory(e):
                raise
            if batch_size == 1:
                raise UserError("not even one frame fits into memory: try a smaller --width") from e
            batch_size //= 2
            warn(f"out of memory: going on with {batch_size} frames at once")
    return np.concatenate(results)


def lacks_memory(error: RuntimeError) -> bool:
    """Return whether a GPU, a CPU or cuDNN says so; illegal access is another error."""
    return re.search(r"memory(?! access)|ALLOC_FAILED", str(error)) is not None


@contextlib.contextmanager
def explained(where: str):
    """Turn want of memory into a UserError; say of any where it came about and what to try."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{where}: {e}; try --fresh and a smaller --lr") from e
    except RuntimeError as e:
        if not lacks_memory(e):
            raise
        raise UserError(f"{where}: out of memory; try --fresh and a smaller --batch-size or "
                        "--width") from e


@contextlib.contextmanager
def going_on(metrics: dict):
    """Let nothing that fails cost what there is: a user's mistake is told in one sentence, of any
    other error the traceback is printed; "degraded" in the metrics says which it was."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            say(f"solve.py: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        metrics["degraded"] = f"{type(error).__name__}: {error}"


def say(*words, file=None) -> None:
    """Print a line, to standard output if no file is named; where nobody reads any more (a closed
    pipe, a log on a full disk) the run goes on without a word."""
    with contextlib.suppress(OSError):
        print(*words, file=file, flush=True)


def warn(message: str) -> None:
    """Print a warning of this process, with its number if it is another than the first."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        say(message)
    else:
        say(f"rank {rank}: {message}", file=sys.stderr)


def count_plateaus(figures: list[float], patience: int) -> int:
    """Return how often more than patience epochs in a row brought no better figure."""
    best, in_vain, plateaus = -math.inf, 0, 0
    for figure in figures:
        in_vain = 0 if figure > best else in_vain + 1
        best = max(best, figure)
        if in_vain > patience:
            in_vain, plateaus = 0, plateaus + 1
    return plateaus


def warn_of_chance(miou: float, masks: np.ndarray) -> None:
    """Say what it usually means if a score is hardly above that of guesses or of one class."""
    shares = np.bincount(masks[masks > 0], minlength=NUM_CLASSES) / (masks > 0).sum()
    chance = max(shares.max(), (shares / (2 - shares)).sum()) / (shares > 0).sum()
    if not miou > 1.5 * chance:
        warn(f"warning: out of fold the networks score {miou:.3f}, guesses {chance:.3f}: are the "
             "labels those of these images, in the same order? If so, train for longer")


def load_networks(folder: str | Path) -> dict[str, UNet]:
    """Return the networks of a finished run, by name ("stage1_fold0"), from its --out folder, in
    eval mode, on the CPU. Their input is StageInput.look's: in stage 1 (image - mean) / std."""
    networks = {}
    for path in sorted(Path(folder).glob("state/stage*.pt")):
        state = load_checkpoint(path)
        if state and state["finished"]:
            networks[path.stem] = UNet(**state["shape"]).eval()
            networks[path.stem].load_state_dict(state["best"])
    return networks


def average_runs(folders: list[str], first_class: int = 1) -> np.ndarray:
    """Return the test labels, uint8 (M, H, W), of the mean of several runs with --save-probs."""
    runs = [np.load(Path(folder) / "probabilities.npz") for folder in folders]
    probs = mean_of_folds(np.stack([run["test"] for run in runs]))
    thresholds = np.mean([run["thresholds"] for run in runs], 0)
    frames = Frames.lay_out(runs[0]["place"][:, -len(probs):], len(probs))  # without training tiles
    return cleaned_labels(probs, frames, np.ones(len(probs), bool), thresholds, first_class)


def describe_test(labels: np.ndarray, probs: np.ndarray, truth: np.ndarray | None) -> dict:
    """Return the shares of the classes among labels (M, H, W), the mean of the largest of probs,
    bytes (M, C, H, W), and the scores where the truth is known."""
    counts = np.bincount(labels.ravel(), minlength=NUM_CLASSES)
    figures = {"test_shares": (counts / labels.size).round(5).tolist(),
               "test_confidence": float(from_bytes(probs.max(1)).mean())}
    if truth is not None:
        figures["test_miou"], iou = iou_scores(confusion_matrix(truth, labels))
        figures["test_iou"] = iou.tolist()
    return figures


# --------------------------------------------------------------------------------------- 12. ranks

class Ranks:
    """The processes of one run, as torchrun started them; torchrun ends all when one dies. The
    first one decides, prints and writes; of the others come only errors and warnings."""

    def __init__(self):
        self.rank, self.world = 0, 1
        if dist.is_available() and dist.is_torchelastic_launched():
            self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if self.world > 1:  # waits are as long as another's networks train
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def share(self, value: dict, source: int = 0) -> dict:
        """Return the source's value, a dict of plain values and tensors, in every process, when
        all of them are here."""
        if self.world == 1:
            return value
        buffer, values = io.BytesIO(), [b""] * self.world
        torch.save(value, buffer)
        dist.all_gather_object(values, buffer.getvalue())
        return torch.load(io.BytesIO(values[source]), map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------- 13. checkpoints

@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a file that appears under its name only when complete."""
    temporary = path.with_name(f"{path.name}{os.environ.get('RANK', '')}.tmp")  # a common folder
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)  # of a failure: it would keep the last room from others


def lock_folder(folder: Path, rank: int = 0):
    """Return an open file: until it is closed, or the process dies, no other process of this rank
    can lock the folder. UserError if another one holds it."""
    file = open(folder / f"lock{rank or ''}", "w")  # noqa: SIM115
    with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, some disks no locks
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run works in {folder.parent}: wait, or use another "
                            "--out") from None
    return file


def write_json(path: Path, value) -> None:
    """Write value as JSON, atomically; NaN, which JSON has not, as null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    with atomic_write(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def open_state(out: Path, identity: dict, fresh: bool, ranks: Ranks) -> tuple[Path, object]:
    """Return the state folder inside out, and its lock. UserError if it cannot be written, or
    holds a run of another identity (plain values by name); fresh throws that away."""
    state = out / "state"
    fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # else it goes on
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(state, ranks.rank)
        if ranks.share(identity) != identity:
            raise UserError("torchrun: the processes have different data or options")
        ranks.share({})  # nothing is thrown away that another run has locked, or that differs
        ours = [*state.glob("*.tmp"), *state.glob("*.pt")] if fresh else []
        for old in sorted(ours, key=lambda path: path.name == "identity.pt"):  # that one last
            old.unlink(missing_ok=True)
        before = load_checkpoint(state / "identity.pt")
        for key in {**before, **identity} if before is not None else ():
            if before.get(key) != identity.get(key):
                raise UserError(
                    f"--out {out} holds a run with {key} = {before.get(key)}, this one has "
                    f"{identity.get(key)}; use another --out, or --fresh to throw that run away")
        if before is None and any(state.glob("stage*.pt")):
            raise UserError(f"{state}: networks without their identity.pt; put it back, or "
                            "begin anew with --fresh")
        ranks.share({})  # nothing is written before all have thrown away, and looked
        save_checkpoint(state / "identity.pt", identity)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); choose another "
                        "folder") from None
    say(f"{'a new' if before is None else 'going on with the'} run in {out}")
    return state, lock


def note_code(state: Path, *sources: str | None) -> None:
    """Say so if the code, of these files, is not that which began the run in this folder."""
    code = b"".join(Path(file).read_bytes() for file in sources if file)
    digest = hashlib.sha256(code).hexdigest()
    before = load_checkpoint(state / "code.pt")
    if before is None:
        save_checkpoint(state / "code.pt", {"sha256": digest})
    elif before["sha256"] != digest:
        warn("the code has changed since this run began: networks trained before are used as "
             "they are; --fresh trains them anew")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write state, plain values and tensors only, behind its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as f:
        f.write(hashlib.sha256(buffer.getbuffer()).digest())
        f.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict | None:
    """Return the state saved at path, None if there is none, or a damaged one, which is named."""
    if not path.exists():
        return None
    raw = path.read_bytes()
    if hashlib.sha256(raw[32:]).digest() == raw[:32]:  # most flipped bits would load in silence
        with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError, KeyError,
                                 ValueError):  # with weights_only nothing in a file is executed
            return torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)
    warn(f"{path}: damaged; what it held is done again")
    return None


def once(path: Path, ranks: Ranks, make) -> dict:
    """Return make(), plain values and tensors by name, of the first process; a run that goes on
    finds it at path."""
    found = load_checkpoint(path)
    if ranks.rank == 0 and found is None:
        found = make()
        save_checkpoint(path, found)
    return ranks.share(found)


# ---------------------------------------------------------------------------------- 14. submission

def write_submission(path: Path, labels: np.ndarray) -> None:
    """Write labels (M, H, W), 0..9, as the competition's CSV, in the very bytes of pandas."""
    flat = labels.reshape(len(labels), -1)
    assert flat.max() <= 9, "labels of two digits would need another layout"
    header = ",".join(["id", *map(str, range(flat.shape[1]))])
    cells = np.full(2 * flat.shape[1], ord(","), np.uint8)  # a row: a digit, a comma, a digit, …
    cells[-1] = ord("\n")
    with atomic_write(path) as f:
        f.write(header.encode() + b"\n")
        for i, row in enumerate(flat):
            cells[::2] = row + ord("0")
            f.write(b"%d," % i + cells.tobytes())


def check_submission(path: Path, num_images: int, num_pixels: int,
                     first_class: int = 1) -> np.ndarray:
    """Read a submission line by line and return its labels, uint8 (num_images, num_pixels).

    Raises: UserError that names the first fault: header, id, number of columns or rows, a label
    below first_class (a single 0 costs a fifth of the score) or that is no class.
    """
    allowed = bytes(range(ord("0") + first_class, ord("0") + NUM_CLASSES))
    header = ",".join(["id", *map(str, range(num_pixels))]).encode()
    labels = []
    with open(path, "rb") as f:
        if f.readline().rstrip(b"\r\n") != header:
            raise UserError(f"{path}: the header is not id,0,1,…,{num_pixels - 1}")
        for row, line in enumerate(f):
            name, _, rest = line.rstrip(b"\r\n").partition(b",")
            if (name != b"%d" % row or len(rest) != 2 * num_pixels - 1
                    or rest[1::2] != b"," * (num_pixels - 1)):
                raise UserError(f"{path}: row {row} has the id {name[:20].decode('latin1')!r} and "
                                f"{rest.count(b',') + 1} columns; expected {row} and {num_pixels} "
                                "labels of one digit, separated by commas")
            bad = rest[::2].lstrip(allowed)  # from the first bad label on
            if bad:
                raise UserError(f"{path}: row {row}, column {num_pixels - len(bad)} holds "
                                f"{bad[:1].decode('latin1')!r}; expected labels {first_class} to "
                                f"{NUM_CLASSES - 1}")
            labels.append(np.frombuffer(rest[::2], np.uint8) - np.uint8(ord("0")))
    if len(labels) != num_images:
        raise UserError(f"{path}: {len(labels)} rows; expected {num_images}")
    return np.stack(labels)


def submit(file: Path, labels: np.ndarray, first_class: int) -> None:
    """Write labels (M, H, W) as a submission, read it back, and write its zip beside it (164 MB of
    labels become about 3)."""
    zipped = file.with_suffix(".zip")
    zipped.unlink(missing_ok=True)  # an earlier start's
    write_submission(file, labels)
    read = check_submission(file, len(labels), labels[0].size, first_class)
    if not np.array_equal(read, labels.reshape(read.shape)):
        raise UserError(f"{file}: what was read back is not what was written; check the disk")
    with (atomic_write(zipped) as f,
          zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive):
        archive.write(file, file.name)
    say(f"submission: {file}, {len(labels)} rows, checked")


# -------------------------------------------------------------------------------------- 15. report

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Mars terrain</title>
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><style>body{font:16px/1.5 system-ui,sans-serif;
max-width:1340px;margin:auto;padding:8px;overflow-wrap:break-word}div{overflow-x:auto}
td,th{padding:3px 8px;text-align:left}th:first-child{width:8em}path{fill:none;stroke:currentColor}
table:has(img){table-layout:fixed;width:100%;min-width:1000px}img{width:100%;outline:1px solid}
svg{width:430px;max-width:100%;font-size:12px;fill:currentColor}</style>"""


def table(rows: dict[str, dict]) -> str:
    """Return a table, caption → title → share, 0 to 1, or picture, uint8 (H, W)."""
    body, row = "", {}
    for caption, row in rows.items():
        body += f"<tr><th>{caption}"
        for title, value in row.items():
            if isinstance(value, float):
                color = f"rgba(0,114,178,{0.6 * value:.2f})"
                body += f'<td style="background:{color}">{value:.3f}'.replace(">nan", ">–")
                continue
            if title not in ("image", "confidence"):
                value = PALETTE[value][..., ::-1]
            png = base64.b64encode(cv2.imencode(".png", value)[1]).decode()
            body += f'<td><img alt="" src="data:image/png;base64,{png}">'
    return f"<div><table><tr><th><th>{'<th>'.join(row)}{body}</table></div>"


def curves(title: str, lines: pd.DataFrame) -> str:
    """Return an SVG of lines by epoch, a column each, with their last values at the right."""
    lines = lines.replace(np.inf, np.nan).ffill().dropna(axis=1)
    low, high = lines.min().min(), lines.max().max() + 1e-6
    x = np.linspace(50, 320, len(lines))
    y = 200 - 175 * (lines - low) / (high - low)
    texts, ticks = [(50, 12, title)], np.linspace(0, len(x) - 1, min(len(x), 6)).astype(int)
    texts += [(6, 204 - 35 * i, f"{low + (high - low) * i / 5:.3f}") for i in range(6)]
    texts += [(x[i] - 4, 220, i + 1) for i in ticks]
    marks = "".join(f"M{x[i]:.0f} 200v5" for i in ticks) + "M45 25" + "h5m-5 35" * 5 + "h5"
    shapes = f'<path d="M50 25v175h270{marks}"/>'
    ends, top = lines.iloc[-1].sort_values(ascending=False), 0
    for below, (name, end) in zip(range(len(ends))[::-1], ends.items(), strict=True):
        points = " ".join(map("{:.1f},{:.1f}".format, x, y[name]))
        shapes += f'<path d="M{points}" stroke-width="{3 if name == "mean" else 1}"/>'
        top = min(max(top + 13, y[name].iloc[-1] + 4), 204 - 13 * below)  # at its line's end
        texts.append((326, top, f"{name} {end:.3f}"))
    for left, top, text in texts:
        shapes += f'<text x="{left:.0f}" y="{top:.0f}">{text}</text>'
    return f'<svg viewBox="0 0 430 228">{shapes}</svg>'


def picture_rows(data: Data, validated: np.ndarray, labels: dict, submitted: str,
                 confidence: np.ndarray, place: np.ndarray | None,
                 test_labels: np.ndarray, rare: np.ndarray) -> dict[str, dict]:
    """Return pictures, heading → caption → title → uint8 (H, W). Args: of write_report."""
    frames = {}
    if place is not None:
        tests = data.test_images, np.zeros_like(test_labels), test_labels
        tiles = np.stack([data.images, data.masks, labels[submitted]], 1)
        tiles = np.concatenate([tiles, np.stack(tests, 1)])
        sizes = np.bincount(place[0] + 1)[1:]  # the largest may be two frames joined
        for frame in abs(sizes - np.median(sizes.repeat(sizes))).argsort(kind="stable")[:6]:
            at = place[:, place[0] == frame] - [[frame], [0], [0]]
            canvas = frame_canvas(tiles[place[0] == frame], at)[0]
            image, mask, answer = canvas.reshape(3, canvas.shape[1] * canvas.shape[2], -1)
            frames[f"frame {frame}"] = {"image": image, "labels": mask, "predicted": answer}
    errors = (data.masks > 0) & (data.masks != labels[submitted])
    area = (data.masks > 0).sum((1, 2)).clip(1)
    wrong = errors.sum((1, 2)) / area
    doubt = (errors * confidence).sum((1, 2), dtype=np.float32) / area
    rarity, order = rare[data.masks].sum((1, 2)), np.flatnonzero(validated)
    chosen = {"Labels that the networks contradict most": order[doubt[order].argsort()[:-13:-1]],
              "Most pixels of rare classes": order[rarity[order].argsort()[:-7:-1]],
              "A sample of all tiles": order[::len(order) // 8 + 1]}
    layers = {"image": data.images, "labels": data.masks, **labels,
              "errors: white": np.uint8(4) * errors, "confidence": np.uint8(255 * confidence)}
    pictures = {"Camera frames": frames}
    for heading, index in chosen.items():
        pictures[heading] = {}
        for n in index:
            row = {title: layer[n] for title, layer in layers.items()}
            pictures[heading][f"image {n}: {wrong[n]:.0%} wrong"] = row
    return pictures


def draw_figure(title: str, pictures: dict[str, dict]) -> np.ndarray:
    """Return a BGR sheet 1792 wide: two rows of pictures of each heading, one frame, the legend."""
    def write(line: np.ndarray, x: int, text: str) -> None:
        cv2.putText(line, text, (x, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255,) * 3, 1, cv2.LINE_AA)

    head = np.full((34, 1792, 3), 72, np.uint8)
    write(head, 4, title)
    for c in range(NUM_CLASSES):
        head[8:26, 792 + 200 * c:820 + 200 * c] = PALETTE[c, ::-1]
        write(head, 830 + 200 * c, CLASSES[c])
    lines = [head]
    for heading, rows in pictures.items():
        for caption, row in list(rows.items())[:1 if heading == "Camera frames" else 2]:
            colors = []
            titles = np.full_like(head, 72)
            for i, (name, value) in enumerate(row.items()):
                write(titles, 4 + 1792 * i // len(row), name if i else caption.partition(":")[0])
                grey = name in ("image", "confidence")
                color = np.dstack([value] * 3) if grey else PALETTE[value][..., ::-1]
                colors.append(np.pad(color, ((0, 0), (0, 4), (0, 0))))
            line = np.hstack(colors)
            size = (1792, 1792 * line.shape[0] // line.shape[1])
            lines += [titles, cv2.resize(line, size, interpolation=cv2.INTER_NEAREST)]
    return np.vstack(lines)


def write_report(out: Path, metrics: dict, histories: dict, facts: dict, data: Data,
                 validated: np.ndarray, labels: dict, confidence: np.ndarray,
                 place: np.ndarray | None, test_labels: np.ndarray, rare: np.ndarray) -> None:
    """Write report.html, figure.png and history.csv, an epoch a row; a full disk costs them alone.

    Args: validated, bool (N,); labels out of fold by step, uint8 (N, H, W), and of the
    submitted one confidence, 0 to 1; place of find_frames; test_labels; rare, bool (5,).
    """
    step, scores = metrics["submitted"], {}
    for name in labels:
        keys = "miou", "fold_std", "paper_miou"
        scores[name] = {key: metrics[f"{name}_{key}"] for key in keys}
        scores[name] |= dict(zip(CLASSES, metrics[f"{name}_iou"], strict=True))
    parts = [f"<h1>Mean IoU {metrics[f'{step}_miou']:.4f} out of fold</h1>"
             f"<p>Submitted: {step}, after {metrics['minutes']} minutes.{table(scores)}"]
    for name, color in zip(CLASSES, PALETTE.tolist(), strict=True):
        style = f"outline:1px solid;border-left:1em solid rgb{tuple(color)}"
        parts.append(f'<b style="{style}">&nbsp;{name}&nbsp;</b>&ensp;')
    pictures = picture_rows(data, validated, labels, step, confidence, place, test_labels, rare)
    parts += [f"<h2>{heading}</h2>{table(rows)}" for heading, rows in pictures.items() if rows]
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(shell, "kernel"):  # below a notebook's cell: up to the frames
        from IPython.display import HTML, display
        display(HTML("".join(parts[:NUM_CLASSES + 2])))
    history = {key: pd.DataFrame(epochs) for key, epochs in histories.items()}
    history = pd.concat(history, names=["stage", "network", "epoch"]).reset_index()
    history["fold"] = history["network"] % metrics["folds"]
    history["epoch"] += 1
    for stage, of_stage in history.groupby("stage"):
        for name in "score", "loss", "val_loss":
            lines = of_stage.pivot_table(name, "epoch", "fold", dropna=False).add_prefix("fold ")
            lines = lines.ffill()  # of a network that stopped early the last one counts
            lines["mean"] = lines.mean(axis=1)
            parts.append(curves(f"training, stage {stage}: {name}", lines))
    counts = pd.DataFrame(metrics[f"{step}_confusion"], CLASSES, CLASSES)
    shares = counts.div(counts.sum(axis=1).clip(1), axis=0)
    parts.append(f"<h2>Confusion of {step}: truth down</h2>{table(shares.to_dict('index'))}")
    parts += ["<h2>Run</h2>"] + [f"{html.escape(f'{k}: {v}')}<br>" for k, v in facts.items()]
    history = history.drop(columns="confusion").to_csv(index=False)
    figure = draw_figure(f"{step}: mean IoU {metrics[f'{step}_miou']:.4f}", pictures)
    files = {"report.html": (PAGE + "".join(parts)).encode(errors="replace"),
             "history.csv": history.encode(),
             "figure.png": cv2.imencode(".png", figure)[1].tobytes()}
    for name, content in files.items():
        try:
            (out / name).unlink(missing_ok=True)  # an earlier run's
            with atomic_write(out / name) as f:
                f.write(content)
        except OSError as e:
            warn(f"{name}: not written ({e.strerror})")
