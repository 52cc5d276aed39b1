"""What is planned for a machine and its hours, and the pace at which a stage is trained."""
from __future__ import annotations

import dataclasses
import time

import kit
import numpy as np
import pytest

import lib
import solve


def make_plan(cores=2, gpus=0, speed=435.0, hours=1.0, flags=(), used=0.0, **changes):
    """Return the plan for the competition's file, as the cleaning leaves it, or with changes, on a
    machine that trains so many images of width 16 a second."""
    facts = dict(images=2505, shown=1.08, height=64, width=128, area=10068.0, frames=True)
    task = solve.Task(**{**facts, "cores": cores, "gpus": gpus, **changes})
    cfg = solve.parse([*flags])
    measured = solve.Plan("bfloat16", workers=task.gpus * cfg.streams or task.cores, speed=speed)
    return solve.make_plan(cfg, task, measured, used, 3600 * hours)


@pytest.mark.parametrize("machine, hours, size, epochs, workers, threads", [
    # cores, GPUs, images/s: folds, seeds, width, padding
    ((1, 0, 220), 0.05, (2, 1, 8, 0), (1, 1), 1, 1),
    ((1, 0, 220), 0.25, (3, 1, 16, 0), (28, 3), 1, 1),
    ((1, 0, 220), 11, (5, 2, 32, 32), (86, 9), 1, 1),
    ((2, 0, 435), 0.05, (2, 1, 12, 0), (25, 2), 2, 1),
    ((2, 0, 435), 1, (5, 1, 16, 32), (96, 10), 2, 1),
    ((2, 0, 435), 11, (5, 4, 32, 32), (85, 8), 2, 1),
    ((16, 0, 3000), 0.05, (4, 1, 16, 0), (27, 3), 4, 4),
    ((16, 0, 3000), 1, (5, 4, 24, 32), (87, 9), 16, 1),
    ((4, 1, 2500), 0.25, (5, 1, 16, 32), (96, 10), 5, 1),   # a T4
    ((4, 1, 2500), 1, (5, 2, 32, 32), (88, 9), 5, 1),
    ((4, 2, 5000), 1, (5, 4, 32, 32), (88, 9), 10, 1),      # two of them
    ((16, 1, 15000), 0.05, (5, 2, 16, 32), (76, 8), 5, 1),  # an H200
    ((16, 1, 15000), 1, (5, 8, 32, 32), (96, 10), 5, 1)])
def test_what_the_plan_chooses(machine, hours, size, epochs, workers, threads):
    """The table of what a machine and its hours get of the competition's data."""
    plan = make_plan(*machine, hours)
    assert (plan.folds, plan.seeds, plan.width, plan.padding) == size
    assert (plan.epochs, plan.workers, plan.threads) == (epochs, workers, threads)


def test_a_plan_is_counted_by_hand():
    """1,000 images at 100/s, 4 networks on 1 core, 10,000 s of which 3 % are spare. An epoch trains
    on 750 images: 7.5 s, and 7.5 · 11 / 21 s on average where half-sized ones take 2/7 for two
    thirds; stage 2's costs 11.25 s, and a tenth as many are planned. Prediction:
    4 folds × 3 views (stage 1's with its mirror image) of 1,000 tiles at .3 of a training step's
    price, and 5 ms for each fold's tile: 36 + 20 s, and 40 % more; two thirds are stage 1's. 19
    of 20 epochs that there is time for are planned."""
    flags = ["--folds", "4", "--seeds", "1", "--width", "16"]
    same = dict(cores=1, speed=100.0, hours=1e4 / 3600, images=1000, shown=1.0, height=64, width=64,
                area=1000.0, frames=False)
    plan = solve.make_plan(
        dataclasses.replace(solve.parse(flags), most_epochs=9999),
        solve.Task(1000, 1.0, 64, 64, 1000.0, False, 1),
        solve.Plan("float32", speed=100.0), 0.0, 1e4)
    predict = 1.4 * (36 + 20)
    training = 9700 - predict
    first, both = 7.5 * 11 / 21, 7.5 * 11 / 21 + 1.125
    epochs = int(0.95 * training / (4 * both))
    assert plan.epochs == (epochs, round(epochs / 10))
    (begin, end), (second_begin, second_end) = plan.times
    assert begin == 0 and end == pytest.approx(training * first / both / 1e4)
    assert second_begin - end == pytest.approx(predict * 2 / 3 / 1e4)
    assert second_end == pytest.approx((9700 - predict / 3) / 1e4)
    capped = make_plan(flags=flags, **same)  # of the recipe's epochs there are fewer than fit
    assert capped.epochs == (96, 10) and capped.times[1][1] == pytest.approx(second_end, abs=0.01)


