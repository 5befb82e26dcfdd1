"""One place for the environment of the tests: Triton's interpreter, Hypothesis, GPU promises."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

# Must be set before Triton is imported for the first time: its kernels are decorated once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import interpreter

    interpreter.quicken()

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a GPU machine may lack it; no GPU test needs it
    settings = None
else:
    _quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    # Over all property tests more than 2,000 examples a change and 100,000 a release.
    settings.register_profile("change", max_examples=200, **_quiet)
    settings.register_profile("release", max_examples=10_000, **_quiet)
    settings.load_profile(os.environ.get("LWKD_HYPOTHESIS", "change"))

# Workers that run side by side share the cores: more threads than these wait for each other. What
# a test starts sees it too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

REQUIRE_GPU = os.environ.get("LWKD_REQUIRE_GPU") == "1"
KILLS = int(os.environ.get("LWKD_KILLS", "6"))


def marked(item: pytest.Item, name: str) -> bool:
    """By a mark alone: among an item's keywords are the ids of its parameters too."""
    return item.get_closest_marker(name) is not None


def lacks_the_second(item: pytest.Item) -> bool:
    """Whether a test asks for two GPUs and there is one: nobody has promised a second."""
    return marked(item, "two_gpus") and torch.cuda.device_count() == 1


def pytest_configure(config: pytest.Config) -> None:
    """Workers take files in order: xdist keeps those of few tests for the end, the longest too."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = not (torch.cuda.is_available() or REQUIRE_GPU)
    for item in items:
        if absent and marked(item, "gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
        elif lacks_the_second(item):
            item.add_marker(pytest.mark.skip(reason="one GPU: another device is unproven"))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no test's gc.collect() need walk over it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Where a GPU was promised, a skipped GPU test is a failure."""
    outcome = yield
    report = outcome.get_result()
    promised = REQUIRE_GPU and marked(item, "gpu") and not lacks_the_second(item)
    if promised and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although LWKD_REQUIRE_GPU=1"


@pytest.fixture
def ddp(tmp_path: Path):
    """DistributedDataParallel, in a group of this process alone.

    A test's wrappers go before the group does: a reducer that holds it last waits for gloo's
    threads with Python's lock in hand, which one of them may be waiting for.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.nn.parallel.DistributedDataParallel
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _generators_restored():
    """No test leaves its seed to the next one, and lwkd never draws from torch's generators."""
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
