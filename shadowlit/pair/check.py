"""The check of a pair: everything in which a Base and its Instruct do not fit, found before any weight is loaded.

Each check is a function of the two sides and the selection that yields what it found; :func:`check_pair` runs them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import TensorInfo, some_of
from shadowlit.checkpoint.layout import in_layout_of
from shadowlit.checkpoint.names import split_selection, stored_names, tower_of
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import CheckpointError, GraftError, PairError, first_line
from shadowlit.pair.folders import Problem, ProblemError, Severity, commit_of, load_config, read_json
from shadowlit.pair.hub import read_hub_headers
from shadowlit.pair.pair import ModelPair, PairWithoutWeights, Select

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# Usual names of embedding and lm_head, for models whose rows are padded beyond the config's vocab_size.
_TOKEN_TENSOR = re.compile(
    r"(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|embed_out|lm_head|output)\.weight$"
)
# Those of them that a tie makes superfluous.
_HEAD_TENSOR = re.compile(r"(lm_head|embed_out|output)\.weight$")
# Tokens that were put aside for later, and that no Base saw in training.
_PLACEHOLDER = re.compile(r"reserved|unused|extra_?id|placeholder|dummy", re.IGNORECASE)
# Texts on which tokenizers with equal vocabularies show other merges, normalizers or digit rules.
_PROBES = ("Hello, world!  It's 12345.67", "def f(x):\n\treturn x ** 2\n", "Ünïcödé ﬁ 中文 🙂")
# Rows sampled from an embedding to know what a trained row looks like: at most 64 blocks of 32.
_SAMPLE_BLOCKS = 64
_SAMPLE_BLOCK_ROWS = 32

_SAME_ARCHITECTURE: dict[str, Severity] = {"model_type": "error", "architectures": "warning"}
_ROPE_KEYS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
)
# Settings without which equal weights are another function.
# fmt: off
_DEFINING = frozenset([
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation",
    "num_experts_per_tok", "layer_types", "query_pre_attn_scalar",
])
# Seen in tensors, reported by another check, or without effect on what the layers compute.
_SEEN_ELSEWHERE = frozenset([
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "tie_word_embeddings", "max_position_embeddings", "quantization_config", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "attention_dropout", "output_hidden_states", "output_attentions", "return_dict",
    "id2label", "label2id", "problem_type", "text_config", "vision_config", "auto_map",
    "chunk_size_feed_forward", "pretraining_tp", "router_aux_loss_coef", "output_router_logits",
    "cache_implementation", "unsloth_version", "max_window_layers",
]) | set(_ROPE_KEYS)
# fmt: on


def check_pair(pair: ModelPair, select: Select = "linear", download: bool = True) -> list[Problem]:
    """Find everything in which the two models of a pair do not fit, before any weight is loaded.

    Reads configs, tokenizers, safetensors headers, the fingerprints' samples and some embedding rows: seconds,
    whatever the size of the models. Nothing is raised for what is found. A part that can't be read is a problem too,
    and only the checks that need it are skipped.

    Example::

        for problem in check_pair(ModelPair("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B"), download=False):
            print(problem)

    Args:
        pair: The Base and its Instruct.
        select: What will be grafted: ``linear``, ``all``, or regular expressions for tensor names. Unequal
            vocabularies and ties stop a graft that touches embeddings or lm_head; any other graft may proceed.
        download: Download the weights of hub ids, as a run needs them. Without, only configs, tokenizers and headers
            are fetched, a few MB. Fingerprints and embedding rows of weights that are not on this machine are then
            not checked, and a note says so.

    Returns:
        Errors first, then warnings, then notes; an empty list for a pair that fits in every respect.
    """
    if not download:
        pair = PairWithoutWeights(**asdict(pair))
    problems: list[Problem] = []
    base = _open_side("base", pair, pair.base, pair.base_folder, pair.base_tokenizer, problems)
    instruct = _open_side("instruct", pair, pair.instruct, pair.instruct_folder, pair.instruct_tokenizer, problems)
    try:
        problems += _rename(base, instruct)
        if base.reader and instruct.reader:
            # Either may hold its experts fused. The checks report what can't be brought together.
            with contextlib.suppress(CheckpointError, GraftError):
                base.reader = in_layout_of(base.reader, instruct.reader)
                base.headers = base.reader.tensors
        problems += _check_revision(base, pair.base, pair.base_revision)
        problems += _check_revision(instruct, pair.instruct, pair.instruct_revision)
        problems += _check_unread(base, instruct)
        for check in _CHECKS:
            problems += check(base, instruct, select)
        owner, other = (base, instruct) if pair.template_owner == "base" else (instruct, base)
        problems += _check_tokenizers(other, owner)
        problems += _check_template(base, instruct, owner)
    finally:
        base.close()
        instruct.close()
    return sorted(problems, key=lambda problem: _SEVERITIES.index(problem.severity))


def require_fit(pair: ModelPair, select: Select = "linear") -> None:
    """Check a pair, log warnings and notes, and raise if it has errors.

    Args:
        pair: The Base and its Instruct.
        select: What will be grafted; see :func:`check_pair`.

    Raises:
        PairError: There are errors; one message lists all of them with their remedies.
    """
    problems = check_pair(pair, select)
    for problem in problems:
        if problem.severity != "error" and _is_rank_zero():
            log.log(logging.WARNING if problem.severity == "warning" else logging.INFO, "%s", problem)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        listed = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(errors, 1))
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        raise PairError(f"Base '{pair.base}' and Instruct '{pair.instruct}' do not fit together, {count}:{listed}")


def _is_rank_zero() -> bool:
    """Whether this process may log: of several ranks that check the same pair, one is enough."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@dataclass
