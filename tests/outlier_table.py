"""Print recall and precision of the cleaning on drawn sets, as a table for ABLATIONS.md.

    python tests/outlier_table.py                         # on data/sample.npz
    python tests/outlier_table.py --data mars_real.npz --public mars_real_public.npz 300 1200
"""
import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import outlier_sets
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lib  # noqa: E402


def main():
    """Print a row for every count and share: three draws' recall, precision, images taken, and how
    many of the outliers the autoencoder's candidates hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=ROOT / "data" / "sample.npz")
    parser.add_argument("--public", help="file whose train_outliers are known")
    parser.add_argument("counts", nargs="*", type=int, help="tiles of a set (default: all)")
    args = parser.parse_args()
    train = np.load(args.data)["training_set"]
    if args.public:
        train = np.delete(train, np.load(args.public)["train_outliers"], 0)
    torch.set_num_threads(1)  # as solve.main does it
    cv2.setNumThreads(1)
    pmap = ThreadPoolExecutor(os.cpu_count()).map
    print("| tiles | share | recall | precision | taken | autoencoder |\n|--:|--:|---|---|---|---|")
    for count in args.counts or [len(train)]:
        for share in (0, 0.01, 0.04, 0.15, 0.25):
            rows = []
            for draw in (6, 7, 8):
                *case, true = outlier_sets.make_set(train[:, 0], train[:, 1], count, share, draw)
                found = lib.find_outliers(*case, log=lambda _: None, pmap=pmap)["index"]
                hits = np.isin(found, true).sum()
                error = lib.autoencoder_error(*case, 0)
                strange = np.isin(np.argsort(-error)[:lib.CANDIDATES], true).sum()
                rows.append((hits / max(1, len(true)), hits / max(1, len(found)), len(found),
                             strange / max(1, len(true))))
            cells = [" ".join(f"{x:.3g}" for x in column) for column in zip(*rows, strict=True)]
            print(f"| {count} | {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
