"""From the competition's file to a checked submission.csv, in one go.

    python solve.py --data data/                      the whole run; the same command goes on after a kill
    python solve.py --data mars.npz --max-hours 1     planned so that a submission exists within the hour
    python solve.py --recipe paper                    the published system, measured with both metrics
    python solve.py --width 32 --folds 5 --epochs 40  so much work, if --max-hours allows it

load ─ check ─ clean ─ frames ─ folds ─ stage 1 ─ out-of-fold priors ─ evidence ─ stage 2 ─ predict ─ write

This file is what we decided; what is true of the task is in lib.py.
"""
from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import lib
from lib import NUM_CLASSES, UserError, option

# ---------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    """Every choice of a run. Fields made by option() are flags."""

    data: str = option("data", "the competition's .npz, or the folder that holds it", lib.is_path,
                       group="input and output")
    out: str = option("submission", "folder for everything that is written", lib.is_path)
    recipe: str = option("best", "best: ours; paper: the published system", ("best", "paper").__contains__)
    max_hours: float = option(11.0, "a submission exists before this many hours are over",
                              lambda value: 0 <= value <= 9999)
    seed: int = option(0, "seed of folds, weights and augmentation", lambda v: 0 <= v < 2**63)
    fresh: bool = option(False, "throw away the state of an earlier run in --out")
    clean: bool = option(True, "keep intruders in the training set", group="cleaning and frames")
    witnesses: str = option(",".join(lib.WITNESSES), "who may accuse an image of being an intruder",
                            lambda value: set(value.split(",")) <= set(lib.WITNESSES))
    template: str = option("", "picture of an intruder, instead of the one discovered")
    frames: bool = option(True, "don't put the camera frames back together")
    group_frames: bool = option(False, "no frame is in two folds: to measure new frames, not to submit")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch,
                         group="engine")
    precision: str = option("auto", "auto, bfloat16, float16 or float32",
                            ("auto", "bfloat16", "float16", "float32").__contains__)
    folds: int = option(0, "parts, each validates networks taught none of its labels; 1: one 15 %% split",
                        lambda value: 0 <= value <= 99,
                        group="size of the work; 0: planned from the measured speed and --max-hours")
    seeds: int = option(0, "networks of each fold and stage, whose mean counts", lambda v: 0 <= v <= 99)
    width: int = option(0, "channels of the first level (the paper: 64)")
    epochs: int = option(0, "epochs of each network of each stage")
    stages: int = option(2, "1: no second stage", (1, 2).__contains__)
    batch_size: int = option(32, "images a step", lambda value: value > 0, group="training")
    lr: float = option(2e-3, "learning rate of AdamW", lambda value: 0 < value < 1)
    gamma: float = option(0.0, "focal loss: exponent γ (0: cross-entropy)")
    rare_repeat: int = option(3, "how often stage 1 sees images that hold a class under 2 %% of the pixels",
                              lambda value: value > 0)
    paste: float = option(0.5, "share of images, small ones, that get patches of such a class",
                          lambda value: 0 <= value <= 1)
    patience: int = option(20, "epochs without a better validation before stopping", lambda value: value > 0)
    ema_decay: float = option(0.99, "weight averaging per step; 0: off", lambda value: 0 <= value < 1)
    # what tells the recipes apart and nobody would sweep
    alpha: float = 1.0            # factor of the focal loss
    second_lr: float = 0.25       # stage 2's rate, as a share of lr: it goes on with stage 1's weights
    first_class: int = 1          # 0: background too is learnt and predicted; 1: ignored, never predicted
    refine: str = "correct"       # stage 2 corrects the common classes, or fills in the "background" alone
    select: str = "score"         # the validation's mean IoU or its "loss" picks weights, rate and stop
    geometric: tuple = (0.1, 0.25, 8.0)  # shift, scale, degrees
    light: float = 0.2            # brightness and contrast
    flip_vertical: bool = False   # no camera frame is upside down
    tta: bool = True              # mean with the mirrored copy
    most_epochs: int = 96         # of stage 1, when time is plenty; of 200 only common classes gain (README)
    weight_decay: float = 1e-2
    cooldown: float = 0.4         # share of the epochs, the last ones, in which the rate falls to zero
    fit_rare: bool = True         # rare classes' probabilities are multiplied by what suits out of fold
    small_share: float = 2 / 3    # of stage 1's epochs, the first ones, on images of half the side
    stride: int = 2               # side of the blocks of pixels that the network takes as one
    context: bool = True          # the bottleneck hears of the whole image
    surroundings: bool = True     # where frames are found, networks see pixels of the tiles around theirs
    level_weights: tuple = (0.1, 0.1)  # of the outputs at 1/2, 1/4, …; one level of the network more


RECIPES = {"best": {}, "paper": dict(
    folds=1, seeds=1, frames=False, lr=5e-4, second_lr=1.0, gamma=3.0, alpha=0.25, rare_repeat=1, paste=0.25,
    patience=25, ema_decay=0.0, first_class=0, refine="background", select="loss", geometric=(0.2, 0.2, 60.0),
    light=0.2, flip_vertical=True, tta=False, most_epochs=300, weight_decay=0.0, cooldown=0.0, fit_rare=False,
    small_share=0.0, stride=1, context=False, level_weights=(0.2, 0.3, 0.5))}


def parse(argv: list[str]) -> Config:
    """Return the Config that the flags stand for; UserError for one that is unknown or out of range."""
    given = lib.parse_flags(Config, argv, __doc__.rpartition("\n\n")[0])
    if "data" not in given and lib.KAGGLE_INPUT.is_dir():
        given["data"] = str(lib.KAGGLE_INPUT)
    cfg = Config(**{**RECIPES[given.get("recipe", "best")], **given})
    if cfg.group_frames and not cfg.frames:
        raise UserError("--group-frames: --recipe paper and --no-frames look for none")
    return cfg


# ---------------------------------------------------------------------------------------- one run's facts