class _Side:
    """What could be read of one model; a part that could not be is None, and has been reported.

    Attributes:
        headers: The tensors by name, from the headers of the safetensors files.
        reader: Reads their data too; None as well where the weights are on the hub and stay there.
    """

    who: str
    folder: Path | None = None
    config: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    headers: Mapping[str, TensorInfo] | None = None
    reader: TensorReader | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def title(self) -> str:
        return self.who.capitalize()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.headers or {}

    def get(self, key: str) -> Any:
        return (self.config or {}).get(key)

    def has(self, file: str) -> bool:
        return self.folder is not None and (self.folder / file).exists()

    def vocabulary(self) -> dict[str, TensorInfo]:
        """The embedding and, untied, the lm_head: tensors with one row per token, outside the layers."""
        return {name: info for name, info in self.tensors.items() if _has_token_rows(info, self.get("vocab_size"))}

    def close(self) -> None:
        if self.reader:
            self.reader.close()


def _open_side(
    who: str,
    pair: ModelPair,
    source: str,
    folder: Callable[[], Path],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    problems: list[Problem],
) -> _Side:
    """Read all that the checks need of one model, and add what cannot be read to ``problems``."""
    side = _Side(who, _attempt(who, folder, problems))
    if side.folder is not None:
        path = side.folder
        side.config = _attempt(who, lambda: _flat_config(load_config(who, path, pair.trust_remote_code)), problems)
        if side.has("generation_config.json"):
            side.generation = _attempt(who, lambda: read_json(who, path / "generation_config.json"), problems)
        if isinstance(pair, PairWithoutWeights) and not Path(source).expanduser().is_dir():
            side.reader = _open_cached(path)
            remote = None if side.reader else _attempt(who, lambda: read_hub_headers(source, commit_of(path)), problems)
        else:
            side.reader, remote = _attempt(who, lambda: CheckpointReader(path), problems), None
        side.headers = side.reader.tensors if side.reader else remote
        side.tokenizer = _attempt(who, tokenizer, problems)
    return side


def _open_cached(folder: Path) -> CheckpointReader | None:
    """The weights of a hub id, if an earlier download has left all of them in its folder."""
    try:
        return CheckpointReader(folder)
    except CheckpointError:
        return None