MACHINES = [(1, 0, 220.0), (2, 0, 120.0), (16, 0, 3000.0), (4, 2, 5000.0), (16, 1, 15000.0)]
HOURS = (0.01, 0.05, 0.25, 1, 4, 11)


@pytest.mark.parametrize("recipe", ["best", "paper"])
@pytest.mark.parametrize("machine", MACHINES)
def test_all_stages_end_before_the_time_is_over(machine, recipe):
    """Whenever more than the least is planned, stages follow one another from what is used up
    already to an end that leaves time for the prediction; no more workers and threads than there is
    work and are cores."""
    cores, gpus, _ = machine
    for hours in HOURS:
        plan = make_plan(*machine, hours, ["--recipe", recipe], used=5.0)
        ends = [5 / (3600 * hours), *np.ravel(plan.times)[1:], 0.985]
        assert plan.times[0][0] == pytest.approx(ends[0])
        assert ends == sorted(ends) or plan.epochs[0] == 1
        assert 1 <= plan.epochs[0] <= solve.parse(["--recipe", recipe]).most_epochs
        assert 1 <= plan.workers <= min(plan.folds * plan.seeds, 5 * gpus or cores)
        assert plan.threads == 1 if gpus else plan.workers * plan.threads <= cores


@pytest.mark.parametrize("machine", MACHINES)
def test_more_time_is_more_work(machine):
    """With more hours the size never falls back in the list of sizes, nor in seeds of one size."""
    sizes = []
    for hours in HOURS:
        plan = make_plan(*machine, hours)
        listed = [size[:3] for size in solve.SIZES]
        sizes.append((-listed.index((plan.folds, plan.width, plan.padding)), plan.seeds))
    assert sizes == sorted(sizes)


def test_flags_win():
    """What is asked for is planned, whatever it costs; what is not follows from the time."""
    flags = ["--folds", "7", "--seeds", "2", "--width", "20", "--epochs", "5"]
    for hours in (0.01, 100):
        plan = make_plan(hours=hours, flags=flags)
        assert (plan.folds, plan.seeds, plan.width, plan.epochs) == (7, 2, 20, (5, 5))
    assert make_plan(hours=0.01, flags=["--epochs", "5"]).folds == 2
    assert make_plan(images=3).folds == 3  # never more than images


def test_windows_reach_beyond_a_tile_only_where_there_is_something():
    """Without frames windows are the tiles in any time, beyond small tiles they reach half a side,
    and without time for the epochs asked for they are the tiles as well."""
    assert make_plan(hours=11).padding == 32
    assert make_plan(hours=11, frames=False).padding == 0
    assert make_plan(hours=11, height=24).padding == 12
    many = ["--epochs", "400"]
    assert [make_plan(hours=hours, flags=many).padding for hours in (4, 11)] == [0, 32]


def test_ranks_share_the_networks():
    """Two ranks train half the networks each, in half the time; of 5 networks 3 are one rank's, who
    gives each 5 of its 16 cores."""
    flags = ["--folds", "4", "--seeds", "1", "--width", "16"]
    one, two = (make_plan(1, 0, 200.0, 0.3, flags, area=0.0, frames=False, ranks=ranks)
                for ranks in (1, 2))
    assert 2 * one.epochs[0] <= two.epochs[0] <= 2 * one.epochs[0] + 1
    five = make_plan(16, 0, 3000.0, 1, ["--folds", "5", "--seeds", "1"], ranks=2)
    assert (five.workers, five.threads) == (3, 5)


def test_two_of_five_workers_are_faster_than_two_fifths():
    """On a GPU that five workers keep busy two have (2/5) ** .4 = .693 of their speed, on CPUs .4
    of it; windows of 96 × 160 cost 1.875 times 64 × 128, twice the width 2 ** 1.7 = 3.25 times."""
    two, five = (solve.Plan("bfloat16", workers=workers) for workers in (2, 5))
    for gpus, share in ((1, 0.693), (0, 0.4)):
        task = solve.Task(100, 1.0, 64, 128, 100.0, True, 5, gpus)
        speed = solve.relative_speed(task, five)
        assert solve.relative_speed(task, two) / speed == pytest.approx(share, abs=5e-4)
        wide = dataclasses.replace(five, padding=32, width=32)
        assert speed / solve.relative_speed(task, wide) == pytest.approx(1.875 * 3.249, rel=1e-3)


def test_a_plan_changes_nothing_and_cannot_be_changed():
    """The same input, the same plan; Config, Task and Plan are frozen."""
    assert make_plan() == make_plan()
    for frozen, name in ((make_plan(), "epochs"), (solve.Config(), "folds"),
                         (solve.Task(1, 1.0, 1, 1, 1.0, False, 1), "cores")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 3)


