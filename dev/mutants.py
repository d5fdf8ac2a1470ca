"""Faults that the tests must notice: each is put into a copy of the package, and the tests named for it must fail.

Usage: python dev/mutants.py [WORD]      only those whose description holds WORD
Prints a line per fault: killed, or SURVIVED. The exit status is the number of survivors.
"""

# ruff: noqa: E501 - the lines of the list are those of the package
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What is wrong, the file, the right line, the wrong one, the tests that must fail.
MUTANTS = [
    ("relative_delta without its square root", "grafting/live.py",
     "(update_square / instruct_square) ** 0.5 if instruct_square", "(update_square / instruct_square) if instruct_square",
     "tests/callbacks/test_graft.py -k relative_delta"),
    ("the update with the opposite sign", "grafting/arithmetic.py",
     "widen(instruct) + (update if scale == 1 else scale * update)",
     "widen(instruct) - (update if scale == 1 else scale * update)", "tests/grafting/test_arithmetic.py"),
    ("tuned and base swapped", "grafting/arithmetic.py",
     "return widen(tuned) - widen(base)", "return widen(base) - widen(tuned)", "tests/grafting/test_arithmetic.py"),
    ("the live graft is not rounded to the exported dtype", "grafting/live.py",
     "            rounded = exact.to(self._rounding(host))\n            if squares", "            rounded = exact\n            if squares",
     "tests/grafting/test_live.py"),
    ("linear includes the output head", "grafting/parameters.py",
     'isinstance(module, nn.Linear) and module not in heads and not', 'isinstance(module, nn.Linear) and not',
     "tests/grafting/test_selection.py"),
    ("the trained weights are not swapped back after a pass", "grafting/live.py",
     "            self.apply(before)\n        except", "        except", "tests/callbacks/test_graft.py -k bit_identical"),
    ("a checkpoint in the middle of a pass holds grafted weights", "callbacks/graft.py",
     "            self.graft.restore_for_checkpoint()", "            pass", "tests/callbacks/test_graft.py -k holds_the_trained"),
    ("a grafted pass draws from the training's random numbers", "callbacks/graft.py",
     "with isolate_rng():", "with contextmanager(lambda: iter([None]))():", "tests/callbacks/test_graft.py -k bit_identical"),
    ("the gain has the opposite sign", "callbacks/graft.py",
     'record.metrics["graft/gain"] = loss - ', 'record.metrics["graft/gain"] = -loss + ', "tests/callbacks/test_graft.py -k exported_model"),
    ("an adapter acts on top of the merged weights", "grafting/live.py",
     'subject.scale if subject.kind == "adapter" and host.selected else 0.0', 'subject.scale if host.selected else 0.0',
     "tests/callbacks/test_exported_numbers.py -k exported"),
    ("32-true computes frozen weights as they are stored", "training/loading.py",
     "from_weights else frozen_dtype or stored", "from_weights else stored", "tests/training/test_module.py -k float32"),
    ("the error of the gain takes samples for tokens", "callbacks/scores.py",
     "difference.sum() / tokens.sum() * tokens", "difference.mean()", "tests/callbacks/test_exported_numbers.py -k error_of_the_gain"),
    ("a model with a head of its own is tied all the same", "pair/folders.py",
     "return said and (reader is None or repeats_embedding(reader) is not False)", "return said",
     "tests/callbacks/test_export.py -k heads_are_tied"),
    ("a loss that is not finite goes by", "training/divergence.py",
     "not math.isfinite(value)", "False", "tests/callbacks/test_export.py -k not_finite"),
    ("a checkpoint of another pair is resumed", "callbacks/graft.py",
     "for who, value in self.fingerprints.items() if saved.get(who) != value]", "for who, value in {}.items()]",
     "tests/callbacks/test_graft.py -k two_pairs"),
    ("the gradient is divided by micro-batches, not by supervised tokens", "training/module.py",
     "number = torch.where(count > 0, count, 1)", "number = torch.ones_like(count)",
     "tests/training/test_module.py"),
    ("the divisor of weighted losses is at least 1", "training/module.py",
     "number = torch.where(count > 0, count, 1)", "number = count.clamp(min=1)", "tests/training/test_module.py"),
    ("a short text counts as written wherever it is found", "data/coverage.py",
     "_LONG = 16 ", "_LONG = 1 ", "tests/data/test_coverage.py"),
    ("a column that nothing reads is dropped", "data/sources.py",
     'self.unread.setdefault(name, f"{text} in {row}")', "pass", "tests/data/test_formats.py -k silence"),
    ("earlier turns may be missing, whoever speaks", "data/coverage.py",
     'turn not in trained and given[turn]["role"] == "assistant"', "turn not in trained",
     "tests/data/test_coverage.py"),
    ("ranks keep their own sums", "training/module.py",
     "            dist.all_reduce(reduced)", "            pass", "tests/training/test_distributed.py -k two_processes"),
    ("the gates and the ups of fused experts are swapped", "checkpoint/names.py",
     'GATE_UP: ("gate_proj", "up_proj")', 'GATE_UP: ("up_proj", "gate_proj")',
     "tests/checkpoint/test_layout.py"),
    ("an added token's row is read from the Base", "checkpoint/alignment.py",
     "self._instruct.read_slice(self._names[name], (slice(end, stop),))",
     "self._base.read_slice(name, (slice(2 * end - stop, end),))", "tests/checkpoint/test_reader.py tests/grafting/test_live.py"),
    ("a graft on disk ignores the scales by pattern", "grafting/disk.py",
     "            scale = self._scale.of(name)", "            scale = self._scale.default", "tests/grafting/test_disk.py"),
    ("DARE does not rescale", "delta/transforms.py",
     "return values * (noise < density) / density", "return values * (noise < density)", "tests/delta/test_transforms.py"),
    ("GradFix keeps what goes up the loss", "delta/transforms.py",
     "values.sign() * gradient_signs < 0", "values.sign() * gradient_signs > 0", "tests/callbacks/test_gradfix.py -k kept"),
    ("the best graft is the worst", "callbacks/variants.py",
     'value if mode == "max" else -value', 'value if mode == "min" else -value', "tests/callbacks/test_variants.py -k lowest"),
    ("a packed sample's first token is supervised by the sample before it", "training/objective.py",
     "supervised = supervised & (position_ids[:, 1:] != 0)", "pass", "tests/training/test_head.py -k first_token_of"),
    ("an import runs up", "grafting/arithmetic.py",
     "import torch\n", "import torch\nimport shadowlit.training.objective  # noqa\n", "tests/test_architecture.py"),
]  # fmt: skip


def survives(file: str, right: str, wrong: str, tests: str) -> bool:
    """Whether the tests pass on a copy with the fault."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in ("shadowlit", "tests", "configs", "docs", "experiments", "benchmarks", "notebooks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for name in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, copy / name)
        path = copy / "shadowlit" / file
        source = path.read_text(encoding="utf-8")
        assert source.count(right) >= 1, f"{file} no longer holds {right!r}: mend this list"
        path.write_text(source.replace(right, wrong), encoding="utf-8")
        run = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *tests.split()]
        done = subprocess.run(
            run, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.returncode == 0


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = 0
    for what, *mutant in MUTANTS:
        if word in what:
            alive = survives(*mutant)
            survivors += alive
            print(f"{'SURVIVED' if alive else 'killed  '}  {what}  [{mutant[-1]}]", flush=True)
    sys.exit(survivors)
