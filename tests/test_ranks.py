"""Section 12: the same answer from several processes and machines, started by torchrun."""
from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import ROOT, TINY, run_main, tiny_arrays

import lib

FOUR_NETWORKS = ("--seeds", "2")  # of each stage, beside TINY's two folds
TWO_PROCESSES = ("--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny tiles with test labels."""
    file = tmp_path_factory.mktemp("data") / "mars.npz"
    np.savez(file, **tiny_arrays(24, 6, 48, 64))
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The answer of one process."""
    out = tmp_path_factory.mktemp("alone")
    status, _, err = run_main(data, out, *FOUR_NETWORKS)
    assert status == 0, err
    return answer(out)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """solve.py with a checkpoint after every epoch; given SEEDS, rank r has the r-th of them."""
    file = tmp_path_factory.mktemp("script") / "saves_often.py"
    file.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import lib, solve
lib.SAVE_SECONDS = 0
seeds = os.environ.get("SEEDS")
argv = [*sys.argv[1:], *(["--seed", seeds[int(os.environ["RANK"])]] if seeds else [])]
sys.exit(solve.main(argv))
""")
    return file


def begin(data, out, launch, script=ROOT / "solve.py", flags=()):
    """Start a run of four networks a stage by torchrun, launched with such options."""
    command = [sys.executable, "-m", "torch.distributed.run", *launch, str(script), "--data",
               str(data), "--out", str(out), *TINY, *FOUR_NETWORKS, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Wait for its end and return what it printed and what it complained of."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out, err


def answer(out):
    """Return the submission's bytes and metrics.json without the minutes."""
    metrics = re.sub(r'"minutes": [\d.]+', "", (out / "metrics.json").read_text())
    return (out / "submission.csv").read_bytes(), metrics


def checkpoints(out):
    """Return when each checkpoint was written, by name."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "state").glob("stage*.pt")}


def ranks_of(agent):
    """Return the processes that torchrun (its process id) has started, by rank."""
    ranks = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        rank = re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_text())
        if rank:
            ranks[int(rank[1])] = int(child)
    return ranks


@pytest.mark.slow
@pytest.mark.fault(54)
def test_a_dead_process_ends_the_others_and_the_same_command_goes_on(tmp_path, data, script, alone):
    """kill -9 of either of two processes while they train: all is over within a minute, with a
    status that is not 0 and no submission. The same command goes on to the bytes of one process,
    printed by rank 0 alone; a warning of rank 1, that a file is torn, has its number. One process
    in that folder then trains nothing."""
    out = tmp_path / "out"
    for victim in (1, 0):
        before = checkpoints(out)
        agent = begin(data, out, TWO_PROCESSES, script)
        while checkpoints(out) == before:
            assert agent.poll() is None, agent.communicate()
            time.sleep(0.01)
        ranks, start = ranks_of(agent.pid), time.monotonic()
        os.kill(ranks[victim], signal.SIGKILL)
        agent.communicate(timeout=120)
        assert agent.returncode != 0 and time.monotonic() - start < 60
        assert not [rank for rank in ranks.values() if Path(f"/proc/{rank}").exists()]
        assert not (out / "submission.csv").exists()
    torn = out / "state" / "stage1_fold1.pt"  # network 1 of 4: rank 1's
    torn.write_bytes(b"torn")
    printed, complained = finish(begin(data, out, TWO_PROCESSES, script))
    assert answer(out) == alone
    for text in ("going on with the run", "data: ", "plan: ", "stage 2  epoch 2/2", "submission: "):
        assert len(re.findall(f"^{text}", printed, re.M)) == 1
    assert re.findall(r"^(.*): damaged", printed + complained, re.M) == [f"rank 1: {torn}"]
    before = checkpoints(out)
    assert len(before) == 8
    assert run_main(data, out, *FOUR_NETWORKS)[0] == 0
    assert answer(out) == alone and checkpoints(out) == before


@pytest.mark.slow
def test_two_nodes_without_a_common_folder(tmp_path, data, alone):
    """Two machines that meet on the loopback, each with a folder of its own: the bytes of one
    process in rank 0's folder; the other holds its own two networks of each stage, no result."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launch = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    nodes = [begin(data, tmp_path / f"node{node}", (*launch, f"--node_rank={node}"))
             for node in (0, 1)]
    printed = [finish(node)[0] for node in nodes]
    assert answer(tmp_path / "node0") == alone and printed[1] == ""
    for result in ("submission.csv", "submission.zip", "metrics.json", "report.html"):
        assert (tmp_path / "node0" / result).exists()
        assert not (tmp_path / "node1" / result).exists()
    own, others = (checkpoints(tmp_path / f"node{node}").keys() for node in (0, 1))
    assert len(own) == len(others) == 4 and not own & others


@pytest.mark.slow
def test_other_options_of_another_process_are_refused(tmp_path, data, script, monkeypatch):
    """Two processes, one with another seed: all ends soon, with a status and a sentence, and
    nothing is begun or, in spite of --fresh, deleted."""
    monkeypatch.setenv("SEEDS", "01")
    old = tmp_path / "out" / "state" / "stage1_fold0.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    agent = begin(data, tmp_path / "out", TWO_PROCESSES, script, ["--fresh"])
    _, complained = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert "solve.py: torchrun: the processes have different data or options" in complained
    assert [file.name for file in old.parent.glob("*.*")] == [old.name]


def test_alone_nothing_is_joined():
    """One process: no group, what is shared is the value itself, standard output stays."""
    before, value = sys.stdout, {"array": torch.zeros(2)}
    ranks = lib.Ranks()
    assert (ranks.rank, ranks.world) == (0, 1) and ranks.share(value) is value
    assert not torch.distributed.is_initialized() and sys.stdout is before


def test_a_sentence_is_one_write(monkeypatch):
    """torchrun's processes write into one pipe, each by python -u: a line goes there whole."""
    class Pipe(io.RawIOBase):
        parts = []

        def writable(self):
            return True

        def write(self, part):
            self.parts.append(bytes(part))
            return len(part)

    def refuse():
        raise lib.UserError("no such file")

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Pipe(), write_through=True))
    assert lib.run_command(refuse) == 2
    assert Pipe.parts == [b"solve.py: no such file\n"]
