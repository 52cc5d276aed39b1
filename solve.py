"""From the competition's file to a checked submission.csv, in one go.

    python solve.py --data data/                the whole run; after a kill the same command goes on
    python solve.py --data m.npz --max-hours 1  planned: a submission exists within the hour
    python solve.py --data m.npz --test t.npz   another test set, by the networks of a finished run
    python solve.py --recipe paper              the published system, measured with both metrics

load ─ check ─ clean ─ frames ─ folds ─ stage 1 ─ context of the frames ─ stage 2 ─ submit ─ report

This file is what we decided; what is true of the task is in lib.py.
"""
from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

try:
    import cv2
    import numpy as np
    import torch

    import lib
    from lib import NUM_CLASSES, StageInput, Task, TrainingState, UserError, option, relative_speed
except ImportError as e:
    print(f"solve.py: {e}: pip install -r requirements.txt; where libGL is missing, uninstall "
          "opencv-python and install opencv-python-headless", file=sys.stderr)
    sys.exit(2)

# ---------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    """Every choice of a run. Fields made by option() are flags."""

    data: str = option("data", "the competition's .npz, or the folder that holds it",
                       group="input and output")
    out: str = option("submission", "folder for everything that is written")
    test: str = option("", "predict this file's test_set with the finished run in --out")
    save_probs: bool = option(False, "write probabilities.npz too, for ensembles")
    recipe: str = option("best", "best: ours; paper: the published system", ("best", "paper"))
    max_hours: float = option(11.0, "limit of all starts; a submission exists by then", most=9999)
    seed: int = option(0, "seed of everything random", most=2**63 - 1)
    fresh: bool = option(False, "delete the run in --out and begin anew")
    clean: bool = option(True, "keep outliers in the training set", group="cleaning and frames")
    template: str = option("", "picture of an outlier, instead of those discovered")
    frames: bool = option(True, "don't reassemble camera frames from the tiles")
    device: str = option("auto", "auto, cpu, cuda (all) or cuda:N", group="engine")
    precision: str = option("auto", "auto, bfloat16, float16 or float32",
                            ("auto", "bfloat16", "float16", "float32"))
    folds: int = option(0, "of the cross-validation; 1: a single 15 %% validation split",
                        most=99, group="size of the work; 0: planned from speed and --max-hours")
    seeds: int = option(0, "networks per fold and stage, averaged", most=99)
    width: int = option(0, "channels of the U-Net's first level (the paper: 64)", most=1024)
    epochs: int = option(0, "epochs of each network of each stage", most=99999)
    stages: int = option(2, "1: no second stage", (1, 2))
    batch_size: int = option(32, "images per step", least=1, most=4096, group="training")
    lr: float = option(2e-3, "learning rate of AdamW", least=1e-9, most=0.999)
    gamma: float = option(0.0, "focal loss: exponent γ (0: cross-entropy)", most=20)
    patience: int = option(20, "stop after so many epochs without a better validation", least=1)
    # what tells the recipes apart and nobody would sweep
    alpha: float = 1.0            # factor of the focal loss
    oversample: int = 3           # how often stage 1 sees images of a rare class
    copy_paste: float = 0.5       # share of images, half-sized if any are, with rare classes pasted
    ema_decay: float = 0.99       # weight averaging per step; 0: off
    second_lr: float = 0.25       # stage 2's rate, a share of lr: it goes on with stage 1's weights
    second_epochs: float = 0.1    # stage 2's epochs, a share of stage 1's
    first_class: int = 1          # 0: background too is learnt and predicted; 1: it is ignored
    refine: str = "correct"       # stage 2 corrects common classes, or fills in "background" alone
    monitor: str = "score"        # the validation's mean IoU or its "loss" picks weights and stop
    geometric: tuple = (0.1, 0.25, 8.0)  # shift, scale, degrees
    jitter: float = 0.2           # brightness and contrast
    flip_vertical: bool = False   # no camera frame is upside down
    tta: bool = True              # stage 1: mean with the mirrored copy
    most_epochs: int = 96         # of stage 1; of 200 only common classes gain
    weight_decay: float = 1e-2
    cooldown: float = 0.4         # share of the epochs, the last, of falling rate; 0: by plateau
    # pairs of a rare class's factor and peak, of which the best out of fold is taken
    thresholds: tuple = ((1.0, 0.8), (2.0, 0.8), (4.0, 0.8))
    half_sized: float = 2 / 3     # of stage 1's epochs, the first ones, on images of half the side
    shuffle: int = 2              # side of the blocks of pixels that the network takes as one
    global_context: bool = True   # the bottleneck sees the mean of the whole image
    rim: int = 8                  # mirrored pixels around a frame that is predicted
    streams: int = 5              # networks trained at once on a GPU
    level_weights: tuple = (0.1, 0.1)  # of the outputs at 1/2, 1/4, …; there is a level more