@dataclass
class Run:
    """What every part of a run needs to know. Images and masks are those that the cleaning kept."""

    cfg: Config
    state: Path  # the folder of checkpoints, in --out
    clock: lib.Clock
    device: torch.device
    dtype: torch.dtype
    data: lib.Data
    images: torch.Tensor        # uint8 (N, H, W), on the device; once planned, with a margin all around
    test_images: torch.Tensor   # uint8 (M, H, W), on the device, with the same margin; M may be 0
    masks: torch.Tensor         # int8 (N, H, W), on the device; with that margin too, of -1: ignored
    is_rare: torch.Tensor       # bool (NUM_CLASSES,): under 2 % of the labelled pixels
    ranks: lib.Ranks
    lock: object                # keeps other runs out of the folder as long as it lives
    plan: dict
    neighbours: np.ndarray | None         # (N + M, 4) of training and test tiles
    place: np.ndarray | None              # (3, N + M): their frame, row and column
    fold_of: np.ndarray | None = None
    evidence: lib.Evidence | None = None  # what the frames say
    metrics: dict = field(default_factory=dict)     # what metrics.json holds
    histories: dict = field(default_factory=dict)   # (stage, net) → list of epochs, for the report
    labels: dict = field(default_factory=dict)      # step → out-of-fold labels, uint8 (N, H, W)
    confidence: dict = field(default_factory=dict)  # step → their largest probability, uint8 (N, H, W)

    @property
    def folds(self) -> int:
        return self.plan["folds"]

    @property
    def margin(self) -> int:
        return self.plan.get("margin", 0)

    @property
    def predict_seconds(self) -> float:
        return self.plan["predict_seconds"] * -(-self.folds // self.ranks.world) / self.folds

    def checkpoint(self, stage: int, net: int) -> Path:
        seed, fold = divmod(net, self.folds)
        return self.state / f"stage{stage}_fold{fold}{f'_seed{seed}' if seed else ''}.pt"

    def mine(self, folds: int) -> range:
        """Return the folds for which this rank predicts."""
        return range(folds)[self.ranks.rank::self.ranks.world]

    def index(self, chosen: np.ndarray) -> torch.Tensor:
        """Return the indices, on the device, where a boolean array is true."""
        return torch.from_numpy(np.flatnonzero(chosen)).to(self.device)


@dataclass
class View:
    """What a network looks at. In stage 2 also what was said there before, and what the frames say."""

    images: torch.Tensor                    # uint8 (N, H, W), with the run's margin; the others have none
    paste: float = 0.0                      # share of the images trained on that get patches of rare classes
    cleaned: torch.Tensor | None = None     # masks, uint8 (N, H, W)
    confidence: torch.Tensor | None = None  # the largest probability, in 1/255, uint8 (N, H, W)
    evidence: torch.Tensor | None = None    # of labels and of predictions, float (N, 2 * outputs, h, w)


def network_input(run: Run, view: View, index) -> torch.Tensor:
    """Return the input batch of the images at index (tensor or slice), float (B, C, H, W).

    Stage 1: the standardised image. Stage 2, "correct": also the cleaned mask one-hot, its confidence and the
    frames' evidence, 0 on the margin. Stage 2, "background": also a flag, 0 where stage 1 said background and
    -1 elsewhere.
    """
    x = ((view.images[index].float() - run.data.mean) / run.data.std)[:, None]
    if view.cleaned is None:
        return x
    cleaned = view.cleaned[index][:, None]
    if run.cfg.refine == "background":
        return torch.cat([x, -(cleaned != 0).float()], 1)
    classes = torch.arange(run.cfg.first_class, NUM_CLASSES, device=run.device)[:, None, None]
    said = [(cleaned == classes).float(), view.confidence[index][:, None].float() / 255]
    if view.evidence is not None:
        said.append(F.interpolate(view.evidence[index] / 3, cleaned.shape[2:], mode="bilinear"))
    return torch.cat([x, F.pad(torch.cat(said, 1), (run.margin,) * 4)], 1)


# ---------------------------------------------------------------------------------------- training

def training_batch(run: Run, view: View, targets: torch.Tensor, index: torch.Tensor, donors: torch.Tensor,
                   gen: torch.Generator) -> lib.Batch:
    """Return an augmented batch. Rare patches come from the images at donors, which are of the same split."""
    cfg = run.cfg
    x, y = network_input(run, view, index), targets[index]
    if view.paste and len(donors):
        pick = donors[torch.randint(len(donors), (len(index),), device=run.device, generator=gen)]
        rare = torch.where(run.is_rare[targets[pick].clamp_min(0).int()], targets[pick], 0)
        x, y = lib.paste_rare(x, y, network_input(run, view, pick), rare, gen, view.paste)
    for dim in (-1, -2) if cfg.flip_vertical else (-1,):
        x, y = lib.flip(x, y, dim, gen)
    if cfg.geometric:
        x, y = lib.affine(x, y, gen, *cfg.geometric)
    if cfg.light:
        x = lib.jitter_light(x, gen, cfg.light)
    return x.contiguous(memory_format=torch.channels_last), y


def new_training(run: Run, stage: int, net: int, channels: int = 1, parent: lib.UNet | None = None) -> dict:
    """Return all that training changes, by name; the first weights are the parent's, where there is one, or
    depend on (seed, stage, net) alone. A second network that goes on never answers a rare class."""
    cfg, outputs = run.cfg, NUM_CLASSES - run.cfg.first_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lib.generator(torch.device("cpu"), cfg.seed, stage, net, 0).initial_seed())
        model = lib.UNet(channels, outputs, run.plan["width"], len(cfg.level_weights) + 1, cfg.stride,
                         cfg.context)
    if parent is not None:
        model.start_from(parent)
        model.silence(run.is_rare[cfg.first_class:])
    model = model.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr * (cfg.second_lr if stage == 2 else 1),
                                  weight_decay=cfg.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(  # the paper's 7 of 25 epochs of patience
        optimizer, "max", factor=0.6, patience=cfg.patience * 7 // 25, min_lr=1e-6)
    return {"model": model, "ema": copy.deepcopy(model), "optimizer": optimizer, "scheduler": scheduler,
            "scaler": torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)}


