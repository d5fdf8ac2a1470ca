"""The check of a pair: everything in which a Base and its Instruct do not fit, found before any weight is loaded.

Each check is a function of the two sides and the selection that yields what it found; :func:`check_pair` runs them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import in_layout_of
from shadowlit.checkpoint.names import stored_names
from shadowlit.errors import CheckpointError, GraftError, PairError, counted
from shadowlit.pair.folders import Problem, Severity
from shadowlit.pair.pair import ModelPair, PairWithoutWeights, Select
from shadowlit.pair.side import Side, open_side
from shadowlit.pair.tokens import check_template, check_tokenizers
from shadowlit.pair.weights import CHECKS

log = logging.getLogger(__name__)

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


def check_pair(
    pair: ModelPair,
    select: Select = "linear",
    download: bool = True,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Find everything in which the two models of a pair do not fit together, before any weight is loaded.

    Reads configs, tokenizers, safetensors headers, the samples of the fingerprints, some embedding rows, and an output
    head that a tied model stores; this takes seconds whatever the size of the models. Nothing is raised for what is
    found. A part that can't be read is a problem too, and only the checks that need it are skipped.

    Example::

        for problem in check_pair(ModelPair("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B"), download=False):
            print(problem)

    Args:
        pair: The Base and its Instruct.
        select: Tensors that will be grafted: ``linear``, ``all``, or regular expressions for tensor names. Unequal
            vocabularies and ties are errors for a graft of embeddings or lm_head, and warnings for any other.
        download: Download the weights of hub ids, as a run needs them. Otherwise only configs, tokenizers and headers
            are fetched, a few MB; fingerprints and embedding rows of weights that are not on this machine are not
            checked, and a note says so.
        chat_template: Text of a template that is used instead of the tokenizer's own, as by ``data.chat_template``.
        template_kwargs: Arguments for the template.

    Returns:
        Errors first, then warnings, then notes; an empty list for a pair that fits in every respect.
    """
    if not download:
        pair = PairWithoutWeights(**asdict(pair))
    problems: list[Problem] = []
    base = open_side("base", pair, pair.base, pair.base_folder, pair.base_tokenizer, problems)
    instruct = open_side("instruct", pair, pair.instruct, pair.instruct_folder, pair.instruct_tokenizer, problems)
    try:
        problems += _rename(base, instruct)
        if base.reader and instruct.reader:
            # Either may store its experts fused. The checks report layouts that can't be reconciled.
            with contextlib.suppress(CheckpointError, GraftError):
                base.reader = in_layout_of(base.reader, instruct.reader)
                base.headers = base.reader.tensors
        problems += _check_revision(base, pair.base, pair.base_revision)
        problems += _check_revision(instruct, pair.instruct, pair.instruct_revision)
        problems += _check_unread(base, instruct)
        for check in CHECKS:
            problems += check(base, instruct, select)
        owner, other = (base, instruct) if pair.template_owner == "base" else (instruct, base)
        problems += check_tokenizers(other, owner)
        problems += check_template(base, instruct, owner, chat_template, template_kwargs or {})
    finally:
        base.close()
        instruct.close()
    return sorted(problems, key=lambda problem: _SEVERITIES.index(problem.severity))


def require_fit(
    pair: ModelPair,
    select: Select = "linear",
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Check a pair as :func:`check_pair` does, log warnings and notes, and raise if there are errors.

    It may be called before the ranks know each other; the first one logs.

    Raises:
        PairError: There are errors; one message lists all of them with their remedies.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # late: commands that don't train need none of it

    problems = check_pair(pair, select, chat_template=chat_template, template_kwargs=template_kwargs)
    for problem in problems:
        if problem.severity != "error" and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            log.log(logging.WARNING if problem.severity == "warning" else logging.INFO, "%s", problem)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        listed = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(errors, 1))
        count = counted(len(errors), "error")
        raise PairError(f"Base '{pair.base}' and Instruct '{pair.instruct}' do not fit together, {count}:{listed}")


def _rename(base: Side, instruct: Side) -> Iterator[Problem]:
    """Rename the Base's tensors as the Instruct's, where the two were saved under different prefixes."""
    if base.headers is None or instruct.headers is None:
        return
    names = stored_names(base.headers, instruct.headers)
    renamed = [f"{own} for {name}" for own, name in names.items() if own != name]
    if renamed and len(set(names.values())) == len(names):
        base.headers = {names[own]: info for own, info in base.headers.items()}
        yield Problem.note(
            "tensors",
            f"the Base has other names for {len(renamed)} of {len(names)} tensors, as other versions of transformers "
            f"save them: {some_of(renamed)}",
            "nothing: they are matched by the common part of their names.",
        )


def _check_revision(side: Side, source: str, revision: str | None) -> Iterator[Problem]:
    """A revision that is ignored, or one that is missing."""
    if side.folder is None:
        return
    local = Path(source).expanduser().is_dir()
    if local and revision:
        yield Problem.warning(
            f"{side.who} revision",
            f"'{revision}' is ignored, because '{source}' is a folder",
            "",
            f"remove pair.{side.who}_revision, or give the hub id.",
        )
    if not local and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        yield Problem(
            "note",
            f"{side.who} revision",
            f"'{source}' is read at {revision or 'its main branch'}, which can move",
            "a commit",
            f"set pair.{side.who}_revision to the commit that the manifest of the run names.",
        )


def _check_unread(base: Side, instruct: Side) -> Iterator[Problem]:
    """Weights that are not downloaded, and what is unknown without them."""
    unread = [side.title for side in (base, instruct) if side.headers is not None and side.reader is None]
    if unread:
        yield Problem.note(
            "weights",
            f"only the headers of the {' and the '.join(unread)} were read, so it is unknown whether both are the same "
            "model, whether the Base has learned the template's tokens, and whether a tied model's stored head is its "
            "embedding",
            "nothing: a run downloads the weights and checks all of it.",
        )
