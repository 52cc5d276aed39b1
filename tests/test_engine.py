"""The engine: its workers, a network in training, the timetable, the plan, and what a person sees of them."""

import dataclasses
import errno
import io
import itertools
import os
import re
import signal
import sys
import threading
import time

import cv2
import numpy as np
import pytest
import torch

import lib
import solve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    """PyTorch's number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def new_network(folder, name="stage1_fold0", seed=0, dtype=torch.float32, patience=5):
    """Return a small network in training, whose first weights depend on the seed alone."""
    torch.manual_seed(seed)
    model = lib.UNet(1, 4, 4, 2)
    return lib.TrainingState.begin(folder / f"{name}.pt", model, CPU, dtype, lr=0.01, weight_decay=0.1,
                                   ema_decay=0.9, patience=patience)


def note_epoch(network, seconds=1.0, score=0.5, confusion=None, loss=1.0, figure=None):
    """Let a network have an epoch behind it, of so many seconds."""
    confusion = np.eye(lib.NUM_CLASSES, dtype=int).tolist() if confusion is None else confusion
    network.history.append({"seconds": seconds, "score": score, "confusion": confusion, "loss": loss})
    network.keep_if_best(score if figure is None else figure)


def assert_same(one, other):
    """Two nested values are equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# ---------------------------------------------------------------------------------------- workers


def test_a_map_keeps_its_order():
    """Whichever item is done first: the results are in the order of the items."""
    def slow(item):
        time.sleep(0.02 * (4 - item))
        return item ** 2

    assert lib.Workers([CPU], 3).map(slow, range(5)) == [0, 1, 4, 9, 16]
    assert lib.Workers([CPU], 3).map(slow, []) == []


def test_parts_of_an_index_are_mapped():
    """map_parts hands out parts of at most so many, in order."""
    parts = lib.Workers([CPU], 2).map_parts(lambda part: part.tolist(), np.arange(10, 15), 2)
    assert parts == [[10, 11], [12, 13], [14]]


def test_all_workers_are_at_work_at_once():
    """Four workers meet inside the work, in four threads, none of them the caller's."""
    meeting, met = threading.Barrier(4, timeout=10), []

    def meet(item):
        meeting.wait()
        met.append(threading.current_thread())

    lib.Workers([CPU], 4).map(meet, range(8))
    assert len(set(met)) == 4 and threading.main_thread() not in met


@pytest.mark.parametrize("count", [1, 3])
def test_each_worker_computes_with_its_own_threads(count):
    """A worker's operations have the threads that Workers were given, the caller's keep theirs."""
    meeting = threading.Barrier(2, timeout=10)

    def ask(item):
        meeting.wait()
        return torch.get_num_threads()

    torch.set_num_threads(2)
    assert lib.Workers([CPU], 2, count).map(ask, range(2)) == [count, count]
    assert torch.get_num_threads() == 2


def test_workers_are_devices():
    """There are as many workers as asked for; of several GPUs each in turn gets another one."""
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert lib.Workers([CPU], 3).devices == [CPU] * 3
    assert lib.Workers(gpus, 1).devices == gpus[:1]
    assert lib.Workers(gpus, 2).devices == gpus
    assert lib.Workers(gpus, 5).devices == [*gpus, *gpus, gpus[0]]


def test_one_thread_at_a_time_launches_on_gpus():
    """Who is alone with one GPU keeps others from all of them; nobody waits for the CPU."""
    with lib.alone(torch.device("cuda", 0)):
        assert not lib.alone(torch.device("cuda", 1)).acquire(blocking=False)
    with lib.alone(CPU), lib.alone(CPU):
        pass


def test_a_cpu_replays_nothing():
    """On a CPU each call is the step itself, on the very tiles."""
    seen, given = [], [torch.arange(i) for i in range(6)]
    step = lib.Replayed(seen.append, torch.Generator())
    for tiles in given:
        step(tiles)
    assert step.graph is None and [*map(id, seen)] == [*map(id, given)]


def endless(workers, ended, begun=None):
    """Return work that has no end of its own, and when it is ended needs a moment to tidy up."""
    def work(device):
        try:
            if begun is not None:
                begun.wait()
            while True:
                workers.check()
                time.sleep(0.005)
        finally:
            time.sleep(0.2)
            ended.append(threading.current_thread())

    return work


def test_an_error_in_one_worker_ends_the_others():
    """It is raised in the caller; the others end at their next check(), and the same workers work again."""
    workers, ended, begun = lib.Workers([CPU], 3), [], threading.Barrier(3, timeout=10)
    forever, before = endless(workers, ended, begun), threading.enumerate()
    numbers = itertools.count()

    def work(device):
        if next(numbers) == 1:
            begun.wait()
            raise ValueError("one of three")
        forever(device)

    with pytest.raises(ValueError, match="one of three"):
        workers.run(work)
    assert len(ended) == 2 and threading.enumerate() == before
    assert workers.map(str, range(3)) == ["0", "1", "2"]


def test_an_error_ends_a_map():
    """What waits when an error comes is not begun."""
    workers, done = lib.Workers([CPU], 2), []

    def work(item):
        if item == 1:
            raise ValueError("item 1")
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ValueError, match="item 1"):
        workers.map(work, range(100))
    assert len(done) <= 2


def test_an_interrupt_meanwhile_ends_all_workers():
    """KeyboardInterrupt of what runs between two looks is raised when no worker is left."""
    workers, ended, before = lib.Workers([CPU], 3), [], threading.enumerate()

    def meanwhile():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run(endless(workers, ended), meanwhile)
    assert len(ended) == 3 and threading.enumerate() == before


def test_ctrl_c_reaches_the_workers():
    """A real SIGINT, while the caller waits for its workers, ends them within a second."""
    workers, ended, before = lib.Workers([CPU], 2), [], threading.enumerate()
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, send)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        workers.run(endless(workers, ended))
    assert time.monotonic() - sent[0] < 1 and len(ended) == 2
    timer.join()
    assert threading.enumerate() == before


def test_single_threaded_gives_back_the_threads():
    """Inside, PyTorch and OpenCV have one thread; after it, also after an error, what they had before."""
    torch.set_num_threads(3)
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        with pytest.raises(ValueError, match="inside"), lib.single_threaded() as cores:
            assert (cores, torch.get_num_threads(), cv2.getNumThreads()) == (3, 1, 1)
            raise ValueError("inside")
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 2)
    finally:
        cv2.setNumThreads(before)


