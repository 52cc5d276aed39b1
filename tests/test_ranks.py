"""The same answer from one worker, several workers, several processes and several machines; and no process
that outlives another one's death."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_arrays

import lib
import solve

FLAGS = ["--epochs", "2", "--width", "4", "--lr", "0.02", "--rare-repeat", "1", "--no-clean",
         "--device", "cpu", "--precision", "float32"]
THREE_NETWORKS = [*FLAGS, "--folds", "3"]
FOUR_NETWORKS = [*FLAGS, "--folds", "2", "--seeds", "2"]  # of each stage
TWO_PROCESSES = ("--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny tiles with test labels, a few of them side by side in a frame."""
    file = tmp_path_factory.mktemp("data") / "mars.npz"
    np.savez(file, **tiny_arrays(24, 6, 48, 64))
    return file


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """solve.py with a checkpoint after every epoch; given SEEDS, rank r has the r-th seed of them."""
    file = tmp_path_factory.mktemp("script") / "saves_often.py"
    file.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import lib, solve
lib.SAVE_SECONDS = 0
seeds = os.environ.get("SEEDS")
sys.exit(solve.main([*sys.argv[1:], *(["--seed", seeds[int(os.environ["RANK"])]] if seeds else [])]))
""")
    return file


def begin(data, out, launch, script=ROOT / "solve.py"):
    """Start a run of four networks a stage by torchrun, launched with such options."""
    argv = [str(script), "--data", str(data), "--out", str(out), *FOUR_NETWORKS]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launch, *argv],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, seconds=120):
    """Wait for its end and return what it printed and what it complained of."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return out, err


def answer(out):
    """Return the submission's bytes and metrics.json without the minutes."""
    metrics = re.sub(r'"minutes": [\d.]+', "", (out / "metrics.json").read_text())
    return (out / "submission.csv").read_bytes(), metrics


def checkpoints(out):
    """Return when each checkpoint was written, by name."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "state").glob("stage*.pt")}


def wait_for(condition, seconds=60):
    """Wait until condition() holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def ranks_of(agent):
    """Return the processes that torchrun (its process id) has started, by rank."""
    ranks = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        rank = re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_text())
        if rank:
            ranks[int(rank[1])] = int(child)
    return ranks


def alone_in(out, data, flags):
    """Run in this process with one worker and return the answer."""
    with lib.single_threaded():
        solve.solve(solve.parse(["--data", str(data), "--out", str(out), *flags]))
    return answer(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The answer of one process with one worker."""
    return alone_in(tmp_path_factory.mktemp("alone"), data, FOUR_NETWORKS)


# ---------------------------------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tiles large enough for images of half the side."""
    file = tmp_path_factory.mktemp("large") / "mars.npz"
    np.savez(file, **tiny_arrays(24, 6, 64, 64))
    return file


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory, large):
    """The answer of three networks, trained one after the other."""
    return alone_in(tmp_path_factory.mktemp("one"), large, THREE_NETWORKS)


@pytest.fixture
def three_cores():
    """A machine on which PyTorch computes with three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_three_workers_give_the_bytes_of_one(tmp_path, large, one_worker, three_cores, capsys):
    """Three networks side by side in one process; none of its threads outlives main(), which gives back
    PyTorch's number."""
    before = threading.enumerate()
    assert solve.main(["--data", str(large), "--out", str(tmp_path), *THREE_NETWORKS]) == 0
    assert re.search("^plan: .* 3 workers", capsys.readouterr().out, re.M)
    assert answer(tmp_path) == one_worker
    assert threading.enumerate() == before and torch.get_num_threads() == 3


def test_who_is_late_changes_nothing(tmp_path, large, one_worker, monkeypatch, capsys):
    """Two workers, and one network of three takes a second longer for each epoch than the others: the bytes
    are the same. While networks train, nobody touches the random state that all threads share."""
    threads, trained = set(), []

    def only_in_the_main_thread(function):
        def called(*args, **kwargs):
            assert threading.current_thread() is threading.main_thread(), "process-wide random state"
            return function(*args, **kwargs)

        return called

    def next_epoch(run, stage, net, *args, original=solve.next_epoch):
        threads.add(threading.current_thread())
        if net == 0:
            time.sleep(1)
        original(run, stage, net, *args)
        trained.append((stage, net))

    monkeypatch.setattr(solve, "next_epoch", next_epoch)
    for owner, name in ((torch, "manual_seed"), (torch.random, "manual_seed"), (torch.random, "fork_rng"),
                        (torch, "set_rng_state"), (torch.random, "set_rng_state"), (np.random, "seed")):
        monkeypatch.setattr(owner, name, only_in_the_main_thread(getattr(owner, name)))
    with lib.single_threaded():
        solve.solve(solve.parse(["--data", str(large), "--out", str(tmp_path), *THREE_NETWORKS]), cores=2)
    assert re.search("^plan: .* 2 workers", capsys.readouterr().out, re.M)
    assert len(trained) == 12 and trained.index((1, 0)) > 1 and threading.main_thread() not in threads
    assert answer(tmp_path) == one_worker


# ------------------------------------------------------------------------------------------ ranks


