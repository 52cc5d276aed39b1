"""What a file may be: a sentence that names file, key, index and value, or the right arrays."""
from __future__ import annotations

import hashlib
import io
import json
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from kit import run_main, tiny_arrays

import lib
import solve

T = tiny_arrays()
TRAIN, TEST = T["training_set"], T["test_set"]
IMAGES, MASKS = TRAIN[:, 0], TRAIN[:, 1]
HTML = b"\n<!DOCTYPE html><html><head><title>Kaggle: log in</title></head><body>x</body></html>"
ZEROS = np.zeros((4200, 2, 64, 128), np.uint8)


class Evil:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def npy(array, **header):
    """Return array's .npy bytes, its header replaced where asked."""
    buffer = io.BytesIO()
    facts = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue() + array.tobytes()


def npz(compressed=False, **changed):
    """Return the tiny data set as the bytes of an .npz, some keys changed; None leaves one out."""
    buffer = io.BytesIO()
    arrays = {key: array for key, array in {**T, **changed}.items() if array is not None}
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def packed(compression=zipfile.ZIP_DEFLATED, **members):
    """Return a zip's bytes; __ in a member's name stands for its dot."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name.replace("__", "."), raw)
    return buffer.getvalue()


def write(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def training_set(images=IMAGES, masks=MASKS):
    return {"training_set": np.stack([images, masks], 1)}


def edited(key, index, value, dtype=None):
    array = T[key].astype(dtype or T[key].dtype)
    array[index] = value
    return {key: array}


def flipped(raw, at):
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:]


WITHOUT_TEST = {"test_set": None, "test_labels": None}
BYTES = {  # of m.npz, by name: bytes or a function of a marker's path; parts of the sentence
    "03_empty": (b"", ["empty"]),
    "04_half": (npz()[:40_000], ["cut short", "fetch it again"]),
    "05_web_page": (HTML, ["web page", "log in"]),
    "06_npy": (npy(TRAIN), [".npy"]),
    "07_bit": (flipped(npz(), 50_000), ["damaged", "fetch it again"]),
    "08_pickle": (lambda marker: pickle.dumps(Evil(marker)), ["not an .npz"]),
    "08_objects": (lambda marker: npz(training_set=np.array([Evil(marker)], object)),
                   ["training_set", "pickled"]),
    "09_terabytes": (packed(training_set__npy=npy(TRAIN, shape=(10**8, 2, 64, 128))), ["damaged"]),
    "09_bomb": (packed(training_set__npy=npy(ZEROS)), ["would unpack to 688"]),
    "09_bomb_in_zip": (packed(m__npz=packed(training_set__npy=npy(ZEROS))), ["unpack to 688"]),
    "55_zip_without_npz": (packed(x__csv=b"1"), ["training_set is missing", "x.csv"])}
ARRAYS = {  # by name: what is changed; parts of the sentence
    "10_no_training_set": ({"training_set": None}, ["training_set is missing", "found test_set"]),
    "11_channels_last": ({"training_set": np.moveaxis(TRAIN, 1, -1)},
                         ["training_set", "(24, 32, 64, 2)", "transpose(0, 3, 1, 2)"]),
    "11_swapped_sides": ({"test_set": TEST.swapaxes(1, 2)},
                         ["test_set", "(6, 64, 32)", "32, 64)", "transpose(0, 2, 1)"]),
    "11_masks_first": ({"training_set": TRAIN[:, ::-1]}, ["training_set", "labels", "swap"]),
    "11_label_size": ({"test_labels": T["test_labels"][:5]}, ["(5, 32, 64)", "(6, 32, 64)"]),
    "12_no_images": ({"training_set": TRAIN[:0]}, ["training_set", "(0, 2, 32, 64)"]),
    "12_one_image": ({"training_set": TRAIN[:1]}, ["at least 2"]),
    "13_complex": ({"training_set": TRAIN.astype(complex)}, ["complex128", "not numbers"]),
    "14_nan": (edited("training_set", (7, 0, 3), np.nan, float), ["[:, 0]", "NaN", "image 7"]),
    "14_inf": (edited("test_set", 2, np.inf, float), ["test_set", "infinite", "image 2"]),
    "14_nan_label": (edited("training_set", (5, 1, 0, 0), np.nan, float), ["[:, 1]", "[5]", "nan"]),
    "15_constant": (training_set(0 * IMAGES) | WITHOUT_TEST, ["constant grey"]),
    "15_constant_but_the_test_set": (training_set(0 * IMAGES), ["constant grey"]),
    "16_255": (edited("training_set", ([3, 9], 1, 2), 255),
               ["[:, 1]", "0 to 4", "128 pixels", "2 images", "[3, 9]", "[255]"]),
    "16_minus_1": (edited("training_set", (0, 1, 0, 0), -1, int), ["1 pixels", "[0]", "[-1]"]),
    "16_test_1.5": (edited("test_labels", (2, 0, 0), 1.5, float), ["test_labels", "[2]", "[1.5]"]),
    "17_background": (training_set(masks=0 * MASKS), ["every training pixel", "background"]),
    "57_standardised": (training_set(IMAGES / 60.0 - 2), ["(-1.8", "'test_set': (8.0", "scale"]),
    "57_standardised_beside_dark": (training_set(IMAGES / 44.0 - 2.2) | {"test_set": TEST // 2},
                                    ["(-2.0", "scale"]),
    "57_fractions_of_fractions": (training_set(IMAGES / 255) | {"test_set": TEST / 255 ** 2},
                                   ["'test_set': (0.0", "scale"]),
    "57_truncated": ({"test_set": TEST // 200}, ["'test_set': (0.0, 1.0)", "scale"])}
LABELS = {  # fault 58: labels of others, and what the sentence says turns them into ours
    "labels - 1": MASKS + 1, "np.rint(labels / 63)": MASKS * 63,
    "np.where(labels == 255, 0, labels + 1)": MASKS - 1,
    "np.rint(labels / 0.00392157)": MASKS / 255}
ARRAYS |= {f"58_{cure}": (training_set(masks=wrong), [cure]) for cure, wrong in LABELS.items()}
FAULTS = BYTES | {name: (npz(**changed), parts) for name, (changed, parts) in ARRAYS.items()}


@pytest.mark.fault(3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 55, 57, 58)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_one_sentence(tmp_path, name):
    """UserError is one line that names file and fault; nothing is executed or written, and false
    claims of size cost less than 4 MB before they are refused."""
    made, expected = FAULTS[name]
    path = write(tmp_path / "m.npz", made(tmp_path / "executed") if callable(made) else made)
    tracemalloc.start()
    with pytest.raises(lib.UserError) as error:
        lib.load_data(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for part in [str(path), *expected]:
        assert part in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200
    assert list(tmp_path.iterdir()) == [path] and ("09" not in name or peak < 4 << 20)


@pytest.mark.fault(53)
def test_a_faulty_file_ends_the_run_with_one_line(tmp_path):
    """Status 2, one line on standard error, no traceback, and no output folder; the path may hold
    spaces."""
    path = write(tmp_path / "my data" / "m.npz", HTML)
    status, out, err = run_main(path, tmp_path / "out")
    assert status == 2 and err.startswith(f"solve.py: {path}: ") and err.count("\n") == 1
    assert "Traceback" not in out + err and not (tmp_path / "out").exists()


@pytest.mark.fault(1, 2, 55)
@pytest.mark.parametrize("files,chosen", [
    (["MARS_FOR_STUDENTS.NPZ", "a.npz", "sample.npz", "mars.zip"], 0), (["sample.npz"], 0),
    (["sub/deep/OTHER.NPZ", "sample.npz"], 0), (["mars.zip", "sample.npz", "._mars.npz"], 0),
    (["a.npz", "b.zip", "sample.npz"], "2 .npz files, name one.*a.npz.*b.zip"),
    (["read_me_first.txt"], "no such file, or no .npz.*mars_for_students.npz.*read_me_first.txt")])
def test_which_file_a_folder_stands_for(tmp_path, monkeypatch, files, chosen):
    """The competition's name first, then the one other file, the sample last; names in any case,
    and not what macOS adds. Otherwise the sentence says what there is. ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in files:
        write(tmp_path / name, b"")
    if chosen == 0:
        assert lib.find_data_file("~") == tmp_path / files[0]
    else:
        with pytest.raises(lib.UserError, match=chosen):
            lib.find_data_file(tmp_path)


