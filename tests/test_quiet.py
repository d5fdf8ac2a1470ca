"""What commands keep from the terminal, and what they don't."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shadowlit.quiet import _is_shown

ROOT = Path(__file__).parents[1]
CODE = """
import warnings
from shadowlit.quiet import quieten
quieten()
for category in (DeprecationWarning, FutureWarning, UserWarning):
    warnings.warn(f"a {category.__name__}", category)
"""


@pytest.mark.parametrize(
    ("message", "level", "shown"),
    [
        ("💡 Tip: For seamless cloud logging", logging.INFO, False),
        ("GPU available: False, used: False", logging.INFO, False),
        ("[rank: 1] Seed set to 0", logging.INFO, False),
        (f"{'-' * 100}\ndistributed_backend=gloo\nAll distributed processes registered.", logging.INFO, False),
        ("`Trainer.fit` stopped: `max_steps=2` reached.", logging.INFO, False),
        ("`Trainer(limit_val_batches=1)` was configured so 1 batch will be used.", logging.INFO, False),
        ("GPU available: True, but not used", logging.WARNING, True),
        ("export: Seed set to 0", logging.INFO, True),
    ],
)
def test_notes_of_lightning(message, level, shown):
    assert _is_shown(logging.LogRecord("lightning", level, "", 0, message, (), None)) is shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], "warning: a UserWarning\n"), (["-W", "default"], "<string>:6: FutureWarning: a FutureWarning\n")],
)
def test_warnings_are_one_line_and_deprecations_are_shown_on_request(options, expected):
    done = subprocess.run([sys.executable, *options, "-c", CODE], capture_output=True, text=True, check=True)
    assert (
        (done.stderr == expected) if not options else (expected in done.stderr and len(done.stderr.splitlines()) == 3)
    )


def test_a_kernel_of_bitsandbytes_that_nobody_asked_for_is_not_missed():
    """Its import warns on CPUs with bfloat16 instructions; the import is simulated, so that every CPU sees it."""
    code = (
        "import logging, shadowlit.quiet as quiet; quiet.quieten(); "
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load CPU gemm_4bit_forward'); "
        "logging.getLogger('bitsandbytes.other').warning('shown')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "shown\n"


# The README's Python, cut short; its own test (tests/test_extending.py) trains it whole.
PLAIN = """
from pathlib import Path
from lightning.pytorch import Trainer
from shadowlit import GraftCallback, ModelPair, ShadowData, ShadowModule{imported}
from shadowlit.demo import BASE, DATA, INSTRUCT
{called}
pair = ModelPair(str(BASE), str(INSTRUCT))
rows = str(DATA / "train_house.jsonl")
data = ShadowData(pair, train=rows, limit_train_samples=8, ignore_columns=["skill", "answer"])
options = {{"use_distributed_sampler": False, "inference_mode": False, "log_every_n_steps": 1}}
trainer = Trainer(max_steps=1, callbacks=[GraftCallback()], **options)
trainer.fit(ShadowModule(pair, lr=1e-5), datamodule=data)
"""
FOREIGN = (
    "Tip:", "tensorboardX", "LeafSpec", "Deprecat", "GPU available", "FLOPs", "kernels", "num_workers", "stopped:",
    "Total length", "log_every_n_steps",
)  # fmt: skip


def test_plain_python_is_as_quiet_as_a_command_after_one_call(tmp_path):
    shown = {}
    for called in ("quieten()", ""):
        code = PLAIN.format(imported=", quieten" if called else "", called=called)
        given = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
        done = subprocess.run([sys.executable, "-c", code], **given, env={**os.environ, "PYTHONPATH": str(ROOT)})
        shown[called] = done.stdout + done.stderr
    assert not [word for word in FOREIGN if word in shown["quieten()"]], shown["quieten()"]
    assert "GPU available" in shown[""]  # an import alone changes nothing else
    assert "FLOPs" not in shown[""] and "kernels" not in shown[""]
