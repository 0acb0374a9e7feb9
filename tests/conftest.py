"""What every test runs under: one thread, seeded, property tests the same on every run."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated_card
import hypothesis
import pytest

if emulated_card.is_wanted():
    emulated_card.install()

import torch
from stores_away import away

from streamcnn.ceiling.kept_blocks import give_back
from streamcnn.cli import command_line
from streamcnn.data.tile_store import TileStore
from streamcnn.plan.storage import Tier
from streamcnn.stores import SpillFolder

# Plans are then the same on every machine.
os.environ["STREAMCNN_CALIBRATION"] = "off"
# And each test makes its own.
os.environ["STREAMCNN_PLANS"] = "off"

# Small tensors are slower on several threads, and tests may share the machine.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

# PyTorch writes a trace of what it compiles for whoever listens. pytest listens to each logger that does not
# hand its records on.
logging.getLogger("torch.__trace").propagate = True

hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")


if emulated_card.is_wanted() and emulated_card.interprets_kernels():
    from streamcnn.graph.ops import triton_passes

    # A user's passes would take hours under the interpreter; here it is all that runs kernels.
    triton_passes.IS_INTERPRETED = False


_TESTS_BETWEEN_FREEZES = 50
_num_tests = itertools.count(1)


def pytest_collection_finish() -> None:
    # The collector would walk all of PyTorch's objects again and again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    # And all that modules, caches and pytest keep of earlier tests: after thousands of them a full
    # collection takes two seconds, and each capture of code that Dynamo cannot follow makes one.
    if next(_num_tests) % _TESTS_BETWEEN_FREEZES == 0:
        gc.collect()
        gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; PyTorch sees none here")
    if item.get_closest_marker("real") is not None and emulated_card.is_wanted():
        pytest.skip("needs a GPU itself; the card is emulated")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        # The other would note for CUDA where it was called from, line by line.
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    """Free blocks count as none of what the process uses, which made-up figures do not know."""
    give_back()


@pytest.fixture
def gpu_left_clean() -> Iterator[None]:
    """Nothing of a test stays in force on the card."""
    card = torch.device("cuda:0")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.get_per_process_memory_fraction(card)
    yield
    assert torch.cuda.get_per_process_memory_fraction(card) == before, "the cap was left behind"
    left = [thread.name for thread in threading.enumerate() if thread.name == "streamcnn-sampler"]
    assert not left, "a sampling thread was left behind"


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """The benchmark's images at its smallest scale."""
    from benchmarks.harness.images import generated
    from benchmarks.harness.scales import SCALES
    from streamcnn.data.ultramnist import load_digits

    folder = tmp_path_factory.mktemp("tiny") / "images"
    return generated(SCALES["tiny"], folder, load_digits("uci"), workers=0)


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[SpillFolder]:
    """A folder for maps on disk."""
    with SpillFolder(tmp_path) as folder:
        yield folder


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put every stored map and its gradient on the disk."""
    away(monkeypatch, lambda name: Tier.DISK, lambda part: False)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line with arguments; its exit status, standard output and standard error."""

    def run_with(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["streamcnn", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command_line.run()
        output = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, output.out, output.err

    return run_with