def batch_size(run: Run, images: int) -> int:
    """Return the images a step: few images get smaller steps, not fewer; so does a small memory."""
    return min(run.plan.get("batch_size", run.cfg.batch_size), max(4, images // 16))


def train_one_epoch(run: Run, parts: dict, view: View, targets: torch.Tensor, train_index: torch.Tensor,
                    key: tuple[int, ...], most_steps: int | None = None) -> float:
    """Train on every image, on rare ones rare_repeat times, in the order of key = (stage, net, epoch), and
    return the mean loss. Nothing waits for the device inside."""
    cfg, gen = run.cfg, lib.generator(run.device, run.cfg.seed, *key)
    model, optimizer, scaler = parts["model"], parts["optimizer"], parts["scaler"]
    shown = targets[train_index].flatten(1)
    donors = train_index[sum(((shown == c).any(1) for c in run.is_rare.nonzero()), train_index < 0)]
    order = torch.cat([train_index, donors.repeat(cfg.rare_repeat - 1)])
    order = order[torch.randperm(len(order), device=run.device, generator=gen)]
    total, before = torch.zeros((), device=run.device), int(model.encoder[0][1].num_batches_tracked)
    model.train()
    for steps, index in enumerate(order.split(batch_size(run, len(train_index)))[:most_steps], 1):
        index = index.repeat(2) if len(index) == 1 else index  # batch norm wants two values
        x, y = training_batch(run, view, targets, index, donors, gen)
        with lib.autocast(run.device, run.dtype):
            logits = model(x)
        target = (y.long() - cfg.first_class).clamp_min(-1)  # below the first class learnt: ignored
        loss = lib.deep_supervision_loss(logits, target, cfg.level_weights, gamma=cfg.gamma, alpha=cfg.alpha)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
        lib.update_ema(parts["ema"], model, cfg.ema_decay, before + steps)
        if run.clock.left() < 0:
            break  # the budget is a promise, even inside an epoch
    return float(total / steps)


@torch.inference_mode()
def evaluate(run: Run, model, view: View, targets: torch.Tensor, index: torch.Tensor) -> dict:
    """Return the validation's "val_loss", mean over images, and "score", the competition's mean IoU."""
    model.eval()
    loss = torch.zeros((), device=run.device)
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=run.device)
    for part in index.split(2 * batch_size(run, len(run.images))):
        y = targets[part].long()
        with lib.autocast(run.device, run.dtype):
            x = network_input(run, view, part).contiguous(memory_format=torch.channels_last)
            logits = model(x)[0]
        target = (y - run.cfg.first_class).clamp_min(-1)
        loss += lib.focal_loss(logits, target, gamma=run.cfg.gamma, alpha=run.cfg.alpha) * len(part)
        pair = y * NUM_CLASSES + logits.argmax(1) + run.cfg.first_class
        confusion += torch.bincount(pair[y >= 0], minlength=NUM_CLASSES ** 2).view_as(confusion)
    return {"val_loss": float(loss / len(index)), "score": lib.iou_scores(confusion.cpu().numpy())[0]}


def resume(run: Run, stage: int, net: int, view: View, parent: lib.UNet | None,
           deadline: float) -> tuple[dict, dict]:
    """Return new_training's parts as the last epoch left them, and the network's state: its checkpoint, or
    that of no epoch yet, with as many planned as there is time for."""
    parts = new_training(run, stage, net, network_input(run, view, slice(1)).shape[1], parent)
    state = lib.load_checkpoint(run.checkpoint(stage, net))
    if state is None:
        affordable = int((deadline - run.clock.used()) / run.plan["epoch_seconds"][stage - 1])
        planned = max(1, min(run.plan["epochs"][stage - 1], affordable))
        state = {"planned": planned, "epochs": planned, "history": [], "best": None,
                 "best_figure": -float("inf"), "best_epoch": 0, "finished": False}
    elif not state["finished"]:
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
    return parts, state


def attempt(run: Run, parts: dict, view: View, targets: torch.Tensor, split: tuple, key: tuple) -> dict | str:
    """Train for an epoch and return its record, or a word on what went wrong. Without memory for it the batch
    is halved. Args: split, the indices to train on and to validate on."""
    try:
        loss = train_one_epoch(run, parts, view, targets, split[0], key)
        record = {"loss": loss, **evaluate(run, parts["ema"], view, targets, split[1])}
    except RuntimeError as e:
        if not lib.lacks_memory(e):
            return f"{type(e).__name__}: {e}"
        run.plan["batch_size"] = lib.smaller_batch(batch_size(run, len(split[0])), e)
        lib.write_json(run.state / "plan.json", run.plan)
        return "out of memory"
    return record if np.isfinite(loss + record["val_loss"]) else "the loss is not finite"


def save(run: Run, path: Path, parts: dict, state: dict) -> None:
    """Write the checkpoint that resume reads; of a finished network only what its state holds."""
    rest = {} if state["finished"] else {name: part.state_dict() for name, part in parts.items()}
    try:
        lib.save_checkpoint(path, state | rest, keep_previous=not state["finished"])
        run.clock.save()
    except OSError as e:  # a full disk: what is in memory can still win
        print(f"{path}: not saved ({e.strerror}); going on without", flush=True)


def halved(run: Run, view: View, targets: torch.Tensor) -> tuple[View, torch.Tensor]:
    """Return images and targets of half the side, rounded up, that get patches pasted."""
    images = F.avg_pool2d(view.images.float(), 2, ceil_mode=True).round().byte()
    return View(images, paste=run.cfg.paste), targets[:, ::2, ::2]


def fit(run: Run, stage: int, net: int, view: View, targets: torch.Tensor, deadline: float,
        parent: lib.UNet | None = None) -> lib.UNet:
    """Train one network of either stage, or go on with it, and return it with its best weights.

    Args: net, of seed net // folds and fold net % folds; targets int8 (N, H, W), -1 ignored; deadline,
    seconds of run.clock; parent, a network to start from and to keep if nothing better is found.
    A kill costs an epoch at most. One that went wrong is done again from the last good one at half the rate;
    the third time the network stays as it was, UserError if there is none.
    """
    cfg, failures, fold = run.cfg, 0, net % run.folds
    cooldown = cfg.cooldown if parent is None else 1.0  # what goes on must not forget
    split = run.index(run.fold_of != fold), run.index(run.fold_of == fold)
    sign, chosen = (1, "score") if cfg.select == "score" else (-1, "val_loss")
    parts, state = resume(run, stage, net, view, parent, deadline)
    if parent is not None and state["best"] is None:
        state["best"] = copy.deepcopy(parts["ema"].state_dict())
        state["best_figure"] = sign * evaluate(run, parts["ema"], view, targets, split[1])[chosen]
    history = run.histories[stage, net] = state["history"]
    title = f"stage {stage}  fold {fold}{f'  seed {net // run.folds}' if run.plan['seeds'] > 1 else ''}"
    progress = lib.Progress(title, state["planned"], len(history), run.ranks.stdout)
    while not state["finished"]:
        epoch, start, group = len(history) + 1, time.monotonic(), parts["optimizer"].param_groups[0]
        rate, small = group["lr"], stage == 1 and epoch <= int(cfg.small_share * state["epochs"])
        if cooldown:
            group["lr"] *= min(1, (state["epochs"] - epoch + 1) / (cooldown * state["epochs"]))
        seen = halved(run, view, targets) if small else (view, targets)
        record = attempt(run, parts, *seen, split, (stage, net, epoch))
        if isinstance(record, str):
            failures += record != "out of memory"  # that ends by itself, at a batch of one
            record = f"{progress.title}, epoch {epoch}: {record}"
            if failures < 3:
                print(f"{record}; again from the last good one, at half the rate", flush=True)
                parts = resume(run, stage, net, view, parent, deadline)[0]
                parts["optimizer"].param_groups[0]["lr"] = rate / 2
                continue
            if state["best"] is None:
                raise UserError(f"{record}, three times; try a smaller --lr or --batch-size")
            print(f"{record}, three times: the network stays as it was", flush=True)
            state["finished"] = True
            save(run, run.checkpoint(stage, net), parts, state)
            break
        record["lr"], group["lr"] = group["lr"], rate
        figure = sign * record[chosen] if np.isfinite(record[chosen]) else -1.0  # nothing labelled here
        if not small:
            parts["scheduler"].step(figure)
        if small or figure > state["best_figure"]:
            state |= {"best": copy.deepcopy(parts["ema"].state_dict()), "best_epoch": epoch,
                      "best_figure": -float("inf") if small else figure}  # of whole images any is better
        record["seconds"] = time.monotonic() - start
        history.append(record)
        affordable = max(0, int((deadline - run.clock.used()) / max(record["seconds"], 1e-3)))
        if not small or not affordable:  # the rate shall have fallen when the time is up
            state["epochs"] = min(state["planned"], epoch + affordable)
        state["finished"] = epoch >= state["epochs"] or epoch - state["best_epoch"] >= cfg.patience
        save(run, run.checkpoint(stage, net), parts, state)
        progress.show(epoch, record, run.clock.used() / 60)
    progress.close()
    parts["ema"].load_state_dict(state["best"])
    return parts["ema"]


# ---------------------------------------------------------------------------------------- the plan

def measure_speed(run: Run, width: int, margin: int) -> tuple[float, float]:
    """Return the training speed, images/s, of a network of this width on images with this margin, and how
    long stage 1's mean epoch is, small images or whole, against one of whole images. Timed are six real
    steps after three, the fastest of up to three times: what disturbs a moment is not to shrink the whole
    run, and where all is slower than this the schedule shrinks in time."""
    run.plan |= {"width": width, "margin": margin}
    larger = [F.pad(pixels, (margin,) * 4) for pixels in (run.images, run.masks)]  # their values cost nothing
    whole, speeds = (View(larger[0]), larger[1]), []
    index = torch.arange(len(run.images), device=run.device)
    try:
        parts = new_training(run, 1, 0)
        for seen in (whole, halved(run, *whole)) if run.cfg.small_share else (whole,):
            seconds = []
            while len(seconds) < 2 or len(seconds) < 4 and sum(seconds) < 15:  # large images: once is enough
                start, steps = time.perf_counter(), 6 if seconds else 3  # the first steps find their memory
                train_one_epoch(run, parts, *seen, index, (0, 0, 0), steps)
                seconds.append(time.perf_counter() - start)
            speeds.append(6 * batch_size(run, len(index)) / min(seconds[1:]))
    except RuntimeError as e:
        run.plan["batch_size"] = lib.smaller_batch(batch_size(run, len(index)), e)
        return measure_speed(run, width, margin)
    return speeds[0], 1 - (1 - speeds[0] / speeds[-1]) * run.cfg.small_share


# (folds, width, margin, epochs of stage 1 that it needs at least), best first: epochs do more than width and
# folds, and what lies around a tile, at two to three times the cost, more than epochs beyond these (README)
SIZES = ((5, 32, 32, 135), (5, 24, 32, 96), (5, 16, 32, 72), (5, 16, 16, 56), (5, 16, 0, 22), (3, 16, 0, 17),
         (3, 12, 0, 12), (2, 12, 0, 11), (2, 8, 0, 0))


def make_plan(run: Run) -> dict:
    """Return folds, seeds, width, margin and epochs that fit into 15/16 of the time left."""
    cfg, world = run.cfg, run.ranks.world
    (n, height, wide), m = run.images.shape, len(run.test_images)
    around = cfg.surroundings and run.place is not None and min(height, wide) >= 64
    rare = run.is_rare[run.masks.int()].flatten(1).any(1).float().mean()
    shown = 1 + float(rare) * (cfg.rare_repeat - 1)  # images an epoch, per image
    share = 0.8 if cfg.stages == 2 else 1.0  # of the training time, stage 1's

    def measure(width: int, margin: int) -> tuple[float, float, float]:
        """Return measure_speed's figures and the time left, the worst of all processes, which measure at once
        as they will train at once."""
        run.ranks.barrier()
        speed, small = (run.ranks.gather(figure) for figure in measure_speed(run, width, margin))
        return float(speed.min()), float(small.max()), float(run.ranks.gather(run.clock.left()).min())

    def cost(folds: int, seeds: int, speed: float) -> tuple[float, float, int]:
        """Return seconds an epoch of whole images, seconds of all predictions, affordable epochs of stage 1,
        given training images/s."""
        part = 1 / folds if folds > 1 else 1 / 7
        epoch = n * (shown * (1 - part) + 0.4 * part) / speed  # a prediction: 0.3 of a training step
        passes = seeds * (cfg.stages * (1 + cfg.tta) * (n + m * folds) + cfg.frames * m * folds)
        predict = 0.35 * passes / speed + 3e-3 * m * folds + 2e-3 * cfg.frames * (n + m)
        left = time_left - predict * -(-folds // world) / folds
        return epoch, predict, int(0.9375 * share * left / (-(-folds * seeds // world) * small * epoch))
    measured, seeds = cfg.width or 16, cfg.seeds or 1
    speed, small, time_left = measure(measured, 0)
    for folds, width, margin, least in SIZES:
        if world < 10 and folds * seeds % world:  # no process waits for another's last network
            folds = world * max(1, round(folds / world))
        folds, width = cfg.folds or min(folds, n), cfg.width or width
        margin *= around
        least = max(least, cfg.epochs) if margin else least  # what is asked for comes first
        area = (height + 2 * margin) * (wide + 2 * margin) / (height * wide)
        if cost(folds, seeds, speed / area * (measured / width) ** 1.7)[2] >= least:  # 1.7: on a CPU
            break
    if (width, margin) != (measured, 0):
        speed, small, time_left = measure(width, margin)
    enough = 0.75 * cfg.most_epochs
    while not (cfg.seeds or cfg.epochs) and seeds < 8 and cost(folds, seeds + 1, speed)[2] >= enough:
        seeds += 1
    epoch_seconds, predict_seconds, affordable = cost(folds, seeds, speed)
    first = cfg.epochs or max(1, min(affordable, cfg.most_epochs))
    ratio = 1.5 / (shown if cfg.refine == "correct" else 1)  # more channels; rare images are shown once
    second = cfg.epochs or max(1, round(first * small * (1 / share - 1) / ratio))
    return {**run.plan, "folds": folds, "seeds": seeds, "predict_seconds": predict_seconds,
            "epochs": [first, second if cfg.stages == 2 else 0],
            "epoch_seconds": [small * epoch_seconds, ratio * epoch_seconds], "train_images_per_second": speed}


# ---------------------------------------------------------------------------------------- two stages

def train_stage(run: Run, stage: int, view: View, targets: torch.Tensor, end: float,
                parents: list[list] | None = None) -> list[list[lib.UNet]]:
    """Return each fold's networks of a stage, by `end` seconds of the clock; fewer folds when time runs out
    or a network fails. Each rank trains its share of them. Args: parents, the networks to start from."""
    models, seconds, ranks = {}, run.plan["epoch_seconds"], run.ranks
    nets = [net for net in range(run.folds * run.plan["seeds"])
            if not parents or net // run.folds < len(parents[net % run.folds])]
    starts = {net: parents[net % run.folds][net // run.folds] for net in nets if parents}
    mine = nets[ranks.rank::ranks.world]

    def share() -> list[int]:
        """Give each network's furthest checkpoint to all; return the networks that all have finished."""
        finished = []
        ranks.barrier()  # all look at the same moment
        for net in nets if ranks.world > 1 else ():
            file = run.checkpoint(stage, net)
            state = lib.load_checkpoint(file)
            ranks.share(file, len(state["history"]) + 9999 * state["finished"] if state else -1)
            state = lib.load_checkpoint(file)
            if ranks.gather(bool(state and state["finished"])).all():
                finished.append(net)
        return finished

    share()
    for left, net in zip(range(len(mine), 0, -1), mine, strict=True):
        used, needed = run.clock.used(), stage == 1 and net == 0  # for any submission at all
        late = lib.load_checkpoint(run.checkpoint(stage, net)) is None and used + seconds[stage - 1] > end
        try:
            if late and not needed:
                raise UserError("time is short")
            models[net] = fit(run, stage, net, view, targets, used + (end - used) / left, starts.get(net))
        except Exception as e:  # whatever it is, there may be something to submit
            if needed:
                raise
            print(f"{e}: stage {stage} ends after {len(models)} of {len(mine)} networks",
                  file=ranks.stdout, flush=True)
            break
        spent = [epoch["seconds"] for epoch in run.histories[stage, net]] or [seconds[stage - 1]]
        seconds[stage - 1] = float(np.mean(spent))
    if ranks.world > 1:  # what counts is what all have
        models = {net: fit(run, stage, net, view, targets, -1, starts.get(net)) for net in share()}
    folds = [[models[net] for net in sorted(models) if net % run.folds == fold] for fold in range(run.folds)]
    return folds[:[*map(bool, folds), False].index(False)]


def predict(run: Run, models: list[lib.UNet], view: View, index=None, tta: bool = True) -> np.ndarray:
    """Return the networks' mean probabilities in 1/255, uint8 (B, NUM_CLASSES, H, W), of images at index."""
    index = torch.arange(len(view.images), device=run.device) if index is None else index
    return lib.predict_probs(models, lambda part: network_input(run, view, index[part]), len(index),
                             run.device, run.dtype, run.cfg.first_class, tta and run.cfg.tta, run.margin)


def out_of_fold(run: Run, stage: list[list[lib.UNet]], view: View) -> np.ndarray:
    """Return each training image's probabilities, uint8 (N, C, H, W), of networks taught none of its labels.

    With one split there is none for the images trained on: they get the one there is. Hence folds.
    """
    n, h, w = run.data.masks.shape
    probs = np.zeros((n, NUM_CLASSES, h, w), np.uint8)
    for fold in run.mine(len(stage)):
        chosen = run.fold_of == fold if run.folds > 1 else np.ones(n, bool)
        probs[chosen] = predict(run, stage[fold], view, run.index(chosen))
    return run.ranks.sum(probs)


def predicted_cells(run: Run, first: list[list[lib.UNet]], probs: np.ndarray) -> np.ndarray:
    """Return each fold's predicted class shares, float32 (folds, N + M, C, h, w): out of fold of the training
    tiles, and of the test tiles by the fold's first networks."""
    ours = lib.to_cells(probs) / 255
    cells = np.zeros((run.folds, len(ours) + len(run.test_images), *ours.shape[1:]), np.float32)
    parts = [run.test_images[i:i + 500] for i in range(0, len(run.test_images), 500)]  # bounded memory
    for fold in run.mine(run.folds):
        said = [lib.to_cells(predict(run, first[fold], View(part), tta=False)) / 255 for part in parts]
        cells[fold] = np.concatenate([ours, *said])
    return run.ranks.sum(cells)


def final_masks(run: Run, probs: np.ndarray, rule=lib.PLAIN) -> np.ndarray:
    """Return cleaned labels (N, H, W) of probabilities (N, C, H, W) of any scale, by a rule of lib.decide."""
    return lib.clean_masks(lib.decide(probs, rule, run.cfg.first_class))


def second_view(run: Run, images: torch.Tensor, probs: np.ndarray, evidence: np.ndarray | None) -> View:
    """Return stage 2's view of images, given what was said there before, probabilities uint8 (B, C, H, W),
    and the frames' evidence (B, 2, C, h, w), if any."""
    said = final_masks(run, probs), probs.max(1)
    cleaned, confidence = (torch.from_numpy(array).to(run.device) for array in said)
    if evidence is not None:
        evidence = torch.from_numpy(evidence[:, :, run.cfg.first_class:]).to(run.device).flatten(1, 2)
    # our networks begin with what stage 1 learnt from patches; the published ones begin anew
    paste = run.cfg.paste if run.cfg.refine == "background" else 0.0
    return View(images, paste, cleaned, confidence, evidence)


def keep_first(run: Run, view: View, before: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return stage 2's probs of view; as before stay rare classes or, as published, all but background."""
    if run.cfg.refine == "background":
        return np.where(view.cleaned.cpu().numpy()[:, None] == 0, probs, before)
    return lib.keep_classes(before, probs, run.is_rare.cpu().numpy())


def predict_test(run: Run, stages: list[list[list[lib.UNet]]], frames: lib.Evidence | None, rule,
                 part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the last step's probabilities of a part of the test images, summed over folds, uint16
    (B, C, H, W), and how many folds answer each class by a rule of lib.decide, uint8, of the same shape. Each
    step starts from what the same fold's networks said before."""
    images, size, classes = run.test_images[part], run.data.masks.shape[1:], np.arange(NUM_CLASSES)
    sums, votes = (np.zeros((len(images), NUM_CLASSES, *size), kind) for kind in (np.uint16, np.uint8))
    for fold in run.mine(len(stages[0])):
        probs, evidence = predict(run, stages[0][fold], View(images)), None
        if frames:
            evidence = frames.test[fold][part]
            probs = lib.reweigh(probs, evidence, frames.strengths, run.cfg.first_class)
        if len(stages) == 2:
            view = second_view(run, images, probs, evidence)
            probs = keep_first(run, view, probs, predict(run, stages[1][fold], view))
        sums += probs
        votes += lib.decide(probs, rule, run.cfg.first_class)[:, None] == classes[:, None, None]
    return run.ranks.sum(sums), run.ranks.sum(votes)


# ---------------------------------------------------------------------------------------- the whole run

def open_run(cfg: Config, ranks: lib.Ranks | None = None) -> Run:
    """Return the run that cfg describes, new or gone on with: data loaded and cleaned, the plan made."""
    ranks = ranks or lib.Ranks()
    data = lib.load_data(cfg.data)
    if data.path.name == "sample.npz":
        print(f"THIS IS THE EMBEDDED SAMPLE {data.path}, drawn: put mars_for_students.npz beside it")
        if cfg.max_hours == Config.max_hours:  # a demonstration: 4 minutes, unless the flag says otherwise
            cfg = replace(cfg, max_hours=0.07)
    identity = {"data_sha256": data.sha256, **asdict(cfg)}
    for key in ("data", "out", "fresh", "max_hours", "device"):  # may change when a run goes on
        del identity[key]
    state, lock = lib.open_state(Path(cfg.out).expanduser(), identity, cfg.fresh, ranks)
    if min(data.images.shape[1:]) < 64:  # half of that is too little: a 16th of it is nothing
        cfg = replace(cfg, small_share=0.0)
    clock = lib.Clock(state / "clock.json", cfg.max_hours)
    clock.before = float(ranks.gather(clock.before).max())
    print("\n".join(lib.describe(data)), flush=True)
    device, why = lib.pick_device(cfg.device)
    share_decisions(ranks, state)  # an earlier run's, whoever has them
    if ranks.rank:
        share_decisions(ranks, state)  # rank 0 makes them below
    plan = lib.read_json(state / "plan.json")  # a resumed run keeps what its clock once measured
    lib.set_threads(plan.get("threads", 0))
    dtype, why_dtype = lib.pick_precision(device, plan.get("precision", cfg.precision))
    plan |= {"threads": torch.get_num_threads(), "precision": str(dtype).removeprefix("torch.")}
    print(f"device: {device} ({why}), {torch.get_num_threads()} threads; {dtype} ({why_dtype})"
          f"\n{lib.spare_gpus(device, lib.to_flags(cfg, RECIPES[cfg.recipe]))}".rstrip(), flush=True)
    if cfg.clean:
        lib.clean_data(data, state, tuple(cfg.witnesses.split(",")), cfg.template, cfg.seed)
    neighbours, place = lib.find_frames(data, state, device) if cfg.frames else (None, None)
    lib.keep_freed_memory()  # not before: the frames' peak would stay
    is_rare = torch.from_numpy(lib.rare_classes(data.masks)).to(device)
    run = Run(cfg, state, clock, device, dtype, data, torch.from_numpy(data.images).to(device),
              torch.from_numpy(data.test_images).to(device), torch.from_numpy(data.masks).char().to(device),
              is_rare, ranks, lock, plan, neighbours, place)
    if ranks.rank == 0:
        lib.write_json(state / "plan.json", plan)
        share_decisions(ranks, state)
    if "epochs" not in plan:
        plan = make_plan(run)
        if ranks.rank == 0:
            lib.write_json(state / "plan.json", plan)
        share_decisions(ranks, state)
        run.plan = plan = lib.read_json(state / "plan.json")
    if run.margin:
        tiles = lib.surroundings(np.concatenate([data.images, data.test_images]), place, run.margin)
        run.images, run.test_images = torch.from_numpy(tiles).to(device).split([len(data.images),
                                                                                len(data.test_images)])
        run.masks = F.pad(run.masks, (run.margin,) * 4, value=-1)
    frame = place[0, :len(data.images)] if cfg.group_frames and place is not None else None
    run.fold_of = lib.make_folds(data.images, data.masks, plan["folds"], cfg.seed, frame)
    rounds = -(-plan["folds"] * plan["seeds"] // ranks.world)
    seconds = rounds * float(np.dot(plan["epochs"], plan["epoch_seconds"])) + run.predict_seconds
    print(f"plan: {plan['folds']} folds × {plan['seeds']} seeds, width {plan['width']}, margin {run.margin}, "
          f"at most {plan['epochs'][0]} + {plan['epochs'][1]} epochs, {plan['train_images_per_second']:.0f} "
          f"training images/s on each of {ranks.world} processes: about {seconds / 60:.1f} of the "
          f"{max(0, clock.left()) / 60:.1f} minutes left", flush=True)
    return run


def share_decisions(ranks: lib.Ranks, state: Path) -> None:
    """Give rank 0's cleaning, frames and plan to all, whose folders may be on other machines."""
    ranks.barrier()  # until rank 0 has them
    for file in (state / name for name in ("cleaned.json", "frames.pt", "plan.json")):
        ranks.share(file, int(ranks.rank == 0) if file.exists() else -1)


def refine(run: Run, first: list[list[lib.UNet]], probs: np.ndarray, end: float) -> list[list[lib.UNet]]:
    """Return the second networks, given the first ones and their out-of-fold probs; fewer than folds where
    not all are there. What the frames say, and what each step scores, is noted in run.

    Ours start from the first networks and correct the common classes alone: they have seen the few images of
    a rare class so often that a second time only fits those closer.
    """
    if run.place is not None:
        run.metrics["known_neighbours"] = lib.known_neighbours(run.neighbours, run.fold_of)
        run.evidence = lib.frame_evidence(probs, predicted_cells(run, first, probs), run.data.masks,
                                          run.fold_of, run.place)
        # rank 0's: on unlike processors a tie may fall differently
        run.evidence.strengths = run.ranks.sum(run.evidence.strengths * np.float32(run.ranks.rank == 0))
        probs = lib.reweigh(probs, run.evidence.known, run.evidence.strengths, run.cfg.first_class)
        score(run, "frames", probs, run.folds)
    if run.cfg.stages == 1:
        return []
    view = second_view(run, run.images, probs, run.evidence and run.evidence.known)
    ignored, parents = run.is_rare[run.masks.clamp_min(0).int()], first
    if run.cfg.refine == "background":
        ignored, parents = view.cleaned != 0, None
    second = train_stage(run, 2, view, torch.where(ignored, -1, run.masks), end, parents)
    if len(second) < run.folds:
        print("stage 2: not all folds have one; going on without", flush=True)
    else:
        score(run, "stage2", keep_first(run, view, probs, out_of_fold(run, second, view)), run.folds)
    return second


def solve(cfg: Config, ranks: lib.Ranks) -> dict:
    """Run everything and return the metrics that metrics.json holds."""
    run = open_run(cfg, ranks)
    end = 0.97 * run.clock.limit - run.predict_seconds
    used = run.clock.used()
    work = [a * b for a, b in zip(run.plan["epochs"], run.plan["epoch_seconds"], strict=True)]
    shape = ("folds", "seeds", "width", "margin", "epochs", "precision")
    run.metrics |= {"recipe": cfg.recipe, **{key: run.plan.get(key, 0) for key in shape}}
    # after small images with patches come whole ones as they are: that is what will be predicted
    view = View(run.images, paste=0.0 if run.cfg.small_share else cfg.paste)
    stages = [train_stage(run, 1, view, run.masks, used + (end - used) * work[0] / sum(work))]
    if not stages[0]:
        raise UserError("no first network was finished on all processes; the same command tries again")
    probs = out_of_fold(run, stages[0], view)
    score(run, "stage1", probs, len(stages[0]))
    spared = Exception if run.ranks.world == 1 else ()  # other processes would know nothing of the error
    try:
        if len(stages[0]) == run.folds:
            stages.append(refine(run, stages[0], probs, end))
    except spared as e:  # whatever it is, there is something to submit
        print(f"after stage 1: {type(e).__name__}: {e}; going on without what would have followed")
    try:
        test_labels = write_outputs(run, stages)
    except spared as e:
        print(f"after stage 1: {type(e).__name__}: {e}; stage 1 is submitted")
        run.labels = {"stage1": run.labels["stage1"]}
        test_labels = write_outputs(run, stages)
    if run.ranks.rank:
        return run.metrics
    run.metrics["minutes"] = round(run.clock.used() / 60, 2)
    lib.write_json(run.state.parent / "metrics.json", run.metrics)
    shown = np.isin(run.fold_of, range(len(stages[0])))  # the validated images
    facts = {"command": shlex.join(["python", "solve.py", *lib.to_flags(run.cfg, RECIPES[run.cfg.recipe])]),
             "minutes": run.metrics["minutes"], "device": run.device, **lib.fingerprint(run.data),
             **asdict(run.cfg), **run.plan}
    try:
        lib.write_report(run.state.parent, run.metrics, run.histories, facts, run.data, shown, run.labels,
                         run.confidence[run.metrics["submitted"]], run.place, test_labels)
    except OSError as e:  # a full disk: the submission is written
        (run.state.parent / "report.html").unlink(missing_ok=True)  # an earlier start's
        print(f"report.html: not written ({e.strerror})")
    for file in sorted(run.state.parent.glob("*.*")):
        print(f"written: {file}")
    return run.metrics


def score(run: Run, name: str, probs: np.ndarray, folds: int) -> None:
    """Note the labels, scores and confidence of a step's out-of-fold probs, of the folds trained, in run.

    Rare classes get a rule of their own where that helps: a fold the one that suits the others, the
    submission that of all folds.
    """
    masks, best = run.data.masks, {}
    tries = [[lib.PLAIN] * (1 + folds)]  # rules of the submission, and of each fold
    trained = np.isin(run.fold_of, range(folds))
    if run.cfg.fit_rare and folds > 1:
        parts = [trained, *(trained & (run.fold_of != fold) for fold in range(folds))]
        tries.append([lib.fit_rule(probs[part], masks[part]) for part in parts])
    for rule, *each in tries:
        labels = np.zeros_like(masks)
        for fold in range(folds):
            own = run.fold_of == fold
            labels[own] = final_masks(run, probs[own], each[fold])
        result = lib.fold_scores(masks, labels, run.fold_of, folds) | {"rule": rule}
        if not best or result["miou"] > best["miou"]:
            chosen, best = labels, result
    best |= lib.calibration(probs[trained], masks[trained])
    run.metrics |= {f"{name}_{key}": value for key, value in best.items()}
    print(f"{name} out of fold: {best['miou']:.4f} ± {best['fold_std']:.4f} mean IoU, the paper's "
          f"{best['paper_miou']:.4f}; IoU {np.round(best['iou'][1:], 3)}", flush=True)
    run.labels[name], run.confidence[name] = chosen, probs.max(1)  # last: a step is whole or not there


def write_outputs(run: Run, stages: list[list[list[lib.UNet]]]) -> np.ndarray | None:
    """Choose the step to submit, predict the test set, write submission.csv and its zip, read it back, score
    it if labels are known; return the labels submitted, uint8 (M, H, W), or None without a test set."""
    metrics, file, parts, sure = run.metrics, run.state.parent / "submission.csv", [], []
    steps = [*run.labels] if run.cfg.refine == "correct" else [*run.labels][-1:]  # as published: the last
    best = max(steps, key=lambda name: metrics[f"{name}_miou"])
    # rank 0's choice and rule: elsewhere the last bit of a score may differ
    submitted = metrics["submitted"] = steps[int(run.ranks.gather(steps.index(best))[0])]
    rule = run.ranks.sum(np.array(metrics[f"{submitted}_rule"]) * (run.ranks.rank == 0))
    needed = stages if submitted == "stage2" else stages[:1]
    frames, rare = None if submitted == "stage1" else run.evidence, run.is_rare.cpu().numpy()
    for start in range(0, len(run.test_images), 500):  # bounded memory
        part = slice(start, start + 500)
        sums, votes = predict_test(run, needed, frames, rule, part)
        if run.ranks.rank == 0:  # one writes
            labels = lib.elect(sums, votes, len(stages[0]), rare, run.cfg.first_class)
            parts.append(lib.clean_masks(labels))
            sure.append(sums.max(1).mean((1, 2)) / (255 * len(stages[0])))
    if not parts:  # no test set, or not the one that writes
        return None
    labels = np.concatenate(parts)
    lib.write_submission(file, labels)
    read = lib.check_submission(file, len(labels), labels[0].size, run.cfg.first_class)
    if not np.array_equal(read, labels.reshape(read.shape)):
        raise UserError(f"{file}: what was read back is not what was written; check the disk")
    lib.zip_file(file)
    print(f"submission: {file}, {len(labels)} rows, checked")
    metrics |= {"test_shares": [round(float((labels == c).mean()), 5) for c in range(NUM_CLASSES)],
                "test_confidence": float(np.concatenate(sure).mean())}
    if run.data.test_labels is not None:
        metrics["test_miou"], iou = lib.iou_scores(lib.confusion_matrix(run.data.test_labels, labels))
        metrics["test_iou"] = iou.tolist()
    return labels


def main(argv: list[str]) -> int:
    """Run the command line argv; return its exit status: 0, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM."""
    before = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            # an ASCII terminal gets ? for ± instead of a crash; torchrun's processes share one pipe without
            # a buffer, where a line written in two parts could be cut by another's
            stream.reconfigure(errors="replace", line_buffering=True, write_through=False)
    with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cfg = parse(argv)
        with lib.Ranks() as ranks:
            for key, value in solve(cfg, ranks).items():
                if not key.endswith(("confusion", "reliability")):
                    print(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")
        return 0
    except (UserError, OSError) as e:  # OSError: a full disk, a folder in a file's place, a closed pipe
        print(f"solve.py: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as e:
        status = 130 if isinstance(e, KeyboardInterrupt) else e.code
        if status:  # --help leaves with 0
            why = "stopped" if not isinstance(e, lib.PeerLost) else "another process of this run has ended"
            print(f"solve.py: {why}; the same command goes on from the last epoch", file=sys.stderr)
        return status
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    if "__file__" in globals():
        status = main(sys.argv[1:])
        if status and "RANK" in os.environ:  # gloo's threads would wait for the others, for days
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)
    main([])  # pasted into a notebook: sys.argv belongs to the kernel