@pytest.mark.fault(1)
def test_a_missing_file_names_what_there_is_and_kaggles_input(tmp_path, monkeypatch):
    """A mistyped name: the files beside it, or in the folder above, and those below Kaggle's input,
    which is also the default where it exists."""
    monkeypatch.setattr(lib, "KAGGLE_INPUT", write(tmp_path / "k" / "in" / "m.npz", b"").parents[1])
    for missing in ("marz.npz", "no/such/folder/marz.npz"):
        with pytest.raises(lib.UserError, match="no such file.*/k,.*k/in/m.npz"):
            lib.find_data_file(tmp_path / missing)
    assert solve.parse([]).data == str(tmp_path / "k")


@pytest.mark.fault(58)
@pytest.mark.parametrize("cure", LABELS)
def test_cures_of_labels_are_right(tmp_path, cure):
    """What the sentence suggests turns the labels into ours, and then they load."""
    labels = eval(cure, {"np": np, "labels": LABELS[cure]})
    data = lib.load_data(write(tmp_path / "m.npz", npz(**training_set(masks=labels))))
    np.testing.assert_array_equal(data.masks, MASKS)


@pytest.mark.fault(4, 7)
@pytest.mark.parametrize("compressed,in_zip", [(False, False), (True, False), (False, True)])
def test_damage_never_changes_the_data_in_silence(tmp_path, compressed, in_zip):
    """A bit at 120 places, or an end that is missing at 20: a sentence, or the same arrays."""
    arrays, rng = tiny_arrays(4, 2, 8, 16), np.random.default_rng(0)
    raw = npz(compressed, **arrays)
    raw = packed(m__npz=raw) if in_zip else raw
    places = [*range(70), *rng.integers(70, len(raw), 50).tolist()]
    damaged = [flipped(raw, at) for at in places] + [raw[:at] for at in places[::6]]
    refused = 0
    for changed in damaged:
        try:
            data = lib.load_data(write(tmp_path / "m.npz", changed))
        except lib.UserError:
            refused += 1
            continue
        got = np.stack([data.images, data.masks], 1)
        np.testing.assert_array_equal(got, arrays["training_set"])
        assert len(data.test_images) == 0 or (data.test_images == arrays["test_set"]).all()
    assert refused > 60


