"""How long a training waits for its checkpoints, synchronous and asynchronous, with a real model.

    torchrun --nproc_per_node 2 benchmarks/checkpoints.py MODEL [--repetitions 3] [--out FOLDER]
    python benchmarks/checkpoints.py MODEL

Saves all weights of MODEL, a folder, and as many moments of AdamW, in float32, by turns with and without
``checkpoint.asynchronous``; no step is taken meanwhile. One process writes one file, several (gloo) write shards as
under FSDP2. Prints rows of a Markdown table: the time for which the training is blocked, that until the checkpoint is
on the disk, and the CPU time of rank 0, which on a CPU is taken from the training.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from shadowlit.training.background import Background
from shadowlit.training.checkpoints import Checkpoints, ShardedStrategy


def checkpoint_of(model: str) -> dict[str, Any]:
    """What a training saves after its first step; of several ranks each has a part of the rows."""
    weights = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None
    for file in Path(model).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            part = tensor.float()
            if mesh is not None:
                part = part.chunk(mesh.size())[mesh.get_rank()].clone()
            weights[name] = DTensor.from_local(part, mesh, [Shard(0)]) if mesh is not None else part
    state = {name: {key: tensor * 0.5 for key in ("exp_avg", "exp_avg_sq")} for name, tensor in weights.items()}
    return {"global_step": 1, "state_dict": weights, "optimizer_states": [{"state": state, "param_groups": []}]}


def broadcast(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", help="folder on the disk to measure; by default the temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    checkpoint = checkpoint_of(options.model)
    io, background = Checkpoints(SimpleNamespace(world_size=world_size)), Background()  # type: ignore[arg-type]
    strategy: Any = SimpleNamespace(
        broadcast=broadcast, checkpoint_io=io, _save_distributed_checkpoint=True, global_rank=rank,
        is_global_zero=rank == 0, world_size=world_size,
    )  # fmt: skip
    strategy._save_shards = lambda *args: ShardedStrategy._save_shards(strategy, *args)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        path = Path(broadcast(folder)) / "last.ckpt"
        for number in range(2 * options.repetitions + 1):
            io.background = background if number % 2 else None
            start, cpu = time.perf_counter(), time.process_time()
            if world_size > 1:
                ShardedStrategy.save_checkpoint(strategy, dict(checkpoint), path)
            else:
                io.save_checkpoint(checkpoint, path)
            blocked = time.perf_counter() - start
            wait(background._tasks)
            whole, cpu = time.perf_counter() - start, time.process_time() - cpu
            background.wait()
            if rank == 0 and number:  # the first one pays for what is set up once
                how = "asynchronous" if number % 2 else "synchronous"
                size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) / 1e9
                print(f"| {world_size} | {how} | {size:.2f} | {blocked:.2f} | {whole:.2f} | {cpu:.2f} |", flush=True)
        if dist.is_initialized():
            dist.barrier()
    background.close()


if __name__ == "__main__":
    main()