def test_the_plan_is_kept_on_resume(finished_copy):
    """A run that goes on measures nothing and changes nothing of the plan, however slow the machine
    was when it was made."""
    out = finished_copy / "out"
    file = out / "state" / "plan.pt"
    before = lib.load_checkpoint(file)
    assert before["speed"] > 0 and before["epochs"] == (2, 2)
    lib.save_checkpoint(file, before | {"speed": 3.0})
    status, printed, err = kit.run_main(finished_copy / "mars.npz", out)
    assert status == 0, err
    assert "3 images a second" in printed
    assert lib.load_checkpoint(file) == before | {"speed": 3.0}


@pytest.mark.fault(41)
@pytest.mark.parametrize("name", ["plan.pt", "cleaned.pt"])
def test_a_changed_decision_is_made_again(finished_copy, name):
    """A plan or a list of outliers that somebody has edited, or a disk, is said, and made anew."""
    file = finished_copy / "out" / "state" / name
    before = lib.load_checkpoint(file)
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    status, printed, err = kit.run_main(finished_copy / "mars.npz", finished_copy / "out")
    assert status == 0, err
    assert f"{name}: damaged" in printed and lib.load_checkpoint(file).keys() == before.keys()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 10 epochs in stage 1, in 2/5 of an hour, and 2 in stage 2, from 1/2 to 9/10."""
    run = kit.open_run(tmp_path_factory.mktemp("run"))
    run.plan = dataclasses.replace(run.plan, epochs=(10, 2), times=((0.0, 0.4), (0.5, 0.9)))
    return run


@pytest.mark.parametrize("stage, epoch, hours, progress", [
    (1, 0, 0.0, 0.0), (1, 3, 0.0, 0.3), (1, 3, 0.1, 0.3), (1, 3, 0.3, 0.75), (1, 10, 0.0, 1.0),
    (1, 0, 0.6, 1.0), (2, 0, 0.4, 0.0), (2, 1, 0.4, 0.5), (2, 1, 0.8, 0.75)])
def test_a_stage_is_as_far_as_its_epochs_or_its_time(run, stage, epoch, hours, progress):
    """Of planned epochs or planned time what is further over counts: while there is time enough the
    clock changes nothing."""
    run.clock.before, run.clock.start = 3600 * hours, time.monotonic()
    assert solve.stage_progress(run, stage, epoch) == pytest.approx(progress, abs=1e-3)


def test_the_rate_is_counted_by_hand():
    """Stage 1: constant, and over the last two fifths it falls; stage 2 goes on with a quarter of
    it and falls from the start."""
    cfg = solve.parse([])
    rates = [solve.learning_rate(cfg, 1, progress, []) for progress in (0, 0.6, 0.7, 0.8, 0.9, 1)]
    assert rates == pytest.approx([2e-3, 2e-3, 1.5e-3, 1e-3, 5e-4, 0])
    rates = [solve.learning_rate(cfg, 2, progress, []) for progress in (0, 0.2, 0.8)]
    assert rates == pytest.approx([5e-4, 4e-4, 1e-4])


@pytest.mark.fault(45)
def test_the_published_rate_falls_by_plateaus():
    """As published it is constant in both stages, whatever the time, and .6 of it after each 8th
    epoch in a row that was not better; that follows from the epochs, which a checkpoint holds."""
    cfg = solve.parse(["--recipe", "paper"])
    history = [{"figure": figure} for figure in [0.1, *[0.0] * 7, 0.2, *[0.1] * 8, *[0.2] * 8]]
    for stage in (1, 2):
        rates = [solve.learning_rate(cfg, stage, 0.9, history[:n]) for n in (0, 8, 16, 17, 24, 25)]
        assert rates == pytest.approx([5e-4, 5e-4, 5e-4, 3e-4, 3e-4, 1.8e-4])
    assert solve.learning_rate(cfg, 1, 0, [{"figure": 0.0}] * 999) == 1e-6


@pytest.mark.parametrize("images, size", [(5000, 32), (256, 16), (32, 4), (3, 4)])
def test_few_images_get_smaller_steps(images, size):
    """A 16th of the images a step, four at least, 32 at most."""
    assert solve.batch_size(solve.parse([]), images) == size


@pytest.mark.parametrize("images, width", [(228, 12), (60, 8), (2505, 32)])
def test_few_images_get_narrow_networks(images, width):
    """Of 228 images networks are at most 12 wide, of 60 they are 8, of 2,505 what there is time
    for; --width is obeyed."""
    machine = dict(cores=16, speed=3000.0, hours=11, images=images)
    assert make_plan(**machine).width == width
    assert make_plan(**machine, flags=["--width", "48"]).width == 48