def test_speed_is_that_of_all_workers_together(tmp_path):
    """40 images in .1 s by each of two workers are 800 a second; one disturbed moment, three times as long,
    does not count, nor do the first steps; each size of images has its own figure."""
    images = torch.zeros(4, 8, 8, dtype=torch.uint8)
    data = lib.StageInput(lib.Frames.lay_out(None, 4), 0, (8, 8), images, 0.0, 1.0, images.char(),
                          torch.zeros(4, dtype=torch.int64), torch.zeros(lib.NUM_CLASSES, dtype=torch.bool))
    sizes = [data, data.halved(0.5)]
    seconds = {8: [0.3, 0.1, 0.3], 4: [0.3, 0.3, 0.2]}
    networks = [new_network(tmp_path, str(i)) for i in range(2)]
    asked = {id(network): {8: [], 4: []} for network in networks}

    def train(network, data, steps):
        steps_so_far = asked[id(network)][data.window[0]]
        time.sleep(seconds[data.window[0]][len(steps_so_far)])
        steps_so_far.append(steps)
        return 10 * steps

    whole, small = lib.training_speed(lib.Workers([CPU], 2), networks, sizes, train)
    assert all(steps == [2, 4, 4] for of in asked.values() for steps in of.values())
    assert 500 < whole <= 800 and 300 < small <= 400


# ------------------------------------------------------------------------------- a network in training


def test_the_average_counts_its_own_steps():
    """From 0 towards 1, decay .28: at first 2/11 and 3/12 are less than that, from the third step on it is
    what counts; what is left of the start is the product."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    ema = lib.EMA(model, 0.28)
    with torch.no_grad():
        model.weight.fill_(1), model.bias.fill_(1)
    left = 1.0
    for steps, decay in enumerate((2 / 11, 3 / 12, 0.28, 0.28), 1):
        ema.update(model)
        left *= decay
        assert ema.steps == steps
        for value in ema.model.parameters():
            assert torch.allclose(value, torch.full_like(value, 1 - left), atol=1e-6)


def test_an_average_of_decay_0_is_a_copy():
    """Weights and batch norm's statistics are the network's own after every step."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    ema = lib.EMA(model, 0.0)
    for _ in range(3):
        model(torch.randn(2, 1, 8, 8)).sum()
        with torch.no_grad():
            model[0].weight.add_(0.1)
        ema.update(model)
        for one, other in zip((*ema.model.parameters(), *ema.model.buffers()),
                              (*model.parameters(), *model.buffers()), strict=True):
            assert torch.equal(one, other) or not one.is_floating_point()


def test_an_average_goes_on_where_it_was_saved():
    """Its state holds weights and steps: the next update gives the same bits."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    one, other = lib.EMA(model, 0.9), lib.EMA(torch.nn.Linear(3, 3), 0.9)
    for i in range(4):
        with torch.no_grad():
            model.weight.add_(0.3)
        if i == 3:
            other.load_state_dict(one.state_dict())
            other.update(model)
        one.update(model)
    assert_same(one.state_dict(), other.state_dict())


def batch(seed):
    """Return images and labels, -1 ignored."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(4, 1, 16, 24, generator=gen), torch.randint(-1, 4, (4, 16, 24), generator=gen)


def take_step(network, criterion):
    """Take a step; return its loss and how many good ones it is, as they are counted."""
    network.sums.zero_()
    network.step(criterion)
    return network.sums.tolist()


def good_criterion(seed):
    """Return the loss of a batch as a function of the model."""
    x, y = batch(seed)
    return lambda model: lib.deep_supervision_loss(model(x), y, (0.1,), gamma=0.0)


def nan_loss(model):
    """Return NaN."""
    return good_criterion(7)(model) * float("nan")


def inf_gradient(model):
    """Return a loss that is finite, with a slope that is not: a root at 0."""
    bias = model.heads[0].bias
    return good_criterion(7)(model) + torch.sqrt((bias - bias.detach()).sum())


def nan_input(model):
    """Return the loss of images of which one pixel is NaN: it is in every statistic of batch norm too."""
    x, y = batch(7)
    x[1, 0, 3, 5] = float("nan")
    return lib.deep_supervision_loss(model(x), y, (0.1,), gamma=0.0)


def learnt(network):
    """Return copies of what steps change: weights and statistics, and the optimizer's averages and counters.
    How many batches batch norm has seen is never used."""
    weights = {name: value.clone() for name, value in network.model.state_dict().items()
               if "num_batches_tracked" not in name}
    state = network.optimizer.state_dict()["state"]
    return weights, {i: {name: value.clone() for name, value in one.items()} for i, one in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("bad", [nan_loss, inf_gradient, nan_input])
def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path, bad, first, dtype):
    """No weight, no statistic, no counter: after it, as the first step or between two, the next good step is
    that of a twin that never met it, bit for bit. The average stays finite, the scale is halved."""
    network, twin = new_network(tmp_path, dtype=dtype), new_network(tmp_path, dtype=dtype)
    for seed in range(first):
        assert [take_step(one, good_criterion(seed))[1] for one in (network, twin)] == [1, 1]
    before, scale = learnt(network), network.scaler.get_scale()
    assert take_step(network, bad) == [0, 0]
    after = learnt(network)
    assert_same(before[0], after[0])
    if first:
        assert_same(before[1], after[1])
    assert network.scaler.get_scale() == scale / 2
    assert all(value.isfinite().all() for value in network.ema.model.state_dict().values())
    for seed in (10, 11):
        ours, theirs = (take_step(one, good_criterion(seed)) for one in (network, twin))
        assert ours == theirs and ours[1] == 1
        assert_same(learnt(network), learnt(twin))


def test_a_good_step_learns(tmp_path):
    """The loss of a batch falls over ten steps, and the average follows."""
    network = new_network(tmp_path)
    losses = [take_step(network, good_criterion(0))[0] for _ in range(10)]
    assert losses[-1] < losses[0] and network.ema.steps == 10


def test_the_losses_of_good_steps_are_summed(tmp_path):
    """Of a good, a bad and a good step two count, with the losses that they began with."""
    network = new_network(tmp_path)
    losses = []
    for criterion in (good_criterion(0), nan_loss, good_criterion(1)):
        def noted(model, criterion=criterion):
            loss = criterion(model)
            losses.append(loss.item())
            return loss

        network.step(noted)
    assert network.sums.tolist() == pytest.approx([losses[0] + losses[2], 2])


def test_the_rate_is_the_optimizers(tmp_path):
    """It is .01 as begun; after it is set to .5 the scheduler cuts it from there, by .6, after two epochs
    without a better one; patience 5 is 1 to it."""
    network = new_network(tmp_path)
    assert network.rate == 0.01
    network.rate = 0.5
    for _ in range(3):
        network.scheduler.step(0.25)
    assert network.rate == network.optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


def trained(folder, **args):
    """Return a network that has two steps and an epoch behind it."""
    network = new_network(folder, **args)
    for seed in range(2):
        network.step(good_criterion(seed))
    network.scheduler.step(0.25)
    note_epoch(network, score=0.25)
    return network


