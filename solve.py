"""From the competition's file to a checked submission.csv, in one go.

    python solve.py --data data/                        the whole run; the same command goes on after a kill
    python solve.py --data mars.npz --max-hours 1       plan everything so that a submission exists within the hour
    python solve.py --recipe paper --folds 1            the paper's system, measured with both metrics
    python solve.py --data data/ --width 32 --folds 5 --epochs 40        no planning: exactly this

load ─ check ─ clean ─ folds ─ stage 1 ─ out-of-fold priors ─ stage 2 ─ predict ─ submission.csv ─ report.html

This file is what we decided; what is true of the task is in lib.py.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import difflib
import json
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import lib
from lib import NUM_CLASSES, UserError

# ------------------------------------------------------------------------------------------------ configuration


def opt(default, text: str):
    """Return a dataclass field that is also a command-line flag with this help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every choice of a run. 0 stands for "the plan decides". Fields with a help text are flags."""

    # input and output
    data: str = opt("data", "the competition's .npz, or the folder that holds it")
    out: str = opt("submission", "folder for everything that is written")
    recipe: str = opt("best", "best: ours; paper: the published system, for comparison")
    max_hours: float = opt(11.0, "a submission exists before this many hours are over")
    seed: int = opt(0, "seed of folds, weights and augmentation")
    fresh: bool = opt(False, "throw away the state of an earlier run in --out")
    # cleaning
    clean: bool = opt(True, "take intruders out of the training set (--no-clean: keep all)")
    witnesses: str = opt("masks,template,autoencoder", "which witnesses speak on intruders")
    template: str = opt("", "picture of an intruder to look for, instead of the one discovered")
    # engine
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    precision: str = opt("auto", "auto, bfloat16, float16 or float32")
    # size of the work; 0: planned from the measured speed and --max-hours
    folds: int = opt(0, "networks per stage, each validated on its own part; 1: one 15 %% split")
    width: int = opt(0, "channels of the first level (the paper: 64)")
    epochs: int = opt(0, "at most this many epochs a network")
    stages: int = opt(2, "1: no second stage")
    # training
    batch_size: int = opt(32, "images a step")
    lr: float = opt(2e-3, "learning rate of AdamW")
    gamma: float = opt(0.0, "focal loss: exponent γ (0: cross-entropy)")
    alpha: float = opt(1.0, "focal loss: factor α")
    rare_weight: float = opt(2.0, "loss weight of classes under 2 %% of the pixels")
    rare_repeat: int = opt(4, "how often an epoch shows the images that hold such a class")
    paste: float = opt(0.25, "share of images that get patches of such a class pasted")
    patience: int = opt(20, "epochs without a better validation before stopping; the rate falls after 28 %% of it")
    ema_decay: float = opt(0.99, "weight averaging per step (0: off)")
    # what tells the two recipes apart, and nobody would sweep
    background: bool = False          # is label 0 learnt and predicted, or ignored
    refine: str = "correct"           # stage 2: correct stage 1's log-probabilities, or fill in its background
    select: str = "score"             # the validation's mean IoU or its loss picks weights, rate and stop
    geometric: tuple = ()             # shift, scale, degrees
    light: float = 0.0                # brightness and contrast
    flip_vertical: bool = False       # the sun and the ground are never upside down in a frame
    tta: bool = True
    most_epochs: int = 60
    weight_decay: float = 1e-2
    cooldown: float = 0.4             # last share of the epochs in which the rate falls to zero
    level_weights: tuple = (0.1, 0.1, 0.1)  # inner outputs at 1/2, 1/4, 1/8 of the size


PAPER = dict(folds=1, lr=5e-4, gamma=3.0, alpha=0.25, rare_weight=1.0, rare_repeat=1, patience=25,
             ema_decay=0.0, background=True, refine="background", select="loss", geometric=(0.2, 0.2, 60.0), light=0.2,
             flip_vertical=True, tta=False, most_epochs=300, weight_decay=0.0, cooldown=0.0, level_weights=(0.2, 0.3, 0.5))


def parse(argv: list[str]) -> Config:
    """Return the Config that the flags stand for; UserError with the nearest flag for one that does not exist."""
    flags = [f for f in dataclasses.fields(Config) if f.metadata]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def complain(message: str):
        raise UserError(message)
    parser.error = complain
    for f in flags:
        name = f.name.replace("_", "-")
        if isinstance(f.default, bool):
            parser.add_argument(f"--no-{name}" if f.default else f"--{name}", dest=f.name, help=f.metadata["help"],
                                action="store_false" if f.default else "store_true", default=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{name}", type=type(f.default), metavar=str(f.default) or "FILE",
                                help=f.metadata["help"], default=argparse.SUPPRESS)
    known = [s for action in parser._actions for s in action.option_strings]
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, 1, 0.4)
            raise UserError(f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    try:
        given = vars(parser.parse_args(argv))
    except argparse.ArgumentError as e:
        raise UserError(str(e)) from None
    recipe = given.get("recipe", "best")
    if recipe not in ("best", "paper"):
        raise UserError(f"--recipe {recipe}: expected best or paper")
    cfg = Config(**{**(PAPER if recipe == "paper" else {}), **given})
    checks = {"max_hours": cfg.max_hours >= 0, "seed": cfg.seed >= 0, "folds": cfg.folds >= 0, "width": cfg.width >= 0,
              "epochs": cfg.epochs >= 0, "stages": cfg.stages in (1, 2), "batch_size": cfg.batch_size > 0,
              "lr": 0 < cfg.lr < 1, "gamma": cfg.gamma >= 0, "alpha": cfg.alpha > 0, "rare_weight": cfg.rare_weight > 0,
              "rare_repeat": cfg.rare_repeat >= 1, "paste": 0 <= cfg.paste <= 1, "patience": cfg.patience > 0,
              "ema_decay": 0 <= cfg.ema_decay < 1, "device": cfg.device.split(":")[0] in ("auto", "cpu", "cuda"),
              "precision": cfg.precision in ("auto", "bfloat16", "float16", "float32"),
              "witnesses": set(cfg.witnesses.split(",")) <= set(lib.WITNESSES)}
    for name, good in checks.items():
        if not good:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: out of range; see --help")
    return cfg


# ------------------------------------------------------------------------------------------------ one run's facts


class Clock:
    """Counts the seconds of a run over all its starts, and holds them against --max-hours."""

    def __init__(self, path: Path, max_hours: float):
        self.path, self.limit, self.start = path, max_hours * 3600, time.monotonic()
        self.before = json.loads(path.read_text())["seconds"] if path.exists() else 3.0  # importing PyTorch

    def used(self) -> float:
        return self.before + time.monotonic() - self.start

    def left(self) -> float:
        return self.limit - self.used()

    def save(self) -> None:
        lib.write_json(self.path, {"seconds": self.used()})


@dataclass
class Run:
    """What every part of a run needs to know. Images and masks are those that the cleaning kept."""

    cfg: Config
    out: Path
    clock: Clock
    device: torch.device
    dtype: torch.dtype
    data: lib.Data
    images: torch.Tensor        # uint8 (N, H, W), on the device
    masks: torch.Tensor         # int8 (N, H, W), on the device
    rare: list[int]             # classes under 2 % of the labelled pixels
    mean: float
    std: float
    outlier_images: np.ndarray  # uint8, those that the cleaning took out
    fold_of: np.ndarray | None = None
    plan: dict = field(default_factory=dict)
    histories: dict = field(default_factory=dict)  # (stage, fold) → list of epochs, for the report

    @property
    def first_class(self) -> int:
        return 0 if self.cfg.background else 1

    def state(self, name: str) -> Path:
        return self.out / "state" / name

    def folds(self) -> range:
        return range(self.fold_of.max() + 1)


@dataclass
class View:
    """What a network looks at: images uint8 (N, H, W); in stage 2 also stage 1's class probabilities in 1/255, uint8
    (N, NUM_CLASSES, H, W), and its cleaned masks, uint8 (N, H, W)."""

    images: torch.Tensor
    probs: torch.Tensor | None = None
    cleaned: torch.Tensor | None = None


def network_input(run: Run, view: View, index) -> torch.Tensor:
    """Return the input batch of the images at index (tensor or slice), float (B, C, H, W).

    Stage 1: the standardised image. Stage 2, "correct": also the cleaned mask one-hot, the confidence, and the
    log-probabilities that the network adds its correction to. Stage 2, "background": also a flag, 0 where stage 1 said
    background and -1 elsewhere.
    """
    x = ((view.images[index].float() - run.mean) / run.std)[:, None]
    if view.probs is None:
        return x
    cleaned = view.cleaned[index]
    if run.cfg.refine == "background":
        return torch.cat([x, -(cleaned != 0).float()[:, None]], 1)
    probs = view.probs[index, run.first_class:].float() / 255
    classes = torch.arange(run.first_class, NUM_CLASSES, device=x.device)
    one_hot = (cleaned[:, None] == classes[:, None, None]).float()
    return torch.cat([x, one_hot, probs.amax(1, keepdim=True), probs.clamp_min(1 / 510).log()], 1)


def build_network(run: Run, stage: int, fold: int) -> lib.UNet:
    """Return the freshly initialised network of a stage; its weights depend on (seed, stage, fold) alone."""
    outputs = NUM_CLASSES - run.first_class
    residual = stage == 2 and run.cfg.refine == "correct"
    channels = 1 if stage == 1 else 2 + outputs if residual else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(lib.generator(torch.device("cpu"), run.cfg.seed, stage, fold, 0).initial_seed()))
        model = lib.UNet(channels, outputs, run.plan["width"], residual=residual)
    return model.to(run.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ training


def training_batch(run: Run, view: View, targets: torch.Tensor, index: torch.Tensor, donors: torch.Tensor,
                   gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an augmented batch: input float (B, C, H, W), labels int8 (B, H, W). Donors are of the same split."""
    cfg = run.cfg
    x, y = network_input(run, view, index), targets[index]
    if cfg.paste and len(donors):
        pick = donors[torch.randint(len(donors), (len(index),), device=run.device, generator=gen)]
        donor_y = targets[pick]
        donor_y = torch.where(torch.isin(donor_y, torch.tensor(run.rare, dtype=torch.int8, device=run.device)),
                              donor_y, 0)
        x, y = lib.paste_rare(x, y, network_input(run, view, pick), donor_y, gen, cfg.paste)
    x, y = lib.flip(x, y, -1, gen)
    if cfg.flip_vertical:
        x, y = lib.flip(x, y, -2, gen)
    if cfg.geometric:
        x, y = lib.affine(x, y, gen, *cfg.geometric)
    if cfg.light:
        x = lib.jitter_light(x, gen, cfg.light)
    return x.contiguous(memory_format=torch.channels_last), y


