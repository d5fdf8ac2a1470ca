"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile

import pytest

# Set before any of these libraries is imported by a test: no network, no progress bars, no tokenizer threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread: results don't depend on the machine, and several test processes don't wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores SIGINT, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tokenised data of tests are kept for their time only.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="shadowlit-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-order-seed", type=int, help="run the tests of each process in an order of this seed")
    parser.addoption("--chaos-kills", type=int, help="the largest number of kills in each test of tests/chaos")
    parser.addoption("--chaos-seed", type=int, default=0, help="the moments at which the tests in tests/chaos kill")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle the tests where that is asked for: none may need another one before it."""
    _spare_lists_of_packages()
    if (seed := config.getoption("--random-order-seed")) is not None:
        random.Random(seed).shuffle(items)


def _spare_lists_of_packages() -> None:
    """Lm-evaluation-harness lists all installed packages for every evaluation, for a second each."""
    importlib.import_module("torch.utils.collect_env")  # late: the process that hands out the tests needs no torch
    for name in ("torch.utils.collect_env", "lm_eval.loggers.utils"):
        if name in sys.modules:
            sys.modules[name].get_pretty_env_info = lambda: "not collected"


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Spare the garbage collector what is imported, and fork the server of processes while nothing is computed yet."""
    gc.collect()
    gc.freeze()  # what is imported by now is not searched for garbage again
    gc.set_threshold(20_000, 20, 20)
    if "tests.distributed" in sys.modules:
        sys.modules["tests.distributed"].start_server()


@pytest.fixture(autouse=True)
def _handlers_of_signals():
    """Put back the handlers that a Trainer leaves behind when a callback fails while it handles an exception."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