def _attempt(who: str, action: Callable[[], _T], problems: list[Problem]) -> _T | None:
    """The action's result, or None and one more problem."""
    try:
        return action()
    except ProblemError as error:
        problems.append(error.problem)
    except CheckpointError as error:
        remedy = f"repair the folder, or set pair.{who} to a complete one."
        problems.append(Problem("error", f"{who} weights", str(error).rstrip("."), "", remedy))
    return None


def _flat_config(config: PretrainedConfig) -> dict[str, Any]:
    """The language model's config; of a multimodal model its text part's keys over the whole's, and its vision's."""
    vision = getattr(config, "vision_config", None)
    seen = {f"vision_config.{key}": value for key, value in (vision.to_dict() if vision else {}).items()}
    seen = {key: value for key, value in seen.items() if key.partition(".")[2] not in _SEEN_ELSEWHERE}
    return {**config.to_dict(), **config.get_text_config().to_dict(), **seen, "model_type": config.model_type}


def _has_token_rows(info: TensorInfo, vocab_size: int | None) -> bool:
    """Whether a tensor has one row per token: by its shape, or by one of the usual names."""
    if len(info.shape) != 2 or any(part.isdigit() for part in info.name.split(".")):
        return False
    return info.shape[0] == vocab_size or _TOKEN_TENSOR.search(info.name) is not None


def _selects(select: Select, names: Iterable[str]) -> bool:
    """Whether a selection touches one of these embedding or lm_head tensors."""
    towers, patterns = split_selection(select)
    if towers:
        names, patterns = [name for name in names if tower_of(name) in towers], patterns or ["all"]
    patterns = [pattern for pattern in patterns if pattern != "linear"]
    if "all" in patterns:
        return bool(list(names))
    try:
        return any(re.search(pattern, name) for pattern in patterns for name in names)
    except re.error:  # the selection itself reports a broken pattern
        return True


def _rename(base: _Side, instruct: _Side) -> Iterator[Problem]:
    """Know the Base's tensors by the Instruct's names, where the two were saved under other prefixes."""
    if base.headers is None or instruct.headers is None:
        return
    names = stored_names(base.headers, instruct.headers)
    renamed = [f"{own} for {name}" for own, name in names.items() if own != name]
    if renamed and len(set(names.values())) == len(names):
        base.headers = {names[own]: info for own, info in base.headers.items()}
        yield Problem(
            "note",
            "tensors",
            f"{len(renamed)} of {len(names)} tensors have other names in the Base, as other versions of transformers "
            f"save them: {some_of(renamed)}",
            "",
            "nothing: they are paired by what the names have in common.",
        )


