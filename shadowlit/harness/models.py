"""Benchmarks by lm-evaluation-harness in this process: a model in memory is evaluated and left as it was."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.errors import EvaluationError
from shadowlit.harness.suites import SuiteScore, read_scores
from shadowlit.harness.tasks import Benchmarks, Settings, allowing_code, answer_tokens, load_benchmarks, quiet
from shadowlit.pair.folders import read_json

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """A model's scores.

    Attributes:
        model: Name of the model.
        chat: Whether the chat template was applied.
        suites: Scores by suite.
        harness: What the harness reported, without samples.
        samples: The harness' record of every sample (prompt, answer, target, metrics), by task.
    """

    model: str
    chat: bool
    suites: tuple[SuiteScore, ...]
    harness: Mapping[str, Any] = field(repr=False)
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(repr=False)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: str | Sequence[str] | Benchmarks,
    *,
    tasks_folder: str | Path | None = None,
    name: str | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a model that is in memory, e.g. after a fit or within a graft.

    The model and the random generators are left as they were. The model must be on one process: the harness doesn't
    promise the equal numbers of forwards that sharded models need.

    Args:
        model: Transformers model, wrapped by peft or not, on its device.
        tokenizer: Tokenizer of the model.
        suite: Names of suites or of tasks, or what :func:`load_benchmarks` returned for them.
        tasks_folder: Folder with tasks of your own, YAML files in the harness' form.
        name: Name of the model in the report; by default where it was loaded from.
        **settings: Settings, see :class:`Settings`; not allowed with benchmarks that are loaded already.

    Raises:
        EvaluationError: There is no such suite or task, its data can't be read, a setting is out of range, or the
            model's context has no room for the answers.
    """
    with _random_state_kept():
        if isinstance(suite, Benchmarks):
            if settings or tasks_folder is not None:
                raise EvaluationError(
                    f"settings were given with loaded benchmarks: {', '.join(settings) or 'tasks_folder'}. "
                    "Give them to load_benchmarks."
                )
            benchmarks = suite
        else:
            names = [suite] if isinstance(suite, str) else list(suite)
            benchmarks = load_benchmarks(names, Settings(**settings), tasks_folder)
        name = name or getattr(model, "name_or_path", "") or type(model).__name__
        chat = use_chat(name, tokenizer, benchmarks.settings)
        require_room(name, model.config, tokenizer, benchmarks)
        with quiet(), _plainly_generating(model):
            return run(name, _in_memory(model, tokenizer, benchmarks.settings), benchmarks, chat)


def run(name: str, lm: LM, benchmarks: Benchmarks, chat: bool) -> Evaluation:
    """Run loaded benchmarks on a model that the harness has wrapped.

    Raises:
        EvaluationError: The harness did not report a metric of a suite.
    """
    from lm_eval import simple_evaluate

    settings = benchmarks.settings
    with quiet(), allowing_code(settings.execute_code):
        results = simple_evaluate(
            lm,
            tasks=list(benchmarks.tasks.values()),
            limit=settings.limit,
            system_instruction=settings.system,
            apply_chat_template=chat,
            task_manager=benchmarks.manager,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            confirm_run_unsafe_code=settings.execute_code,
        )
    try:
        suites = read_scores(benchmarks.suites, results)
    except KeyError as error:
        reported = {
            name: [key for key in found if "," in key and "_stderr," not in key]
            for name, found in results["results"].items()
        }
        raise EvaluationError(
            f"the harness did not report {error}; it reported {reported}. Correct the suite."
        ) from error
    samples = results.pop("samples")
    return Evaluation(name, chat, suites, results, samples)


def use_chat(name: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> bool:
    """Return whether the chat template is applied.

    Raises:
        EvaluationError: The settings ask for it, and there is none.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if settings.chat and not has_template:
        raise EvaluationError(f"chat is true, but the tokenizer of {name} has no chat template. Leave chat out.")
    return has_template if settings.chat is None else settings.chat


def require_room(name: str, config: Any, tokenizer: PreTrainedTokenizerBase, benchmarks: Benchmarks) -> None:
    """Raise an EvaluationError unless the longest answer leaves room for a prompt in the model's context."""
    from lm_eval.models.utils import resolve_max_length

    room = resolve_max_length(config, tokenizer)
    longest = benchmarks.answer_tokens
    if longest >= room:
        tasks = ", ".join(task.task_name for task in benchmarks.leaves if answer_tokens(task) >= room)
        raise EvaluationError(
            f"answers of up to {longest} tokens leave no room for a prompt in the {room} tokens of {name} ({tasks}). "
            f"Set max_new_tokens to less than {room}."
        )


def vllm_model(folder: Path, adapter: Path | None, dtype: str, settings: Settings) -> LM:
    """Load a model, with a LoRA adapter in peft's form if one is given, in vllm, on the GPUs that it sees."""
    from lm_eval.api.registry import get_model

    lora: dict[str, Any] = {}
    if adapter is not None:
        rank = int(read_json("adapter", adapter / "adapter_config.json")["r"])
        lora = {"lora_local_path": str(adapter), "max_lora_rank": max(rank, 8)}  # vllm knows no smaller one
    with quiet():
        return get_model("vllm")(
            pretrained=str(folder),
            dtype=dtype,
            batch_size=settings.batch_size,
            seed=settings.seed,
            chat_template_args=dict(settings.template_kwargs),
            **lora,
        )


def _in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> LM:
    from lm_eval.models.huggingface import HFLM

    with quiet("lm_eval.models.huggingface", logging.ERROR):  # it warns, at length, of being given a model
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it is changed
            batch_size=settings.batch_size_on(model.device.type),
            chat_template_args=dict(settings.template_kwargs),
        )


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the states that the harness' seeds change."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _plainly_generating(model: PreTrainedModel) -> Iterator[None]:
    """Keep only the end tokens of the model's generation settings; restore them and the training mode afterwards.

    The harness' wrapper sets what its tasks ask for on top of the model's own settings: max_new_tokens there would cut
    answers short of a task's limit, and repetition_penalty would make greedy decoding something else.
    """
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    owner: Any = model
    if hasattr(owner, "get_base_model"):  # of peft
        owner = owner.get_base_model()
    settings = owner.generation_config
    tokens = {key: getattr(settings, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    owner.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        owner.generation_config = settings
        for module in training:
            module.training = True
