"""A training on a CPU gives freed tensors back to the system, so that it takes what its tensors take."""

import subprocess
import sys

import pytest

from shadowlit import lightning_cli
from shadowlit.demo import BASE, DATA, INSTRUCT

HOLES = """
import gc, re, sys, torch
from pathlib import Path
from shadowlit.allocator import return_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
if sys.argv[1] == "return":
    return_freed_memory()
torch.ones(2**21).clone()  # 8 MiB: glibc takes smaller ones for the heap from now on
tensors = [torch.ones(2**18) for _ in range(256)]  # 1 MiB each
held = resident()
del tensors[::2]  # every other one: a heap can't shrink
print(held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gaps_between_tensors_are_returned():
    freed = {
        mode: float(subprocess.run([sys.executable, "-c", HOLES, mode], capture_output=True, check=True).stdout)
        for mode in ("return", "keep")
    }
    assert freed["return"] > 120 and freed["keep"] < 20


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize("small_bytes", [0, 2**26])
def test_a_training_of_a_large_model_on_a_cpu_asks_for_it(monkeypatch, tmp_path, small_bytes):
    asked = []
    monkeypatch.setattr(lightning_cli, "_SMALL_BYTES", small_bytes)
    monkeypatch.setattr(lightning_cli, "return_freed_memory", lambda: asked.append(True))
    given = ["plan", f"--pair.base={BASE}", f"--pair.instruct={INSTRUCT}", f"--run.root={tmp_path}",
             f"--data.train={DATA / 'train_house.jsonl'}", "--measure_steps=0"]  # fmt: skip
    lightning_cli.main([*given, "--trainer.accelerator=cpu", "--data.ignore_columns=[skill, answer]"])
    assert asked == ([] if small_bytes else [True])
