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
    10. engine       flags, clock, device, precision, prediction
    11. checkpoints  atomic files that know their own checksum
    12. submission   the CSV as bytes, and its checker
    13. report       one self-contained HTML page

Arrays are NumPy on the host and torch on the device; images and masks are uint8 (N, H, W) everywhere.
Nothing here decides anything: every choice is an argument, and solve.py makes it. Nothing runs at import.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import difflib
import hashlib
import html
import io
import json
import math
import os
import pickle
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import scipy.sparse
import torch
import torch.nn as nn
import torch.nn.functional as F

CLASSES = ("Background", "Soil", "Bedrock", "Sand", "Big Rock")
NUM_CLASSES = len(CLASSES)
PALETTE = np.array([(32, 32, 36), (166, 97, 26), (90, 140, 190), (240, 200, 110), (210, 30, 70)], np.uint8)
MAX_BYTES = 8 << 30  # of arrays in memory: the competition's file is 0.43 GB


class UserError(Exception):
    """A mistake the user can mend: main() prints it as one sentence and exits with status 2."""


# ---------------------------------------------------------------------------------------- 1. data


@dataclass
class Data:
    """The competition's file, checked: images and masks uint8 (N, H, W), test images (M, H, W) or None."""

    path: Path
    sha256: str
    images: np.ndarray
    masks: np.ndarray
    test_images: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    dtype: str = "uint8"  # of the training set in the file
    mean: float = 0.0     # of the training images' grey values, and their standard deviation
    std: float = 1.0
    notes: list[str] = field(default_factory=list)  # sentences to print: conversions and warnings


