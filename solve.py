"""From the competition's file to a checked submission.csv, in one go.

    python solve.py --data data/                the whole run; after a kill the same command goes on
    python solve.py --data m.npz --max-hours 1  planned: a submission exists within the hour
    python solve.py --recipe paper              the published system, measured with both metrics

load ─ check ─ clean ─ frames ─ folds ─ stage 1 ─ out-of-fold priors ─ evidence ─ stage 2 ─ submit

This file is what we decided; what is true of the task is in lib.py.
"""
from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import lib
from lib import NUM_CLASSES, StageInput, TrainingState, UserError, option

# ---------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    """Every choice of a run. Fields made by option() are flags."""

    data: str = option("data", "the competition's .npz, or the folder that holds it", lib.is_path,
                       group="input and output")
    out: str = option("submission", "folder for everything that is written", lib.is_path)
    recipe: str = option("best", "best: ours; paper: the published system", ("best", "paper"))
    max_hours: float = option(11.0, "a submission exists before they are over", most=9999)
    seed: int = option(0, "seed of folds, weights and augmentation", most=2**63 - 1)
    fresh: bool = option(False, "throw away the state of an earlier run in --out")
    clean: bool = option(True, "keep intruders in the training set", group="cleaning and frames")
    template: str = option("", "picture of an intruder, instead of the one discovered")
    frames: bool = option(True, "don't put the camera frames back together")
    device: str = option("auto", "auto, cpu, cuda (all) or cuda:N", lib.is_device, group="engine")
    precision: str = option("auto", "auto, bfloat16, float16 or float32",
                            ("auto", "bfloat16", "float16", "float32"))
    folds: int = option(0, "each validates networks taught none of its labels; 1: one 15 %% split",
                        most=99, group="size of the work; 0: planned from speed and --max-hours")
    seeds: int = option(0, "networks of each fold and stage, whose mean counts", most=99)
    width: int = option(0, "channels of the first level (the paper: 64)")
    epochs: int = option(0, "epochs of each network of each stage")
    stages: int = option(2, "1: no second stage", (1, 2))
    batch_size: int = option(32, "images a step", least=1, group="training")
    lr: float = option(2e-3, "learning rate of AdamW", least=1e-9, most=0.999)
    gamma: float = option(0.0, "focal loss: exponent γ (0: cross-entropy)")
    rare_repeat: int = option(3, "how often stage 1 sees images of a class under 2 %%", least=1)
    paste: float = option(0.5, "share of images, small if any are, that get its patches", most=1)
    patience: int = option(20, "epochs without a better validation before stopping", least=1)
    ema_decay: float = option(0.99, "weight averaging per step; 0: off", most=0.99999)
    # what tells the recipes apart and nobody would sweep
    alpha: float = 1.0            # factor of the focal loss
    second_lr: float = 0.25       # stage 2's rate, a share of lr: it goes on with stage 1's weights
    second_epochs: float = 0.1    # stage 2's epochs, a share of stage 1's
    first_class: int = 1          # 0: background too is learnt and predicted; 1: it is ignored
    refine: str = "correct"       # stage 2 corrects common classes, or fills in "background" alone
    select: str = "score"         # the validation's mean IoU or its "loss" picks weights and stop
    geometric: tuple = (0.1, 0.25, 8.0)  # shift, scale, degrees
    light: float = 0.2            # brightness and contrast
    flip_vertical: bool = False   # no camera frame is upside down
    tta: bool = True              # mean with the mirrored copy
    most_epochs: int = 96         # of stage 1; of 200 only common classes gain
    weight_decay: float = 1e-2
    cooldown: float = 0.4         # share of the epochs, the last, of falling rate; 0: by plateau
    fit_rare: bool = True         # rare classes' probabilities are multiplied by what suits best
    small_share: float = 2 / 3    # of stage 1's epochs, the first ones, on images of half the side
    stride: int = 2               # side of the blocks of pixels that the network takes as one
    context: bool = True          # the bottleneck hears of the whole image
    rim: int = 8                  # mirrored pixels around a frame that is predicted
    streams: int = 5              # networks trained at once on a GPU
    level_weights: tuple = (0.1, 0.1)  # of the outputs at 1/2, 1/4, …; there is a level more


