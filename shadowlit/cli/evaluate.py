"""``shadowlit evaluate``; the docstring is the help."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

from shadowlit.checkpoint.folder import atomic_folder
from shadowlit.errors import EvaluationError, ExportError
from shadowlit.grafting.manifest import plain, versions, write_json
from shadowlit.harness.models import Evaluation
from shadowlit.harness.perturbations import Perturbation
from shadowlit.harness.perturbed import Perturbed, change
from shadowlit.harness.report import PERTURBED_HEADINGS, Report, make_report
from shadowlit.harness.subjects import Subject, local_folder
from shadowlit.harness.tasks import Settings, harness_version, load_benchmarks, require_harness
from shadowlit.pair.folders import read_json
from shadowlit.progress import make_console, make_table

_UNSAFE = re.compile(r"[^\w.-]+")
_DEVICE = re.compile(r"auto|all|cpu|mps|cuda(:\d+)?")


def evaluate(
    model: list[str],
    suite: list[str],
    adapter: str | None = None,
    tasks_folder: str | None = None,
    chat: bool | None = None,
    system: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    backend: Literal["hf", "vllm"] = "hf",
    seed: int = 1234,
    execute_code: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    perturb: list[Perturbation] = [],  # noqa: B006 - read only, and shown by --help
    perturb_field: str | None = None,
    out: str | None = None,
) -> None:
    """Run benchmarks of lm-evaluation-harness on models, and compare the models sample by sample.

    Everything that can be checked is checked before a model is loaded.

    Args:
        model: Folders or hub ids. The first is the reference that the others are compared with.
        suite: Benchmarks: math7, code3, reasoning9 (the groups of the Shadow-FT paper), paper (all three), ifeval;
            names of the harness' tasks, groups and tags; or paths of YAML files.
        adapter: Folder or hub id of an adapter in peft's format, which is added to the last model. Give a model twice
            to see what the adapter changes.
        tasks_folder: Folder with your own tasks, as YAML files in the harness' format. Python functions that they name
            are executed.
        chat: Apply the chat template; by default if the tokenizer has one.
        system: System message.
        fewshot: Number of examples in the prompt of every task, except tasks that allow none.
        limit: Number of samples of every task that are used, the first ones; for trying things out.
        max_new_tokens: Length of the longest answer, in tokens; by default 4096 in the paper's groups, as in the
            paper, and each task's own length otherwise.
        batch_size: A number, auto, or auto:N to search N times for the largest batch that fits. auto is 8 on a CPU.
        dtype: Dtype of the weights; auto for the folder's own.
        device: auto, cpu, cuda, cuda:1, mps; or all, to spread the layers over all GPUs.
        backend: hf for transformers, or vllm if it is installed, on the GPUs that it sees.
        seed: Seed for the choice of examples, and for sampling in tasks that sample.
        execute_code: Run programs that the models wrote, with your permissions. HumanEval and similar tasks need it.
        template_kwargs: Arguments of the chat template, e.g. '{"enable_thinking": false}'.
        perturb: Also evaluate on copies of the rows, and report each difference with an interval over rows: names
            (other first names), numbers (other numbers, where a solution as in GSM8K gives the new answer), words
            (numbers in words), distractors (a sentence that doesn't matter). Several are allowed.
        perturb_field: Column with the question; by default question, problem, prompt, query, instruction or input.
        out: Folder to create, with results.json, report.md and every sample. It is written atomically; an existing one
            is never overwritten.
    """
    require_harness(backend)
    settings = Settings(
        chat=chat, system=system, fewshot=fewshot, limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size,
        seed=seed, execute_code=execute_code, template_kwargs=template_kwargs or {}, perturb=tuple(perturb),
        perturb_field=perturb_field,
    )  # fmt: skip
    if not _DEVICE.fullmatch(device):
        raise EvaluationError(f"device is {device!r}; expected auto, all, cpu, mps, cuda or cuda:N.")
    if not model:
        raise EvaluationError("no model was given; expected one or more folders or hub ids.")
    if out is not None:
        _require_free(Path(out))
    for source in model:
        read_json("model", local_folder(source, weights=False) / "config.json")
    if adapter is not None:
        read_json("adapter", local_folder(adapter, weights=False) / "adapter_config.json")
    start = time.perf_counter()
    console = make_console()
    benchmarks = load_benchmarks(suite, settings, tasks_folder)
    subjects = [Subject(source, adapter if i == len(model) else None) for i, source in enumerate(model, start=1)]
    for subject in subjects:  # an error in the last one must not come after hours of the first one
        subject.check(benchmarks)
    evaluations = []
    for subject in subjects:
        console.print(f"evaluate: {subject.name}")
        evaluations.append(subject.evaluate(benchmarks, backend, dtype, device))
    report = make_report(evaluations, benchmarks.perturbed)
    _print(report, console)
    if out is not None:
        config = {"suite": suite, "tasks_folder": tasks_folder, "dtype": dtype, "device": device, "backend": backend}
        _write(Path(out), subjects, evaluations, report, {**config, **asdict(settings)}, benchmarks.perturbed)
        console.print(f"evaluate: {out} is complete")
    console.print(f"evaluate: done in {time.perf_counter() - start:.1f} s")


def _print(report: Report, console: Console) -> None:
    for letter, name in report.models:
        console.print(f"{letter} = {name}")
    table = make_table(*report.headings, left=2, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for section in report.sections:
        for row in section:
            table.add_row(*(Text(cell) for cell in row))
        table.add_section()
    console.print(table)
    if report.perturbed:
        changes = make_table(*PERTURBED_HEADINGS, left=3, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for cells in report.perturbed:
            changes.add_row(*map(Text, cells))
        console.print(changes)
    for note in report.notes:
        console.print(Text(f"- {note}"))


def _require_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"out is {out}, which exists already. Choose another folder, or remove it first.")


def _write(
    out: Path,
    subjects: Sequence[Subject],
    evaluations: Sequence[Evaluation],
    report: Report,
    config: dict[str, Any],
    perturbed: Sequence[Perturbed],
) -> None:
    """Write the folder atomically."""
    with atomic_folder(out) as folder:
        models = {}
        for (letter, _), subject, found in zip(report.models, subjects, evaluations, strict=True):
            models[letter] = {"name": found.model, "chat": found.chat, **subject.describe(), "suites": _scores(found),
                              "harness": found.harness}  # fmt: skip
            for task, samples in found.samples.items():
                _write_lines(folder / "samples" / letter / f"{_UNSAFE.sub('_', task)}.jsonl", samples)
        results: dict[str, Any] = {
            "config": config,
            "versions": {**versions(), "lm_eval": harness_version()},
            "models": models,
            "notes": report.notes,
        }
        if perturbed:
            letters = [letter for letter, _ in report.models]
            results["perturbed"] = [_changes(one, letters, evaluations) for one in perturbed]
        for one in perturbed:
            pairs = zip(one.indices, one.rows, strict=True)
            rows = ({"index": index, "original": old, "perturbed": new} for index, (old, new) in pairs)
            _write_lines(folder / "perturbed" / f"{_UNSAFE.sub('_', one.name)}.jsonl", rows)
        write_json(folder / "results.json", plain(results))
        (folder / "report.md").write_text(str(report), encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _changes(one: Perturbed, letters: Sequence[str], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """A perturbation and what it changes, for programs to read."""
    models = {}
    for letter, found in zip(letters, evaluations, strict=True):
        changed = change(one, [score for suite in found.suites for score in suite.tasks])
        models[letter] = None if changed is None else {**asdict(changed), "interval": changed.interval}
    return {
        "task": one.task, "kind": one.kind, "question": one.question, "num_rows": one.num_rows,
        "num_perturbed": len(one.indices), "models": models,
    }  # fmt: skip


def _scores(found: Evaluation) -> list[dict[str, Any]]:
    """The scores, for programs to read."""
    return [
        {
            "title": suite.title,
            "mean": suite.mean and asdict(suite.mean),
            "missing": suite.missing,
            "tasks": [
                {key: value for key, value in asdict(score).items() if key not in ("values", "weighted")}
                for score in suite.tasks
            ],
        }
        for suite in found.suites
    ]