def test_a_network_is_saved_and_loaded_bit_for_bit(tmp_path):
    """Weights, average, optimizer, scheduler, scale, history, best weights: all as they were, and the next
    step is the same."""
    network, other = trained(tmp_path, dtype=torch.float16), new_network(tmp_path, seed=1)
    network.step(nan_loss)  # the scale has been halved
    network.save()
    other.resume()
    assert_same(network.state_dict(), other.state_dict())
    assert len(other.history) == 1 and other.best_figure == 0.25 and other.scaler.get_scale() == 2.0**9
    assert_same(*(take_step(one, good_criterion(5)) for one in (network, other)))
    assert_same(network.state_dict(), other.state_dict())


def test_of_a_finished_network_only_facts_are_kept(tmp_path):
    """Its file holds history and best weights, no optimizer, and is a fraction as large."""
    network = trained(tmp_path)
    network.save()
    size = network.path.stat().st_size
    network.finished = True
    network.save()
    facts = {"history", "best", "best_figure", "best_epoch", "finished"}
    assert lib.load_checkpoint(network.path).keys() == facts
    assert network.path.stat().st_size < 0.5 * size
    other = new_network(tmp_path, seed=1)
    weights = {name: value.clone() for name, value in other.model.state_dict().items()}
    other.resume()
    assert other.finished and other.best_epoch == 1
    assert_same(other.best, network.best)
    assert_same(dict(other.model.state_dict()), weights)


