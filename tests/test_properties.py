"""What holds for any input: metric, morphology, augmentation, folds, CSV and loader, by property."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tiny_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_augmentation import assert_together
from test_frames import cut_frames
from test_metric import keras_mean_iou
from test_solve import FAST

import lib
import solve

CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)


def label_maps(low, most=12):
    """Labels from low to 4, (N, H, W), of any small size."""
    sides = st.tuples(*[st.integers(1, most)] * 3)
    return hnp.arrays(np.uint8, sides, elements=st.integers(low, 4))


# ------------------------------------------------------------------------------ metric


@settings(deadline=None)
@given(label_maps(0, 6), seeds, st.sampled_from([0, None]))
def test_metric_is_keras(truth, seed, ignore_class):
    """Any truth and prediction: Keras' figure, whatever the order of the pixels and however often given."""
    rng = np.random.default_rng(seed)
    pred = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, 5, truth.shape)).astype(np.uint8)
    want = keras_mean_iou(truth, pred, 5, ignore_class)
    order = rng.permutation(truth.size)
    mixed, thrice = [x.ravel()[order] for x in (truth, pred)], [np.tile(x, 3) for x in (truth, pred)]
    for t, p in ((truth, pred), mixed, thrice):
        got = lib.iou_scores(lib.confusion_matrix(t, p), ignore_class)[0]
        assert got == pytest.approx(want, abs=1e-9, nan_ok=True)


# ------------------------------------------------------------------------------ morphology


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.uint8, st.tuples(st.just(1), st.integers(3, 14), st.integers(3, 14)),
                  elements=st.sampled_from([1, 1, 1, 2])))
def test_a_class_is_opened_and_closed_as_by_opencv(mask):
    """A pixel that its class's opening, by OpenCV, keeps never changes; others change to a class whose
    closing covers them."""
    kernel, once = np.ones((3, 3), np.uint8), lib.clean_masks(mask)
    closed = {}
    for c in np.unique(mask):
        own = np.uint8(mask[0] == c)
        opened = cv2.morphologyEx(own, cv2.MORPH_OPEN, kernel)
        assert (once[0][opened > 0] == c).all()
        closed[c] = cv2.morphologyEx(opened if opened.any() else own, cv2.MORPH_CLOSE, kernel)
    for y, x in zip(*np.nonzero(once[0] != mask[0]), strict=True):
        assert closed[once[0, y, x]][y, x]


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.uint8, st.tuples(st.just(1), st.integers(2, 5), st.integers(2, 5)),
                  elements=st.integers(1, 4)).map(lambda mask: mask.repeat(3, 1).repeat(3, 2)))
def test_opened_masks_stay(mask):
    """Opening and closing are idempotent: where every class is a union of 3×3 squares, nothing changes."""
    np.testing.assert_array_equal(lib.clean_masks(mask), mask)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_one_class_alone_stays(label, h, w):
    """A mask of one class, the others empty, comes out as it went in."""
    mask = np.full((2, h, w), label, np.uint8)
    np.testing.assert_array_equal(lib.clean_masks(mask), mask)


# ------------------------------------------------------------------------------ augmentation


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 5), st.integers(3, 6), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 90))
def test_image_and_mask_move_together(seed, rows, columns, shift, scale, degrees):
    """Mirrors and affine maps of any strength, one after the other, on any size: where no border is near, the
    image still shows the label."""
    gen = lib.generator(CPU, seed)
    y = torch.randint(1, 5, (4, rows, columns), generator=gen)
    y = y.repeat_interleave(12, 1).repeat_interleave(12, 2).to(torch.int8)
    x = torch.stack([y.float(), 10 * y.float()], 1)
    for change in (lambda x, y: lib.flip(x, y, -1, gen), lambda x, y: lib.flip(x, y, -2, gen),
                   lambda x, y: lib.affine(x, y, gen, shift, scale, degrees)):
        x, y = change(x, y)
        assert x.shape == (4, 2, *y.shape[1:]) and set(y.unique().tolist()) <= {1, 2, 3, 4}
    assert_together(x, y)


