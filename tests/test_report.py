"""The report: colours that all can tell apart, and how it looks in a browser, on a phone and in the dark."""
import html
import itertools
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from conftest import tiny_arrays
from test_solve import FAST, start

import lib

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# linear RGB as the three kinds of dichromats see it: Machado et al. 2009, severity 1
SEEN_BY = {
    "all cones": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                     [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                       [-0.011820, 0.042940, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                      [0.004733, 0.691367, 0.303900]],
}


def linear(rgb):
    """Return linear values 0..1 of sRGB 0..255."""
    rgb = np.asarray(rgb, float) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Return the contrast ratio of two sRGB colours by WCAG 2.1: 1 to 21."""
    a, b = sorted(linear(color) @ [0.2126, 0.7152, 0.0722] for color in (one, other))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("eye", SEEN_BY)
def test_classes_can_be_told_apart(eye):
    """Whatever cones an eye lacks, no two classes' colours are nearer than 25 in CIELAB (2 is just seen)."""
    seen = np.clip(linear(lib.PALETTE) @ np.transpose(SEEN_BY[eye]), 0, 1).astype(np.float32)
    lab = cv2.cvtColor(seen[None], cv2.COLOR_LRGB2Lab)[0]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 25


@pytest.mark.parametrize("paper", [(255, 255, 255), (18, 18, 18)])
def test_lines_stand_out_from_the_paper(paper):
    """Each curve's contrast is at least 3 : 1 with white paper and with a dark theme's (WCAG 1.4.11)."""
    for hue in lib.HUES:
        assert contrast([int(hue[i : i + 2], 16) for i in (1, 3, 5)], paper) >= 3


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.html of a whole run on tiny data."""
    folder = tmp_path_factory.mktemp("report")
    np.savez(folder / "mars.npz", **tiny_arrays())
    status, _, err = start(["--data", folder / "mars.npz", "--out", folder / "the out", *FAST, "--seed", "3"])
    assert status == 0, err
    return folder / "the out" / "report.html"


def test_what_it_shows(report):
    """Scores with spread and calibration, curves, confusion, shares, pictures with what is wrong, command."""
    page = report.read_text()
    for part in ("± over folds", "calibration error", "validation mean IoU", "Confusion", "training labels",
                 "from the least sure", "wrong (white)", "confidence", "truth", "Intruders", "sha256"):
        assert part in page, part
    command = html.unescape(re.search(r"python solve\.py [^<]*", page)[0])
    assert "--seed 3" in command and f"--out '{report.parent}'" in command and "--no-clean" in command
    assert len(page) < 5_000_000


def test_text_has_the_themes_own_colours(report):
    """Both themes are asked for, and no text colour is set: the browser's pairs are black and white."""
    style = re.search("<style>(.*?)</style>", report.read_text(), re.S)[1]
    assert "color-scheme:light dark" in style
    assert not re.search(r"(?<![-\w])color:", style)


def browse(page, folder, width, dark=False):
    """Open page in a frame so many pixels wide; return the page's width, its content's width, its number of
    requests, console messages and the screenshot."""
    probe = ("<script>addEventListener('load',()=>{let f=frames[0],d=f.document.documentElement,"
             "asked=f.performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:'));"
             "document.title=[d.clientWidth,d.scrollWidth,asked.length].join()})</script>")
    frame = f'<iframe style="border:0" width="{width}" height="4000" srcdoc="{html.escape(page)}"></iframe>'
    file = folder / "frame.html"
    file.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}{probe}')
    argv = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000",
            f"--window-size={max(width, 600)},4000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run([*argv, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = map(int, re.search("<title>(.*?)</title>", done.stdout)[1].split(","))
    shot = folder / f"report_{width}{'_dark' if dark else ''}.png"
    argv = [*argv, f"--screenshot={shot}", file.as_uri()]
    subprocess.run(argv, capture_output=True, timeout=120, check=True)
    return *figures, re.findall(r".*CONSOLE.*", done.stderr), cv2.imread(str(shot))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width,dark", [(380, False), (1400, False), (1400, True)])
def test_in_a_browser(report, tmp_path, width, dark):
    """On a phone and on a desk, by day and by night: nothing is wider than the page, no message in the
    console, no request; the paper is white or dark, and something is on it. Screenshots stay in tmp_path."""
    visible, wanted, requests, messages, shot = browse(report.read_text(), tmp_path, width, dark)
    assert wanted <= visible <= width
    assert messages == [] and requests == 0
    paper = shot[5, 5].mean()
    assert (paper < 60) if dark else (paper > 240)
    assert shot[:, :width].std() > 20


def test_a_curve_leaves_out_what_is_no_number():
    """An epoch whose validation had nothing labelled has no point; the others stay in their places."""
    drawing = lib.curves("score", {"network 0": [0.0, np.nan, 1.0]})
    assert 'points="0,1.0000 2,0.0000"' in drawing and 'viewBox="0 0 2 1"' in drawing


def test_a_list_of_intruders_that_was_edited_costs_their_pictures_alone(tmp_path):
    """A spreadsheet that saves outliers.csv with other columns: the run ends with its scores and a report."""
    np.savez(tmp_path / "mars.npz", **tiny_arrays())
    argv = ["--data", tmp_path / "mars.npz", "--out", tmp_path / "out", *FAST]
    argv.remove("--no-clean")
    assert start(argv)[0] == 0
    lib.write_json(tmp_path / "out" / "state" / "cleaned.json", {"index": [3]})
    (tmp_path / "out" / "outliers.csv").write_text("index;reasons\n3;masks\n")
    status, out, err = start(argv)
    assert status == 0 and "test_miou: " in out and not err
    assert "Intruders: 1 training images" in (tmp_path / "out" / "report.html").read_text()
