"""ThroughputCallback: how fast a run is, what it needs, and where its time goes."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from shadowlit.callbacks.record import record_of
from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.distributed import of_all_ranks
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.text import count, size
from shadowlit.training.flops import Work, count_pairs, peak_flops
from shadowlit.training.module import ShadowModule

_PARTS = ("data", "forward_backward", "optimizer", "validation", "graft", "evaluation")
_TRAINING = _PARTS[:3]


class ThroughputCallback(Callback):
    """Measures tokens per second, MFU, peak memory, and the share of time in each part of a run.

    Logged every ``trainer.log_every_n_steps`` steps, over the steps since the last time:

    - ``train/tokens_per_s``: tokens of all ranks that are not padding, per second of training (validations left out)
    - ``train/supervised_tokens_per_s``: the supervised tokens among them
    - ``train/mfu``: operations that the model needs (:class:`shadowlit.training.flops.Work`) by those that the GPUs
      could do in dense bfloat16, 0 to 1; for GPUs whose peak is known
    - ``train/peak_memory_gb``: largest memory so far, in 10^9 bytes: that allocated on the GPU, or without one that
      resident in the process
    - ``time/<part>``: share of the time since training began, 0 to 1, of: ``data`` (waiting between two batches, for
      data, transfers and checkpoints), ``forward_backward``, ``optimizer`` (reduction, clipping and step),
      ``validation`` (the plain pass), ``graft`` (the passes of :class:`GraftCallback`), ``evaluation`` (those of
      :class:`EvaluationCallback`)

    A summary of the whole run is logged when the training ends, with the time from its setup to its first step. On a
    GPU times are measured by events in its stream, so that the CPU waits for it only once per logging.

    May be listed anywhere among the trainer's callbacks, and changes no bit of the training.

    Args:
        enabled: Whether speed and memory are measured and logged.

    Attributes:
        summary: Summary of the finished run: the metrics above without their prefixes, ``seconds`` and ``startup_s``.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.summary: dict[str, float] = {}
        self._setup_at = time.perf_counter()
        self._watch: _Stopwatch | None = None
        self._work: Work | None = None
        self._peak: float | None = None
        self._counts: Tensor | None = None  # tokens and pairs by window since the last logging, on the device
        self._supervised = 0
        self._windows: list[int | None] = []
        self._stepped = False
        self._logged_s = 0.0  # seconds of training at the last logging
        self._total = [0.0, 0.0, 0.0]  # tokens, supervised tokens, operations of all ranks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to time the start-up."""
        self._setup_at = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the model's operations, and start the stopwatch."""
        if not self.enabled or not isinstance(pl_module, ShadowModule) or pl_module.model is None:
            return
        self._work, self._peak = Work.of(pl_module.model), peak_flops(pl_module.device)
        self._windows = sorted(set(self._work.windows), key=lambda window: window or 0)
        self._counts, self._supervised, self._total, self._logged_s = None, 0, [0.0, 0.0, 0.0], 0.0
        self.summary = {"startup_s": time.perf_counter() - self._setup_at}
        self._watch = _Stopwatch(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch's tokens."""
        if self._watch is None:
            return
        self._watch.mark("data")
        tokens, pairs = count_pairs(batch, set(self._windows))
        counts = torch.stack([tokens, *(pairs[window] for window in self._windows)])
        counts = counts.to(accumulation_dtype(counts.device))
        self._counts = counts if self._counts is None else self._counts + counts
        positions = batch.get("supervised")
        self._supervised += int((batch["labels"] != IGNORE_INDEX).sum()) if positions is None else len(positions)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """End the backward pass."""
        if self._watch is not None:
            self._watch.mark("forward_backward")
            self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step or the micro-batch; log every ``log_every_n_steps`` steps."""
        if self._watch is None:
            return
        self._watch.mark("optimizer" if self._stepped else "forward_backward")
        if self._stepped and trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self._measure(pl_module.device))
        self._stepped = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the waiting before the validation."""
        if self._watch is not None and not trainer.sanity_checking:
            self._watch.mark("data")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the seconds of the graft and of the evaluations, from the record, out of the validation's."""
        if self._watch is None or trainer.sanity_checking:
            return
        self._watch.mark("validation")
        if record := record_of(trainer):
            for part in ("graft", "evaluation"):
                self._watch.move("validation", part, record.spent(part))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a summary of the run."""
        if self._watch is None:
            return
        self._watch.mark("data")
        self._measure(pl_module.device)
        seconds = self._watch.read()
        whole = sum(seconds.values())
        training = sum(seconds[part] for part in _TRAINING)
        tokens, supervised, flops = self._total
        self.summary |= {"tokens_per_s": tokens / training, "supervised_tokens_per_s": supervised / training}
        if self._peak is not None:
            self.summary["mfu"] = flops / training / (self._peak * trainer.world_size)
        self.summary["peak_memory_gb"] = max(of_all_ranks([peak_memory_bytes(pl_module.device) / 1e9]))
        self.summary |= {part: value / whole for part, value in seconds.items()}
        self.summary["seconds"] = whole
        rank_zero_info(_table(self.summary))
        self._watch = None

    def _measure(self, device: torch.device) -> dict[str, float]:
        """The metrics since the last logging; a collective."""
        assert self._watch is not None and self._work is not None
        seconds = self._watch.read()
        training = sum(seconds[part] for part in _TRAINING)
        lasted, self._logged_s = training - self._logged_s, training
        if self._counts is None or lasted <= 0:
            return {}
        counts = torch.cat([self._counts, self._counts.new_tensor([self._supervised])])
        self._counts, self._supervised = None, 0
        num_ranks = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            num_ranks = dist.get_world_size()
        tokens, *by_window, supervised = counts.tolist()
        flops = self._work.flops(tokens, supervised, dict(zip(self._windows, by_window, strict=True)))
        self._total = [old + new for old, new in zip(self._total, (tokens, supervised, flops), strict=True)]
        found = {
            "train/tokens_per_s": tokens / lasted,
            "train/supervised_tokens_per_s": supervised / lasted,
            "train/peak_memory_gb": peak_memory_bytes(device) / 1e9,
        }
        if self._peak is not None:
            found["train/mfu"] = flops / lasted / (self._peak * num_ranks)
        whole = sum(seconds.values())
        return found | {f"time/{part}": value / whole for part, value in seconds.items()}


class _Stopwatch:
    """Seconds by part, from marks at the ends of parts; on a GPU by events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._events = device.type == "cuda"
        self._pending: list[tuple[str, Any]] = []
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Count the time since the last mark for ``part``."""
        self._pending.append((part, self._now()))

    def move(self, part: str, other: str, seconds: float) -> None:
        """Move seconds from one part to another."""
        self._seconds[part] -= seconds
        self._seconds[other] += seconds

    def read(self) -> dict[str, float]:
        """Seconds so far; waits for the GPU to reach the last mark."""
        if self._events and self._pending:
            self._pending[-1][1].synchronize()
        for part, mark in self._pending:
            self._seconds[part] += self._last.elapsed_time(mark) / 1e3 if self._events else mark - self._last
            self._last = mark
        self._pending.clear()
        return dict(self._seconds)

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory_bytes(device: torch.device) -> float:
    """Return the largest memory so far: what was allocated on the GPU, or without one the process's; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _table(summary: dict[str, float]) -> str:
    rows = [
        ("start-up", f"{summary['startup_s']:.1f} s"),
        ("tokens per second", count(summary["tokens_per_s"])),
        ("supervised tokens per second", count(summary["supervised_tokens_per_s"])),
        *([("MFU", f"{summary['mfu']:.1%}")] if "mfu" in summary else []),
        ("peak memory", size(1e9 * summary["peak_memory_gb"])),
        *((part.replace("_", " and "), f"{summary[part]:.1%} of {summary['seconds']:.1f} s") for part in _PARTS),
    ]
    width = max(len(name) for name, _ in rows)
    return "throughput:\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
