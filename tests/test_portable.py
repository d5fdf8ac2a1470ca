"""What works on every system: importing the package, and planning."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Libraries may import what they like on this system; shadowlit's own modules must do without.
SCRIPT = """
import builtins, pkgutil
import_module = builtins.__import__

def portable(name, globals=None, locals=None, fromlist=(), level=0):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("shadowlit"):
        raise ModuleNotFoundError(f"No module named {name!r}, imported by {globals['__name__']}")
    return import_module(name, globals, locals, fromlist, level)

builtins.__import__ = portable
import shadowlit
for module in pkgutil.walk_packages(shadowlit.__path__, "shadowlit."):
    if not module.name.endswith("__main__"):
        __import__(module.name)

import math, torch
from shadowlit.callbacks.throughput import peak_memory_bytes
assert math.isnan(peak_memory_bytes(torch.device("cpu")))

from shadowlit.cli.sweep import run
from shadowlit.studies.comparison.plan import plan
run("s", "configs/demo_lora.yaml", grid={"model.lr": [1e-3, 2e-3]}, dry_run=True)
print([training.name for training in plan(["B2I"], {"B2I": [1e-3]}, [0])])
"""


def test_the_package_is_imported_and_plans_without_modules_of_unix_alone():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 trials in" in done.stdout and "['B_lr0.001_seed0']" in done.stdout