RECIPES = {"best": {}, "paper": dict(
    folds=1, seeds=1, frames=False, lr=5e-4, second_lr=1.0, second_epochs=0.2, gamma=3.0,
    alpha=0.25, oversample=1, copy_paste=0.25, patience=25, ema_decay=0.0, first_class=0,
    refine="background", monitor="loss", geometric=(0.2, 0.2, 60.0), flip_vertical=True, tta=False,
    most_epochs=300, weight_decay=0.0, cooldown=0.0, thresholds=((1.0, 0.0),), half_sized=0.0,
    shuffle=1, global_context=False, level_weights=(0.2, 0.3, 0.5))}


def parse(argv: list[str]) -> Config:
    """Return the Config that the flags stand for; UserError if one is unknown or out of range."""
    given = lib.parse_flags(Config, argv, __doc__.rpartition("\n\n")[0])
    if "data" not in given and lib.KAGGLE_INPUT.is_dir():
        given["data"] = str(lib.KAGGLE_INPUT)
    return Config(**{**RECIPES[given.get("recipe", "best")], **given})


# -------------------------------------------------------------------------------- one run's facts

@dataclass(frozen=True)
class Plan:
    """How much work is done; made once, saved, and kept when a run goes on."""

    precision: str          # of autocast
    folds: int = 1
    seeds: int = 1          # networks of each fold
    width: int = 16
    padding: int = 0        # context padding: pixels of a window beyond its tile
    threads: int = 1        # of each operation on a CPU
    workers: int = 1        # of each rank, when the plan was made
    epochs: tuple = (1, 1)  # of each network of stage 1 and 2
    times: tuple = ((0.0, 1.0), (1.0, 2.0))  # shares of --max-hours: each stage's begin and end
    speed: float = 1.0      # training images/s of a rank's workers at once, as measured


@dataclass
class Step:
    """The answer after a step of the run: "stage1", "frames" or "stage2"."""

    name: str
    labels: np.ndarray      # out of fold, uint8 (N, H, W)
    probs: np.ndarray       # out of fold, bytes (N, C, H, W)
    tests: np.ndarray       # labels of the test set, uint8 (M, H, W)
    test_probs: np.ndarray  # bytes (M, C, H, W)
    thresholds: np.ndarray  # (2, C) of lib.apply_thresholds, for test_probs


@dataclass
class Run:
    """What every part of a run needs to know. Images and masks are those that the cleaning kept."""

    cfg: Config
    state: Path  # the folder of checkpoints, in --out
    clock: lib.Clock
    ranks: lib.Ranks
    lock: object                # keeps other runs out of the folder as long as it lives
    data: lib.Data
    is_rare: np.ndarray         # bool (NUM_CLASSES,): under 2 % of the labelled pixels
    place: np.ndarray | None    # (3, N + M): frame, row and column of training and test tiles
    workers: lib.Workers        # train and predict
    helpers: lib.Workers        # do what no network does, on all cores
    plan: Plan
    fold_of: np.ndarray         # (N,)
    tiles: StageInput = None    # of stage 1, on the device
    metrics: dict = field(default_factory=dict)    # what metrics.json holds
    histories: dict = field(default_factory=dict)  # (stage, net) → list of epochs
    steps: list[Step] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.plan.precision)


def first_input(run: Run) -> StageInput:
    """Return all tiles on the device, in their frames, with the labels of the training tiles."""
    cfg = run.cfg
    # after half-sized images with patches come whole ones as they are: those will be predicted
    paste = 0.0 if cfg.half_sized else cfg.copy_paste
    return StageInput.of_tiles(run.data, run.place, run.fold_of, run.is_rare, cfg.rim,
                               run.plan.padding, cfg.first_class, paste, run.workers.devices[0])


# ------------------------------------------------------------------------- one network's training

def stage_progress(run: Run, stage: int, epoch: int = 0) -> float:
    """Return how much of a stage's training is over, 0 to 1, after so many epochs: of the planned
    epochs or, when time is short, of the planned time. Rate, image size and end follow from it."""
    begin, end = run.plan.times[stage - 1]
    time_over = (run.clock.used() / run.clock.limit - begin) / (end - begin)
    return max(epoch / run.plan.epochs[stage - 1], min(1.0, time_over))


