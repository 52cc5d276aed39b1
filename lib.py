"""What is true of the Mars-terrain task, in the order of the data's way through a run.

    1. data          find, check and load the competition's .npz, fingerprint
    2. outliers      three witnesses against intruders in the training set
    3. frames        the camera frames, put back together from the shuffled tiles
    4. folds         stratified, copies kept together
    5. augmentation  whole batches on the device: flips, affine, light, pasted rare classes
    6. network       the paper's U-Net: gated skips, deep supervision
    7. loss          focal loss
    8. morphology    opening and closing per class
    9. metric        confusion matrix, the competition's mean IoU and the paper's
    10. engine       flags, clock, devices, workers, a network in training, prediction
    11. ranks        the processes that torchrun started
    12. checkpoints  atomic files that know their own checksum
    13. submission   the CSV as bytes, and its checker
    14. report       one self-contained HTML page

Arrays are NumPy on the host and torch on the device; images and masks are uint8 (N, H, W) everywhere.
Nothing here decides anything: every choice is an argument, and solve.py makes it. Nothing runs at import.
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
import shlex
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
PALETTE = np.array([(32, 32, 36), (150, 85, 25), (86, 150, 210), (240, 205, 110), (255, 255, 255)], np.uint8)
PLAIN = [[1.0] * NUM_CLASSES, [0.0] * NUM_CLASSES]  # the rule of decide that takes the likeliest class
KEYS = ("training_set", "test_set", "test_labels")  # of the competition's file
KAGGLE_INPUT = Path("/kaggle/input")  # read-only; an earlier run's output comes back there
SAVE_SECONDS = 30  # between two checkpoints of a network
MAX_BYTES = 8 << 30  # of arrays in memory: the competition's file is 0.43 GB


class UserError(Exception):
    """A mistake the user can mend: main() prints it as one sentence and exits with status 2."""


# ---------------------------------------------------------------------------------------- 1. data

@dataclass
class Data:
    """The competition's file, checked: images and masks uint8 (N, H, W), test images and labels (M, H, W)."""

    path: Path
    sha256: str
    images: np.ndarray
    masks: np.ndarray
    test_images: np.ndarray     # M may be 0
    outlier_images: np.ndarray  # those that the cleaning took out of images
    test_labels: np.ndarray | None = None
    mean: float = 0.0  # of the training images' grey values, and their standard deviation
    std: float = 1.0
    notes: list[str] = field(default_factory=list)  # sentences to print: conversions and warnings


def _refuse(where: str, *faults: tuple[bool, str]) -> None:
    """Raise UserError for the first of the faults, pairs of a condition and a sentence, that holds."""
    for holds, sentence in faults:
        if holds:
            raise UserError(f"{where} {sentence}")


def find_data_file(path: str | Path) -> Path:
    """Return the .npz that `path`, a file or a folder, stands for; UserError says what is there if none.

    In a folder mars_for_students.npz comes first, then the single other .npz that holds a training_set.
    """
    def has_training_set(file: Path) -> bool:
        with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # damaged: nearly anything
            return "training_set.npy" in archive.namelist()
        return False

    path = Path(path).expanduser()
    if path.is_file():
        return path
    files = sorted(path.glob("*.npz")) or sorted(path.rglob("*.npz"))
    best = ([file for file in files if file.name == "mars_for_students.npz"][:1]
            or [file for file in files if file.name != "sample.npz" and has_training_set(file)]
            or [file for file in files if file.name == "sample.npz"] or files)
    if len(best) == 1:
        return best[0]
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    there = best or [*sorted(folder.iterdir())[:12], *sorted(KAGGLE_INPUT.rglob("*.npz"))[:6]]
    fault = f"{len(best)} .npz files, name one of them" if best else "no such file, or no .npz in that folder"
    raise UserError(f"--data {path}: {fault}; wanted is the competition's mars_for_students.npz, there is "
                    f"{', '.join(map(str, there[:18])) or 'nothing'}")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return those of the competition's KEYS that an .npz holds; UserError if it can't be trusted.

    A few bytes of zip can claim terabytes: the sizes in its directory are held against a cap and the file's
    size, then each array's header against its size there, and only then is memory taken.
    """
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    arrays, packed = {}, path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            unpacked = sum(info.file_size for info in members.values())
            most = min(MAX_BYTES, max(64 << 20, 250 * packed))  # real tiles pack 2 to 20 times
            _refuse(f"{path}:", (unpacked > most, f"{packed} bytes would unpack to {unpacked}: refused"))
            for name, info in members.items():
                with archive.open(info) as f:
                    shape, fortran, dtype = headers[np.lib.format.read_magic(f)](f)
                    claimed, size = math.prod(shape) * dtype.itemsize, info.file_size - f.tell()
                    _refuse(f"{path}: {name}",
                            (dtype.hasobject or (name in KEYS and dtype.kind not in "biuf"),
                             f"is {dtype}, not numbers; pickled objects can run code: they are never loaded"),
                            (claimed != size, f"claims {claimed} bytes, has {size}: damaged, fetch it again"))
                    if name in KEYS:
                        arrays[name] = np.ndarray(shape, dtype, f.read(size), order="F" if fortran else "C")
        _refuse(f"{path}:", ("training_set" not in arrays, "key training_set is missing (found "
                             f"{', '.join(members) or 'none'}; expected training_set and test_set)"))
        return arrays
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise nearly anything on a damaged file
        with open(path, "rb") as f:
            start = f.read(512).lstrip()
        kinds = {b"PK": "cut short or damaged", b"<": "a web page, not data: log in to download it",
                 b"\x93NUMPY": "a single .npy array, not an .npz of training_set and test_set",
                 b"": "not an .npz archive" if start else "an empty file"}
        kind = next(kind for prefix, kind in kinds.items() if start.startswith(prefix))
        raise UserError(f"{path}: {kind}; fetch it again ({type(e).__name__}: {str(e)[:120]})") from None


def load_data(path: str | Path) -> Data:
    """Load and check a file in the competition's layout.

    Keys: training_set (N, 2, H, W), [:, 0] images and [:, 1] labels; test_set and test_labels, both
    (M, H, W), are optional. Any numeric dtype. Raises UserError with file, key, index, value and cure.
    """
    path = find_data_file(path)
    arrays, notes = read_npz(path), []
    train, test = arrays["training_set"], arrays.get("test_set")
    _check_shape(f"{path}: training_set, images and labels,", train, ("N", 2, "H", "W"), 2)
    grey = {"training_set[:, 0]": train[:, 0]}
    if test is None:
        notes.append("no test_set in the file: the kit trains and scores, and writes no submission")
    else:
        _check_shape(f"{path}: test_set", test, ("M", *train.shape[2:]), 1)
        grey["test_set"] = test
    masks = _to_labels(train[:, 1], f"{path}: training_set[:, 1]")
    images, *tests = _to_uint8(path, grey, notes)
    data = Data(path, hashlib.sha256(path.read_bytes()).hexdigest(), images, masks, *tests or [images[:0]],
                images[:0], mean=float(images.mean()), std=max(1.0, float(images.std())), notes=notes)
    if tests and "test_labels" in arrays:
        _check_shape(f"{path}: test_labels", arrays["test_labels"], test.shape, 1)
        data.test_labels = _to_labels(arrays["test_labels"], f"{path}: test_labels")
    constant = np.flatnonzero(images.min((1, 2)) == images.max((1, 2)))
    counts = np.bincount(masks.ravel(), minlength=NUM_CLASSES)
    _refuse(f"{path}: there is nothing to learn:",
            (len(constant) == len(images), "every training image is one constant grey"),
            (counts[1:].sum() == 0, "every training pixel is labelled 0 (background)"))
    known = {image.tobytes() for image in images}
    copies = sum(image.tobytes() in known for image in data.test_images)
    if len(constant):
        notes.append(f"{len(constant)} training images are one constant grey (first {constant[0]})")
    if copies:
        notes.append(f"{copies} test images are copies of training images")
    notes += [f"class {c} ({CLASSES[c]}) is on no training pixel: it can't be learnt"
              for c in range(1, NUM_CLASSES) if not counts[c]]
    return data


def _check_shape(name: str, array: np.ndarray, wanted: tuple, least: int) -> None:
    """Raise UserError if array hasn't the wanted sizes (a letter: any) and at least so many images."""
    orders = [axes for axes in itertools.permutations(range(len(wanted)))
              if array.ndim == len(wanted) and all(isinstance(size, str) or array.shape[axis] == size
                                                   for axis, size in zip(axes, wanted, strict=True))]
    cure = f"; transpose{orders[0]} would fit" if orders else ""
    _refuse(f"{name} has shape {array.shape};",
            (tuple(range(array.ndim)) not in orders, f"expected ({', '.join(map(str, wanted))}){cure}"),
            (array.size == 0 or array.shape[:1] < (least,), f"images needed: at least {least}"))


def _to_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Return labels as contiguous uint8; UserError that names images, values and count of those outside."""
    bad = ~np.isin(labels, np.arange(NUM_CLASSES))
    if bad.any():
        images = np.flatnonzero(bad.any((1, 2)))
        cure = "; if these are the images, swap them: training_set[:, ::-1]" if bad.mean() > 0.5 else ""
        raise UserError(f"{name}: labels must be the integers 0 to {NUM_CLASSES - 1}; {bad.sum()} pixels in "
                        f"{len(images)} images (first {', '.join(map(str, images[:5]))}) hold "
                        f"{', '.join(f'{v:g}' for v in np.unique(labels[bad])[:6].tolist())}{cure}")
    return labels.astype(np.uint8, order="C")


def _to_uint8(path: Path, arrays: dict[str, np.ndarray], notes: list[str]) -> list[np.ndarray]:
    """Return images, key → array of any numeric dtype, as contiguous uint8 0..255; UserError on NaN, inf.

    Fractions 0..1 are multiplied by 255. If any value is outside 0..255 (uint16, standardised floats) one
    line maps all arrays, so that training and test images stay comparable.
    """
    ends, out = {}, []
    for key, images in arrays.items():
        good = np.isfinite(images).all((1, 2))
        _refuse(f"{path}: {key}: NaN or infinite pixels,",
                (not good.all(), f"first in image {good.argmin()}; replace them or drop the image"))
        ends[key] = float(images.min()), float(images.max())
    low, high = min(0.0, *(low for low, _ in ends.values())), max(high for _, high in ends.values())
    for key, images in arrays.items():
        fractions = images.dtype.kind in "bf" and ends[key][0] >= 0 and ends[key][1] <= 1
        zero, full = (0, 1) if fractions else (low, high) if low < 0 or high > 255 else (0, 255)
        if (zero, full) != (0, 255):
            notes.append(f"{key}: {images.dtype}, values {zero:g} to {full:g} mapped to 0..255")
        out.append(np.empty(images.shape, np.uint8))
        for i, image in enumerate(images):  # one at a time: float64 is eight times as large
            out[-1][i] = np.rint((image.astype(np.float64) - zero) * (255 / (full - zero or 1)))
    return out


def fingerprint(data: Data) -> dict:
    """Return what identifies and describes the data; pixel_share and images_holding have a value a class."""
    return {"file": data.path.name, "sha256": data.sha256, "train_images": len(data.images),
            "test_images": len(data.test_images), "image_height": data.images.shape[1],
            "image_width": data.images.shape[2], "range": [int(data.images.min()), int(data.images.max())],
            "pixel_share": [round(float((data.masks == c).mean()), 5) for c in range(NUM_CLASSES)],
            "images_holding": [int((data.masks == c).any((1, 2)).sum()) for c in range(NUM_CLASSES)]}


def describe(data: Data) -> list[str]:
    """Return the fingerprint and the notes in lines for people."""
    return [f"data: {data.path}", *(f"      {name} {value}" for name, value in fingerprint(data).items()),
            *(f"note: {note}" for note in data.notes)]


# ---------------------------------------------------------------------------------------- 2. outliers

WITNESSES = ("masks", "template", "autoencoder")
SHORT_SIDE, WINDOW = 32, 14  # images are shrunk to this shorter side; side of a discovered template there
MAX_SHARE = 0.15             # a cut that takes out more of the images is likelier wrong than the images are
MIN_VERTICES = 16            # outlines of masks that repeat among good images: at most 9; the saucers': 80
COLUMNS = {"masks": "mask_copies", "autoencoder": "autoencoder_score", "template": "template_score"}
CUTS = {"masks": 2, "autoencoder": 3.7, "template": 4.5}  # of 2,505 clean images they take 0, 3 and 0
MIRRORS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # steps of slices: plain, left-right, upside down, both


def robust_z(scores: np.ndarray, num_plain: int | None = None) -> np.ndarray:
    """Return the distance from the median of the first num_plain, or all, in sigmas by their MAD."""
    plain = scores[:num_plain]
    sigma = 1.4826 * np.median(np.abs(plain - np.median(plain)))
    return (scores - np.median(plain)) / sigma if sigma > 1e-6 else np.zeros_like(scores)


def shrink(images: np.ndarray) -> np.ndarray:
    """Return float32 (N, h, w), the shorter side SHORT_SIDE, the longer at most 256; NaN becomes 0."""
    size = [4 * round(min(SHORT_SIDE * n / min(images.shape[1:]), 256) / 4) for n in images.shape[:0:-1]]
    small = [cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA) for image in images]
    return np.nan_to_num(np.stack(small))


def mask_copies(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the number of different images, (N,), with one mask or its mirror image; 0 for simple masks."""
    pairs = pd.DataFrame({"mask": [min(mask[::y, ::x].tobytes() for y, x in MIRRORS) for mask in masks],
                          "image": [image.tobytes() for image in images]})  # given twice, it counts once
    copies = pairs.groupby("mask")["image"].transform("nunique").to_numpy(float)
    for i, mask in enumerate(masks):
        outlines = [outline for c in np.unique(mask) for outline in cv2.findContours(
            np.uint8(mask == c), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]]
        vertices = sum(len(cv2.approxPolyDP(outline, 1.5, True)) for outline in outlines)
        copies[i] *= copies[i] > 1 and vertices >= MIN_VERTICES
    return copies


def match(images: np.ndarray, template: np.ndarray, tilts: range, pmap=map) -> np.ndarray:
    """Return the best correlation, (N,), with template mirrored, in three scales and the tilts (degrees).

    It is Fisher's atanh of TM_CCOEFF_NORMED, unbounded, so that z tells a copy (.99) from a likeness.
    """
    (height, width), views = template.shape, []
    for scale, tilt in itertools.product((0.7, 1, 1.4), tilts):
        h, w = max(2, round(height * scale)), max(2, round(width * scale))
        warp = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), tilt, scale)
        warp[:, 2] += (w - width) / 2, (h - height) / 2
        if h <= images.shape[1] and w <= images.shape[2]:
            views += [cv2.warpAffine(template[::y, ::x], warp, (w, h), borderMode=cv2.BORDER_REPLICATE)
                      for y, x in MIRRORS]

    def best(image: np.ndarray) -> float:
        return max((cv2.matchTemplate(image, view, cv2.TM_CCOEFF_NORMED).max() for view in views), default=0)

    return np.arctanh(np.clip(np.nan_to_num(list(pmap(best, images))), -0.999, 0.999))