@pytest.fixture(scope="module")
def killed(tmp_path_factory, data, script):
    """The folder of a run of two processes of which one is killed in the middle of training, first rank 1,
    then, in a second start, rank 0; and for each: torchrun's status, the seconds until all was over, the
    ranks that were left, whether there was a submission."""
    out, ends = tmp_path_factory.mktemp("killed") / "out", []
    for victim in (1, 0):
        before = checkpoints(out)
        agent = begin(data, out, TWO_PROCESSES, script)
        wait_for(lambda before=before: checkpoints(out) != before)
        ranks, start = ranks_of(agent.pid), time.monotonic()
        os.kill(ranks[victim], signal.SIGKILL)
        agent.communicate(timeout=120)
        left = [rank for rank, process in ranks.items() if Path(f"/proc/{process}").exists()]
        ends.append((agent.returncode, time.monotonic() - start, left, (out / "submission.csv").exists()))
    return out, ends


def test_54_a_dead_process_stops_the_others(killed):
    """kill -9 of either of two processes: all is over within a minute, with a status that is not 0, and there
    is no submission."""
    for status, seconds, left, submission in killed[1]:
        assert status != 0 and seconds < 60 and not left and not submission


@pytest.fixture(scope="module")
def gone_on(killed, data, script):
    """The folder of that run when the same command has ended, begun with a torn file of rank 1's; what it
    printed and what it complained of."""
    out, torn = killed[0], killed[0] / "state" / "stage1_fold1.pt"  # network 1 of 4
    torn.write_bytes(torn.read_bytes()[:-1] if torn.exists() else b"torn")
    return out, *finish(begin(data, out, TWO_PROCESSES, script))


def test_54_the_same_command_goes_on_to_the_same_bytes(gone_on, alone):
    """After both deaths two processes go on where they were and end with the bytes of one, printed and
    written by rank 0 alone; a warning of rank 1, that a file is torn, has its number."""
    out, printed, complained = gone_on
    assert answer(out) == alone
    for text in ("going on with the run", "data: ", "plan: ", "stage 2  epoch 2/2", "submission: "):
        assert len(re.findall(f"^{text}", printed, re.M)) == 1
    torn = out / "state" / "stage1_fold1.pt"
    assert re.findall(r"^(.*): damaged", printed + complained, re.M) == [f"rank 1: {torn}"]
    assert checkpoints(out).keys() == {f"stage{stage}_fold{fold}{seed}.pt"
                                       for stage in "12" for fold in "01" for seed in ("", "_seed1")}


def test_a_resumed_run_trains_nothing_that_is_finished(gone_on, data, alone, capsys):
    """One process in the folder of two that have ended: no network is trained or written, and the submission
    is the same."""
    out, before = gone_on[0], checkpoints(gone_on[0])
    for result in ("submission.csv", "metrics.json"):
        (out / result).unlink()
    assert alone_in(out, data, FOUR_NETWORKS) == alone and checkpoints(out) == before
    assert "  epoch " not in capsys.readouterr().out


def test_two_nodes_without_a_common_folder(tmp_path, data, alone):
    """Two machines that meet on the loopback, each with a folder of its own: the bytes of one process in rank
    0's folder; the other one holds its own two networks of each stage, and no result."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launch = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
    nodes = [begin(data, tmp_path / f"node{node}", (*launch, f"--node_rank={node}")) for node in (0, 1)]
    printed = [finish(node)[0] for node in nodes]
    assert answer(tmp_path / "node0") == alone and printed[1] == ""
    for result in ("submission.csv", "submission.zip", "metrics.json", "report.html"):
        assert (tmp_path / "node0" / result).exists() and not (tmp_path / "node1" / result).exists()
    own, others = checkpoints(tmp_path / "node0").keys(), checkpoints(tmp_path / "node1").keys()
    assert len(own) == len(others) == 4 and not own & others


def test_other_options_of_another_process_are_refused(tmp_path, data, script, monkeypatch):
    """Two processes, one with another seed: all ends soon, with a status and a sentence, and nothing is
    begun."""
    monkeypatch.setenv("SEEDS", "01")
    agent = begin(data, tmp_path / "out", TWO_PROCESSES, script)
    _, complained = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert "solve.py: torchrun: the processes have different data or options\n" in complained
    assert not (tmp_path / "out" / "state" / "identity.json").exists()


def test_alone_nothing_is_joined():
    """One process: no group, what is shared is the value itself, standard output stays."""
    before, value = sys.stdout, {"array": torch.zeros(2)}
    ranks = lib.Ranks()
    ranks.barrier()
    assert (ranks.rank, ranks.world) == (0, 1) and ranks.share(value) is value
    assert not torch.distributed.is_initialized() and sys.stdout is before


def test_a_line_is_one_write(monkeypatch):
    """torchrun's processes write into one pipe without a buffer: a line goes there whole, end and all."""
    class Pipe(io.RawIOBase):
        parts = []

        def writable(self):
            return True

        def write(self, part):
            self.parts.append(bytes(part))
            return len(part)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Pipe(), write_through=True))
    assert solve.main(["--nosuch"]) == 2
    assert len(Pipe.parts) == 1 and Pipe.parts[0].endswith(b"\n")
