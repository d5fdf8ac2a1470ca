"""``shadowlit plan``: what a configuration of fit needs, and what to change if it doesn't fit."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.throughput import peak_memory_bytes
from shadowlit.checkpoint.folder import CheckpointReader, shard_bytes
from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.names import is_of_experts
from shadowlit.data.conversation import DataErrors
from shadowlit.data.given import Given
from shadowlit.data.module import ShadowData
from shadowlit.data.rendering import load_template
from shadowlit.errors import DataError, ShadowlitError, counted
from shadowlit.grafting.adapter import is_plain
from shadowlit.grafting.export import model_bytes
from shadowlit.pair.check import check_pair
from shadowlit.pair.folders import commit_of
from shadowlit.pair.hub import read_hub_headers
from shadowlit.pair.pair import PairWithoutWeights
from shadowlit.planning.memory import Memory, estimate
from shadowlit.progress import make_console, make_table
from shadowlit.status import StatusLine
from shadowlit.text import count, number, size
from shadowlit.training.anchors import KL_ROWS, require_steps
from shadowlit.training.module import ShadowModule

_RESERVE = 0.1  # share of a GPU that is reserved for its context and for fragmentation
_PARTS = {
    "weights": "weights", "moments": "moments of the optimizer", "frozen": "frozen weights of the pair",
    "gradients": "gradients", "buffers": "communication buffers of the ranks", "activations": "activations",
    "head": "output head and loss", "anchored": "copies while the Instruct trains",
    "neutral": "micro-batch of the divergence",
    "swapped": "copy of the tuned weights while a graft is scored",
    "scoring": "activations and logits of a scored batch",
}  # fmt: skip
_PHASES = {"training": 9, "validation": 11}  # of each, where its own parts end
_HELD = 3  # the first parts are there in all phases


def parse_bytes(text: str) -> float:
    """``24GiB``, ``80 GB`` or ``512MiB`` in bytes; raises a ShadowlitError for what is not a size."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None:
        raise ShadowlitError(f"memory is {text!r}; expected a size such as 24GiB or 80GB.")
    return float(found[1]) * (1024.0 if found[3] else 1000.0) ** " kmgt".index(found[2].lower() or " ")