@pytest.mark.fault(55)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_kaggles_zip(tmp_path, compression):
    """A .zip that holds the .npz is read as it is, beside the sample and by name; nothing is
    written."""
    members = {"__MACOSX/._mars.npz": b"fork", "read.txt": b"x", "in/MARS.NPZ": npz()}
    write(tmp_path / "x.zip", packed(compression, **members))
    write(tmp_path / "sample.npz", npz(**tiny_arrays(seed=1)))
    for path in (tmp_path, tmp_path / "x.zip"):
        data = lib.load_data(path)
        np.testing.assert_array_equal(np.stack([data.images, data.masks], 1), TRAIN)
        np.testing.assert_array_equal(data.test_images, TEST)
        assert data.path == tmp_path / "x.zip" and len(list(tmp_path.iterdir())) == 2


LAYOUTS = {"": lambda a: a, "reversed": lambda a: a[::-1, ..., ::-1], "Fortran": np.asfortranarray}


@pytest.mark.fault(13)
@pytest.mark.parametrize("dtype", ["u1", ">u2", "i8", "f2", ">f8", *filter(None, LAYOUTS)])
def test_any_type_of_grey_values(tmp_path, dtype):
    """0 to 255 in any numeric type, byte order and memory layout gives the same uint8, without a
    note, and torch takes it."""
    layout = LAYOUTS.get(dtype, LAYOUTS[""])
    stored = {key: layout(array.astype("u1" if dtype in LAYOUTS else dtype))
              for key, array in T.items()}
    data = lib.load_data(write(tmp_path / "m.npz", npz(dtype == "f2", **stored)))
    train = layout(TRAIN)
    wanted = ((data.images, train[:, 0]), (data.masks, train[:, 1]),
              (data.test_images, layout(TEST)), (data.test_labels, layout(T["test_labels"])))
    for got, array in wanted:
        assert got.dtype == np.uint8 and got.flags.c_contiguous
        np.testing.assert_array_equal(torch.from_numpy(got), array)
    assert data.notes == []


@pytest.mark.fault(13, 57)
@pytest.mark.parametrize("change,of_test", [
    (lambda x: x / 255, lambda x: x), (lambda x: np.float16(x / 255), lambda x: x / 255),
    (lambda x: np.uint16(x) * 257,) * 2, (lambda x: x / 60 - 2,) * 2])
def test_other_scales_become_grey_values(tmp_path, change, of_test):
    """Images of 0 to 1, in one set or both, and of 16 bits or standardised in both, come back as 0
    to 255, though the test set's range is smaller; float16 within 1."""
    images = IMAGES.copy()
    images[0, 0, :2] = 0, 255
    changed = training_set(change(images)) | {"test_set": of_test(TEST)}
    data = lib.load_data(write(tmp_path / "m.npz", npz(**changed)))
    off = 1 if changed["training_set"].dtype == np.float16 else 0
    assert np.abs(data.images.astype(int) - images).max() <= off
    np.testing.assert_array_equal(data.test_images, TEST)
    np.testing.assert_array_equal(data.masks, MASKS)


