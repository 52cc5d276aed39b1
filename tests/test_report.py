"""The report: what it shows, what it does about odd input, and how it looks in a browser."""
import errno
import html
import os
import re
import shutil
import subprocess
import types

import cv2
import numpy as np
import pandas as pd
import pytest

import lib

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def page_of(out, n=20, m=4, **changes):
    """Return the page of n training and m test tiles: tile 3 is wrong everywhere and sure of it."""
    rng = np.random.default_rng(0)
    masks = rng.integers(1, 4, (n, 1, 1)).repeat(32, 1).repeat(64, 2).astype(np.uint8)
    masks[:, :8] = 0
    masks[5, 20:26, 30:36] = 4
    images = rng.integers(0, 256, (n + m, 32, 64)).astype(np.uint8)
    labels = {"stage1": masks.clip(1), "stage2": masks.clip(1)}
    labels["stage2"][3] = 1 + labels["stage2"][3] % 3
    metrics = {"submitted": "stage2", "minutes": 1.5, "folds": 2}
    for step, answer in labels.items():
        scores = lib.score_folds(masks, answer, np.arange(n) % 2, 2)
        metrics |= {f"{step}_{name}": value for name, value in scores.items()}
    record = {"val_loss": 0.5, "confusion": [], "lr": 0.002, "seconds": 3.0, "loss": 0.7}
    histories = {(stage, net): [record | {"score": 0.1 * epoch} for epoch in range(3 + net)]
                 for stage in (1, 2) for net in range(4)}
    place = np.repeat([[-1], [0], [0]], n + m, 1)
    place[:, :4] = (0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1)
    data = types.SimpleNamespace(images=images[:n], masks=masks, test_images=images[n:])
    lib.write_report(out, **dict(
        metrics=metrics, histories=histories, facts={"data": "<script>alert(1)</script>"},
        data=data, validated=np.ones(n, bool), labels=labels, place=place, test_labels=masks[:m],
        confidence=np.full(masks.shape, 0.9), rare=np.arange(5) == 4) | changes)
    return (out / "report.html").read_text()


def test_what_the_page_shows(tmp_path):
    """The score, each class, frames, the most contradicted tile (3) and the one with rock (5) first
    in their lists, training, confusion, and the facts, in which a tag is text."""
    page = page_of(tmp_path)
    assert re.search("(?s)Mean IoU 0.*Bedrock.*frames<.*contradict most</h2>.*?<th>image 3:.*rare "
                     "classes</h2>.*?<th>image 5:.*training, stage 1.*Confusion.*&lt;script", page)
    assert "<script" not in page and "http" not in page  # it needs no network


@pytest.mark.fault(12, 17)
def test_what_is_missing_costs_itself_alone(tmp_path):
    """No frame, no test image, scores and losses without a number, only two tiles validated: the
    rest is shown."""
    record = {"loss": 1.0, "val_loss": np.inf, "score": np.nan, "confusion": []}
    page = page_of(tmp_path, m=0, place=None, histories={(1, 0): [record] * 2},
                   validated=np.arange(20) < 2)
    assert "Camera frames" not in page and "training, stage 1: loss" in page
    assert {*re.findall(r"<th>image (\d+)", page)} == {"0", "1"}
    assert "nan" not in "".join(re.findall("<path[^>]*>", page))


def test_figure_and_history(tmp_path):
    """figure.png is 1792 wide: a title, a frame (289 high) and three times two rows (140) under
    their titles (34), in the classes' colours. history.csv has a row an epoch: 2 · (3+4+5+6)."""
    page_of(tmp_path)
    figure = cv2.imread(str(tmp_path / "figure.png"))
    assert figure.shape == (34 + (34 + 289) + 6 * (34 + 140), 1792, 3)
    for color in lib.PALETTE:
        assert (figure == color[::-1]).all(2).any()
    history = pd.read_csv(tmp_path / "history.csv")
    assert len(history) == 36 and (history["fold"] == history["network"] % 2).all()
    assert history["epoch"].tolist()[:3] == [1, 2, 3] and "confusion" not in history


def test_a_curve_starts_at_the_left_and_ends_at_its_value():
    """A line from 0 to 1 goes from the lower left to the upper right; its end is written."""
    drawing = lib.curves("score", pd.DataFrame({"fold 0": [0.0, 0.5, 1.0]}))
    assert 'd="M50.0,200.0 185.0,112.5 320.0,25.0"' in drawing and "fold 0 1.000" in drawing


@pytest.mark.fault(38)
def test_a_full_disk_costs_the_report_alone(tmp_path, monkeypatch, capsys):
    """It is a warning for each file, and an earlier run's files don't stay."""
    def full(_):
        raise OSError(errno.ENOSPC, "No space left")

    page_of(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileNotFoundError):
        page_of(tmp_path)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out.count("No space left") == 3


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [380, 1400])
def test_nothing_is_wider_than_the_page(tmp_path, width):
    """In a frame of that width the page does not scroll sideways: its boxes do."""
    probe = ("<script>onload=()=>{let d=frames[0].document.documentElement;"
             "document.title=d.clientWidth-d.scrollWidth}</script>")
    frame = f'<iframe width="{width}" srcdoc="{html.escape(page_of(tmp_path))}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}{probe}')
    argv = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'p'}"]
    argv += ["--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    assert re.search("<title>(.*?)</title>", done.stdout)[1] == "0"
