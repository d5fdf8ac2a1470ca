"""One training in a process of its own: ``python -m shadowlit.studies.trials.trial FOLDER COMMAND …``."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.files import replace_text
from shadowlit.masking import mask_text
from shadowlit.studies.trials.folder import occupied

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

RESULT = "result.json"
ROWS = "rows.json"
LIVE = "live.json"
LOG = "log.txt"


def main(folder: Path, arguments: list[str], threads: int | None = None) -> None:
    """Run ``fit`` or ``validate`` in a folder of its own, and write its numbers to ``result.json`` when it is finished.

    ``rows.json`` has the rows of the last validation by subject and set, each of them ``[loss, supervised tokens,
    correct tokens, loss of the answers' first tokens, answers]``. After each validation, ``live.json`` has ``{"step":
    optimizer steps so far, "metrics": {name: number}}``.
    """
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from shadowlit.callbacks.evaluation import EvaluationCallback
    from shadowlit.callbacks.graft import GraftCallback
    from shadowlit.lightning_cli import main as run

    steps: list[int] = []  # of the validations in which all evaluators ran
    rows: dict[str, Any] = {}

    def keep_metrics(trainer: Trainer, _: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found: dict[type, Any] = {type(each): each for each in trainer.callbacks}  # type: ignore[attr-defined]
        if len(found[EvaluationCallback].due) == len(found[EvaluationCallback].evaluators):
            steps.append(trainer.global_step)
        if trainer.is_global_zero:
            record = found[GraftCallback].record
            replace_text(folder / LIVE, json.dumps({"step": trainer.global_step, "metrics": record.metrics}))
            rows.update(record.rows)

    if threads is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    cli = run(arguments, [LambdaCallback(on_validation_end=keep_metrics)])
    if arguments[0] == "fit" and cli.trainer.global_step not in steps:
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        by_set = {who: {name: scores.tolist() for name, scores in sets.items()} for who, sets in rows.items()}
        replace_text(folder / ROWS, json.dumps(by_set))
        result = {**_measured(cli, time.perf_counter() - start), "step": cli.trainer.global_step}
        replace_text(folder / RESULT, json.dumps(result, indent=1))


def run_logged(folder: Path, arguments: list[str], threads: int | None = None) -> None:
    """As :func:`main`, in a forked process: output goes to ``log.txt``, and the process exits."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    os.setpgid(0, 0)
    _end_with_command(parent.sentinel)
    with occupied(folder), (folder / LOG).open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = ["shadowlit", *arguments]
        code = 0
        try:
            main(folder, arguments, threads)
        except SystemExit as stop:
            if not isinstance(stop.code, int | None):
                print(stop.code, file=sys.stderr)  # a reason, as the interpreter would print it
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            print(mask_text(traceback.format_exc()), file=sys.stderr)
            code = 1
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # threads of libraries must not keep a finished training alive


def run_spawned(folder: Path, arguments: list[str]) -> None:
    """As :func:`main`, in a new interpreter, whose standard input is a pipe from the command that started it.

    The ranks that Lightning starts from it do the same; they inherit the pipe and the process group.
    """
    _end_with_command(sys.stdin.fileno())
    with occupied(folder):
        main(folder, arguments)


def _end_with_command(pipe: int) -> None:
    """Kill this process group when the command ends, which alone holds the other end of the pipe.

    The group has all processes of a training: ranks and data workers too. On Linux the kernel kills it, whatever its
    processes are doing, even if they are stopped or hold Python's lock. The thread does so on other systems, and where
    the command had ended before the kernel was asked.
    """

    def watch() -> None:
        select.select([pipe], [], [])  # nothing is ever written: it becomes readable at its end
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    if sys.platform == "linux":
        import fcntl  # late: other systems lack it

        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=watch, daemon=True).start()


def _measured(cli: Any, wall_s: float) -> dict[str, Any]:
    """The last metrics that the run logged, and its cost."""
    import torch

    from shadowlit.callbacks.throughput import peak_memory_bytes

    trainer, module = cli.trainer, cli.model
    done = trainer.fit_loop.total_batch_idx + 1
    epochs = done / trainer.num_training_batches if done else 0.0  # the last one may have been cut short by max_steps
    return {
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "wall_s": wall_s,
        "peak_memory_bytes": peak_memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "train_tokens": cli.datamodule.trained_tokens(epochs),
    }


if __name__ == "__main__":
    run_spawned(Path(sys.argv[1]), sys.argv[2:])