# ------------------------------------------------------------------------------ folds


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(4, 40), st.integers(1, 6), st.integers(0, 20))
def test_no_copy_crosses_a_fold(seed, n, folds, copies):
    """Whatever is repeated, equal images share a fold, and every image is validated exactly once."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 4, 4)).astype(np.uint8)
    pick = np.append(np.arange(n), rng.integers(0, n, copies))
    masks = rng.integers(0, 5, (len(pick), 4, 4)).astype(np.uint8)
    if n < folds:
        with pytest.raises(lib.UserError):
            lib.make_folds(images[pick], masks, folds, seed)
        return
    fold_of = lib.make_folds(images[pick], masks, folds, seed)
    assert all(len(np.unique(fold_of[pick == i])) == 1 for i in range(n))
    assert set(np.unique(fold_of)) == (set(range(folds)) if folds > 1 else {-1, 0})


@pytest.mark.parametrize("fold", [0, 1])
def test_a_network_never_sees_its_fold(tmp_path, write_npz, fold):
    """With the images and labels of its fold replaced by noise a network trains to the same weights, bit by
    bit: not one of them, nor a patch pasted from one, was looked at. Of the other fold: other weights."""
    argv = ["--data", write_npz(**tiny_arrays()), "--out", tmp_path / "out", *FAST, "--paste", "1"]
    run = solve.open_run(solve.parse(list(map(str, argv))))

    def weights(changed):
        images, targets, gen = run.tiles.images.clone(), run.tiles.targets.clone(), lib.generator(CPU, 9)
        where = torch.from_numpy(np.flatnonzero(run.fold_of == changed))
        images[where] = torch.randint(256, images[where].shape, generator=gen).to(torch.uint8)
        targets[where] = torch.randint(5, targets[where].shape, generator=gen).to(torch.int8)
        data = dataclasses.replace(run.tiles, images=images, targets=targets, paste=1.0)
        network = solve.new_network(run, 1, fold)
        index = torch.from_numpy(np.flatnonzero(run.fold_of != fold))
        solve.train_one_epoch(run, network, data, index, (1, fold, 1))
        return torch.cat([p.detach().flatten() for p in network.model.parameters()])

    assert torch.equal(weights(-1), weights(fold))  # -1: of no fold, nothing is changed
    assert not torch.equal(weights(-1), weights(1 - fold))


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """A run opened on tiles that are put back together: three folds, windows that reach over other tiles."""
    images, _ = cut_frames(6, 3, 2, 32, 64)
    masks, folder = (1 + (images > 90) + (images > 130)).astype(np.uint8), tmp_path_factory.mktemp("framed")
    masks[::5, 10:14, 20:24] = 4  # a rare class, whose patches are pasted
    np.savez(folder / "mars.npz", training_set=np.stack([images[:26], masks[:26]], 1), test_set=images[26:])
    argv = ["--data", folder / "mars.npz", "--out", folder / "out", *FAST, "--paste", "1", "--epochs", "1",
            "--folds", "3"]
    run = solve.open_run(solve.parse(list(map(str, argv))))
    assert run.plan.around == 16 and run.is_rare[4] and (run.place[0] >= 0).mean() > 0.8
    return run


class Ends(Exception):
    """What was looked for has been seen."""


def first_two_stages(run, state, changed):
    """Return what each fold says after stage 1 and stage 2's input, the pixels of one fold's labels shuffled.

    All that a score would choose is given: one epoch, whose weights are the best, and the strength 1.
    """
    state.mkdir()
    masks, own = run.data.masks.copy(), run.fold_of == changed
    masks[own] = np.random.default_rng(0).permutation(masks[own].ravel()).reshape(masks[own].shape)
    run = dataclasses.replace(run, state=state, data=dataclasses.replace(run.data, masks=masks),
                              metrics={}, histories={}, steps=[])
    solve.put_on_device(run)
    first = solve.train_stage(run, 1, run.tiles, run.end)
    said, given, real = solve.predict(run, first, run.tiles), [], solve.second_input

    def seen(*args):
        given.append(real(*args))
        raise Ends

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Ends):
        patch.setattr(lib, "fit_strength", lambda *_: 1.0)
        patch.setattr(solve, "second_input", seen)
        solve.refine(run, first, said.copy())
    return said, given[0]


@pytest.fixture(scope="module")
def untouched(framed, tmp_path_factory):
    """The same with all labels as they are."""
    return first_two_stages(framed, tmp_path_factory.mktemp("untouched") / "state", -1)


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_no_label_of_a_fold_reaches_what_it_is_scored_on(framed, untouched, tmp_path, fold):
    """With the labels of its fold replaced by noise network k says the same after stage 1, bit by bit, though
    windows reach over the fold's tiles; so are the cleaned masks, confidences and evidence that stage 2's
    network k is validated and asked with, and the labels it learns. Other folds' views do change."""
    own, rest = (torch.from_numpy(np.flatnonzero(chosen))
                 for chosen in (framed.fold_of == fold, framed.fold_of != fold))
    over = framed.tiles.windows(rest, 1, -9, lib.generator(CPU, 3))[1]
    assert (over >= 0).sum() > (framed.tiles.windows(rest, 1, fold, lib.generator(CPU, 3))[1] >= 0).sum()
    (said, second), (said_before, before) = first_two_stages(framed, tmp_path / "state", fold), untouched
    np.testing.assert_array_equal(said[fold], said_before[fold])
    for name in ("cleaned", "confidence", "evidence"):
        views, views_before = getattr(second, name), getattr(before, name)
        assert torch.equal(views[fold], views_before[fold])
        assert all(not torch.equal(views[k], views_before[k]) for k in range(3) if k != fold), name
    assert torch.equal(second.windows(own, 1)[0], before.windows(own, 1)[0])
    assert not torch.equal(second.windows(own, 1)[1], before.windows(own, 1)[1])
    learnt, learnt_before = (x.windows(rest, 1, fold, lib.generator(CPU, 4))[1] for x in (second, before))
    assert torch.equal(learnt, learnt_before)