def test_the_best_weights_are_those_of_the_best_epoch(tmp_path):
    """A worse epoch later changes nothing, an equal one neither; -inf (small images) gives way to any."""
    network, kept = new_network(tmp_path), []
    for i, figure in enumerate((-np.inf, -np.inf, 0.5, 0.25, 0.5, 0.75)):
        network.step(good_criterion(i))
        note_epoch(network, figure=figure)
        kept.append(network.best_epoch)
    assert kept == [1, 2, 3, 3, 3, 6] and network.best_figure == 0.75
    assert_same(dict(network.best), dict(network.ema.model.state_dict()))


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    """No room for a checkpoint: a line says so, the earlier one stays whole, training goes on."""
    network = trained(tmp_path)
    network.save()
    network.step(good_criterion(3))
    with monkeypatch.context() as full:
        def no_room(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "fsync", no_room)
        network.save()
    assert re.search(r"stage1_fold0\.pt: not saved \(No space left on device\)", capsys.readouterr().out)
    other = new_network(tmp_path, seed=1)
    other.resume()
    other.step(good_criterion(3))
    assert_same(network.state_dict(), other.state_dict())
    assert take_step(network, good_criterion(4))[1] == 1


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "text"])
def test_a_damaged_checkpoint_is_named_and_training_begins_anew(tmp_path, capsys, damage):
    """A line names the file, and the network is as new."""
    network = trained(tmp_path)
    network.save()
    raw = bytearray(network.path.read_bytes())
    raw[len(raw) // 2] ^= 1
    damages = {"flipped bit": raw, "cut short": raw[:999], "empty": b"", "text": b"hello"}
    network.path.write_bytes(damages[damage])
    other = new_network(tmp_path, seed=1)
    other.resume()
    assert f"{network.path}: damaged" in capsys.readouterr().out
    assert_same(other.state_dict(), new_network(tmp_path, seed=1).state_dict())


# -------------------------------------------------------------------------------------- the timetable


def steady(epoch, epochs):
    """Ten seconds an epoch."""
    return 10.0


def small_first(epoch, epochs):
    """A second for each of the first two thirds of the epochs, four for the others."""
    return 1.0 if epoch <= int(2 / 3 * epochs) else 4.0


def timetable(folder, networks=2, epochs=10, cost=steady, left=1e9, patience=99, workers=1):
    """Return a timetable of new networks; left: seconds, however slow the machine."""
    names = [f"stage1_fold{i}" for i in range(networks)]
    networks = [new_network(folder, name, patience=patience) for name in names]
    return lib.Timetable(networks, epochs, cost, lambda pace: left, patience, workers)


def test_who_has_come_least_far_is_next(tmp_path):
    """Of networks with 2, 0, 1 and 0 epochs the second goes first, then the fourth, while it is busy, then
    the third; a busy one is never taken, and in the end all have come equally far."""
    table = timetable(tmp_path, 4, epochs=3)
    for network, epochs in zip(table.networks, (2, 0, 1, 0), strict=True):
        for _ in range(epochs):
            note_epoch(network)
    first, second, third, fourth = table.networks
    assert [table.take(CPU) for _ in range(5)] == [second, fourth, third, first, None]
    taken = []
    for network in (second, fourth, third, first):
        note_epoch(network)
        table.give_back(network)
    while network := table.take(CPU):
        taken.append(table.networks.index(network))
        note_epoch(network)
        table.give_back(network)
    assert taken == [1, 3, 1, 2, 3] and [len(network.history) for network in table.networks] == [3] * 4
    assert all(network.finished for network in table.networks)


def test_a_worker_takes_what_lies_on_its_device(tmp_path):
    """Of three networks, the first on another device, a worker of the CPU takes the other two."""
    table = timetable(tmp_path, 3)
    elsewhere = torch.device("meta")
    table.networks[0].sums = table.networks[0].sums.to(elsewhere)
    assert [table.take(CPU) for _ in range(3)] == [*table.networks[1:], None]
    assert [table.take(elsewhere) for _ in range(2)] == [table.networks[0], None]


@pytest.mark.parametrize("networks, workers, cost, left, epochs", [
    (4, 2, steady, 1e9, 10),  # as planned
    (4, 2, steady, 200, 10),  # 4 networks × 10 epochs × 10 s / 2 workers
    (4, 2, steady, 199, 9),
    (4, 2, steady, 100, 5),
    (4, 1, steady, 100, 2),
    (4, 2, steady, 19, 1),    # at least one
    (4, 2, steady, -5, 1),
    (2, 1, small_first, 44, 10),  # 6 small ones and 4 whole ones are 22 s a network
    (2, 1, small_first, 22, 5),   # 3 + 2 × 4 = 11 s a network
    (2, 1, small_first, 21.9, 4),  # 4: 2 + 2 × 4 = 10 s
    (2, 1, small_first, 19.9, 3),  # 3: 2 + 4 = 6 s
    (2, 1, small_first, 11, 2),    # 2: 1 + 4 = 5 s
    (2, 1, small_first, 9.9, 1),
])
def test_epochs_are_those_that_all_networks_can_reach(tmp_path, networks, workers, cost, left, epochs):
    """The planned seconds of all networks, shared by the workers, are held against the time left."""
    assert timetable(tmp_path, networks, 10, cost, left, workers=workers).epochs == epochs


def test_what_is_behind_is_not_counted_and_half_of_what_is_under_way(tmp_path):
    """Two networks, three epochs of 10 s: 60 s; one is half through its first: 55; it is through: 50; the
    other one is finished: 20, and two workers have them in 10."""
    table = timetable(tmp_path, 2, epochs=3)
    assert table.seconds_for(3) == 60
    network = table.take(CPU)
    assert table.seconds_for(3) == 55
    note_epoch(network, 10)
    table.give_back(network)
    assert table.seconds_for(3) == 50
    table.networks[1].finished = True
    assert table.seconds_for(3) == 20
    table.workers = 2
    assert table.seconds_for(3) == 10


def walk(table, seconds):
    """Let one worker train all networks of a timetable, with epochs of so many seconds, given their number;
    return how many epochs were planned at each step. The clock is the timetable's own."""
    now, planned = [0.0], []
    left = table.time_left
    table.time_left = lambda pace: left(pace) - now[0]
    while network := table.take(CPU):
        planned.append(table.epochs)
        took = seconds(len(network.history) + 1)
        now[0] += took
        note_epoch(network, took)
        table.give_back(network)
    table.finish()
    return planned, now[0]


def test_a_slower_machine_shrinks_the_epochs_of_all(tmp_path):
    """Three networks, 10 epochs of 10 s are 300 s, and as many there are. From the third epoch on all takes
    three times as long: 60 s are gone by then, and each epoch of all networks takes 90 of the other 240."""
    table = timetable(tmp_path, 3, left=300)
    planned, used = walk(table, lambda epoch: 30.0 if epoch > 2 else 10.0)
    assert planned[:7] == [10] * 7 and planned[-1] == 4
    assert [len(network.history) for network in table.networks] == [4] * 3 and used == 240


def test_a_faster_machine_trains_no_more_than_planned(tmp_path):
    """Epochs of a tenth of the seconds: as many as planned, and no more."""
    table = timetable(tmp_path, 2, left=1e9)
    planned, used = walk(table, lambda epoch: 1.0)
    assert set(planned) == {10} and used == 20 and table.pace() == 0.1


def test_the_first_epochs_set_no_pace(tmp_path):
    """Of 20 epochs the first two, a tenth, take five times as long, and shrink nothing, though the time
    would be short; from the third on what was measured counts."""
    table = timetable(tmp_path, 2, epochs=20, left=1000)
    for network in 2 * table.networks:
        assert table.pace() == 1 and table.epochs == 20
        table.take(CPU)
        note_epoch(network, 50.0)
        table.give_back(network)
    assert table.pace() == 5
    table.take(CPU)
    assert table.epochs == 12  # 100 s an epoch of both, 1000 are left


def test_who_has_ended_early_holds_up_no_pace(tmp_path):
    """Of 40 epochs a tenth is four. Patience ends one network after its third, the other one takes four: from
    then on what was measured counts, five times as long as planned."""
    table = timetable(tmp_path, 2, epochs=40, patience=2)
    paces = []
    for _ in range(7):
        network = table.take(CPU)
        note_epoch(network, 50.0, 0.5 if network is table.networks[0] else 0.1 * len(network.history))
        table.give_back(network)
        paces.append(table.pace())
    assert [len(network.history) for network in table.networks] == [3, 4] and table.networks[0].finished
    assert paces == [1] * 6 + [5]


def test_one_slow_epoch_shrinks_nothing(tmp_path):
    """The pace is the median of the last epochs: one that took twenty times as long is none."""
    table = timetable(tmp_path, 2, left=400)
    planned, _ = walk(table, lambda epoch: 10.0 if epoch != 5 or len(table.paces) % 2 else 100.0)
    assert set(planned) == {10}


@pytest.mark.parametrize("left", [0, 25, 59, 60, 70, 85, 95, 110])
def test_all_networks_come_equally_far(tmp_path, left):
    """However much time there is, all of five networks have the same number of epochs: what is left when the
    first of them has ended is too little for one more of each."""
    table = timetable(tmp_path, 5, epochs=9, cost=lambda epoch, epochs: 2.0, left=left)
    walk(table, lambda epoch: 2.0)
    assert {len(network.history) for network in table.networks} == {min(9, max(1, left // 10))}


def test_the_clock_is_asked_with_the_pace(tmp_path):
    """Predictions too take longer on a slower machine: time_left hears how much slower it is."""
    asked = []
    networks = [new_network(tmp_path, str(i)) for i in range(2)]
    table = lib.Timetable(networks, 5, steady, lambda pace: asked.append(pace) or 1e9, 99, 1)
    walk(table, lambda epoch: 25.0)
    assert asked[0] == 1.0 and asked[-1] == 2.5


def test_patience_finishes_one_network(tmp_path):
    """Three epochs without a better one, of one network: it is finished and saved, the other goes on."""
    table = timetable(tmp_path, 2, epochs=8, patience=3)
    first, second = table.networks
    while network := table.take(CPU):
        note_epoch(network, score=0.5 if network is first else 0.1 * len(network.history))
        table.give_back(network)
    assert (len(first.history), first.best_epoch) == (4, 1) and len(second.history) == 8
    assert lib.load_checkpoint(first.path)["finished"] and lib.load_checkpoint(second.path)["finished"]


def test_checkpoints_come_when_half_a_minute_has_passed(tmp_path):
    """A network is saved after the epoch that ends half a minute after its last checkpoint, not before."""
    table = timetable(tmp_path, 1)
    network = table.take(CPU)
    note_epoch(network)
    table.give_back(network)
    assert not network.path.exists()
    network.saved -= lib.SAVE_SECONDS + 1
    table.take(CPU)
    note_epoch(network)
    table.give_back(network)
    assert len(lib.load_checkpoint(network.path)["history"]) == 2
    assert time.monotonic() - network.saved < 5


def test_the_end_of_the_time_finishes_all(tmp_path):
    """finish() marks and saves what is not finished, and leaves alone what is."""
    table = timetable(tmp_path, 3)
    for network in table.networks:
        note_epoch(network)
    table.networks[0].finished = True
    table.finish()
    assert all(network.finished for network in table.networks)
    assert [network.path.exists() for network in table.networks] == [False, True, True]
    assert lib.load_checkpoint(table.networks[2].path)["finished"]


# ----------------------------------------------------------------------------- training side by side


@pytest.fixture
def clock(tmp_path):
    """A run's clock."""
    return lib.Clock(tmp_path / "clock.json", 1.0)


def test_workers_train_a_timetable_side_by_side(tmp_path, clock, capsys):
    """Three networks of two workers: each trained in turn by whoever is free, to the end, all saved."""
    table, by = timetable(tmp_path, 3, epochs=4, workers=2), []

    def advance(network, device, epochs):
        assert (device, epochs) == (CPU, 4)
        by.append(threading.current_thread())
        time.sleep(0.01)
        note_epoch(network)

    lib.train_side_by_side("stage 1", table, advance, lib.Workers([CPU], 2, 1, clock))
    assert len(by) == 12 and len(set(by)) == 2
    assert all(lib.load_checkpoint(network.path)["finished"] for network in table.networks)
    shown = re.findall(r"^stage 1  epoch (\d)/4  ", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["1", "2", "3", "4"]


@pytest.mark.parametrize("error, sentence", [
    (lib.UserError("not one step had a finite gradient"),
     "not one step had a finite gradient; try --fresh and a smaller --lr"),
    (RuntimeError("CUDA out of memory. Tried to allocate"),
     "out of memory; try --fresh and a smaller --batch-size or --width"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "out of memory; try --fresh and a smaller --batch-size or --width")])
def test_what_a_user_can_mend_names_network_epoch_and_cure(tmp_path, clock, error, sentence):
    """An epoch without one good step, or too little memory, is one sentence; the network isn't finished."""
    table = timetable(tmp_path, 2, workers=2)

    def advance(network, device, epochs):
        if network is table.networks[1] and len(network.history) == 1:
            raise error
        note_epoch(network)

    with pytest.raises(lib.UserError, match=f"^stage1_fold1, epoch 2: {sentence}$"):
        lib.train_side_by_side("stage 1", table, advance, lib.Workers([CPU], 2, 1, clock))
    assert not table.networks[1].finished


@pytest.mark.parametrize("error", [RuntimeError("illegal memory access"), KeyError("no such stage")])
def test_a_mistake_in_the_code_is_raised_as_it_is(tmp_path, clock, error):
    """What no user can mend keeps its type and words."""
    def advance(network, device, epochs):
        raise error

    with pytest.raises(type(error)) as raised:
        lib.train_side_by_side("stage 1", timetable(tmp_path), advance, lib.Workers([CPU], 1, 1, clock))
    assert raised.value is error


# ------------------------------------------------------------------------------- what a person sees


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Return True."""
        return True


CONFUSIONS = (
    # rows the truth: 8 of 10 pixels of soil are right, two are said to be bedrock, whose 10 are right
    [[5, 0, 0, 0, 0], [0, 8, 2, 0, 0], [0, 0, 10, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 2]],
    [[0, 9, 0, 0, 0], [0, 4, 6, 0, 0], [0, 0, 10, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 2]])
# of both: soil 12 / 20, bedrock 20 / 28, sand and big rock 1
LINE = ("loss 0.7500  score 0.8286 (0.7500 ± 0.0500)  Soil 0.600  Bedrock 0.714  Sand 1.000  Big Rock 1.000  "
        "{minutes} min left")


def two_networks(folder, epochs=(1, 1)):
    """Return a timetable of two networks, 3 epochs of 600 s, with so many behind them."""
    table = timetable(folder, 2, epochs=3, cost=lambda epoch, epochs: 600.0)
    for network, confusion, score, count in zip(table.networks, CONFUSIONS, (0.8, 0.7), epochs, strict=True):
        for _ in range(count):
            note_epoch(network, 600.0, score, confusion, loss=1.5 * score - 0.375)
    return table


def test_a_line_an_epoch_for_the_whole_stage(tmp_path, capsys):
    """Mean loss, score of all validation images together, mean and spread over the networks, each class by
    name, minutes left: 2 networks × 2 epochs × 10 minutes. What an earlier start showed is not repeated."""
    table = two_networks(tmp_path, (0, 0))
    progress = lib.Progress("stage 1", table)
    progress.show()
    assert capsys.readouterr().out == ""
    table.networks[:] = two_networks(tmp_path).networks
    progress.show()
    progress.show()
    progress.close()
    assert capsys.readouterr().out == f"stage 1  epoch 1/3  {LINE.format(minutes='40.0')}\n"
    lib.Progress("stage 1", table).show()
    assert capsys.readouterr().out == ""


def test_an_epoch_is_shown_when_all_networks_have_it_behind_them(tmp_path, capsys):
    """One network has three epochs, the other one none: nothing; then one: a line; the other one has ended
    for good after it: those of the first alone count as reached, with the last record of the other."""
    table = two_networks(tmp_path, (0, 0))
    progress = lib.Progress("stage 1", table)
    table.networks[0].history[:] = two_networks(tmp_path, (3, 0)).networks[0].history
    progress.show()
    assert capsys.readouterr().out == ""
    table.networks[1].history[:] = two_networks(tmp_path).networks[1].history
    progress.show()
    assert capsys.readouterr().out == f"stage 1  epoch 1/3  {LINE.format(minutes='20.0')}\n"
    table.networks[1].finished = True
    progress.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"stage 1  epoch {epoch}/3  {LINE.format(minutes='0.0')}" for epoch in (2, 3)]


def test_the_last_epochs_are_shown_too(tmp_path, clock, capsys):
    """Patience ends one network after its second epoch, the other one has all six, too fast to be looked at
    between: each epoch has its line."""
    table = timetable(tmp_path, 2, epochs=6, patience=1)

    def advance(network, device, epochs):
        better = network is table.networks[1]
        note_epoch(network, score=0.1 * len(network.history) if better else 0.5)

    lib.train_side_by_side("stage 2", table, advance, lib.Workers([CPU], 1, 1, clock))
    shown = re.findall(r"^stage 2  epoch (\d)/6  ", capsys.readouterr().out, re.MULTILINE)
    assert [len(network.history) for network in table.networks] == [2, 6]
    assert shown == ["1", "2", "3", "4", "5", "6"]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    """On a terminal tqdm redraws one line, for the whole stage: it goes on at the epoch done, and holds title
    and figures."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    table = two_networks(tmp_path)
    progress = lib.Progress("stage 2", table)
    for _ in range(2):
        time.sleep(0.15)  # tqdm draws at most ten times a second
        for network in table.networks:
            network.history.append(network.history[-1])
        progress.show()
    progress.close()
    shown = sys.stdout.getvalue()
    assert shown.count("\n") == 1 and "\r" in shown
    for part in ("stage 2", "1epoch", "2/3", "3/3", LINE.format(minutes="0.0")):
        assert part in shown


def test_lines_where_tqdm_is_missing(tmp_path, monkeypatch):
    """On a terminal without tqdm there is a line an epoch, without a carriage return."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    table = two_networks(tmp_path, (0, 0))
    progress = lib.Progress("stage 1", table)
    table.networks[:] = two_networks(tmp_path).networks
    progress.show()
    progress.close()
    assert sys.stdout.getvalue() == f"stage 1  epoch 1/3  {LINE.format(minutes='40.0')}\n"


# ------------------------------------------------------------------------------------------- the plan

SMALL = 3.5  # times as many images of half the side are trained in a second


def real_task(**changes):
    """Return the task of the competition's file, as the cleaning leaves it, on two cores."""
    task = lib.Task(train=2505, height=64, width=128, rare=0.04, area=10068.0, frames=True, cores=2)
    return dataclasses.replace(task, **changes)


def measured(task, speed, **changes):
    """Return the plan of a small network, on all workers, with its speed in images/s."""
    workers = task.gpus * solve.Config.streams or task.cores
    plan = solve.Plan("bfloat16", workers=workers, speed=speed, small_speed=SMALL * speed)
    return dataclasses.replace(plan, **changes)


def make_plan(cores=2, gpus=0, speed=435.0, hours=1.0, ranks=1, sizes=solve.SIZES, flags=(), **changes):
    """Return task and plan of a machine that trains so many images of width 16 a second."""
    task = real_task(cores=cores, gpus=gpus, ranks=ranks, **changes)
    cfg = solve.parse([*flags])
    return cfg, task, solve.make_plan(cfg, task, measured(task, speed), 3600.0 * hours, sizes)


# cores, GPUs, images/s of all workers at once at width 16, hours →
# folds, seeds, width, around, epochs, workers, threads
PLANS = [
    # one core
    (1, 0, 220, 0.05, (2, 1, 8, 0, (24, 2), 1, 1)),
    (1, 0, 220, 0.25, (3, 1, 16, 0, (35, 4), 1, 1)),
    (1, 0, 220, 1, (4, 1, 16, 0, (96, 10), 1, 1)),
    (1, 0, 220, 11, (5, 2, 32, 32, (88, 9), 1, 1)),
    # two cores
    (2, 0, 435, 0.05, (3, 1, 12, 0, (12, 1), 2, 1)),
    (2, 0, 435, 0.25, (4, 1, 16, 0, (53, 5), 2, 1)),
    (2, 0, 435, 1, (5, 1, 16, 32, (96, 10), 2, 1)),
    (2, 0, 435, 11, (5, 4, 32, 32, (87, 9), 2, 1)),
    # sixteen cores
    (16, 0, 3000, 0.05, (4, 1, 16, 0, (30, 3), 4, 4)),
    (16, 0, 3000, 0.25, (5, 1, 16, 32, (85, 8), 5, 3)),
    (16, 0, 3000, 1, (5, 4, 24, 32, (89, 9), 16, 1)),
    (16, 0, 3000, 11, (5, 8, 32, 32, (96, 10), 16, 1)),
    # a slow GPU (T4)
    (4, 1, 2500, 0.05, (4, 1, 16, 0, (47, 5), 4, 1)),
    (4, 1, 2500, 0.25, (5, 1, 16, 32, (96, 10), 5, 1)),
    (4, 1, 2500, 1, (5, 2, 32, 32, (91, 9), 5, 1)),
    (4, 1, 2500, 11, (5, 8, 32, 32, (96, 10), 5, 1)),
    # two slow GPUs
    (4, 2, 5000, 0.05, (4, 1, 16, 0, (75, 8), 4, 1)),
    (4, 2, 5000, 0.25, (5, 1, 24, 32, (96, 10), 5, 1)),
    (4, 2, 5000, 1, (5, 4, 32, 32, (91, 9), 10, 1)),
    (4, 2, 5000, 11, (5, 8, 32, 32, (96, 10), 10, 1)),
    # a fast GPU
    (16, 1, 15000, 0.05, (5, 2, 16, 32, (83, 8), 5, 1)),
    (16, 1, 15000, 0.25, (5, 3, 32, 32, (91, 9), 5, 1)),
    (16, 1, 15000, 1, (5, 8, 32, 32, (96, 10), 5, 1)),
    (16, 1, 15000, 11, (5, 8, 32, 32, (96, 10), 5, 1)),
    # two fast GPUs
    (16, 2, 30000, 0.05, (5, 2, 24, 32, (83, 8), 10, 1)),
    (16, 2, 30000, 0.25, (5, 7, 32, 32, (77, 8), 10, 1)),
    (16, 2, 30000, 1, (5, 8, 32, 32, (96, 10), 10, 1)),
    (16, 2, 30000, 11, (5, 8, 32, 32, (96, 10), 10, 1)),
]


@pytest.mark.parametrize("cores, gpus, speed, hours, chosen", PLANS)
def test_what_the_plan_chooses(cores, gpus, speed, hours, chosen):
    """The table of what a machine and a time get of the competition's data."""
    _, _, plan = make_plan(cores, gpus, speed, hours)
    size = (plan.folds, plan.seeds, plan.width, plan.around)
    assert (*size, plan.epochs, plan.workers, plan.threads) == chosen


MACHINES = [(1, 0, 220.0), (2, 0, 120.0), (2, 0, 435.0), (4, 0, 800.0), (16, 0, 3000.0), (4, 1, 2500.0),
            (4, 2, 5000.0), (16, 1, 15000.0), (16, 2, 30000.0)]
HOURS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 11)


def seconds_of(cfg, task, plan):
    """Return what the plan expects of the whole run: all epochs of a rank's networks, and predictions."""
    one = sum(solve.epoch_seconds(cfg, plan, stage, epoch, plan.epochs[stage - 1])
              for stage in (1, 2) for epoch in range(1, plan.epochs[stage - 1] + 1))
    return task.networks(plan.folds, plan.seeds) * one / plan.workers + plan.predict_seconds


@pytest.mark.parametrize("recipe", ["best", "paper"])
@pytest.mark.parametrize("hours", HOURS)
@pytest.mark.parametrize("cores, gpus, speed", MACHINES)
def test_the_plan_fits_into_the_time(cores, gpus, speed, hours, recipe):
    """Whenever more is planned than the least, all epochs of all networks and all predictions end before the
    time is over, and no epoch more of stage 1 than the recipe has."""
    cfg, task, plan = make_plan(cores, gpus, speed, hours, flags=["--recipe", recipe])
    assert 1 <= plan.epochs[0] <= cfg.most_epochs and plan.epochs[1] >= 1
    if plan.epochs[0] > 1:
        assert seconds_of(cfg, task, plan) <= 3600 * hours


@pytest.mark.parametrize("cores, gpus, speed, hours, flags", [
    (2, 0, 120.0, 0.032, []),
    (2, 0, 120.0, 0.204, ["--folds", "5", "--width", "16"]),
    (2, 0, 120.0, 0.305, ["--width", "24", "--seeds", "2"]),
    (1, 0, 220.0, 0.173, ["--width", "24", "--seeds", "2"])])
def test_a_few_epochs_nearly_fit(cores, gpus, speed, hours, flags):
    """Of two to four epochs stage 2 has more than its tenth, as it has one at least, and whole images more
    than their third: a plan is at most a quarter too long then, and the timetable takes an epoch away."""
    cfg, task, plan = make_plan(cores, gpus, speed, hours, flags=flags)
    assert 1 < plan.epochs[0] < 5 and seconds_of(cfg, task, plan) <= 1.25 * 3600 * hours


@pytest.mark.parametrize("cores, gpus, speed", MACHINES)
def test_more_time_is_more_work(cores, gpus, speed):
    """With more hours the seconds of work that are planned, which stand for folds, seeds, width, windows and
    epochs together, never get fewer."""
    seconds = [seconds_of(*make_plan(cores, gpus, speed, hours)) for hours in HOURS]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("cores, gpus, speed", MACHINES)
def test_workers_and_threads_never_ask_for_more_than_there_is(cores, gpus, speed):
    """As many workers as networks at most, five on a GPU, all their threads on the cores there are."""
    for hours in HOURS:
        plan = make_plan(cores, gpus, speed, hours)[2]
        assert 1 <= plan.workers <= min(plan.folds * plan.seeds, 5 * gpus or cores)
        assert plan.threads == 1 if gpus else plan.workers * plan.threads <= cores


def test_flags_win():
    """What is asked for is planned, whatever it costs; what is not follows from the time."""
    flags = ["--folds", "7", "--seeds", "2", "--width", "20", "--epochs", "5"]
    for hours in (0.01, 100):
        plan = make_plan(hours=hours, flags=flags)[2]
        assert (plan.folds, plan.seeds, plan.width, plan.epochs) == (7, 2, 20, (5, 5))
    assert make_plan(hours=0.01, flags=["--epochs", "5"])[2].folds == 2
    assert make_plan(hours=100, flags=["--stages", "1"])[2].epochs == (96, 0)
    assert make_plan(hours=100, flags=["--folds", "3"])[2].folds == 3
    assert make_plan(train=3)[2].folds <= 3  # never more than images


def test_what_lies_around_a_tile_is_left_out_where_there_is_nothing():
    """Without frames windows are the tiles in any time, and beyond small tiles at most half their side."""
    assert make_plan(hours=11)[2].around == 32
    assert make_plan(hours=11, frames=False)[2].around == 0
    assert make_plan(hours=11, height=24)[2].around == 12
    assert make_plan(hours=11, flags=["--recipe", "paper"], frames=False)[2].around == 0


def test_windows_are_the_tiles_unless_many_epochs_fit():
    """However few epochs are asked for, windows reach beyond their tiles where 84 would fit, and so they do
    of 400 only where there is time for those."""
    few, many = (["--epochs", epochs] for epochs in ("5", "400"))
    assert [make_plan(hours=hours, flags=few)[2].around for hours in (1, 2)] == [0, 32]
    assert [make_plan(hours=hours, flags=many)[2].around for hours in (4, 11)] == [0, 32]


def test_two_ranks_have_time_for_twice_the_epochs():
    """Of one size, each rank as fast as the one alone: half the networks each, twice the epochs, or one more
    of them."""
    sizes = [(4, 16, 16, 0)]
    one, two = (make_plan(speed=200.0, hours=0.4, ranks=ranks, sizes=sizes)[2] for ranks in (1, 2))
    assert 10 < one.epochs[0] and two.epochs[0] < 96
    assert 2 * one.epochs[0] <= two.epochs[0] <= 2 * one.epochs[0] + 1


def test_workers_are_shared_by_a_ranks_own_networks():
    """5 networks on 2 ranks of 16 cores each: 3 a rank, 5 threads each."""
    plan = make_plan(cores=16, speed=3000.0, ranks=2, sizes=[(5, 16, 0, 0)], flags=["--seeds", "1"])[2]
    assert (plan.workers, plan.threads) == (3, 5)


def test_a_plan_is_a_pure_function_of_what_was_measured():
    """The same input, the same plan, nothing else is changed, and nobody can change it later."""
    task = real_task()
    before, cfg = measured(task, 435.0), solve.parse([])
    plans = [solve.make_plan(cfg, task, before, 3600.0) for _ in range(2)]
    assert plans[0] == plans[1] and before == measured(task, 435.0) and task == real_task()
    for frozen, name in ((plans[0], "epochs"), (task, "cores"), (cfg, "folds")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 3)


def test_two_of_five_workers_are_faster_than_two_fifths():
    """On a GPU that five workers keep busy two have (2/5) ** .4 = .693 of their speed, on CPUs .4 of it."""
    two, five = (solve.Plan("bfloat16", workers=workers) for workers in (2, 5))
    for gpus, share in ((1, 0.693), (0, 0.4)):
        task = real_task(cores=5, gpus=gpus)
        assert task.relative_speed(two) / task.relative_speed(five) == pytest.approx(share, abs=5e-4)


def test_the_work_of_an_epoch_is_counted_by_hand():
    """1,000 images, 4 folds, 2 workers that train 100 images/s together: 750 are trained on, by a worker of
    50/s: 15 s; images shown 1.2 times: 18 s; of one split a seventh is validated: 6/7 of 20 s."""
    task = lib.Task(1000, 0, 64, 64, 100.0, False, cores=2)
    plan = solve.Plan("float32", folds=4, workers=2)
    assert task.epoch_seconds(plan, 100.0, 1.0) == pytest.approx(15)
    assert task.epoch_seconds(plan, 100.0, 1.2) == pytest.approx(18)
    one = dataclasses.replace(plan, folds=1)
    assert task.epoch_seconds(one, 100.0, 1.0) == pytest.approx(20 * 6 / 7)


def test_the_work_of_predictions_is_counted_by_hand():
    """An area of 100 tiles, 4 folds × 2 seeds, 2 stages, 2 views: 3,200 tiles at .3 of the price of one of
    100/s, 9.6 s, and 400 × 4 ms on two cores; windows of 2.25 tiles, 40/s, are 90 tiles/s."""
    task = lib.Task(1000, 0, 64, 64, 100.0, True, cores=2)
    plan = solve.Plan("float32", folds=4, seeds=2, workers=2)
    assert task.predict_seconds(plan, 100.0, 2, 2) == pytest.approx(9.6 + 0.8)
    wider = dataclasses.replace(plan, around=32)
    assert task.predict_seconds(wider, 40.0, 2, 2) == pytest.approx(960 / 90 + 0.8)


@pytest.mark.parametrize("cores, gpus, folds, seeds, workers, threads", [
    (16, 1, 4, 1, 4, 1), (16, 1, 4, 2, 5, 1), (16, 2, 4, 3, 10, 1), (2, 0, 4, 3, 2, 1), (16, 0, 5, 1, 5, 3)])
def test_workers_and_threads_by_hand(cores, gpus, folds, seeds, workers, threads):
    """Five networks at once on each GPU, if there are so many; on CPUs a core each, or several for each."""
    shared = real_task(cores=cores, gpus=gpus).share_cores(folds, seeds, 5)
    assert shared == {"workers": workers, "threads": threads}


# ------------------------------------------------------------------------------------ rate and sizes


def rates(cfg, stage, epochs):
    """Return the learning rates of all epochs."""
    return [solve.learning_rate(cfg, stage, epoch, epochs) for epoch in range(1, epochs + 1)]


def test_the_rate_is_counted_by_hand():
    """Stage 1: constant, and over the last four of ten epochs it falls; stage 2 goes on with a quarter of it
    and falls from the start; as published it is constant, and falls by the validation alone."""
    best, paper = solve.parse([]), solve.parse(["--recipe", "paper"])
    assert rates(best, 1, 10) == pytest.approx([2e-3] * 7 + [1.5e-3, 1e-3, 5e-4])
    assert rates(best, 2, 5) == pytest.approx([5e-4, 4e-4, 3e-4, 2e-4, 1e-4])
    assert rates(best, 1, 1) == [2e-3] and rates(best, 2, 1) == [5e-4]
    assert rates(paper, 1, 3) == rates(paper, 2, 3) == [5e-4] * 3
    assert rates(solve.parse(["--lr", "0.01"]), 1, 5) == pytest.approx([1e-2] * 4 + [5e-3])


def test_small_images_come_first():
    """Two thirds of stage 1's epochs, rounded down, are on small images, none of stage 2's, none of the
    published system's; one epoch alone is on whole ones."""
    best, paper = solve.parse([]), solve.parse(["--recipe", "paper"])

    def small(cfg, stage, epochs):
        return [solve.is_small(cfg, stage, epoch, epochs) for epoch in range(1, epochs + 1)]

    assert small(best, 1, 10) == [True] * 6 + [False] * 4
    assert small(best, 1, 3) == [True, True, False]
    assert small(best, 1, 1) == [False]
    assert not any(small(best, 2, 10) + small(paper, 1, 10))


def test_an_epoch_costs_what_its_images_cost():
    """Of stage 1's epochs the small ones are cheaper, and a stage has its own price."""
    cfg, plan = solve.parse([]), solve.Plan("float32", epoch_seconds=((1.0, 4.0), (6.0, 6.0)))
    assert [solve.epoch_seconds(cfg, plan, 1, epoch, 3) for epoch in (1, 2, 3)] == [1.0, 1.0, 4.0]
    assert solve.epoch_seconds(cfg, plan, 2, 1, 3) == 6.0


@pytest.mark.parametrize("images, size", [(5000, 32), (512, 32), (256, 16), (32, 4), (3, 4)])
def test_few_images_get_smaller_steps(images, size):
    """A 16th of the images a step, four at least, 32 at most."""
    assert solve.batch_size(solve.parse([]), images) == size


# ----------------------------------------------------------------------- devices, precision, memory


@pytest.fixture
def two_gpus(monkeypatch):
    """PyTorch as it is where there are two GPUs of capability 7.5; returns the set of those that fail at
    their first kernel, for the test to fill. What is computed on them is computed on the CPU."""
    broken, zeros, conv = set(), torch.zeros, torch.nn.Conv2d

    def on_gpu(make):
        def made(*args, device=None, **kwargs):
            if device is not None and torch.device(device).index in broken:
                raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")
            return make(*args, **kwargs)

        return made

    monkeypatch.setattr(torch, "zeros", on_gpu(zeros))
    monkeypatch.setattr(torch.nn, "Conv2d", on_gpu(conv))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return broken


def test_all_usable_gpus_are_taken(two_gpus, monkeypatch):
    """auto and cuda: both; cuda:1: that one; each is named."""
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert lib.pick_devices() == lib.pick_devices("cuda") == (both, "GPU 0, GPU 1")
    assert lib.pick_devices("cuda:1") == (both[1:], "GPU 1")
    assert lib.pick_devices("cpu") == ([CPU], "asked for")


def test_the_weaker_of_two_gpus_comes_first(two_gpus, monkeypatch):
    """Its type of numbers is one that the other one has too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 - device.index, 0))
    assert [device.index for device in lib.pick_devices()[0]] == [1, 0]


def test_an_unusable_gpu_is_left_out(two_gpus):
    """One of two that fails at its first kernel is not used; where both fail it is the CPU, and why."""
    two_gpus.add(0)
    assert lib.pick_devices() == ([torch.device("cuda", 1)], "GPU 1")
    two_gpus.add(1)
    devices, why = lib.pick_devices()
    assert devices == [CPU] and "no kernel image" in why and "more" not in why and "T4 x2" in why


def test_ranks_of_a_machine_share_its_gpus(two_gpus, monkeypatch):
    """Two ranks have one each; of three the third takes what there is."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert lib.pick_devices()[0] == [torch.device("cuda", rank)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert len(lib.pick_devices()[0]) == 2


def test_a_gpu_asked_for_and_not_there(monkeypatch):
    """--device cuda without one is a sentence; auto takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(lib.UserError, match="--device cpu"):
        lib.pick_devices("cuda:1")
    assert lib.pick_devices()[0] == [CPU]


@pytest.mark.parametrize("capability, dtype", [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16),
                                               ((7, 5), torch.float16), ((6, 0), torch.float32)])
def test_a_gpus_precision_follows_from_its_capability(monkeypatch, capability, dtype):
    """A T4 (7.5) only emulates bfloat16, a P100 (6.0) has no fast half precision."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert lib.pick_precision(torch.device("cuda", 0))[0] == dtype
    assert lib.pick_precision(torch.device("cuda", 0), "float32")[0] == torch.float32


@pytest.mark.parametrize("seconds, dtype", [(1.0, torch.float32), (0.95, torch.float32),
                                            (0.5, torch.bfloat16)])
def test_a_cpus_precision_is_measured(monkeypatch, seconds, dtype):
    """bfloat16 where its convolution is plainly faster than float32's; in doubt float32."""
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(lib, "_conv_seconds", times.get)
    assert lib.pick_precision(CPU)[0] == dtype


def test_the_timed_convolution_takes_time():
    """Six real convolutions forward and backward are behind the figure."""
    start = time.perf_counter()
    one = lib._conv_seconds(torch.float32)
    assert 0 < one < time.perf_counter() - start


def test_freed_memory_is_kept():
    """A block of 64 MB used again and again is not fetched anew from the kernel: no page
    faults (on glibc; each of 20 fresh blocks would cost 16,384)."""
    resource = pytest.importorskip("resource")
    lib.keep_freed_memory()
    for _ in range(10):
        torch.zeros(2**24).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24).add_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if faults > 20 * 10000 and not hasattr(lib.ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library")
    assert faults < 20 * 1000


def test_a_warning_has_the_number_of_its_process(monkeypatch, capsys):
    """Alone and in rank 0 it is printed as it is, in another rank on standard error, with its number."""
    monkeypatch.delenv("RANK", raising=False)
    lib.warn("no room")
    monkeypatch.setenv("RANK", "0")
    lib.warn("no room")
    monkeypatch.setenv("RANK", "3")
    lib.warn("no room")
    assert capsys.readouterr() == ("no room\nno room\n", "rank 3: no room\n")
