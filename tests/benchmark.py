"""What the engine's speed is worth: one table of ratios, each pair measured in turn in the same
run.

    python tests/benchmark.py                              all of it, half an hour on 2 cores
    python tests/benchmark.py --data mars.npz --width 32   on your file, another network
    python tests/benchmark.py --only speed growth          some parts: speed growth files whole

Figures are medians of ROUNDS rounds after one that warms up, of all workers at once, as many as a
run of five folds has. "The usual pipeline" is what most kits for this task have: one network, all
threads inside each operation, a DataLoader with two workers that augment image by image, float32,
one loss, read every step. It needs albumentations (pip install albumentations) and is left out
without it.
"""
import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lib
import solve

ROOT, ROUNDS, STEPS = Path(lib.__file__).parent, 5, 10


def seconds(run: solve.Run, *works) -> list[float]:
    """Return each work's median seconds; they take turns, so that a slow minute hits all of
    them."""
    taken = [[] for _ in works]
    for _ in range(ROUNDS + 1):
        for work, times in zip(works, taken, strict=True):
            start = time.perf_counter()
            waited = work() or 0.0  # a work may return seconds that do not count
            for device in {device for device in run.workers.devices if device.type == "cuda"}:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start - waited)
    return [statistics.median(times[1:]) for times in taken]


def side_by_side(run: solve.Run, make):
    """Return a function that does in every worker of a run at once what make(run, device) returned
    for it."""
    made = {device: [] for device in run.workers.devices}
    for device in run.workers.devices:
        made[device].append(make(run, device))

    def work() -> None:
        waiting = {device: [*works] for device, works in made.items()}
        run.workers.run(lambda device: waiting[device].pop()())

    return work


def batch_size(run: solve.Run) -> int:
    """Return the images a step that an epoch over all images takes: fewer than 32 on a small
    file."""
    return solve.batch_size(run.cfg, len(run.data.images))


def repeated(run: solve.Run, count: int) -> lib.StageInput:
    """Return so many training tiles, the first ones again and again, each in a frame of its own."""
    index = torch.arange(count, device=run.workers.devices[0]) % len(run.data.images)
    return dataclasses.replace(
        run.tiles, frames=lib.Frames.lay_out(None, count).to(index.device),
        images=run.tiles.images[index],
        targets=run.tiles.targets[index], fold_of=torch.full_like(index, -1))


def new_network(run: solve.Run, device: torch.device) -> lib.TrainingState:
    """Return a network of stage 1 on a device of the run."""
    return solve.new_network(run, 1, [*dict.fromkeys(run.workers.devices)].index(device))


def with_width(run: solve.Run, width: int) -> solve.Run:
    """Return the run with networks of that width."""
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, width=width))


def row(what: str, measured: float, unit: str, target: str = "") -> None:
    """Print a row of the table."""
    print(f"| {what} | {measured:.3g} {unit} | {target} |", flush=True)


def open_run(data: Path, out: str, cores: int, *flags: str) -> solve.Run:
    """Return a run with nothing cleaned, whose workers are those of five folds."""
    argv = ["--data", str(data), "--out", out, "--max-hours", "9", "--no-clean", "--no-frames",
            "--folds", "5", "--width", "8", "--epochs", "1", *flags]
    return solve.open_run(solve.parse(argv), cores)


# -------------------------------------------------------------------------- training and prediction


