"""The tasks of lm-evaluation-harness, which are found, checked and loaded before any model is.

The harness takes seconds to import and is imported late.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.errors import EvaluationError, counted
from shadowlit.harness.perturbed import Perturbed, perturbed_tasks, require_kinds
from shadowlit.harness.suites import Suite, SuiteTask, load_suites, select_suites

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_CODE_SWITCH = "HF_ALLOW_CODE_EVAL"
_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
_ANSWER_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
_ANSWER_TOKENS = 256  # the harness' limit for tasks without one
_CPU_BATCH_SIZE = 8
_MAX_SHOWN = 8


@dataclass(frozen=True)
class Settings:
    """How tasks are run on a model; the arguments of :func:`shadowlit.cli.evaluate.evaluate` of the same names.

    Attributes:
        chat: Whether to apply the chat template; None if the tokenizer has one.
        fewshot: Number of examples in the prompt of every task, except tasks that allow none; None for the suites'
            and tasks' own.
        limit: Number of samples of every task that are used, the first ones; None for all.
        max_new_tokens: Length of the longest answer, in tokens; None for the suites' and tasks' own.
        batch_size: A number, ``auto``, or ``auto:N`` to search N times for the largest batch that fits. On a CPU,
            where none fails, ``auto`` means 8.
        seed: Seed for the choice of examples and for all random generators.
        execute_code: Whether programs that the model wrote may be run.
        perturb: Perturbations of which every task also gets a copy; see :mod:`shadowlit.harness.perturbations`.
        perturb_field: Column with the question; None for the first of
            :data:`shadowlit.harness.perturbed.QUESTION_FIELDS` that a task has.

    Raises:
        EvaluationError: A value is out of range.
    """

    chat: bool | None = None
    system: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: str = "auto"
    seed: int = 1234
    execute_code: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    perturb: Sequence[str] = ()
    perturb_field: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("fewshot", self.fewshot, 0),
            ("limit", self.limit, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise EvaluationError(f"{name} is {value}; expected at least {least}.")
        require_kinds(self.perturb)
        if self.perturb_field is not None and not self.perturb:
            raise EvaluationError("perturb_field is given without perturb. Leave it out, or set perturb.")
        number = self.batch_size.removeprefix("auto:")
        if self.batch_size != "auto" and not (number.isdigit() and int(number) > 0):
            raise EvaluationError(
                f"batch_size is {self.batch_size!r}; expected a number, auto, or auto:N, e.g. auto:4."
            )

    def batch_size_on(self, device_type: str) -> str:
        """Return the batch size as the harness takes it, on this type of device."""
        automatic = self.batch_size.startswith("auto")
        return str(_CPU_BATCH_SIZE) if automatic and device_type == "cpu" else self.batch_size


@dataclass(frozen=True)
class Benchmarks:
    """Tasks that are loaded with their data, for any number of models; the harness' tasks and groups by name.

    The copies of perturbed tasks are among them, in a suite of their own.
    """

    suites: tuple[Suite, ...]
    settings: Settings
    tasks: Mapping[str, Task | Group] = field(repr=False)
    manager: TaskManager = field(repr=False)
    perturbed: tuple[Perturbed, ...] = field(default=(), repr=False)

    @property
    def leaves(self) -> list[Task]:
        """All tasks, including those of groups."""
        return [leaf for task in self.tasks.values() for leaf in _tasks_of(task)]

    @property
    def answer_tokens(self) -> int:
        """Length of the longest answer that any of the tasks asks for, in tokens; 0 if none generates."""
        return max((answer_tokens(task) for task in self.leaves), default=0)


def require_harness(backend: str = "hf") -> None:
    """Raise an EvaluationError unless the harness is installed, and vllm if it is the backend."""
    if find_spec("lm_eval") is None:
        raise EvaluationError(
            "lm-evaluation-harness, which runs the benchmarks, is not installed. Run pip install 'shadowlit[eval]'."
        )
    if backend == "vllm" and find_spec("vllm") is None:
        raise EvaluationError("backend is vllm, which is not installed. Run pip install vllm, or leave backend out.")


def load_benchmarks(
    names: Sequence[str], settings: Settings | None = None, tasks_folder: str | Path | None = None
) -> Benchmarks:
    """Find tasks, check them and load their data.

    Args:
        names: Names of suites (``suites.yaml``), names of the harness' tasks, groups and tags, or paths of task files.
        settings: Settings for running the tasks.
        tasks_folder: Folder with tasks of your own, YAML files in the harness' form, which take precedence over the
            harness' tasks. Data files are searched for in the working folder and next to the YAML file.

    Raises:
        EvaluationError: The harness is not installed, there is no such suite or task, a YAML or data file is missing
            or broken, a task needs more examples than it has or would run programs that the model writes.
    """
    require_harness()
    settings = settings or Settings()
    names = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not names:
        raise EvaluationError(f"no suite was given; expected one of {', '.join(load_suites())}, or names of tasks.")
    # The suites say it for their own tasks, before the seconds that the harness' index takes.
    _require_consent([task for suite in select_suites(names) for task in suite.tasks if task.executes_code], settings)
    with quiet():
        manager = _local_manager(tasks_folder)
        index = manager.task_index
        suites = select_suites(_given_files(names, index))
        _complete(index, [task.based_on or task.task for suite in suites for task in suite.tasks])
        _add_variants(suites, index)
        suites = [_without_missing(suite, index) for suite in suites]
        _require_known([task.name for suite in suites if suite.title is None for task in suite.tasks], index)
        wanted = [task for suite in suites for task in suite.tasks]
        _require_consent([task for task in wanted if any(cfg.get("unsafe_code") for cfg in _configs(task.task, index))],
                         settings)  # fmt: skip
        with allowing_code(settings.execute_code):
            built = {str(task.task): _build(task, manager) for task in wanted}
    suites = [_expanded(suite, built) for suite in suites]
    tasks = {name: task for found in built.values() for name, task in found.items()}
    _require_distinct(tasks)
    for suite in suites:
        for entry in suite.tasks:
            for task in _tasks_of(tasks[str(entry.task)]):
                _set_fewshot(task, entry.num_fewshot if settings.fewshot is None else settings.fewshot)
                _set_answer_tokens(task, settings.max_new_tokens or suite.max_new_tokens)
    if not settings.perturb:
        return Benchmarks(tuple(suites), settings, tasks, manager)
    found, copies, twins = perturbed_tasks(
        suites, tasks, settings.perturb, settings.perturb_field, settings.seed, settings.limit
    )
    return Benchmarks((*suites, *copies), settings, {**tasks, **twins}, manager, tuple(found))


def harness_version() -> str:
    """Return the installed version of the harness."""
    return metadata.version("lm_eval")


def _given_files(names: Sequence[str], index: dict[str, Any]) -> list[str]:
    """Add tasks that are given by the path of their file to the index; return names only."""
    from lm_eval.tasks._index import TaskIndex

    given = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            path = Path(name).expanduser().resolve()
            config = _read_yaml(path)
            found = config.get("group") or config.get("task")
            if not isinstance(found, str):
                raise EvaluationError(f"{path} names no task; expected 'task: name' or 'group: name' in it.")
            index.pop(found, None)
            TaskIndex.process_cfg(config, path, index)
            given.append(found)
        else:
            given.append(name)
    return given


def _read_yaml(path: Path) -> dict[str, Any]:
    """A task's file and the files that it includes, in which functions stay names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=False)
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{path} needs {error.filename}, which does not exist. Correct the path, or add the file."
        ) from error
    except Exception as error:  # of YAML, of a cycle of includes
        raise EvaluationError(f"{path} is not a valid task of the harness: {' '.join(str(error).split())}") from error


