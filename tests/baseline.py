"""What a plain U-Net of a well-known library reaches in the same time on the same cleaned images.

    pip install --no-deps monai
    python tests/baseline.py --data FILE --out baseline.csv --minutes 55

MONAI's BasicUNet (1.98 M parameters), cross-entropy without background, mirrored images, AdamW, a
one-cycle rate over as many epochs as the minutes allow, the kit's precision, no image held back.
Writes a CSV.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet

import lib


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--epochs", type=int, default=0, help="0: as many as fit into the minutes")
    args = parser.parse_args()
    start, data, ((device, *_), _) = time.monotonic(), lib.load_data(args.data), lib.pick_devices()
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"  # outliers.csv is written beside it
        state.mkdir()
        torch.set_num_threads(1)  # as solve.main does it
        cv2.setNumThreads(1)
        helpers = lib.Workers([torch.device("cpu")], cores)
        lib.clean_data(data, state, "", 0, lib.Ranks(), helpers.map)
        torch.set_num_threads(cores)
    lib.keep_freed_memory()
    dtype, _ = lib.pick_precision(device)
    images = torch.from_numpy(data.images).to(device)
    masks = torch.from_numpy(data.masks).long().to(device)
    torch.manual_seed(0)
    model = BasicUNet(2, 1, lib.NUM_CLASSES - 1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    gen = torch.Generator(device).manual_seed(0)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        x = ((batch.float() - data.mean) / data.std)[:, None]
        x = x.contiguous(memory_format=torch.channels_last)
        with lib.autocast(device, dtype):
            return model(x).float()

    def train_one_epoch(steps: int | None = None) -> float:
        total, order = 0.0, torch.randperm(len(images), generator=gen, device=device)
        order = order.split(32)[:steps]
        for index in order:
            x, y = lib.flip(images[index][:, None], masks[index], -1, gen)
            loss = F.cross_entropy(logits(x[:, 0]), y - 1, ignore_index=-1)  # background is 0
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            total += loss.detach() / len(order)
        return float(total)

    scheduler, weights = None, {name: value.clone() for name, value in model.state_dict().items()}
    train_one_epoch(1)
    before = time.monotonic()
    train_one_epoch(10)
    steps = -(-len(images) // 32)
    seconds = (time.monotonic() - before) / 10 * steps
    left = 60 * args.minutes - (time.monotonic() - start)
    epochs = args.epochs or int(left / (1.02 * seconds)) - 1
    print(f"{epochs} epochs of {seconds:.1f} s, {len(images) / seconds:.0f} images/s", flush=True)
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, epochs * steps)
    model.train()
    for epoch in range(epochs):
        print(f"epoch {epoch + 1}/{epochs}  loss {train_one_epoch():.4f}  "
              f"{(time.monotonic() - start) / 60:.1f} min", flush=True)
    model.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(data.test_images).to(device).split(256)
        labels = torch.cat([logits(part).argmax(1) + 1 for part in parts])
    lib.write_submission(Path(args.out), labels.cpu().numpy().astype(np.uint8))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
