"""Faults 1 to 19: each is one sentence that names file, key, index and value, or a note and a correct
load."""

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
from conftest import tiny_arrays

import lib
import solve


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


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def save(path, compressed=False, **changed):
    """Write the tiny data set with some keys changed; None leaves a key out."""
    arrays = {k: v for k, v in {**tiny_arrays(), **changed}.items() if v is not None}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def edited(key, index, value, dtype=None):
    """Return the tiny data set's array with value at index."""
    array = tiny_arrays()[key]
    array = array.astype(dtype or array.dtype)
    array[index] = value
    return array


def cut(path, size, compressed):
    save(path, compressed)
    path.write_bytes(path.read_bytes()[:size])
    return path


def flip_in_the_middle(path, compressed):
    save(path, compressed)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    return path


def two_files(folder):
    for name in ("a.npz", "b.npz"):
        save(folder / name)
    return folder


def write(path, raw):
    path.write_bytes(raw)
    return path


def missing_among_others(folder):
    (folder / "read_me_first.txt").touch()
    return folder / "marz.npz"


T = tiny_arrays()
TRAIN, TEST = T["training_set"], T["test_set"]
HTML = b"\n<!DOCTYPE html><html><head><title>Kaggle: log in</title></head><body>x</body></html>"

# name: (make the file in a folder and return --data, parts of the sentence)
FAULTS = {
    "01_missing": (missing_among_others, ["marz.npz", "no such file", "read_me_first.txt"]),
    "01_missing_folder_above": (lambda d: d / "no" / "such" / "folder", ["no such file", "folder"]),
    "01_folder_without_npz": (
        lambda d: missing_among_others(d).parent,
        ["no .npz", "read_me_first.txt", "mars_for_students.npz"],
    ),
    "02_two_files": (two_files, ["2 .npz files", "a.npz", "b.npz", "name one"]),
    "03_empty": (lambda d: write(d / "m.npz", b""), ["m.npz", "empty"]),
    "04_truncated_half": (
        lambda d: cut(d / "m.npz", 40_000, False),
        ["m.npz", "cut short", "fetch it again"],
    ),
    "04_truncated_compressed": (
        lambda d: cut(d / "m.npz", 9_000, True),
        ["m.npz", "cut short", "fetch it again"],
    ),
    "04_truncated_to_four_bytes": (lambda d: cut(d / "m.npz", 4, False), ["m.npz", "cut short"]),
    "05_web_page": (lambda d: write(d / "m.npz", HTML), ["m.npz", "web page", "download"]),
    "06_npy": (lambda d: write(d / "m.npz", npy(TRAIN)), ["m.npz", ".npy", "training_set"]),
    "07_flipped_bit_stored": (
        lambda d: flip_in_the_middle(d / "m.npz", False),
        ["m.npz", "damaged", "fetch it again"],
    ),
    "07_flipped_bit_packed": (lambda d: flip_in_the_middle(d / "m.npz", True), ["m.npz", "fetch it again"]),
    "08_pickled_objects": (
        lambda d: save(d / "m.npz", training_set=np.array([Evil(d / "executed")], object)),
        ["m.npz", "training_set", "pickled"],
    ),
    "08_pickled_objects_elsewhere": (
        lambda d: save(d / "m.npz", notes=np.array([Evil(d / "executed")], object)),
        ["m.npz", "notes", "pickled"],
    ),
    "08_raw_pickle": (
        lambda d: write(d / "m.npz", pickle.dumps(Evil(d / "executed"))),
        ["m.npz", "not an .npz"],
    ),
    "09_header_of_terabytes": (
        lambda d: write_zip(
            d / "m.npz", {"training_set.npy": npy(TRAIN, shape=(10**8, 2, 64, 128), descr="<f8")}
        ),
        ["m.npz", "training_set", "claims 13107200000000 bytes", "98304"],
    ),
    "09_header_beyond_64_bits": (
        lambda d: write_zip(d / "m.npz", {"training_set.npy": npy(TRAIN, shape=(2**40, 2, 2**20, 2**20))}),
        ["m.npz", "training_set", f"claims {2**81} bytes"],
    ),
    "09_many_large_arrays": (
        lambda d: write_zip(d / "m.npz", {f"{k}.npy": npy(TEST, shape=(3 * 2**30,)) for k in "abc"}),
        ["m.npz", "claims"],
    ),
    "09_header_says_more_than_there_is": (
        lambda d: write_zip(d / "m.npz", {"training_set.npy": npy(TRAIN, shape=(25, *TRAIN.shape[1:]))}),
        ["training_set", "102400 bytes", "has 98304", "damaged"],
    ),
    "09_zip_bomb": (
        lambda d: write_zip(
            d / "m.npz",
            {"training_set.npy": npy(np.zeros((4200, 2, 64, 128), np.uint8))},
            zipfile.ZIP_DEFLATED,
        ),
        ["m.npz", "would unpack to 688"],
    ),
    "10_no_training_set": (
        lambda d: save(d / "m.npz", training_set=None),
        ["training_set is missing", "found test_set"],
    ),
    "10_no_arrays": (lambda d: write_zip(d / "m.npz", {}), ["training_set is missing", "found none"]),
    "11_channels_last": (
        lambda d: save(d / "m.npz", training_set=np.moveaxis(TRAIN, 1, -1)),
        ["training_set", "(24, 32, 64, 2)", "(N, 2, H, W)", "transpose(0, 3, 1, 2)"],
    ),
    "11_channels_first": (
        lambda d: save(d / "m.npz", training_set=TRAIN.swapaxes(0, 1)),
        ["training_set", "(2, 24, 32, 64)", "transpose(1, 0, 2, 3)"],
    ),
    "11_height_and_width_swapped": (
        lambda d: save(d / "m.npz", test_set=TEST.swapaxes(1, 2)),
        ["test_set", "(6, 64, 32)", "(M, 32, 64)", "transpose(0, 2, 1)"],
    ),
    "11_masks_first": (
        lambda d: save(d / "m.npz", training_set=TRAIN[:, ::-1]),
        ["training_set", "labels", "swap"],
    ),
    "11_three_channels": (
        lambda d: save(d / "m.npz", training_set=TRAIN[:, [0, 0, 1]]),
        ["training_set", "(24, 3, 32, 64)", "(N, 2, H, W)"],
    ),
    "11_no_labels": (lambda d: save(d / "m.npz", training_set=TRAIN[:, 0]), ["training_set", "(24, 32, 64)"]),
    "11_test_with_channels": (
        lambda d: save(d / "m.npz", test_set=TEST[:, None]),
        ["test_set", "(6, 1, 32, 64)"],
    ),
    "11_test_of_other_size": (
        lambda d: save(d / "m.npz", test_set=TEST[:, :16]),
        ["test_set", "(6, 16, 64)"],
    ),
    "11_labels_of_other_size": (
        lambda d: save(d / "m.npz", test_labels=T["test_labels"][:5]),
        ["test_labels", "(5, 32, 64)", "(6, 32, 64)"],
    ),
    "12_no_images": (
        lambda d: save(d / "m.npz", training_set=TRAIN[:0]),
        ["training_set", "(0, 2, 32, 64)", "at least 2"],
    ),
    "12_one_image": (
        lambda d: save(d / "m.npz", training_set=TRAIN[:1]),
        ["training_set", "(1, 2, 32, 64)", "at least 2"],
    ),
    "12_no_test_images": (
        lambda d: save(d / "m.npz", test_set=TEST[:0], test_labels=None),
        ["test_set", "(0, 32, 64)"],
    ),
    "12_no_pixels": (
        lambda d: save(d / "m.npz", training_set=TRAIN[..., :0]),
        ["training_set", "(24, 2, 32, 0)"],
    ),
    "13_complex": (
        lambda d: save(d / "m.npz", training_set=TRAIN.astype(complex)),
        ["training_set", "complex128", "numbers"],
    ),
    "13_text": (lambda d: save(d / "m.npz", test_set=TEST.astype("U3")), ["test_set", "<U3", "numbers"]),
    "14_nan": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", (7, 0, 3, 3), np.nan, float)),
        ["training_set[:, 0]", "NaN", "image 7"],
    ),
    "14_inf_in_test": (
        lambda d: save(d / "m.npz", test_set=edited("test_set", (slice(2, 4), 1), np.inf, np.float32)),
        ["test_set", "infinite", "image 2"],
    ),
    "14_nan_labels": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", (5, 1, 0, 0), np.nan, float)),
        ["training_set[:, 1]", "1 pixels", "first 5", "nan"],
    ),
    "15_all_constant": (
        lambda d: save(d / "m.npz", training_set=np.stack([np.full_like(TRAIN[:, 0], 90), TRAIN[:, 1]], 1)),
        ["constant grey"],
    ),
    "16_label_255": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", ([3, 9], 1, 2), 255)),
        ["training_set[:, 1]", "0 to 4", "128 pixels", "2 images", "3, 9", "255"],
    ),
    "16_label_255_of_fractions": (
        lambda d: save(
            d / "m.npz",
            training_set=edited("training_set", (3, 1, 2, 2), 255, float)
            * np.array([1 / 255, 1])[:, None, None],
        ),
        ["training_set[:, 1]", "1 pixels", "first 3", "hold 255"],
    ),
    "16_label_minus_1": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", (0, 1, 0, 0), -1, np.int16)),
        ["training_set[:, 1]", "1 pixels", "first 0", "hold -1"],
    ),
    "16_label_5": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", (23, 1, 31, 63), 5)),
        ["training_set[:, 1]", "1 pixels", "first 23", "hold 5"],
    ),
    "16_label_1.5": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", (1, 1, 0, 0), 1.5, float)),
        ["training_set[:, 1]", "first 1", "hold 1.5"],
    ),
    "16_several_values": (
        lambda d: save(d / "m.npz", training_set=edited("training_set", (4, 1, 0), range(64))),
        ["59 pixels", "1 images", "first 4", "5, 6, 7"],
    ),
    "16_test_label": (
        lambda d: save(d / "m.npz", test_labels=edited("test_labels", (2, 0, 0), 9)),
        ["test_labels", "first 2", "hold 9"],
    ),
    "17_all_background": (
        lambda d: save(d / "m.npz", training_set=np.stack([TRAIN[:, 0], 0 * TRAIN[:, 1]], 1)),
        ["every training pixel", "background"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_one_sentence(tmp_path, capsys, name):
    """main() ends with status 2 and one line that names what is wrong; nothing is executed, nothing
    written."""
    make, expected = FAULTS[name]
    folder = tmp_path / "data set"  # fault 53: a space in the path
    folder.mkdir()
    data, out = make(folder), tmp_path / "out"
    before = sorted(folder.iterdir())
    assert solve.main(["--data", str(data), "--out", str(out), "--no-clean"]) == 2
    said = capsys.readouterr()
    assert (
        said.err.startswith("solve.py: ")
        and said.err.count("\n") == 1
        and "Traceback" not in said.err + said.out
    )
    for part in ["data set", *expected]:
        assert part in said.err
    assert sorted(folder.iterdir()) == before and not out.exists()


def test_evil_payload_would_work(tmp_path):
    """The object of fault 8 does create its file when pickles are allowed: the test above can fail."""
    save(tmp_path / "m.npz", notes=np.array([Evil(tmp_path / "executed")], object))
    with np.load(tmp_path / "m.npz", allow_pickle=True) as archive:
        archive["notes"][0].close()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["09_header_of_terabytes", "09_zip_bomb"])
def test_bombs_are_refused_before_memory_is_taken(tmp_path, name):
    """Fault 9: terabytes in a header or a thousandfold compression cost less than 4 MB before they are
    refused."""
    path = FAULTS[name][0](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(lib.UserError):
            lib.load_data(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_never_changes_the_data_in_silence(tmp_path, compressed):
    """Fault 7 at 200 places, all headers included: a sentence, or exactly the same arrays."""
    path = tmp_path / "m.npz"
    arrays = tiny_arrays(4, 2, 8, 16)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    raw, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for at in [*range(120), *rng.integers(120, len(raw), 80).tolist()]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            data = lib.load_data(path)
        except lib.UserError:
            refused += 1
            continue
        np.testing.assert_array_equal(data.images, arrays["training_set"][:, 0])
        np.testing.assert_array_equal(data.masks, arrays["training_set"][:, 1])
        if data.test_images is not None:
            np.testing.assert_array_equal(data.test_images, arrays["test_set"])
    assert refused > 100


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_file_never_loads(tmp_path, compressed):
    """Fault 4 at 60 places: whatever is missing at the end, the file is refused."""
    path = save(tmp_path / "m.npz", compressed)
    raw = path.read_bytes()
    for size in np.linspace(1, len(raw) - 1, 60).astype(int):
        path.write_bytes(raw[:size])
        with pytest.raises(lib.UserError):
            lib.load_data(path)


# ------------------------------------------------------------------------------ 1, 2: which file


@pytest.mark.parametrize(
    "files,chosen",
    [
        (["mars_for_students.npz"], "mars_for_students.npz"),
        (["a.npz", "mars_for_students.npz", "sample.npz"], "mars_for_students.npz"),
        (["sample.npz"], "sample.npz"),
        (["sample.npz", "other.npz"], "other.npz"),
        (["only.npz"], "only.npz"),
        (["sub/deep/mars.npz"], "sub/deep/mars.npz"),
        (["a/x.npz", "b/mars_for_students.npz"], "b/mars_for_students.npz"),
    ],
)
def test_which_file_a_folder_stands_for(tmp_path, files, chosen):
    """The competition's name first, then the one other file, the sample last; sub-folders if there is none
    above."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name)
    assert lib.find_data_file(tmp_path) == tmp_path / chosen


def test_files_without_the_keys_do_not_count(tmp_path):
    """Of three files the one with a training_set is taken; a text and a foreign archive are no rivals."""
    save(tmp_path / "good.npz")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    (tmp_path / "broken.npz").write_text("no archive")
    assert lib.find_data_file(tmp_path).name == "good.npz"


def test_a_file_is_taken_as_it_is(tmp_path):
    """A file given by name is that file, whatever its name and its neighbours."""
    save(tmp_path / "mars_for_students.npz")
    assert lib.find_data_file(str(save(tmp_path / "x y.npz"))) == tmp_path / "x y.npz"


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """~/m.npz is found where the shell did not expand it (a notebook)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "m.npz")
    assert lib.find_data_file("~/m.npz") == tmp_path / "m.npz"


# ------------------------------------------------------------------------------ 10, 13: what is loaded


def test_the_arrays_come_out_as_they_went_in(tmp_path):
    """uint8 images, masks, test images and test labels, to the pixel, and no note."""
    data = lib.load_data(save(tmp_path / "m.npz"))
    np.testing.assert_array_equal(data.images, TRAIN[:, 0])
    np.testing.assert_array_equal(data.masks, TRAIN[:, 1])
    np.testing.assert_array_equal(data.test_images, TEST)
    np.testing.assert_array_equal(data.test_labels, T["test_labels"])
    assert data.notes == []


def test_without_test_set_there_is_a_note(tmp_path):
    """Fault 10: a file without test_set loads; the note says that there will be no submission."""
    data = lib.load_data(save(tmp_path / "m.npz", test_set=None, test_labels=None))
    assert len(data.test_images) == 0 and data.test_labels is None
    assert len(data.notes) == 1 and "no test_set" in data.notes[0] and "no submission" in data.notes[0]


WHOLE = [
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
    "longdouble",
    ">i2",
    ">u2",
    ">i4",
    ">i8",
    ">f4",
    ">f8",
]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", WHOLE)
def test_any_type_of_whole_grey_values(tmp_path, dtype, compressed):
    """Fault 13: 0 to 255 in any numeric type and byte order gives the same uint8, and torch takes it."""
    data = lib.load_data(save(tmp_path / "m.npz", compressed, **{k: v.astype(dtype) for k, v in T.items()}))
    for got, want in (
        (data.images, TRAIN[:, 0]),
        (data.masks, TRAIN[:, 1]),
        (data.test_images, TEST),
        (data.test_labels, T["test_labels"]),
    ):
        assert got.dtype == np.uint8 and got.flags.c_contiguous
        np.testing.assert_array_equal(got, want)
        torch.from_numpy(got)
    assert data.notes == []


@pytest.mark.parametrize(
    "layout",
    [
        lambda a: a[::-1, ..., ::-1],
        np.asfortranarray,
        lambda a: a.repeat(2, -1)[..., ::2],
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
)
def test_any_memory_layout(tmp_path, layout):
    """Fault 13: negative strides, Fortran order, steps and broadcasts end as contiguous arrays of the same
    pixels."""
    changed = {k: layout(v) for k, v in T.items()}
    data = lib.load_data(save(tmp_path / "m.npz", **changed))
    np.testing.assert_array_equal(data.images, changed["training_set"][:, 0])
    np.testing.assert_array_equal(data.masks, changed["training_set"][:, 1])
    np.testing.assert_array_equal(data.test_labels, changed["test_labels"])
    assert all(a.flags.c_contiguous for a in (data.images, data.masks, data.test_images, data.test_labels))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_fractions_become_grey_values(tmp_path, dtype):
    """Fault 13: images of 0 to 1 come back as their 0 to 255 (float16 within 1), the labels stay, a note says
    so."""
    scaled = T["training_set"] * np.array([1 / 255, 1])[:, None, None]
    data = lib.load_data(
        save(tmp_path / "m.npz", training_set=scaled.astype(dtype), test_set=(TEST / 255).astype(dtype))
    )
    off = 1 if dtype == "float16" else 0
    assert np.abs(data.images.astype(int) - TRAIN[:, 0]).max() <= off
    assert np.abs(data.test_images.astype(int) - TEST).max() <= off
    np.testing.assert_array_equal(data.masks, TRAIN[:, 1])
    assert any("training_set" in n and "0..255" in n for n in data.notes)


def test_fractional_grey_values_are_rounded(tmp_path):
    """Fault 13: 99.6 of 255 is grey 100."""
    data = lib.load_data(
        save(
            tmp_path / "m.npz",
            training_set=edited("training_set", (0, 0, 0, slice(0, 4)), [99.6, 100.4, 0, 254.9], float),
        )
    )
    assert data.images[0, 0, :4].tolist() == [100, 100, 0, 255]


def test_booleans(tmp_path):
    """Fault 13: black and white images with labels 0 and 1, all bool: grey 0 and 255, labels 0 and 1."""
    train = TRAIN % 2 == 1
    data = lib.load_data(
        save(tmp_path / "m.npz", training_set=train, test_set=TEST % 2 == 1, test_labels=None)
    )
    np.testing.assert_array_equal(data.images, train[:, 0] * np.uint8(255))
    np.testing.assert_array_equal(data.masks, train[:, 1])


def test_wide_values_are_mapped_onto_grey(tmp_path):
    """Fault 13: 16-bit grey keeps its order and fills 0 to 255, and a note says so."""
    train = TRAIN.astype(np.uint16)
    train[:, 0] *= 257
    train[0, 0, 0, 0] = 65535
    data = lib.load_data(save(tmp_path / "m.npz", training_set=train))
    assert data.images[0, 0, 0] == 255
    np.testing.assert_array_equal(data.images.ravel()[1:], TRAIN[:, 0].ravel()[1:])
    assert any("training_set" in n and "65535" in n for n in data.notes)


@pytest.mark.parametrize("change", [lambda a: a.astype(np.uint16) * 200, lambda a: a / 100 - 1.2])
def test_training_and_test_are_mapped_alike(tmp_path, change):
    """Fault 13: 16-bit or standardised grey means the same after loading, though the test set's range is
    smaller."""
    train = np.stack([change(TRAIN[:, 0]), TRAIN[:, 1]], 1)
    dark = np.minimum(TRAIN[:6, 0], 120)
    data = lib.load_data(
        save(tmp_path / "m.npz", training_set=train, test_set=change(dark), test_labels=None)
    )
    same = TRAIN[:6, 0] == dark
    np.testing.assert_array_equal(data.test_images[same], data.images[:6][same])


# ------------------------------------------------------------------------------ 15, 17, 18, 19: notes


def test_one_black_image_is_a_note(tmp_path):
    """Fault 15: one constant image among good ones is named, and kept."""
    data = lib.load_data(save(tmp_path / "m.npz", training_set=edited("training_set", (5, 0), 0)))
    assert len(data.images) == 24
    assert len(data.notes) == 1 and "1 training images" in data.notes[0] and "first 5" in data.notes[0]


def test_absent_class_is_a_note(tmp_path):
    """Fault 17: a class on no pixel is named by number and name."""
    train = TRAIN.copy()
    train[:, 1][train[:, 1] == 4] = 1
    data = lib.load_data(save(tmp_path / "m.npz", training_set=train))
    assert len(data.notes) == 1 and "class 4" in data.notes[0] and "Big Rock" in data.notes[0]


def test_copies_across_train_and_test_are_a_note(tmp_path):
    """Fault 18: two test images that are training images are counted."""
    data = lib.load_data(save(tmp_path / "m.npz", test_set=edited("test_set", slice(1, 3), TRAIN[:2, 0])))
    assert len(data.notes) == 1 and data.notes[0].startswith("2 test images")


@pytest.mark.parametrize("h,w", [(65, 127), (1, 1), (16, 300)])
def test_any_size(tmp_path, h, w):
    """Fault 19: height and width are the file's."""
    rng = np.random.default_rng(0)
    train = np.stack([rng.integers(0, 256, (3, h, w)), rng.integers(1, 5, (3, h, w))], 1).astype(np.uint8)
    if h * w == 1:  # one pixel is one grey: that is fault 15
        with pytest.raises(lib.UserError, match="constant"):
            lib.load_data(
                save(tmp_path / "m.npz", training_set=train, test_set=train[:, 0], test_labels=None)
            )
        return
    data = lib.load_data(save(tmp_path / "m.npz", training_set=train, test_set=train[:, 0], test_labels=None))
    assert data.images.shape == data.test_images.shape == (3, h, w)


# ------------------------------------------------------------------------------ the fingerprint


def test_fingerprint_by_hand(tmp_path):
    """Counts, range, shares and images holding each class, counted on two images of 2×4."""
    train = np.array(
        [
            [[[10, 20, 30, 40], [50, 60, 70, 80]], [[1, 1, 1, 1], [0, 0, 2, 2]]],
            [[[11, 21, 31, 41], [51, 61, 71, 99]], [[2, 2, 2, 2], [2, 2, 2, 4]]],
        ],
        np.uint8,
    )
    path = tmp_path / "m.npz"
    np.savez(path, training_set=train)
    facts = lib.fingerprint(lib.load_data(path))
    assert (
        facts["train_images"] == 2
        and facts["test_images"] == 0
        and (facts["image_height"], facts["image_width"]) == (2, 4)
    )
    assert facts["range"] == [10, 99]
    assert facts["pixel_share"] == [0.125, 0.25, 0.5625, 0, 0.0625]
    assert facts["images_holding"] == [1, 1, 2, 0, 1]
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    json.dumps(facts)
