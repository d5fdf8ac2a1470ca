"""One training in a process of its own: ``python -m shadowlit.studies.trials.trial FOLDER COMMAND …``."""

from __future__ import annotations

import contextlib
import json
import os
import resource
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
    """Run ``fit`` or ``validate``, and leave its numbers in ``result.json``; the file means that it is finished.

    After each validation what is known so far lies in ``live.json``.

    Args:
        folder: Of this training alone.
        arguments: The command line after ``python -m shadowlit``.
        threads: Of torch; None for its own choice.
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
    """As :func:`main`, in a process that was forked for it: its output goes to ``log.txt``, its failure ends it."""
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
    """A training whose parent was killed must not write into a folder that the next one takes over."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _flushed(code: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _measured(cli: Any, wall_s: float) -> dict[str, Any]:
    """What the run logged last, and what it cost."""
    import torch

    trainer, module = cli.trainer, cli.model
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    done = trainer.fit_loop.total_batch_idx + 1
    epochs = done / trainer.num_training_batches if done else 0.0  # the last one may have been cut short by max_steps
    return {
        "metrics": metrics,
        "wall_s": wall_s,
        "peak_memory_bytes": peak,
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "train_tokens": cli.datamodule.trained_tokens(epochs),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