class Tiles(torch.utils.data.Dataset):
    """Image and mask, augmented one at a time on the CPU, as the paper describes."""

    def __init__(self, images: np.ndarray, masks: np.ndarray):
        import albumentations as A

        self.images, self.masks = images, masks
        self.transform = A.Compose([
            A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5),
            A.Affine(scale=(0.8, 1.2), translate_percent=(-0.2, 0.2), rotate=(-60, 60), p=0.5),
            A.RandomBrightnessContrast(p=0.5)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.transform(image=self.images[i], mask=self.masks[i])
        image = torch.from_numpy(out["image"] / np.float32(255))[None]
        return image, torch.from_numpy(out["mask"]).long()


def usual_pipeline(run: solve.Run, cores: int):
    """Return a function that trains STEPS batches the usual way, and returns its start-up
    seconds."""
    tiles = Tiles(run.data.images, run.data.masks.astype(np.uint8))
    device = run.workers.devices[0]
    model = lib.UNet(1, lib.NUM_CLASSES, run.plan.width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)

    def work() -> float:
        torch.set_num_threads(cores)
        start = time.perf_counter()
        loader = iter(torch.utils.data.DataLoader(
            tiles, batch_size(run), shuffle=True, num_workers=2, pin_memory=device.type == "cuda"))
        for step in range(STEPS + 1):
            x, y = (part.to(device) for part in next(loader))
            if step == 0:
                waited = time.perf_counter() - start
            loss = F.cross_entropy(model(x)[0], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        torch.set_num_threads(1)
        # nor does the one step more count
        return waited + (time.perf_counter() - start - waited) / (STEPS + 1)

    return work


def bare_network(run: solve.Run, device: torch.device):
    """Return a function that trains the network STEPS times on one resident batch, with one
    loss."""
    network, size = new_network(run, device), batch_size(run)
    model, optimizer = network.model.train(), network.optimizer
    x, y = repeated(run, size).to(device).windows(torch.arange(size, device=device))
    x, y = x.contiguous(memory_format=torch.channels_last), (y.long() - 1).clamp_min(-1)

    def work() -> None:
        for _ in range(STEPS):
            with lib.autocast(device, run.dtype):
                logits = model(x)
            loss = F.cross_entropy(logits[0].float(), y, ignore_index=-1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return work


def engine(data: lib.StageInput, steps: int | None = STEPS):
    """Return what side_by_side makes functions of that train for so many steps of an epoch on
    data."""
    def make(run: solve.Run, device: torch.device):
        network, own = new_network(run, device), data.to(device)
        index = torch.arange(len(own.images), device=device)
        return lambda: solve.train_one_epoch(run, network, own, index, (1, 0, 1), steps)

    return make


def prediction(run: solve.Run):
    """Return a function that predicts as many images a worker as STEPS training steps see."""
    model = new_network(run, run.workers.devices[0]).ema.model.eval()
    data, workers = repeated(run, STEPS * batch_size(run)), len(run.workers.devices)

    def work() -> None:
        # as if each worker had a fold of its own
        lib.predict_unseen([[model]] * workers, data, run.dtype, run.cfg.tta, run.workers)

    return work


def measure_speed(run: solve.Run, cores: int) -> None:
    """Print the training and prediction speed, beside the bare network, one worker with all
    threads, the usual pipeline, and the bound that the arithmetic sets."""
    count, workers = STEPS * batch_size(run), len(run.workers.devices)
    data = repeated(run, len(run.data.images))
    works = {"engine": side_by_side(run, engine(data)), "bare": side_by_side(run, bare_network),
             "predict": prediction(run)}
    images = dict.fromkeys(works, workers * count)
    if workers > 1:
        alone = dataclasses.replace(run, workers=lib.Workers([run.workers.devices[0]], 1, cores))
        works["alone"], images["alone"] = side_by_side(alone, engine(data)), count
    try:
        works["usual"], images["usual"] = usual_pipeline(run, cores), count
    except ImportError:
        print("albumentations is not there: the usual pipeline is left out", flush=True)
    taken = zip(works, seconds(run, *works.values()), strict=True)
    speed = {name: images[name] / took for name, took in taken}
    model = new_network(run, run.workers.devices[0]).model
    size = sum(p.numel() for p in model.parameters()) / 1e6
    row(f"width {run.plan.width} ({size:.2f} M), {workers} workers × {run.workers.threads} "
        "threads: training", speed["engine"], "images/s")
    row("... of the bare network's on one resident batch", speed["engine"] / speed["bare"], "",
        "≥ 0.90")
    if "alone" in works:
        row("... against one worker with all threads, or one on a GPU",
            speed["engine"] / speed["alone"], "×")
    if "usual" in works:
        row("... against the usual pipeline", speed["engine"] / speed["usual"], "×",
            "≥ 3; GPU ≥ 5")
    row("... prediction with flips against training", speed["predict"] / speed["engine"], "×",
        "≥ 2.5")
    forward, train = flops(run, model)
    peak = matmul_flops(run)
    row("bound: training at the speed of one large matrix product", peak / train, "images/s")
    row("bound: prediction with flips, against training",
        peak / (2 * forward) / speed["engine"], "×")


def flops(run: solve.Run, model: torch.nn.Module) -> tuple[float, float]:
    """Return the floating-point operations an image of the forward pass, and of a training step."""
    x = repeated(run, 2).windows(torch.arange(2, device=run.workers.devices[0]))[0]
    with FlopCounterMode(display=False) as counter:
        out = model.train()(x)
        forward = counter.get_total_flops()
        sum(o.mean() for o in out).backward()
    return forward / 2, counter.get_total_flops() / 2


def matmul_flops(run: solve.Run, n: int = 2048) -> float:
    """Return the operations a second of large matrix products in the run's precision, one a worker:
    what can be had."""
    def product(run: solve.Run, device: torch.device):
        a, b = (torch.randn(n, n, device=device, dtype=run.dtype) for _ in "ab")
        return lambda: torch.mm(a, b).sum().item()

    return len(run.workers.devices) * 2 * n ** 3 / seconds(run, side_by_side(run, product))[0]


# ------------------------------------------------------------------------------ cost as work grows


def measure_growth(run: solve.Run) -> None:
    """Print the time per image of epochs of 500 to 10,000 images, and of networks of 8 to 32
    channels."""
    workers, times, costs = len(run.workers.devices), {}, []
    for count in (500, 2000, 10000):
        data = repeated(run, count)
        rare = data.holds_rare[:count]
        shown = count + int(rare.sum()) * (run.cfg.oversample - 1)
        work = side_by_side(with_width(run, 8), engine(data, None))
        times[count] = seconds(run, work)[0] / (shown * workers)
        row(f"width 8, an epoch of {count:,} images, time per image", 1e3 * times[count], "ms")
    row("... the slowest against the fastest", max(times.values()) / min(times.values()), "×",
        "≤ 1.15")
    data = repeated(run, len(run.data.images))
    for width in (8, 16, 24, 32):
        wide = with_width(run, width)
        took = seconds(wide, side_by_side(wide, engine(data)))[0]
        took /= STEPS * batch_size(run) * workers
        costs.append((flops(wide, new_network(wide, wide.workers.devices[0]).model)[1], took))
        row(f"width {width}: {costs[-1][0] / 1e9:.2f} GFLOP an image and step",
            1e-9 * costs[-1][0] / took, "GFLOP/s")
    slope = np.polyfit(*np.log(costs).T, 1)[0]
    row("... time grows with this power of the operations", slope, "", "≤ 1")


# ------------------------------------------------------------------------- files, masks, whole runs


def measure_files(run: solve.Run, folder: Path, cores: int) -> None:
    """Print what writing and cleaning 10,022 masks takes, and looking for outliers with all
    cores."""
    masks = np.resize(run.data.masks.astype(np.uint8), (10022, *run.data.masks.shape[1:]))
    flat = masks.reshape(len(masks), -1)

    def by_pandas() -> None:
        frame = pd.DataFrame(flat, columns=[str(i) for i in range(flat.shape[1])])
        frame.insert(0, "id", range(len(frame)))
        frame.to_csv(folder / "pandas.csv", index=False)

    def morphology() -> None:
        lib.clean_masks(masks)

    start = time.perf_counter()
    by_pandas()
    pandas = time.perf_counter() - start
    ours = seconds(run, lambda: lib.write_submission(folder / "ours.csv", masks))[0]
    assert (folder / "pandas.csv").read_bytes() == (folder / "ours.csv").read_bytes()
    row(f"CSV of 10,022 rows in {ours:.2f} s, against pandas ({pandas:.1f} s, the same bytes)",
        ours / pandas, "×", "≤ 0.04")
    row("opening and closing of 10,022 masks, one core", seconds(run, morphology)[0], "s", "≤ 2")
    start, helpers = time.perf_counter(), lib.Workers([torch.device("cpu")], cores)
    found = lib.find_outliers(run.data.images, run.data.masks, pmap=helpers.map)
    row(f"cleaning of {len(run.data.images):,} images, {len(found)} named",
        time.perf_counter() - start, "s", "≤ 60; GPU ≤ 10")


def competition_file(run: solve.Run, path: Path) -> Path:
    """Write a file of the competition's size, 2,615 float64 images and 10,022 tests, made of the
    run's tiles; noise keeps the repeated ones apart."""
    rng = np.random.default_rng(0)

    def tiles(images: np.ndarray, count: int) -> np.ndarray:
        noise = rng.integers(-3, 4, (count, *images.shape[1:]), np.int8)
        noise[:len(images)] = 0
        noisy = np.resize(images, noise.shape).astype(np.int16) + noise
        return np.clip(noisy, 0, 255).astype(np.uint8)

    images = tiles(run.data.images, 2615)
    both = np.stack([images, np.resize(run.data.masks, images.shape)], 1)
    test = run.data.test_images if len(run.data.test_images) else run.data.images
    np.savez(path, training_set=both.astype(np.float64), test_set=tiles(test, 10022))
    return path


def whole_run(data: Path, out: Path, *flags: str) -> tuple[float, float, float]:
    """Return the seconds to the plan, which follows the first training steps, those to the end, and
    the peak resident memory in GB, of the command on a file."""
    command = [sys.executable, "-u", str(ROOT / "solve.py"), "--data", str(data), "--out", str(out),
               *flags]
    start, first = time.perf_counter(), float("nan")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("plan:"):
            first = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, f"{' '.join(command)}: status {status}"
    return first, time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9  # Linux counts in kB


def measure_whole(run: solve.Run, folder: Path, data: Path) -> None:
    """Print how soon runs train, and what a whole one on a file of the competition's size needs."""
    flags = ("--folds", "2", "--epochs", "1", "--width")
    first = whole_run(data, folder / "bare", "--no-clean", "--no-frames", *flags, "8")[0]
    row("command to first training steps, without cleaning and frames", first, "s",
        "≤ 15; CUDA ≤ 20")
    file = competition_file(run, folder / "competition.npz")
    first, total, memory = whole_run(file, folder / "whole", *flags, "16")
    row("... with both, competition's size", first, "s")
    row("... to the end: 2 folds of width 16, 1 + 1 epochs", total, "s")
    row("... peak resident memory", memory, "GB", "≤ 3 on a CPU")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "sample.npz")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, nargs="+", default=[16, 32])
    parts = ("speed", "growth", "files", "whole")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # as solve.main does it
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = open_run(args.data, name + "/run", cores, "--device", args.device)
        print("| what | measured | target |\n|---|--:|---|")
        for width in args.width if "speed" in args.only else ():
            measure_speed(with_width(run, width), cores)
        if "growth" in args.only:
            measure_growth(run)
        if "files" in args.only:
            measure_files(run, folder, cores)
        if "whole" in args.only:
            measure_whole(run, folder, args.data)


if __name__ == "__main__":
    main()