RECIPES = {"best": {}, "paper": dict(
    folds=1, seeds=1, frames=False, lr=5e-4, second_lr=1.0, second_epochs=0.2, gamma=3.0,
    alpha=0.25, rare_repeat=1, paste=0.25, patience=25, ema_decay=0.0, first_class=0,
    refine="background", select="loss", geometric=(0.2, 0.2, 60.0), flip_vertical=True, tta=False,
    most_epochs=300, weight_decay=0.0, cooldown=0.0, fit_rare=False, small_share=0.0, stride=1,
    context=False, level_weights=(0.2, 0.3, 0.5))}


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

    precision: str           # of autocast
    folds: int = 1
    seeds: int = 1           # networks of each fold
    width: int = 16
    around: int = 0          # pixels of a window beyond its tile
    workers: int = 1         # of each rank, when the plan was made
    threads: int = 1         # of each operation on a CPU
    epochs: tuple = (1, 1)   # of each network of stage 1 and 2
    epoch_seconds: tuple = ((1.0, 1.0), (1.0, 1.0))  # a worker's, by stage, small and whole images
    predict_seconds: float = -np.inf  # -inf: no deadline while measuring
    speed: float = 1.0       # training images/s of a rank's workers at once, as measured
    small_speed: float = 1.0  # of images of half the side


@dataclass
class Step:
    """What was said after a step of the run: "stage1", "frames" or "stage2"."""

    name: str
    labels: np.ndarray      # out of fold, uint8 (N, H, W)
    confidence: np.ndarray  # their probability, in 1/255, uint8 (N, H, W)
    tests: np.ndarray       # labels of the test set, uint8 (M, H, W)
    sure: np.ndarray        # their mean confidence, (M,)


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
    plan: Plan | None = None
    fold_of: np.ndarray = None  # (N,)
    tiles: StageInput = None    # of stage 1, on the device
    metrics: dict = field(default_factory=dict)    # what metrics.json holds
    histories: dict = field(default_factory=dict)  # (stage, net) → list of epochs
    steps: list[Step] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.plan.precision)

    @property
    def end(self) -> float:
        """The clock's seconds at which training leaves the rest of the time to prediction."""
        left = 0.5 if self.steps else 1.0  # of all predictions stage 1's are half
        return 0.97 * self.clock.limit - left * self.plan.predict_seconds


def put_on_device(run: Run) -> None:
    """Put all tiles on the device, in their frames, with the labels of the training tiles."""
    cfg, data = run.cfg, run.data
    tiles, (n, h, w) = np.concatenate([data.images, data.test_images]), data.masks.shape
    targets, fold_of = np.full(tiles.shape, -1, np.int8), np.full(len(tiles), -2)
    targets[:n], fold_of[:n] = data.masks, run.fold_of
    # after small images with patches come whole ones as they are: that is what will be predicted
    run.tiles = StageInput(
        lib.Frames.lay_out(run.place, len(tiles)), 0 if run.place is None else cfg.rim,
        (h + run.plan.around, w + run.plan.around), torch.from_numpy(tiles), data.mean, data.std,
        torch.from_numpy(targets), torch.from_numpy(fold_of), torch.from_numpy(run.is_rare),
        0.0 if cfg.small_share else cfg.paste).to(run.workers.devices[0])


# ------------------------------------------------------------------------- one network's training