def _local_manager(tasks_folder: str | Path | None) -> TaskManager:
    """The harness' manager of the tasks in a folder."""
    from lm_eval.tasks import TaskManager

    if tasks_folder is None:
        return TaskManager(include_defaults=False)
    folder = Path(tasks_folder).expanduser()
    if not folder.is_dir():
        raise EvaluationError(f"tasks_folder is '{tasks_folder}', which does not exist. Correct the path.")
    for path in sorted(folder.rglob("*.yaml")):
        _read_yaml(path)  # the harness skips those that it can't read
    return TaskManager(include_path=folder, include_defaults=False)


def _complete(index: dict[str, Any], names: Sequence[str | None]) -> None:
    """Find the data files of the user's tasks, and add the harness' tasks if they are needed, which takes 10 s."""
    known = [name for name in names if name in index]
    for needed in sorted({config["task"] for name in known for config in _configs(name, index) if config}):
        if needed in index:
            _find_data(needed, index)
    if any(None in _configs(name, index) for name in names):
        for name, entry in _harness_index().items():
            index.setdefault(name, entry)


@cache
def _harness_index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def _find_data(name: str, index: dict[str, Any]) -> None:
    """Check that a task's data files exist, in the working folder or next to its YAML file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = index[name]
    config = entry.cfg or {}
    given = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") not in _FILE_FORMATS or given is None:
        return
    here = Path(entry.yaml_path).parent
    missing: list[str] = []

    def resolve(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: resolve(part) for split, part in files.items()}
        if isinstance(files, list):
            return [resolve(part) for part in files]
        if "://" in files or _exists(Path(), files):
            return files
        if not _exists(here, files):
            missing.append(files)
        return str(here / files)

    resolved = resolve(given)
    if missing:
        raise EvaluationError(
            f"task '{name}' ({entry.yaml_path}) reads {', '.join(missing)}, which is neither in the working folder nor "
            f"in {here}. Put it there, or correct dataset_kwargs.data_files."
        )
    if resolved != given:
        full = load_yaml(entry.yaml_path)
        full["dataset_kwargs"] = {**full["dataset_kwargs"], "data_files": resolved}
        index[name] = replace(entry, yaml_path=None, cfg=full)


def _exists(folder: Path, pattern: str) -> bool:
    path = folder / pattern
    return path.exists() or ("*" in pattern and any(path.parent.glob(path.name)))


def _add_variants(suites: Sequence[Suite], index: dict[str, Any]) -> None:
    """Add the suites' variants of the harness' tasks to its index, without importing them yet."""
    for task in (task for suite in suites for task in suite.tasks):
        if task.task and task.based_on and task.based_on in index:
            index[task.task] = replace(index[task.based_on], name=task.task, tags=set())


def _without_missing(suite: Suite, index: Mapping[str, Any]) -> Suite:
    """The suite without the tasks that the harness lacks; a task that was asked for by name stays, an error later."""
    if suite.title is None:
        return suite
    missing = tuple(task.name for task in suite.tasks if task.task not in index)
    return replace(suite, tasks=tuple(task for task in suite.tasks if task.task in index), missing=missing)


def _require_known(names: Sequence[str], index: Mapping[str, Any]) -> None:
    for name in names:
        if name not in index:
            near = difflib.get_close_matches(name, [*load_suites(), *index], n=3, cutoff=0.7)
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise EvaluationError(
                f"there is no suite or task '{name}', in lm-evaluation-harness {harness_version()} or among your own."
                f"{hint} Suites: {', '.join(load_suites())}; 'lm-eval ls tasks' lists the harness' tasks."
            )


def _require_consent(tasks: Sequence[SuiteTask], settings: Settings) -> None:
    if tasks and not settings.execute_code:
        shown = ", ".join(task.name for task in tasks[:_MAX_SHOWN])
        raise EvaluationError(
            f"{shown}: to score these, programs that the model wrote are run on this machine, with your permissions. "
            "Nothing was loaded. Set execute_code=true (--execute-code) where that is safe, e.g. in a container, or "
            "leave them out."
        )


def _configs(name: str | None, index: Mapping[str, Any]) -> list[Any]:
    """The settings of the tasks that a name stands for; None for each that the index lacks."""
    entry = index.get(name or "")
    if entry is None:
        return [None]
    if entry.kind.name == "TAG":
        return [config for tagged in sorted(entry.tags) for config in _configs(tagged, index)]
    if entry.kind.name == "GROUP":
        return _members(entry.cfg, index)
    return [entry.cfg]


def _members(config: Mapping[str, Any], index: Mapping[str, Any]) -> list[Any]:
    """The settings of a group's tasks, which are names, names with changes, or tasks and groups written out."""
    found: list[Any] = []
    children = config.get("task") or []
    for child in [children] if isinstance(children, str) else children:
        if isinstance(child, str):
            found += _configs(child, index)
            continue
        name = child.get("group") or child.get("task")
        if isinstance(name, str) and name in index:
            found += [None if below is None else {**below, **child} for below in _configs(name, index)]
        else:
            found += _members(child, index) if isinstance(child.get("task"), list) else [child]
    return found


