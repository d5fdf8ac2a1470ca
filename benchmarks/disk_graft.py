"""What the graft on disk costs beside mergekit, the way through memory, and plain reading and writing.

    python benchmarks/disk_graft.py [--repetitions 5] [--workdir DIR] [--mergekit ENV/bin/mergekit-yaml]
                                    [--only graft similarity memory check]

Makes three folders of Qwen3-0.6B's shapes (bfloat16, random) and three of four times the size in a temporary folder
below DIR: 23 GB with the results, each of which is deleted at once. Every contestant runs as a process of its own, in
turns, in the environment it was called from, with the checkpoints in the page cache and the disk idle (where a name
says so, with the checkpoints dropped from the cache, as they are before their first use); times are taken
after a round that is not counted, in which Python may store what it has compiled, as it does where a package is
installed. Prints Markdown: medians with the smallest and largest value, and each goal with its figure.

mergekit wants an environment of its own: ``python -m venv ENV; ENV/bin/pip install mergekit``. Without it its rows
are left out. It merges by ``task_arithmetic`` with Base as base model and weight 1 for tuned and Instruct, not
normalized: once computed in float32 and rounded to bfloat16, as the other contestants do, once in its default, the
stored bfloat16.

The floor may move: on a virtual machine a plain write of 1.2 GB took 0.25 s into memory used a moment before, and up to
several seconds otherwise. Look at its spread before a ratio to it is believed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("graft", "similarity", "memory", "check")
MODELS = ("base", "tuned", "instruct")
# Qwen3-0.6B; the larger one has 4.0 times its parameters in wider and more layers, so in larger tensors too.
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512},
    "small": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
              "num_key_value_heads": 8, "vocab_size": 151936},
    "large": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 33, "num_attention_heads": 32,
              "num_key_value_heads": 16, "vocab_size": 151936},
}  # fmt: skip
SHARD_BYTES = {"tiny": 10**10, "small": 10**10, "large": 10**9}
POOL_ELEMENTS, PIECE_ELEMENTS = 2**25, 2**20
BUFFER_BYTES = 8 * 2**20
SAMPLE_S = 0.02

Figures = dict[str, float]


@dataclass(frozen=True)
class Contestant:
    """A command that is measured.

    Attributes:
        name: its name in the tables.
        command: what is run; the result, if it writes one, appears at the path ``OUT`` stands for.
        flushes: whether it waits until its result has reached the disk.
        cold: whether the checkpoints are dropped from the page cache before it starts, so that they come from the disk.
    """

    name: str
    command: tuple[str, ...]
    flushes: bool = False
    cold: bool = False


OUT = "{out}"


# --- processes -------------------------------------------------------------------------------------------------------


def run(command: tuple[str, ...], out: Path, sample: bool) -> Figures:
    """Run a command as a whole process, delete what it wrote, and return its figures.

    They are ``wall_s``, ``cpu_s`` (user and system), ``rss_bytes`` (the peak by the kernel's own count), what the
    command printed behind ``FIGURES``, and with ``sample`` the peaks ``uss_bytes`` and ``anonymous_bytes``. Sampling
    slows a process down: don't time such a run.
    """
    os.sync()  # what the one before has left to be written is not this one's burden
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [part.replace(OUT, str(out)) for part in command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env={key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
            | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        peaks = sample_until_done(process.pid) if sample else {}
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-2000:]}")
    printed = [line.removeprefix("FIGURES ") for line in text.splitlines() if line.startswith("FIGURES ")]
    return {
        "wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "rss_bytes": usage.ru_maxrss * 1024, **peaks,
        **(json.loads(printed[-1]) if printed else {}),
    }  # fmt: skip


def sample_until_done(pid: int) -> Figures:
    """The peaks of private memory of a process and its children; returns when it has ended, but is not waited for.

    USS is what only these processes map, the mapped page cache of files included, and what they share among each other
    on purpose; the anonymous part leaves the files out. What a forked process has not changed yet counts in none of
    them in the one, and in each of them in the other.
    """
    peaks = {"uss_bytes": 0.0, "anonymous_bytes": 0.0}
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = dict.fromkeys(peaks, 0.0)
        for each in family(pid):
            try:
                rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            except OSError:  # it has ended meanwhile
                continue
            sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in rollup.splitlines()[1:]}
            now["uss_bytes"] += sizes["Private_Clean"] + sizes["Private_Dirty"] + sizes["Pss_Shmem"]
            now["anonymous_bytes"] += sizes["Anonymous"] + sizes["Pss_Shmem"]
        peaks = {key: max(value, now[key]) for key, value in peaks.items()}
        time.sleep(SAMPLE_S)
    return peaks


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    try:
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return
    for child in (int(number) for line in children for number in line):
        yield from family(child)


def measure(
    contestants: list[Contestant], repetitions: int, root: Path, sample: bool = False, warm_up: bool = True
) -> dict[str, list[Figures]]:
    """Run the contestants in turns, so that a slow minute hits all of them."""
    found: dict[str, list[Figures]] = {contestant.name: [] for contestant in contestants}
    for repetition in range(-warm_up, repetitions):
        for contestant in contestants:
            out = root / "out"
            if contestant.cold:
                drop_from_cache(root / "small")
            figures = run(contestant.command, out, sample)
            shutil.rmtree(out, ignore_errors=True)
            print(f"{contestant.name}, {repetition + 1}: {figures}", file=sys.stderr, flush=True)
            if repetition >= 0:
                found[contestant.name].append(figures)
    return found


def drop_from_cache(folder: Path) -> None:
    """Let the page cache forget the weights below a folder: who reads them next waits for the disk."""
    os.sync()  # what is still to be written can't be dropped
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- subcommands, each in a process of its own -----------------------------------------------------------------------


def make(root: Path, size: str, layers: int) -> None:
    """Save Base, tuned and Instruct of a size: std 0.02, the other two with noise of 1e-3 on every element."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(ROOT))
    from tests.tiny import make_tokenizer

    shape = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(
        "qwen3", head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096, dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"], **shape,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    # Many times faster than drawing every element: pieces of one pool, from random places.
    pool = torch.randn(POOL_ELEMENTS, generator=generator)

    def with_noise(values: torch.Tensor, std: float) -> torch.Tensor:
        moved = torch.empty_like(values)
        for old, new in zip(values.view(-1).split(PIECE_ELEMENTS), moved.view(-1).split(PIECE_ELEMENTS), strict=True):
            start = int(torch.randint(POOL_ELEMENTS - PIECE_ELEMENTS, (), generator=generator))
            new.copy_(torch.add(old.float(), pool[start : start + len(old)], alpha=std))
        return moved

    shards: list[dict[str, torch.Size]] = [{}]
    for name, tensor_shape in shapes.items():
        filled = 2 * sum(other.numel() for other in shards[-1].values())
        if shards[-1] and filled + 2 * tensor_shape.numel() > SHARD_BYTES[size]:
            shards.append({})
        shards[-1][name] = tensor_shape
    weight_map = {}
    for model in MODELS:
        (root / size / model).mkdir(parents=True)
        config.save_pretrained(root / size / model)
        make_tokenizer().save_pretrained(root / size / model)
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        # The norms, the only vectors, lie around one.
        centre = {name: torch.full(s, float(len(s) == 1), dtype=torch.bfloat16) for name, s in shard.items()}
        base = {name: with_noise(value, 0.02) for name, value in centre.items()}
        for model in MODELS:
            moved = {name: value if model == "base" else with_noise(value, 1e-3) for name, value in base.items()}
            save_file(moved, root / size / model / file, metadata={"format": "pt"})
    if len(shards) > 1:
        for model in MODELS:
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (root / size / model / "model.safetensors.index.json").write_text(text)
    report(parameters=sum(s.numel() for s in shapes.values()), tensors=len(shapes))


def words(command: str, folder: Path, out: str) -> list[str]:
    """What follows ``python -m shadowlit``; every tensor is grafted, as by the other contestants."""
    if command == "similarity":
        return [command, str(folder / "base"), str(folder / "instruct")]
    return [command, *(f"--{model}={folder / model}" for model in MODELS), f"--out={out}", "--select=all"]


def ours(command: str, root: Path, out: str, by_threads: bool) -> None:
    """Time a command of shadowlit after a tiny model has brought in all imports, and its waiting for the disk."""
    sys.path.insert(0, str(ROOT))
    from shadowlit.checkpoint import workers
    from shadowlit.cli.main import main as shadowlit

    if by_threads:
        workers.may_fork = lambda: False
    waited = {"fsync_s": 0.0}

    def timed(flush: Any) -> Any:
        def wrapped(descriptor: int) -> None:
            start = time.perf_counter()
            flush(descriptor)
            waited["fsync_s"] += time.perf_counter() - start

        return wrapped

    def call(folder: Path, out: str) -> None:
        assert shadowlit(words(command, folder, out)) == 0

    call(root / "tiny", f"{out}.tiny")
    shutil.rmtree(f"{out}.tiny", ignore_errors=True)
    os.fsync, os.fdatasync = timed(os.fsync), timed(os.fdatasync)
    start = time.perf_counter()
    call(root / "small", out)
    report(work_s=time.perf_counter() - start, **waited)


def naive(root: Path, out: str) -> None:
    """Three state dicts in memory, the equation in float32, one written."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    start = time.perf_counter()
    base, tuned, instruct = (load_file(root / "small" / model / "model.safetensors") for model in MODELS)
    grafted = {
        name: (value.float() + (tuned[name].float() - base[name].float())).to(value.dtype)
        for name, value in instruct.items()
    }
    os.mkdir(out)
    save_torch_state_dict(grafted, out)
    for path in (root / "small" / "instruct").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
    report(work_s=time.perf_counter() - start)


def floor(root: Path, out: str, flush: bool) -> None:
    """Read the files of the three models and write those of the last one again."""
    start = time.perf_counter()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    os.mkdir(out)
    for model in MODELS:
        for path in sorted((root / "small" / model).iterdir()):
            with path.open("rb", buffering=0) as source:
                if model != MODELS[-1]:
                    while source.readinto(buffer):
                        pass
                    continue
                with open(f"{out}/{path.name}", "wb", buffering=0) as target:
                    while count := source.readinto(buffer):
                        target.write(buffer[:count])
                    if flush:
                        os.fsync(target.fileno())
    report(work_s=time.perf_counter() - start)


def read(root: Path, models: tuple[str, ...]) -> None:
    """Read the files of ``models`` by as many threads as there are cores, none of which computes anything."""
    start = time.perf_counter()
    blocks = []
    for model in models:
        for path in sorted((root / "small" / model).iterdir()):
            descriptor = os.open(path, os.O_RDONLY)
            blocks += [(descriptor, offset) for offset in range(0, path.stat().st_size, BUFFER_BYTES)]
    memory = threading.local()

    def take(block: tuple[int, int]) -> None:
        if not hasattr(memory, "buffer"):
            memory.buffer = bytearray(BUFFER_BYTES)
        os.preadv(block[0], [memory.buffer], block[1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(take, blocks))
    report(work_s=time.perf_counter() - start)


def compare(root: Path, out: Path) -> None:
    """Count the elements of a result that differ from the equation, in float32, rounded once."""
    import contextlib

    import torch
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        folders = [*(root / "small" / model for model in MODELS), out]
        base, tuned, instruct, written = (
            stack.enter_context(safe_open(folder / "model.safetensors", "pt")) for folder in folders
        )
        unequal = elements = 0
        largest = 0.0
        for name in sorted(instruct.keys()):
            wanted = instruct.get_tensor(name).float() + (
                tuned.get_tensor(name).float() - base.get_tensor(name).float()
            )
            wanted, found = wanted.to(torch.bfloat16), written.get_tensor(name)
            assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
            wrong = found.view(torch.int16) != wanted.view(torch.int16)
            unequal += int(wrong.sum())
            elements += wanted.numel()
            largest = max(largest, float((found.float() - wanted.float()).abs().max()))
        names_differ = len(set(written.keys()) ^ set(instruct.keys()))
    report(
        unequal=unequal,
        elements=elements,
        names_differ=names_differ,
        largest_difference=largest,
    )


def load(root: Path, out: Path) -> None:
    """The logits of a result in transformers beside those of a model that got the equation's values in memory."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = (load_file(root / "small" / model / "model.safetensors") for model in ("base", "tuned"))
    expected = AutoModelForCausalLM.from_pretrained(root / "small" / "instruct", dtype="auto").eval()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(parameter.float() + (tuned[name].float() - base[name].float()))
    del base, tuned
    loaded, problems = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    ids = AutoTokenizer.from_pretrained(out)("The graft on disk equals the graft in memory.", return_tensors="pt")
    with torch.no_grad():
        difference = loaded.eval()(**ids).logits.float() - expected(**ids).logits.float()
    report(
        logit_difference=float(difference.abs().max()), tokens=ids["input_ids"].numel(),
        loading_problems=sum(map(len, filter(None, problems.values()))),
    )  # fmt: skip


def report(**figures: float) -> None:
    print("FIGURES", json.dumps(figures), flush=True)


def subcommand(name: str, root: Path, *rest: str) -> None:
    """What ``--run`` runs."""
    if name == "make":
        make(root, rest[0], int(rest[1]))
    elif name in ("graft", "similarity"):
        ours(name, root, *rest[:1], by_threads="threads" in rest)
    elif name == "naive":
        naive(root, rest[0])
    elif name in ("floor", "flushed"):
        floor(root, rest[0], flush=name == "flushed")
    elif name == "read":
        read(root, ("base", "instruct"))
    elif name == "compare":
        compare(root, Path(rest[0]))
    else:
        load(root, Path(rest[0]))


def this(name: str, root: Path, *rest: str) -> tuple[str, ...]:
    """The command of a subcommand."""
    return (sys.executable, str(Path(__file__).resolve()), "--run", name, str(root), *rest)


# --- contestants -----------------------------------------------------------------------------------------------------


def ours_command(command: str, root: Path, size: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "shadowlit", *words(command, root / size, OUT))


def mergekit_command(root: Path, executable: str, in_float32: bool) -> tuple[str, ...]:
    """Writes the merge's configuration too.

    ``--lazy-unpickle`` and ``--low-cpu-memory`` concern pickles and GPUs; ``--async-write`` needs several shards.
    """
    merge = {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "small" / "base"),
        "models": [
            {"model": str(root / "small" / model), "parameters": {"weight": 1.0}} for model in ("tuned", "instruct")
        ],
        "parameters": {"normalize": False},
        **({"dtype": "float32", "out_dtype": "bfloat16"} if in_float32 else {}),
    }
    path = root / f"merge-{'float32' if in_float32 else 'bfloat16'}.yaml"
    path.write_text(json.dumps(merge))  # JSON is YAML
    return (executable, str(path), OUT, "--quiet")


GRAFT, WORK, NAIVE, FLOOR, FLUSHED = "shadowlit graft", "its work", "in memory", "read and write", "the same, flushed"
MERGEKIT, MERGEKIT_16 = "mergekit, float32", "mergekit, bfloat16"
SIMILARITY, SIMILARITY_WORK, READ = "shadowlit similarity", "its work (similarity)", "read the two by all cores"
BY_THREADS = "its work, by threads"
COLD, COLD_READ = "shadowlit similarity, from the disk", "read the two, from the disk"


def graft_contestants(root: Path, mergekit: str | None) -> list[Contestant]:
    peers = [Contestant(NAIVE, this("naive", root, OUT))]
    if mergekit:
        peers.append(Contestant(MERGEKIT, mergekit_command(root, mergekit, True)))
        peers.append(Contestant(MERGEKIT_16, mergekit_command(root, mergekit, False)))
    floors = [Contestant(FLOOR, this("floor", root, OUT)), Contestant(FLUSHED, this("flushed", root, OUT), True)]
    return [Contestant(GRAFT, ours_command("graft", root, "small"), True), *peers, *floors]


# --- tables ----------------------------------------------------------------------------------------------------------


def median(runs: list[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in runs)


def spread(runs: list[Figures], key: str) -> str:
    """``median (smallest–largest)``, or a dash where there is no such figure."""
    values = [figures[key] for figures in runs if key in figures]
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


def peak(runs: list[Figures] | None, key: str) -> str:
    return f"{median(runs, key) / 1e6:,.0f}" if runs else "–"


def goal(name: str, value: float, limit: float, text: str) -> None:
    print(f"- {name}: {text} – **{'met' if value <= limit else 'not met'}**")


def print_graft(
    contestants: list[Contestant], times: dict[str, list[Figures]], memory: dict[str, list[Figures]]
) -> None:
    print("\n| contestant | whole process, s | × ours | × floor | CPU, s | work, s | × floor's | USS, MB |"
          " anonymous, MB | RSS, MB | flushed to the disk |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for contestant in contestants:
        name, runs, seen = contestant.name, times[contestant.name], memory.get(contestant.name)
        work = times[WORK] if name == GRAFT else runs
        wall = median(runs, "wall_s")
        share = f"{median(work, 'work_s') / median(times[FLOOR], 'work_s'):.1f}" if "work_s" in work[0] else "–"
        print(
            f"| {name} | {spread(runs, 'wall_s')} | {wall / median(times[GRAFT], 'wall_s'):.2f} |"
            f" {wall / median(times[FLOOR], 'wall_s'):.1f} | {median(runs, 'cpu_s'):.1f} |"
            f" {spread(work, 'work_s')} | {share} |"
            f" {peak(seen, 'uss_bytes')} | {peak(seen, 'anonymous_bytes')} | {peak(seen, 'rss_bytes')} |"
            f" {'yes' if contestant.flushes else 'no'} |"
        )


def print_graft_goals(times: dict[str, list[Figures]]) -> None:
    wall, work, fsync = median(times[GRAFT], "wall_s"), median(times[WORK], "work_s"), median(times[WORK], "fsync_s")
    for peer, limit in ((MERGEKIT, 1 / 5), (MERGEKIT_16, 1 / 5), (NAIVE, 1 / 4)):
        if peer in times:
            ratio = wall / median(times[peer], "wall_s")
            without = (wall - fsync) / median(times[peer], "wall_s")
            goal(f"wall ≤ {limit:.2f} × {peer}", ratio, limit, f"{ratio:.2f} × ({without:.2f} × without its flush)")
    ratio = work / median(times[FLOOR], "work_s")
    goal(
        "work ≤ 2.5 × the floor", ratio, 2.5,
        f"{ratio:.1f} × ({(work - fsync) / median(times[FLOOR], 'work_s'):.1f} × without its flush,"
        f" {work / median(times[FLUSHED], 'work_s'):.1f} × the flushed floor); the flush takes {fsync:.2f} s",
    )  # fmt: skip


def print_similarity(times: dict[str, list[Figures]]) -> None:
    print("\n| similarity | whole process, s | CPU, s | work, s |\n|---|---|---|---|")
    for name, runs in times.items():
        print(f"| {name} | {spread(runs, 'wall_s')} | {spread(runs, 'cpu_s')} | {spread(runs, 'work_s')} |")
    print()
    for text, work, floor in (("disk", COLD, COLD_READ), ("page cache", SIMILARITY_WORK, READ)):
        ratio = median(times[work], "work_s") / median(times[floor], "work_s")
        goal(f"similarity at the speed of reading the pair from the {text} (work ≤ 1.5 × reading)", ratio, 1.5,
             f"{ratio:.1f} ×")  # fmt: skip


def print_memory(small: list[Figures], large: list[Figures], sizes: list[Figures]) -> None:
    print("\n| shadowlit graft | parameters, M | USS, MB | anonymous, MB | RSS, MB |\n|---|---|---|---|---|")
    for name, runs, size in (("0.6B", small, sizes[0]), ("larger", large, sizes[1])):
        cells = " | ".join(peak(runs, key) for key in ("uss_bytes", "anonymous_bytes", "rss_bytes"))
        print(f"| {name} | {size['parameters'] / 1e6:,.0f} | {cells} |")
    before, after = median(small, "uss_bytes") / 1e6, median(large, "uss_bytes") / 1e6
    print()
    goal("USS ≤ 500 MB at 0.6B", before, 500, f"{before:.0f} MB")
    times = sizes[1]["parameters"] / sizes[0]["parameters"]
    goal(
        f"USS ≤ 500 MB at {times:.1f} × the size", after, 500, f"{after:.0f} MB, {after / before:.2f} × the small one's"
    )


def check(root: Path, contestants: list[Contestant]) -> None:
    """Print what the results hold, beside the equation."""
    print()
    for contestant in contestants:
        if contestant.name in (FLOOR, FLUSHED):
            continue
        out = root / "kept"
        run(contestant.command, out, False)
        found = run(this("compare", root, str(out)), root / "none", False)
        share = found["unequal"] / found["elements"]
        text = (
            f"{found['unequal']:,} of {found['elements']:,} elements ({share:.2%}) differ, by up to"
            f" {found['largest_difference']:.1e}; {found['names_differ']} tensor names differ"
        )
        if contestant.name == GRAFT:
            goal(
                "bit-equal to the equation in float32, rounded once", found["unequal"] + found["names_differ"], 0, text
            )
            logits = run(this("load", root, str(out)), root / "none", False)
            goal(
                "loads in transformers with the equation's logits",
                logits["logit_difference"] + logits["loading_problems"], 0,
                f"largest difference {logits['logit_difference']:g} over {logits['tokens']:.0f} tokens, "
                f"{logits['loading_problems']:.0f} names missing or left over",
            )  # fmt: skip
        else:
            print(f"- {contestant.name}: {text}")
        shutil.rmtree(out)


def versions(python: str, packages: tuple[str, ...]) -> str:
    code = f"from importlib.metadata import version; print(', '.join(f'{{p}} {{version(p)}}' for p in {packages!r}))"
    return subprocess.run([python, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workdir", type=Path, help="where the temporary folder is made; the system's own place else")
    parser.add_argument("--mergekit", metavar="PATH", help="the mergekit-yaml of an environment that has mergekit")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)  # a smaller model, to try this file
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        subcommand(options.run[0], Path(options.run[1]), *options.run[2:])
        return
    print(f"{os.cpu_count()} cores; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}; "
          + versions(sys.executable, ("torch", "numpy", "safetensors", "huggingface_hub", "transformers")))  # fmt: skip
    if options.mergekit:
        python = str(Path(options.mergekit).with_name("python"))
        print("mergekit's environment: " + versions(python, ("mergekit", "torch", "safetensors", "transformers")))
    else:
        print("mergekit: left out; give --mergekit ENV/bin/mergekit-yaml")
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        benchmark(Path(folder), options)


def benchmark(root: Path, options: argparse.Namespace) -> None:
    def made(size: str) -> Figures:
        return run(this("make", root, size, str(options.layers if size != "tiny" else 0)), root / "none", False)

    made("tiny")
    small = made("small")
    size = sum(path.stat().st_size for path in (root / "small" / "base").iterdir()) / 1e9
    print(f"{small['tensors']} tensors, {small['parameters'] / 1e6:.1f}M parameters, three folders of {size:.2f} GB;"
          f" medians of {options.repetitions} (smallest–largest)", flush=True)  # fmt: skip
    contestants = graft_contestants(root, options.mergekit)
    memory: dict[str, list[Figures]] = {}
    if "memory" in options.only:
        shown = contestants if "graft" in options.only else contestants[:1]
        memory = measure(shown, options.repetitions, root, sample=True, warm_up=False)
    if "graft" in options.only:
        works = [
            Contestant(WORK, this("graft", root, OUT), True),
            Contestant(BY_THREADS, this("graft", root, OUT, "threads"), True),
        ]
        times = measure([*contestants, *works], options.repetitions, root, warm_up=not memory)
        print_graft(contestants, times, memory)
        print(f"\nThe work of {GRAFT}: {spread(times[WORK], 'work_s')} s by processes, "
              f"{spread(times[BY_THREADS], 'work_s')} s by threads.\n")  # fmt: skip
        print_graft_goals(times)
    if "similarity" in options.only:
        comparisons = [
            Contestant(SIMILARITY, ours_command("similarity", root, "small")),
            Contestant(SIMILARITY_WORK, this("similarity", root, OUT)),
            Contestant(BY_THREADS, this("similarity", root, OUT, "threads")),
            Contestant(READ, this("read", root)),
            Contestant(COLD, this("similarity", root, OUT), cold=True),
            Contestant(COLD_READ, this("read", root), cold=True),
        ]
        print_similarity(measure(comparisons, options.repetitions, root))
    if "check" in options.only:
        check(root, contestants)
    if "memory" in options.only:
        shutil.rmtree(root / "small")
        large = made("large")
        command = [Contestant(GRAFT, ours_command("graft", root, "large"), True)]
        at_large = measure(command, options.repetitions, root, sample=True, warm_up=False)
        print_memory(memory[GRAFT], at_large[GRAFT], [small, large])


if __name__ == "__main__":
    main()
