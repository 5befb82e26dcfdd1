"""Fault 24: a run killed at any moment, also while it saves, leaves a checkpoint that loads."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from examples import resume
from tests.conftest import KILLS

SCRIPT = Path(resume.__file__)
TRIALS = KILLS  # six a change, 500 in a release


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["student"]


def test_killed_runs_lose_nothing_and_end_bit_for_bit_like_one_that_was_left_alone(tmp_path):
    """Fault 24: SIGKILL at random moments; every time the old or the new checkpoint loads."""
    steps, path = 10_000, tmp_path / "run.pt"
    rng, seen = random.Random(0), [0]
    for _ in range(TRIALS):
        run = subprocess.Popen([sys.executable, SCRIPT, path, str(steps)])
        while not path.exists() or torch.load(path, weights_only=True)["step"] == seen[-1]:
            assert run.poll() is None, "the run ended by itself"
            time.sleep(0.02)
        time.sleep(rng.random() * 0.1)  # it saves after each step: some kills hit a save
        run.send_signal(signal.SIGKILL)
        run.wait()
        seen.append(torch.load(path, weights_only=True)["step"])
    assert seen == sorted(set(seen)), "a checkpoint was lost"
    alone = tmp_path / "alone.pt"
    resume.train(alone, seen[-1])
    for name, value in weights(alone).items():
        assert torch.equal(value, weights(path)[name]), name


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(tmp_path):
    """Fault 24: the write fails half way; the checkpoint that was there stays."""
    path = tmp_path / "run.pt"
    resume.save(path, {"step": 1, "x": torch.ones(1000)})
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2]); import resume\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "resume.save(Path(sys.argv[1]), {'step': 2, 'x': torch.zeros(1000)})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, path, SCRIPT.parent], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert torch.load(path, weights_only=True)["step"] == 1
