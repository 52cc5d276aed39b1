"""Several processes: the same answer, as torchrun starts them, and no process that waits for a dead one."""
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
from conftest import ROOT, tiny_arrays

import lib
import solve

TWO_SEEDS = ["--folds", "3", "--seeds", "2", "--epochs", "2", "--width", "4", "--lr", "0.02", "--no-clean",
             "--device", "cpu", "--precision", "float32"]


def free_port():
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def command(data, out, flags, ranks=1, *launch):
    """Return the command line of a run: plain, or by torchrun with so many processes on this node."""
    launch = launch or ("--standalone",)
    start = ["-m", "torch.distributed.run", *launch, f"--nproc_per_node={ranks}"]
    start *= ranks > 1 or len(launch) > 1
    return [sys.executable, *start, str(ROOT / "solve.py"), "--data", str(data), "--out", str(out), *flags]


def run(*args):
    """Run the command to its end and return what it printed."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def answer(out):
    """Return the submission's bytes and metrics.json without the minutes."""
    metrics = re.sub(r'"minutes": [\d.]+', "", (out / "metrics.json").read_text())
    return (out / "submission.csv").read_bytes(), metrics


def wait_for(condition, seconds=120):
    """Wait until condition() holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def workers(agent):
    """Return the processes that torchrun (its process id) has started, in the order of their ranks."""
    ranks = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environ = Path(f"/proc/{child}/environ").read_text()
        ranks[int(re.search(r"\0RANK=(\d+)\0", environ)[1])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny tiles with test labels."""
    file = tmp_path_factory.mktemp("data") / "mars.npz"
    np.savez(file, **tiny_arrays(32, 6, 64, 64))
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The answer of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run(data, out, TWO_SEEDS)
    return answer(out)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_answer_does_not_depend_on_the_number_of_processes(tmp_path, data, alone, ranks):
    """Six networks a stage on 2, 3 and 7 processes, predicted by 2, 3 and 3 of them: the bytes of one."""
    printed = run(data, tmp_path / "out", TWO_SEEDS, ranks)
    assert answer(tmp_path / "out") == alone
    for stage in (1, 2):  # each network is trained by one process, and said to be
        lines = re.findall(rf"^stage {stage}  fold (\d)  seed (\d)  epoch 2/2", printed, re.M)
        assert sorted(lines) == [(f, s) for f in "012" for s in "01"]
    assert printed.count("submission: ") == 1


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


def test_two_nodes_without_a_common_folder(tmp_path, data, alone):
    """Two torchrun agents that meet on the loopback, each with a folder of its own: the bytes of one process,
    in the folder of rank 0's; then one process goes on in the other node's folder, without any training."""
    port = free_port()
    nodes = []
    for node in (0, 1):
        launch = ("--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")
        nodes.append(subprocess.Popen(command(data, tmp_path / f"node{node}", TWO_SEEDS, 1, *launch),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for node in nodes:
        _, err = node.communicate(timeout=600)
        assert node.returncode == 0, err[-3000:]
    assert answer(tmp_path / "node0") == alone
    assert not (tmp_path / "node1" / "submission.csv").exists()
    assert "epoch 2/2" not in run(data, tmp_path / "node1", TWO_SEEDS)
    assert answer(tmp_path / "node1") == alone


@pytest.mark.parametrize("victim", [0, 1])
def test_54_a_dead_process_stops_the_others(tmp_path, data, alone, victim):
    """kill -9 of one of two processes in the middle of training: all is over within a minute, with a status
    and a sentence, no submission; three processes go on from there to the same bytes."""
    out = tmp_path / "out"
    agent = subprocess.Popen(command(data, out, TWO_SEEDS, 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    wait_for(lambda: any((out / "state").glob("stage1_fold*.pt")))
    os.kill(workers(agent.pid)[victim], signal.SIGKILL)
    start = time.monotonic()
    _, err = agent.communicate(timeout=120)
    assert time.monotonic() - start < 60 and agent.returncode != 0
    assert len(re.findall(r"^solve.py: .*; the same command goes on from the last epoch$", err, re.M)) == 1
    assert not (out / "submission.csv").exists()
    run(data, out, TWO_SEEDS, 3)
    assert answer(out) == alone


class Store(dict):
    """A store in which only this process beats."""

    def add(self, key, n):
        """Add n to a counter and return it, as torch's stores do."""
        self[key] = self.get(key, 0) + n
        return self[key]


class Gone:
    """A store whose host has died."""

    def add(self, key, n):
        """Raise what torch raises."""
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("store", [Store(), Gone()])
def test_a_silent_process_is_noticed_on_another_node(monkeypatch, store):
    """One process of two gives no sign, or the store is gone: this one gets SIGTERM after that time."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    got = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: got.set())
    try:
        start = time.monotonic()
        lib.Ranks().watch(store, 0.5)
        assert got.wait(5) and time.monotonic() - start < 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_alone_nothing_is_shared(tmp_path):
    """One process: sums are the array itself, no file is touched, nothing is joined."""
    with lib.Ranks() as ranks:
        array = np.arange(3, dtype=np.uint16)
        assert ranks.sum(array) is array and ranks.gather(5).tolist() == [5]
        ranks.share(tmp_path / "none", -1)
    assert not any(tmp_path.iterdir())


def test_other_options_on_another_node_are_refused(tmp_path, data):
    """Two agents, one with another seed: both end soon, with 2 or as the other is gone, and one says why."""
    port, nodes = free_port(), []
    for node in (0, 1):
        launch = ("--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")
        argv = command(data, tmp_path / f"node{node}", [*TWO_SEEDS, "--seed", str(node)], 1, *launch)
        nodes.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ends = [(node.communicate(timeout=120)[1], node.returncode) for node in nodes]
    assert all(status != 0 for _, status in ends)
    assert any("solve.py: torchrun: the processes have different data or options" in err for err, _ in ends)
    assert not list(tmp_path.glob("node*/state/identity.json"))
