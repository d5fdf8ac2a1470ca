"""What works on every system: importing the package, and planning."""

import builtins
import importlib
import math
import pkgutil
import sys

import torch

from tests.distributed import Forked


def without_modules_of_unix():
    """Import shadowlit anew, and plan; libraries may import what they like on this system."""
    import_module = builtins.__import__

    def portable(name, globals=None, locals=None, fromlist=(), level=0):
        if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("shadowlit"):
            raise ModuleNotFoundError(f"No module named {name!r}, imported by {globals['__name__']}")
        return import_module(name, globals, locals, fromlist, level)

    for name in [name for name in sys.modules if name.partition(".")[0] == "shadowlit"]:
        del sys.modules[name]
    builtins.__import__ = portable
    package = importlib.import_module("shadowlit")
    for module in pkgutil.walk_packages(package.__path__, "shadowlit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    from shadowlit.callbacks.throughput import peak_memory_bytes
    from shadowlit.cli.sweep import run
    from shadowlit.studies.comparison.plan import plan

    assert math.isnan(peak_memory_bytes(torch.device("cpu")))
    run("s", "configs/demo_lora.yaml", grid={"model.lr": [1e-3, 2e-3]}, dry_run=True)
    print([training.name for training in plan(["B2I"], {"B2I": [1e-3]}, [0])])


def test_the_package_is_imported_and_plans_without_modules_of_unix_alone(tmp_path):
    out = tmp_path / "out.txt"
    code = Forked(without_modules_of_unix, out=out).wait(120)
    printed = out.read_text()
    assert code == 0, printed
    assert "2 trials in" in printed and "['B_lr0.001_seed0']" in printed