def _check_revision(side: _Side, source: str, revision: str | None) -> Iterator[Problem]:
    """A revision that is ignored, or one that is missing."""
    if side.folder is None:
        return
    local = Path(source).expanduser().is_dir()
    if local and revision:
        yield Problem(
            "warning",
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


def _check_unread(base: _Side, instruct: _Side) -> Iterator[Problem]:
    """Weights that stay on the hub, and what is not known without them."""
    unread = [side.title for side in (base, instruct) if side.headers is not None and side.reader is None]
    if unread:
        yield Problem(
            "note",
            "weights",
            f"of the {' and the '.join(unread)} only headers were read: whether both are one model, and whether the "
            "Base has learned the template's tokens, is not known",
            "",
            "nothing: a run downloads the weights and checks both.",
        )


def _check_same(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """One model in both places: the I2I arm."""
    if base.folder is None or instruct.folder is None or base.reader is None or instruct.reader is None:
        return
    if base.folder.resolve() == instruct.folder.resolve():
        found = f"both are the folder {base.folder}"
    elif base.reader.fingerprint() == instruct.reader.fingerprint():
        found = f"{base.folder} and {instruct.folder} have the same fingerprint"
    else:
        return
    yield Problem(
        "note",
        "same model",
        f"{found}, so that the graft is direct tuning (arm I2I or B2B)",
        "",
        "nothing, if this is the control; else set pair.base to the Base of the Instruct.",
    )


def _check_architecture(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """The two must be one architecture."""
    if base.config is None or instruct.config is None:
        return
    for key, severity in _SAME_ARCHITECTURE.items():
        if base.get(key) != instruct.get(key):
            yield Problem(
                severity,
                "architecture",
                f"{key} is {base.get(key)!r} in the Base, {instruct.get(key)!r} in the Instruct",
                "the same",
                "set pair.base to the Base that the Instruct was made from.",
            )


def _check_quantised(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Weights that cannot be added: quantised ones, and those without a fraction."""
    for side in (base, instruct):
        method = side.get("quantization_config")
        coarse = [info for info in side.tensors.values() if _is_coarse(info)]
        if method or coarse:
            said = f"config.json has quantization_config ({_quantiser(method)})" if method else ""
            stored = sorted({str(info.dtype).removeprefix("torch.") for info in coarse})
            names = some_of(info.name for info in coarse)
            held = f"{len(coarse)} tensors are stored as {', '.join(stored)} ({names})"
            yield Problem(
                "error",
                f"{side.who} quantised",
                " and ".join(filter(None, [said, held if coarse else ""])),
                "weights in bfloat16, float16 or float32",
                f"set pair.{side.who} to the unquantised original; or load it, call model.dequantize() and "
                "save it in bfloat16.",
            )


def _is_coarse(info: TensorInfo) -> bool:
    """Whether a tensor is a weight in 8 bits or fewer, or packed into integers."""
    packed = info.dtype in (torch.int32, torch.uint32, torch.int16, torch.uint16) and len(info.shape) >= 2
    return packed or (info.itemsize == 1 and info.dtype != torch.bool)


def _quantiser(method: Any) -> str:
    return str(method.get("quant_method", "unknown method")) if isinstance(method, dict) else str(method)


def _check_names(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Every tensor of one model is in the other; embeddings and lm_head are told apart by ``_check_ties``."""
    if base.headers is None or instruct.headers is None:
        return
    remedy = "set pair.base to the Base of this Instruct; if only prefixes differ, load both with the same "
    remedy += "AutoModelForCausalLM and save them again."
    for one, other in ((base, instruct), (instruct, base)):
        rows = one.vocabulary()
        alone = [name for name in one.tensors if name not in other.tensors and name not in rows]
        if alone:
            yield Problem(
                "error",
                "tensors",
                f"{len(alone)} of {len(one.tensors)} tensors are only in the {one.title} ({some_of(alone)})",
                "the same names in both",
                remedy,
            )


def _check_shapes(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Tensors of one name have one shape; unequal numbers of token rows are a matter of the vocabulary."""
    rows = base.vocabulary().keys() & instruct.vocabulary().keys()
    common = [name for name in base.tensors if name in instruct.tensors]
    odd = [name for name in common if base.tensors[name].shape != instruct.tensors[name].shape]
    wider = [name for name in odd if name in rows and base.tensors[name].shape[1] == instruct.tensors[name].shape[1]]
    wrong = [name for name in odd if name not in wider]
    if wrong:
        told = [f"{n} {list(base.tensors[n].shape)} and {list(instruct.tensors[n].shape)}" for n in wrong]
        yield Problem(
            "error",
            "shapes",
            f"{len(wrong)} of {len(common)} common tensors differ, Base and Instruct: {some_of(told)}",
            "equal shapes",
            "set pair.base to the Base of this Instruct: of the same size and family.",
        )
    if wider:
        told = [f"{n} has {base.tensors[n].shape[0]} rows and {instruct.tensors[n].shape[0]}" for n in wider]
        touched = _selects(select, wider)
        yield Problem(
            "error" if touched else "warning",
            "vocabulary",
            f"Base and Instruct are unequal: {some_of(told)}",
            "equal numbers of rows where embeddings are grafted",
            f"set graft.select=linear, which leaves them out (it is {select!r}); or bring the smaller model "
            "to the same number with resize_token_embeddings and save it."
            if touched
            else "nothing for this selection, which leaves embeddings and lm_head as the Instruct's; 'all' is refused.",
        )


def _check_ties(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Embeddings and lm_head: shared in both models, or in none."""
    if base.headers is None or instruct.headers is None or base.config is None or instruct.config is None:
        return
    ties = (bool(base.get("tie_word_embeddings")), bool(instruct.get("tie_word_embeddings")))
    alone = sorted(base.vocabulary().keys() ^ instruct.vocabulary().keys())
    heads = [name for name in alone if _HEAD_TENSOR.search(name)]
    lost = [name for name in alone if name not in heads or not any(ties)]
    if lost:
        yield Problem(
            "error",
            "tensors",
            f"{some_of(lost)} is in one model only, and no tie stands for it",
            "the same names in both",
            "set pair.base to the Base of this Instruct, and finish its download.",
        )
    if ties[0] != ties[1]:
        touched = _selects(select, heads or base.vocabulary())
        yield Problem(
            "error" if touched else "warning",
            "tied embeddings",
            f"tie_word_embeddings is {ties[0]} in the Base, {ties[1]} in the Instruct",
            "the same where they are grafted",
            f"set graft.select=linear, which leaves them out (it is {select!r})."
            if touched
            else "nothing for this selection, which leaves embeddings and lm_head as the Instruct's.",
        )
    elif heads and all(ties):
        yield Problem(
            "note",
            "tied embeddings",
            f"only one model stores {some_of(heads)}, which both tie to their embeddings",
            "",
            "nothing: the tie decides.",
        )


def _check_dtypes(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Stored dtypes: unequal ones are computed with all the same."""
    common = [name for name in base.tensors if name in instruct.tensors]
    odd = [name for name in common if base.tensors[name].dtype != instruct.tensors[name].dtype]
    if odd:
        told = [f"{n} {base.tensors[n].dtype} and {instruct.tensors[n].dtype}" for n in odd]
        yield Problem(
            "warning",
            "stored dtype",
            f"{len(odd)} of {len(common)} tensors differ, Base and Instruct: {some_of(told)}",
            "the same, as most pairs are published",
            "nothing: the graft is computed in float32 and exported in the Instruct's dtype. But check "
            "that neither was converted from lower precision.",
        )


def _same_type(base: _Side, instruct: _Side) -> bool:
    """Whether the two configs can be compared key by key."""
    return base.get("model_type") is not None and base.get("model_type") == instruct.get("model_type")


def _check_positions(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Rotary settings and context length, which long-context variants change legitimately."""
    if not _same_type(base, instruct):
        return
    odd = [key for key in _ROPE_KEYS if base.get(key) != instruct.get(key)]
    if odd:
        told = [f"{key} is {base.get(key)} in the Base, {instruct.get(key)} in the Instruct" for key in odd]
        yield Problem(
            "warning",
            "rope",
            "; ".join(told),
            "the same, unless the Instruct is a long-context variant",
            "nothing, if so: the Base trains with its own, the grafted model runs with the Instruct's. The "
            "update was then learned under other angles; look at val/grafted before you trust it.",
        )
    key = "max_position_embeddings"
    if base.get(key) != instruct.get(key):
        yield Problem(
            "note",
            "context length",
            f"{key} is {base.get(key)} in the Base, {instruct.get(key)} in the Instruct",
            "",
            f"keep data.max_length at most {min(filter(None, (base.get(key), instruct.get(key))), default=0)}.",
        )


def _check_other_settings(base: _Side, instruct: _Side, select: Select) -> Iterator[Problem]:
    """Settings that change what the same weights compute, seen in no tensor."""
    if base.config is None or instruct.config is None or not _same_type(base, instruct):
        return
    keys = sorted((base.config.keys() | instruct.config.keys()) - _SEEN_ELSEWHERE)
    keys = [key for key in keys if not key.startswith("_") and base.get(key) != instruct.get(key)]
    told = {key: f"{key} is {base.get(key)!r} in the Base, {instruct.get(key)!r} in the Instruct" for key in keys}
    defining = [told[key] for key in keys if key in _DEFINING]
    if defining:
        remedy = "set pair.base to the Base that the Instruct was made from."
        yield Problem("error", "config", some_of(defining), "the same", remedy)
    others = [told[key] for key in keys if key not in _DEFINING]
    if others:
        remedy = "look whether they change what the layers compute; if so, this is not the Instruct's Base."
        yield Problem("warning", "config", some_of(others, 10), "the same", remedy)


def _check_tokenizers(other: _Side, owner: _Side) -> Iterator[Problem]:
    """One id must mean one token: both models get the ids of the template's owner."""
    if other.tokenizer is None or owner.tokenizer is None:
        return
    if other.tokenizer.get_vocab() != owner.tokenizer.get_vocab():
        yield from _compare_vocabularies(other, owner)
    elif any(_encode(other, text) != _encode(owner, text) for text in _PROBES):
        yield Problem(
            "warning",
            "tokenizer",
            "both have the same tokens, but cut a text differently",
            "the same cuts",
            f"compare merges and normalizers; the {owner.title}'s tokenizer is used, the {other.title} learned with "
            "its own.",
        )


def _compare_vocabularies(other: _Side, owner: _Side) -> Iterator[Problem]:
    """Tokens of the two that do not agree; usually of the Base, and of the Instruct, which owns the template."""
    assert other.tokenizer is not None and owner.tokenizer is not None
    old, new = other.tokenizer.get_vocab(), owner.tokenizer.get_vocab()
    old_at = {i: token for token, i in old.items()}
    new_at = {i: token for token, i in new.items()}
    moved = {i: token for token, i in new.items() if token in old and old[token] != i}
    renamed = {i: token for i, token in new_at.items() if i in old_at and token not in old}
    named = {i for i in renamed if _PLACEHOLDER.search(old_at[i])}
    wrong = sorted({*moved, *renamed} - named)
    if wrong:
        told = [f"{i} was {old_at.get(i)!r}, is {new_at[i]!r}" for i in wrong]
        yield Problem(
            "error",
            "tokenizer",
            f"{len(wrong)} ids mean another token in the {other.title} than in the {owner.title}: {some_of(told)}",
            "one meaning per id",
            f"set pair.base to the Base of this Instruct: both must understand the {owner.title}'s ids.",
        )
    if named:
        told = [f"{i} was {old_at[i]!r}, is {new_at[i]!r}" for i in sorted(named)]
        yield Problem(
            "warning",
            "tokenizer",
            f"{len(named)} placeholders of the {other.title} have a meaning in the {owner.title}: {some_of(told)}",
            "",
            f"nothing, unless they appear in your data: their rows in the {other.title} were never trained.",
        )
    extra = [f"{token!r}" for i, token in sorted(new_at.items()) if token not in old and i not in old_at]
    if extra:
        yield Problem(
            "warning",
            "tokenizer",
            f"{len(extra)} tokens are only in the {owner.title}'s ({some_of(extra)})",
            "the same tokens",
            f"nothing, unless they appear in your data: the {other.title} never saw them (no row at all: see "
            f"'{other.who} vocabulary').",
        )
    lost = [f"{token!r}" for i, token in sorted(old_at.items()) if token not in new and i not in new_at]
    if lost:
        yield Problem(
            "note",
            "tokenizer",
            f"{len(lost)} tokens are only in the {other.title}'s ({some_of(lost)})",
            "",
            f"nothing: the {owner.title}'s tokenizer is used.",
        )


def _encode(side: _Side, text: str) -> list[int]:
    assert side.tokenizer is not None
    return list(side.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class _TemplateUse:
    """What a chat template writes.

    Attributes:
        ids: The special and added tokens of a small conversation, and of a prompt for an answer.
        ends: Those after the last answer, in order; None if the template does not write the answer as it is.
    """

    ids: list[int]
    ends: list[int] | None


def _template_use(tokenizer: PreTrainedTokenizerBase, parts: bool) -> _TemplateUse:
    """Render a small conversation and collect the ids; raises whatever the template raises.

    Args:
        tokenizer: Its chat template is rendered.
        parts: Give contents in parts, which templates of vision-language models may insist on.
    """
    asked, told = "Hello.", "Hello, how can I help?"

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}

    turns = [turn("user", asked), turn("assistant", told)] * 2
    try:  # a system turn shows more tokens, but some templates refuse it
        conversation = [turn("system", "Be brief."), *turns]
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except Exception:
        conversation = turns
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def used(part: str) -> list[int]:
        return [i for i in tokenizer(part, add_special_tokens=False)["input_ids"] if i in special]

    _, answer, tail = text.rpartition(told)
    return _TemplateUse(sorted({*used(text), *used(prompt)}), used(tail) if answer else None)


def _check_template(base: _Side, instruct: _Side, owner: _Side) -> Iterator[Problem]:
    """The owner's chat template exists, renders, ends a turn with a token at which generation stops."""
    if owner.tokenizer is None:
        return
    if not owner.tokenizer.chat_template:
        yield Problem(
            "error",
            "chat template",
            f"the {owner.title}'s tokenizer has none",
            "the template it was trained with",
            f"put its chat_template.jinja into the {owner.title}'s folder, or take the other model's by "
            "pair.template_owner; if the model is no chat model, it is not an Instruct.",
        )
        return
    try:
        use = _template_use(owner.tokenizer, parts=owner.get("vision_config") is not None)
    except Exception as error:
        yield Problem(
            "error",
            "chat template",
            f"it cannot be rendered ({first_line(error)})",
            "a template that renders user and assistant turns",
            f"repair chat_template.jinja in the {owner.title}'s folder.",
        )
        return
    yield from _check_end_of_turn(owner, use)
    yield from _check_template_rows(base, instruct, owner, use)
    yield from _check_untrained(base, owner, use)


def _check_end_of_turn(owner: _Side, use: _TemplateUse) -> Iterator[Problem]:
    """Generation stops where the template ends an assistant's turn."""
    assert owner.tokenizer is not None
    if use.ends is None:
        return
    if not use.ends:
        yield Problem(
            "warning",
            "end of turn",
            "the chat template ends an assistant's turn with no special token",
            "one, which the model learns to stop at",
            "add it to the template, or expect generations that run on.",
        )
        return
    if owner.generation is None and owner.has("generation_config.json"):
        return  # unreadable, and reported
    stops = (owner.generation or {}).get("eos_token_id") or owner.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    end = use.ends[0]
    if end not in stops:
        name = owner.tokenizer.convert_ids_to_tokens(end)
        yield Problem(
            "warning",
            "end of turn",
            f"the template ends a turn with {name!r} (id {end}), generation stops at {stops or 'nothing'}",
            "the former among the latter",
            f"add {end} to eos_token_id in the {owner.title}'s generation_config.json, or generations run on.",
        )


def _check_template_rows(base: _Side, instruct: _Side, owner: _Side, use: _TemplateUse) -> Iterator[Problem]:
    """Every token of the tokenizer has a row; those that the Base lacks are taken from the Instruct."""
    assert owner.tokenizer is not None
    vocabulary = owner.tokenizer.get_vocab()
    for side in (base, instruct):
        rows = min((info.shape[0] for info in side.vocabulary().values()), default=None)
        beyond = [t for t, i in vocabulary.items() if rows is not None and i >= rows]
        if not beyond:
            continue
        needed = [t for t in beyond if vocabulary[t] in use.ids]
        written = ", and the chat template writes some" if needed else ""
        found = f"{len(beyond)} tokens of the {owner.title}'s tokenizer ({some_of(map(repr, needed or beyond))}) lie "
        found += f"beyond the {rows} rows of the {side.title}'s embedding{written}"
        if side is base:
            yield Problem(
                "warning",
                "base vocabulary",
                found,
                "a row for every token",
                "nothing: while the Base trains it gets the Instruct's rows for them, which fit it less than its own.",
            )
        else:
            yield Problem(
                "error" if needed else "warning",
                "instruct vocabulary",
                found,
                "a row for every token",
                "give the tokenizer that belongs to these weights; a text with one of these tokens stops the training.",
            )


def _check_untrained(base: _Side, owner: _Side, use: _TemplateUse) -> Iterator[Problem]:
    """Tokens of the template that the Base never learned; see :func:`untrained_rows`."""
    if base.reader is None or base.tokenizer is None or owner.tokenizer is None:
        return
    seen: dict[int, list[str]] = {}
    for name, info in base.vocabulary().items():
        if info.is_weight:
            ids = [i for i in use.ids if i < info.shape[0]]
            for i, reason in _look_for_untrained(base.reader, info, ids, base.tokenizer).items():
                seen.setdefault(i, []).append(f"{reason} in {name}")
    if seen:
        told = [f"{owner.tokenizer.convert_ids_to_tokens(i)!r} ({', '.join(why)})" for i, why in sorted(seen.items())]
        yield Problem(
            "warning",
            "untrained tokens",
            f"the chat template writes {len(seen)} tokens that the Base seems never to have learned: {some_of(told)}",
            "rows like those of other tokens",
            "train the embeddings too (LoRA: modules_to_save=[embed_tokens, lm_head]; full tuning: "
            "graft.select=all), or let it be: with graft.select=linear the grafted model has the "
            "Instruct's rows, and only the Base's training sees the untrained ones.",
        )


def _look_for_untrained(
    reader: TensorReader, info: TensorInfo, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[int, str]:
    """The untrained among ``ids``: read their rows, those of placeholders, and a sample of all others."""
    num_rows = info.shape[0]
    step = max(1, num_rows // _SAMPLE_BLOCKS)
    size = min(step, _SAMPLE_BLOCK_ROWS)
    spans = [(start, min(start + size, num_rows)) for start in range(0, num_rows, step)]
    placeholders = [i for t, i in tokenizer.get_vocab().items() if _PLACEHOLDER.search(t) and i < num_rows]
    spans += [(i, i + 1) for i in {*ids, *placeholders[:_SAMPLE_BLOCKS], num_rows - 1}]
    rows: dict[int, torch.Tensor] = {}
    for start, stop in spans:
        part = reader.read_slice(info.name, (slice(start, stop),)).float()
        rows.update(zip(range(start, stop), part, strict=True))
    order = sorted(rows)
    reasons = untrained_rows(torch.stack([rows[i] for i in order]))
    return {i: reasons[k] for k, i in enumerate(order) if i in ids and k in reasons}


def untrained_rows(rows: torch.Tensor) -> dict[int, str]:
    """Which rows of an embedding look as if no training had touched them, and why.

    A row is called untrained if it is all zero (no element above 1e-16), equal to another row (placeholders
    that were initialised together and never moved), or if its norm is below a quarter of the median norm
    (initialised small, or only shrunk by weight decay). The first two are the idea of unsloth's
    ``fix_untrained_tokens``; the third catches those that decay left unequal. A row that was initialised at
    the size of trained rows, and to no other row's values, is not found.

    Args:
        rows: [R, H], a sample of the embedding in floating point, distinct tokens.

    Returns:
        Reasons by position in ``rows``.
    """
    norms = rows.norm(dim=1)
    median = norms.median()
    keys = [row.numpy().tobytes() for row in rows]
    count = Counter(keys)
    reasons: dict[int, str] = {}
    for i in range(len(rows)):
        if rows[i].abs().max() <= 1e-16:
            reasons[i] = "all zero"
        elif count[keys[i]] > 1:
            reasons[i] = f"equal to {count[keys[i]] - 1} other rows"
        elif norms[i] < median / 4:
            reasons[i] = f"norm {norms[i]:.2g}, median {median:.2g}"
    return reasons


_Check = Callable[[_Side, _Side, Select], Iterable[Problem]]
_CHECKS: tuple[_Check, ...] = (
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