def learning_rate(cfg: Config, stage: int, progress: float, history: list[dict]) -> float:
    """Return the rate of an epoch that begins at a stage's progress: constant, then it falls to 0,
    in a stage 2 that goes on from the start; as published, .6 times after each plateau."""
    rate = cfg.lr * (cfg.second_lr if stage == 2 else 1.0)
    if not cfg.cooldown:
        figures = [record["figure"] for record in history]
        return max(1e-6, rate * 0.6 ** lib.count_plateaus(figures, cfg.patience * 7 // 25))
    cooldown = 1.0 if stage == 2 and cfg.refine == "correct" else cfg.cooldown
    return rate * min(1.0, (1 - progress) / cooldown)


def new_network(run: Run, stage: int, net: int, channels: int = 1,
                parent: lib.UNet | None = None) -> TrainingState:
    """Return a network to train; its first weights are the parent's, where there is one, or depend
    on (seed, stage, net) alone. A second network that goes on never predicts a rare class."""
    cfg, (seed, fold) = run.cfg, divmod(net, run.plan.folds)  # of net, everywhere
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lib.seed_of(cfg.seed, stage, net, 0))
        model = lib.UNet(channels, NUM_CLASSES - cfg.first_class, run.plan.width,
                         len(cfg.level_weights) + 1, cfg.shuffle, cfg.global_context)
    if parent is not None:
        model.initialise_from(parent)
        model.mask_classes(torch.from_numpy(run.is_rare[cfg.first_class:]))
    path = run.state / f"stage{stage}_fold{fold}{f'_seed{seed}' if seed else ''}.pt"
    devices = list(dict.fromkeys(run.workers.devices))  # each rank's networks in turn
    device = devices[net // run.ranks.world % len(devices)]
    return TrainingState.begin(path, model, device, run.dtype, cfg.weight_decay, cfg.ema_decay)


def batch_size(cfg: Config, images: int) -> int:
    """Return the images a step: few images get smaller steps, not fewer."""
    return min(cfg.batch_size, max(4, images // 16))


def training_batch(run: Run, data: StageInput, fold: int, tiles: torch.Tensor,
                   donors: torch.Tensor, gen: torch.Generator) -> lib.Batch:
    """Return an augmented batch of windows around tiles, without the labels of a fold. Rare classes
    are pasted from windows around donors, tiles of the same split."""
    cfg = run.cfg
    x, y = data.windows(tiles, gen, fold)
    if data.paste and len(donors):
        pick = donors[torch.randint(len(donors), (len(tiles),), device=x.device, generator=gen)]
        donor_x, donor_y = data.windows(pick, gen, fold)
        donor_y = torch.where(data.is_rare[donor_y.clamp_min(0).int()], donor_y, 0)
        x, y = lib.copy_paste(x, y, donor_x, donor_y, gen, data.paste)
    x, y = lib.flip(x, y, -1, gen)
    if cfg.flip_vertical:
        x, y = lib.flip(x, y, -2, gen)
    x, y = lib.affine(x, y, gen, *cfg.geometric)
    x = lib.jitter(x, gen, cfg.jitter)
    return x.contiguous(memory_format=torch.channels_last), y


def loss_of(cfg: Config, logits: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Return the loss of a network's outputs, in training and in validation alike. Target -1 is
    ignored; 0 is the first class that is learnt."""
    return lib.deep_supervision_loss(logits, target, cfg.level_weights, gamma=cfg.gamma,
                                     alpha=cfg.alpha)


def training_step(run: Run, network: TrainingState, data: StageInput, fold: int,
                  donors: torch.Tensor) -> lib.Replayed:
    """Return what trains a network on a batch of tiles, without the labels of a fold."""
    cfg, gen = run.cfg, network.generator

    def step(tiles: torch.Tensor) -> None:
        x, y = training_batch(run, data, fold, tiles, donors, gen)
        target = (y.long() - cfg.first_class).clamp_min(-1)  # below the first class: ignored

        network.step(x, run.dtype, lambda logits: loss_of(cfg, logits, target))

    return lib.Replayed(step, gen)


def train_one_epoch(run: Run, network: TrainingState, data: StageInput, tiles: torch.Tensor,
                    key: tuple[int, int, int], most_steps: int | None = None) -> float:
    """Train on all tiles, those of a rare class oversampled, in the order of key = (stage, net,
    epoch), and return the mean loss. The end of the stage's time ends it between two steps."""
    cfg, size = run.cfg, batch_size(run.cfg, len(tiles))
    gen = network.generator.manual_seed(lib.seed_of(cfg.seed, *key))
    donors = tiles[data.holds_rare[tiles]]
    order = torch.cat([tiles, donors.repeat(cfg.oversample - 1)])
    order = order[torch.randperm(len(order), device=order.device, generator=gen)]
    steps = range(-(-len(order) // size))[:most_steps]
    order = order.repeat(2 + size // len(order))  # to fill up the last batch
    if data not in network.steps:
        network.steps = {data: training_step(run, network, data, key[1] % run.plan.folds, donors)}
    network.model.train()
    network.sums.zero_()
    for i in steps:
        run.workers.check()
        if i and stage_progress(run, key[0]) >= 1:
            break
        network.steps[data](order[i * size:(i + 1) * size])
    loss, good_steps = network.sums.tolist()
    if not good_steps and stage_progress(run, key[0]) < 1:
        raise UserError("not one step had a finite gradient")
    return loss / max(1, good_steps)


def validate(run: Run, network: TrainingState, data: StageInput, tiles: torch.Tensor) -> dict:
    """Return lib.evaluate's figures of the averaged weights on tiles, and the "figure" that
    decides on the best weights, the higher the better."""
    batches = (data.windows(part) for part in tiles.split(64))
    record = lib.evaluate(network.ema.model, batches, run.dtype, run.cfg.first_class,
                          lambda logits, target: loss_of(run.cfg, logits, target))
    figure = record["score"] if run.cfg.monitor == "score" else -record["val_loss"]
    return record | {"figure": figure if np.isfinite(figure) else -1e9}  # nothing is labelled


def next_epoch(run: Run, stage: int, net: int, network: TrainingState, inputs: dict) -> None:
    """Train a network for its next epoch, validate it, and note what came of it."""
    cfg, start, epoch = run.cfg, time.monotonic(), len(network.history) + 1
    progress = stage_progress(run, stage, epoch - 1)
    half_sized = stage == 1 and progress < cfg.half_sized
    data = inputs["half" if half_sized else "whole"][network.device]
    own = run.fold_of == net % run.plan.folds
    train = torch.from_numpy(np.flatnonzero(~own)).to(network.device)
    val = torch.from_numpy(np.flatnonzero(own)).to(network.device)
    if stage == 2 and cfg.refine == "correct" and epoch == 1:  # stage 1's weights may stay best
        network.keep_if_best(validate(run, network, data, val)["figure"])
    lr = learning_rate(cfg, stage, progress, network.history)
    network.set_lr(lr)
    loss = train_one_epoch(run, network, data, train, (stage, net, epoch))
    record = {"loss": loss, "lr": lr, **validate(run, network, data, val)}
    network.history.append(record | {"seconds": time.monotonic() - start})
    # of half-sized images the last epoch is the best, until there is one of whole images
    network.keep_if_best(-np.inf if half_sized else record["figure"])
    in_vain = epoch - network.best_epoch
    network.finished = in_vain >= cfg.patience or stage_progress(run, stage, epoch) >= 1


def train_stage(run: Run, stage: int, data: StageInput,
                parents: list[list[lib.UNet]] | None = None) -> list[list[lib.UNet]]:
    """Train all networks of a stage side by side, each rank its share, from their fold's parents
    if there are any; return each fold's with their best weights."""
    cfg, plan, ranks = run.cfg, run.plan, run.ranks
    channels = data.windows(data.fold_of[:1] * 0)[0].shape[1]
    networks = [new_network(run, stage, net, channels,
                            parents[net % plan.folds][net // plan.folds] if parents else None)
                for net in range(plan.folds * plan.seeds)]
    mine = networks[ranks.rank::ranks.world]
    for network in mine:
        network.resume()
    devices = set(run.workers.devices)
    inputs = {"whole": {device: data.to(device) for device in devices}}
    if stage == 1 and cfg.half_sized:
        half = data.halved(cfg.copy_paste)
        inputs["half"] = {device: half.to(device) for device in devices}

    def advance(network: TrainingState) -> None:
        next_epoch(run, stage, networks.index(network), network, inputs)

    progress = lib.Progress(f"stage {stage}", mine, plan.epochs[stage - 1],
                            lambda: run.clock.minutes_until(plan.times[stage - 1][1]))
    lib.train_side_by_side(mine, advance, run.workers, progress)
    for net, network in enumerate(networks):  # each rank's to all
        own = network.state_dict() if network in mine else {}
        network.load_state_dict(ranks.share(own, net % ranks.world))
    run.histories |= {(stage, net): network.history for net, network in enumerate(networks)}
    models = [network.best_network() for network in networks]
    return [models[fold::plan.folds] for fold in range(plan.folds)]


# --------------------------------------------------------------------------------------- the plan

# folds, width, context padding in pixels, epochs that there must be time for; the best come first
SIZES = ((5, 32, 32, 135), (5, 24, 32, 96), (5, 16, 32, 84), (4, 16, 32, 60), (4, 16, 0, 22),
         (3, 16, 0, 17), (3, 12, 0, 12), (2, 12, 0, 11), (2, 8, 0, 0))


def make_plan(cfg: Config, task: Task, measured: Plan, used: float, limit: float) -> Plan:
    """Return the Plan of what fits into the time, in seconds, given one of measured speed."""
    seconds = limit - used
    max_padding = min(task.height, task.width) // 2 * task.frames
    half = 2 / 7  # of the time of a whole image a half-sized one takes; measured .27 to .37
    later = 1.5 * (task.shown if cfg.refine == "background" else 1)  # stage 2's input costs more
    second_epochs = 1.0 if cfg.epochs else cfg.second_epochs         # a share of stage 1's

    def draft(folds: int, seeds: int, width: int, padding: int) -> tuple[Plan, float]:
        """Return a plan of this size, and how many epochs of stage 1 there is time for."""
        networks = -(-folds * seeds // task.ranks)
        workers = min(networks, task.gpus * cfg.streams or task.cores)
        plan = replace(measured, folds=folds, seeds=seeds, width=width, padding=padding,
                       workers=workers, threads=1 if task.gpus else task.cores // workers)
        speed = measured.speed * relative_speed(task, plan) / relative_speed(task, measured)
        trained = task.images * (1 - 1 / (folds if folds > 1 else 7))
        whole = task.shown * trained * workers / speed  # a worker's seconds
        tile = (task.height * task.width) / ((task.height + padding) * (task.width + padding))
        views = seeds * (cfg.stages + cfg.tta)  # of stage 1 the mirror images too
        predict = 1.4 * task.area * folds * (0.3 * views * tile / speed + 5e-3 / task.cores)
        training = max(1.0, 0.97 * seconds - predict)  # 1.4: the machine may be busier then
        cost = whole * (1 - (1 - half) * cfg.half_sized)  # of an epoch, and its share of stage 2
        later_cost = later * trained * workers / speed * second_epochs * (cfg.stages - 1)
        affordable = 0.95 * training / ((cost + later_cost) * networks / workers)
        first = cfg.epochs or max(1, min(cfg.most_epochs, int(affordable)))
        epochs = first, max(1, round(first * second_epochs))
        lasts = training / (cost + later_cost) * np.array([cost, later_cost])
        ends = (np.cumsum([used, lasts[0], predict * 2 / 3, lasts[1]]) / limit).tolist()
        return replace(plan, epochs=epochs, times=(tuple(ends[:2]), tuple(ends[2:]))), affordable

    for folds, width, padding, least in SIZES:
        least = max(least, cfg.epochs) if padding else least  # tiles alone unless they fit
        plan, affordable = draft(cfg.folds or min(folds, task.images), cfg.seeds or 1,
                                 cfg.width or min(width, task.max_width), min(padding, max_padding))
        if affordable >= least:
            break
    while not (cfg.seeds or cfg.epochs) and plan.seeds < 8:
        larger, affordable = draft(plan.folds, plan.seeds + 1, plan.width, plan.padding)
        if affordable < 0.75 * cfg.most_epochs:
            break
        plan = larger
    return plan


def measure_speed(run: Run, data: StageInput) -> float:
    """Return the training images/s of all workers at once, validation included."""
    devices, every = run.workers.devices, len(run.data.images)
    networks = [new_network(run, 1, i * run.ranks.world) for i in range(len(devices))]
    inputs = {device: data.to(device) for device in set(devices)}

    def train(network: TrainingState, steps: int) -> int:
        images, own = steps * batch_size(run.cfg, every), inputs[network.device]
        tiles = torch.arange(every + images, device=network.device) % every
        train_one_epoch(run, network, own, tiles, (0, 0, 0), steps)
        validate(run, network, own, tiles[:-(-images // 4)])  # as many as of 4 folds
        return images

    return lib.measure_speed(run.workers, networks, train)


def plan_run(run: Run, cores: int, gpus: int) -> dict:
    """Return the plan for the time left, as a dict, from the speed of width 16, on GPUs 32."""
    cfg, data = run.cfg, run.data
    dtype, why = lib.pick_precision(run.workers.devices[0], cfg.precision)
    lib.say(f"precision: {dtype} ({why})")
    holds_rare = run.is_rare[data.masks].any((1, 2)).mean()
    frames = lib.Frames.lay_out(run.place, len(data.images) + len(data.test_images))
    tile = data.images.shape[1:]
    area = frames.area(tile, 0 if run.place is None else cfg.rim)
    task = Task(len(data.images), float(1 + holds_rare * (cfg.oversample - 1)), *tile, area,
                run.place is not None, cores, gpus, run.ranks.world)
    workers = gpus * cfg.streams or cores
    width = cfg.width or min(task.max_width, 32 if gpus else 16)
    run.plan = Plan(str(dtype).removeprefix("torch."), width=width, workers=workers)
    run.workers = lib.Workers(run.workers.devices, workers)
    measured = replace(run.plan, speed=measure_speed(run, first_input(run)))
    return asdict(make_plan(cfg, task, measured, run.clock.used(), run.clock.limit))


# ------------------------------------------------------------------------------------- two stages

def second_input(run: Run, probs: np.ndarray, log_ratios: np.ndarray | None) -> StageInput:
    """Return stage 2's input, given each fold's probabilities, bytes (folds, T, C, H, W), and
    context, (folds, T, C, h, w)."""
    cfg, data, device = run.cfg, run.tiles, run.workers.devices[0]
    published = cfg.refine == "background"
    masks = lib.cleaned_likeliest(probs, data.frames, cfg.first_class, run.helpers.map)
    masks = torch.from_numpy(masks).to(device)
    if log_ratios is not None:
        log_ratios = torch.from_numpy(log_ratios[:, :, cfg.first_class:]).to(device)
    confidence = None if published else torch.from_numpy(probs.max(2)).to(device)
    # what stage 2 does not predict it does not learn either
    if published:
        every = torch.arange(masks.shape[1], device=device)
        ignored = masks[data.fold_of.clamp_min(0), every] != 0
    else:
        ignored = data.is_rare[data.targets.clamp_min(0).int()]
    # our networks begin with what stage 1 learnt from patches; the published ones begin anew
    return replace(data, targets=torch.where(ignored, -1, data.targets),
                   paste=cfg.copy_paste if published else 0.0, predicted=masks,
                   confidence=confidence, context=log_ratios)


def keep_first(run: Run, data: StageInput, before: np.ndarray, after: np.ndarray) -> None:
    """Change stage 2's probabilities, in place: as before are those of rare classes or, as
    published, of all that stage 1 did not call background."""
    def keep(part: slice) -> None:
        for fold in range(len(after)):
            if run.cfg.refine == "background":
                kept = data.predicted[fold, part].cpu().numpy()[:, None] != 0
                np.copyto(after[fold, part], before[fold, part], where=kept)
            else:
                first, second = (lib.from_bytes(probs[fold, part]) for probs in (before, after))
                after[fold, part] = lib.to_bytes(lib.keep_classes(first, second, run.is_rare))

    lib.map_slices(keep, after.shape[1], pmap=run.helpers.map)


def conclude(run: Run, name: str, probs: np.ndarray) -> None:
    """Score each fold's probabilities after a step, bytes (folds, T, C, H, W), out of fold, predict
    the test set by their mean, and note both in run."""
    data, frames, pmap = run.data, run.tiles.frames, run.helpers.map
    n, first = len(data.masks), run.cfg.first_class
    own = probs[run.fold_of.clip(0), np.arange(n)]  # of one split there is one network alone
    tried = np.array(run.cfg.thresholds if len(probs) > 1 else [(1.0, 0.0)])
    candidates = np.where(run.is_rare, tried[:, :, None], lib.NO_THRESHOLDS)
    of_several = [[np.inf], [0.5]]  # at most: the mean of networks never is as sure as one
    if run.plan.seeds > 1:
        candidates = np.minimum(candidates, of_several)
    labels, best = lib.decide_out_of_fold(probs, data.masks, frames, run.fold_of, candidates,
                                          first, pmap)
    thresholds = np.minimum(best, of_several)
    mean, is_test = lib.mean_of_folds(probs), np.arange(probs.shape[1]) >= n
    tests = lib.cleaned_labels(mean, frames, is_test, thresholds, first, pmap)
    scores = lib.score_folds(data.masks, labels, run.fold_of, len(probs))
    scores |= {"factors": thresholds[0].tolist(), "peaks": thresholds[1].tolist()}
    run.metrics |= {f"{name}_{key}": value for key, value in scores.items()}
    run.steps.append(Step(name, labels, own, tests[n:], mean[n:], thresholds))
    lib.say(f"{name} out of fold: {scores['miou']:.4f} ± {scores['fold_std']:.4f} mean IoU, the "
            f"paper's {scores['paper_miou']:.4f}; IoU {np.round(scores['iou'][1:], 3)}")


def add_context(run: Run, probs: np.ndarray) -> np.ndarray | None:
    """Multiply each fold's probabilities, in place, by the context of a tile's frame; return that,
    log-ratios (folds, T, C, h, w), or None where there are no frames or labels to spare."""
    if run.place is None or len(probs) == 1:
        return None
    masks = run.data.masks
    log_ratios = lib.context_log_ratios(masks, run.fold_of, run.place, run.helpers.map)
    own = run.fold_of, np.arange(len(masks))
    weight = lib.fit_context_weight(probs[own], log_ratios[own], masks, run.helpers.map)

    def reweigh(part: slice) -> None:
        for fold in range(len(probs)):
            floats = lib.from_bytes(probs[fold, part])
            floats = lib.apply_context(floats, log_ratios[fold, part], weight)
            probs[fold, part] = lib.to_bytes(floats)

    lib.map_slices(reweigh, probs.shape[1], pmap=run.helpers.map)
    conclude(run, "frames", probs)
    return log_ratios


def refine(run: Run, first: list[list[lib.UNet]], probs: np.ndarray,
           log_ratios: np.ndarray | None) -> None:
    """Train second networks on what the first predicted and the context. Ours go on from the first
    ones, and correct common classes: rare ones were seen too often by then."""
    go = any(run.state.glob("stage2*")) or (stage_progress(run, 2) < 0.8 and not run.cfg.test)
    if not run.ranks.share({"go": go})["go"]:
        lib.say("no stage 2: the time is up")
        return
    second = second_input(run, probs, log_ratios)
    networks = train_stage(run, 2, second, first if run.cfg.refine == "correct" else None)
    after = lib.predict_unseen(networks, second, run.dtype, False, run.workers)
    keep_first(run, second, probs, after)
    conclude(run, "stage2", after)


# ---------------------------------------------------------------------------------- the whole run

def load(cfg: Config) -> tuple[Config, lib.Data]:
    """Return the data, with the test set of --test if there is one, and what follows for cfg."""
    if cfg.test and (cfg.fresh or not (lib.user_path(cfg.out) / "metrics.json").exists()):
        raise UserError(f"--test: first finish the run in {cfg.out}, without --test or --fresh")
    data = lib.load_data(cfg.data, cfg.test)
    if data.path.name == "sample.npz":
        lib.say(f"THIS IS THE EMBEDDED SAMPLE {data.path}: put mars_for_students.npz beside it")
        if cfg.max_hours == Config.max_hours:  # a demonstration, unless the flag says otherwise
            cfg = replace(cfg, max_hours=0.035)
    if min(data.images.shape[1:]) < 64:  # half of that is too little: a 16th of it is nothing
        cfg = replace(cfg, half_sized=0.0)
    lib.say("\n".join(lib.describe(data)))
    return cfg, data


def open_run(cfg: Config, cores: int = 1) -> Run:
    """Return the run that cfg describes, new or gone on with: data cleaned, the plan made."""
    ranks = lib.Ranks()
    cfg, data = load(cfg)
    identity = {"data_sha256": data.sha256, "plan": [*Plan.__annotations__], **asdict(cfg)}
    for key in ("data", "out", "test", "save_probs", "fresh", "max_hours", "device"):
        del identity[key]  # may change when a run goes on
    devices, reason = lib.pick_devices(cfg.device)
    lib.say(f"device: {', '.join(map(str, devices))} ({reason})")
    state, lock = lib.open_state(lib.user_path(cfg.out), identity, cfg.fresh, ranks)
    lib.note_code(state, lib.__file__, globals().get("__file__"))
    clock = lib.Clock(state / "clock.pt", cfg.max_hours)
    helpers = lib.Workers([torch.device("cpu")], cores, 1, clock)
    if cfg.clean:
        lib.clean_data(data, state, cfg.template, cfg.seed, ranks, helpers.map)
    place = lib.find_frames(data, state, devices[0], ranks, helpers.map) if cfg.frames else None
    lib.keep_freed_memory()  # not before: the frames' peak would stay
    run = Run(cfg, state, clock, ranks, lock, data, lib.rare_classes(data.masks), place,
              lib.Workers(devices, len(devices)), helpers, Plan("float32"),
              np.full(len(data.images), -1))
    gpus = len(devices) if devices[0].type == "cuda" else 0
    made = lib.once(state / "plan.pt", ranks, lambda: plan_run(run, cores, gpus))
    run.plan = plan = Plan(**made)
    count = min(-(-plan.folds * plan.seeds // ranks.world),
                gpus * cfg.streams or max(1, cores // plan.threads))
    run.workers = lib.Workers(devices, count, plan.threads, clock)
    run.fold_of = lib.make_folds(data.images, data.masks, plan.folds, cfg.seed)
    run.tiles = first_input(run)
    lib.say(f"plan: {plan.folds} folds × {plan.seeds} seeds, width {plan.width}, context "
            f"padding {plan.padding}, {plan.epochs[0]} + {plan.epochs[1]} epochs, {count} workers, "
            f"{plan.speed:.0f} images a second")
    return run


def write_outputs(run: Run, best: Step) -> None:
    """Write the submission, then all that describes it, in which a mistake costs nothing else."""
    cfg, metrics, data, out = run.cfg, run.metrics, run.data, run.state.parent
    suffix = f"_{Path(cfg.test).stem}" if cfg.test else ""
    if len(best.tests):
        lib.submit(out / f"submission{suffix}.csv", best.tests, cfg.first_class)
    with lib.going_on(metrics):
        if len(best.tests):
            metrics |= lib.describe_test(best.tests, best.test_probs, data.test_labels)
        if cfg.save_probs:
            with lib.atomic_write(out / f"probabilities{suffix}.npz") as f:
                np.savez(f, out_of_fold=best.probs, test=best.test_probs,
                         thresholds=best.thresholds, place=run.tiles.frames.place.cpu())
    metrics["minutes"] = round(run.clock.used() / 60, 2)
    with lib.going_on(metrics):
        if not suffix:
            facts = {**lib.fingerprint(data), **asdict(cfg), **asdict(run.plan)}
            labels = {step.name: step.labels for step in run.steps}
            lib.write_report(out, metrics, run.histories, facts, data, run.fold_of >= 0, labels,
                             lib.from_bytes(best.probs.max(1)), run.place, best.tests, run.is_rare)
    lib.write_json(out / f"metrics{suffix}.json", metrics)
    lib.say("written:", *sorted(map(str, out.glob("*.*"))))


def solve(cfg: Config, cores: int = 1) -> dict:
    """Run everything and return the metrics that metrics.json holds; a rank but the first: none."""
    run = open_run(cfg, cores)
    planned = ("folds", "seeds", "width", "padding", "epochs", "precision")
    run.metrics |= {"recipe": cfg.recipe, **{name: getattr(run.plan, name) for name in planned}}
    first = train_stage(run, 1, run.tiles)
    probs = lib.predict_unseen(first, run.tiles, run.dtype, cfg.tta, run.workers)
    conclude(run, "stage1", probs)
    lib.warn_of_chance(run.metrics["stage1_miou"], run.data.masks)
    with lib.going_on(run.metrics):
        log_ratios = add_context(run, probs)
        if cfg.stages == 2:
            refine(run, first, probs, log_ratios)
    if run.ranks.rank:
        return {}
    best = max(run.steps, key=lambda step: run.metrics[f"{step.name}_miou"])
    best = run.steps[-1] if cfg.refine == "background" else best  # as published
    run.metrics["submitted"] = best.name
    write_outputs(run, best)
    return run.metrics


def main(argv: list[str]) -> int:
    """Run the command line argv; return its exit status: 0, 2 a user's mistake, 3 a failure
    after stage 1, in spite of which there is a submission, 130 Ctrl-C, 143 SIGTERM."""
    def command() -> int:
        # beside busy processes the threads of an operation wait for one another, and sums of one
        # thread are the same on every machine; the cores are shared by our own workers
        cores = torch.get_num_threads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        try:
            metrics = solve(parse(argv), cores)
        finally:
            torch.set_num_threads(cores)
        for key, value in metrics.items():
            if not key.endswith("confusion"):
                lib.say(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")
        return 3 if "degraded" in metrics else 0

    return lib.run_command(command)


if __name__ == "__main__":
    if "__file__" in globals():
        sys.exit(main(sys.argv[1:]))
    main([])  # pasted into a notebook: sys.argv belongs to the kernel
