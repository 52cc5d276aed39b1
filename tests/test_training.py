"""One network's training: batches, steps, epochs, the best weights; and many side by side."""
from __future__ import annotations

import copy
import dataclasses
import os
import threading
import time

import kit
import numpy as np
import pytest
import torch

import lib
import solve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A planned run; tests work on copies."""
    return kit.open_run(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def run(shared, tmp_path):
    """A copy of it with a folder of its own."""
    return dataclasses.replace(shared, state=tmp_path, histories={})


def planned(run, *epochs, **choices):
    """Change a run's planned epochs and Config, and return it."""
    run.plan = dataclasses.replace(run.plan, epochs=epochs)
    run.cfg = dataclasses.replace(run.cfg, **choices)
    return run


# ---------------------------------------------------------------------------------------- batches


def test_patches_are_pasted_in_the_first_stage_only(run):
    """Copy-paste changes images of stage 1; stage 2's, which carry a prediction, come as they are
    or mirrored; where stage 1 begins on half-sized images its whole ones do so too."""
    planned(run, 2, 2, geometric=(0, 0, 0), jitter=0.0)  # what else changes every image
    every = torch.arange(len(run.data.images))
    donors = every[run.tiles.holds_rare[every]]
    assert donors.tolist() == list(range(0, 24, 4))
    pasting = dataclasses.replace(run.tiles, paste=1.0)
    second = solve.second_input(run, np.full((2, 30, 5, 32, 64), 51, np.uint8), None)
    changed = []
    for data in pasting, second:
        gen = torch.Generator().manual_seed(0)
        x, y = solve.training_batch(run, data, 5, every, donors, gen)  # there is no fold 5
        plain = data.windows(every)[0][:, :1]
        gaps = [(x[:, :1] - image).abs().amax((1, 2, 3)) for image in (plain, plain.flip(-1))]
        changed.append(int((torch.minimum(*gaps) > 1e-3).sum()))
    assert changed[0] > len(every) // 2 and changed[1] == 0
    planned(run, 2, 2, half_sized=0.5)
    assert solve.first_input(run).paste == 0 and run.tiles.paste == run.cfg.copy_paste == 0.5


def test_an_epoch_shows_rare_classes_again(run):
    """Images with a rare class are shown three times in an epoch, others once; the last batch is
    filled up with the first images; the order depends on the key alone."""
    rare = torch.isin(torch.arange(5), torch.tensor([2, 4]))
    targets = torch.ones_like(run.tiles.targets)
    targets[3, 5, 5], targets[4, :9, 0] = 4, 2
    data = dataclasses.replace(run.tiles, targets=targets, is_rare=rare)
    network, orders = solve.new_network(run, 1, 0), []

    def shown(tiles):
        batches.append(tiles.tolist())
        network.sums += 1

    for epoch in (1, 1, 2):
        batches = []
        network.steps[data] = shown
        solve.train_one_epoch(run, network, data, torch.arange(22), (1, 0, epoch))
        assert list(map(len, batches)) == [4] * 7  # 20 + 2 · 3 images in steps of 4
        orders.append(sum(batches, []))
    counts = np.bincount(orders[0][:26])
    assert counts[[3, 4]].tolist() == [3, 3] and (np.delete(counts, [3, 4]) == 1).all()
    assert orders[0][26:] == orders[0][:2]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.fault(34)