@dataclass
class Plan:
    """A configured training, whose needs are estimated. Only the headers of the weights are read.

    Args:
        module: The module.
        data: The data.
        graft: The callback.
        export: The callback.
        options: Settings of the trainer.
    """

    module: ShadowModule
    data: ShadowData
    graft: GraftCallback
    export: ExportCallback
    options: Mapping[str, Any]
    headers: Mapping[str, TensorInfo] = field(default_factory=dict)
    tied: bool = True

    def __post_init__(self) -> None:
        """Derive devices and ranks."""
        options, strategy = self.options, self.options["strategy"]
        asked, gpus = options["devices"], torch.cuda.device_count()
        self.on_cpu = options["accelerator"] == "cpu" or (options["accelerator"] == "auto" and not gpus)
        if asked in ("auto", -1, "-1"):
            asked = 1 if self.on_cpu else max(1, gpus)
        asked = asked.split(",") if isinstance(asked, str) and "," in asked else asked
        self.num_devices = len(asked) if isinstance(asked, list) else int(asked)
        ranks = self.num_devices * options["num_nodes"]
        sharded = "ModelParallel" in (strategy if isinstance(strategy, str) else strategy["class_path"])
        self.trainer = {
            "precision": str(options["precision"] or "32-true"),
            "accumulate_grad_batches": options["accumulate_grad_batches"],
            "device": "cpu" if self.on_cpu else "cuda",
            "ranks": ranks,
            "sharing": "fsdp" if sharded else "ddp" if ranks > 1 else "none",
        }
        self.process = 0.0
        self.num_errors = 0

    def read(self) -> list[str]:
        """Check the pair and read headers and data; return problems, errors first, and count the errors."""
        pair, data = self.module.pair, self.data
        template = None if data.chat_template is None else load_template(data.chat_template)
        found = check_pair(pair, self.graft.select, False, template, data.template_kwargs)
        problems = [f"{problem.severity}: {problem}" for problem in found]
        self.num_errors = sum(problem.severity == "error" for problem in found)
        self.read_headers()
        try:
            if not isinstance(self.module.pair, PairWithoutWeights):
                self.module.open_start(self.trainer["precision"])
            if self.module.anchors is not None:
                require_steps(self.module.anchors, self.trainer["accumulate_grad_batches"])
            for key, source in self._own_rows():
                data.extra_loader(key, source)
            if not data.train:
                raise DataError("data.train is not set. Give the file to train on.")
            data.setup("fit")
        except ShadowlitError as error:
            problems.insert(0, f"error: {error}")
            self.num_errors += len(error.messages) if isinstance(error, DataErrors) else 1
        if self.on_cpu:  # the libraries' own memory, as large in this process as in a training
            self.process = peak_memory_bytes(torch.device("cpu"))
        return problems

    def _own_rows(self) -> Iterator[tuple[str, Given]]:
        """The keys and sources of rows that neither train nor measure, but that a training reads."""
        if self.module.anchors is not None and self.module.anchors.kl is not None:
            yield KL_ROWS, self.module.anchors.kl.data
        if self.graft.fit_scales is not None:
            yield from self.graft.fit_scales.sources.items()
        for transforms in self.graft.all_transforms:
            yield from ((transforms.key, rows.data) for rows in transforms.gradient_rows)

    def read_headers(self) -> None:
        """Read the Instruct's headers; of models on the hub no weights are downloaded."""
        pair = self.module.pair
        local = [Path(source).expanduser().is_dir() for source in (pair.base, pair.instruct)]
        if not all(local):
            pair = self.module.pair = PairWithoutWeights(**asdict(pair))
        folder = pair.instruct_folder()
        here = CheckpointReader(folder).tensors if local[1] else None
        self.headers = read_hub_headers(pair.instruct, commit_of(folder)) if here is None else here
        self.tied = all(pair.ties()) if all(local) else True

    def memory(self) -> Memory:
        """Estimate the memory of a rank."""
        return estimate(self.module, self.data, self.graft, self.trainer, self.headers, self.tied)

    def phases(self, memory: Memory) -> dict[str, float]:
        """The peaks on the device, in bytes; on a CPU with Python and its libraries."""
        return {name: size + self.process for name, size in memory.phases.items()}

    def peak(self, memory: Memory) -> float:
        """The largest of them; NaN if one is."""
        return max(self.phases(memory).values(), key=lambda n: (math.isnan(n), n))

    def limit(self) -> float | None:
        """Memory of this machine's GPU, or a rank's share of the CPU's memory; None if there is no such device."""
        if not self.on_cpu:
            return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        if not hasattr(os, "sysconf"):  # Windows
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / self.num_devices

    def fits(self, memory: Memory, limit: float) -> bool:
        """Whether it fits into a device. A tenth of a GPU is reserved for its context and for fragmentation."""
        return not self.peak(memory) > limit * (1.0 if self.on_cpu else 1 - _RESERVE)

    def remedies(self, limit: float, most_ranks: int = 64) -> Iterator[tuple[str, Memory]]:
        """Change one setting after another until the training fits, and yield each with the estimate."""
        memory, graft, module, trainer = self.memory(), self.graft, self.module, self.trainer

        def changed(owner: Any, name: str, value: Any, setting: str) -> Iterator[tuple[str, Memory]]:
            nonlocal memory
            if not self.fits(memory, limit):
                setattr(owner, name, value)
                memory = self.memory()
                yield setting, memory

        if not self.on_cpu and not graft.offload:
            yield from changed(graft, "offload", True, "graft.offload=true")
        if trainer["sharing"] == "ddp":
            yield from changed(
                self, "trainer", {**trainer, "sharing": "fsdp"}, "FSDP2 instead of DDP (trainer.strategy)"
            )
        while self.data.batch_size > 1 and not self.fits(memory, limit):
            rows, more = self.data.batch_size // 2, 2 * self.trainer["accumulate_grad_batches"]
            self.data.eval_rows, self.trainer["accumulate_grad_batches"] = min(rows, self.data.eval_rows), more
            yield from changed(
                self.data, "batch_size", rows, f"data.batch_size={rows}, trainer.accumulate_grad_batches={more}"
            )
        if module.activation_checkpointing in (False, "none"):
            name = "activation_checkpointing"
            yield from changed(module, name, "full", f"model.{name}=full")
        if module.adapter is None and module.optimizer == "adamw":
            yield from changed(module, "optimizer", "adamw_8bit", "model.optimizer=adamw_8bit")
        while 2 * self.trainer["ranks"] <= most_ranks and not self.fits(memory, limit):
            ranks = 2 * self.trainer["ranks"]
            yield from changed(
                self, "trainer", {**self.trainer, "ranks": ranks, "sharing": "fsdp"}, f"{ranks} devices under FSDP2"
            )

    def print(self, limit: float | None, measure_steps: int, words: Sequence[str], refused: str = "") -> None:
        """Print problems, memory, disk and time.

        Args:
            limit: Bytes of a device, which may be another machine's; None for this machine's.
            measure_steps: Steps to measure; 0 for none.
            words: Command-line arguments of fit for the measured steps.
            refused: Why this machine can't run the training, which is an error unless ``limit`` is another machine's.

        Raises:
            ShadowlitError: There are errors, or the training doesn't fit.
        """
        console, elsewhere = make_console(), limit is not None
        for line in self.read():
            console.print(line)
        if refused:
            self.num_errors += not elsewhere
            hint = "" if elsewhere else " To plan for another machine, give its devices' memory, e.g. --memory=24GiB."
            console.print(f"{'note' if elsewhere else 'error'}: this machine can't run the training: {refused}{hint}")
        memory, limit = self.memory(), limit or self.limit()
        console.print(self._table(memory))
        self._print_disk(console, memory)
        errors = [counted(self.num_errors, "error")] if self.num_errors else []
        needed = size(self.peak(memory))
        if math.isnan(self.peak(memory)):
            console.print("memory: it is unknown whether the training fits")
        elif limit is None:
            console.print(f"memory: {needed}; this machine has no such device to compare it with")
        elif self.fits(memory, limit):
            console.print(f"memory: it fits, {needed} of {size(limit)}")
        else:
            errors.append(f"its memory, {needed}, doesn't fit into {size(limit)}")
            console.print(f"memory: {errors[-1]}. Apply these changes in order, up to the first that fits:")
            for setting, changed in self.remedies(limit):
                console.print(f"  {setting}: {size(self.peak(changed))}")
        console.print(f"time: {self._measured(0 if errors or refused else measure_steps, words)}")
        if errors:
            raise ShadowlitError(f"the training can't run as it is configured: {', '.join(errors)}; see above.")

    def _table(self, memory: Memory) -> Table:
        phases, ranks = self.phases(memory), self.trainer["ranks"]
        shared = {"none": "", "ddp": f", {ranks} ranks under DDP", "fsdp": f", {ranks} ranks under FSDP2"}
        title = f"estimated memory of a {'process' if self.on_cpu else 'GPU'}{shared[self.trainer['sharing']]}: "
        title += f"{memory.rows} × {memory.length:,} tokens"
        table = make_table("", *phases, title=title, title_justify="left")
        if self.on_cpu:
            table.add_row("Python, its libraries and the data", *[size(self.process)] * len(phases))
        for i, (name, what) in enumerate(_PARTS.items()):
            owner = next(phase for phase, end in _PHASES.items() if i < end)
            cells = [_cell(getattr(memory, name)) if i < _HELD or phase == owner else "" for phase in phases]
            if any(cells):
                table.add_row(what, *cells)
        table.add_section()
        table.add_row("all", *map(size, phases.values()))
        if memory.offloaded:
            table.caption = f"on the CPU: {size(memory.offloaded)} of offloaded tensors"
        return table

    def _print_disk(self, console: Console, memory: Memory) -> None:
        """Print the disk space that checkpoints and export take, and the free space."""
        export, module = self.export, self.module
        shards = self.trainer["ranks"] if self.trainer["sharing"] == "fsdp" else 1
        moments = memory.moments * shards if memory.moments else memory.offloaded
        checkpoint = 4 * memory.num_trained + moments
        callbacks = self.options["callbacks"] or []
        savers = [each.get("init_args") or {} for each in callbacks if "ModelCheckpoint" in each["class_path"]]
        savers = savers or [{}] * (self.options["enable_checkpointing"] is not False)
        tops = [one.get("save_top_k", 1) for one in savers]
        kept = sum(tops) + sum(bool(one.get("save_last")) for one in savers)
        dense, experts = 2 * sum(x.num_elements for x in self.headers.values()), any(map(is_of_experts, self.headers))
        factored = module.adapter is not None and is_plain(module.adapter, start=False) and not experts
        sizes = {
            "model": model_bytes(module.pair.instruct_folder(), self.headers, self.graft.dtype, export.max_shard_bytes),
            "adapter": 4 * memory.num_trained if module.adapter is not None else 0,
            "delta": shard_bytes(min(dense, 4 * memory.num_trained) if factored else dense, export.max_shard_bytes),
        }
        sizes = {part: sizes[part] for part in export.parts if export.enabled and sizes[part]}
        folder = Path(export.folder or self.options["default_root_dir"] or ".").absolute()
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
        number = "one per save" if -1 in tops else f"at most {kept}"
        parts = ", ".join(f"{part} {size(n)}" for part, n in sizes.items()) or "none"
        total = sum(sizes.values()) + checkpoint * max(kept, 1)
        console.print(
            f"disk: checkpoints {number} of {size(checkpoint)}, export: {parts}; {size(free)} are free at {folder}"
            f"{', which is too little' if total > free else ''}"
        )

    def _measured(self, steps: int, words: Sequence[str]) -> str:
        """Train a few steps in a separate process, and return how long an epoch takes."""
        if steps < 1 or "train" not in self.data.reports:
            return "not measured"
        with tempfile.TemporaryDirectory() as folder:
            ends: dict[str, Any] = {
                "logger": False, "max_steps": steps + 1, "log_every_n_steps": 1, "limit_val_batches": 0,
                "num_sanity_val_steps": 0, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [],
            }  # fmt: skip
            given = [f"--trainer.{key}={json.dumps(value)}" for key, value in ends.items()]
            given += ["--export.enabled=false", f"--run.root={folder}", "--run.name=measured"]
            command = [sys.executable, "-m", "shadowlit", "fit", *words, *given]
            line = StatusLine(lambda _: None)
            line.start()
            try:
                line.show(lambda: [f"time: measuring {counted(steps, 'step')} of training"], now=True)
                done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            finally:
                line.stop()
            if done.returncode:
                return f"not measured: {done.stderr.strip().rpartition(chr(10))[2]}"
            with (Path(folder) / "measured/metrics.csv").open() as file:
                speeds = [float(x) for row in csv.DictReader(file) if (x := row.get("train/tokens_per_s"))][1:]
        speed = sum(speeds) / len(speeds)
        seconds = self.data.reports["train"].tokens_per_epoch / speed
        lasts = f"{number(seconds / 3600, digits=3)} h" if seconds > 600 else f"{number(seconds, digits=3)} s"
        return f"{lasts} per epoch without validations, from {count(speed)} tokens/s in {counted(steps, 'step')}"


def _cell(num_bytes: float) -> str:
    return size(num_bytes) if num_bytes else ""
