"""What whole runs do when something goes wrong: signals, kills, memory, disk, damaged and foreign
files, time. And a count: every row of the list of faults has its test in some file."""
from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import kit
import numpy as np
import pytest

import lib
import solve

PLAIN = ("--no-clean", "--no-frames")
FULL = OSError(errno.ENOSPC, "No space left on device")
MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
STOPPED = "stopped; the same command, without --fresh, goes on from the last checkpoint"


def test_every_row_has_a_test():
    """Each of the 62 rows of the list of faults is marked at some test: @pytest.mark.fault(row)."""
    marked = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for rows in re.findall(r"mark\.fault\(([\d,\s]+)\)", file.read_text()):
            marked |= set(map(int, rows.replace(",", " ").split()))
    assert set(range(1, 63)) - marked == set()


@pytest.fixture
def data(tmp_path):
    """The file of a tiny data set."""
    np.savez(tmp_path / "mars.npz", **kit.tiny_arrays())
    return tmp_path / "mars.npz"


def ends_well(data, out, *flags, says=""):
    """Run main; assert that it ends well with a checked submission, and says so; return what it
    printed."""
    status, printed, err = kit.run_main(data, out, *flags)
    assert status == 0, err
    assert "submission.csv, 6 rows, checked" in printed
    assert re.search(says, printed), printed
    return printed


def refused(data, out, *flags, says=(), status=2):
    """Run main; assert that it ends with this status and one sentence that says all of says."""
    got, printed, err = kit.run_main(data, out, *flags)
    assert (got, err.count("\n")) == (status, 1), err
    assert err.startswith("solve.py: ") and "Traceback" not in printed + err
    for part in says:
        assert part in err


def submission(out):
    """Return the bytes of a run's submission."""
    return (out / "submission.csv").read_bytes()


# ---------------------------------------------------------------------------------- numbers, memory


@pytest.mark.fault(30)
def test_no_finite_step_in_stage_1(data, tmp_path, monkeypatch):
    """An epoch without one names network, epoch and cure; what was saved before is still good."""
    monkeypatch.setattr(lib, "SAVE_SECONDS", -1)
    real = solve.training_batch

    def spoilt(run, stage_input, fold, *rest):
        x, y = real(run, stage_input, fold, *rest)
        network = run.state / "stage1_fold1.pt"  # saved after its first epoch
        return x * (np.nan if fold == 1 and network.exists() else 1), y

    monkeypatch.setattr(solve, "training_batch", spoilt)
    refused(data, tmp_path / "out", *PLAIN, says=["stage1_fold1, epoch 2", "finite", "--lr"])
    saved = lib.load_checkpoint(tmp_path / "out" / "state" / "stage1_fold1.pt")
    assert len(saved["history"]) == 1 and not saved["finished"]


@pytest.mark.fault(32)
def test_half_precision(data, tmp_path):
    """float16, whose scaler may leave out the first steps, trains to a submission."""
    ends_well(data, tmp_path / "out", *PLAIN, "--precision", "float16", says="float16")


@pytest.mark.fault(33)
@pytest.mark.parametrize("call, where", [(1, "measuring the speed"), (20, "stage1_fold")])
def test_out_of_memory_in_training(data, tmp_path, monkeypatch, call, where):
    """It is a sentence that says where it was and what to make smaller."""
    monkeypatch.setattr(lib, "affine", kit.failing(lib.affine, MEMORY, call))
    cure = ["out of memory", "--batch-size", "--width"]
    refused(data, tmp_path / "out", *PLAIN, says=[where, *cure])


@pytest.mark.fault(33)
def test_out_of_memory_in_prediction(finished_copy, monkeypatch):
    """Half as many frames at once, again; the run says so, and ends in the same bytes."""
    out = finished_copy / "out"
    before = submission(out)
    monkeypatch.setattr(lib, "predict_probs", kit.failing(lib.predict_probs, MEMORY, 1, 3))
    ends_well(finished_copy / "mars.npz", out, says="out of memory: going on with 32 frames")
    assert submission(out) == before


# ------------------------------------------------------------------------------------------ signals


SLOW = pytest.mark.slow
PHASES = {"cleaning": (lib, "find_outliers"), "frames": (lib, "assemble_frames"),
          "plan": (lib, "measure_speed"), "training": (solve, "train_one_epoch"),
          "validation": (lib, "evaluate"), "prediction": (lib, "predict_probs"),
          "answers": (solve, "conclude"), "stage 2": (solve, "keep_first"),
          "submission": (lib, "write_submission"), "report": (lib, "write_report")}