def discover_templates(images: np.ndarray, labelled: np.ndarray, suspects: np.ndarray,
                       seed: int, pmap=map) -> list[np.ndarray]:
    """Return at most 4 windows (WINDOW, WINDOW), each common to several suspects.

    Args: images and labelled, 0 to 1, shrunk; suspects, bool (N,), named by others, count double among the
    strongest corners on labelled ground: the first 5 % held 53 to 100 % of the intruders of ten sets.
    Source: corner = smaller eigenvalue over a window, Shi and Tomasi 1994; an edge would match everywhere.
    """
    corner = np.stack([np.sqrt(np.maximum(cv2.cornerMinEigenVal(image, WINDOW, 3), 0)) for image in images])
    corner *= np.stack([cv2.blur(share, (WINDOW, WINDOW)) for share in labelled])
    inside = slice(WINDOW // 2, -((WINDOW - 1) // 2))  # centres of whole windows
    corner = corner[:, inside, inside]
    order = np.argsort(-corner.max((1, 2)) * (1 + suspects), kind="stable")
    count, rng = max(16, suspects.sum(), len(images) // 20), np.random.default_rng(seed)
    if len(order) < 2 * count:
        return []
    tested = rng.choice(order[:count], min(80, count), replace=False)
    others = rng.choice(order[count:], min(80, len(order) - count), replace=False)
    windows, hits, found = [], [], []
    for i in order[:count:max(1, count // 40)][:40]:
        y, x = np.unravel_index(corner[i].argmax(), corner[i].shape)
        windows.append(images[i, y:y + WINDOW, x:x + WINDOW])
        scores = match(images[np.append(others, tested)], windows[-1], range(-45, 46, 30), pmap)
        z = robust_z(scores, len(others))
        hits.append((z[len(others):] > 6) & (tested != i))
    hits = np.array(hits)
    while len(found) < 4 and hits.sum(1).max() >= 3:
        best = hits.sum(1).argmax()
        found.append(windows[best])
        hits &= ~hits[best]
    return found


def template_scores(images: np.ndarray, masks: np.ndarray, suspects: np.ndarray,
                    template: np.ndarray | None = None, seed: int = 0, pmap=map) -> np.ndarray | None:
    """Return the robust z, (N,), of each image's best correlation with a template; None if none was found.

    Args: suspects, bool (N,); template, (h, w) in the images' pixels, or None: discovered.
    Raises: UserError if it is flat (OpenCV finds it everywhere) or larger than an image (it swaps both).
    """
    small = shrink(images)
    # half a grey level of noise: on a flat window the correlation is 0/0, and OpenCV may answer 1
    small += np.random.default_rng(seed).uniform(-0.5, 0.5, small[0].shape).astype(np.float32)
    # less the local mean, shadows go and drawing stays: recall at precision .9 from .59 to .84
    small = np.stack([image - cv2.blur(image, (11, 11)) for image in small])
    if template is None:
        templates = discover_templates(small, shrink(masks > 0), suspects, seed, pmap)
    else:
        (height, width), template = template.shape, np.nan_to_num(np.float32(template))
        _refuse(f"the template {height}×{width}",
                (height > images.shape[1] or width > images.shape[2], "is larger than the images"),
                (template.std() < 1, f"is flat, grey level {template.mean():.0f}: all would match it"))
        size = [max(4, round(n * SHORT_SIDE / min(images.shape[1:]))) for n in (width, height)]
        template = cv2.resize(template, size, interpolation=cv2.INTER_AREA)
        templates = [template - cv2.blur(template, (11, 11))]
    scores = [robust_z(match(small, one, range(-45, 46, 15), pmap)) for one in templates]
    return np.max(scores, axis=0) if scores else None


def autoencoder_scores(images: np.ndarray, masks: np.ndarray, seed: int = 0,
                       pmap=map) -> np.ndarray | None:
    """Return the sum, (N,), of robust z's of two signs of the strange; None if the training diverged.

    Each is taken at an image's highest place: the log of the reconstruction error, and that of the distance
    of latents, whitened by PCA, to their third neighbour.
    """
    small, rng = shrink(images), np.random.default_rng(seed)
    x = torch.from_numpy((small - small.mean()) / (small.std() + 1))[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the weights; the encoder sees 13×13 pixels: it learns parts, not scenes
        encoder = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 5, 2, 2))
        decoder = nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU(),
                                nn.ConvTranspose2d(16, 1, 4, 2, 1))
    steps = min(300, 2 * len(x))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        batch = x[rng.integers(len(x), size=64)]
        loss = F.mse_loss(decoder(encoder(batch)), batch)
        if not torch.isfinite(loss):
            return None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        latents = torch.cat([encoder(part) for part in x.split(256)])
        error = (torch.cat([decoder(part) for part in latents.split(256)]) - x) ** 2
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    flat = flat @ (vectors[:, -12:] / values[-12:].clamp(min=1e-6).sqrt())
    # a sample: among all latents an object pasted into 4 % of the images would find itself
    bank = flat[np.random.default_rng(seed).permutation(len(flat))[:2048]]
    near = torch.cat(list(pmap(  # topk: 4 times as fast as kthvalue
        lambda part: torch.cdist(part, bank).topk(min(3, len(bank)), largest=False).values[:, -1],
        flat.split(4096))))
    # weigh by the labels: the rover is as strange as an intruder, but nobody labels it; precision .81 to 1.00
    share = F.avg_pool2d(torch.from_numpy(shrink(masks > 0))[:, None], 4)
    signs = (F.avg_pool2d(error, 4) * share, near.view(share.shape) * share)
    peaks = [F.avg_pool2d(sign, 3, 1, 1).flatten(1).amax(1) for sign in signs]
    return sum(robust_z(np.log(peak.double().numpy() + 1e-6)) for peak in peaks)


def find_outliers(images: np.ndarray, masks: np.ndarray, witnesses: tuple[str, ...] = WITNESSES,
                  template: np.ndarray | None = None, seed: int = 0, log=print,
                  pmap=map) -> pd.DataFrame:
    """Return the images to take out: `index` (ascending), `reasons` (witnesses joined by "+"), scores.

    A witness not asked, or with nothing to go by, scores NaN; log() gets a sentence for the latter and for
    each cut refused. Args: pmap, a map, perhaps of several threads. Args, Raises: see template_scores.
    """
    def sane(what: str, cut: np.ndarray) -> np.ndarray:
        lost = np.setdiff1d(masks, masks[~cut])
        if cut.mean() <= MAX_SHARE and not len(lost):
            return cut
        whole = f" and the whole of class {lost[0]}" if len(lost) else ""
        log(f"cleaning: {what} would take out {cut.sum()} of {len(cut)} images{whole}: refused, all are kept")
        return np.zeros_like(cut)

    found, suspects = pd.DataFrame({"index": range(len(images)), "reasons": ""}), np.zeros(len(images), bool)
    score = {"masks": lambda: mask_copies(images, masks),
             "autoencoder": lambda: autoencoder_scores(images, masks, seed, pmap),
             "template": lambda: template_scores(images, masks, suspects, template, seed, pmap)}
    for name, cut in CUTS.items():
        scores = score[name]() if name in witnesses else np.nan
        if scores is None:
            log(f"cleaning: going on without the {name} witness: it diverged or found no template")
        found[COLUMNS[name]] = np.nan if scores is None else scores
        taken = sane(name, found[COLUMNS[name]].to_numpy() >= cut)
        found.loc[taken, "reasons"] += f"+{name}"
        suspects |= taken
    found["reasons"] = found["reasons"].str[1:]
    return found[sane("all witnesses", suspects)].reset_index(drop=True)


def clean_data(data: Data, state: Path, template: str, seed: int, ranks: Ranks, pmap=map) -> None:
    """Move the outliers from data.images to data.outlier_images; outliers.csv beside state says why.

    It is decided once: a run that goes on trains on the same images. Args: template, a picture's path.
    """
    start, decided = time.monotonic(), read_json(state / "cleaned.json")
    if ranks.rank == 0 and not decided:
        example = cv2.imread(template, cv2.IMREAD_GRAYSCALE) if template else None
        if template and example is None:
            raise UserError(f"--template {template}: not a picture that OpenCV can read")
        found = find_outliers(data.images, data.masks, WITNESSES, example, seed, warn, pmap)
        with atomic_write(state.parent / "outliers.csv") as f:
            f.write(found.to_csv(index=False).encode())
        decided = {"index": found["index"].tolist()}
        write_json(state / "cleaned.json", decided)
    index = np.array(ranks.share(decided)["index"], np.int64)
    print(f"cleaning: {len(index)} of {len(data.images)} training images are intruders "
          f"({state.parent / 'outliers.csv'}), {time.monotonic() - start:.0f} s", flush=True)
    data.outlier_images = data.images[index]
    data.images, data.masks = np.delete(data.images, index, 0), np.delete(data.masks, index, 0)


# ---------------------------------------------------------------------------------------- 3. frames

CELL = 8          # pixels of a side of the cells in which frames are pooled
REACH = 6         # cells over which what a frame says fades; of 4, 6, 9 each was the best of some run
RARE_REACH = 0.7  # cells: a rock says nothing of the next tile, except where the border cuts it
_STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # (row, column) to the tile to the right, left, below, above


def _borders(tiles, vertical, cut=None):
    """Log brightness of the 4 lines on either side of a border (of a cut), outermost first: two (N, L, 4)."""
    x = tiles.transpose(1, 2) if vertical else tiles
    end, start = (x.shape[2], 0) if cut is None else (cut, cut)
    # the log gives dark and sunlit frames one weight; 8 grey levels keep the noise of the dark small
    return [torch.log(z.float() + 8) for z in (x[:, :, end - 4:end].flip(2), x[:, :, start:start + 4])]


def _spectra(lines):
    """Cosine spectra (N, L, 4) along the border of three lines and of the log roughness across it."""
    rough = torch.log((lines[:, :, :1] - lines[:, :, 1:2]).abs() + 0.01)
    k = torch.arange(lines.shape[1], device=lines.device)
    basis = torch.cos(math.pi / len(k) * k[:, None] * (k + 0.5)) * math.sqrt(2 / len(k))
    basis[0] /= math.sqrt(2)
    return torch.einsum("fl,nlc->nfc", basis, torch.cat([lines[:, :, :3], rough], 2))


def _fit_gaussian(pairs):
    """Forms Q (L, 8, 8): the sum of z'Qz / 2 is the log-likelihood ratio of "adjacent" to "unrelated"."""
    z = [torch.cat([_spectra(a), _spectra(b)], 2).double() for a, b in pairs]
    cov = sum(torch.einsum("nfk,nfl->fkl", x, x) / len(x) for x in z)
    # nearby frequencies share their statistics; frequency 0, the mean brightness, stands alone
    cov = torch.stack([cov[max(1, f - 3):f + 4].mean(0) if f else cov[0] for f in range(len(cov))])
    cov += 1e-6 * cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(8).to(cov)
    unrelated = cov.clone()
    unrelated[:, :4, 4:] = unrelated[:, 4:, :4] = 0
    return (torch.linalg.inv(unrelated) - torch.linalg.inv(cov)).float()


def _candidates(a, b, form, pmap):
    """Each border's likeliest partners: rows i of a, j of b (P,), and features (P, 8) of those pairs."""
    x, y = _spectra(a), _spectra(b)
    qx = torch.einsum("nfk,fkl,nfl->n", x, form[:, :4, :4], x)[:, None] / 2
    qy = torch.einsum("nfk,fkl,nfl->n", y, form[:, 4:, 4:], y)[:, None] / 2
    u = torch.cat([torch.einsum("nfk,fkl->nfl", x, form[:, :4, 4:]).flatten(1), qx, torch.ones_like(qx)], 1)
    v = torch.cat([y.flatten(1), torch.ones_like(qy), qy], 1)
    # the ten best of each, 1,024 rows (50 MB) at a time; 16 hold under 0.5 % more of the true partners
    (best_a, j), (best_b, i) = (
        [torch.cat(part) for part in zip(*pmap(
            lambda rows, q=q: (rows @ q.T).topk(min(10, len(q)), 1), p.split(1024)), strict=True)]
        for p, q in ((u, v), (v, u)))
    here, there = (torch.arange(len(z), device=z.device)[:, None] for z in (u, v))
    pairs = torch.cat([(here * len(v) + j).flatten(), (i * len(v) + there).flatten()]).unique()

    def features(p):
        i, j = p // len(v), p % len(v)
        ratios = [(u[i] * v[j]).sum(1)]
        for best in (best_a[i], best_b[j]):  # how far above the best other partner, or below it
            second = best[:, min(1, best.shape[1] - 1)]
            ratios.append(ratios[0] - torch.where(ratios[0] >= best[:, 0] - 1e-3, second, best[:, 0]))
        rx, ry = ((z[:, :, :3] - z[:, :, 1:]).abs().mean(2) + 0.01 for z in (a[i], b[j]))
        step, inner = (a[i, :, k] - b[j, :, k] for k in (0, 1))
        jump = (1.5 * step - 0.5 * inner).abs()  # of the two sides drawn on to the border
        lx, ly = rx.log().mean(1), ry.log().mean(1)
        return torch.stack([
            *(r.sign() * torch.log1p(r.abs() / 3) for r in ratios), (jump.mean(1) + 0.01).log(), lx + ly,
            (jump / (rx + ry) + 0.1).log().mean(1), (lx - ly).abs(), (step.mean(1).abs() + 0.003).log()], 1)

    return pairs // len(v), pairs % len(v), torch.cat(list(pmap(features, pairs.split(8192))))


def _fit_scorer(x, y):
    """Log-odds as a function of features: logistic regression on their products, by Newton's method."""
    mean, std = x.mean(0), x.std(0) + 1e-3

    def products(x):
        x = torch.cat([((x - mean) / std).clamp(-4, 4), torch.ones_like(x[:, :1])], 1).double()
        i, j = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
        return x[:, i] * x[:, j]

    x, y = products(x), y.double()
    weight, ridge = torch.zeros_like(x[0]), torch.eye(x.shape[1]).to(x)
    for _ in range(12):
        p = torch.sigmoid(x @ weight)
        weight += torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + ridge, x.T @ (y - p) - weight)
    # no one border is trusted beyond 1 : 665, so where under 5 % have a neighbour, none alone makes a link
    return lambda x: (products(x) @ weight).clamp(-30, 6.5)


def _links(tiles, vertical, pmap):
    """Likely neighbours on one axis: i, j, log-odds (P,); log-ratio of unlisted ones (2, N); prior log-odds.

    All is fitted to cuts through the tiles, where truth is known, half the partners taken away. The share of
    borders that have a neighbour is estimated after that (Saerens et al. 2002): unrelated tiles stay so.
    """
    runs = max(1, min(12, 8000 // len(tiles)))  # 4: 240 tiles' odds too sure
    cuts = np.linspace(4, tiles.shape[2 - vertical] - 4, 2 * runs + 3).astype(int)[1:-1].tolist()
    form = _fit_gaussian([_borders(tiles, vertical, cut) for cut in cuts[::2]])
    generator, features, truth = torch.Generator().manual_seed(0), [], []
    for a, b in (_borders(tiles, vertical, cut) for cut in cuts[1::2]):
        kept = torch.randperm(len(b), generator=generator)[:(len(b) + 1) // 2].to(b.device)
        i, j, x = _candidates(a, b[kept], form, pmap)
        features.append(x)
        truth.append(kept[j] == i)
    scorer = _fit_scorer(torch.cat(features), torch.cat(truth))
    ends = _borders(tiles, vertical)
    unlisted = torch.full((2, len(tiles)), -2.5).to(ends[0])  # twice that: 1 % of neighbours are unlisted
    for x, ratio in zip(ends, unlisted, strict=True):
        ratio[x[:, :, 0].amax(1) - x[:, :, 0].amin(1) < 0.02] = 0  # flat, as saturated sky: tells nothing
        # Navcam frames' first and last rows are 1.5 times as bright; unnoticed, they match. Nearly all
        # pixels jump one way at 96 % of upper and lower frame edges, at under 0.5 % of other borders
        low, high = (x[:, :, 0] - x[:, :, 1]).quantile(torch.tensor([0.25, 0.75]).to(x), 1)
        ratio[(low > 0.08) | (high < -0.08)] = -math.inf
    i, j, x = _candidates(*ends, form, pmap)
    fit = (i != j) & (unlisted[0, i] == -2.5) & (unlisted[1, j] == -2.5)
    i, j, odds, unlisted = (z.cpu().numpy() for z in (i[fit], j[fit], scorer(x[fit]), unlisted))
    some, share = np.bincount(i, np.exp(odds), len(tiles))[unlisted[0] == -2.5], 0.5
    for _ in range(50 if len(some) else 0):
        share = np.clip((some * share / (some * share + 1 - share)).mean(), 1e-4, 0.95)
    return i, j, odds, unlisted, math.log(share / (1 - share))


def _assemble(n, links, limits, least, further=1.0):
    """Neighbours, confidence, (N, 4), and place, (3, N), as assemble_frames returns them.

    Frames of up to `limits` (rows, columns) are joined, surest link first. A join's log-odds, the prior plus
    the log-ratios of all borders that come to touch, are at least `least`; those that fit count `further`
    beside the best: two frames of one light fit in several rows at once.
    """
    guess = math.log(2 * n)  # a pair's prior odds in the scorer's fit are 1 : 2n
    ratios = [dict(zip((i * n + j).tolist(), (x + guess).tolist(), strict=True)) for i, j, x, *_ in links]
    unlisted = np.concatenate([link[3] for link in links]).T.tolist()
    queue = sorted((-odds, axis, i, j) for axis, link in enumerate(links)
                   for i, j, odds in zip(*(z[link[2] > -5].tolist() for z in link[:3]), strict=True))
    frames, places = [{(0, 0): t} for t in range(n)], {t: (t, 0, 0) for t in range(n)}
    neighbours, confidence = np.full((n, 4), -1, np.int32), np.zeros((n, 4), np.float32)
    for wanted in (9, least, least):  # what waits may be sure once more tiles touch
        waiting = []
        for link in queue:
            _, axis, a, b = link
            (fa, ra, ca), (fb, rb, cb) = places[a], places[b]
            dr, dc = ra + _STEPS[2 * axis][0] - rb, ca + _STEPS[2 * axis][1] - cb
            if len(frames[fa]) < len(frames[fb]):
                fa, fb, dr, dc = fb, fa, -dr, -dc
            cells, moved = frames[fa], {(r + dr, c + dc): t for (r, c), t in frames[fb].items()}
            spans = [max(line) - min(line) + 1 for line in zip(*cells, *moved, strict=True)]
            if fa == fb or spans[0] > limits[0] or spans[1] > limits[1] or not cells.keys().isdisjoint(moved):
                continue
            touching = [(t, side, cells[r + dr, c + dc]) for (r, c), t in moved.items()
                        for side, (dr, dc) in enumerate(_STEPS) if (r + dr, c + dc) in cells]
            fits = [ratios[side // 2].get(o * n + t if side % 2 else t * n + o,
                                          unlisted[t][side] + unlisted[o][side ^ 1])
                    for t, side, o in touching]
            odds = links[axis][4] - guess + max(fits) * (1 - further)
            odds += sum(min(fit, further * fit) for fit in fits)
            if odds < wanted:
                waiting.append(link)
                continue
            cells.update(moved)
            places.update((t, (fa, r, c)) for (r, c), t in moved.items())
            for t, side, o in touching:
                neighbours[t, side], neighbours[o, side ^ 1] = o, t
                confidence[t, side] = confidence[o, side ^ 1] = 1 / (1 + math.exp(-odds))
        queue = waiting
    place = np.array([places[t] for t in range(n)], np.int32).T
    for line in place[1:]:
        line -= scipy.ndimage.minimum(line, place[0], place[0])  # each frame begins at 0
    placed = (neighbours >= 0).any(1)
    place[0, placed] = np.unique(place[0, placed], return_inverse=True)[1]
    place[0, ~placed] = -1
    return neighbours, confidence, place


def assemble_frames(images, device="cpu", pmap=map):
    """Each tile's neighbours in its camera frame, from the pixels alone, how probable each link is, and place.

    Args: images uint8 (N, H, W), training tiles then test tiles.
    Returns: neighbours int32 (N, 4), the tile to the right, left, below, above or -1, each link in both
        tiles' rows; confidence float32 (N, 4), 0 without a link; place int32 (3, N), the tiles' frame, row
        and column, no two in one place. Frames are numbered from 0; a tile without a neighbour has -1.
    Source: border compatibility, greedy assembly: Gallagher 2012; likelihoods are fitted to the tiles.
    """
    n = len(images)
    if n < 2 or min(images.shape[1:]) < 16:
        alone = np.repeat(np.array([[-1], [0], [0]], np.int32), n, 1)
        return np.full((n, 4), -1, np.int32), np.zeros((n, 4), np.float32), alone
    tiles = torch.from_numpy(images).to(device)
    links = [_links(tiles, vertical, pmap) for vertical in (False, True)]
    sure = _assemble(n, links, (8, 8), 6, 0.5)[2]
    # a frame's extent is what 98 % of the tiles keep to, each that is not surely placed a frame of its own
    limits = [1 + np.quantile(line, 0.98, method="higher") for line in sure[1:]]
    return _assemble(n, links, limits, 3.5)


def find_frames(data: Data, state: Path, device: torch.device, ranks: Ranks,
                pmap=map) -> np.ndarray | None:
    """Return assemble_frames' place (3, N + M) of the training and then the test tiles, None if all tiles
    are alone; found once, kept in state."""
    start, tiles = time.monotonic(), np.concatenate([data.images, data.test_images])
    pmap = map if device.type == "cuda" else pmap  # a GPU has threads enough
    found, of = load_checkpoint(state / "frames.pt"), hashlib.sha256(tiles).hexdigest()
    if ranks.rank == 0 and (not found or found.get("of") != of):
        found = {"of": of, "place": torch.from_numpy(assemble_frames(tiles, device, pmap)[2])}
        save_checkpoint(state / "frames.pt", found)
    place = ranks.share(found)["place"].numpy()
    print(f"frames: {place.shape[1]} tiles, {100 * np.mean(place[0] >= 0):.0f} % of them put back into "
          f"{place[0].max() + 1} frames, {time.monotonic() - start:.0f} s", flush=True)
    return place if place[0].max() >= 0 else None


@dataclass(frozen=True)
class Frames:
    """Where tiles lie: each frame is a grid of cells, one a tile. What lies outside, a ring around the frame
    included, and where a tile is missing, is a mirror image of the tile next to it."""

    place: torch.Tensor        # int64 (3, T): each tile's frame, row and column; a lone tile has a frame
    size: torch.Tensor         # int64 (F, 2): rows and columns of each frame
    source: torch.Tensor       # int64 (F, rows + 2, columns + 2): the tile seen there, from row -1 on
    known: torch.Tensor        # bool, the same shape: whether it lies there, and is not its image
    upside_down: torch.Tensor  # bool, the same shape: how the image is mirrored
    left_right: torch.Tensor

    @classmethod
    def lay_out(cls, place: np.ndarray | None, tiles: int) -> Frames:
        """Return the grids of a place of find_frames; None: so many tiles, each in a frame of its own."""
        frame, row, column = np.repeat([[-1], [0], [0]], tiles, 1) if place is None else np.int64(place)
        alone = frame < 0
        frame[alone] = frame.max() + 1 + np.arange(alone.sum())
        row[alone] = column[alone] = 0
        frame = np.unique(frame, return_inverse=True)[1]
        size = np.zeros((frame.max() + 1, 2), np.int64)
        np.maximum.at(size, frame, np.stack([row, column], 1) + 1)
        source = np.full((len(size), *size.max(0) + 2), -1)
        source[frame, row + 1, column + 1] = np.arange(tiles)
        known, mirrored = source >= 0, np.zeros((2, *source.shape), bool)
        while (source < 0).any():
            for axis, to_first in itertools.product((1, 2), (False, True)):
                cells, flags = np.moveaxis(source, axis, 0), np.moveaxis(mirrored, axis + 1, 0)
                to, of = (slice(-1), slice(1, None)) if to_first else (slice(1, None), slice(-1))
                empty = (cells[to] < 0) & (cells[of] >= 0)
                cells[to][empty] = cells[of][empty]
                for k in (0, 1):
                    flags[to][:, k][empty] = flags[of][:, k][empty] ^ (k == axis - 1)
        return cls(*map(torch.from_numpy, (np.stack([frame, row, column]), size, source, known, *mirrored)))

    def to(self, device: torch.device) -> Frames:
        return Frames(*(value.to(device) for value in vars(self).values()))

    def pixels(self, frame: torch.Tensor, top: torch.Tensor, left: torch.Tensor, window: tuple[int, int],
               tile: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return of windows (height, width) of frames, at pixels top and left, which pixel of all tiles' T·H·W
        is seen, int64 (B, height, width), and whether it lies there, bool. At most one tile may be outside.

        Shape: frame, top, left (B,), integers; tile, its height and width.
        """
        device, (h, w) = frame.device, tile
        y, x = (start[:, None] + torch.arange(n, device=device) + side
                for start, n, side in ((top, window[0], h), (left, window[1], w)))
        at = frame[:, None, None], (y // h)[:, :, None], (x // w)[:, None]
        y, x = (y % h)[:, :, None], (x % w)[:, None]
        y = torch.where(self.upside_down[at], h - 1 - y, y)
        x = torch.where(self.left_right[at], w - 1 - x, x)
        return (self.source[at] * h + y) * w + x, self.known[at]

    def batches(self, wanted: np.ndarray, tiles: int) -> list[np.ndarray]:
        """Return the frames with a wanted tile, bool (T,), in arrays of one size and about so many tiles."""
        index = np.unique(self.place[0].cpu().numpy()[wanted])
        size, parts = self.size.cpu().numpy(), []
        for rows, columns in np.unique(size[index], axis=0):
            same = index[(size[index] == (rows, columns)).all(1)]
            count = max(1, tiles // (rows * columns))
            parts += [same[start:start + count] for start in range(0, len(same), count)]
        return parts

    def cut(self, frames: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tiles in frames of one size, (K,), and their parts, (K, C, H, W), of values of whole
        frames, (B, C, rows · H, columns · W)."""
        rows, columns = self.size[frames[0]].tolist()
        b, c, height, width = values.shape
        grid = values.reshape(b, c, rows, height // rows, columns, width // columns).transpose(0, 2, 4, 1, 3, 5)
        inside = torch.from_numpy(frames), slice(1, rows + 1), slice(1, columns + 1)
        known = self.known.cpu()[inside].numpy()
        return self.source.cpu()[inside].numpy()[known], grid[known]


def frame_canvas(tiles: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the frames of tiles (T, C, h, w), as (F, C, rows, h, columns, w), 0 where no tile is."""
    frame, row, column = place[:, place[0] >= 0]
    _, c, h, w = tiles.shape
    canvas = np.zeros((frame.max() + 1, c, row.max() + 1, h, column.max() + 1, w), tiles.dtype)
    canvas[frame, :, row, :, column] = tiles[place[0] >= 0]
    return canvas


def pool_frames(cells: np.ndarray, place: np.ndarray, reach: float) -> np.ndarray:
    """Return for each cell of each tile the mean of its frame's cells (T, C, h, w) near it, float32; 0 for a
    tile without a frame.

    Weights fall as exp(-distance / reach), in cells, down, half as fast across: ground is foreshortened.
    They sum to 1 over endless ground, to less where tiles are missing.
    """
    def weights(n: int, reach: float) -> np.ndarray:
        apart = np.abs(np.arange(n)[:, None] - np.arange(n))
        return (np.exp(-apart / reach) * np.tanh(0.5 / reach)).astype(np.float32)

    canvas, inside = frame_canvas(cells, place), place[0] >= 0
    flat = canvas.reshape(*canvas.shape[:2], canvas.shape[2] * canvas.shape[3], -1)
    flat = weights(flat.shape[2], reach) @ flat @ weights(flat.shape[3], 2 * reach)
    frame, row, column = place[:, inside]
    pooled = np.zeros(cells.shape, np.float32)
    pooled[inside] = flat.reshape(canvas.shape)[frame, :, row, :, column]
    return pooled


def to_cells(shares: np.ndarray) -> np.ndarray:
    """Return the means of shares (T, C, H, W) over cells of about CELL × CELL pixels, float32."""
    size = [max(1, round(n / CELL)) for n in shares.shape[2:]]
    parts = np.array_split(shares, len(shares) // 256 + 1)  # bounded memory: pooling wants floats
    return np.concatenate([F.adaptive_avg_pool2d(torch.from_numpy(p).float(), size).numpy() for p in parts])


def frame_ratios(truth: np.ndarray, seen: np.ndarray, rare: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return what the labels of a frame say of its cells, log-ratios of classes to their overall shares,
    float32 (T, C, h, w). The overall shares count as a little ground nearby: few labels say little.

    Args: truth, class shares of cells (T, C, h, w); seen, bool (T,), whose labels may be seen; rare, bool
    (C,), classes that reach no further than RARE_REACH; place, (3, T) of find_frames.
    """
    known = truth * seen[:, None, None, None]
    known[:, 0] = 0
    base = known.sum((0, 2, 3))[:, None, None]
    base = base / max(base.sum(), 1) + 1e-6
    ratios = np.zeros_like(known)
    for reach, classes in ((REACH, ~rare), (RARE_REACH, rare)):
        pooled = pool_frames(known, place, reach)
        heard = np.log((pooled + 0.02 * base) / ((pooled.sum(1, keepdims=True) + 0.02) * base))
        ratios[:, classes] = heard[:, classes]
    ratios[:, 0] = 0
    return ratios


def frame_evidence(masks: np.ndarray, fold_of: np.ndarray, place: np.ndarray, pmap=map) -> np.ndarray:
    """Return what frames say to each fold of their tiles' cells, frame_ratios', float32 (folds, T, C, h, w).

    To fold k the labels of its tiles are hidden: what is scored is never heard.
    Args: masks (N, H, W), of the first N tiles; fold_of (N,), of at least two folds; place (3, T); pmap, a
    map, perhaps of several threads.
    """
    rare, more = rare_classes(masks), place.shape[1] - len(masks)
    truth = to_cells(np.stack([masks == c for c in range(NUM_CLASSES)], 1))
    truth = np.pad(truth, ((0, more), (0, 0), (0, 0), (0, 0)))
    return np.stack(list(pmap(lambda k: frame_ratios(truth, np.pad(fold_of != k, (0, more)), rare, place),
                              range(fold_of.max() + 1))))


def fit_strength(probs: np.ndarray, evidence: np.ndarray, masks: np.ndarray, pmap=map) -> float:
    """Return how much to believe of the evidence (N, C, h, w), 0 to 2: what is best with out-of-fold probs
    in 1/255, uint8 (N, C, H, W)."""
    small, truth = probs[..., 2::4, 2::4], masks[:, 2::4, 2::4]

    def measure(strength: float) -> float:
        labels = reweigh(small, evidence, strength, 1)[:, 1:].argmax(1) + 1
        return iou_scores(confusion_matrix(truth, labels))[0]

    tried = (0, 0.5, 1, 1.5, 2)
    scores = dict(zip(tried, pmap(measure, tried), strict=True))
    best = max(scores, key=scores.get)  # of equals the weaker, which comes first
    print(f"frames: their labels count {best} times: out of fold {scores[0]:.4f} → {scores[best]:.4f} on a "
          "part of the pixels", flush=True)
    return best


def reweigh(probs: np.ndarray, evidence: np.ndarray, strength: float, first_class: int) -> np.ndarray:
    """Return probabilities in 1/255, uint8 (B, C, H, W), times exp(strength · evidence), normalised again.

    Shape: evidence float32 (B, C, h, w) of any coarser grid.
    """
    out = np.zeros_like(probs)
    for i in range(0, len(probs), 256):  # bounded memory: a float copy of all is four times as large
        log_ratio = torch.from_numpy(strength * evidence[i:i + 256, first_class:])
        fine = F.interpolate(log_ratio, probs.shape[2:], mode="bilinear").exp_().numpy()
        fine *= np.maximum(probs[i:i + 256, first_class:], np.float32(0.5))
        out[i:i + 256, first_class:] = np.rint(fine * (255 / fine.sum(1, keepdims=True)))
    return out


def keep_classes(before: np.ndarray, after: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return probabilities in 1/255, uint8 (B, C, H, W): of the classes kept, bool (C,), as before; the rest
    is shared by the others as after says."""
    out = before.copy()
    for i in range(0, len(out), 256):  # bounded memory
        others = after[i:i + 256, ~kept].astype(np.float32)
        left = 255 - before[i:i + 256, kept].sum(1, keepdims=True, dtype=np.float32)  # rounded up: below 0
        out[i:i + 256, ~kept] = np.rint(others * (left.clip(0) / np.maximum(others.sum(1, keepdims=True), 1)))
    return out


# ---------------------------------------------------------------------------------------- 4. folds

def rare_classes(masks: np.ndarray) -> np.ndarray:
    """Return which classes are rare, bool (NUM_CLASSES,): present, on under 2 % of the labelled pixels."""
    counts = np.bincount(masks.ravel(), minlength=NUM_CLASSES)
    counts[0] = 0
    return (counts > 0) & (counts < 0.02 * counts.sum())


def make_folds(images: np.ndarray, masks: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, int (N,); fold k validates the network trained on all others.

    Stratified by "holds a rare class" and by dominant class, because 6 rock images in a validation set decide
    nothing. Equal images share a fold. folds = 1 is one split: every 7th image (14.3 %) is fold 0, the rest
    are -1. Raises UserError if there are fewer different images than folds.
    """
    rng, n = np.random.default_rng(np.random.SeedSequence([seed, 7])), len(images)
    group = np.unique(images.reshape(n, -1), axis=0, return_inverse=True)[1].ravel()
    counts = np.stack([np.bincount(group, (masks == c).sum((1, 2))) for c in range(NUM_CLASSES)], 1)
    if len(counts) < max(2, folds):
        raise UserError(f"--folds {folds}: the training set has only {len(counts)} different images")
    stratum = counts.argmax(1) + NUM_CLASSES * (counts[:, rare_classes(masks)] > 0).any(1)
    order = rng.permutation(len(counts))
    order = order[np.argsort(stratum[order], kind="stable")]
    fold_of = np.empty(len(counts), np.int64)
    fold_of[order] = np.arange(len(order)) % (folds if folds > 1 else 7)
    return np.where((folds == 1) & (fold_of > 0), -1, fold_of)[group]


# ---------------------------------------------------------------------------------------- 5. augmentation

Batch = tuple[torch.Tensor, torch.Tensor]  # x float (B, C, H, W), y integer labels (B, H, W)


def flip(x: torch.Tensor, y: torch.Tensor, dim: int, gen: torch.Generator) -> Batch:
    """Mirror each image and its mask with probability ½; dim -1 is left-right, -2 up-down."""
    who = torch.rand(len(x), device=x.device, generator=gen) < 0.5
    x = torch.where(who[:, None, None, None], x.flip(dim), x)
    return x, torch.where(who[:, None, None], y.flip(dim), y)


def affine(x: torch.Tensor, y: torch.Tensor, gen: torch.Generator, shift: float, scale: float,
           degrees: float, p: float = 0.5) -> Batch:
    """Move, zoom and turn each image with probability p, mirrored at the border, masks by nearest pixel.

    Args: shift, as a share of the side; scale, ± about 1; degrees, ± about 0; each drawn uniformly.
    """
    b, _, h, w = x.shape
    u = torch.rand(5, b, device=x.device, generator=gen) * 2 - 1
    u = u * (u[4] < 2 * p - 1)
    angle, zoom = u[2] * (degrees * np.pi / 180), 1 / (1 + u[3] * scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # affine_grid works in coordinates of -1..1 on both sides, so a turn needs the aspect ratio
    theta = torch.stack([cos, sin * (h / w), u[0] * 2 * shift, -sin * (w / h), cos, u[1] * 2 * shift], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), [b, 1, h, w], align_corners=False)
    x = F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)
    moved = F.grid_sample(y[:, None].float(), grid, "nearest", "reflection", align_corners=False)
    return x, moved[:, 0].to(y.dtype)


def jitter_light(x: torch.Tensor, gen: torch.Generator, amount: float, p: float = 0.5) -> torch.Tensor:
    """Change brightness and contrast of channel 0 by up to ± amount, each with probability p."""
    u = torch.rand(3, len(x), 1, 1, device=x.device, generator=gen) * 2 - 1
    u = u * (u[2] < 2 * p - 1)
    light = x[:, 0] * (1 + amount * u[0]) + 2 * amount * u[1]
    return torch.cat([light[:, None], x[:, 1:]], 1)


def paste_rare(x: torch.Tensor, y: torch.Tensor, donor_x: torch.Tensor, donor_y: torch.Tensor,
               gen: torch.Generator, p: float) -> Batch:
    """Paste the patches that donor_y marks (labels above 0, one donor an image) into x, y with probability p.

    All channels and the label move together: mirrored, scaled by 0.7 to 1.4, shifted, feathered over 3
    pixels. Images without any label are left alone. Donors must come from the same training split as x.
    Shape: x, donor_x (B, C, H, W) float; y, donor_y (B, H, W) integer labels.
    """
    b, _, h, w = x.shape
    u = torch.rand(6, b, device=x.device, generator=gen)
    zoom, mirror, zero = 1 / (0.7 * 2 ** u[0]), torch.where(u[1] < 0.5, -1.0, 1.0), torch.zeros_like(u[0])
    theta = torch.stack([zoom * mirror, zero, 1.6 * u[2] - 0.8, zero, zoom, 0.8 * u[3] - 0.4], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), [b, 1, h, w], align_corners=False)
    patch = F.grid_sample(donor_x, grid, align_corners=False)
    label = F.grid_sample(donor_y[:, None].float(), grid, mode="nearest", align_corners=False)
    label = label * ((u[4] < p) & (y > 0).flatten(1).any(1))[:, None, None, None]
    alpha = F.avg_pool2d((label > 0).float(), 3, 1, 1, count_include_pad=False)
    return x + alpha * (patch - x), torch.where(label[:, 0] > 0, label[:, 0].to(y.dtype), y)


# ---------------------------------------------------------------------------------------- 6. network

def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3×3 convolutions, each with batch norm and ReLU (the norm makes a bias redundant)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class GatedSkip(nn.Module):
    """Joins an encoder level, dimmed by a one-channel sigmoid gate, with the decoder's ReLU(1×1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Conv2d(channels, 1, 1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Shape: both (B, C, H, W) → (B, 2C, H, W)."""
        return torch.cat([skip * torch.sigmoid(self.gate(skip)), F.relu(self.mix(x))], 1)


class GlobalContext(nn.Module):
    """Adds to every position what the image as a whole says (Cao et al. 2019, with a plain mean)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.mix.weight)  # at first it says nothing
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape: (B, C, H, W) → the same."""
        return x + self.mix(F.relu(self.norm(x.mean((2, 3)))))[:, :, None, None]


class UNet(nn.Module):
    """The paper's U-Net: widths w, 2w, 4w, … and a bottleneck; gated skips; heads on the decoder's levels.

    With width 64, depth 4 and one channel it has the paper's 31.4 M parameters. stride 2 folds blocks of 2×2
    pixels into channels at the input and unfolds them at each head: no layer works at the full size, which
    a depth of 4 spends most of its time on (2.1 times the images/s at as many parameters; Shi et al. 2016).
    context: a GlobalContext behind the bottleneck.
    Shape: (B, in_channels, H, W), any H, W ≥ 1 → list of logits (B, num_classes, ·, ·): the full H, W, and in
    training also 1/2, 1/4, … of the size padded to a multiple of stride · 2^depth, one for each level.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int = 4, stride: int = 1,
                 context: bool = False):
        super().__init__()
        self.depth, self.stride = depth, stride
        *widths, bottleneck = [width * 2 ** i for i in range(depth + 1)]
        channels = [in_channels * stride ** 2, *widths, bottleneck]
        self.encoder = nn.ModuleList(conv_block(*pair) for pair in itertools.pairwise(channels))
        self.context = GlobalContext(bottleneck) if context else nn.Identity()
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths)
        self.skip = nn.ModuleList(GatedSkip(w) for w in widths)
        self.decoder = nn.ModuleList(conv_block(2 * w, w) for w in widths)
        self.heads = nn.ModuleList(nn.Conv2d(w, num_classes * stride ** 2, 1) for w in widths)

    def start_from(self, other: UNet) -> None:
        """Take over the weights of a network of fewer input channels; the others' weights start at 0."""
        weights, first = other.state_dict(), "encoder.0.0.weight"
        extra = self.encoder[0][0].in_channels - other.encoder[0][0].in_channels
        self.load_state_dict(weights | {first: F.pad(weights[first], (0, 0, 0, 0, 0, extra))})

    @torch.no_grad()
    def silence(self, classes: torch.Tensor) -> None:
        """Never answer those classes, bool (num_classes,), until training says otherwise."""
        for head in self.heads:
            head.weight[classes.repeat_interleave(self.stride ** 2)] = 0
            head.bias[classes.repeat_interleave(self.stride ** 2)] = -20

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        h, w = x.shape[-2:]
        step = self.stride * 2 ** self.depth
        x = F.pixel_unshuffle(F.pad(x, (0, -w % step, 0, -h % step), mode="replicate"), self.stride)
        skips, logits = [], []
        for i, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        x = self.context(x)
        for i in reversed(range(self.depth)):
            x = self.decoder[i](self.skip[i](skips[i], self.up[i](x)))
            if self.training or i == 0:
                logits.append(F.pixel_shuffle(self.heads[i](x), self.stride))
        logits[-1] = logits[-1][..., :h, :w]
        return logits[::-1]


# ---------------------------------------------------------------------------------------- 7. loss

def focal_loss(logits: torch.Tensor, target: torch.Tensor, gamma: float, alpha: float = 1.0,
               ignore_index: int = -1) -> torch.Tensor:
    """Return the mean of -α (1 - p)^γ log p over the pixels whose target is not ignore_index; 0 if none is.

    γ = 0 and α = 1 is cross-entropy.
    Shape: logits (B, C, H, W) any float type; target (B, H, W) integer. Stable for any finite logits.
    Source: Lin et al. 2017, equation 5 (the paper's equation 1).
    """
    counted = target != ignore_index
    log_p = F.log_softmax(logits.float(), 1).gather(1, torch.where(counted, target, 0).long()[:, None])[:, 0]
    loss = -alpha * log_p
    if gamma:
        # clamped: (1 - p)^γ has an infinite slope at p = 1 for γ < 1, and inf × 0 is NaN
        loss = loss * (-torch.expm1(log_p)).clamp_min(1e-6) ** gamma
    return (loss * counted).sum() / counted.sum().clamp_min(1)


def deep_supervision_loss(logits: list[torch.Tensor], target: torch.Tensor, level_weights: tuple[float, ...],
                          **loss_args) -> torch.Tensor:
    """Return the weighted sum of focal_loss over the outputs, coarser targets taken at every 2^i-th pixel."""
    loss = 0
    for i, (out, level_weight) in enumerate(zip(logits, (1, *level_weights), strict=True)):
        coarse = target[:, 2 ** i // 2::2 ** i, 2 ** i // 2::2 ** i]
        out = out[..., :coarse.shape[1], :coarse.shape[2]]
        loss = loss + level_weight * focal_loss(out, coarse, **loss_args)
    return loss


# ---------------------------------------------------------------------------------------- 8. morphology

def clean_masks(masks: np.ndarray) -> np.ndarray:
    """Return masks (N, H, W), labels below 8, after opening, then closing, each class on its own.

    A pixel that its class's opening takes away goes to the one class whose closing claims it, and otherwise
    keeps its label; a class that opening would wipe out of an image stays. No class comes before another, so
    relabelling the classes only relabels the result (grey morphology depends on the numbering).
    """
    def morph(bits: np.ndarray, join: np.ufunc) -> np.ndarray:
        """Join each pixel with its 3 × 3 neighbours: & erodes, | dilates, every class's bit at once."""
        rows = np.pad(bits, ((0, 0), (1, 1), (1, 1)), "edge")  # a border met twice changes nothing
        rows = join(join(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
        return join(join(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])

    out = np.empty_like(masks)
    for i in range(0, len(masks), 32):  # 32 masks of 64×128 stay in the cache
        bits = np.uint8(1) << masks[i:i + 32].astype(np.uint8)
        opened = morph(morph(bits, np.bitwise_and), np.bitwise_or)
        present, left = (np.bitwise_or.reduce(one, (1, 2), keepdims=True) for one in (bits, opened))
        opened |= bits & present & ~left
        closed = morph(morph(opened, np.bitwise_or), np.bitwise_and)
        taken = (opened == 0) & (closed > 0) & (closed & (closed - 1) == 0)  # by one class alone
        out[i:i + 32] = np.where(taken, np.log2(np.maximum(closed, 1)).astype(np.uint8), masks[i:i + 32])
    return out


# ---------------------------------------------------------------------------------------- 9. metric

def confusion_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int = NUM_CLASSES) -> np.ndarray:
    """Return the int64 (C, C) pixel counts, rows the truth, columns the prediction, of everything given."""
    truth, pred, counts = truth.ravel(), pred.ravel(), np.zeros(num_classes ** 2, np.int64)
    for i in range(0, len(truth), 2 ** 22):  # in parts: NumPy counts 8 bytes a pixel
        index = truth[i:i + 2 ** 22].astype(np.int64) * num_classes + pred[i:i + 2 ** 22]
        counts += np.bincount(index, minlength=num_classes ** 2)
    return counts.reshape(num_classes, num_classes)


def iou_scores(confusion: np.ndarray, ignore_class: int | None = 0) -> tuple[float, np.ndarray]:
    """Return the mean IoU and each class's, NaN for a class that is neither true nor predicted anywhere.

    ignore_class=0 is the competition's metric, Keras MeanIoU(ignore_class=0): pixels whose truth is 0 count
    for nothing, yet a 0 predicted elsewhere adds a class of IoU 0 to the mean. None is the paper's plain mean
    over all classes. NaN if nothing was counted.
    """
    counts = confusion.astype(np.float64)
    if ignore_class is not None:
        counts[ignore_class] = 0
    hit = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    iou = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    return (float(np.nanmean(iou)) if union.any() else float("nan")), iou


def sure_parts(weak: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Return the connected parts of weak, bool (N, H, W), that hold a sure pixel. Source: Canny 1986."""
    touching = scipy.ndimage.generate_binary_structure(3, 1)
    touching[[0, 2]] = False  # images do not touch
    part = scipy.ndimage.label(weak, touching)[0]
    return weak & np.isin(part, part[weak & sure])


def decide(probs: np.ndarray, rule, first_class: int) -> np.ndarray:
    """Return labels uint8 (B, H, W), the class from first_class on of the largest probability times factor.
    A connected part of a class that nowhere has the least peak asked goes to the next likeliest.

    Shape: probs (B, C, H, W), of any scale; rule (2, C): factors, and peaks as shares of all classes' sum.
    """
    labels = np.empty((len(probs), *probs.shape[2:]), np.uint8)
    factors, peaks = np.float32(rule)
    for i in range(0, len(probs), 256):  # bounded memory: floats
        part = probs[i:i + 256].astype(np.float32)
        whole = part.sum(1)
        part *= factors[:, None, None]
        part[:, :first_class] = -1
        for c in [*np.flatnonzero(peaks)] * 2:  # what falls to another rare class is asked again
            weak = part.argmax(1) == c
            sure = part[:, c] >= factors[c] * peaks[c] * whole
            part[:, c][weak & ~sure_parts(weak, sure)] = -1
        labels[i:i + 256] = part.argmax(1)
    return labels


def elect(sums: np.ndarray, votes: np.ndarray, voters: int, rare: np.ndarray, first_class: int) -> np.ndarray:
    """Return labels uint8 (B, H, W): a rare class, bool (C,), that at least half of the voters, and never a
    single one of several, answer; elsewhere the likeliest of the others from first_class on.

    A rule that suits single networks, which alone are scored out of fold, is far too strict for their mean:
    where they disagree it hardly ever reaches a peak. Shape: sums of probabilities and votes (B, C, H, W).
    """
    common = np.flatnonzero(~rare[first_class:]) + first_class
    labels = common[sums[:, common].argmax(1)].astype(np.uint8)
    most = np.full(labels.shape, max(min(voters, 2), -(-voters // 2)) - 1)
    for c in np.flatnonzero(rare):  # of equals the first
        labels[votes[:, c] > most] = c
        most = np.maximum(most, votes[:, c])
    return labels


def fit_rule(probs: np.ndarray, masks: np.ndarray) -> list[list[float]]:
    """Return the rule of decide that gives out-of-fold probs the best mean IoU: PLAIN, but for rare classes.

    Their IoU J is best where all pixels above about J / (1 + J) are taken, long before they are the likeliest
    (for F1 that is Lipton et al. 2014), in parts that somewhere are sure (what .8 gains was measured).
    Shape: probs (N, C, H, W), masks (N, H, W).
    """
    rule, (probs, masks) = np.array(PLAIN), (probs[..., 2::4, 2::4], masks[:, 2::4, 2::4])
    for rare in np.flatnonzero(rare_classes(masks)):
        scores = {}
        for peak, factor in itertools.product((0, 0.8), (1, 0.5, 0.7, 1.4, 2, 2.8, 4)):  # of equals the first
            rule[:, rare] = factor, peak
            scores[factor, peak] = iou_scores(confusion_matrix(masks, decide(probs, rule, 1)))[0]
        rule[:, rare] = max(scores, key=scores.get)
    return rule.tolist()


def fold_scores(truth: np.ndarray, labels: np.ndarray, fold_of: np.ndarray, folds: int) -> dict:
    """Return both metrics of out-of-fold labels, pooled over the first folds, and the spread over folds."""
    each = [confusion_matrix(truth[fold_of == k], labels[fold_of == k]) for k in range(folds)]
    miou, iou = iou_scores(sum(each))
    mious = np.array([iou_scores(one)[0] for one in each])
    some = mious[np.isfinite(mious)]  # a fold may have nothing labelled
    return {"miou": miou, "iou": iou.tolist(), "paper_miou": iou_scores(sum(each), None)[0],
            "fold_miou": mious.tolist(), "fold_std": float(some.std()) if len(some) else math.nan,
            "confusion": sum(each).tolist()}


def score_step(probs: np.ndarray, masks: np.ndarray, fold_of: np.ndarray, folds: int, first_class: int,
               fit: bool, pmap=map) -> tuple[np.ndarray, dict]:
    """Return the cleaned labels of out-of-fold probs, uint8 (N, H, W), and their scores: fold_scores',
    calibration's, and the "rule" of decide for the submission.

    With fit, rare classes get a rule of their own where that helps: a fold the one that suits the others,
    the submission that of all folds. Shape: probs (N, C, H, W), masks (N, H, W), fold_of (N,).
    """
    scored, best = fold_of >= 0, {}
    tries = [[PLAIN] * (1 + folds)]  # rules of the submission, and of each fold
    if fit and folds > 1:
        parts = [scored, *(scored & (fold_of != fold) for fold in range(folds))]
        tries.append(list(pmap(lambda part: fit_rule(probs[part], masks[part]), parts)))
    for rule, *each in tries:
        labels = np.zeros_like(masks)
        for fold in range(folds):
            own = fold_of == fold
            labels[own] = clean_masks(decide(probs[own], each[fold], first_class))
        result = fold_scores(masks, labels, fold_of, folds) | {"rule": rule}
        if not best or result["miou"] > best["miou"]:
            chosen, best = labels, result
    return chosen, best | calibration(probs[scored], masks[scored])


def calibration(probs: np.ndarray, truth: np.ndarray) -> dict:
    """Return how far the largest of the probabilities can be trusted, over the labelled pixels.

    "ece": expected calibration error, the mean |confidence - accuracy| over sixteen bins of confidence;
    "reliability": each bin's confidence, accuracy and share of the pixels; "least_sure_errors": the share of
    all errors among the least sure fifth. NaN where there is nothing to divide by.
    Shape: probs uint8 (N, C, H, W) in 1/255; truth (N, H, W), 0: unlabelled. Source: Guo et al. 2017.
    """
    known = truth > 0
    sure, right = probs.max(1)[known], (probs.argmax(1) == truth)[known]
    count, hits = np.bincount(sure, minlength=256), np.bincount(sure, right, 256)
    bins, hit, held = (np.add.reduceat(x, range(0, 256, 16))
                       for x in (count, hits, count * np.arange(256) / 255))
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.interp(0.2, np.cumsum(count) / len(sure), np.cumsum(count - hits) / (count - hits).sum())
        return {"ece": float(np.abs(hit - held).sum() / len(sure)), "least_sure_errors": float(least),
                "reliability": np.stack([held / bins, hit / bins, bins / len(sure)], 1).round(4).tolist()}


# ---------------------------------------------------------------------------------------- 10. engine

def option(default, text: str, valid=None, least: float = 0, most: float = math.inf, group: str = ""):
    """Return a dataclass field that parse_flags makes a flag of.

    Args: valid, the values allowed, or a check of one; numbers are allowed from least to most, both
    finite; group, the heading that begins above this flag in the help.
    """
    def in_range(value) -> bool:
        return isinstance(value, str) or (least <= value <= most and abs(value) < math.inf)

    check = valid.__contains__ if isinstance(valid, tuple) else valid or in_range
    return field(default=default, metadata={"help": text, "valid": check, "group": group})


def is_path(value: str) -> bool:
    """Return whether value can be the path of a file or folder; none is below ~nosuchuser."""
    return bool(value) and "\0" not in value and not os.path.expanduser(Path(value)).startswith("~")


def is_device(name: str) -> bool:
    """Return whether name is one that pick_devices knows."""
    return re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None


def parse_flags(config: type, argv: list[str], description: str) -> dict:
    """Return field → value of the flags given in argv, for a dataclass whose flags are made by option()."""
    def complain(message: str):
        raise UserError(message + "; see --help")

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage="%(prog)s [options]", argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = complain
    fields, section = {f.name: f for f in dataclasses.fields(config) if f.metadata}, parser
    for name, f in fields.items():
        section = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else section
        flag, kind = name.replace("_", "-"), {"type": type(f.default), "metavar": str(f.default) or "FILE"}
        if isinstance(f.default, bool):  # the flag turns it over
            flag, kind = "no-" * f.default + flag, {"action": "store_const", "const": not f.default}
        section.add_argument("--" + flag, dest=name, help=f.metadata["help"], **kind)
    known = list(parser._option_string_actions)
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag not in known:
            near = difflib.get_close_matches(flag, known, 1, 0.4)
            complain(f"unknown option {flag}" + (f", did you mean {near[0]}?" if near else ""))
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if not fields[name].metadata["valid"](value):
            wanted = fields[name].metadata["help"].replace("%%", "%")  # argparse's way to print one
            complain(f"--{name.replace('_', '-')} {value}: out of range ({wanted})")
    return given


def run_command(command) -> int:
    """Return the exit status of command(), a function that returns one: its own, 2 a user's mistake or a
    full disk, in one sentence, 130 Ctrl-C, 143 SIGTERM. Streams and signals are given back."""
    before, stdout = None, sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            # an ASCII terminal gets ? for ± instead of a crash; torchrun's processes share one pipe without
            # a buffer, where a line written in two parts could be cut by another's
            stream.reconfigure(errors="replace", line_buffering=True, write_through=False)
    with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return command()
    except (UserError, OSError) as e:  # OSError: a full disk, a folder in a file's place, a closed pipe
        print(f"solve.py: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as e:
        status = 130 if isinstance(e, KeyboardInterrupt) else e.code
        if status:  # --help leaves with 0
            print("solve.py: stopped; the same command, without --fresh, goes on from the last checkpoint",
                  file=sys.stderr)
        return status
    finally:
        sys.stdout = stdout
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def print_metrics(metrics: dict) -> None:
    """Print the metrics but the long ones, a line each."""
    for key, value in metrics.items():
        if not key.endswith(("confusion", "reliability")):
            print(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")


def to_command(config, recipe: dict) -> str:
    """Return the command from which this config was made: flags of fields unlike the recipe's, else the
    default."""
    words = ["python", "solve.py"]
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), f.name.replace("_", "-")
        if f.metadata and value != recipe.get(f.name, f.default):
            words += [f"--no-{flag}" if value is False else f"--{flag}"]
            words += [] if isinstance(value, bool) else [str(value)]
    return shlex.join(words)


def pick_devices(name: str = "auto") -> tuple[list[torch.device], str]:
    """Return the devices to train on, all usable GPUs or the CPU, and the reason.

    A GPU must pass a real convolution forward and backward to be used: is_available() is True on a
    P100 for which today's builds hold no kernels. Several ranks of one machine share its GPUs.
    """
    cpu = torch.device("cpu")
    if name == "cpu":
        return [cpu], "asked for"
    if name != "auto" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rank, ranks = (int(os.environ.get(f"LOCAL_{key}", i)) for i, key in enumerate(("RANK", "WORLD_SIZE")))
    gpus = gpus[rank::ranks] or gpus
    usable, why = [], "there is none"
    for gpu in gpus if name in ("auto", "cuda") else [torch.device(name)]:
        try:
            images = torch.zeros(2, 1, 8, 8, device=gpu)
            nn.Conv2d(1, 8, 3, device=gpu)(images).sum().backward()
            torch.cuda.synchronize(gpu)
            usable.append(gpu)
        except (RuntimeError, AssertionError) as e:  # AssertionError: a build without CUDA
            why = str(e).splitlines()[0][:80]
    if not usable:
        return [cpu], f"no usable GPU: {why}; on Kaggle: Settings, Accelerator, GPU T4 x2"
    usable.sort(key=torch.cuda.get_device_capability)  # the precision suits the first one
    return usable, ", ".join(torch.cuda.get_device_name(gpu) for gpu in usable)


def pick_precision(device: torch.device, name: str = "auto") -> tuple[torch.dtype, str]:
    """Return the autocast type and the reason: by capability on a GPU (a T4 only emulates bf16, whatever
    is_bf16_supported() says), by a timed convolution on a CPU."""
    if name != "auto":
        return getattr(torch, name), "as asked for or as begun"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
        return dtype, f"compute capability {major}.{minor}"
    ratio = _conv_seconds(torch.float32) / _conv_seconds(torch.bfloat16)
    dtype = torch.bfloat16 if ratio > 1.1 else torch.float32
    return dtype, f"bfloat16 has {ratio:.1f}× float32's speed on this processor"


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: activations of megabytes, given back to the kernel after each use, are
    zeroed page by page at the next. Measured at width 16: training +10 %, prediction +40 %."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no block has pages of its own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def _conv_seconds(dtype: torch.dtype) -> float:
    """Return the CPU seconds of a convolution forward and backward, the median of six."""
    conv = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 32, 64, 128).to(memory_format=torch.channels_last)
    step = autocast(x.device, dtype)(lambda: conv(x).float().mean().backward())
    return float(np.median(timeit.repeat(step, number=1, repeat=6)))


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the autocast context of the device; float32 turns it off."""
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype if low else None, enabled=low)


def seed_of(*key: int) -> int:
    """Return a seed that depends on the whole key."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) >> 1


def generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator seeded from a key: with (seed, stage, net, epoch) nothing need be saved."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Clock:
    """Counts the seconds of a run over all its starts, and holds them against --max-hours."""

    def __init__(self, path: Path, max_hours: float):
        self.path, self.limit, self.start = path, max_hours * 3600, time.monotonic()
        self.saved = -math.inf
        before = read_json(path).get("seconds")  # at first: what importing torch takes
        self.before = before if isinstance(before, (int, float)) and 0 <= before < 1e9 else 3.0

    def used(self) -> float:
        return self.before + time.monotonic() - self.start

    def left(self) -> float:
        return self.limit - self.used()

    def save_now_and_then(self) -> None:
        """Write down the seconds used, at most every ten seconds."""
        if time.monotonic() - self.saved > 10:
            self.saved = time.monotonic()
            with contextlib.suppress(OSError):  # a full disk: what is in memory can still win
                write_json(self.path, {"seconds": self.used()})


@dataclass(frozen=True)
class Task:
    """What there is to do and to do it with, as far as its cost depends on it."""

    train: int          # images
    rare: float         # share of them that hold a rare class
    height: int         # of a tile
    width: int
    area: float         # of all frames with their rims, in tiles: what each network predicts
    frames: bool        # whether any were found
    cores: int
    gpus: int = 0
    ranks: int = 1      # of torchrun, all like this one

    def networks(self, folds: int, seeds: int) -> int:
        """Return how many of the networks a rank trains at most."""
        return -(-folds * seeds // self.ranks)

    def share_cores(self, folds: int, seeds: int, streams: int = 1) -> dict[str, int]:
        """Return the "workers" that a rank's networks keep busy, and the "threads" of each."""
        workers = min(self.networks(folds, seeds), self.gpus * streams or self.cores)
        return {"workers": workers, "threads": 1 if self.gpus else self.cores // workers}

    def window(self, around: int) -> float:
        """Return the area of what is trained on at once, in tiles."""
        return (self.height + around) * (self.width + around) / (self.height * self.width)

    def relative_speed(self, plan) -> float:
        """Return the training images/s of all workers of a plan, but for a factor. 1.7 and .4 are measured
        on CPUs, where two threads inside each operation do the work of 1.3 workers; the .4 of the workers on
        an H200, where 1, 2 and 5 at once trained 9,205, 12,799 and 16,510 images/s."""
        busy = min(self.gpus, plan.workers)
        together = busy * (plan.workers / busy) ** 0.4 if busy else plan.workers * plan.threads ** 0.4
        return together / (self.window(plan.around) * plan.width ** 1.7)

    def epoch_seconds(self, plan, speed: float, shown: float) -> float:
        """Return a worker's seconds for an epoch of one network, given the training images/s of all workers,
        validation included, and how often an image is shown."""
        validated = 1 / plan.folds if plan.folds > 1 else 1 / 7
        return self.train * plan.workers / speed * shown * (1 - validated)

    def predict_seconds(self, plan, speed: float, stages: int, views: int) -> float:
        """Return the seconds of all predictions of a run, of so many mirrored views."""
        area = self.area * plan.folds
        steps = 4e-3 * area / self.cores  # rules, evidence, morphology
        return 0.3 * plan.seeds * stages * views * area / (speed * self.window(plan.around)) + steps


class Stopped(Exception):
    """Ends what a worker does, after a signal or another worker's error; nobody else sees it."""


class Workers:
    """Threads of one process that share its work: PyTorch and OpenCV let go of the interpreter's lock.

    On 2 cores two workers of one thread each train 1.5 times as fast as two threads inside each
    operation. Which worker does what changes no bit of the results; the threads of an operation do.
    Args: devices, GPUs, for one worker or several in turn, or the CPU; workers, how many, at least one;
    threads, of each of their operations on the CPU; clock, that is written down now and then.
    """

    def __init__(self, devices: list[torch.device], workers: int, threads: int = 1,
                 clock: Clock | None = None):
        self.devices, self.threads, self.clock = (devices * workers)[:workers], threads, clock
        self.stopping = threading.Event()

    def check(self) -> None:
        """End the calling worker's work if the others have been ended; called between its steps."""
        if self.stopping.is_set():
            raise Stopped

    def run(self, work, meanwhile=lambda: None) -> None:
        """Call work(device) in every worker, and meanwhile() now and then; return when all are done.

        An error in one, or a signal, ends the others at their next check() and is raised here.
        """
        def guarded(device: torch.device) -> None:
            torch.set_num_threads(self.threads)  # holds for the calling thread alone
            try:
                with on_stream(device):
                    work(device)
            except Stopped:
                pass
            except BaseException:
                self.stopping.set()
                raise

        self.stopping.clear()
        with concurrent.futures.ThreadPoolExecutor(len(self.devices)) as pool:  # its end waits for all
            try:
                futures = [pool.submit(guarded, device) for device in self.devices]
                # signals reach the main thread alone, between two looks
                while concurrent.futures.wait(futures, 0.1).not_done:
                    meanwhile()
                    if self.clock is not None:
                        self.clock.save_now_and_then()
            finally:
                self.stopping.set()
        self.stopping.clear()  # not after a second signal: who is still at work must see it
        for future in futures:
            future.result()  # raises its error

    def map_parts(self, function, index: np.ndarray, size: int = 256) -> list:
        """Return [function(part)] of parts of an index, each small enough to be held in memory."""
        return self.map(function, [index[start:start + size] for start in range(0, len(index), size)])

    def map(self, function, items) -> list:
        """Return [function(item) for item in items]; each free worker takes the next item."""
        items = list(items)
        results, waiting = [None] * len(items), collections.deque(range(len(items)))

        def work(device: torch.device) -> None:
            while waiting:
                self.check()
                try:
                    i = waiting.popleft()
                except IndexError:  # another worker was faster
                    return
                results[i] = function(items[i])

        self.run(work)
        return results


@contextlib.contextmanager
def on_stream(device: torch.device):
    """Let the calling thread's work on a GPU run beside that of others, begin after what was done before,
    and be done when it leaves."""
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
    """Return a context in which, of the threads that train on a GPU, one launches kernels, or captures them:
    the search for the fastest algorithm, in another thread, would spoil a capture."""
    return contextlib.nullcontext() if device.type == "cpu" else _launching


class Replayed:
    """A training step, step(tiles), that a GPU replays: its hundreds of kernels are launched at once.

    After a few calls as it is it is captured. All that varies must lie in the same tensors each time, tiles,
    learning rate, generator; on a CPU, or where capture fails, it stays as it is.
    Source: PyTorch's notes on CUDA graphs.
    """

    def __init__(self, step, generator: torch.Generator):
        self.step, self.generator, self.graph, self.tiles = step, generator, None, None
        self.ready = collections.Counter()  # calls of a thread: cuDNN chooses its algorithms for each one
        self.wanted = 3 if generator.device.type == "cuda" else math.inf

    def __call__(self, tiles: torch.Tensor) -> None:
        thread = threading.get_ident()
        if self.graph is None:
            with alone(tiles.device):
                if self.ready[thread] >= self.wanted:
                    self.capture(tiles)
                if self.graph is None:
                    self.ready[thread] += 1
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
            self.wanted = math.inf


@contextlib.contextmanager
def single_threaded():
    """Let the calling thread compute alone, and give back the threads it had: sums of one thread are
    the same on every machine, and beside busy processes threads wait for one another (40 images
    cleaned in 115 s, not 3)."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield before[0]
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


class EMA:
    """The exponential moving average of a network's weights and batch-norm statistics."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model), decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move 1 - decay of the way to model's values; decay 0 copies them."""
        averages, current = ([t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
                             for net in (self.model, model))
        self.steps += 1
        # at first less than decay: short runs must forget their random start
        decay = ((1 + self.steps) / (10 + self.steps)).clamp_max(self.decay)
        torch._foreach_mul_(averages, decay)  # not a step towards them: 0 is to copy, bit for bit
        torch._foreach_add_(averages, torch._foreach_mul(current, 1 - decay))

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.steps.copy_(state["steps"])


@dataclass(eq=False)
class StageInput:
    """What the networks of a stage look at and learn: T tiles in their frames, training tiles first; in
    stage 2 also what was said there before, in V views, one for each fold."""

    frames: Frames
    rim: int                                # mirrored pixels around a frame that is predicted
    window: tuple[int, int]                 # height and width of what is trained on, at least a tile
    images: torch.Tensor                    # uint8 (T, H, W)
    mean: float                             # of the training images' grey values
    std: float
    targets: torch.Tensor                   # int8 (T, H, W); -1: ignored, as of test tiles
    fold_of: torch.Tensor                   # int64 (T,): of a test tile -2
    is_rare: torch.Tensor                   # bool (NUM_CLASSES,)
    paste: float = 0.0                      # share of the windows trained on that get rare patches
    same_fold: bool = False                 # whether a window's labels are of its tile's fold alone
    cleaned: torch.Tensor | None = None     # masks, uint8 (V, T, H, W)
    confidence: torch.Tensor | None = None  # the largest probability, in 1/255, uint8 (V, T, H, W)
    evidence: torch.Tensor | None = None    # of the frames' labels, float (V, T, outputs, h, w)
    only_flag: bool = False                 # whether the cleaned masks' background is all that is seen
    holds_rare: torch.Tensor | None = None  # bool (T,): tiles with a pixel of a rare class; follows

    def __post_init__(self):
        self.holds_rare = torch.cat([self.is_rare[part.clamp_min(0).int()].flatten(1).any(1)
                                     for part in self.targets.split(512)])  # bounded memory: ints

    @property
    def area(self) -> float:
        """Pixels of all frames with their rims, in tiles."""
        size = torch.tensor(self.images.shape[1:], device=self.images.device)
        return float(((self.frames.size * size + 2 * self.rim).prod(1) / size.prod()).sum())

    def to(self, device: torch.device) -> StageInput:
        """Return a copy on that device, or itself if it is there."""
        return self if self.images.device == device else dataclasses.replace(self, **{
            name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})

    def halved(self, paste: float) -> StageInput:
        """Return images and targets of half the side, rounded up, that get patches pasted."""
        images = F.avg_pool2d(self.images.float(), 2, ceil_mode=True).round().byte()
        return dataclasses.replace(self, window=tuple(-(-n // 2) for n in self.window), images=images,
                                   targets=self.targets[:, ::2, ::2].contiguous(), paste=paste)

    def windows(self, tiles: torch.Tensor, first_class: int, held_out: int = -9,
                gen: torch.Generator | None = None) -> Batch:
        """Return windows around tiles and their labels. With gen, for training: at a random place, the tile
        inside, with the labels of all tiles whose fold is not held_out (same_fold: is the tile's own);
        without, for validation: the tile in the middle, and its own labels alone."""
        (frame, row, column), (h, w) = self.frames.place[:, tiles], self.images.shape[1:]
        shift = torch.full((2, len(tiles)), 0.5, device=tiles.device)
        if gen is not None:
            shift = torch.rand(2, len(tiles), device=tiles.device, generator=gen)
        top = (shift[0] * (self.window[0] - h + (gen is not None))).long()
        left = (shift[1] * (self.window[1] - w + (gen is not None))).long()
        pixels, known = self.frames.pixels(frame, row * h - top, column * w - left, self.window, (h, w))
        tile, own = pixels // (h * w), self.fold_of[tiles][:, None, None]
        if gen is None:
            counted = tile == tiles[:, None, None]
        else:
            counted = self.fold_of[tile] == own if self.same_fold else self.fold_of[tile] != held_out
        y = torch.where(known & counted, self.targets.flatten()[pixels], -1)
        return self.look(pixels, own.clamp_min(0), first_class), y

    def whole_frames(self, frames: torch.Tensor, view: int, first_class: int) -> torch.Tensor:
        """Return the input batch of frames of one size, (B,), with their rims, as a view has it."""
        (h, w), corner = self.images.shape[1:], torch.full_like(frames, -self.rim)
        rows, columns = self.frames.size[frames[0]].tolist()
        window = rows * h + 2 * self.rim, columns * w + 2 * self.rim
        pixels = self.frames.pixels(frames, corner, corner, window, (h, w))[0]
        return self.look(pixels, torch.full_like(frames, view)[:, None, None], first_class)

    def look(self, pixels: torch.Tensor, view: torch.Tensor, first_class: int) -> torch.Tensor:
        """Return the input batch, float (B, C, h, w), of pixels of Frames.pixels, each as its view, (B, 1, 1),
        has it.

        Stage 1: the standardised image. Stage 2: also the cleaned mask one-hot from first_class on, its
        confidence and the frames' evidence; or, as published, a flag, 0 where stage 1 said background and -1
        elsewhere.
        """
        h, w = self.images.shape[1:]
        x = [((self.images.flatten()[pixels].float() - self.mean) / self.std)[:, None]]
        if self.cleaned is not None:
            said = pixels + view * self.images.numel()
            cleaned = self.cleaned.flatten()[said][:, None]
            if self.only_flag:
                return torch.cat([*x, -(cleaned != 0).float()], 1)
            classes = torch.arange(first_class, NUM_CLASSES, device=pixels.device)[:, None, None]
            x += [(cleaned == classes).float(), self.confidence.flatten()[said][:, None].float() / 255]
        if self.evidence is not None:
            rows, columns = self.evidence.shape[3:]
            row, column = pixels // w % h * rows // h, pixels % w * columns // w
            x.append(self.evidence[view, pixels // (h * w), :, row, column].permute(0, 3, 1, 2) / 3)
        return torch.cat(x, 1)


@dataclass(eq=False)
class TrainingState:
    """One network in training and all that training changes; it saves and loads itself."""

    path: Path                # its checkpoint
    model: UNet
    ema: EMA                  # what is validated and used
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of an epoch's order and augmentation, seeded anew for each
    sums: torch.Tensor        # of the losses of good steps since they were zeroed, and these steps
    lr: torch.Tensor | None   # where a GPU's graph finds the rate; on a CPU a number will do
    history: list[dict] = field(default_factory=list)  # one record an epoch
    best: dict | None = None  # the EMA's weights after the best epoch
    best_figure: float = -math.inf
    best_epoch: int = 0
    finished: bool = False
    saved: float = field(default_factory=time.monotonic)  # when
    steps: dict = field(default_factory=dict)  # StageInput → Replayed, the step on it

    @classmethod
    def begin(cls, path: Path, model: UNet, device: torch.device, dtype: torch.dtype, lr: float,
              weight_decay: float, ema_decay: float, patience: int) -> TrainingState:
        """Return model, on the device, with nothing learnt yet."""
        model = model.to(device, memory_format=torch.channels_last)
        held = torch.tensor(lr, device=device) if device.type == "cuda" else None
        optimizer = torch.optim.AdamW(model.parameters(), lr if held is None else held, fused=True,
                                      weight_decay=weight_decay, capturable=held is not None)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(  # the paper's 7 of 25 epochs of patience
            optimizer, "max", factor=0.6, patience=patience * 7 // 25, min_lr=1e-6)
        # other types than float16 need no scale, but its way to leave out a step; not the usual 2^16, at
        # which the first ones may all overflow
        scaler = torch.amp.GradScaler(device.type, 2.0**10 if dtype == torch.float16 else 1.0)
        return cls(path, model, EMA(model, ema_decay), optimizer, scheduler, scaler,
                   torch.Generator(device), torch.zeros(2, device=device), held)

    @property
    def device(self) -> torch.device:
        return self.sums.device

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        if self.lr is not None:
            self.lr.fill_(value)
        for group in self.optimizer.param_groups:  # the tensor again: a loaded state has another
            group["lr"] = value if self.lr is None else self.lr
            group["capturable"] = self.lr is not None

    def lower_rate(self, figure: float) -> None:
        """Lower the rate if the figure of the last epochs has not risen, as the scheduler sees fit."""
        self.scheduler.step(figure)
        self.rate = self.rate  # a number that it has put into the tensor's place

    PARTS = ("model", "ema", "optimizer", "scheduler", "scaler")
    FACTS = ("history", "best", "best_figure", "best_epoch", "finished")

    def state_dict(self) -> dict:
        """Return plain values and tensors; of a finished network only what is still used."""
        parts = () if self.finished else self.PARTS
        return {name: getattr(self, name) for name in self.FACTS} | {
            name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict) -> None:
        for name in self.FACTS:
            setattr(self, name, state[name])
        for name in () if self.finished else self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.rate = self.rate  # what was loaded lies on the CPU

    def keep_if_best(self, figure: float) -> None:
        """Keep the averaged weights if their figure is above that of the best so far, or both are -inf: any
        later ones will beat them."""
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
            if self.finished:
                self.ema.model.load_state_dict(self.best)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{self.path}: of other code or another network ({str(e).splitlines()[0][:80]}); "
                            "put that back, or begin anew with --fresh") from e

    def step(self, criterion) -> None:
        """Take one optimizer step down the loss, criterion(model), and count it in sums.

        A step whose gradient is not finite changes no weight and no statistic. Nothing waits for the device.
        """
        statistics = [t for t in self.model.buffers() if t.is_floating_point()]  # batch norm's
        before = [t.clone() for t in statistics]
        loss = criterion(self.model)
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


class Timetable:
    """Which network of a stage the next free worker trains, and for how many epochs there is time.

    All networks come equally far; when the machine is slower than planned, all get fewer epochs.
    Args: epochs, planned; cost, a function that returns the planned seconds of an epoch, given its number
    and that of all; time_left, one that returns the seconds left for training, given how many times as
    slow as planned the machine is; patience, epochs without a better validation; workers, how many.
    """

    def __init__(self, networks: list[TrainingState], epochs: int, cost, time_left, patience: int,
                 workers: int):
        self.networks, self.planned, self.cost, self.time_left = networks, epochs, cost, time_left
        self.patience, self.workers = patience, workers
        self.lock, self.busy, self.paces = threading.Lock(), [], []
        for network in networks:  # where others have ended, if not for want of progress, the rest end too
            if network.finished and len(network.history) - network.best_epoch < patience:
                self.planned = min(self.planned, len(network.history))
        self.epochs = self.affordable()

    def pace(self) -> float:
        """Return how many times as long as planned the last epochs took, once a tenth of all are over: the
        first ones pay for more, as GPUs' graphs."""
        early = any(len(network.history) < 0.1 * self.planned and not network.finished
                    for network in self.networks)
        return 1.0 if early or not self.paces else float(np.median(self.paces[-max(3, len(self.networks)):]))

    def seconds_for(self, epochs: int) -> float:
        """Return the seconds until all networks will have come so far; of an epoch that is under way
        half is done."""
        seconds = 0.0
        for network in self.networks:
            if not network.finished:
                to_do = [self.cost(i, epochs) for i in range(len(network.history) + 1, epochs + 1)]
                seconds += sum(to_do) - 0.5 * sum(to_do[:1]) * (network in self.busy)
        return seconds * self.pace() / self.workers

    def affordable(self) -> int:
        """Return how many epochs, at most as planned, all networks can reach; at least one."""
        reached = [len(network.history) for network in self.networks if not network.finished]
        epochs, left = max(1, self.planned), self.time_left(self.pace())
        while epochs > max([1, *reached]) and self.seconds_for(epochs) > left:
            epochs -= 1
        return epochs

    def take(self, device: torch.device) -> TrainingState | None:
        """Return the network of a device that has come least far and is nobody's; None if there is none."""
        with self.lock:
            self.epochs = self.affordable()
            waiting = [network for network in self.networks if network not in self.busy
                       and network.device == device and not network.finished and len(network.history) < self.epochs]
            if self.time_left(self.pace()) <= 0:  # then a round is ended, and nothing else
                waiting = [network for network in waiting if len(network.history) in (0, self.epochs - 1)]
            if not waiting:
                return None
            network = min(waiting, key=lambda network: len(network.history))
            self.busy.append(network)
            return network

    def give_back(self, network: TrainingState) -> None:
        """Take note of a network's last epoch; after the last of all, or many in vain, it is finished."""
        epoch = len(network.history)
        with self.lock:
            expected = self.cost(epoch, self.epochs)
            self.paces.append(network.history[-1]["seconds"] / max(expected, 1e-6))
            if epoch >= self.epochs:
                self.planned, network.finished = self.epochs, True  # the others end there too
            if epoch - network.best_epoch >= self.patience:
                network.finished = True
        if network.finished or time.monotonic() - network.saved > SAVE_SECONDS:
            network.save()  # still busy: nobody trains it meanwhile
        with self.lock:
            self.busy.remove(network)

    def finish(self) -> None:
        """The time is up: what has been learnt is the result."""
        for network in self.networks:
            if not network.finished:
                network.finished = True
                network.save()


@contextlib.contextmanager
def explained(where: str):
    """Turn want of memory into a UserError, and say where it, or another one, came about and what to try."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{where}: {e}; try --fresh and a smaller --lr") from e
    except RuntimeError as e:
        if not lacks_memory(e):
            raise
        raise UserError(f"{where}: out of memory; try --fresh and a smaller --batch-size or --width") from e


def training_speed(workers: Workers, networks: list[TrainingState], sizes: list[StageInput],
                   train) -> list[float]:
    """Return for each size of images how many a second all workers at once train, each a network.

    Args: train, a function that trains a network on a StageInput for a number of steps and returns that
    of the images. Timed are twice four steps after two, on a GPU more, and the faster counts: what disturbs
    a moment is not to shrink a whole run, and where all is slower than this the timetable shrinks in time.
    """
    waiting = {network.device: [other for other in networks if other.device == network.device]
               for network in networks}
    speeds = []

    def work(device: torch.device) -> None:
        network, own = waiting[device].pop(), []
        with explained("measuring the speed"):
            for data in (size.to(device) for size in sizes):
                rates = []
                for steps in (8, 32, 32) if device.type == "cuda" else (2, 4, 4):  # at first it finds memory
                    start = time.perf_counter()
                    images = train(network, data, steps)
                    rates.append(images / (time.perf_counter() - start))
                own.append(max(rates[1:]))
            network.steps.clear()  # graphs and their memory
        speeds.append(own)

    workers.run(work)
    return np.sum(speeds, 0).tolist()


def train_side_by_side(title: str, table: Timetable, advance, workers: Workers) -> None:
    """Let the workers train a timetable's networks to the end of their epochs or of the time.

    Args: advance, a function that trains a network for its next epoch, given it, the device where it is
    and the number of all epochs, and notes it in its history.
    """
    progress = Progress(title, table)

    def work(device: torch.device) -> None:
        while network := table.take(device):
            with explained(f"{network.path.stem}, epoch {len(network.history) + 1}"):
                advance(network, device, table.epochs)
                if device.type == "cuda":  # another stream may take it next
                    torch.cuda.current_stream(device).synchronize()
            table.give_back(network)

    workers.run(work, progress.show)
    for network in table.networks:
        network.steps.clear()  # graphs and their memory
    table.finish()
    progress.show()
    progress.close()


@torch.inference_mode()
def evaluate(model: UNet, batches, dtype: torch.dtype, first_class: int, **loss_args) -> dict:
    """Return "val_loss", the mean focal loss over the images; "score", the competition's mean IoU; and the
    "confusion" that it comes from, (C, C) rows the truth.

    Args: batches of images, float (B, C, H, W), and labels, integers (B, H, W), -1 ignored, on the model's
    device; first_class, the class of the model's first output; loss_args of focal_loss.
    """
    model.eval()
    device = next(model.parameters()).device
    loss, count = torch.zeros((), device=device), 0
    pairs = torch.zeros(NUM_CLASSES ** 2, dtype=torch.int64, device=device)
    for x, y in batches:
        with alone(device), autocast(device, dtype):
            logits = model(x.contiguous(memory_format=torch.channels_last))[0]
        y = y.long()
        loss += focal_loss(logits, (y - first_class).clamp_min(-1), **loss_args) * len(y)
        count += len(y)
        pair = y * NUM_CLASSES + logits.argmax(1) + first_class
        pairs += torch.bincount(pair[y >= 0], minlength=NUM_CLASSES ** 2)
    confusion = pairs.view(NUM_CLASSES, NUM_CLASSES).cpu().numpy()
    return {"val_loss": float(loss / count), "score": iou_scores(confusion)[0],
            "confusion": confusion.tolist()}


def fused(model: UNet) -> UNet:
    """Return a copy for prediction alone, whose batch norms are part of the convolutions."""
    model = copy.deepcopy(model).eval()
    for block in (*model.encoder, *model.decoder):
        for i in (0, 3):
            block[i] = nn.utils.fusion.fuse_conv_bn_eval(block[i], block[i + 1])
            block[i + 1] = nn.Identity()
    return model.to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict_probs(models: list[UNet], make_input, num_images: int, dtype: torch.dtype, first_class: int,
                  tta: bool, margin: int = 0, batch_size: int = 64) -> np.ndarray:
    """Return models' mean class probabilities in 1/255, uint8 (N, classes, H, W), of make_input's images.

    Args: make_input, a function from a slice to a float batch (B, C, H + 2 margin, W + 2 margin);
    first_class, the class of the model's first output (1: background is never predicted); tta, mean with
    the mirrored copy; batch_size, that is halved until it fits into memory. Each model, in eval mode, answers
    on the device where it is.
    """
    def answer(model: UNet, x: torch.Tensor) -> torch.Tensor:
        device = next(model.parameters()).device
        with autocast(device, dtype):
            return torch.softmax(model(x.to(device))[0].float(), 1).to(x.device)

    out, i = None, 0
    while i < num_images:
        try:
            x = make_input(slice(i, i + batch_size)).contiguous(memory_format=torch.channels_last)
            each = [answer(model, x) for model in models]
            each += [answer(model, x.flip(-1)).flip(-1) for model in models if tta]
            # negative: the margin is cut off
            probs = F.pad((sum(each) / len(each) * 255).round(), (*(-margin,) * 4, first_class, 0))
            probs = probs.to(torch.uint8).cpu().numpy()
            out = np.empty((num_images, *probs.shape[1:]), np.uint8) if i == 0 else out
            out[i:i + batch_size] = probs
            i += batch_size
        except RuntimeError as e:
            batch_size = smaller_batch(batch_size, e)
    return out


@contextlib.contextmanager
def going_on(metrics: dict):
    """Let no mistake in the code cost what there is already: its traceback is printed, "degraded" in the
    metrics says which it was, and what follows goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        metrics["degraded"] = f"{type(error).__name__}: {error}"


class Progress:
    """What is seen of a stage's training: a line an epoch; on a terminal a bar, if tqdm is there."""

    def __init__(self, title: str, table: Timetable):
        self.title, self.table, self.bar = title, table, None
        self.shown = min((len(network.history) for network in table.networks), default=0)
        if getattr(sys.stdout, "isatty", bool)():  # a stream put in its place may have none
            with contextlib.suppress(ImportError):
                from tqdm import tqdm
                self.bar = tqdm(desc=title, initial=self.shown, file=sys.stdout, unit="epoch")

    def show(self) -> None:
        """Show each epoch that all networks have behind them, if it was not shown before."""
        histories = [network.history for network in self.table.networks]
        going = [len(network.history) for network in self.table.networks if not network.finished]
        reached = min(going) if going else max(map(len, histories), default=0)
        for epoch in range(self.shown + 1, reached + 1):
            figures = self.figures([history[min(epoch, len(history)) - 1] for history in histories])
            if self.bar is None:
                with contextlib.suppress(OSError):  # as of a full disk: training goes on
                    print(f"{self.title}  epoch {epoch}/{self.table.epochs}  {figures}", flush=True)
            else:
                self.bar.total = self.table.epochs
                self.bar.set_postfix_str(figures, refresh=False)
                self.bar.update()
            self.shown = epoch

    def figures(self, records: list[dict]) -> str:
        """Return the loss, the score of all networks' validation images together, its mean and spread
        over the networks, each class's IoU, and the time left."""
        scores = [record["score"] for record in records]
        pooled, iou = iou_scores(np.sum([record["confusion"] for record in records], 0))
        classes = "".join(f"  {name} {value:.3f}"
                          for name, value in zip(CLASSES[1:], iou[1:], strict=True))
        return (f"loss {np.mean([record['loss'] for record in records]):.4f}  score {pooled:.4f} "
                f"({np.mean(scores):.4f} ± {np.std(scores):.4f}){classes}  "
                f"{self.table.seconds_for(self.table.epochs) / 60:.1f} min left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def warn(message: str) -> None:
    """Print a warning of this process, with its number if it is another than the first."""
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):  # the log is on the full disk too
        print(message if rank == "0" else f"rank {rank}: {message}",
              file=sys.stdout if rank == "0" else sys.stderr, flush=True)


def lacks_memory(error: RuntimeError) -> bool:
    """Return whether that is what PyTorch says of a GPU, a CPU or cuDNN; illegal access is another error."""
    return re.search(r"memory(?! access)|ALLOC_FAILED", str(error)) is not None


def smaller_batch(batch_size: int, error: RuntimeError) -> int:
    """Return half the batch size after an error for want of memory; raise any other, or UserError at 1."""
    if not lacks_memory(error):
        raise error
    if batch_size == 1:
        raise UserError("not even one image fits into memory: choose a smaller --width") from error
    warn(f"out of memory at {batch_size} images: going on with {batch_size // 2}")
    return batch_size // 2


# ---------------------------------------------------------------------------------------- 11. ranks

class Ranks:
    """The processes of one run, as torchrun started them: this one's number and how many there are. The
    first one prints and writes; of the others come only errors and warnings."""

    def __init__(self):
        self.rank, self.world = 0, 1
        if dist.is_available() and dist.is_torchelastic_launched():
            self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if self.world > 1:  # waits are as long as another's networks train
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def wait(self, work) -> None:
        """Wait for a collective, open to signals; torchrun ends the others when one dies."""
        try:
            while not work.is_completed():
                time.sleep(0.01)
            work.wait()
        except RuntimeError as e:
            # after stage 1 the first one still submits what there is
            error = UserError("another process of this run has ended; the same command goes on")
            raise (SystemExit(2) if self.rank else error) from e

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            self.wait(dist.all_reduce(torch.zeros(1), async_op=True))

    def share(self, value: dict, source: int = 0) -> dict:
        """Return the source's value, a dict of plain values and tensors, in every process."""
        if self.world == 1:
            return value
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self.wait(dist.broadcast(size, source, async_op=True))
        data = data if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
        self.wait(dist.broadcast(data, source, async_op=True))
        return torch.load(io.BytesIO(data.numpy()), map_location="cpu", weights_only=True)

    def gather(self, networks: list[TrainingState]) -> None:
        """Give each network, that the ranks have trained in turn, to all, with its best weights."""
        for net, network in enumerate(networks):
            own = network.state_dict() if net % self.world == self.rank else {}
            network.load_state_dict(self.share(own, net % self.world))
            network.ema.model.load_state_dict(network.best)
            network.ema.model.eval()


# ---------------------------------------------------------------------------------------- 12. checkpoints

@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a file that appears under its name only when complete: temporary name, fsync, os.replace."""
    temporary = path.with_name(f"{path.name}{os.environ.get('RANK', '')}.tmp")  # ranks may share a folder
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
    """Return an open file: until it is closed, or the process dies, no other process of this rank can lock
    this folder, if there are locks here at all. UserError if another one holds it."""
    file = open(folder / f"lock{rank or ''}", "w")  # noqa: SIM115
    with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, some file systems no locks
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run works in {folder.parent}: wait, or use another --out") from None
    return file


def read_json(path: Path) -> dict:
    """Return what write_json wrote, {} if there is no such file; UserError if it is damaged."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError, OSError) as e:
        raise UserError(f"{path}: damaged ({e}); begin anew with --fresh") from None


def write_json(path: Path, value) -> None:
    """Write value as JSON, atomically; NaN, which JSON has not, as null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    with atomic_write(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def open_state(out: Path, identity: dict, fresh: bool, ranks: Ranks) -> tuple[Path, object]:
    """Return the state folder inside out, and its lock; UserError if it cannot be written, or holds a run
    that this one, of another identity (plain values by name), cannot go on with; fresh throws that away."""
    file = out / "state" / "identity.json"
    fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # else it goes on
    identity = json.loads(json.dumps(identity))  # as the file gives it back: tuples are lists
    if ranks.share(identity) != identity:
        raise UserError("torchrun: the processes have different data or options")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(file.parent, ranks.rank)
        ranks.barrier()  # nothing is thrown away that another run has locked
        for pattern in ("stage*", "frames*", "*.json", "*.tmp") if fresh else ():  # nothing but our own
            for old in filter(Path.is_file, file.parent.glob(pattern)):
                old.unlink(missing_ok=True)
        ranks.barrier()  # nor what another process of this one has just written
        before = read_json(file)
        if any(file.parent.glob("stage*.pt")) and not (before and (ranks.rank or file.with_name(
                "plan.json").exists())):
            raise UserError(f"{file.parent}: networks without their identity.json or plan.json; put it back, "
                            "or begin anew with --fresh")
        ranks.barrier()  # in a common folder none takes another's file for an earlier run's
        write_json(file, before or identity)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); choose another folder") from None
    for key in {**before, **identity} if before else ():
        if before.get(key) != identity.get(key):
            raise UserError(f"--out {out} holds a run with {key} = {before.get(key)}, this one has "
                            f"{identity.get(key)}; use another --out, or --fresh to throw that run away")
    print(f"{'going on with the' if before else 'a new'} run in {out}")
    return file.parent, lock


def note_code(state: Path, *sources: str | None) -> None:
    """Say so if the code, of these files, is not that which began the run in this state folder."""
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in sources if file)).hexdigest()
    before = read_json(state / "code.json")
    if before and before.get("sha256") != digest:
        warn("the code has changed since this run began: networks trained before are used as they are; "
             "--fresh trains them anew")
    elif not before:
        write_json(state / "code.json", {"sha256": digest})


def save_checkpoint(path: Path, state: dict) -> None:
    """Write state, plain values and tensors only, behind its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as f:
        f.writelines((hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict | None:
    """Return the state saved at path, None if there is none, or a damaged one, which is named."""
    if not path.exists():
        return None
    raw = path.read_bytes()
    if hashlib.sha256(raw[32:]).digest() == raw[:32]:  # most flipped bits would load in silence
        with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
            # with weights_only nothing in a file is executed
            return torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)
    warn(f"{path}: damaged; what it held is done again")
    return None


# ---------------------------------------------------------------------------------------- 13. submission

def write_submission(path: Path, preds: np.ndarray) -> None:
    """Write preds (M, H, W), labels 0..9, as the competition's CSV, in the very bytes of pandas."""
    flat = preds.reshape(len(preds), -1)
    assert flat.max() <= 9, "labels of two digits would need another layout"
    cells = np.full(2 * flat.shape[1], ord(","), np.uint8)  # one row: a digit, a comma, a digit, …
    cells[-1] = ord("\n")
    with atomic_write(path) as f:
        f.write(",".join(["id", *map(str, range(flat.shape[1]))]).encode() + b"\n")
        for i, labels in enumerate(flat):
            cells[::2] = labels + ord("0")
            f.write(b"%d," % i + cells.tobytes())


def check_submission(path: Path, num_images: int, num_pixels: int, first_class: int = 1) -> np.ndarray:
    """Read a submission back as any reader would, line by line, and return its labels, uint8 (M, pixels).

    Raises UserError that names the first row and column at fault: header, ids, number of columns, labels
    below first_class (a single 0 costs a fifth of the score) or that are no class, too few or many rows.
    """
    labels, allowed = [], b"".join(b"%d" % label for label in range(first_class, NUM_CLASSES))
    header = ",".join(["id", *map(str, range(num_pixels))]).encode()
    with open(path, "rb") as f:
        _refuse(f"{path}:", (f.readline().rstrip(b"\r\n") != header,
                             f"the header is not id,0,1,…,{num_pixels - 1}"))
        for row, line in enumerate(f):
            name, _, rest = line.rstrip(b"\r\n").partition(b",")
            cells, bad = rest[::2], rest[::2].lstrip(allowed)  # bad: from the first bad cell on
            _refuse(f"{path}: row {row},",
                    (name != b"%d" % row or len(rest) != 2 * num_pixels - 1 or rest[1::2].strip(b",") != b"",
                     f"has the id {name[:20].decode('latin1')!r} and {rest.count(b',') + 1} columns; "
                     f"expected {row} and {num_pixels} labels of one digit, separated by commas"),
                    (bad != b"", f"column {len(cells) - len(bad)} holds {bad[:1].decode('latin1')!r}; "
                                 f"expected labels {first_class} to {NUM_CLASSES - 1}"))
            labels.append(np.frombuffer(cells, np.uint8) - np.uint8(ord("0")))
    _refuse(f"{path}:", (len(labels) != num_images, f"{len(labels)} rows; expected {num_images}"))
    return np.stack(labels)


def describe_labels(labels: np.ndarray, sure: np.ndarray, truth: np.ndarray | None) -> dict:
    """Return the shares of labels (M, H, W), how sure they are, the mean of (M,), and their scores where the
    truth is known."""
    figures = {"test_shares": [round(float((labels == c).mean()), 5) for c in range(NUM_CLASSES)],
               "test_confidence": float(sure.mean())}
    if truth is not None:
        figures["test_miou"], iou = iou_scores(confusion_matrix(truth, labels))
        figures["test_iou"] = iou.tolist()
    return figures


def submit(file: Path, labels: np.ndarray, first_class: int) -> None:
    """Write labels (M, H, W) as a submission, read it back, and write its zip beside it (164 MB of labels
    become about 3)."""
    file.with_suffix(".zip").unlink(missing_ok=True)  # an earlier start's
    write_submission(file, labels)
    read = check_submission(file, len(labels), labels[0].size, first_class)
    if not np.array_equal(read, labels.reshape(read.shape)):
        raise UserError(f"{file}: what was read back is not what was written; check the disk")
    with (atomic_write(file.with_suffix(".zip")) as f,
          zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive):
        archive.write(file, file.name)
    print(f"submission: {file}, {len(labels)} rows, checked")


# ---------------------------------------------------------------------------------------- 14. report

STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1340px;margin:auto;padding:1em}
table{border-collapse:collapse}td,th{border:1px solid #8888;padding:.25em .6em;text-align:left}
.wide{overflow-x:auto}span{white-space:nowrap}
figure{display:inline-block;max-width:calc(100% - 1em);margin:.3em 1em .3em 0;white-space:nowrap}
figcaption{font-size:12px;max-width:480px;white-space:normal}img{image-rendering:pixelated;margin-right:4px}
svg{display:block;width:480px;max-width:100%;height:160px;fill:none}
svg{border:solid #8888;border-width:0 0 1px 1px}
polyline{stroke-width:1.6;vector-effect:non-scaling-stroke}
i{display:inline-block;width:1em;height:1em;margin:0 .3em 0 1em;border:1px solid #888}"""
HUES = ("#d55e00", "#0072b2", "#009e73", "#c06a98", "#808080")  # contrast ≥ 3 with both white and black paper


def pictures(caption: str, row: dict[str, np.ndarray], scale: int = 2) -> str:
    """Return a row of pictures, name → grey (H, W) or RGB (H, W, 3), scale times as large, over caption."""
    tags = ""
    for name, pixels in row.items():
        png = cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()
        tags += (f'<img alt="{html.escape(name)}" width="{scale * pixels.shape[1]}" '
                 f'src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    return f'<figure class="wide">{tags}<figcaption>{html.escape(caption)}</figcaption></figure>'


def table(frame: pd.DataFrame) -> str:
    """Return an HTML table in a box that scrolls; floats have three decimals, NaN is a dash."""
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts long texts
        return f'<div class="wide">{frame.to_html(border=0, na_rep="–", float_format="{:.3f}".format)}</div>'


def curves(title: str, lines: dict[str, list[float]]) -> str:
    """Return a drawing of lines by name, each with a hue of its own, over one scale."""
    # not by matplotlib: its import starts a process that lists fonts, and writes into the user's home
    values = [value for line in lines.values() for value in line if np.isfinite(value)] or [0.0]
    low, high, shapes, names = min(values), max(values), "", ""
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{x},{(high - y) / (high - low or 1):.4f}"
                          for x, y in enumerate(line) if np.isfinite(y))
        shapes += f'<polyline points="{points}" stroke="{HUES[i % len(HUES)]}"/>'
        names += f' <span><i style="background:{HUES[i % len(HUES)]}"></i>{name}</span>'
    last = max(2, *map(len, lines.values())) - 1
    return (f'<figure><svg viewBox="0 0 {last} 1" preserveAspectRatio="none">{shapes}</svg>'
            f"<figcaption>{title}, {low:.3f} to {high:.3f}{names}</figcaption></figure>")


def show_frames(data: Data, place: np.ndarray, labels: np.ndarray,
                test_labels: np.ndarray) -> list[str]:
    """Return a heading and rows of pictures of the six largest frames: image, known labels, predictions.

    Args: place, of find_frames; labels out of fold, uint8 (N, H, W), and of the test tiles, (M, H, W).
    """
    tests = np.stack([data.test_images, np.zeros_like(test_labels), test_labels], 1)
    tiles = np.concatenate([np.stack([data.images, data.masks, labels], 1), tests])
    rows = ["<h2>Camera frames, put back together</h2>"]
    for frame in np.bincount(place[0, place[0] >= 0]).argsort(kind="stable")[:-7:-1]:
        inside = place[0] == frame
        canvas = frame_canvas(tiles[inside], place[:, inside] - [[frame], [0], [0]])[0]
        image, truth, pred = canvas.reshape(3, canvas.shape[1] * canvas.shape[2], -1)
        row = {"image": image, "known labels": PALETTE[truth], "prediction": PALETTE[pred]}
        rows.append(pictures(f"frame {frame}, {inside.sum()} tiles: {', '.join(row)}", row, 1))
    return rows


def show_images(data: Data, labels: dict[str, np.ndarray], submitted: str, validated: np.ndarray,
                confidence: np.ndarray) -> list[str]:
    """Return a heading with the legend, and rows of pictures of validated images, with what each step said.

    Args: labels, each step's, uint8 (N, H, W); submitted, the step that decides best and worst; validated,
    bool (N,); confidence of that step, uint8 (N, H, W).
    """
    legend = "".join(f'<span><i style="background:rgb{tuple(color)}"></i>{name}</span> '
                     for name, color in zip(CLASSES, PALETTE.tolist(), strict=True))
    parts = [f"<h2>Validated images: best, median, worst, and with big rock</h2>{legend}"]
    known = data.masks > 0
    wrong = (data.masks != labels[submitted]) & known
    right = 1 - wrong.sum((1, 2)) / known.sum((1, 2)).clip(1)
    order = [n for n in np.argsort(right, kind="stable") if validated[n] and known[n].mean() > 0.25]
    middle, rock = len(order) // 2, np.flatnonzero(validated & (data.masks == NUM_CLASSES - 1).any((1, 2)))
    shown = {"best": order[-3:], "median": order[middle:middle + 3], "worst": order[:3], "big rock": rock[:6]}
    for kind, n in ((kind, n) for kind, index in shown.items() for n in index):
        row = {"image": data.images[n], "truth": PALETTE[data.masks[n]],
               **{name: PALETTE[masks[n]] for name, masks in labels.items()},
               "wrong (white)": np.uint8(np.where(known[n], 255 * wrong[n], 90)), "confidence": confidence[n]}
        parts.append(pictures(f"{kind}, accuracy {right[n]:.2f}: {', '.join(row)}", row))
    return parts


def show_scores(metrics: dict, histories: dict, data: Data, labels: dict[str, np.ndarray],
                test_labels: np.ndarray) -> list[str]:
    """Return tables and curves: scores, training, confusion, calibration, shares. Args: see write_report."""
    columns = {"miou": "mean IoU (competition)", "fold_std": "± over folds", "ece": "calibration error",
               "least_sure_errors": "errors in the least sure fifth",
               "paper_miou": "mean IoU (paper, with background)"}
    scores = [[*(metrics[f"{s}_{name}"] for name in columns), *metrics[f"{s}_iou"]] for s in labels]
    header = [*columns.values(), *CLASSES]
    parts = ["<h2>Scores out of fold</h2>", table(pd.DataFrame(scores, [*labels], header, float))]
    if "test_miou" in metrics:
        parts.append(f"<p>Test labels were in the file: mean IoU {metrics['test_miou']:.4f}.</p>")
    parts.append(f"<p>Submitted: <b>{metrics['submitted']}</b>.</p><h2>Training</h2>")
    for stage in sorted({stage for stage, _ in histories}):
        nets = {net: histories[of, net] for of, net in sorted(histories) if of == stage}
        for name, title in (("score", "validation mean IoU"), ("loss", "training loss")):
            lines = {f"network {net}": [epoch[name] for epoch in nets[net]] for net in nets}
            parts.append(curves(f"stage {stage}, {title}, epoch by epoch", lines))
    parts.append("<h2>Confusion, rows sum to 1: truth down, prediction across</h2>")
    for s in labels:
        counts = pd.DataFrame(metrics[f"{s}_confusion"], CLASSES, CLASSES)
        parts.append(f"<h3>{s}</h3>" + table(counts.div(counts.sum(axis=1).clip(1), axis=0)))
    rows = metrics[f"{metrics['submitted']}_reliability"]
    bins = np.array([row for row in rows if row[2] > 0] or [[0] * 3])
    parts += ["<h2>How sure, how right</h2>", curves(f"{metrics['submitted']}, from the least sure pixels to "
              "the surest", {"confidence": bins[:, 0].tolist(), "accuracy": bins[:, 1].tolist()})]
    if len(test_labels):
        shares = np.stack([np.bincount(x.ravel(), minlength=NUM_CLASSES) for x in (data.masks, test_labels)])
        shares = pd.DataFrame(shares[:, 1:], ["training labels", "submission"], CLASSES[1:])
        parts += ["<h2>Shares of the classes</h2>", table(shares.div(shares.sum(axis=1).clip(1), axis=0))]
    return parts


def write_report(out: Path, metrics: dict, histories: dict, facts: dict, data: Data, validated: np.ndarray,
                 labels: dict[str, np.ndarray], confidence: np.ndarray, place: np.ndarray | None,
                 test_labels: np.ndarray) -> None:
    """Write out/report.html, one file that needs no network.

    Args: metrics, what metrics.json holds; histories, (stage, net) → list of epochs; facts, anything to
    list at the end; validated, bool (N,); each step's out-of-fold labels by name, and the submitted
    one's confidence, uint8 (N, H, W); place, of find_frames; the labels submitted, (M, H, W).
    """
    parts = show_scores(metrics, histories, data, labels, test_labels)
    images = show_images(data, labels, metrics["submitted"], validated, confidence)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(shell, "kernel"):  # below a notebook's cell: scores, legend, pictures of each kind
        from IPython.display import HTML, display
        display(HTML("".join(parts[:2] + images[:1] + images[1::3])))
    parts += images
    if place is not None:
        seen = labels[metrics["submitted"]] * validated[:, None, None]
        parts += show_frames(data, place, seen, test_labels)
    parts.append(f"<h2>Intruders: {len(data.outlier_images)} training images taken out</h2>")
    with contextlib.suppress(OSError, KeyError, ValueError):  # the list is gone, or was edited
        found = pd.read_csv(out / "outliers.csv")
        parts += [pictures(f"{i}: {reasons}", {"intruder": image}, 1) for i, reasons, image in zip(
            found["index"], found["reasons"], data.outlier_images[:60], strict=False)]
    facts = {**facts, "torch": torch.__version__, "numpy": np.__version__, "opencv": cv2.__version__}
    parts.append("<h2>Data, choices, machine</h2>" + table(pd.Series(facts).map(str).to_frame("value")))
    page = ('<!doctype html><html lang="en"><meta charset="utf-8"><title>Mars terrain: the run</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
            f"<h1>Mars terrain: the run</h1>{''.join(parts)}</html>")
    try:
        with atomic_write(out / "report.html") as f:
            f.write(page.encode(errors="replace"))
    except OSError as e:  # a full disk: the submission is there
        (out / "report.html").unlink(missing_ok=True)  # an earlier start's
        warn(f"report.html: not written ({e.strerror})")
