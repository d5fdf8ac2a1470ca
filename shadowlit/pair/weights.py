"""Checks of what two models compute: architecture, tensor names, shapes, ties, dtypes, positions, other settings."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from shadowlit.checkpoint.headers import TensorInfo, dtype_of, some_of, weights_in
from shadowlit.checkpoint.names import is_head, split_selection, tower_of
from shadowlit.errors import PairError, counted
from shadowlit.limits import bounded_matching
from shadowlit.pair.folders import Problem, Severity
from shadowlit.pair.pair import Select
from shadowlit.pair.side import ROPE_KEYS, SEEN_ELSEWHERE, Side

log = logging.getLogger(__name__)

_OTHER_BASE = "set pair.base to the Base that the Instruct was made from."
_SAME_ARCHITECTURE: dict[str, Severity] = {"model_type": "error", "architectures": "warning"}
# Settings on which the function depends that equal weights compute.
# fmt: off
_DEFINING = frozenset([
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation",
    "num_experts_per_tok", "layer_types", "query_pre_attn_scalar",
])
# fmt: on
_ONE_VALUE = {"swish": "silu"}  # two names of one function in transformers' ACT2FN


def selects(select: Select, names: Iterable[str]) -> bool:
    """Return whether a selection touches one of these embedding or lm_head tensors."""
    towers, patterns = split_selection(select)
    if towers:
        names, patterns = [name for name in names if tower_of(name) in towers], patterns or ["all"]
    patterns = [pattern for pattern in patterns if pattern != "linear"]
    if "all" in patterns:
        return bool(list(names))
    try:
        with bounded_matching(f"graft.select is {select!r}"):
            return any(re.search(pattern, name) for pattern in patterns for name in names)
    except re.error:  # the selection itself reports a broken pattern
        return True


def _check_same(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """The same model as Base and Instruct, as in the arm I2I."""
    if base.folder is None or instruct.folder is None or base.reader is None or instruct.reader is None:
        return
    if base.folder.resolve() == instruct.folder.resolve():
        found = f"both are the folder {base.folder}"
    elif base.reader.fingerprint() == instruct.reader.fingerprint():
        found = f"{base.folder} and {instruct.folder} have the same fingerprint"
    else:
        return
    yield Problem.note(
        "same model",
        f"{found}, so that the graft is direct tuning (arm I2I or B2B)",
        "nothing, if this is the control; otherwise set pair.base to the Base of the Instruct.",
    )


def _check_architecture(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """The two must be one architecture."""
    if base.config is None or instruct.config is None:
        return
    for key, found in _differences(base, instruct, _SAME_ARCHITECTURE).items():
        yield Problem(_SAME_ARCHITECTURE[key], "architecture", found, "the same", _OTHER_BASE)


def _differences(base: Side, instruct: Side, keys: Iterable[str]) -> dict[str, str]:
    """In words, the settings of the two configs that differ, by key."""
    return {
        key: f"{key} is {base.get(key)!r} in the {base.title}, {instruct.get(key)!r} in the {instruct.title}"
        for key in keys
        if _meaning(base.get(key)) != _meaning(instruct.get(key))
    }


def _meaning(value: Any) -> Any:
    return _ONE_VALUE.get(value, value) if isinstance(value, str) else value


def _check_quantised(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Weights that cannot be added: quantised ones, and those without a fraction."""
    for side in (base, instruct):
        method, coarse = _quantisation(side)
        if method or coarse:
            found = []
            if method:
                name = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
                found.append(f"config.json has quantization_config ({name})")
            if coarse:
                stored = sorted({dtype_of(info.code) for info in coarse})
                names = some_of(info.name for info in coarse)
                found.append(f"{counted(len(coarse), 'tensor')} stored as {', '.join(stored)} ({names})")
            in_training = " (model.quantization=nf4 trains it in 4 bits)" if side.who == "base" else ""
            yield Problem.error(
                f"{side.who} quantised",
                " and ".join(found),
                "weights in bfloat16, float16 or float32",
                f"set pair.{side.who} to the unquantised original{in_training}; or load it, call model.dequantize() "
                "and save it in bfloat16.",
            )


