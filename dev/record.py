"""Run the same commands with two checkouts and compare what they leave: tensors bit for bit, metrics digit for digit.

Usage: python dev/record.py OLD NEW [WORD]      two checkouts; only the commands whose name holds WORD
Prints how many entries are equal, and each that differs or that one side alone has. Times, memory, paths and versions
are left out. The exit status is 1 if an entry that both have differs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

SHORT = (
    "--trainer.max_steps=6 --trainer.val_check_interval=3 --trainer.limit_val_batches=2 --data.limit_train_samples=256 "
    "--trainer.enable_progress_bar=false"
)
LIMITS = " ".join(f"--evaluation.evaluators.{name}.init_args.limit=8" for name in ("new", "old", "format", "refusal"))
LOG, PAIR = "--run.root={out}", "shadowlit/demo/pair"
EXPORTS = {kind: f"{{out}}/{kind}/demo_{kind}/version_0/export/model" for kind in ("lora", "full")}
METHODS = {"magnitude": {"density": 0.1}, "dare": {"density": 0.5, "seed": 0}, "svd": {"rank": 2}}
COMMANDS = {
    "lora": f"fit --config configs/demo_lora.yaml {SHORT} {LIMITS} {LOG}/lora",
    "full": f"fit --config configs/demo_full.yaml {SHORT} {LIMITS} {LOG}/full",
    "graft": f"graft {PAIR}/base {EXPORTS['full']} {PAIR}/instruct {{out}}/graft",
    "graft all": f"graft {PAIR}/base {EXPORTS['full']} {PAIR}/instruct {{out}}/graft_all --select all --scale 0.5",
    "delta": f"delta make {PAIR}/base {EXPORTS['full']} {{out}}/delta",
    "other delta": f"delta make {PAIR}/base {EXPORTS['lora']} {{out}}/other",
    **{
        f"delta {method}": f"delta compress {{out}}/delta {{out}}/{method} --method {method} "
        + " ".join(f"--{name} {value}" for name, value in values.items())
        for method, values in METHODS.items()
    },
    "delta sum": "delta sum --deltas [{out}/delta,{out}/other] --weights [1,0.5] --out {out}/sum",
    "delta lora": f"delta lora {{out}}/delta {PAIR}/instruct {{out}}/adapter --rank 4",
    "delta apply": f"delta apply {{out}}/delta {PAIR}/instruct {{out}}/applied",
    "similarity": f"similarity {PAIR}/base {PAIR}/instruct --out {{out}}/sigma.json",
    "compare": "compare configs/demo_lora.yaml --arms B2I,I2I --seeds 0 --out {out}/compare --workers 2 --threads 1 "
    "--overrides " + json.dumps({
        "trainer.max_steps": 4, "trainer.val_check_interval": 2, "trainer.limit_val_batches": 1,
        "data.limit_train_samples": 256,
        **{f"evaluation.evaluators.{name}.init_args.limit": 4 for name in ("new", "old", "format", "refusal")},
    }, separators=(",", ":")),
}  # fmt: skip
LEFT_OUT = re.compile(r"second|time|_s\b|memory|throughput|tokens_per|version|path|folder|bytes|created|host|sha|hash")


def main(old: str, new: str, word: str = "") -> int:
    """Record both checkouts and print the comparison."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = (record(Path(root).resolve(), Path(folder) / name, word)
                         for root, name in ((old, "before"), (new, "after")))  # fmt: skip
    shared = before.keys() & after.keys()
    different = sorted(key for key in shared if before[key] != after[key])
    for title, keys in (("only before", before.keys() - shared), ("only after", after.keys() - shared)):
        print(f"{title}: {len(keys)}", *sorted(keys)[:40], sep="\n  ")
    for key in different:
        print(f"differs: {key}: {str(before[key])[:60]} | {str(after[key])[:60]}")
    print(f"{len(shared) - len(different)} of {len(shared)} entries that both have are equal")
    return 1 if different else 0


def record(root: Path, out: Path, word: str) -> dict[str, object]:
    """Run the commands with a checkout; return what they leave, by file and key."""
    for name, line in COMMANDS.items():
        if word in name:
            command = [sys.executable, "-m", "shadowlit", *line.replace("{out}", str(out)).split()]
            done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
            assert done.returncode == 0, f"{name}: {done.stderr.decode()[-2000:]}"
            print(f"{root.name}: {name}", flush=True)
    return {f"{path.relative_to(out)}: {key}": value
            for path in sorted(out.rglob("*")) if path.is_file() for key, value in entries(path)
            if not LEFT_OUT.search(key) and str(out) not in str(value)}  # fmt: skip


def entries(path: Path) -> Iterator[tuple[str, object]]:
    """What a file holds: hashes of tensors, and plain values."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield from ((name, hashed(file.get_tensor(name))) for name in file.keys())  # noqa: SIM118
    elif path.suffix == ".ckpt":
        yield from flat(torch.load(path, weights_only=True, map_location="cpu"))
    elif path.suffix == ".json":
        yield from flat(json.loads(path.read_text()))
    elif path.suffix == ".jsonl":
        yield from flat([json.loads(line) for line in path.read_text().splitlines()])
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            yield from flat(list(csv.DictReader(file)))


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested values by their path."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{prefix}.{key}")
    else:
        yield prefix, hashed(value) if isinstance(value, torch.Tensor) else value


def hashed(tensor: torch.Tensor) -> str:
    """A hash of a tensor's type, shape and bytes."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
