"""What the camera frames are worth, measured in two ways.

    python solve.py --data FILE --out OUT [options]
    python tests/ablation.py --data FILE --out OUT [the same options]
    python tests/ablation.py --group-frames --data FILE --out OUT2 [options]

The first, without any training, takes the first networks of a finished run and prints the
competition's score out of fold, over all pixels: of stage 1, of stage 1 with the frames' context,
and with the same tiles put at random places of the same frames, three times: a gain must vanish
there.

With --group-frames a run of its own is trained and scored, in which no frame is in two folds: a
validated tile is one of a new frame, of which no label is known. To measure, not to submit.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import lib
import solve

folds_of_images = lib.make_folds  # as it is before train_on_whole_frames replaces it


def folds_of_frames(images: np.ndarray, masks: np.ndarray, folds: int, seed: int,
                    frame: np.ndarray) -> np.ndarray:
    """Return the fold of each image, (N,), as lib.make_folds does, with equal images and all images
    of a frame, int (N,), -1: of none, in one fold."""
    n = len(images)
    copy_of = np.unique(images.reshape(n, -1), axis=0, return_inverse=True)[1].ravel()
    alone = frame.max() + 1 + np.arange(n)
    frame = np.where(frame < 0, alone, frame)
    # a graph of groups of copies and of frames, tied by the images
    nodes = n + frame.max() + 1
    graph = coo_matrix((np.ones(n), (copy_of, n + frame)), (nodes, nodes))
    tied = connected_components(graph, directed=False)[1][copy_of]
    count = len(np.unique(tied))
    if count < max(2, folds):
        raise lib.UserError(f"--folds {folds}: the training set has only {count} different frames; "
                            "leave out --group-frames")
    # a group's number in place of its images
    return folds_of_images(tied[:, None], masks, folds, seed)


@dataclasses.dataclass(frozen=True)
class WholeFrames(solve.Config):
    """The choices of a run whose folds are made of whole frames: no other run can go on with it."""

    group_frames: bool = True


def train_on_whole_frames(cfg: solve.Config, cores: int) -> dict:
    """Train and score a run whose folds are made of whole frames, and return its metrics."""
    if not cfg.frames:
        raise lib.UserError("--group-frames: --recipe paper and --no-frames look for none")
    state = Path(cfg.out).expanduser() / "state"

    def make_folds(images: np.ndarray, masks: np.ndarray, folds: int, seed: int) -> np.ndarray:
        found, = state.glob("frames_*.pt")
        place = lib.load_checkpoint(found)["place"].numpy()
        return folds_of_frames(images, masks, folds, seed, place[0, :len(images)])

    lib.make_folds = make_folds
    try:
        metrics = solve.solve(WholeFrames(**vars(cfg)), cores)
    finally:
        lib.make_folds = folds_of_images
    for key in ("stage1_miou", "frames_miou", "stage2_miou", "submitted"):
        print(f"{key}: {metrics.get(key)}")
    return metrics


def first_networks(run: solve.Run) -> list[list[lib.UNet]]:
    """Return each fold's finished networks of stage 1."""
    models = []
    for net in range(run.plan.folds * run.plan.seeds):
        network = solve.new_network(run, 1, net)
        network.resume()
        if not network.finished:
            raise lib.UserError(f"{run.state.parent}: no finished first stage")
        models.append(network.ema.model)
    return [models[fold::run.plan.folds] for fold in range(run.plan.folds)]


def compare_places(cfg: solve.Config, cores: int) -> dict[str, float]:
    """Print the scores with the frames as found and with shuffled ones, and return them by name."""
    if not (Path(cfg.out).expanduser() / "state" / "stage1_fold0.pt").exists():
        raise lib.UserError(f"--out {cfg.out} holds no run; solve.py trains one")
    run = solve.open_run(cfg, cores)
    if run.place is None or run.plan.folds < 2:
        raise lib.UserError(f"{run.state.parent}: no frames, or one fold alone")
    probs = lib.predict_unseen(first_networks(run), run.tiles, run.dtype, cfg.tta, run.workers)
    solve.conclude(run, "stage1", probs)
    scores = {"stage 1": run.metrics["stage1_miou"]}
    rng, placed = np.random.default_rng(0), np.flatnonzero(run.place[0] >= 0)
    places = {"with frames": run.place}
    for draw in range(3):
        shuffled = run.place.copy()
        shuffled[:, placed] = run.place[:, rng.permutation(placed)]
        places[f"at random places, draw {draw}"] = shuffled
    for name, place in places.items():
        print(f"{name}:")
        solve.add_context(dataclasses.replace(run, place=place), probs.copy())
        scores[name] = run.metrics["frames_miou"]
    return scores


def main(argv: list[str]) -> dict:
    """Run the command line argv and return its scores by name, or the metrics of its own run."""
    words = [word for word in argv if word != "--group-frames"]
    cfg = solve.parse(words)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # as solve.main does it
    cv2.setNumThreads(1)
    try:
        if len(words) < len(argv):
            return train_on_whole_frames(cfg, cores)
        return compare_places(dataclasses.replace(cfg, fresh=False), cores)
    finally:
        torch.set_num_threads(cores)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (lib.UserError, OSError) as e:
        print(f"ablation.py: {e}", file=sys.stderr)
        sys.exit(2)
