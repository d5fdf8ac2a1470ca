"""One model of a pair as far as it could be read, and what could not be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.names import is_token_tensor, layer_of
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import CheckpointError
from shadowlit.pair.buffers import computed_buffers
from shadowlit.pair.folders import Problem, ProblemError, commit_of, is_tied, load_config, read_json
from shadowlit.pair.hub import read_hub_headers
from shadowlit.pair.pair import ModelPair, PairWithoutWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_T = TypeVar("_T")

ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
# fmt: off
# Visible in tensors, covered by another check, or without effect on what the layers compute.
SEEN_ELSEWHERE = frozenset([
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "tie_word_embeddings", "max_position_embeddings", "quantization_config", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "attention_dropout", "output_hidden_states", "output_attentions", "return_dict",
    "id2label", "label2id", "problem_type", "text_config", "vision_config", "auto_map",
    "chunk_size_feed_forward", "pretraining_tp", "router_aux_loss_coef", "output_router_logits",
    "cache_implementation", "unsloth_version", "max_window_layers",
]) | set(ROPE_KEYS)
# fmt: on


@dataclass
class Side:
    """What could be read of one model; a part that could not be read is None, and has been reported.

    Attributes:
        headers: The tensors by name, from the headers of the safetensors files.
        reader: Reader of their data; also None where the weights are on the hub and are not downloaded.
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
        """``Base`` or ``Instruct``, for messages; another role as it is."""
        return self.who.capitalize() if self.who in ("base", "instruct") else self.who

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name; empty where the headers could not be read."""
        return self.headers or {}

    def get(self, key: str) -> Any:
        """Return a setting of the config; None where it is missing."""
        return (self.config or {}).get(key)

    def has(self, file: str) -> bool:
        """Return whether the folder holds ``file``."""
        return self.folder is not None and (self.folder / file).exists()

    def vocabulary(self) -> dict[str, TensorInfo]:
        """Return the embedding and, untied, the lm_head: tensors with one row per token, outside the layers."""
        return {name: info for name, info in self.tensors.items() if _has_token_rows(info, self.get("vocab_size"))}

    def close(self) -> None:
        """Close the files of the weights."""
        if self.reader:
            self.reader.close()


def open_side(
    who: str,
    pair: ModelPair,
    source: str,
    folder: Callable[[], Path],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    problems: list[Problem],
) -> Side:
    """Read all that the checks need of one model, and add what cannot be read to ``problems``."""
    side = Side(who, _attempt(who, folder, problems))
    if side.folder is not None:
        path = side.folder
        if side.has("generation_config.json"):
            side.generation = _attempt(who, lambda: read_json(who, path / "generation_config.json"), problems)
        if isinstance(pair, PairWithoutWeights) and not Path(source).expanduser().is_dir():
            with contextlib.suppress(CheckpointError):  # an earlier download may have left all weights in the folder
                side.reader = CheckpointReader(path)
            if side.reader is None:
                side.headers = _attempt(who, lambda: read_hub_headers(source, commit_of(path)), problems)
        else:
            side.reader = _attempt(who, lambda: CheckpointReader(path), problems)
        if side.reader is not None:
            side.reader.computed = computed_buffers(path, side.reader.tensors, pair.trust_remote_code)
            side.reader = side.reader.learned()
            side.headers = side.reader.tensors
        elif side.headers is not None:
            computed = computed_buffers(path, side.headers, pair.trust_remote_code)
            side.headers = {name: info for name, info in side.headers.items() if name not in computed}
        side.config = _attempt(
            who, lambda: _flat_config(load_config(who, path, pair.trust_remote_code), side.reader), problems
        )
        side.tokenizer = _attempt(who, tokenizer, problems)
    return side


def stated_sides(*sides: tuple[str, Path]) -> list[Side]:
    """Models, each a role and a folder, with what the config.json of each states, read without transformers.

    A setting that one of the files leaves to the default of its architecture is left out of all of them, and so are all
    if a folder holds no config.json. Of a multimodal model the language model's settings count; its type has no
    ``_text`` at its end, since older versions of transformers write no section of its own for it.
    """
    configs = [_stated_config(who, folder) for who, folder in sides]
    common = set.intersection(*({key for key in config if config[key] is not None} for config in configs))
    return [
        Side(who, folder, {key: config[key] for key in common})
        for (who, folder), config in zip(sides, configs, strict=True)
    ]


def _stated_config(who: str, folder: Path) -> dict[str, Any]:
    config = read_json(who, folder / "config.json") if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    stated = {**config, **(text if isinstance(text, dict) else {})}
    if isinstance(kind := stated.get("model_type"), str):
        stated["model_type"] = kind.removesuffix("_text")
    return stated


def _attempt(who: str, action: Callable[[], _T], problems: list[Problem]) -> _T | None:
    """The action's result, or None after an error, which is added to ``problems``."""
    try:
        return action()
    except ProblemError as error:
        problems.append(error.problem)
    except CheckpointError as error:
        remedy = f"repair the folder, or set pair.{who} to a complete one."
        problems.append(Problem("error", f"{who} weights", str(error).rstrip("."), "", remedy))
    return None


def _flat_config(config: PretrainedConfig, reader: TensorReader | None) -> dict[str, Any]:
    """The config as one dict; of a multimodal model, the text keys take precedence and vision keys are prefixed.

    Whether the model is tied is what transformers makes of config and files.
    """
    vision = getattr(config, "vision_config", None)
    seen = {f"vision_config.{key}": value for key, value in (vision.to_dict() if vision else {}).items()}
    seen = {key: value for key, value in seen.items() if key.partition(".")[2] not in SEEN_ELSEWHERE}
    whole = {"model_type": config.model_type, "tie_word_embeddings": is_tied(config, reader)}
    return {**config.to_dict(), **config.get_text_config().to_dict(), **seen, **whole}


def _has_token_rows(info: TensorInfo, vocab_size: int | None) -> bool:
    """Whether a tensor has one row per token: by its shape, or by one of the usual names."""
    if len(info.shape) != 2 or layer_of(info.name) is not None:
        return False
    return info.shape[0] == vocab_size or is_token_tensor(info.name)
