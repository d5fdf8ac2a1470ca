"""Real processes for distributed tests: gloo on the CPU, forked from a server that imported everything once."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180, slurm: bool = False
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes that look like torchrun's, or like tasks of a SLURM job.

    Returns what each of them returned. ``function`` must be importable by name, its results must be picklable. A
    rank that raises, dies or outlives the time fails the test with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = _context.Queue()
    processes = [
        _context.Process(
            target=_rank, args=(function, _environment(rank, world_size, port, slurm), results, args), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            rank, answer, error = results.get(timeout=timeout_s)
            assert error is None, f"rank {rank} of {world_size}:\n{error}"
            answers[rank] = torch.load(io.BytesIO(answer), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=10 if len(answers) == world_size else 0.1)
            process.kill()
    return [answers[rank] for rank in range(world_size)]


def _environment(rank: int, world_size: int, port: int, slurm: bool) -> dict[str, str]:
    if slurm:
        return {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "test",
            "SLURM_NTASKS": str(world_size),
            "SLURM_NTASKS_PER_NODE": str(world_size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_NODELIST": "127.0.0.1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def _rank(function: Callable, environment: dict[str, str], results: Any, args: tuple) -> None:
    os.environ |= environment
    rank = int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))
    torch.set_num_threads(1)
    try:
        # As bytes: torch would pass tensors through files of a process that is gone by then.
        answer = io.BytesIO()
        torch.save(function(*args), answer)
        results.put((rank, answer.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