def _build(entry: SuiteTask, manager: TaskManager) -> dict[str, Task | Group]:
    """Load a task or group with its data, or the tasks of a tag or of a group that has no score of its own."""
    from lm_eval.tasks._yaml_loader import load_yaml

    name = str(entry.task)
    try:
        spec: Any = name
        if entry.based_on:
            spec = {**load_yaml(manager.task_index[name].yaml_path), **entry.changes, "task": name}
        loaded = manager.load([spec])
    except Exception as error:  # of the hub, of datasets, of a task's own code: many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvaluationError(
            f"task '{name}' cannot be loaded ({reason}). Unless it names files, its data come from the hub: "
            "check the network, HF_HUB_OFFLINE and access to gated data; for packages that it needs, run "
            "pip install 'shadowlit[eval]'."
        ) from error
    group = loaded.get("groups", {}).get(name)
    if group is not None and group.has_aggregation:
        return {name: group}
    return dict(loaded["tasks"])


def _expanded(suite: Suite, built: Mapping[str, Mapping[str, Task | Group]]) -> Suite:
    """The suite with an entry for every task or group that has a score."""
    rows: list[SuiteTask] = []
    for entry in suite.tasks:
        found = built[str(entry.task)]
        rows += [entry] if entry.task in found else [replace(entry, name=name, task=name) for name in found]
    return replace(suite, tasks=tuple(rows))