def find_data_file(path: str | Path) -> Path:
    """Return the .npz that `path`, a file or a folder, stands for.

    In a folder mars_for_students.npz comes first, then the single other .npz with the right keys, then
    sample.npz. Raises UserError that says what is there when nothing fits.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        parent = next(p for p in path.absolute().parents if p.is_dir())
        there = ", ".join(sorted(p.name for p in parent.iterdir())[:12]) or "nothing"
        kaggle = ", ".join(map(str, sorted(Path("/kaggle/input").rglob("*.npz"))[:6]))
        raise UserError(f"--data {path}: no such file or folder; {parent} holds {there}"
                        + (f"; under /kaggle/input: {kaggle}" if kaggle else ""))
    files = sorted(path.glob("*.npz")) or sorted(path.rglob("*.npz"))
    named = [f for f in files if f.name == "mars_for_students.npz"]
    if named:
        return named[0]
    if len(files) > 1:
        files = [f for f in files if f.name != "sample.npz" and _has_training_set(f)] or \
                [f for f in files if f.name == "sample.npz"] or files
    if not files:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
        raise UserError(f"--data {path}: no .npz in this folder (it holds {there}); "
                        "put the competition's mars_for_students.npz there")
    if len(files) > 1:
        raise UserError(f"--data {path}: {len(files)} .npz files ({', '.join(f.name for f in files[:6])}); "
                        "name one of them")
    return files[0]


def _has_training_set(path: Path) -> bool:
    try:
        return "training_set" in read_headers(path)
    except UserError:
        return False


def read_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return name → (shape, dtype) of an .npz without reading its arrays; UserError if it can't be trusted.

    The headers come first because a few bytes of zip can claim terabytes: what they claim is held against a
    cap, against the archive's own sizes and against its compression before anything is allocated.
    """
    with _explained(path), open(path, "rb") as f:
        start = f.read(512)
    if not start:
        raise UserError(f"{path}: the file is empty; fetch it again")
    if start.startswith(b"\x93NUMPY"):
        raise UserError(f"{path}: a single .npy array; expected an .npz with training_set and test_set")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: a web page saved under this name, not data; log in and download it again")
    if not start.startswith(b"PK"):
        raise UserError(f"{path}: not an .npz archive (it starts with {start[:4]!r})")
    headers, claimed = {}, 0
    with _explained(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = {(1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0}.get(version)
                if read is None:
                    raise UserError(f"{path}: array {info.filename} has the unknown format version {version}")
                shape, _, dtype = read(member)
                body = info.file_size - member.tell()
            name = info.filename.removesuffix(".npy")
            if dtype.hasobject:
                raise UserError(f"{path}: {name} holds pickled objects, which can run code and are never "
                                "loaded; save it as a numeric array")
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            claimed += max(size, info.file_size)
            if claimed > MAX_BYTES:
                raise UserError(f"{path}: {name} claims {size / 2**30:.0f} GiB; more than "
                                f"{MAX_BYTES >> 30} GiB in all is refused")
            if size != body:
                raise UserError(f"{path}: {name} claims {size} bytes and has {body}; the file is damaged, "
                                "fetch it again")
            headers[name] = (shape, dtype)
    if claimed > (64 << 20) and claimed > 250 * path.stat().st_size:  # real tiles pack 2 to 20 times
        raise UserError(f"{path}: {path.stat().st_size} bytes would unpack to {claimed}; no images do")
    return headers


@contextlib.contextmanager
def _explained(path: Path):
    """Turn what the zip, zlib and NumPy readers raise on damaged files into one sentence."""
    try:
        yield
    except (zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cut short or damaged ({e}); fetch it again") from None
    except (ValueError, SyntaxError, RuntimeError, NotImplementedError, KeyError, OverflowError, TypeError,
            OSError, MemoryError) as e:
        raise UserError(f"{path}: cannot be read as .npz ({type(e).__name__}: {str(e)[:120]}); "
                        "fetch it again") from None


def load_data(path: str | Path) -> Data:
    """Load and check a file in the competition's layout.

    Keys: training_set (N, 2, H, W), [:, 0] images and [:, 1] labels; test_set and test_labels, both
    (M, H, W), are optional. Any numeric dtype. Raises UserError with file, key, index, value and cure.
    """
    path = find_data_file(path)
    headers = read_headers(path)
    if "training_set" not in headers:
        raise UserError(f"{path}: key training_set is missing (found {', '.join(headers) or 'none'}; "
                        "expected training_set and test_set)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _check_shapes(path, headers)
    with _explained(path), np.load(path, allow_pickle=False) as npz:
        arrays = {key: npz[key] for key in ("training_set", "test_set", "test_labels") if key in headers}
    train = arrays.pop("training_set")
    if train[:, 0].max() < NUM_CLASSES and (train[:, 1] >= NUM_CLASSES).mean() > 0.5:
        raise UserError(f"{path}: training_set[:, 0] looks like the labels and [:, 1] like the images; "
                        "swap them: training_set[:, ::-1]")
    notes: list[str] = []
    pictures = {f"{path}: training_set[:, 0]": train[:, 0]}
    if "test_set" in arrays:
        pictures[f"{path}: test_set"] = arrays.pop("test_set")
    else:
        notes.append("no test_set in the file: the kit trains and scores, and writes no submission")
    masks = _to_labels(train[:, 1], f"{path}: training_set[:, 1]")
    images, *test = _to_uint8(pictures, notes)
    data = Data(path, digest, images, masks, test[0] if test else None, dtype=str(train.dtype), notes=notes,
                mean=float(images.mean()), std=max(1.0, float(images.std())))
    if test and "test_labels" in arrays:
        data.test_labels = _to_labels(arrays["test_labels"], f"{path}: test_labels")
    _check_content(data)
    return data


def _check_shapes(path: Path, headers: dict) -> None:
    """Raise UserError for wrong axes, sizes or kinds, from the headers alone."""
    for key in ("training_set", "test_set", "test_labels"):
        if key in headers and headers[key][1].kind not in "biuf":
            raise UserError(f"{path}: {key} has dtype {headers[key][1]}; expected numbers")
    shape = headers["training_set"][0]
    if len(shape) != 4 or shape[1] != 2:
        hint = ""
        if len(shape) == 4 and shape[-1] == 2:
            hint = "; the two channels come last here: np.moveaxis(training_set, -1, 1)"
        elif len(shape) == 4 and shape[0] == 2:
            hint = "; the two channels come first here: training_set.swapaxes(0, 1)"
        raise UserError(f"{path}: training_set has shape {shape}; expected (N, 2, H, W), image and labels"
                        + hint)
    if shape[0] < 2 or 0 in shape:
        raise UserError(f"{path}: training_set has shape {shape}; at least 2 images are needed")
    if "test_set" not in headers:
        return
    test = headers["test_set"][0]
    if len(test) != 3 or test[1:] != shape[2:] or test[0] == 0:
        swapped = "; height and width are swapped" if test[-2:] == shape[:1:-1] and len(test) == 3 else ""
        raise UserError(f"{path}: test_set has shape {test}; expected (M, {shape[2]}, {shape[3]}), M ≥ 1, "
                        f"as training_set has {shape}{swapped}")
    if "test_labels" in headers and headers["test_labels"][0] != test:
        raise UserError(f"{path}: test_labels has shape {headers['test_labels'][0]}; expected {test}, "
                        "the shape of test_set")


def _grey_range(images: np.ndarray, name: str) -> tuple[float, float]:
    """Return the least and greatest value, in chunks; UserError on NaN or inf."""
    lo, hi = np.inf, -np.inf
    for i in range(0, len(images), 256):
        chunk = images[i:i + 256]
        bad = ~np.isfinite(chunk)
        if bad.any():
            raise UserError(f"{name}: NaN or infinite pixels, first in image {i + np.nonzero(bad)[0][0]}; "
                            "replace them or drop the image")
        lo, hi = min(lo, float(chunk.min())), max(hi, float(chunk.max()))
    return lo, hi


def _to_uint8(arrays: dict[str, np.ndarray], notes: list[str]) -> list[np.ndarray]:
    """Return images, name → array of any numeric dtype, as contiguous uint8 0..255.

    Fractions 0..1 are multiplied by 255; values outside 0..255 (uint16, standardised floats) are mapped with
    one line for all arrays, so that training and test images stay comparable.
    """
    ranges = {name: _grey_range(images, name) for name, images in arrays.items()}
    unit = {name for name, (lo, hi) in ranges.items()
            if arrays[name].dtype.kind in "bf" and lo >= 0 and hi <= 1}
    others = [ends for name, ends in ranges.items() if name not in unit] or [(0.0, 255.0)]
    low, high = min(0.0, min(lo for lo, _ in others)), max(hi for _, hi in others)
    shared = (low, 255 / (high - low)) if low < 0 or high > 255 else (0.0, 1.0)
    out = []
    for name, images in arrays.items():
        zero, scale = (0.0, 255.0) if name in unit else shared
        if (zero, scale) != (0.0, 1.0):
            notes.append(f"{name}: values {ranges[name][0]:g} to {ranges[name][1]:g} mapped to 0..255")
        out.append(np.empty(images.shape, np.uint8))
        for i in range(0, len(images), 256):
            chunk = images[i:i + 256].astype(np.float64)
            out[-1][i:i + 256] = np.rint((chunk - zero) * scale).clip(0, 255)
    return out


def _to_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Return labels as contiguous uint8; UserError that names images, values and count of those outside."""
    out = np.empty(labels.shape, np.uint8)
    bad_images, bad_values, count = [], set(), 0
    for i in range(0, len(labels), 256):
        chunk = labels[i:i + 256]
        good = np.isin(chunk, np.arange(NUM_CLASSES))
        if not good.all():
            bad_images += (np.unique(np.nonzero(~good)[0]) + i).tolist()
            bad_values.update(np.unique(chunk[~good]).tolist()[:8])
            count += int((~good).sum())
        else:
            out[i:i + 256] = chunk
    if count:
        raise UserError(f"{name}: labels must be the integers 0 to {NUM_CLASSES - 1}; {count} pixels in "
                        f"{len(bad_images)} images (first {', '.join(map(str, bad_images[:5]))}) hold "
                        f"{', '.join(f'{v:g}' for v in sorted(bad_values)[:6])}")
    return out


def _check_content(data: Data) -> None:
    """Raise UserError if there is nothing to learn; add to data.notes what only deserves a sentence."""
    flat = data.images.reshape(len(data.images), -1)
    constant = np.flatnonzero(flat.min(1) == flat.max(1))
    if len(constant) == len(flat):
        raise UserError(f"{data.path}: every training image is one constant grey; there is nothing to learn")
    if len(constant):
        data.notes.append(f"{len(constant)} training images are one constant grey (first {constant[0]})")
    counts = np.bincount(data.masks.ravel(), minlength=NUM_CLASSES)
    if counts[1:].sum() == 0:
        raise UserError(f"{data.path}: every training pixel is labelled 0 (background); nothing to learn")
    for c in np.flatnonzero(counts[1:] == 0) + 1:
        data.notes.append(f"class {c} ({CLASSES[c]}) is on no training pixel: it can't be learnt")
    if data.test_images is not None:
        train = {hashlib.sha256(i).digest() for i in data.images}
        copies = sum(hashlib.sha256(i).digest() in train for i in data.test_images)
        if copies:
            data.notes.append(f"{copies} test images are copies of training images")


def fingerprint(data: Data) -> dict:
    """Return what identifies and describes the data: counts, range, each class's pixels and images."""
    counts = np.bincount(data.masks.ravel(), minlength=NUM_CLASSES)
    holding = [int((data.masks == c).any((1, 2)).sum()) for c in range(NUM_CLASSES)]
    return {"file": data.path.name, "sha256": data.sha256, "train_images": len(data.images),
            "test_images": 0 if data.test_images is None else len(data.test_images),
            "height": data.images.shape[1], "width": data.images.shape[2],
            "range": [int(data.images.min()), int(data.images.max())],
            "pixel_share": (counts / counts.sum()).round(5).tolist(), "images_holding": holding}


def describe(data: Data) -> list[str]:
    """Return the fingerprint and the notes in lines for people."""
    facts = fingerprint(data)
    lines = [f"data: {data.path}, sha256 {data.sha256[:16]}…, {data.dtype}",
             f"      {facts['train_images']} training and {facts['test_images']} test images of "
             f"{facts['height']}×{facts['width']}, grey {facts['range'][0]} to {facts['range'][1]}"]
    for c, name in enumerate(CLASSES):
        lines.append(f"      {c} {name:<10} {100 * facts['pixel_share'][c]:6.2f} % of the pixels, "
                     f"in {facts['images_holding'][c]} images")
    return lines + [f"note: {note}" for note in data.notes]


# ---------------------------------------------------------------------------------------- 2. outliers


def read_picture(path: str | Path) -> np.ndarray:
    """Return a picture file as grey uint8 (H, W); UserError if it is none."""
    picture = cv2.imread(str(Path(path).expanduser()), cv2.IMREAD_GRAYSCALE)
    if picture is None:
        raise UserError(f"{path}: not a picture that OpenCV can read")
    return picture


WITNESSES = ("masks", "template", "autoencoder")
SHORT_SIDE, WINDOW = 32, 14  # images are shrunk to this shorter side; side of a discovered template there
MAX_SHARE = 0.15             # a cut that takes out more of the images is likelier wrong than the images are
MIN_VERTICES = 16            # outlines of masks that repeat among good images: at most 9; the saucers': 80
COLUMNS = {"masks": "mask_copies", "autoencoder": "autoencoder_score", "template": "template_score"}
CUTS = {"masks": 2, "autoencoder": 3.7, "template": 4.5}  # each enough alone
BOTH = {"autoencoder": 2.0, "template": 3.0}              # enough together


def robust_z(scores):
    """Distance from the median in sigmas of a normal distribution with the same MAD; 0 where the MAD is 0."""
    sigma = 1.4826 * np.median(np.abs(scores - np.median(scores)))
    return (scores - np.median(scores)) / sigma if sigma > 1e-6 else np.zeros_like(scores)


def shrink(images):
    """Images as float32 (N,h,w), the shorter side SHORT_SIDE, both multiples of 4; NaN becomes 0."""
    size = [4 * max(1, round(SHORT_SIDE * n / min(images.shape[1:]) / 4)) for n in images.shape[:0:-1]]
    images = np.nan_to_num(images.astype(np.float32))
    return np.stack([cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in images])


def mask_copies(images, masks):
    """Number of different images, (N,), with one mask or its mirror image; 0 where that mask is simple."""
    groups, copies = {}, np.zeros(len(masks))
    for i, mask in enumerate(masks):
        mirrored = (mask, mask[::-1], mask[:, ::-1], mask[::-1, ::-1])
        groups.setdefault(min(m.tobytes() for m in mirrored), []).append(i)
    for group in groups.values():
        count, vertices = len({images[i].tobytes() for i in group}), 0  # an image given twice counts once
        for label in np.unique(masks[group[0]]) if count > 1 else ():
            part = np.uint8(masks[group[0]] == label)
            outlines = cv2.findContours(part, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]
            vertices += sum(len(cv2.approxPolyDP(outline, 1.5, True)) for outline in outlines)
        copies[group] = count if vertices >= MIN_VERTICES else 0
    return copies


def template_views(template, tilts):
    """A template as it is, upside down, left-right and both, in every tilt (degrees) and three scales."""
    height, width = template.shape
    for mirrored in (template, template[::-1], template[:, ::-1], template[::-1, ::-1]):
        for scale in (0.7, 1, 1.4):
            h, w = max(2, round(height * scale)), max(2, round(width * scale))
            for tilt in tilts:
                warp = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), tilt, scale)
                warp[:, 2] += (w - width) / 2, (h - height) / 2
                yield cv2.warpAffine(mirrored, warp, (w, h), borderMode=cv2.BORDER_REPLICATE)


def match(images, template, tilts):
    """Best correlation, (N,), of each image with any view of a template: Fisher's atanh of TM_CCOEFF_NORMED,
    which has no upper bound, so that a robust z tells a copy (.99) from a likeness (.8)."""
    views = [view for view in template_views(template, tilts) if np.all(np.array(view.shape) <= images[0].shape)]

    def best(image):
        return max((cv2.matchTemplate(image, view, cv2.TM_CCOEFF_NORMED).max() for view in views), default=0)

    with ThreadPoolExecutor() as pool:  # OpenCV lets go of the interpreter's lock
        return np.arctanh(np.clip(np.nan_to_num(list(pool.map(best, images))), -0.999, 0.999))


def discover_templates(images, labelled, suspects, seed=0):
    """Windows common to several suspects: at most 4 arrays (WINDOW, WINDOW); none if nothing is common.

    Args: images, labelled (0 to 1): shrunk, (N,h,w); suspects: bool (N,), named by other witnesses. The images
    with the strongest corners on labelled ground join them: 5 % held 53 to 100 % of ten sets' intruders.
    Source: corner = smaller eigenvalue over a window, Shi and Tomasi 1994; an edge would match everywhere."""
    h, w = images.shape[1] - WINDOW + 1, images.shape[2] - WINDOW + 1
    side = (WINDOW, WINDOW)
    corner = [np.sqrt(np.maximum(cv2.cornerMinEigenVal(image, WINDOW, 3), 0)) for image in images]
    corner = np.stack(corner) * np.stack([cv2.blur(share, side) for share in labelled])
    corner = corner[:, WINDOW // 2 :, WINDOW // 2 :][:, :h, :w].reshape(len(images), -1)
    order = np.argsort(-corner.max(1) * (1 + suspects), kind="stable")
    count, rng = max(16, suspects.sum(), len(images) // 20), np.random.default_rng(seed)
    if len(order) < 2 * count:
        return []
    tested = rng.choice(order[:count], min(80, count), replace=False)
    others = rng.choice(order[count:], min(80, len(order) - count), replace=False)
    windows, hits, found = [], [], []
    for i in order[: count : max(1, count // 40)][:40]:
        y, x = divmod(corner[i].argmax(), w)
        windows.append(images[i, y : y + WINDOW, x : x + WINDOW])
        scores = match(images[np.append(others, tested)], windows[-1], (-45, -15, 15, 45))
        sigma = 1.4826 * np.median(np.abs(scores[: len(others)] - np.median(scores[: len(others)])))
        hits.append((scores[len(others) :] > np.median(scores[: len(others)]) + 6 * sigma) & (tested != i))
    hits = np.array(hits)
    while len(found) < 4 and hits.sum(1).max() >= 3:
        found.append(windows[hits.sum(1).argmax()])
        hits &= ~hits[hits.sum(1).argmax()]
    return found


def template_scores(images, masks, suspects, template=None, seed=0):
    """Robust z, (N,), of each image's best correlation with a template; None where none was found.

    Args: images: uint8 (N,H,W); suspects: bool (N,); template: (h,w) in their pixels, or None: discovered.
    Raises: ValueError for a flat template, which OpenCV finds everywhere, and for one larger than the images,
    with which OpenCV swaps the two."""
    small = shrink(images)
    # half a grey level of noise: on a flat window the correlation is 0/0, and OpenCV may answer 1
    small += np.random.default_rng(seed).uniform(-0.5, 0.5, small[0].shape).astype(np.float32)
    # less the local mean, shadows go and drawing stays: recall at precision .9 from .59 to .84
    small = np.stack([image - cv2.blur(image, (11, 11)) for image in small])
    if template is not None:
        template = np.nan_to_num(np.float32(template))
        if np.any(template.shape > np.array(images.shape[1:])):
            raise UserError(f"the template {template.shape} is larger than the images {images.shape[1:]}")
        if template.std() < 1:
            raise UserError(f"the template is flat, grey level {template.mean():.0f}: it would match all images")
        size = [max(4, round(template.shape[k] * small.shape[k + 1] / images.shape[k + 1])) for k in (1, 0)]
        template = cv2.resize(template, size, interpolation=cv2.INTER_AREA)
        templates = [template - cv2.blur(template, (11, 11))]
    else:
        templates = discover_templates(small, shrink(masks > 0), suspects, seed)
    scores = [robust_z(match(small, t, range(-45, 46, 15))) for t in templates]
    return np.max(scores, axis=0) if scores else None


def train_autoencoder(images, seed=0, width=16, latent=16):
    """Convolutional encoder and decoder fitted to images (N,1,h,w); None if the loss stops being a number.
    A latent sees 13x13 pixels of the shrunk image: it learns parts, not scenes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Conv2d(1, width, 5, 2, 2), nn.ReLU(), nn.Conv2d(width, latent, 5, 2, 2))
        decoder = nn.Sequential(nn.ConvTranspose2d(latent, width, 4, 2, 1), nn.ReLU(),
                                nn.ConvTranspose2d(width, 1, 4, 2, 1))
    model = nn.Sequential(encoder, decoder).to(images.device)
    steps, rng = min(300, 4 * len(images)), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        batch = images[torch.from_numpy(rng.integers(len(images), size=64)).to(images.device)]
        loss = F.mse_loss(model(batch), batch)
        if not torch.isfinite(loss):
            return None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.requires_grad_(False)


def neighbour_distance(latents, seed=0, kept=12, bank_size=2048, k=3):
    """Distance, (M,), of each latent (M,C), reduced and whitened by PCA, to its k-th neighbour in a random
    sample: among all of them an object pasted into 4 % of the images would find itself."""
    latents = latents - latents.mean(0)
    values, vectors = torch.linalg.eigh(latents.T @ latents / len(latents))
    latents = latents @ (vectors[:, -kept:] / values[-kept:].clamp(min=1e-6).sqrt())
    sample = np.random.default_rng(seed).choice(len(latents), min(bank_size, len(latents)), replace=False)
    bank = latents[torch.from_numpy(sample).to(latents.device)]
    return torch.cat([torch.cdist(z, bank).topk(k, largest=False).values[:, -1] for z in latents.split(4096)])


def autoencoder_scores(images, masks, device="cpu", seed=0):
    """Sum, (N,), of robust z's: of log reconstruction error and of log neighbour distance of the latents, each
    at its highest place, weighted by the share of labelled pixels there; None if training diverged.

    The rover is as strange as any intruder, but not labelled: the weight lifts average precision .81 to 1."""
    small = shrink(images)
    x = torch.from_numpy((small - small.mean()) / (small.std() + 1))[:, None].to(device)
    share = F.avg_pool2d(torch.from_numpy(shrink(masks > 0))[:, None].to(device), 4)
    model = train_autoencoder(x, seed)
    if model is None:
        return None
    latents = torch.cat([model[0](part) for part in x.split(256)])
    error = torch.cat([F.avg_pool2d((model(part) - part) ** 2, 4) for part in x.split(256)])
    distance = neighbour_distance(latents.permute(0, 2, 3, 1).flatten(0, 2), seed).view(error.shape)
    peaks = [F.avg_pool2d(part * share, 3, 1, 1).flatten(1).amax(1) for part in (error, distance)]
    return sum(robust_z(np.log(peak.double().cpu().numpy() + 1e-6)) for peak in peaks)


def find_outliers(images, masks, witnesses=("masks", "template", "autoencoder"), template=None, device="cpu",
                  seed=0, log=print, num_classes=5):
    """Images to take out: DataFrame of `index` (ascending), `reasons` (witnesses joined by "+"), scores.

    Args: images, masks: uint8 (N,H,W); template: uint8 (h,w), an object to look for, or None: discovered.
    Returns: mask_copies counts the images of one intricate mask, the other scores are robust z's; NaN where a
    witness did not run or had nothing to go by. log() gets a sentence for that and for each cut refused.
    Raises: ValueError for a flat or too large template."""
    def sane(what, cut):
        lost = [c for c in range(num_classes) if (masks == c).any() and not (masks[~cut] == c).any()]
        if cut.mean() <= MAX_SHARE and not lost:
            return cut
        whole = f" and the whole of class {lost[0]}" if lost else ""
        log(f"cleaning: {what} would take out {cut.sum()} of {len(cut)} images{whole}: refused, all are kept")
        return np.zeros_like(cut)

    scores, taken, suspects = {}, {}, np.zeros(len(images), bool)
    witness = {"masks": lambda: mask_copies(images, masks),
               "autoencoder": lambda: autoencoder_scores(images, masks, device, seed),
               "template": lambda: template_scores(images, masks, suspects, template, seed)}
    for name in (name for name in witness if name in witnesses):
        found = witness[name]()
        if found is None:
            log(f"cleaning: going on without the {name} witness: it diverged or found no template")
            continue
        scores[name], taken[name] = found, sane(name, found >= CUTS[name])
        suspects = suspects | taken[name]
    if BOTH.keys() <= scores.keys():
        both = sane("autoencoder and template", np.all([scores[n] >= cut for n, cut in BOTH.items()], axis=0))
        taken |= {name: taken[name] | both for name in BOTH}
    index = np.flatnonzero(sane("all witnesses", np.any([suspects, *taken.values()], axis=0)))
    reasons = ["+".join(name for name in taken if taken[name][i]) for i in index]
    columns = {COLUMNS[n]: scores[n][index] if n in scores else np.full(len(index), np.nan) for n in COLUMNS}
    return pd.DataFrame({"index": index, "reasons": reasons, **columns})


# ---------------------------------------------------------------------------------------- 3. frames


_STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # (row, column) to the tile at the right, left, below, above
_LISTED = 10  # candidates a border keeps; the next six add 0.1 % of the true ones


def _strips(tiles, vertical, cut=None):
    """The four lines on either side of a border, outermost first: two (N, L, 4); of a cut through each tile if given."""
    x = tiles.transpose(1, 2) if vertical else tiles
    end, start = (x.shape[2], 0) if cut is None else (cut, cut)
    return x[:, :, end - 4:end].flip(2), x[:, :, start:start + 4]


def _log(strips):
    return torch.log(strips.float() + 8)  # one weight for dark and sunlit frames; 8 keeps sensor noise of the dark small


def _spectra(strips):
    """Cosine spectra (N, L, 4), along the border, of three lines' log brightness and of the log roughness across it."""
    lines = _log(strips)
    rough = torch.log((lines[:, :, 0] - lines[:, :, 1]).abs() + 0.01)
    x = torch.cat([lines[:, :, :3], rough[:, :, None]], 2)
    k = torch.arange(x.shape[1], device=x.device)
    basis = torch.cos(math.pi / len(k) * k[:, None] * (k + 0.5)) * math.sqrt(2 / len(k))
    basis[0] /= math.sqrt(2)
    return torch.einsum("fl,nlc->nfc", basis, x)


def _fit_gaussian(pairs):
    """Forms Q (L, 8, 8): z'Qz / 2 summed over frequencies is the log-likelihood ratio of "adjacent" to "unrelated"."""
    z = [torch.cat([_spectra(a), _spectra(b)], 2).double() for a, b in pairs]
    cov = sum(torch.einsum("nfk,nfl->fkl", x, x) / len(x) for x in z)
    # nearby frequencies share their statistics; frequency 0, the mean brightness, stands alone
    cov = torch.stack([cov[max(1, f - 3):f + 4].mean(0) if f else cov[0] for f in range(len(cov))])
    trace = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    cov = cov + 1e-6 * trace * torch.eye(8, device=cov.device, dtype=cov.dtype)
    unrelated = cov.clone()
    unrelated[:, :4, 4:] = unrelated[:, 4:, :4] = 0
    return (torch.linalg.inv(unrelated) - torch.linalg.inv(cov)).float()


def _candidates(a, b, form):
    """Each border's likeliest partners: rows i of a, j of b (P,), and features (P, 10) of those pairs."""
    x, y = _spectra(a), _spectra(b)
    qx, qy = (torch.einsum("nfk,fkl,nfl->n", z, q, z) / 2 for z, q in ((x, form[:, :4, :4]), (y, form[:, 4:, 4:])))
    x, y = torch.einsum("nfk,fkl->nfl", x, form[:, :4, 4:]).flatten(1), y.flatten(1)
    rows, columns = [], (x.new_empty(len(y), 0), torch.empty(len(y), 0, dtype=torch.long, device=x.device))
    for s in range(0, len(x), 1024):
        score = torch.addmm(qy + qx[s:s + 1024, None], x[s:s + 1024], y.T)
        rows.append(score.topk(min(_LISTED, len(y)), 1))
        value, index = score.T.contiguous().topk(min(_LISTED, len(score)), 1)
        value, index = torch.cat([columns[0], value], 1), torch.cat([columns[1], index + s], 1)
        value, order = value.topk(min(_LISTED, value.shape[1]), 1)
        columns = value, index.gather(1, order)
    best, j = (torch.cat(part) for part in zip(*rows, strict=True))
    i = torch.arange(len(x), device=x.device)[:, None].expand_as(j)
    k = torch.arange(len(y), device=x.device)[:, None].expand_as(columns[1])
    pairs = torch.unique(torch.cat([(i * len(y) + j).flatten(), (columns[1] * len(y) + k).flatten()]))
    features = []
    for p in pairs.split(8192):  # chunks bound the memory
        i, j = p // len(y), p % len(y)
        ratio = (x[i] * y[j]).sum(1) + qx[i] + qy[j]
        margins = [_margin(ratio, best[i]), _margin(ratio, columns[0][j])]
        ratios = torch.stack([ratio, *margins], 1)
        features.append(torch.cat([ratios.sign() * torch.log1p(ratios.abs() / 3), _seam(_log(a[i]), _log(b[j]))], 1))
    return pairs // len(y), pairs % len(y), torch.cat(features)


def _margin(ratio, best):
    """How far a pair's ratio is above the best other partner's (below it: negative); `best` (P, K) is sorted."""
    other = best[:, 1] if best.shape[1] > 1 else best[:, 0] - 50
    return ratio - torch.where(ratio >= best[:, 0] - 1e-3, other, best[:, 0])


def _seam(x, y):
    """Seven log measures (P, 7) of the jump from border lines x to y (P, L, 4), also against the roughness beside it."""
    rx, ry = ((z[:, :, :3] - z[:, :, 1:]).abs().mean(2) + 0.01 for z in (x, y))
    step = x[:, :, 0] - y[:, :, 0]
    jump = (step + 0.5 * (step - x[:, :, 1] + y[:, :, 1])).abs()  # between the two sides' lines drawn on to the seam
    lx, ly = rx.log().mean(1), ry.log().mean(1)
    return torch.stack([(jump.mean(1) + 0.01).log(), (jump / (rx + ry) + 0.1).log().mean(1), lx + ly, (lx - ly).abs(),
                        ((jump ** 2).mean(1) + 1e-4).log(), (step.abs().mean(1) + 0.01).log(),
                        (step.mean(1).abs() + 0.003).log()], 1)


def _fit_scorer(x, y, steps=800, batch=1024):
    """A function from features to log-odds of adjacency, fitted to features x (P, F) and truth y (P,)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps are too small to share: two threads on busy cores took 40 times as long
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        nn = torch.nn
        net = nn.Sequential(nn.Linear(x.shape[1], 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)).to(x.device)
        order = torch.randint(len(x), (steps, batch)).to(x.device)
        mean, std = x.mean(0), x.std(0) + 1e-3
        optimizer = torch.optim.Adam(net.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for rows in order:
            logits = net((x[rows] - mean) / std)[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    torch.set_num_threads(threads)
    return lambda z: net((z - mean) / std)[:, 0].detach()


def _states(strips):
    """Which borders are a frame's own edge, and which are flat and so tell nothing: two bool (N,)."""
    lines = _log(strips)
    # a Navcam frame's first and last row are 1.5 times as bright: nearly all pixels jump one way (quartiles beyond
    # 0.08: 96 % of frames' upper and lower edges, 0.1 % of other borders); unnoticed, lower edges match upper ones
    quartiles = torch.quantile(lines[:, :, 0] - lines[:, :, 1], torch.tensor([0.25, 0.75], device=lines.device), 1)
    outer = strips[:, :, 0].int()
    return (quartiles[0] > 0.08) | (quartiles[1] < -0.08), outer.amax(1) - outer.amin(1) <= 2


def _links(tiles, vertical):
    """Likely neighbours along one axis: i, j, log-odds (P,); closed, flat (2, N); log-odds that a border has one.

    Everything is fitted to cuts through the tiles, where the truth is known; half the partners are taken away, as a
    border often has none. The share that has one is then estimated (Saerens et al. 2002), so unrelated tiles stay so.
    """
    runs = max(1, min(4, 4000 // len(tiles)))
    cuts = np.linspace(4, tiles.shape[1 if vertical else 2] - 4, 2 * runs + 3).astype(int)[1:-1].tolist()
    form = _fit_gaussian([_strips(tiles, vertical, cut) for cut in cuts[::2]])
    generator = torch.Generator().manual_seed(0)
    features, truth = [], []
    for cut in cuts[1::2]:
        a, b = _strips(tiles, vertical, cut)
        kept = torch.randperm(len(b), generator=generator)[:(len(b) + 1) // 2].to(b.device)
        i, j, x = _candidates(a, b[kept], form)
        features.append(x)
        truth.append((kept[j] == i).float())
    scorer = _fit_scorer(torch.cat(features), torch.cat(truth))
    ends = _strips(tiles, vertical)
    closed, flat = (torch.stack(s) for s in zip(*map(_states, ends), strict=True))
    open_a, open_b = (torch.nonzero(s)[:, 0] for s in ~(closed | flat))
    closed, flat = closed.cpu().numpy(), flat.cpu().numpy()
    if not len(open_a) or not len(open_b):
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0), closed, flat, 0.0
    i, j, x = _candidates(ends[0][open_a], ends[1][open_b], form)
    i, j, odds = (z.cpu().numpy() for z in (open_a[i], open_b[j], scorer(x).clamp(-30, 30).double()))
    i, j, odds = (z[i != j] for z in (i, j, odds))
    some, share = np.bincount(i, np.exp(odds), len(tiles))[open_a.cpu().numpy()], 0.5
    for _ in range(50):
        share = np.clip((some * share / (some * share + 1 - share)).mean(), 1e-4, 0.95)
    return i, j, odds, closed, flat, math.log(share / (1 - share))


def _join(frames, places, link, limits):
    """Two frames a link would join: kept frame, other frame, the other's cells as moved, borders that touch; or None."""
    axis, a, b = link
    (fa, ra, ca), (fb, rb, cb) = places[a], places[b]
    dr, dc = ra + _STEPS[2 * axis][0] - rb, ca + _STEPS[2 * axis][1] - cb
    if len(frames[fa]) < len(frames[fb]):
        fa, fb, dr, dc = fb, fa, -dr, -dc
    cells, moved = frames[fa], {(r + dr, c + dc): t for (r, c), t in frames[fb].items()}
    for limit, line in zip(limits, zip(*cells, *moved, strict=True), strict=True):
        if max(line) - min(line) >= limit:
            return None
    if not cells.keys().isdisjoint(moved):
        return None
    touching = [(t, side, cells[r + dr, c + dc]) for (r, c), t in moved.items()
                for side, (dr, dc) in enumerate(_STEPS) if (r + dr, c + dc) in cells]
    return fa, fb, moved, touching


def _assemble(n, links, limits, least):
    """Neighbours and confidence (N, 4) by joining frames, surest links first, if all touching borders together agree.

    Log-odds of a join: the prior plus the log-likelihood ratios of every border that comes to touch; at least `least`.
    """
    guess = math.log(2 * n)  # a pair's prior odds in the scorer's fit are 1 : 2n
    ratios = [dict(zip((i * n + j).tolist(), (odds + guess).tolist(), strict=True)) for i, j, odds, *_ in links]
    closed, flat = (np.concatenate([link[k] for link in links]).T.tolist() for k in (3, 4))
    queue = sorted((-odds, axis, i, j) for axis, link in enumerate(links)
                   for i, j, odds in zip(*(z[link[2] > -5].tolist() for z in link[:3]), strict=True))
    frames, places = [{(0, 0): t} for t in range(n)], [(t, 0, 0) for t in range(n)]
    neighbours, confidence = np.full((n, 4), -1, np.int32), np.zeros((n, 4), np.float32)

    def ratio(t, side, other):
        if closed[t][side] or closed[other][side ^ 1]:
            return -math.inf
        if flat[t][side] or flat[other][side ^ 1]:
            return 0
        i, j = (other, t) if side % 2 else (t, other)
        return ratios[side // 2].get(i * n + j, -5)  # 1 % of true pairs are not listed

    for wanted in [w for w in (12, 9, 6.5, 5, 4) if w > least] + [least]:
        before = None
        while before != len(queue):  # a join brings more evidence to those that waited
            before, waiting = len(queue), []
            for link in queue:
                if places[link[2]][0] == places[link[3]][0] or not (join := _join(frames, places, link[1:], limits)):
                    continue
                kept, gone, moved, touching = join
                odds = links[link[1]][5] - guess + sum(ratio(*border) for border in touching)
                if odds < wanted:
                    waiting.append(link)
                    continue
                frames[kept].update(moved)
                frames[gone] = {}
                for (r, c), t in moved.items():
                    places[t] = kept, r, c
                for t, side, other in touching:
                    neighbours[t, side], neighbours[other, side ^ 1] = other, t
                    confidence[t, side] = confidence[other, side ^ 1] = 1 / (1 + math.exp(-odds))
            queue = waiting
    return neighbours, confidence


def place_frames(neighbours):
    """Frame number, row and column of each tile: three int32 (N,).

    Frames are numbered by their first tile; a frame's rows and columns count from 0. `neighbours` (N, 4) is
    `find_neighbours`' first result.
    """
    frame, row, column = np.full((3, len(neighbours)), -1, np.int32)
    for start in range(len(neighbours)):
        if frame[start] >= 0:
            continue
        frame[start], members = frame.max() + 1, [start]
        for tile in members:
            for (dr, dc), other in zip(_STEPS, neighbours[tile], strict=True):
                if other >= 0 and frame[other] < 0:
                    frame[other], row[other], column[other] = frame[tile], row[tile] + dr, column[tile] + dc
                    members.append(other)
        row[members] -= row[members].min()
        column[members] -= column[members].min()
    return frame, row, column


def find_neighbours(images, device="cpu", exclude=None):
    """Each tile's neighbours in its camera frame, found from the pixels alone.

    Args:
        images: uint8 (N, H, W), training tiles, then test tiles.
        exclude: bool (N,), tiles never to link.
    Returns:
        neighbours int32 (N, 4): the tile to the right, left, below, above, -1 for none. Right of a is b if and only if
        left of b is a, and tiles of a frame lie on one grid. confidence float32 (N, 4): the probability of that link.
    Raises:
        ValueError: images is not (N, H, W), or exclude not (N,).
    Source: greedy assembly as in Gallagher 2012; measured on real frames: see the README.
    """
    if images.ndim != 3 or (exclude is not None and np.shape(exclude) != (len(images),)):
        raise ValueError(f"images must be (N, H, W) and exclude (N,), got {images.shape} and {np.shape(exclude)}")
    kept = np.flatnonzero(np.ones(len(images), bool) if exclude is None else ~np.asarray(exclude, bool))
    neighbours, confidence = np.full((len(images), 4), -1, np.int32), np.zeros((len(images), 4), np.float32)
    if len(kept) < 2 or min(images.shape[1:]) < 16:
        return neighbours, confidence
    tiles = torch.from_numpy(images[kept]).to(device)
    links = [_links(tiles, vertical) for vertical in (False, True)]
    found, _ = _assemble(len(kept), links, (8, 8), 6.5)
    # a frame's extent is what 95 % of the surely linked tiles keep to; it cuts off most of the last wrong links
    frame, *places = place_frames(found)
    limits = []
    for place in places:
        extent = np.zeros(len(kept), int)
        np.maximum.at(extent, frame, place + 1)
        limits.append(np.quantile(extent[frame][(found >= 0).any(1)], 0.95, method="higher") if found.max() >= 0 else 8)
    found, confidence[kept] = _assemble(len(kept), links, limits, 3)
    neighbours[kept] = np.where(found >= 0, kept[found], -1)
    return neighbours, confidence


def frame_weights(place: np.ndarray, reach: float) -> scipy.sparse.csr_matrix:
    """Return how much tile j says of tile i, sparse (T, T): exp(-steps / reach) within a frame, 0 on itself.

    Args: place, frame, row and column of each tile (3, T); reach, in tiles.
    """
    order = np.argsort(place[0], kind="stable")
    rows, cols, values = [], [], []
    for tiles in np.split(order, np.flatnonzero(np.diff(place[0][order])) + 1):
        steps = np.abs(place[1:, tiles, None] - place[1:, None, tiles]).sum(0)
        i, j = np.nonzero(steps)
        rows.append(tiles[i])
        cols.append(tiles[j])
        values.append(np.exp(-steps[i, j] / reach))
    index = np.concatenate(rows), np.concatenate(cols)
    return scipy.sparse.csr_matrix((np.concatenate(values), index), shape=2 * (len(order),))


def pooled_log_ratio(weights: scipy.sparse.csr_matrix, shares: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return log(pooled shares / base), float32 (T, C): how much likelier the other tiles make each class.

    Args: shares (T, C), rows of any sum, the tile's weight as a witness; base (C,), the overall shares, which
    count as a tenth of a neighbour, so that few witnesses say little.
    """
    pooled = weights @ shares + 0.1 * base
    pooled /= pooled.sum(1, keepdims=True)
    return np.log(np.maximum(pooled, 1e-6) / np.maximum(base, 1e-6)).astype(np.float32)


# ---------------------------------------------------------------------------------------- 4. folds


def rare_classes(masks: np.ndarray) -> np.ndarray:
    """Return which classes are rare, bool (NUM_CLASSES,): present, on under 2 % of the labelled pixels."""
    counts = np.bincount(masks.ravel(), minlength=NUM_CLASSES)
    counts[0] = 0
    return (counts > 0) & (counts < 0.02 * counts.sum())


def make_folds(images: np.ndarray, masks: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, int (N,); fold k validates the network trained on all others.

    Stratified by "holds a rare class" and by dominant class, because 6 rock images in a validation set decide
    nothing. Equal images share a fold. folds = 1 is one split: 15 % are fold 0, the rest -1 and never
    validated. Raises UserError if there are fewer different images than folds.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    counts = np.stack([(masks == c).sum((1, 2)) for c in range(NUM_CLASSES)], 1)
    rare = (counts[:, rare_classes(masks)] > 0).any(1)
    stratum = counts.argmax(1) + NUM_CLASSES * rare
    _, group = np.unique(images.reshape(len(images), -1), axis=0, return_inverse=True)
    _, first = np.unique(group, return_index=True)  # one image stands for its copies
    if len(first) < max(2, folds):
        raise UserError(f"--folds {folds}: the training set has only {len(first)} different images")
    order = rng.permutation(first)
    order = order[np.argsort(stratum[order], kind="stable")]
    of_order = np.arange(len(order)) % (folds if folds > 1 else 7)  # every 7th is 14.3 %
    if folds == 1:
        of_order[of_order > 0] = -1
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[group.ravel()[order]] = of_order
    return fold_of_group[group.ravel()]


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
    on = (u[4] < 2 * p - 1).float()
    angle, zoom = u[2] * on * (degrees * np.pi / 180), 1 / (1 + u[3] * on * scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # affine_grid works in coordinates of -1..1 on both sides, so a turn needs the aspect ratio
    theta = torch.stack([torch.stack([cos, sin * (h / w), u[0] * on * 2 * shift], 1),
                         torch.stack([-sin * (w / h), cos, u[1] * on * 2 * shift], 1)], 1)
    grid = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    y_moved = F.grid_sample(y[:, None].float(), grid, mode="nearest", padding_mode="reflection",
                            align_corners=False)
    return x, y_moved[:, 0].to(y.dtype)


def jitter_light(x: torch.Tensor, gen: torch.Generator, amount: float, p: float = 0.5) -> torch.Tensor:
    """Change brightness and contrast of channel 0 by up to ± amount, each with probability p."""
    u = torch.rand(3, len(x), 1, 1, device=x.device, generator=gen) * 2 - 1
    on = (u[2] < 2 * p - 1).float()
    return torch.cat([(x[:, 0] * (1 + amount * u[0] * on) + 2 * amount * u[1] * on)[:, None], x[:, 1:]], 1)


def paste_rare(x: torch.Tensor, y: torch.Tensor, donor_x: torch.Tensor, donor_y: torch.Tensor,
               gen: torch.Generator, p: float) -> Batch:
    """Paste the patches that donor_y marks (labels above 0, one donor an image) into x, y with probability p.

    The donors' pixels, all channels, and labels move together: mirrored, scaled by 0.7 to 1.4, shifted,
    their edge feathered over 3 pixels. Images without any label are left alone. Donors must come from the
    same training split as x: a patch that crosses folds is a leak.

    Shape: x, donor_x (B, C, H, W) float; y, donor_y (B, H, W) integer labels.
    """
    b, _, h, w = x.shape
    u = torch.rand(6, b, device=x.device, generator=gen)
    zoom = 1 / (0.7 * 2 ** u[0])
    mirror = torch.where(u[1] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(zoom)
    theta = torch.stack([torch.stack([zoom * mirror, zero, 1.6 * u[2] - 0.8], 1),
                         torch.stack([zero, zoom, 0.8 * u[3] - 0.4], 1)], 1)
    grid = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    label = F.grid_sample(donor_y[:, None].float(), grid, mode="nearest", align_corners=False)
    patch = F.grid_sample(donor_x, grid, align_corners=False)
    on = (u[4] < p) & (y > 0).flatten(1).any(1)
    label = label * on[:, None, None, None]
    alpha = F.avg_pool2d((label > 0).float(), 3, 1, 1, count_include_pad=False)
    return x + alpha * (patch - x), torch.where(label[:, 0] > 0, label[:, 0].to(y.dtype), y)


# ---------------------------------------------------------------------------------------- 6. network


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3×3 convolutions, each with batch norm and ReLU (the norm makes a bias redundant)."""
    layers = []
    for i in (in_channels, out_channels):
        layers += [nn.Conv2d(i, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class GatedSkip(nn.Module):
    """Joins an encoder level, dimmed by a one-channel sigmoid gate, with the decoder's ReLU(1×1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Conv2d(channels, 1, 1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Shape: both (B, C, H, W) → (B, 2C, H, W)."""
        return torch.cat([skip * torch.sigmoid(self.gate(skip)), F.relu(self.mix(x))], 1)


class UNet(nn.Module):
    """The paper's U-Net: widths w, 2w, 4w, 8w, bottleneck 16w; gated skips; heads on the decoder's levels.

    With width 64 and one channel it has the paper's 31.4 M parameters. With residual=True the last
    num_classes input channels are log-probabilities that the network corrects: they are added to its logits
    instead of convolved, and the heads start at zero, so that training starts from that prior.

    Shape: (B, in_channels [+ num_classes], H, W), any H, W ≥ 1 → list of logits (B, num_classes, ·, ·): the
    full H, W, and in training also 1/2, 1/4, 1/8 of the size padded to a multiple of 16.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int = 4,
                 residual: bool = False):
        super().__init__()
        self.in_channels, self.depth, self.residual = in_channels, depth, residual
        widths = [width * 2 ** i for i in range(depth + 1)]
        self.encoder = nn.ModuleList(
            conv_block(i, o) for i, o in zip([in_channels] + widths[:-1], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.skip = nn.ModuleList(GatedSkip(w) for w in widths[:-1])
        self.decoder = nn.ModuleList(conv_block(2 * w, w) for w in widths[:-1])
        self.heads = nn.ModuleList(nn.Conv2d(w, num_classes, 1) for w in widths[:-1])
        if residual:
            for head in self.heads:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        h, w = x.shape[-2:]
        step = 2 ** self.depth
        x = F.pad(x, (0, -w % step, 0, -h % step), mode="replicate")
        prior = x[:, self.in_channels:]
        x = x[:, :self.in_channels]
        skips = []
        for i, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        logits = []
        for i in reversed(range(self.depth)):
            x = self.decoder[i](self.skip[i](skips[i], self.up[i](x)))
            if self.training or i == 0:
                out = self.heads[i](x)
                logits.append(out + F.avg_pool2d(prior, 2 ** i) if self.residual else out)
        logits[-1] = logits[-1][..., :h, :w]
        return logits[::-1]


# ---------------------------------------------------------------------------------------- 7. loss


def focal_loss(logits: torch.Tensor, target: torch.Tensor, gamma: float, alpha: float = 1.0,
               weight: torch.Tensor | None = None, ignore_index: int = -1) -> torch.Tensor:
    """Return the mean of -α (1 - p)^γ log p over the pixels whose target is not ignore_index; 0 if none is.

    γ = 0 and α = 1 is cross-entropy. With class weights the mean is the weighted one, as in PyTorch's.
    Shape: logits (B, C, H, W) any float type; target (B, H, W) integer. Stable for any finite logits.
    Source: Lin et al. 2017, equation 5 (the paper's equation 1).
    """
    counted = target != ignore_index
    target = torch.where(counted, target, 0).long()
    log_p = F.log_softmax(logits.float(), 1).gather(1, target[:, None])[:, 0]
    loss = -alpha * log_p
    if gamma:
        # clamped: (1 - p)^γ has an infinite slope at p = 1 for γ < 1, and inf × 0 is NaN
        loss = loss * (-torch.expm1(log_p)).clamp_min(1e-6) ** gamma
    scale = counted.float() if weight is None else weight[target] * counted
    return (loss * scale).sum() / scale.sum().clamp_min(1e-6)


def deep_supervision_loss(logits: list[torch.Tensor], target: torch.Tensor, level_weights: tuple[float, ...],
                          **loss_args) -> torch.Tensor:
    """Return the weighted sum of focal_loss over the outputs, coarser targets taken at every 2^i-th pixel."""
    loss = focal_loss(logits[0], target, **loss_args)
    for i, (out, level_weight) in enumerate(zip(logits[1:], level_weights, strict=True), 1):
        if level_weight:
            coarse = target[:, 2 ** i // 2::2 ** i, 2 ** i // 2::2 ** i]
            out = out[..., :coarse.shape[1], :coarse.shape[2]]
            loss = loss + level_weight * focal_loss(out, coarse, **loss_args)
    return loss


# ---------------------------------------------------------------------------------------- 8. morphology


def clean_masks(masks: np.ndarray, size: int = 3) -> np.ndarray:
    """Return masks (N, H, W) uint8 after opening, then closing, each class on its own.

    A pixel that its class's opening takes away goes to the one class whose closing claims it, and otherwise
    keeps its label. No class comes before another, so relabelling the classes relabels the result and
    nothing else (grey morphology on class ids depends on the numbering). A class that opening would wipe
    out of an image is left as it is there.
    """
    kernel = np.ones((size, size), np.uint8)
    out = np.empty_like(masks)
    for i, mask in enumerate(masks):
        present = np.flatnonzero(np.bincount(mask.ravel()))
        if len(present) == 1:
            out[i] = mask
            continue
        layers = (mask[..., None] == present).astype(np.uint8)  # (H, W, classes): one OpenCV call for all
        opened = cv2.morphologyEx(layers, cv2.MORPH_OPEN, kernel).reshape(layers.shape)
        gone = ~opened.any((0, 1))
        opened[..., gone] = layers[..., gone]
        closed = cv2.morphologyEx(opened, cv2.MORPH_CLOSE, kernel).reshape(layers.shape)
        taken = (closed.sum(2) == 1) & ~opened.any(2)
        out[i] = np.where(taken, present[closed.argmax(2)], mask)
    return out


# ---------------------------------------------------------------------------------------- 9. metric


def confusion_matrix(truth: np.ndarray, pred: np.ndarray, num_classes: int = NUM_CLASSES) -> np.ndarray:
    """Return the int64 (C, C) pixel counts, rows the truth, columns the prediction, of everything given.

    Over the whole set, not a mean over batches or images: small classes live on few images.
    """
    index = truth.astype(np.int64).ravel() * num_classes + pred.ravel()
    return np.bincount(index, minlength=num_classes ** 2).reshape(num_classes, num_classes)


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
    return (float(np.nanmean(iou)) if (union > 0).any() else float("nan")), iou


def fold_scores(truth: np.ndarray, labels: np.ndarray, fold_of: np.ndarray, folds: int) -> dict:
    """Return both metrics of out-of-fold labels, pooled over the first folds, and the spread over folds."""
    each = [confusion_matrix(truth[fold_of == k], labels[fold_of == k]) for k in range(folds)]
    miou, iou = iou_scores(sum(each))
    mious = [iou_scores(one)[0] for one in each]
    return {"miou": miou, "iou": iou.tolist(), "paper_miou": iou_scores(sum(each), None)[0],
            "fold_miou": mious, "fold_std": float(np.std(mious)), "confusion": sum(each).tolist()}


# ---------------------------------------------------------------------------------------- 10. engine


def option(default, text: str, valid=None):
    """Return a dataclass field that parse_flags makes a flag of; valid, a check, by default numbers ≥ 0."""
    return field(default=default, metadata={"help": text, "valid": valid})


def parse_flags(config: type, argv: list[str], description: str) -> dict:
    """Return field → value of the flags given in argv, for a dataclass whose flags are made by option().

    A true-or-false field has the flag that turns it over. Raises UserError for a flag that does not exist,
    with the nearest that does, and for a value out of range.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def complain(message: str):
        raise UserError(message + "; see --help")
    parser.error = complain
    fields = {f.name: f for f in dataclasses.fields(config) if f.metadata}
    for name, f in fields.items():
        flag, kind = name.replace("_", "-"), {"type": type(f.default), "metavar": str(f.default) or "FILE"}
        if isinstance(f.default, bool):
            flag, kind = "no-" * f.default + flag, {"action": "store_const", "const": not f.default}
        parser.add_argument("--" + flag, dest=name, help=f.metadata["help"], default=argparse.SUPPRESS,
                            **kind)
    known = list(parser._option_string_actions)
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag not in known:
            near = difflib.get_close_matches(flag, known, 1, 0.4)
            complain(f"unknown option {flag}" + (f", did you mean {near[0]}?" if near else ""))
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        valid = fields[name].metadata["valid"] or (lambda v: isinstance(v, str) or 0 <= v < float("inf"))
        if not valid(value):
            complain(f"--{name.replace('_', '-')} {value}: out of range")
    return given


def pick_device(name: str = "auto") -> tuple[torch.device, str]:
    """Return the device and the reason. A GPU must pass a real convolution forward and backward to be used:
    is_available() is True on a P100 for which today's builds hold no kernels."""
    if name == "cpu":
        return torch.device("cpu"), "asked for"
    if not torch.cuda.is_available():
        if name != "auto":
            raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
        return torch.device("cpu"), "no GPU here (on Kaggle: Settings, Accelerator, GPU T4 x2)"
    device = torch.device("cuda" if name == "auto" else name)
    try:
        conv = nn.Conv2d(1, 8, 3).to(device)
        conv(torch.zeros(2, 1, 8, 8, device=device)).sum().backward()
        torch.cuda.synchronize(device)
    except RuntimeError as e:
        return torch.device("cpu"), f"the GPU fails a test convolution ({str(e).splitlines()[0][:80]}); " \
                                    "on Kaggle choose GPU T4 x2"
    return device, torch.cuda.get_device_name(device)


def pick_precision(device: torch.device) -> tuple[torch.dtype, str]:
    """Return the autocast type and the reason: by capability on a GPU (a T4 only emulates bf16, whatever
    is_bf16_supported() says), by a timed convolution on a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
        return dtype, f"compute capability {major}.{minor}"
    seconds = {}
    conv = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(16, 32, 64, 128).to(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float32):
        times = []
        for _ in range(6):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                conv(x).float().mean().backward()
            times.append(time.perf_counter() - start)
        seconds[dtype] = float(np.median(times))
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if ratio > 1.1:
        return torch.bfloat16, f"{ratio:.1f}× float32's speed on this processor"
    return torch.float32, f"bfloat16 gives only {ratio:.1f}× its speed on this processor"


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the autocast context of the device; float32 turns it off."""
    return torch.autocast(device.type, dtype if dtype != torch.float32 else torch.bfloat16,
                          enabled=dtype != torch.float32)


def generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator seeded from the whole key: with (seed, stage, fold, epoch) nothing need be saved."""
    seed = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


class Clock:
    """Counts the seconds of a run over all its starts, and holds them against --max-hours."""

    def __init__(self, path: Path, max_hours: float):
        self.path, self.limit, self.start = path, max_hours * 3600, time.monotonic()
        self.before = json.loads(path.read_text())["seconds"] if path.exists() else 3.0  # importing torch

    def used(self) -> float:
        return self.before + time.monotonic() - self.start

    def left(self) -> float:
        return self.limit - self.used()

    def save(self) -> None:
        write_json(self.path, {"seconds": self.used()})


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move ema's weights and batch-norm statistics a step of 1 - decay towards model's; decay 0 copies them.

    The decay starts low, (1 + t) / (10 + t) after t steps: short runs must forget their random start.
    """
    target = dict(model.state_dict())
    steps = next(v for k, v in target.items() if k.endswith("num_batches_tracked"))
    decay = torch.clamp((1 + steps) / (10 + steps), max=decay)
    for name, average in ema.state_dict().items():
        if average.is_floating_point():
            average.lerp_(target[name], 1 - decay)
        else:
            average.copy_(target[name])


@torch.inference_mode()
def predict_probs(model: UNet, make_input, num_images: int, device: torch.device, dtype: torch.dtype,
                  first_class: int, tta: bool, batch_size: int = 64) -> np.ndarray:
    """Return class probabilities in steps of 1/255, uint8 (N, classes, H, W), of images given by make_input.

    Args: make_input, a function from a slice to a float batch (B, C, H, W) on the device; first_class, the
    class of the model's first output (1: background is never predicted); tta, mean with the mirrored copy.
    """
    model.eval()
    out = np.zeros((0, first_class + model.heads[0].out_channels, 1, 1), np.uint8)
    for i in range(0, num_images, batch_size):
        x = make_input(slice(i, min(i + batch_size, num_images)))
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            logits = [model(x)[0]] + ([model(x.flip(-1))[0].flip(-1)] if tta else [])
        probs = sum(torch.softmax(one.float(), 1) for one in logits) / len(logits)
        probs = (probs * 255).round().to(torch.uint8).cpu().numpy()
        if i == 0:
            out = np.zeros((num_images, first_class + probs.shape[1], *probs.shape[2:]), np.uint8)
        out[i:i + len(probs), first_class:] = probs
    return out


# ---------------------------------------------------------------------------------------- 11. checkpoints


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a file that appears under its name only when complete: temporary name, fsync, os.replace."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    """Write value as JSON, atomically; NaN, which JSON has not, as null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    with atomic_write(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def save_checkpoint(path: Path, state: dict, keep_previous: bool = True) -> None:
    """Write state, plain values and tensors only, behind its SHA-256; the one before stays as NAME.prev."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    if path.exists():
        os.replace(path, path.with_name(path.name + ".prev"))
    with atomic_write(path) as f:
        f.write(hashlib.sha256(payload).digest())
        f.write(payload)
    if not keep_previous:
        path.with_name(path.name + ".prev").unlink(missing_ok=True)


def load_checkpoint(path: Path, log=print) -> dict | None:
    """Return the state saved at path, or the one before it if this one is damaged, or None.

    Nothing in a file is executed: first the checksum (most flipped bits load in silence), then weights_only.
    """
    for candidate in (path, path.with_name(path.name + ".prev")):
        try:
            raw = candidate.read_bytes()
        except FileNotFoundError:
            continue
        if hashlib.sha256(raw[32:]).digest() == raw[:32]:
            with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
                return torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)
        log(f"{candidate}: damaged; going on from the one before it, or from the start")
        candidate.rename(candidate.with_suffix(".damaged"))  # the next save must not keep it as .prev
    return None


# ---------------------------------------------------------------------------------------- 12. submission


def write_submission(path: Path, preds: np.ndarray) -> None:
    """Write preds (M, H, W), labels 0..9, as the competition's CSV, the very bytes that pandas would write.

    Every label is one digit, so all rows whose id has the same number of digits are one array of bytes.
    """
    flat = preds.reshape(len(preds), -1)
    assert flat.max() <= 9, "labels of two digits would need another layout"
    with atomic_write(path) as f:
        f.write(("id," + ",".join(map(str, range(flat.shape[1]))) + "\n").encode())
        start = 0
        while start < len(flat):
            digits = len(str(start))
            stop = min(len(flat), 10 ** digits)
            rows = np.full((stop - start, digits + 2 * flat.shape[1] + 1), ord(","), np.uint8)
            ids = np.arange(start, stop)
            for d in range(digits):
                rows[:, d] = ids // 10 ** (digits - 1 - d) % 10 + ord("0")
            rows[:, digits + 1::2] = flat[start:stop] + ord("0")
            rows[:, -1] = ord("\n")
            f.write(rows)
            start = stop


def check_submission(path: Path, num_images: int, num_pixels: int, first_class: int = 1) -> np.ndarray:
    """Read a submission back as any reader would, line by line, and return its labels, uint8 (M, pixels).

    Raises UserError that names the first row and column at fault: header, ids, number of columns, labels
    below first_class (a single 0 costs a fifth of the score) or that are no class, too few or many rows.
    """
    labels = np.empty((num_images, num_pixels), np.uint8)
    with open(path, "rb") as f:
        if f.readline().rstrip(b"\r\n") != ("id," + ",".join(map(str, range(num_pixels)))).encode():
            raise UserError(f"{path}: the header is not id,0,1,…,{num_pixels - 1}")
        row = -1
        for row, line in enumerate(f):
            if row >= num_images:
                raise UserError(f"{path}: more than {num_images} rows")
            name, _, rest = line.rstrip(b"\r\n").partition(b",")
            if name != str(row).encode():
                raise UserError(f"{path}: row {row} has the id {name[:20].decode(errors='replace')!r}")
            cells = np.frombuffer(rest, np.uint8)
            if len(cells) != 2 * num_pixels - 1 or (cells[1::2] != ord(",")).any():
                raise UserError(f"{path}: row {row} is not {num_pixels} labels of one digit, "
                                f"separated by commas ({rest.count(b',') + 1} columns)")
            labels[row] = cells[::2] - np.uint8(ord("0"))
            bad = np.flatnonzero((labels[row] >= NUM_CLASSES) | (labels[row] < first_class))
            if len(bad):
                raise UserError(f"{path}: row {row}, column {bad[0]} holds {chr(cells[2 * bad[0]])!r}; "
                                f"expected labels {first_class} to {NUM_CLASSES - 1}")
        if row + 1 != num_images:
            raise UserError(f"{path}: {row + 1} rows; expected {num_images}")
    return labels


def zip_file(path: Path) -> Path:
    """Write path's zip beside it (164 MB of labels become about 3) and return its name."""
    target = path.with_suffix(".zip")
    with atomic_write(target) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(path, path.name)
    return target


# ---------------------------------------------------------------------------------------- 13. report


def picture(rgb: np.ndarray, alt: str, scale: int = 2) -> str:
    """Return an <img> with the picture (H, W) grey or (H, W, 3) RGB inside it, enlarged by whole pixels."""
    rgb = rgb.repeat(scale, 0).repeat(scale, 1)
    png = cv2.imencode(".png", rgb if rgb.ndim == 2 else rgb[..., ::-1])[1].tobytes()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(header: list[str], rows: list[list]) -> str:
    """Return an HTML table; numbers are right-aligned, floats shown with three decimals, NaN as a dash."""
    def cell(value) -> str:
        if isinstance(value, float):
            return f'<td class="n">{"–" if np.isnan(value) else f"{value:.3f}"}</td>'
        if isinstance(value, (int, np.integer)):
            return f'<td class="n">{value:,}</td>'
        return f"<td>{value if str(value).startswith('<img') else html.escape(str(value))}</td>"
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def curves(lines: dict[str, list[float]], title: str) -> str:
    """Return an inline SVG of lines, name → a value an epoch, one hue each; "" if there is nothing."""
    lines = {k: v for k, v in lines.items() if v and np.isfinite(v).all()}
    if not lines:
        return ""
    low, high = min(map(min, lines.values())), max(map(max, lines.values()))
    longest = max(map(len, lines.values()))
    shapes = ""
    for i, (name, values) in enumerate(lines.items()):
        xs = 50 + 430 * np.arange(len(values)) / max(1, longest - 1)
        ys = 180 - 160 * (np.array(values) - low) / (high - low or 1)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        color = f"hsl({i * 360 // len(lines)} 70% 50%)"
        shapes += (f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6">'
                   f"<title>{html.escape(name)}</title></polyline>"
                   f'<text x="488" y="{24 + 15 * i}" fill="{color}">{html.escape(name)}</text>')
    return (f'<svg viewBox="0 0 600 205" role="img" aria-label="{html.escape(title)}"><text x="50" y="12">'
            f'{html.escape(title)}</text><text x="2" y="24">{high:.3f}</text>'
            f'<text x="2" y="182">{low:.3f}</text>'
            f'<text x="50" y="200">epoch 1</text><text x="440" y="200">{longest}</text>'
            f'<path d="M48 18V182H482" fill="none" stroke="currentColor"/>{shapes}</svg>')


STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:auto;padding:1em}
table{border-collapse:collapse;margin:.6em 0}td,th{border:1px solid #8888;padding:.25em .6em;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}svg{max-width:600px;width:100%;
font-size:11px;fill:currentColor}img{image-rendering:pixelated;max-width:none}
figure{display:inline-block;margin:.3em}
.key span{display:inline-block;width:1em;height:1em;margin:0 .3em 0 1em;border:1px solid #888}
figcaption{font-size:12px;max-width:260px}"""


def write_report(path: Path, metrics: dict, histories: dict, facts: dict, images: np.ndarray,
                 truth: np.ndarray, labels: list[np.ndarray], confidence: np.ndarray,
                 outliers: pd.DataFrame, outlier_images: np.ndarray) -> None:
    """Write the report, one HTML file that needs no network.

    Args: metrics, what metrics.json holds; histories, (stage, fold) → list of epochs; facts, anything to
    list at the end; images, truth, each stage's out-of-fold labels and confidence, uint8 (N, H, W), of the
    validated images; outliers, find_outliers's table, and its images.
    """
    stages = [f"stage{i}" for i in (1, 2) if f"stage{i}_miou" in metrics]
    parts = ["<h1>Mars terrain: the run</h1>", "<h2>Scores out of fold</h2>", table(
        ["stage", "mean IoU (competition)", "± over folds", "mean IoU (paper, with background)", *CLASSES],
        [[s, metrics[f"{s}_miou"], metrics[f"{s}_fold_std"], metrics[f"{s}_paper_miou"],
          *map(float, metrics[f"{s}_iou"])] for s in stages])]
    if "test_miou" in metrics:
        parts.append(f"<p>Test labels were in the file: mean IoU <b>{metrics['test_miou']:.4f}</b>.</p>")
    parts.append("<h2>Training</h2>")
    for s in range(1, len(stages) + 1):
        runs = {f"fold {fold}": history for (stage, fold), history in sorted(histories.items()) if stage == s}
        for name, title in (("score", "validation mean IoU"), ("loss", "training loss")):
            lines = {k: [epoch[name] for epoch in v] for k, v in runs.items()}
            parts.append(curves(lines, f"stage {s}: {title}"))
    parts.append("<h2>Confusion, rows sum to 1: truth down, prediction across</h2>")
    for s in stages:
        counts = np.array(metrics[f"{s}_confusion"], float)
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        parts.append(table([s, *CLASSES], [[CLASSES[c], *map(float, shares[c])] for c in range(NUM_CLASSES)]))
    key = "".join(f'<span style="background:rgb({r} {g} {b})"></span>{name}'
                  for name, (r, g, b) in zip(CLASSES, PALETTE, strict=True))
    parts.append(f'<h2>Validated images: best, median, worst, and with big rock</h2><p class="key">{key}</p>')
    counted = (truth > 0).sum((1, 2))
    right = ((truth == labels[-1]) & (truth > 0)).sum((1, 2)) / counted.clip(1)
    order = np.argsort(right, kind="stable")
    order = order[counted[order] > truth[0].size // 4]
    middle = len(order) // 2
    rock = np.flatnonzero((truth == NUM_CLASSES - 1).any((1, 2)))
    rows = []
    for kind, chosen in (("best", order[-3:]), ("median", order[middle:middle + 3]), ("worst", order[:3]),
                         ("big rock", rock[:6])):
        for i in chosen:
            rows.append([f"{kind}, {right[i]:.2f}", picture(images[i], "image"),
                         picture(PALETTE[truth[i]], "truth"),
                         *(picture(PALETTE[stage[i]], f"stage {s}") for s, stage in enumerate(labels, 1)),
                         picture(confidence[i], "confidence")])
    parts.append(table(["accuracy", "image", "truth", *stages, "confidence"], rows))
    parts.append(f"<h2>Intruders: {len(outliers)} training images taken out</h2>")
    for image, (_, row) in zip(outlier_images[:60], outliers[:60].iterrows(), strict=True):
        parts.append(f"<figure>{picture(image, 'intruder', 1)}<figcaption>{row['index']}: "
                     f"{html.escape(str(row['reasons']))}</figcaption></figure>")
    parts += ["<h2>Data, choices, machine</h2>",
              table(["what", "value"], [[k, str(v)] for k, v in facts.items()])]
    page = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>Mars terrain: the run</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>")
    with atomic_write(path) as f:
        f.write(page.encode())
