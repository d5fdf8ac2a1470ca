"""One training in a process of its own: ``python -m shadowlit.studies.trials.trial FOLDER COMMAND …``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from shadowlit.files import replace_text

RESULT = "result.json"
LIVE = "live.json"
LOG = "log.txt"


def main(folder: Path, arguments: list[str], threads: int | None = None) -> None:
    """Run ``fit`` or ``validate``, and write its numbers to ``result.json``; the file means that it is finished.

    After each validation, ``live.json`` has the numbers so far.

    Args:
        folder: Folder of this training alone.
        arguments: Command line after ``python -m shadowlit``.
        threads: Threads of torch; None for torch's own choice.
    """
    import torch

    from shadowlit.lightning_cli import main as run
    from shadowlit.studies.trials.live import LiveMetrics

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    cli = run(arguments, [LiveMetrics(folder / LIVE)])
    if arguments[0] == "fit" and not (folder / "evaluation" / f"step-{cli.trainer.global_step}").is_dir():
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        result = {**_measured(cli, time.perf_counter() - start), "step": cli.trainer.global_step}
        replace_text(folder / RESULT, json.dumps(result, indent=1))


def run_logged(folder: Path, arguments: list[str], threads: int | None = None) -> None:
    """As :func:`main`, in a process that was forked for it: output goes to ``log.txt``, and a failure ends it."""
    with (folder / LOG).open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = ["shadowlit", *arguments]
        try:
            main(folder, arguments, threads)
        except SystemExit as stop:
            os._exit(_flushed(stop.code if isinstance(stop.code, int) else 1))
        except BaseException:
            traceback.print_exc()
            os._exit(_flushed(1))
        os._exit(_flushed(0))  # threads of libraries must not keep a finished training alive


def _end_with_parent(parent: int) -> None:
    """End with the parent: an orphan must not write into a folder that the next training takes over."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _flushed(code: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _measured(cli: Any, wall_s: float) -> dict[str, Any]:
    """The metrics that the run logged last, and what it cost."""
    import torch

    from shadowlit.callbacks.throughput import peak_memory_bytes

    trainer, module = cli.trainer, cli.model
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    done = trainer.fit_loop.total_batch_idx + 1
    epochs = done / trainer.num_training_batches if done else 0.0  # the last one may have been cut short by max_steps
    return {
        "metrics": metrics,
        "wall_s": wall_s,
        "peak_memory_bytes": peak_memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "train_tokens": cli.datamodule.trained_tokens(epochs),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