def train_one_epoch(run: Run, model, ema, optimizer, scaler, view: View, targets, train_index, key: tuple) -> float:
    """Train on every image once, on rare ones rare_repeat times, in an order that key = (stage, fold, epoch) fixes.

    Returns the mean loss, NaN or inf if any step's was. No synchronisation with the device inside.
    """
    cfg = run.cfg
    gen = lib.generator(run.device, cfg.seed, *key)
    holds_rare = torch.isin(targets[train_index], torch.tensor(run.rare, dtype=torch.int8, device=run.device))
    donors = train_index[holds_rare.flatten(1).any(1)]
    order = torch.cat([train_index, donors.repeat(cfg.rare_repeat - 1)])
    order = order[torch.randperm(len(order), device=run.device, generator=gen)]
    batch_size = min(cfg.batch_size, max(4, len(order) // 16))  # few images: smaller steps, not fewer
    loss_args = loss_arguments(run)
    total, steps = torch.zeros((), device=run.device), 0
    model.train()
    for index in order.split(batch_size):
        x, y = training_batch(run, view, targets, index, donors, gen)
        with lib.autocast(run.device, run.dtype):
            logits = model(x)
        loss = lib.deep_supervision_loss(logits, y.long() - run.first_class, cfg.level_weights, **loss_args)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        lib.update_ema(ema, model, cfg.ema_decay)
        total, steps = total + loss.detach(), steps + 1
        if run.clock.left() < 0 and steps > 1:
            break  # the budget is a promise even inside an epoch
    return float(total / steps)


def loss_arguments(run: Run) -> dict:
    """Return focal_loss's arguments: below class 0 of the outputs (background or -1) nothing is counted."""
    weight = torch.ones(NUM_CLASSES - run.first_class, device=run.device)
    for c in run.rare:
        weight[c - run.first_class] = run.cfg.rare_weight
    return {"gamma": run.cfg.gamma, "alpha": run.cfg.alpha, "weight": weight, "ignore_index": -1}


@torch.inference_mode()
def evaluate(run: Run, model, view: View, targets: torch.Tensor, index: torch.Tensor) -> tuple[float, np.ndarray]:
    """Return the loss, mean over images, and the confusion matrix (NUM_CLASSES²) over the images at index."""
    model.eval()
    loss_args, loss = loss_arguments(run), torch.zeros((), device=run.device)
    confusion = torch.zeros(NUM_CLASSES ** 2, dtype=torch.int64, device=run.device)
    for part in index.split(64):
        y = targets[part].long()
        with lib.autocast(run.device, run.dtype):
            logits = model(network_input(run, view, part).contiguous(memory_format=torch.channels_last))[0]
        loss += lib.focal_loss(logits, y - run.first_class, **loss_args) * len(part)
        pred = logits.argmax(1) + run.first_class
        confusion += torch.bincount((y * NUM_CLASSES + pred)[y >= 0], minlength=NUM_CLASSES ** 2)
    return float(loss / len(index)), confusion.reshape(NUM_CLASSES, NUM_CLASSES).cpu().numpy()


def fit(run: Run, stage: int, fold: int, view: View, targets: torch.Tensor, deadline: float) -> lib.UNet:
    """Train one network of either stage, or go on with one, and return it with its best weights.

    Args: targets int8 (N, H, W), -1 ignored; deadline, in seconds of run.clock, by which it should end.
    Every epoch ends in a checkpoint, so a kill costs at most one.
    """
    cfg, path = run.cfg, run.state(f"stage{stage}_fold{fold}.pt")
    split = torch.from_numpy(run.fold_of).to(run.device)
    train_index, val_index = (split != fold).nonzero()[:, 0], (split == fold).nonzero()[:, 0]
    model = build_network(run, stage, fold)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if cfg.select == "score" else "min", factor=0.6, patience=cfg.patience * 7 // 25, min_lr=1e-6)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    done = lib.load_checkpoint(path)
    if done is None:
        seconds = run.plan["epoch_seconds"][stage - 1]
        epochs = max(1, min(run.plan["epochs"][stage - 1], int((deadline - run.clock.used()) / seconds)))
        done = {"epochs": epochs, "history": [], "best": None, "best_epoch": -1, "finished": False}
    elif not done["finished"]:
        for name, part in parts.items():
            part.load_state_dict(done.pop(name))
    history = run.histories[stage, fold] = done["history"]
    while not done["finished"]:
        epoch, start = len(history), time.monotonic()
        rate = optimizer.param_groups[0]["lr"]
        cooled = min(1.0, (done["epochs"] - epoch) / (cfg.cooldown * done["epochs"])) if cfg.cooldown else 1.0
        optimizer.param_groups[0]["lr"] = rate * cooled
        loss = train_one_epoch(run, model, ema, optimizer, scaler, view, targets, train_index, (stage, fold, epoch + 1))
        optimizer.param_groups[0]["lr"] = rate
        val_loss, confusion = evaluate(run, ema, view, targets, val_index)
        if not np.isfinite(loss + val_loss):
            raise UserError(f"stage {stage}, fold {fold}, epoch {epoch}: the loss is {loss}; try a smaller --lr")
        score = lib.iou_scores(confusion)[0]
        figure = score if cfg.select == "score" else val_loss
        scheduler.step(figure)
        history.append({"loss": loss, "val_loss": val_loss, "score": score, "lr": rate * cooled,
                        "seconds": time.monotonic() - start})
        if done["best"] is None or (figure > done["best_figure"]) == (cfg.select == "score"):
            done.update(best=copy.deepcopy(ema.state_dict()), best_figure=figure, best_epoch=epoch)
        slow = run.clock.used() + history[-1]["seconds"] > deadline
        done["finished"] = len(history) >= done["epochs"] or epoch - done["best_epoch"] >= cfg.patience or slow
        rest = {} if done["finished"] else {name: part.state_dict() for name, part in parts.items()}
        lib.save_checkpoint(path, {**done, **rest}, keep_previous=not done["finished"])
        run.clock.save()
        print(f"stage {stage} fold {fold} epoch {epoch + 1}/{done['epochs']}  loss {loss:.4f}  val loss {val_loss:.4f}"
              f"  score {score:.4f}  lr {rate * cooled:.1e}  {history[-1]['seconds']:.1f} s"
              f"  used {run.clock.used() / 60:.1f} min", flush=True)
    ema.load_state_dict(done["best"])
    return ema


# ------------------------------------------------------------------------------------------------ the plan


def measure_speed(run: Run, width: int, steps: int = 5) -> float:
    """Return the training speed, images/s, of a network of this width: the median of real steps after two."""
    run.plan["width"] = width
    model = build_network(run, 1, 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gen, batch = lib.generator(run.device, 0), min(run.cfg.batch_size, len(run.images))
    index, seconds = torch.arange(batch, device=run.device), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        x, y = training_batch(run, View(run.images), run.masks, index, index, gen)
        with lib.autocast(run.device, run.dtype):
            logits = model(x)
        lib.deep_supervision_loss(logits, y.long() - run.first_class, run.cfg.level_weights,
                                  **loss_arguments(run)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds.append(time.perf_counter() - start)
    return batch / float(np.median(seconds[2:]))


# (folds, width, epochs of both stages together that it needs at least), best first. Five networks of width 16 beat
# one of width 32 at equal time: averaging gives 2 to 5 points, width little (0.48 M parameters reached .732).
SIZES = ((5, 32, 40), (5, 24, 36), (5, 16, 18), (3, 16, 14), (3, 12, 10), (2, 12, 8), (2, 8, 0))


def make_plan(run: Run) -> dict:
    """Return folds, width and the epochs of both stages that fit into the time left, from measured speed.

    Four fifths of the time are planned: the rest is for a machine that slows down.
    """
    cfg, n = run.cfg, len(run.images)
    m = 0 if run.data.test_images is None else len(run.data.test_images)

    def cost(folds: int, speed: float) -> tuple[float, float, int]:
        """Return seconds an epoch, seconds of all predictions, affordable epochs, given training images/s."""
        part = 1 / folds if folds > 1 else 1 / 7
        epoch = n * (1.1 * (1 - part) + 0.4 * part) / speed  # a prediction costs 0.3 to 0.4 of a training step
        predict = 0.4 * cfg.stages * (1 + cfg.tta) * (n + m * folds) / speed + 1e-3 * m
        return epoch, predict, int(0.8 * (run.clock.left() - predict) / (folds * epoch))
    measured = cfg.width or 16
    speed = measure_speed(run, measured)
    for folds, width, least in SIZES:
        folds, width = min(cfg.folds or folds, n), cfg.width or width
        if cost(folds, speed * (measured / width) ** 1.7)[2] >= least:  # the exponent: 8 to 32 on a CPU
            break
    if width != measured:
        speed = measure_speed(run, width)
    epoch_seconds, predict_seconds, epochs = cost(folds, speed)
    epochs = max(2, min(epochs, 2 * cfg.most_epochs))
    first = cfg.epochs or (round(0.6 * epochs) if cfg.stages == 2 else epochs)
    second = (cfg.epochs or epochs - first) if cfg.stages == 2 else 0
    return {"folds": folds, "width": width, "epochs": [first, second],
            "epoch_seconds": [epoch_seconds, 1.05 * epoch_seconds], "predict_seconds": predict_seconds,
            "train_images_per_second": speed, "precision": str(run.dtype).removeprefix("torch.")}


# ------------------------------------------------------------------------------------------------ two stages


def train_stage(run: Run, stage: int, view: View, targets: torch.Tensor, end: float) -> list[lib.UNet]:
    """Return the networks of a stage, one a fold, by `end` seconds of the clock; fewer when time runs out."""
    models = []
    for fold in run.folds():
        known = run.state(f"stage{stage}_fold{fold}.pt").exists()
        if not known and (models or stage == 2) and run.clock.used() + run.plan["epoch_seconds"][stage - 1] > end:
            print(f"time is short: stage {stage} stops after {len(models)} of {len(run.folds())} folds", flush=True)
            break
        share = (end - run.clock.used()) / (len(run.folds()) - fold)
        models.append(fit(run, stage, fold, view, targets, run.clock.used() + share))
        spent = [epoch["seconds"] for epoch in run.histories[stage, fold]]
        run.plan["epoch_seconds"][stage - 1] = float(np.median(spent))
    return models


def out_of_fold(run: Run, models: list[lib.UNet], view: View) -> np.ndarray:
    """Return each training image's probabilities, uint8 (N, C, H, W), from the network that never saw it.

    With one split there is no such network for the images trained on: they get the one there is, which is why
    folds exist.
    """
    n, h, w = view.images.shape
    probs = np.zeros((n, NUM_CLASSES, h, w), np.uint8)
    for fold, model in enumerate(models):
        index = np.flatnonzero(run.fold_of == fold) if len(run.folds()) > 1 else np.arange(n)
        where = torch.from_numpy(index).to(run.device)
        probs[index] = lib.predict_probs(model, lambda part, where=where: network_input(run, view, where[part]),
                                         len(index), run.device, run.dtype, run.first_class, run.cfg.tta)
    return probs


def final_masks(run: Run, probs: np.ndarray, stage1: np.ndarray | None = None) -> np.ndarray:
    """Return labels (N, H, W) from probabilities (N, C, H, W), cleaned; in the paper's second stage only where
    stage1's labels are background."""
    labels = probs[:, run.first_class:].argmax(1).astype(np.uint8) + np.uint8(run.first_class)
    if stage1 is not None and run.cfg.refine == "background":
        labels = np.where(stage1 == 0, labels, stage1)
    return lib.clean_masks(labels)


def second_view(run: Run, images: torch.Tensor, probs: np.ndarray) -> View:
    """Return stage 2's view of images, given stage 1's probabilities there."""
    return View(images, torch.from_numpy(probs).to(run.device),
                torch.from_numpy(final_masks(run, probs)).to(run.device))


def score(run: Run, labels: np.ndarray, folds: int) -> dict:
    """Return both metrics of out-of-fold labels, pooled over the first `folds` folds, and their spread."""
    truth = run.masks.cpu().numpy()

    def confusion(where: np.ndarray) -> np.ndarray:
        return lib.confusion_matrix(truth[where], labels[where])
    pooled = confusion(np.isin(run.fold_of, range(folds)))
    miou, iou = lib.iou_scores(pooled)
    each = [lib.iou_scores(confusion(run.fold_of == k))[0] for k in range(folds)]
    return {"miou": miou, "iou": iou.tolist(), "paper_miou": lib.iou_scores(pooled, None)[0],
            "fold_miou": each, "fold_std": float(np.std(each)), "confusion": pooled.tolist()}


def predict_test(run: Run, stages: list[list[lib.UNet]], chunk: int = 1000) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the test labels of each stage, uint8 (M, H, W), and the last stage's confidence, uint8 in 1/255.

    Each second network corrects the first one of its own fold, as it was trained to, and the mean is taken
    last. In chunks, so that memory does not grow with the test set.
    """
    labels: list[list[np.ndarray]] = [[] for _ in stages]
    confidence = []
    for start in range(0, len(run.data.test_images), chunk):
        images = torch.from_numpy(run.data.test_images[start:start + chunk]).to(run.device)
        sums = [0.0 for _ in stages]
        for fold in range(len(stages[-1])):
            view = View(images)
            for i, models in enumerate(stages):
                probs = lib.predict_probs(models[fold], lambda part, view=view: network_input(run, view, part),
                                          len(images), run.device, run.dtype, run.first_class, run.cfg.tta)
                sums[i] = sums[i] + probs.astype(np.uint16)
                if i + 1 < len(stages):
                    view = second_view(run, images, probs)
        stage1 = None
        for i, total in enumerate(sums):
            stage1 = final_masks(run, total, stage1)
            labels[i].append(stage1)
        confidence.append((sums[-1].max(1) // len(stages[-1])).astype(np.uint8))
    return [np.concatenate(part) for part in labels], np.concatenate(confidence)


# ------------------------------------------------------------------------------------------------ the whole run


SAMPLE_HOURS = 0.07  # the embedded sample is a demonstration: 4 minutes, unless --max-hours says otherwise
KEEPS_RESULT = ("out", "fresh", "max_hours", "device")  # may change when a run goes on


def open_run(cfg: Config) -> Run:
    """Return the run that cfg describes, new or gone on with: data loaded and cleaned, engine and plan chosen."""
    data_file = lib.find_data_file(cfg.data)
    sample = data_file.name == "sample.npz"
    if sample and cfg.max_hours == Config.max_hours:
        cfg = dataclasses.replace(cfg, max_hours=SAMPLE_HOURS)
    out = Path(cfg.out).expanduser()
    data = lib.load_data(data_file)
    open_state(cfg, out, data.sha256)
    clock = Clock(out / "state" / "clock.json", cfg.max_hours)
    if sample:
        print(f"THIS IS THE EMBEDDED SAMPLE ({data_file}), a drawn demonstration: put mars_for_students.npz beside it")
    for line in describe(data):
        print(line)
    keep = clean(cfg, out, data)
    outlier_images = np.delete(data.images, keep, axis=0)
    data.images, data.masks = data.images[keep], data.masks[keep]
    device, why = lib.pick_device(cfg.device)
    dtype, why_dtype = lib.pick_precision(device) if cfg.precision == "auto" else \
        (getattr(torch, cfg.precision), "asked for")
    plan_file = out / "state" / "plan.json"
    plan = json.loads(plan_file.read_text()) if plan_file.exists() else {}
    if plan:  # the answer must not change because a clock ticked differently the second time
        dtype, why_dtype = getattr(torch, plan["precision"]), "as this run began"
    print(f"device: {device} ({why}), {torch.get_num_threads()} threads; precision: {dtype} ({why_dtype})")
    shares = np.bincount(data.masks.ravel(), minlength=NUM_CLASSES)[1:] / max(1, (data.masks > 0).sum())
    run = Run(cfg, out, clock, device, dtype, data, torch.from_numpy(data.images).to(device),
              torch.from_numpy(data.masks.astype(np.int8)).to(device),
              [c + 1 for c in range(NUM_CLASSES - 1) if 0 < shares[c] < 0.02],
              float(data.images.mean()), max(1.0, float(data.images.std())), outlier_images)
    if not plan:
        plan = make_plan(run)
        lib.write_json(plan_file, plan)
    run.plan = plan
    run.fold_of = lib.make_folds(data.images, data.masks, plan["folds"], cfg.seed)
    total = plan["folds"] * sum(e * s for e, s in zip(plan["epochs"], plan["epoch_seconds"])) + plan["predict_seconds"]
    print(f"plan: {plan['folds']} folds, width {plan['width']}, {plan['epochs'][0]} + {plan['epochs'][1]} epochs at most; "
          f"{plan['train_images_per_second']:.0f} training images/s: about {total / 60:.1f} min of the "
          f"{clock.left() / 60:.1f} min left", flush=True)
    return run


def open_state(cfg: Config, out: Path, sha256: str) -> None:
    """Make --out ready; UserError if it holds a run that this one cannot go on with, naming what differs."""
    try:
        (out / "state").mkdir(parents=True, exist_ok=True)
        (out / "state" / ".writable").touch()
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); choose another folder") from None
    if cfg.fresh:
        for file in (out / "state").iterdir():
            file.unlink()
    identity = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in KEEPS_RESULT + ("data",)}
    identity = json.loads(json.dumps({"data_sha256": sha256, **identity}))
    file = out / "state" / "identity.json"
    if not file.exists():
        return lib.write_json(file, identity)
    before = json.loads(file.read_text())
    for key in {**before, **identity}:
        if before.get(key) != identity.get(key):
            raise UserError(f"--out {out} holds a run with {key} = {before.get(key)}, this one has {identity.get(key)}; "
                            "use the same command, another --out, or --fresh to throw that run away")
    print(f"going on with the run in {out}")


def describe(data: lib.Data) -> list[str]:
    """Return the data's fingerprint in lines for people."""
    facts = lib.fingerprint(data)
    lines = [f"data: {data.path}, sha256 {data.sha256[:16]}…",
             f"      {facts['train_images']} training and {facts['test_images']} test images of "
             f"{facts['height']}×{facts['width']}, {data.dtype} in the file, values {facts['range'][0]} to {facts['range'][1]}"]
    for c, name in enumerate(lib.CLASSES):
        lines.append(f"      {c} {name:<10} {100 * facts['pixel_share'][c]:6.2f} % of pixels, "
                     f"in {facts['images_holding'][c]} images")
    return lines + [f"note: {note}" for note in data.notes]


def clean(cfg: Config, out: Path, data: lib.Data) -> np.ndarray:
    """Return the indices of the training images to keep; outliers.csv holds the others, with the evidence."""
    if not cfg.clean:
        return np.arange(len(data.images))
    file, start = out / "outliers.csv", time.monotonic()
    if not (out / "state" / "cleaned").exists():
        template = None
        if cfg.template:
            template = lib.read_picture(cfg.template)
        found = lib.find_outliers(data.images, data.masks, tuple(cfg.witnesses.split(",")), template, seed=cfg.seed)
        with lib.atomic_write(file) as f:
            f.write(found.to_csv(index=False).encode())
        (out / "state" / "cleaned").touch()
    found = pd.read_csv(file)
    print(f"cleaning: {len(found)} of {len(data.images)} training images are intruders ({file}), "
          f"{time.monotonic() - start:.0f} s", flush=True)
    return np.setdiff1d(np.arange(len(data.images)), found["index"])


def solve(cfg: Config) -> dict:
    """Run everything and return the metrics that metrics.json holds."""
    run = open_run(cfg)
    images, folds = View(run.images), len(run.folds())
    work = run.clock.limit * 0.97 - run.plan["predict_seconds"]
    share = run.plan["epochs"][0] / sum(run.plan["epochs"])
    stages = [train_stage(run, 1, images, run.masks, run.clock.used() + share * (work - run.clock.used()))]
    probs = [out_of_fold(run, stages[0], images)]
    labels = [final_masks(run, probs[0])]
    scores = [score(run, labels[0], len(stages[0]))]
    print_scores("stage 1", scores[0])
    if run.plan["epochs"][1] and len(stages[0]) == folds:
        view = second_view(run, run.images, probs[0])
        targets = torch.where(view.cleaned == 0, run.masks, -1) if run.cfg.refine == "background" else run.masks
        models = train_stage(run, 2, view, targets, work)
        if len(models) == folds:
            stages.append(models)
            probs.append(out_of_fold(run, models, view))
            labels.append(final_masks(run, probs[1], labels[0]))
            scores.append(score(run, labels[1], folds))
            print_scores("stage 2", scores[1])
    metrics = {"recipe": run.cfg.recipe, **{k: run.plan[k] for k in ("folds", "width", "epochs", "precision")}}
    for i, result in enumerate(scores, 1):
        metrics |= {f"stage{i}_{k}": v for k, v in result.items()}
    final = len(stages)
    if final == 2 and run.cfg.refine == "correct" and scores[1]["miou"] < scores[0]["miou"]:
        print("stage 2 is below stage 1 out of fold: stage 1 is submitted")
        final = 1
    metrics["submitted_stage"] = final
    if run.data.test_images is not None:
        write_outputs(run, stages[:final], metrics)
    metrics["minutes"] = round(run.clock.used() / 60, 2)
    lib.write_json(run.out / "metrics.json", metrics)
    write_report(run, metrics, labels, probs[final - 1])
    return metrics


def print_scores(title: str, result: dict) -> None:
    """Print a stage's out-of-fold scores in one line."""
    each = "  ".join(f"{name.lower()} {iou:.3f}" for name, iou in zip(lib.CLASSES[1:], result["iou"][1:]))
    print(f"{title} out of fold: mean IoU {result['miou']:.4f} (folds ± {result['fold_std']:.4f})  {each}  "
          f"with background (the paper's) {result['paper_miou']:.4f}", flush=True)


def write_outputs(run: Run, stages: list[list[lib.UNet]], metrics: dict) -> None:
    """Predict the test set, write submission.csv and its zip, check them, and add the test score if labels are known."""
    labels, confidence = predict_test(run, stages)
    file = run.out / "submission.csv"
    lib.write_submission(file, labels[-1])
    m, h, w = labels[-1].shape
    read = lib.check_submission(file, m, h * w, allow_background=run.cfg.background)
    if not np.array_equal(read.reshape(labels[-1].shape), labels[-1]):
        raise UserError(f"{file}: what was read back is not what was written; check the disk")
    lib.zip_file(file)
    shares = np.bincount(labels[-1].ravel(), minlength=NUM_CLASSES) / labels[-1].size
    metrics["test_shares"] = shares.round(5).tolist()
    metrics["test_confidence"] = round(float(confidence.mean()) / 255, 4)
    print(f"submission: {file}, {m} rows, checked; " + ", ".join(
        f"{name.lower()} {100 * share:.1f} %" for name, share in zip(lib.CLASSES, shares) if share), flush=True)
    if run.data.test_labels is not None:
        for i, stage in enumerate(labels, 1):
            miou, iou = lib.iou_scores(lib.confusion_matrix(run.data.test_labels, stage))
            metrics |= {"test_miou": miou, "test_iou": iou.tolist(), f"test_stage{i}_miou": miou}


def write_report(run: Run, metrics: dict, labels: list[np.ndarray], probs: np.ndarray) -> None:
    """Gather what report.html shows, of the validated images alone."""
    shown = np.flatnonzero((run.fold_of >= 0) & (run.fold_of <= max(fold for _, fold in run.histories)))
    file = run.out / "outliers.csv"
    outliers = pd.read_csv(file) if file.exists() and run.cfg.clean else pd.DataFrame(columns=["index", "reasons"])
    facts = {**lib.fingerprint(run.data), **dataclasses.asdict(run.cfg), **run.plan, "minutes": metrics["minutes"],
             "device": str(run.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "numpy": np.__version__, "python": platform.python_version()}
    lib.write_report(run.out / "report.html", metrics, run.histories, facts, run.data.images[shown],
                     run.data.masks[shown], [stage[shown] for stage in labels], probs[shown].max(1), outliers,
                     run.outlier_images)


def print_block(metrics: dict, out: Path) -> None:
    """Print the last lines of a run: `key: value`, the figures that metrics.json holds."""
    for key, value in metrics.items():
        if "confusion" not in key:
            print(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")
    for name in ("submission.csv", "submission.zip", "report.html", "metrics.json", "outliers.csv"):
        if (out / name).exists():
            print(f"written: {out / name}")


class Terminated(BaseException):
    """SIGTERM, raised wherever the run is: every file is written atomically, so the last epoch is safe."""


def main(argv: list[str]) -> int:
    """Run the command line argv and return its exit status: 0, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM."""
    def stop(*_):
        raise Terminated
    try:
        with contextlib.suppress(ValueError):  # not the main thread: a notebook's own signals stay
            signal.signal(signal.SIGTERM, stop)
        if int(os.environ.get("RANK", 0)) > 0:
            print("this version trains on one process; this rank has nothing to do")
            return 0
        cfg = parse(argv)
        print_block(solve(cfg), Path(cfg.out).expanduser())
        return 0
    except UserError as e:
        print(f"solve.py: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as e:
        print("solve.py: stopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 143


if __name__ == "__main__":
    if "__file__" in globals():
        sys.exit(main(sys.argv[1:]))
    main([])  # pasted into a notebook: sys.argv belongs to the kernel