def _require_distinct(tasks: Mapping[str, Task | Group]) -> None:
    """Refuse a task that is asked for on its own and as part of a group: the harness would run it once."""
    owner: dict[str, str] = {}
    for name, task in tasks.items():
        for leaf in _tasks_of(task):
            if owner.setdefault(leaf.task_name, name) != name:
                raise EvaluationError(
                    f"task '{leaf.task_name}' is in '{owner[leaf.task_name]}' and in '{name}'. Leave one of them out."
                )


def _tasks_of(task: Task | Group) -> list[Task]:
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _set_fewshot(task: Task, number: int | None) -> None:
    """Set the number of examples; as in the harness, a task that sets 0 keeps it."""
    if number is None or task.get_config("num_fewshot") == 0:
        return
    available = _num_examples(task) if number else 0
    if number > available:
        raise EvaluationError(
            f"fewshot is {number}, but task '{task.task_name}' has {counted(available, 'example')} besides the samples "
            "that it scores. Choose fewer, or give the task a fewshot_split with more rows."
        )
    task.set_config("num_fewshot", number)


def _num_examples(task: Task) -> int:
    """How many examples a prompt can have without the sample's own answer among them."""
    config = task.get_config("fewshot_config")
    split = getattr(config, "split", None)
    if split is None and getattr(config, "samples", None) is None:
        split = task.get_config("training_split") or ""
    scored = task.get_config("test_split") or task.get_config("validation_split")
    if split == "" or (split == scored and split != task.get_config("test_split")):
        return 0
    number = len(list(task.fewshot_docs()))
    return number - 1 if split == scored else number  # the sample itself is left out


def _set_answer_tokens(task: Task, number: int | None) -> None:
    if number is not None and task.get_config("output_type") == "generate_until":
        kept = {k: v for k, v in task.get_config("generation_kwargs").items() if k not in _ANSWER_KEYS}
        task.set_config("generation_kwargs", {**kept, "max_gen_toks": number})


def answer_tokens(task: Task) -> int:
    """Return the longest answer that a task asks for, in tokens; 0 if it generates none."""
    if task.get_config("output_type") != "generate_until":
        return 0
    given = task.get_config("generation_kwargs") or {}
    return int(next((given[key] for key in _ANSWER_KEYS if given.get(key)), _ANSWER_TOKENS))


@contextlib.contextmanager
def quiet(name: str = "lm_eval", level: int = logging.WARNING) -> Iterator[None]:
    """Let the harness log from a level on only, and print to stderr, as its progress bars do."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def allowing_code(allowed: bool) -> Iterator[None]:
    """Let metrics run programs within the block, if ``allowed``."""
    before = {name: os.environ[name] for name in (_CODE_SWITCH,) if name in os.environ}
    os.environ.update({_CODE_SWITCH: "1"} if allowed else {})
    try:
        yield
    finally:
        os.environ.pop(_CODE_SWITCH, None)
        os.environ.update(before)