def _quantisation(side: Side) -> tuple[Any, list[TensorInfo]]:
    """The ``quantization_config`` of a model, and its packed tensors."""
    return side.get("quantization_config"), [info for info in weights_in(side.tensors).values() if info.is_packed]


def _is_any_quantised(*sides: Side) -> bool:
    """Whether the names and shapes of tensors are those of a quantised model, which compares with no other."""
    return any(any(_quantisation(side)) for side in sides)


def _check_names(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Every tensor of one model is in the other; :func:`_check_ties` compares embeddings and lm_head."""
    if base.headers is None or instruct.headers is None or _is_any_quantised(base, instruct):
        return
    remedy = "set pair.base to the Base of this Instruct; if only prefixes differ, load both with the same "
    remedy += "AutoModelForCausalLM and save them again."
    for one, other in ((base, instruct), (instruct, base)):
        rows = one.vocabulary()
        alone = [name for name in one.tensors if name not in other.tensors and name not in rows]
        if alone:
            yield Problem.error(
                "tensors",
                f"only the {one.title} has {len(alone)} of its {counted(len(one.tensors), 'tensor')} "
                f"({some_of(alone)})",
                "the same names in both",
                remedy,
            )


def _check_shapes(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Tensors of the same name have the same shape; unequal numbers of token rows are reported as such."""
    if _is_any_quantised(base, instruct):
        return
    rows = base.vocabulary().keys() & instruct.vocabulary().keys()
    common = [name for name in base.tensors if name in instruct.tensors]
    odd = [name for name in common if base.tensors[name].shape != instruct.tensors[name].shape]
    wider = [name for name in odd if name in rows and base.tensors[name].shape[1] == instruct.tensors[name].shape[1]]
    wrong = [name for name in odd if name not in wider]
    if wrong:
        shapes = [f"{n} {list(base.tensors[n].shape)} and {list(instruct.tensors[n].shape)}" for n in wrong]
        yield Problem.error(
            "shapes",
            f"{len(wrong)} of {len(common)} common tensors differ, Base and Instruct: {some_of(shapes)}",
            "equal shapes",
            "set pair.base to the Base of this Instruct: of the same size and family.",
        )
    if wider:
        rows_of = [f"{n} has {base.tensors[n].shape[0]} rows and {instruct.tensors[n].shape[0]}" for n in wider]
        yield _embedding_problem(
            select,
            wider,
            "vocabulary",
            f"Base and Instruct are unequal: {some_of(rows_of)}",
            "equal numbers of rows where embeddings are grafted",
            "; or bring the smaller model to the same number with resize_token_embeddings and save it",
        )


def _embedding_problem(
    select: Select, names: Iterable[str], subject: str, found: str, expected: str, more: str = ""
) -> Problem:
    """A problem of these embeddings or lm_heads, which is an error if they are grafted."""
    if selects(select, names):
        remedy = f"set graft.select=linear, which leaves them out (it is {select!r}){more}."
        return Problem.error(subject, found, expected, remedy)
    remedy = "nothing for this selection, which leaves embeddings and lm_head as the Instruct's; 'all' is refused."
    return Problem.warning(subject, found, expected, remedy)


def _check_ties(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Embeddings and lm_head are tied in both models or in neither."""
    if base.headers is None or instruct.headers is None or base.config is None or instruct.config is None:
        return
    ties = (bool(base.get("tie_word_embeddings")), bool(instruct.get("tie_word_embeddings")))
    alone = sorted(base.vocabulary().keys() ^ instruct.vocabulary().keys())
    heads = [name for name in alone if is_head(name)]
    # An embedding, or the head of a model that isn't tied to its embedding.
    lost = [name for name in alone if name not in heads or not ties[name in base.vocabulary()]]
    if lost:
        yield Problem.error(
            "tensors",
            f"{some_of(lost)} is in one model only, and no tie replaces it",
            "the same names in both",
            "set pair.base to the Base of this Instruct, and finish its download.",
        )
    if ties[0] != ties[1]:
        found = f"tie_word_embeddings is {ties[0]} in the Base, {ties[1]} in the Instruct, as transformers loads their "
        found += "files; the Base is trained with an output head of its own"
        expected = "the same where they are grafted"
        names = {**base.vocabulary(), **instruct.vocabulary()}
        yield _embedding_problem(select, names, "tied embeddings", found, expected)
    elif heads and all(ties):
        yield Problem.note(
            "tied embeddings",
            f"only one model stores {some_of(heads)}, which both tie to their embeddings",
            "nothing: the tie decides.",
        )


def _check_dtypes(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Stored dtypes; a graft of unequal ones is computed nevertheless."""
    common = [name for name in base.tensors if name in instruct.tensors]
    odd = [name for name in common if base.tensors[name].dtype != instruct.tensors[name].dtype]
    if odd:
        dtypes = [f"{n} {base.tensors[n].dtype} and {instruct.tensors[n].dtype}" for n in odd]
        yield Problem.warning(
            "stored dtype",
            f"{len(odd)} of {len(common)} tensors differ, Base and Instruct: {some_of(dtypes)}",
            "the same, as most pairs are published",
            "nothing: the graft is computed in float32 and exported in the Instruct's dtype. But check "
            "that neither was converted from lower precision.",
        )


def same_type(base: Side, instruct: Side) -> bool:
    """Return whether the two configs can be compared key by key."""
    return base.get("model_type") is not None and base.get("model_type") == instruct.get("model_type")


def _check_positions(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Rotary settings and context length, which long-context variants change legitimately."""
    if not same_type(base, instruct):
        return
    if rope := _differences(base, instruct, ROPE_KEYS):
        yield Problem.warning(
            "rope",
            "; ".join(rope.values()),
            "the same, unless the Instruct is a long-context variant",
            "nothing, if so: the Base trains with its own, the grafted model runs with the Instruct's. The update was "
            "then learned under other angles; look at val/grafted before you trust it.",
        )
    key = "max_position_embeddings"
    for found in _differences(base, instruct, [key]).values():
        shortest = min(filter(None, (base.get(key), instruct.get(key))), default=0)
        yield Problem.note("context length", found, f"keep data.max_length at most {shortest}.")


def _check_other_settings(base: Side, instruct: Side, select: Select) -> Iterator[Problem]:
    """Settings that change what the same weights compute, and that no tensor shows."""
    if base.config is None or instruct.config is None or not same_type(base, instruct):
        return
    keys = sorted((base.config.keys() | instruct.config.keys()) - SEEN_ELSEWHERE)
    found = _differences(base, instruct, (key for key in keys if not key.startswith("_")))
    defining = [text for key, text in found.items() if key in _DEFINING]
    if defining:
        yield Problem.error("config", some_of(defining), "the same", _OTHER_BASE)
    others = [text for key, text in found.items() if key not in _DEFINING]
    if others:
        remedy = "check whether they change what the layers compute; if so, this is not the Instruct's Base."
        yield Problem.warning("config", some_of(others, 10), "the same", remedy)


def require_one_architecture(base: Side, other: Side) -> None:
    """Raise unless the configs of two models fit, as far as both are known; log what may be meant.

    Raises:
        PairError: Their model types, or settings on which the meaning of equal weights depends, differ.
    """
    checks = (_check_architecture, _check_positions, _check_other_settings)
    # No setting names the models here, as pair.base does in a run.
    remedy = f"give the {base.title} that belongs to the {other.title}."
    found = [problem for check in checks for problem in check(base, other, "linear")]
    problems = [replace(p, remedy=p.remedy.replace(_OTHER_BASE, remedy)) for p in found]
    for problem in problems:
        if problem.severity == "warning":
            log.warning("%s", problem)
    if errors := [str(problem) for problem in problems if problem.severity == "error"]:
        raise PairError(f"the {base.title} and the {other.title} do not fit together: {' '.join(errors)}")


CHECKS: tuple[Callable[[Side, Side, Select], Iterable[Problem]], ...] = (
    _check_same,
    _check_architecture,
    _check_quantised,
    _check_names,
    _check_shapes,
    _check_ties,
    _check_dtypes,
    _check_positions,
    _check_other_settings,
)
