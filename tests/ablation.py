"""What the camera frames are worth, from the first networks of a finished run, without any training.

    python solve.py --data FILE --out OUT [options]
    python tests/ablation.py --data FILE --out OUT [the same options]

Prints the competition's score out of fold, over all pixels: of stage 1, of stage 1 with the frames' evidence,
and with the same tiles put at random places of the same frames, three times: a gain must vanish there.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import lib
import solve


def main(argv: list[str]) -> dict[str, float]:
    """Print the table and return the scores by name."""
    cfg = dataclasses.replace(solve.parse(argv), fresh=False)
    if not (Path(cfg.out).expanduser() / "state" / "stage1_fold0.pt").exists():
        raise lib.UserError(f"--out {cfg.out} holds no run; solve.py trains one")
    run = solve.open_run(cfg)
    models = []
    for fold in range(run.folds):
        models.append([solve.new_training(run, 1, fold)["ema"]])
        state = lib.load_checkpoint(run.checkpoint(1, fold))
        if state is None or not state["finished"] or run.place is None:
            raise lib.UserError(f"{run.state.parent}: no finished first stage, or no frames")
        models[-1][0].load_state_dict(state["best"])
    probs = solve.out_of_fold(run, models, solve.View(run.images))
    said = solve.predicted_cells(run, models, probs)
    rng, true, placed = np.random.default_rng(0), run.place, np.flatnonzero(run.place[0] >= 0)
    places = {"with frames": true}
    for draw in range(3):
        places[f"at random places, draw {draw}"] = true.copy()
        places[f"at random places, draw {draw}"][:, placed] = true[:, rng.permutation(placed)]
    solve.score(run, "stage 1", probs, run.folds)
    for name, run.place in places.items():
        frames = lib.frame_evidence(probs, said, run.data.masks, run.fold_of, run.place)
        own = lib.reweigh(probs, frames.known, frames.strengths, run.cfg.first_class)
        solve.score(run, name, own, run.folds)
    return {name: run.metrics[f"{name}_miou"] for name in ("stage 1", *places)}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (lib.UserError, OSError) as e:
        print(f"ablation.py: {e}", file=sys.stderr)
        sys.exit(2)