# ------------------------------------------------------------------------------ the CSV


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(label_maps(1))
def test_csv_round_trip(tmp_path, preds):
    """Any labels come back the same, by our reader and by pandas."""
    file = tmp_path / "s.csv"
    lib.write_submission(file, preds)
    flat = preds.reshape(len(preds), -1)
    np.testing.assert_array_equal(lib.check_submission(file, *flat.shape), flat)
    np.testing.assert_array_equal(pd.read_csv(file, index_col="id").to_numpy(), flat)


# ------------------------------------------------------------------------------ the loader

FUZZ = r"""
import sys
sys.path[:0] = sys.argv[1:3]
import numpy as np
import lib
from conftest import tiny_arrays
rng, path, counts = np.random.default_rng(0), sys.argv[3] + "/m.npz", {"refused": 0, "loaded": 0}
DTYPES = ["u1", "i1", ">u2", "<i4", "i8", "f2", "<f4", ">f8", "?", "c8", "S3", "O", "M8[s]", "V2"]

def change(arrays):
    key = rng.choice([*arrays])
    array, kind = arrays[key], rng.integers(7)
    if kind == 0:
        array = array.astype(rng.choice(DTYPES), casting="unsafe") if array.dtype.kind in "biuf" else array
    elif kind == 1:
        array = array.transpose(rng.permutation(array.ndim))
    elif kind == 2:
        array = array[tuple(slice(int(rng.integers(0, n + 1))) for n in array.shape)]
    elif kind == 3 and array.dtype.kind == "u" and array.size:
        array = array.astype("f8")
        array.reshape(-1)[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -1, 0.5, 256, 1e300])
    elif kind == 4 and array.dtype.kind in "iu" and array.size:
        array = array.copy()
        array.reshape(-1)[rng.integers(array.size, size=3)] = rng.integers(0, 120, 3)
    elif kind == 5:
        array = array.reshape(-1)
    arrays[rng.choice(["training_set", "test_set", "test_labels", "x"]) if kind == 6 else key] = array

def damage(raw):
    for _ in range(rng.integers(1, 6)):
        kind, at = rng.integers(5), int(rng.integers(max(1, min(len(raw), rng.choice([200, len(raw)])))))
        if kind == 0 and raw:
            raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            raw[at:at + 8] = rng.bytes(8)
        elif kind == 2:
            del raw[at:at + int(rng.integers(1, 400))]
        elif kind == 3:
            raw[at:at] = raw[:int(rng.integers(400))]
        else:  # a size in a header or in the zip's directory
            raw[:] = raw.replace(rng.choice([b"64", b"32", b"24", b"6, "]), rng.choice([b"99", b"-1", b"0x"]))
    return raw

for i in range(int(sys.argv[4])):
    arrays = tiny_arrays(4, 2, 32, 64)
    for _ in range(rng.integers(3) if i % 2 else rng.integers(1, 3)):
        change(arrays)
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(path, **arrays)
    if i % 2:
        raw = damage(bytearray(open(path, "rb").read()))
        open(path, "wb").write(raw)
    try:
        data = lib.load_data(path)
    except lib.UserError as e:
        counts["refused"] += 1
        assert len(str(e)) > 20 and "\n" not in str(e) and path in str(e), e
        continue
    counts["loaded"] += 1
    assert data.images.dtype == data.masks.dtype == data.test_images.dtype == np.uint8
    assert data.images.shape == data.masks.shape and data.masks.max() <= 4 and (data.masks > 0).any()
    assert data.test_images.shape[1:] == data.images.shape[1:] and len(data.images) > 1
    assert data.test_labels is None or data.test_labels.shape == data.test_images.shape
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # ru_maxrss is the parent's at least
print("FUZZ", counts["refused"], counts["loaded"], peak)
"""


@pytest.mark.parametrize("mutations", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_mutated_files_load_right_or_not_at_all(tmp_path, mutations):
    """Arrays of other types, shapes and values, files with bytes changed, lost or added: one sentence with
    the file's name, or data that keep their promises; never more than 1 GB."""
    words = ["-W", "ignore", "-c", FUZZ, ROOT, ROOT / "tests", tmp_path, str(mutations)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    refused, loaded, peak = map(int, re.search(r"FUZZ (\d+) (\d+) (\d+)", done.stdout).groups())
    assert refused + loaded == mutations and min(refused, loaded) > mutations // 20 and peak < 1 << 20
    print(f"{refused} refused, {loaded} loaded, {peak >> 10} MB at most")