@pytest.mark.fault(36)
@pytest.mark.parametrize("phase", [
    phase if phase in ("training", "stage 2", "report") else pytest.param(phase, marks=SLOW)
    for phase in PHASES])
def test_a_signal_in_each_phase(data, tmp_path, monkeypatch, phase):
    """SIGTERM ends with 143 and Ctrl-C with 130 and one sentence, in a worker's work too; no thread
    is left, the process has its own handler again, and the same command goes on."""
    sig, status = [(signal.SIGTERM, 143), (signal.SIGINT, 130)][len(phase) % 2]
    module, name = PHASES[phase]
    real, sent = getattr(module, name), []

    def interrupted(*args, **kwargs):
        if not sent:
            sent.append(sig)
            os.kill(os.getpid(), sig)
        return real(*args, **kwargs)

    handler, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        refused(data, tmp_path / "out", status=status, says=[STOPPED])
    assert sent and signal.getsignal(signal.SIGTERM) is handler
    limit = time.monotonic() + 5  # a thread that was just starting takes a moment
    while threading.active_count() > threads and time.monotonic() < limit:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert not [*(tmp_path / "out").rglob("*.tmp")]
    assert (tmp_path / "out" / "submission.csv").exists() == (phase == "report")
    if phase in ("training", "report"):
        ends_well(data, tmp_path / "out", says="going on with the run")


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.parametrize("sig, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("line", ["device:", "stage 1", "stage 2"])
def test_a_signal_to_a_process(data, tmp_path, sig, status, line):
    """A process of its own ends within seconds with that status and one sentence."""
    child = kit.start(data, tmp_path / "out", *PLAIN, "--epochs", "60")
    assert any(printed.startswith(line) for printed in child.stdout)
    child.send_signal(sig)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (status, f"solve.py: {STOPPED}\n")


@pytest.mark.slow
@pytest.mark.fault(37)
def test_killed_at_any_moment(tmp_path):
    """SIGKILL up to .4 s after lines of every part from loading to the CSV: the same command goes
    on and ends in the bytes of a run that nobody disturbed. Tiles of 64 × 64: stage 1 begins with
    half-sized ones."""
    moments = ("", "device:", "plan:", "stage 1", "stage1 out", "stage 2", "submission:")
    np.savez(tmp_path / "mars.npz", **kit.tiny_arrays(12, 4, 64, 64))
    rng, command = random.Random(0), (tmp_path / "mars.npz", tmp_path / "out")
    assert kit.run_main(tmp_path / "mars.npz", tmp_path / "whole")[0] == 0
    for moment in moments:
        for _ in range(2):
            child = kit.start(*command)
            any(line.startswith(moment) for line in child.stdout)
            time.sleep(rng.uniform(0, 0.4))
            child.kill()
            child.communicate()
        child = kit.start(*command)
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert submission(tmp_path / "out") == submission(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


# ----------------------------------------------------------------------------------- disk and files


@pytest.mark.fault(38)
@pytest.mark.parametrize("what", ["stage", "submission.csv", "report.html"])
def test_full_disk(data, tmp_path, monkeypatch, what):
    """Without room for a checkpoint or the report the run ends well and says so; without room for
    the CSV it is a sentence, and the next start needs no training."""
    real, out = os.replace, tmp_path / "out"

    def replace(old, new):
        if Path(new).name.startswith(what):
            raise FULL
        return real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if what == "submission.csv":
            refused(data, out, *PLAIN, says=["No space left", str(out / what)])
        else:
            ends_well(data, out, *PLAIN, says="No space left")
    assert not [*out.rglob("*.tmp")]
    if what == "submission.csv":
        monkeypatch.setattr(solve, "train_one_epoch", kit.failing(None, AssertionError("trained")))
        ends_well(data, out, *PLAIN)


@pytest.mark.fault(39)
@pytest.mark.parametrize("out", ["mars.npz/out", "x" * 300])
def test_out_that_cannot_be(data, tmp_path, out):
    """--out in a file's place, or of a name that cannot be, is a sentence; the file stays."""
    before = data.read_bytes()
    refused(data, f"{tmp_path}/{out}", *PLAIN)
    assert data.read_bytes() == before


@pytest.mark.fault(40)
def test_two_runs_in_one_folder(finished_copy):
    """The second one is refused; once the first is killed, the folder is free again."""
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('locked', flush=True); time.sleep(60)")
    data, out = finished_copy / "mars.npz", finished_copy / "out"
    first = subprocess.Popen([sys.executable, "-c", code, out / "state" / "lock"],
                             stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"locked\n"
        refused(data, out, says=["another run works in", "--out"])
        refused(data, out, "--fresh", says=["another run works in"])
    finally:
        first.kill()
        first.communicate()
    ends_well(data, out)


@pytest.mark.fault(41)
@pytest.mark.parametrize("damage", [lambda raw: raw[:500] + bytes([raw[500] ^ 4]) + raw[501:],
                                    lambda raw: raw[:-1000], lambda raw: b""])
def test_damaged_checkpoint(finished_copy, damage):
    """One flipped bit, a lost end or nothing: the run says so, trains that network again, and ends
    in the same bytes."""
    out = finished_copy / "out"
    file, before = out / "state" / "stage1_fold0.pt", submission(out)
    file.write_bytes(damage(file.read_bytes()))
    ends_well(finished_copy / "mars.npz", out, says="stage1_fold0.pt: damaged")
    assert submission(out) == before and lib.load_checkpoint(file)["finished"]


@pytest.mark.fault(42)
def test_another_run_in_the_folder(data, tmp_path):
    """--out that holds a run of another seed, network or file is refused by the field's name, and
    not changed; with --fresh the new run takes its place, and leaves others' files alone."""
    kit.open_run(tmp_path)
    np.savez(tmp_path / "other.npz", **kit.tiny_arrays(seed=1))
    out, other = tmp_path / "out", tmp_path / "other.npz"
    (out / "state" / "stage1_fold0.pt").write_text("learnt")
    (out / "state" / "notes.txt").write_text("mine")
    for file, flags, field in ((data, ("--seed", "5"), "seed"), (data, ("--width", "8"), "width"),
                               (other, (), "data_sha256")):
        refused(file, out, *PLAIN, *flags, says=[f"with {field} = ", "--fresh", "--out"])
    assert (out / "state" / "stage1_fold0.pt").read_text() == "learnt"
    ends_well(other, out, *PLAIN, "--fresh", says="a new run")
    assert lib.load_checkpoint(out / "state" / "stage1_fold0.pt")["finished"]
    assert (out / "state" / "notes.txt").read_text() == "mine"


@pytest.mark.fault(46)
def test_a_finished_run_trains_nothing(finished_copy):
    """The same command once more leaves every checkpoint as it was, and writes the same bytes."""
    out = finished_copy / "out"
    networks = [*(out / "state").glob("stage*")]
    before, times = submission(out), [file.stat().st_mtime_ns for file in networks]
    ends_well(finished_copy / "mars.npz", out)
    assert [file.stat().st_mtime_ns for file in networks] == times and len(times) == 4
    assert submission(out) == before


@pytest.mark.fault(61)
def test_changed_code_is_said(finished_copy):
    """Networks of other code are used, and a line says so and names --fresh."""
    data, out = finished_copy / "mars.npz", finished_copy / "out"
    (out / "state" / "code.pt").unlink()  # that of now is noted
    assert "the code has changed" not in ends_well(data, out)
    lib.save_checkpoint(out / "state" / "code.pt", {"sha256": "another"})
    ends_well(data, out, says="the code has changed since.*--fresh")


@pytest.mark.slow
@pytest.mark.fault(53)
def test_paths_and_locale(finished_copy):
    """Spaces and umlauts in paths, where the locale knows only ASCII, are no trouble."""
    folder = finished_copy.rename(finished_copy.parent / "Mars Gelände")
    command = [sys.executable, kit.ROOT / "solve.py", "--data", folder / "mars.npz",
               "--out", folder / "out", *kit.TINY]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (folder / "out" / "submission.csv").unlink()
    done = subprocess.run(command, capture_output=True, env={**os.environ, **plain})
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "submission.csv").exists()


@pytest.mark.fault(53)
@pytest.mark.parametrize("flag", ["--data", "--out"])
def test_the_home_of_nobody(data, tmp_path, flag):
    """A path in the home of a user there is not is a sentence."""
    refused(data, tmp_path / "out", *PLAIN, flag, "~nosuchuser/x")


@pytest.mark.fault(56)
def test_opencv_without_libgl(tmp_path):
    """It is a sentence that names what to install."""
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file')")
    done = subprocess.run([sys.executable, kit.ROOT / "solve.py", "--help"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "opencv-python-headless" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------- time


@pytest.mark.fault(47)
@pytest.mark.parametrize("hours", ["0", "0.0015"])
def test_no_time(data, tmp_path, hours):
    """A budget of nothing, or one that is over in the middle, ends with a submission."""
    ends_well(data, tmp_path / "out", *PLAIN, "--max-hours", hours, "--epochs", "300")


@pytest.mark.fault(47)
def test_time_over_at_resume(data, tmp_path, monkeypatch):
    """A run stopped in stage 1 that goes on with no time left submits what it has at once."""
    monkeypatch.setattr(lib, "SAVE_SECONDS", -1)
    real = solve.next_epoch

    def stopped(run, stage, net, network, inputs):
        if len(network.history) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run, stage, net, network, inputs)

    flags = (*PLAIN, "--epochs", "300")
    with monkeypatch.context() as patch:
        patch.setattr(solve, "next_epoch", stopped)
        refused(data, tmp_path / "out", *flags, status=143)
    printed = ends_well(data, tmp_path / "out", *flags, "--max-hours", "0", says="the time is up")
    epochs = map(int, re.findall(r"stage 1  epoch (\d+)/300", printed))
    assert 3 <= max(epochs) <= 6


@pytest.mark.fault(47)
def test_damaged_clock(finished_copy):
    """Half a file is a sentence that names it."""
    clock = finished_copy / "out" / "state" / "clock.pt"
    clock.write_bytes(clock.read_bytes()[:-9])
    refused(finished_copy / "mars.npz", finished_copy / "out",
            says=["clock.pt: damaged", "--fresh"])


@pytest.mark.slow
@pytest.mark.fault(47)
def test_in_time(tmp_path):
    """A run whose networks could train for minutes has written its submission, from start to end of
    the process, within the 40 s that it was given, and has used a good part of them."""
    np.savez(tmp_path / "mars.npz", **kit.tiny_arrays(64, 12, 64, 64))
    begin = time.monotonic()
    done = subprocess.run([sys.executable, kit.ROOT / "solve.py", "--data", tmp_path / "mars.npz",
                           "--out", tmp_path / "out", "--max-hours", str(40 / 3600)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "submission.csv, 12 rows, checked" in done.stdout
    assert 12 < time.monotonic() - begin < 40


@pytest.mark.slow
@pytest.mark.fault(62)
def test_beside_busy_processes(tmp_path):
    """Beside two busy processes cleaning and frames of 60 tiles take a few times as long, not forty
    times: no thread of an operation waits for another."""
    images = np.random.default_rng(0).integers(1, 255, (60, 64, 128)).astype(np.uint8)
    np.savez(tmp_path / "mars.npz", training_set=np.stack([images, images % 4 + 1], 1))
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def seconds(name):
        child = kit.start(tmp_path / "mars.npz", tmp_path / name, env=env)
        said = child.communicate(timeout=300)[0]
        return sum(map(float, re.findall(r"^(?:cleaning|frames): .* (\d+) s$", said, re.M)))

    alone, others = seconds("alone"), []
    try:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        assert seconds("beside") < 3 + 6 * alone
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.slow
@pytest.mark.fault(38, 50)
@pytest.mark.parametrize("reader", ["gone", "full"])
def test_nobody_reads_what_is_printed(data, tmp_path, reader):
    """A closed pipe, or a log on a full disk, costs the lines alone: there is a submission."""
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    child = kit.start(data, tmp_path / "out", *PLAIN)
    if reader == "full":
        child.kill()
        child.communicate()
        with open("/dev/full", "w") as full:
            child = subprocess.Popen(child.args, stdout=full, stderr=subprocess.PIPE, text=True)
    else:
        assert child.stdout.readline()
        child.stdout.close()
    assert child.stderr.read() == "" and child.wait(60) == 0
    assert submission(tmp_path / "out")


@pytest.mark.parametrize("flags", [("--device", "cuda:77"), ("--test", "mars.npz")])
def test_a_mistake_beside_fresh_deletes_nothing(finished_copy, flags):
    """--fresh with a device that is not there, or with --test, leaves the finished run as it is."""
    state = finished_copy / "out" / "state"
    before = sorted(path.name for path in state.glob("*.pt"))
    refused(finished_copy / "mars.npz", finished_copy / "out", "--fresh", *flags, says=[flags[0]])
    assert before == sorted(path.name for path in state.glob("*.pt")) and before