@pytest.mark.parametrize("images, side", [(2, 16), (9, 16), (13, 64)])
def test_a_batch_of_one_image_or_one_pixel_trains(tmp_path, images, side):
    """Tiles of 16 × 16 are one pixel at the bottom of the network, two images are batches of one:
    batch norm, which cannot normalise a single value, gets enough of them."""
    run = kit.open_run(tmp_path, "--epochs", "1", "--batch-size", "4",
                       arrays=kit.tiny_arrays(images, 2, side, side))
    networks = solve.train_stage(run, 1, run.tiles)
    assert all(torch.isfinite(value).all() for (net,) in networks for value in net.parameters())


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.fault(30)
@pytest.mark.parametrize("bad", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(run, monkeypatch, bad):
    """A batch of NaN, at the first step or later, changes no weight and no statistic: all stay
    finite, and the loss is the mean of the other steps'."""
    network, real, calls = solve.new_network(run, 1, 0), lib.jitter, []

    def jitter(x, *rest):
        calls.append(len(x))
        return real(x, *rest) * (np.nan if len(calls) == bad else 1)

    monkeypatch.setattr(lib, "jitter", jitter)
    network.set_lr(1e-2)
    loss = solve.train_one_epoch(run, network, run.tiles, torch.arange(24), (1, 0, 1))
    assert len(calls) > 2 and network.sums[1] == len(calls) - 1
    assert loss == pytest.approx(float(network.sums[0] / network.sums[1]))
    for model in network.model, network.ema.model:
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.fault(30)
def test_an_epoch_without_a_finite_step_ends_the_training(run, monkeypatch):
    """It is a UserError, to which the command adds network and epoch: see test_faults.py."""
    network = solve.new_network(run, 1, 0)
    monkeypatch.setattr(lib, "jitter", lambda x, *_: x * np.nan)
    with pytest.raises(lib.UserError, match="not one step had a finite gradient"):
        solve.train_one_epoch(run, network, run.tiles, torch.arange(24), (1, 0, 1))


# ----------------------------------------------------------------------------------------- epochs


def train(run, network, epochs, stage=1, data=None):
    """Train a network for some epochs, as network 0 of a stage."""
    data = data or run.tiles
    inputs = {"whole": {CPU: data}, "half": {CPU: data.halved(run.cfg.copy_paste)}}
    for _ in range(epochs):
        solve.next_epoch(run, stage, 0, network, inputs)
    return inputs


def test_an_epoch_notes_what_came_of_it(run):
    """A record holds loss, rate, the validation's figures, and seconds; the images that are
    validated are those of the fold."""
    network = solve.new_network(planned(run, 2, 1), 1, 0)
    train(run, network, 2)
    assert network.finished and len(network.history) == 2
    for record in network.history:
        assert {"loss", "lr", "val_loss", "score", "confusion", "figure", "seconds"} == {*record}
    pixels = run.data.masks[run.fold_of == 0]
    rows = np.sum(network.history[0]["confusion"], 1)
    np.testing.assert_array_equal(rows, np.bincount(pixels.ravel(), minlength=5))
    assert [record["lr"] for record in network.history] == [2e-3, 2e-3]


def test_stage_1_begins_on_half_sized_images(run):
    """Of three epochs the first two see tiles of half the side; what they learnt is never the best
    of a network that has seen whole ones, whatever it scored. Stage 2 sees whole ones alone."""
    planned(run, 3, 3, half_sized=2 / 3)
    network = solve.new_network(run, 1, 0)
    inputs = train(run, network, 2)
    half, whole = inputs["half"][CPU], inputs["whole"][CPU]
    assert [*network.steps] == [half] and half.images.shape == half.targets.shape == (30, 16, 32)
    assert (half.paste, network.best_epoch, network.best_figure) == (0.5, 2, -np.inf)
    solve.next_epoch(run, 1, 0, network, inputs)
    assert network.steps.keys() == {whole} and network.best_epoch == 3
    second = solve.new_network(run, 2, 0)
    inputs = train(run, second, 1, stage=2)
    assert [*second.steps] == [inputs["whole"][CPU]]


def test_the_best_weights_are_those_of_the_best_epoch(run):
    """Of six epochs the averaged weights of the one with the highest figure are kept."""
    network = solve.new_network(planned(run, 6, 1, lr=0.05), 1, 0)
    averages = []
    for _ in range(6):
        train(run, network, 1)
        averages.append({name: value.clone() for name, value in
                         network.ema.model.state_dict().items()})
    figures = [record["figure"] for record in network.history]
    best = int(np.argmax(figures))
    assert (network.best_epoch, network.best_figure) == (best + 1, max(figures))
    assert all(torch.equal(value, network.best[name]) for name, value in averages[best].items())


def test_in_stage_2_the_first_weights_may_stay_best(run):
    """A second network that never beats the stage-1 network that it went on from stays that one."""
    parent = solve.new_network(run, 1, 0)
    train(planned(run, 20, 1, lr=0.02), parent, 20)
    planned(run, 20, 1, lr=0.9)  # which ruins it
    network = solve.new_network(run, 2, 0, parent=parent.ema.model)
    before = copy.deepcopy(network.ema.model.state_dict())
    validated = torch.where(run.tiles.fold_of == 0)[0]
    figure = solve.validate(run, network, run.tiles, validated)["figure"]
    train(run, network, 1, stage=2)
    assert network.history[0]["figure"] < network.best_figure == figure
    assert network.best_epoch == 0 and network.finished
    assert all(torch.equal(value, before[name]) for name, value in network.best.items())


def test_patience_ends_a_network(run):
    """After as many epochs without a better figure as --patience says; others go on."""
    network = solve.new_network(planned(run, 50, 1, patience=3), 1, 0)
    network.best, network.best_figure = {}, 2.0  # no score is higher
    train(run, network, 2)
    assert not network.finished
    train(run, network, 1)
    assert network.finished and len(network.history) == 3


@pytest.mark.fault(47)
def test_the_end_of_the_time_ends_an_epoch(run):
    """After the first step, so that there is something; and all networks with it."""
    planned(run, 50, 1)
    run.clock = lib.Clock(run.state / "clock.pt", 1.0)
    run.clock.before = 7200.0
    networks = solve.train_stage(run, 1, run.tiles)
    assert len(networks) == 2
    for history in run.histories.values():
        assert len(history) == 1 and np.isfinite(history[0]["loss"])
        assert history[0]["lr"] == 0


def test_the_monitor_of_the_paper_is_the_loss(run):
    """Its figure is the validation's loss, negative; ours the competition's mean IoU; of a fold
    without a label neither is a number, and any other is better."""
    network, every = solve.new_network(run, 1, 0), torch.arange(24)
    ours = solve.validate(run, network, run.tiles, every)
    assert ours["figure"] == ours["score"]
    planned(run, 2, 2, monitor="loss")
    record = solve.validate(run, network, run.tiles, every)
    assert record["figure"] == -record["val_loss"] < 0
    planned(run, 2, 2, monitor="score")
    assert solve.validate(run, network, run.tiles, torch.arange(24, 30))["figure"] == -1e9


# ------------------------------------------------------------------------------------- many of them


def trained(run, workers, seed=0):
    """Return what a stage learns with so many workers: weights, and histories without seconds."""
    for file in run.state.glob("stage*"):
        file.unlink()
    torch.manual_seed(seed)
    np.random.seed(seed)
    run.workers = lib.Workers([CPU], workers)
    networks = solve.train_stage(run, 1, run.tiles)
    weights = [net.state_dict() for fold in networks for net in fold]
    histories = [[{k: v for k, v in record.items() if k != "seconds"} for record in history]
                 for history in run.histories.values()]
    probs = lib.predict_unseen(networks, run.tiles, run.dtype, True, run.workers)
    return weights, histories, probs


def test_the_answer_does_not_depend_on_the_workers(run, monkeypatch):
    """One, two and three workers, one network slower than the others, and another state of the
    process's own random numbers: the same weights, records and predictions, to the last bit. No
    thread is left, and no worker touches the process's random numbers."""
    real, threads = solve.train_one_epoch, threading.active_count()

    def slow(run, network, data, tiles, key, *rest):
        time.sleep(0.1 * (key[1] == 0))
        return real(run, network, data, tiles, key, *rest)

    monkeypatch.setattr(solve, "train_one_epoch", slow)
    planned(run, 2, 1)
    run.plan = dataclasses.replace(run.plan, seeds=2)
    weights, histories, probs = trained(run, 1)
    for workers in (2, 3):
        others = trained(run, workers, seed=workers)
        assert torch.initial_seed() == workers
        state = torch.get_rng_state()
        assert torch.equal(state, torch.random.manual_seed(workers).get_state())
        assert others[1] == histories
        np.testing.assert_array_equal(others[2], probs)
        for one, two in zip(weights, others[0], strict=True):
            assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert threading.active_count() == threads
    assert not torch.equal(*(net["encoder.0.0.weight"] for net in weights[:2]))


def test_no_thread_outlives_main(finished_copy, monkeypatch):
    """After a run, a refused one, and one that a mistake in a worker ended, the threads are those
    from before, and an operation has as many as before."""
    before, data, out = threading.active_count(), finished_copy / "mars.npz", finished_copy / "out"
    torch.set_num_threads(os.cpu_count())
    try:
        assert kit.run_main(data, out)[0] == 0
        assert kit.run_main(data, out, "--seed", "1")[0] == 2
        monkeypatch.setattr(lib, "jitter", kit.failing(lib.jitter, KeyError("a bug"), 30))
        with pytest.raises(KeyError, match="a bug"):
            kit.run_main(data, out, "--no-clean", "--no-frames", "--fresh", "--epochs", "9")
        assert threading.active_count() == before
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(1)