def new_network(run: Run, stage: int, net: int, channels: int = 1,
                parent: lib.UNet | None = None) -> TrainingState:
    """Return a network to train; its first weights are the parent's, where there is one, or depend
    on (seed, stage, net) alone. A second network that goes on never answers a rare class."""
    cfg, (seed, fold) = run.cfg, divmod(net, run.plan.folds)  # of net, everywhere
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lib.seed_of(cfg.seed, stage, net, 0))
        model = lib.UNet(channels, NUM_CLASSES - cfg.first_class, run.plan.width,
                         len(cfg.level_weights) + 1, cfg.stride, cfg.context)
    if parent is not None:
        model.start_from(parent)
        model.silence(torch.from_numpy(run.is_rare[cfg.first_class:]))
    path = run.state / f"stage{stage}_fold{fold}{f'_seed{seed}' if seed else ''}.pt"
    devices = list(dict.fromkeys(run.workers.devices))  # each rank's networks in turn
    device = devices[net // run.ranks.world % len(devices)]
    return TrainingState.begin(path, model, device, run.dtype, learning_rate(cfg, stage, 1, 1),
                               cfg.weight_decay, cfg.ema_decay, cfg.patience)


def learning_rate(cfg: Config, stage: int, epoch: int, epochs: int) -> float:
    """Return the rate of an epoch, from 1: constant, and at last it falls to zero; in a stage 2
    that goes on with stage 1's weights, and must not forget, it falls from the start."""
    cooldown = 1.0 if stage == 2 and cfg.refine == "correct" else cfg.cooldown
    rate = cfg.lr * (cfg.second_lr if stage == 2 else 1.0)
    return rate * min(1.0, (epochs - epoch + 1) / (cooldown * epochs)) if cooldown else rate


def is_small(cfg: Config, stage: int, epoch: int, epochs: int) -> bool:
    """Return whether an epoch, of so many, sees images of half the side."""
    return stage == 1 and epoch <= int(cfg.small_share * epochs)


def epoch_seconds(cfg: Config, plan: Plan, stage: int, epoch: int, epochs: int) -> float:
    """Return what the plan expects of an epoch, of so many, of one network."""
    return plan.epoch_seconds[stage - 1][0 if is_small(cfg, stage, epoch, epochs) else 1]


def batch_size(cfg: Config, images: int) -> int:
    """Return the images a step: few images get smaller steps, not fewer."""
    return min(cfg.batch_size, max(4, images // 16))


def training_batch(run: Run, data: StageInput, fold: int, tiles: torch.Tensor,
                   donors: torch.Tensor, gen: torch.Generator) -> lib.Batch:
    """Return an augmented batch of windows around tiles, without the labels of a fold. Rare patches
    come from windows around donors, tiles of the same split."""
    cfg = run.cfg
    x, y = data.windows(tiles, cfg.first_class, fold, gen)
    if data.paste and len(donors):
        pick = donors[torch.randint(len(donors), (len(tiles),), device=x.device, generator=gen)]
        donor_x, patches = data.windows(pick, cfg.first_class, fold, gen)
        patches = torch.where(data.is_rare[patches.clamp_min(0).int()], patches, 0)
        x, y = lib.paste_rare(x, y, donor_x, patches, gen, data.paste)
    for dim in (-1, -2) if cfg.flip_vertical else (-1,):
        x, y = lib.flip(x, y, dim, gen)
    if cfg.geometric:
        x, y = lib.affine(x, y, gen, *cfg.geometric)
    if cfg.light:
        x = lib.jitter_light(x, gen, cfg.light)
    return x.contiguous(memory_format=torch.channels_last), y


def training_step(run: Run, network: TrainingState, data: StageInput, fold: int,
                  donors: torch.Tensor) -> lib.Replayed:
    """Return what trains a network on a batch of tiles, without the labels of a fold."""
    cfg, gen = run.cfg, network.generator

    def step(tiles: torch.Tensor) -> None:
        x, y = training_batch(run, data, fold, tiles, donors, gen)
        target = (y.long() - cfg.first_class).clamp_min(-1)  # below the first class learnt: ignored

        def criterion(model: lib.UNet) -> torch.Tensor:
            with lib.autocast(x.device, run.dtype):
                logits = model(x)
            return lib.deep_supervision_loss(logits, target, cfg.level_weights, gamma=cfg.gamma,
                                             alpha=cfg.alpha)

        network.step(criterion)

    return lib.Replayed(step, gen)


def train_one_epoch(run: Run, network: TrainingState, data: StageInput, tiles: torch.Tensor,
                    key: tuple[int, int, int], most_steps: int | None = None) -> float:
    """Train on all tiles, on those of a rare class rare_repeat times, in the order of key = (stage,
    net, epoch), and return the mean loss. Nothing waits for the device inside; the time's end, a
    signal or another worker's error ends it between two steps."""
    cfg, size = run.cfg, batch_size(run.cfg, len(tiles))
    gen = network.generator.manual_seed(lib.seed_of(cfg.seed, *key))
    donors = tiles[data.holds_rare[tiles]]
    order = torch.cat([tiles, donors.repeat(cfg.rare_repeat - 1)])
    order = order[torch.randperm(len(order), device=order.device, generator=gen)]
    steps = range(-(-len(order) // size))[:most_steps]
    order = order.repeat(2 + size // len(order))  # to fill up the last batch
    if data not in network.steps:
        network.steps[data] = training_step(run, network, data, key[1] % run.plan.folds, donors)
    network.model.train()
    network.sums.zero_()
    for i in steps:
        run.workers.check()
        if i and run.clock.used() > run.end:
            break
        network.steps[data](order[i * size:(i + 1) * size])
    loss, good_steps = network.sums.tolist()
    if not good_steps:
        raise UserError("not one step had a finite gradient")
    return loss / good_steps


def validate(run: Run, network: TrainingState, data: StageInput, tiles: torch.Tensor) -> dict:
    """Return lib.evaluate's figures of the averaged weights on tiles, and the "figure" that
    decides on the best weights, the higher the better."""
    batches = (data.windows(part, run.cfg.first_class) for part in tiles.split(64))
    record = lib.evaluate(network.ema.model, batches, run.dtype, run.cfg.first_class,
                          gamma=run.cfg.gamma, alpha=run.cfg.alpha)
    figure = record["score"] if run.cfg.select == "score" else -record["val_loss"]
    return record | {"figure": figure if np.isfinite(figure) else -1e9}  # nothing is labelled


def next_epoch(run: Run, stage: int, net: int, network: TrainingState, whole: StageInput,
               small: StageInput | None, epochs: int) -> None:
    """Train a network for its next epoch, of so many in all, on whole images or small ones,
    validate it, and note what came of it."""
    cfg, start, epoch = run.cfg, time.monotonic(), len(network.history) + 1
    data = small if is_small(cfg, stage, epoch, epochs) else whole
    own = run.fold_of == net % run.plan.folds
    train, val = (torch.from_numpy(np.flatnonzero(chosen)).to(network.device)
                  for chosen in (~own, own))
    if cfg.cooldown:
        network.rate = learning_rate(cfg, stage, epoch, epochs)
    if stage == 2 and cfg.refine == "correct" and epoch == 1:  # stage 1's weights may stay the best
        network.keep_if_best(validate(run, network, data, val)["figure"])
    record = {"loss": train_one_epoch(run, network, data, train, (stage, net, epoch)),
              **validate(run, network, data, val), "lr": network.rate}
    if not cfg.cooldown:
        network.lower_rate(record["figure"])
    network.history.append(record | {"seconds": time.monotonic() - start})
    # of small images the last is the best, until there is one of whole images
    network.keep_if_best(-np.inf if data is small else record["figure"])


def train_stage(run: Run, stage: int, data: StageInput, deadline: float,
                parents: list[list[lib.UNet]] | None = None) -> list[list[lib.UNet]]:
    """Train all networks of a stage side by side, each rank its share, from their fold's parents
    if there are any, until the clock's deadline; return each fold's with their best weights."""
    cfg, plan, ranks = run.cfg, run.plan, run.ranks
    channels = data.windows(data.fold_of[:1] * 0, cfg.first_class)[0].shape[1]
    networks = [new_network(run, stage, net, channels,
                            parents[net % plan.folds][net // plan.folds] if parents else None)
                for net in range(plan.folds * plan.seeds)]
    mine = networks[ranks.rank::ranks.world]
    for network in mine:
        network.resume()
    small = data.halved(cfg.paste) if is_small(cfg, stage, 1, plan.epochs[stage - 1]) else None
    inputs = {device: (data.to(device), small and small.to(device))
              for device in set(run.workers.devices)}

    def cost(epoch: int, epochs: int) -> float:
        return epoch_seconds(cfg, plan, stage, epoch, epochs)

    def time_left(pace: float) -> float:  # predictions will be slower too
        return deadline - run.clock.used() - plan.predict_seconds * max(0.0, pace - 1)

    def advance(network: TrainingState, device: torch.device, epochs: int) -> None:
        next_epoch(run, stage, networks.index(network), network, *inputs[device], epochs)

    table = lib.Timetable(mine, plan.epochs[stage - 1], cost, time_left, cfg.patience,
                          len(run.workers.devices))
    lib.train_side_by_side(f"stage {stage}", table, advance, run.workers)
    ranks.gather(networks)  # and each ema.model gets its best weights
    run.histories |= {(stage, net): network.history for net, network in enumerate(networks)}
    models = [network.ema.model for network in networks]
    return [models[fold::plan.folds] for fold in range(plan.folds)]


# --------------------------------------------------------------------------------------- the plan

# folds, width, pixels of a window beyond its tile, epochs of stage 1 for which there must be time;
# best first
SIZES = ((5, 32, 32, 135), (5, 24, 32, 96), (5, 16, 32, 84), (4, 16, 32, 84), (4, 16, 0, 22),
         (3, 16, 0, 17), (3, 12, 0, 12), (2, 12, 0, 11), (2, 8, 0, 0))


def make_plan(cfg: Config, task: lib.Task, measured: Plan, seconds: float, sizes=SIZES) -> Plan:
    """Return the Plan of what fits into 15/16 of the seconds left, given one of known speed."""
    most_around = min(task.height, task.width) // 2 * task.frames
    small = measured.speed / measured.small_speed  # time of a small image, against a whole one
    shown = 1 + task.rare * (cfg.rare_repeat - 1)  # how often an image is, in an epoch of stage 1
    later = 1.5 * (shown if cfg.refine == "background" else 1)  # in stage 2, at 1.5 times the cost
    second_epochs = 1.0 if cfg.epochs else cfg.second_epochs    # a share of stage 1's

    def draft(folds: int, seeds: int, width: int, around: int) -> tuple[Plan, float]:
        """Return a plan of this size, and how many epochs of stage 1 there is time for."""
        plan = replace(measured, folds=folds, seeds=seeds, width=width, around=around,
                       **task.share_cores(folds, seeds, cfg.streams))
        speed = measured.speed * task.relative_speed(plan) / task.relative_speed(measured)
        predict = task.predict_seconds(plan, speed, cfg.stages, 1 + cfg.tta)
        whole, second = (task.epoch_seconds(plan, speed, times) for times in (shown, later))
        cost = whole * (1 - (1 - small) * cfg.small_share)  # of an epoch, and its share of stage 2
        cost += second * second_epochs * (cfg.stages - 1)
        cost *= task.networks(folds, seeds) / plan.workers
        affordable = 0.9375 * (seconds - predict) / cost
        first = cfg.epochs or max(1, min(cfg.most_epochs, int(affordable)))
        epochs = first, max(1, round(first * second_epochs)) * (cfg.stages - 1)
        return replace(plan, epochs=epochs, predict_seconds=predict,
                       epoch_seconds=((small * whole, whole), (second, second))), affordable

    for folds, width, around, least in sizes:
        least = max(least, cfg.epochs) if around else least  # tiles alone unless they fit
        plan, affordable = draft(cfg.folds or min(folds, task.train), cfg.seeds or 1,
                                 cfg.width or width, min(around, most_around))
        if affordable >= least:
            break
    while not (cfg.seeds or cfg.epochs) and plan.seeds < 8:
        larger, affordable = draft(plan.folds, plan.seeds + 1, plan.width, plan.around)
        if affordable < 0.75 * cfg.most_epochs:
            break
        plan = larger
    return plan


def measure_speed(run: Run) -> Plan:
    """Return the run's plan with the training images/s of all its workers at once."""
    put_on_device(run)
    cfg, n = run.cfg, len(run.data.images)
    sizes = [run.tiles, run.tiles.halved(cfg.paste)] if cfg.small_share else [run.tiles]

    def train(network: TrainingState, data: StageInput, steps: int) -> int:
        every = torch.arange(n, device=network.device).repeat(1 + steps * cfg.batch_size // n)
        train_one_epoch(run, network, data, every, (0, 0, 0), steps)
        images = steps * batch_size(cfg, len(every))
        validate(run, network, data, every[:-(-images // 4)])  # as many as of 4 folds
        return images

    networks = [new_network(run, 1, i * run.ranks.world) for i in range(len(run.workers.devices))]
    speeds = lib.training_speed(run.workers, networks, sizes, train)
    return replace(run.plan, speed=speeds[0], small_speed=speeds[-1])


def plan_run(run: Run, devices: list[torch.device], task: lib.Task) -> Plan:
    """Return the plan for the time left: a first one from the speed of a small network, and a
    second one from the speed of what the first one chose."""
    cfg = run.cfg
    run.plan = replace(run.plan, width=cfg.width or 16,
                       workers=task.gpus * cfg.streams or task.cores)
    run.workers = lib.Workers(devices, run.plan.workers)
    measured = measure_speed(run)
    plan = make_plan(cfg, task, measured, run.clock.left())
    if (plan.width, plan.around, plan.workers) == (run.plan.width, 0, run.plan.workers):
        return plan
    run.plan = replace(plan, predict_seconds=-np.inf)
    run.workers = lib.Workers(devices, plan.workers, plan.threads)
    cfg = replace(cfg, folds=plan.folds, seeds=plan.seeds)
    return make_plan(cfg, task, measure_speed(run), run.clock.left(),
                     [(plan.folds, plan.width, plan.around, 0)])


# ------------------------------------------------------------------------------------- two stages

def predict(run: Run, stage: list[list[lib.UNet]], data: StageInput) -> np.ndarray:
    """Return each fold's mean probabilities of all tiles, in 1/255, uint8 (folds, T, C, H, W), from
    whole frames with a rim of mirrored pixels: 2.6 GB of the competition's 12,600. A fold is not
    asked about frames that hold neither its own tiles nor test tiles: there 0 stays."""
    first_class, fold_of = run.cfg.first_class, data.fold_of.cpu().numpy()
    most_tiles = 64 if data.images.device.type == "cpu" else 256  # at once
    probs = np.zeros((len(stage), len(fold_of), NUM_CLASSES, *data.images.shape[1:]), np.uint8)
    fused = [[lib.fused(model) for model in models] for models in stage]

    def answer(part: tuple[int, np.ndarray]) -> None:
        fold, frames = part
        every = torch.from_numpy(frames).to(data.images.device)
        batch = max(1, most_tiles // int(data.frames.size[every[0]].prod()))
        said = lib.predict_probs(fused[fold],
                                 lambda part: data.whole_frames(every[part], fold, first_class),
                                 len(frames), run.dtype, first_class, run.cfg.tta, data.rim, batch)
        tiles, values = data.frames.cut(frames, said)
        probs[fold, tiles] = values

    run.workers.map(answer, [
        (fold, frames) for fold in range(len(stage))
        for frames in data.frames.batches((fold_of == fold) | (fold_of < 0), 256)])
    return probs


def second_input(run: Run, said: np.ndarray, evidence: np.ndarray | None) -> StageInput:
    """Return stage 2's input, given what each fold said before, uint8 (folds, T, C, H, W), and what
    it heard of the frames, (folds, T, C, h, w), if any."""
    cfg, data, device = run.cfg, run.tiles, run.workers.devices[0]
    background, tiles = cfg.refine == "background", len(said[0])
    cleaned = torch.from_numpy(np.stack(run.helpers.map(
        lambda one: lib.clean_masks(lib.decide(one, lib.PLAIN, cfg.first_class)), said))).to(device)
    if evidence is not None:
        evidence = torch.from_numpy(evidence[:, :, cfg.first_class:]).to(device)
    # what stage 2 does not answer it does not learn either
    own = cleaned[data.fold_of.clamp_min(0), torch.arange(tiles, device=device)]
    ignored = own != 0 if background else data.is_rare[data.targets.clamp_min(0).int()]
    # our networks begin with what stage 1 learnt from patches; the published ones begin anew
    return replace(data, targets=torch.where(ignored, -1, data.targets), same_fold=True,
                   paste=cfg.paste if background else 0.0, cleaned=cleaned,
                   confidence=torch.from_numpy(said.max(2)).to(device), evidence=evidence,
                   only_flag=background)


def keep_first(run: Run, data: StageInput, before: np.ndarray, after: np.ndarray) -> None:
    """Change what stage 2 said after its input, in place: as before are rare classes or, as
    published, all that is not background."""
    def keep(fold: int) -> None:
        if run.cfg.refine == "background":
            first = data.cleaned[fold].cpu().numpy()[:, None] != 0
            np.copyto(after[fold], before[fold], where=first)
        else:
            after[fold] = lib.keep_classes(before[fold], after[fold], run.is_rare)

    run.helpers.map(keep, range(len(after)))


def conclude(run: Run, name: str, said: np.ndarray) -> None:
    """Score what each fold said in a step, uint8 (folds, T, C, H, W), and answer for the test set:
    by the folds' mean; a rare class is elected by those whose answer it is. Note both in run."""
    data, first_class, folds, n = run.data, run.cfg.first_class, len(said), len(run.data.masks)
    probs = said[run.fold_of.clip(0), np.arange(n)]  # of one split there is one network alone
    labels, scores = lib.score_step(probs, data.masks, run.fold_of, folds, first_class,
                                    run.cfg.fit_rare, run.helpers.map)
    classes = np.arange(NUM_CLASSES)[:, None, None]

    def answer(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.zeros((len(tiles), *said.shape[2:]), np.uint16)
        votes = np.zeros(sums.shape, np.uint8)
        for one in said:
            sums += one[tiles]
            votes += lib.decide(one[tiles], scores["rule"], first_class)[:, None] == classes
        elected = lib.elect(sums, votes, folds, run.is_rare, first_class)
        return lib.clean_masks(elected), sums.max(1).mean((1, 2)) / (255 * folds)

    answers = run.helpers.map_parts(answer, np.arange(n, said.shape[1]), 64)
    answers.append((data.test_images[:0], np.zeros(0)))  # perhaps there are no others
    tests, sure = map(np.concatenate, zip(*answers, strict=True))
    run.metrics |= {f"{name}_{key}": value for key, value in scores.items()}
    run.steps.append(Step(name, labels, probs.max(1), tests, sure))
    print(f"{name} out of fold: {scores['miou']:.4f} ± {scores['fold_std']:.4f} mean IoU, the "
          f"paper's {scores['paper_miou']:.4f}; IoU {np.round(scores['iou'][1:], 3)}", flush=True)


def refine(run: Run, first: list[list[lib.UNet]], said: np.ndarray) -> None:
    """Add the frames' evidence to what the first networks said, in place, and train second ones.

    Ours start from the first ones and correct the common classes alone: they have seen the few
    images of a rare class so often that a second time only fits those closer.
    """
    cfg, masks, evidence = run.cfg, run.data.masks, None
    if run.place is not None and len(said) > 1:  # of one split there are no labels to spare
        evidence = lib.frame_evidence(masks, run.fold_of, run.place, run.helpers.map)
        own = run.fold_of, np.arange(len(masks))
        strength = lib.fit_strength(said[own], evidence[own], masks, run.helpers.map)

        def reweigh(fold: int) -> None:  # in place: 2.6 GB
            said[fold] = lib.reweigh(said[fold], evidence[fold], strength, cfg.first_class)

        run.helpers.map(reweigh, range(len(said)))
        conclude(run, "frames", said)
    begun = any(run.state.glob("stage2*"))
    go = begun or run.clock.used() + run.plan.epoch_seconds[1][1] < run.end
    if cfg.stages == 1 or not run.ranks.share({"go": go})["go"]:
        print("no stage 2" + ": the time is up" * (cfg.stages == 2), flush=True)
        return
    second = second_input(run, said, evidence)
    networks = train_stage(run, 2, second, run.end, first if cfg.refine == "correct" else None)
    after = predict(run, networks, second)
    keep_first(run, second, said, after)
    conclude(run, "stage2", after)


# ---------------------------------------------------------------------------------- the whole run

def open_run(cfg: Config, cores: int = 1) -> Run:
    """Return the run that cfg describes, new or gone on with: data cleaned, the plan made."""
    ranks, data = lib.Ranks(), lib.load_data(cfg.data)
    if data.path.name == "sample.npz":
        print(f"THIS IS THE EMBEDDED SAMPLE {data.path}: put mars_for_students.npz beside it")
        if cfg.max_hours == Config.max_hours:  # a demonstration, unless the flag says otherwise
            cfg = replace(cfg, max_hours=0.04)
    identity = {"data_sha256": data.sha256, **asdict(cfg)}
    for key in ("data", "out", "fresh", "max_hours", "device"):  # may change when a run goes on
        del identity[key]
    state, lock = lib.open_state(Path(cfg.out).expanduser(), identity, cfg.fresh, ranks)
    lib.note_code(state, lib.__file__, globals().get("__file__"))
    clock = lib.Clock(state / "clock.json", cfg.max_hours)
    if min(data.images.shape[1:]) < 64:  # half of that is too little: a 16th of it is nothing
        cfg = replace(cfg, small_share=0.0)
    print("\n".join(lib.describe(data)), flush=True)
    devices, why = lib.pick_devices(cfg.device)
    gpus = len(devices) if devices[0].type == "cuda" else 0
    helpers, place = lib.Workers([torch.device("cpu")], cores, 1, clock), None
    if cfg.clean:
        lib.clean_data(data, state, cfg.template, cfg.seed, ranks, helpers.map)
    if cfg.frames:
        place = lib.find_frames(data, state, devices[0], ranks, helpers.map)
    lib.keep_freed_memory()  # not before: the frames' peak would stay
    is_rare = lib.rare_classes(data.masks)
    run = Run(cfg, state, clock, ranks, lock, data, is_rare, place,
              lib.Workers(devices, len(devices)), helpers, fold_of=np.full(len(data.images), -1))
    if ranks.rank == 0 and not (state / "plan.json").exists():  # else it is kept
        dtype, why_dtype = lib.pick_precision(devices[0], cfg.precision)
        print(f"device: {', '.join(map(str, devices))} ({why}); {dtype} ({why_dtype})", flush=True)
        run.plan = Plan(str(dtype).removeprefix("torch."))
        put_on_device(run)
        task = lib.Task(len(data.images), float(is_rare[data.masks].any((1, 2)).mean()),
                        *data.images.shape[1:], run.tiles.area, place is not None, cores, gpus,
                        ranks.world)
        lib.write_json(state / "plan.json", asdict(plan_run(run, devices, task)))
    plan = Plan(**ranks.share(lib.read_json(state / "plan.json")))
    count = min(-(-plan.folds * plan.seeds // ranks.world),
                gpus * cfg.streams or max(1, cores // plan.threads))
    run.workers = lib.Workers(devices, count, plan.threads, clock)
    slower = max(1.0, plan.workers / count)  # than the machine that the plan was made on
    run.plan = plan = replace(plan, predict_seconds=plan.predict_seconds * slower)
    run.fold_of = lib.make_folds(data.images, data.masks, plan.folds, cfg.seed)
    put_on_device(run)
    print(f"plan: {plan.folds} folds × {plan.seeds} seeds, width {plan.width}, around {plan.around}"
          f", {plan.epochs[0]} + {plan.epochs[1]} epochs, {count} workers, {plan.speed:.0f} images"
          f" a second, {max(0, clock.left()) / 60:.1f} minutes left", flush=True)
    return run


def solve(cfg: Config, cores: int = 1) -> dict:
    """Run everything and return the metrics that metrics.json holds; a rank but the first: none."""
    run = open_run(cfg, cores)
    plan, out = run.plan, run.state.parent
    shape = ("folds", "seeds", "width", "around", "epochs", "precision")
    run.metrics |= {"recipe": cfg.recipe, **{name: getattr(plan, name) for name in shape}}
    work = [sum(epoch_seconds(run.cfg, plan, stage, i + 1, epochs) for i in range(epochs))
            for stage, epochs in enumerate(plan.epochs, 1)]
    for_stage_2 = (run.end - run.clock.used()) * work[1] / sum(work)
    first = train_stage(run, 1, run.tiles, run.end - for_stage_2)
    said = predict(run, first, run.tiles)
    conclude(run, "stage1", said)
    with lib.going_on(run.metrics):
        refine(run, first, said)
    if run.ranks.rank:
        return {}
    best = max(run.steps, key=lambda step: run.metrics[f"{step.name}_miou"])
    best = best if cfg.refine == "correct" else run.steps[-1]  # as published
    run.metrics["submitted"] = best.name
    if len(best.tests):
        lib.submit(out / "submission.csv", best.tests, cfg.first_class)
        with lib.going_on(run.metrics):
            run.metrics |= lib.describe_labels(best.tests, best.sure, run.data.test_labels)
    run.metrics["minutes"] = round(run.clock.used() / 60, 2)
    with lib.going_on(run.metrics):
        facts = {"command": lib.to_command(run.cfg, RECIPES[cfg.recipe]),
                 **lib.fingerprint(run.data), **asdict(run.cfg), **asdict(plan)}
        labels = {step.name: step.labels for step in run.steps}
        lib.write_report(out, run.metrics, run.histories, facts, run.data, run.fold_of >= 0, labels,
                         best.confidence, run.place, best.tests)
    lib.write_json(out / "metrics.json", run.metrics)
    for file in sorted(out.glob("*.*")):
        print(f"written: {file}")
    return run.metrics


def main(argv: list[str]) -> int:
    """Run the command line argv; return its exit status: 0, 2 a user's mistake, 3 a mistake in the
    code after stage 1, in spite of which there is a submission, 130 Ctrl-C, 143 SIGTERM."""
    def command() -> int:
        with lib.single_threaded() as cores:
            metrics = solve(parse(argv), cores)
        lib.print_metrics(metrics)
        return 3 if "degraded" in metrics else 0

    return lib.run_command(command)


if __name__ == "__main__":
    if "__file__" in globals():
        sys.exit(main(sys.argv[1:]))
    main([])  # pasted into a notebook: sys.argv belongs to the kernel