@pytest.mark.fault(13)
def test_rounding_and_booleans(tmp_path):
    """99.6 is grey 100; black and white of bool is 0 and 255, labels 0 and 1."""
    train = edited("training_set", (0, 0, 0, slice(0, 4)), [99.6, 100.4, 0, 254.9], float)
    data = lib.load_data(write(tmp_path / "m.npz", npz(**train)))
    assert data.images[0, 0, :4].tolist() == [100, 100, 0, 255]
    bits = {"training_set": TRAIN % 2 == 1, "test_set": TEST % 2 == 1}
    data = lib.load_data(write(tmp_path / "m.npz", npz(**bits)))
    np.testing.assert_array_equal(data.images, IMAGES % 2 * 255)
    np.testing.assert_array_equal(data.masks, MASKS % 2)


@pytest.mark.fault(10, 15, 17, 18)
@pytest.mark.parametrize("changed,note", [
    (WITHOUT_TEST, "no test_set"),
    (training_set(masks=np.where(MASKS == 4, 1, MASKS)), "Big Rock"),
    (edited("training_set", (5, 0), 0), "1 training images"),
    (edited("test_set", slice(1, 3), IMAGES[:2]), "2 test images")])
def test_notes(tmp_path, changed, note):
    """No test set, an absent class, a black image and copies are notes."""
    data = lib.load_data(write(tmp_path / "m.npz", npz(**changed)))
    assert len(data.notes) == 1 and note in data.notes[0] and len(data.images) == 24
    assert f"note: {data.notes[0]}" in lib.describe(data)
    assert len(data.test_images) == 6 * ("test_labels" not in changed)


def test_another_test_set_is_of_the_first_ones_scale(tmp_path):
    """Of standardised images the first file's range, of whichever of its sets, decides what is
    black and white, whatever the other file's range; a little outside is clipped. Images that
    reach far outside, or plainly of another scale, are refused."""
    first = write(tmp_path / "m.npz", npz(
        **training_set(IMAGES / 90.0 - 1) | {"test_set": TEST / 60.0 - 2}))
    other = {"training_set": None, "test_set": TEST[1:3] / 60.0 - 2, "test_labels": None}
    data = lib.load_data(first, write(tmp_path / "t.npz", npz(**other)))
    np.testing.assert_array_equal(data.test_images, lib.load_data(first).test_images[1:3])
    other["test_set"][0, 0, 0] += 9 / 60
    data = lib.load_data(first, write(tmp_path / "t.npz", npz(**other)))
    assert len(data.test_images) == 2
    with pytest.raises(lib.UserError, match="t.npz: the sets are not of one scale"):
        lib.load_data(first, write(tmp_path / "t.npz", npz(**other | {"test_set": TEST * 99})))
    with pytest.raises(lib.UserError, match="t.npz: test_set lies far outside"):
        lib.load_data(first, write(tmp_path / "t.npz", npz(**other | {"test_set": TEST / 9.0})))


def test_another_test_set_takes_the_place_of_the_first(tmp_path):
    """Its images and labels, none where it has none; one of another size is refused, by name."""
    first = write(tmp_path / "m.npz", npz())
    other = {"training_set": None, "test_set": TEST[:4] // 2, "test_labels": T["test_labels"][:4]}
    data = lib.load_data(first, write(tmp_path / "t.npz", npz(**other)))
    np.testing.assert_array_equal(data.test_images, TEST[:4] // 2)
    np.testing.assert_array_equal(data.test_labels, T["test_labels"][:4])
    assert data.path == first and data.sha256 == lib.load_data(first).sha256
    data = lib.load_data(first, write(tmp_path / "t.npz", npz(**other | {"test_labels": None})))
    assert data.test_labels is None
    for wrong in (None, TEST[:, :16], TEST[0]):
        with pytest.raises(lib.UserError, match="t.npz: test_set"):
            lib.load_data(first, write(tmp_path / "t.npz", npz(**other | {"test_set": wrong})))


def test_fingerprint_by_hand(tmp_path):
    """Counts, shares, mean and spread of two images of 1×4."""
    train = np.uint8([[[[10, 20, 30, 40]], [[1, 1, 0, 2]]], [[[50, 60, 70, 80]], [[2, 2, 2, 4]]]])
    np.savez(tmp_path / "m.npz", training_set=train)
    data = lib.load_data(tmp_path / "m.npz")
    facts = lib.fingerprint(data)
    assert facts["sha256"] == hashlib.sha256((tmp_path / "m.npz").read_bytes()).hexdigest()
    assert (facts["train_images"], facts["test_images"]) == (2, 0)
    assert (facts["image_height"], facts["image_width"]) == (1, 4)
    assert facts["pixel_share"] == [0.125, 0.25, 0.5, 0, 0.125]
    assert data.mean == 45 and data.std == pytest.approx(525 ** 0.5)
    json.dumps(facts)
