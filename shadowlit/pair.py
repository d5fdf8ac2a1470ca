"""ModelPair: a Base and its Instruct, where their files are, and whether they fit together."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shadowlit.errors import CheckpointError, PairError
from shadowlit.graft.checkpoint import CheckpointReader, TensorInfo

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Severity = Literal["error", "warning", "note"]
Select = str | Sequence[str]

# Everything that a folder needs but pickled weights, and weights in other forms.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Problem:
    """One thing in which a pair does not fit.

    Attributes:
        severity: ``error`` stops a run, ``warning`` is logged, ``note`` explains.
        subject: What it is about, e.g. ``chat template``.
        found: What was found, names and values.
        expected: What was expected instead; may be empty where ``found`` says it.
        remedy: What to do.
    """

    severity: Severity
    subject: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        expected = f" Expected: {self.expected}." if self.expected else ""
        return f"{self.subject}: {self.found}.{expected} To do: {self.remedy}"


class _ProblemError(PairError):
    """A PairError made of one Problem, so that the check can collect it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class ModelPair:
    """A Base and the Instruct that was made from it.

    Nothing is read or downloaded before a method asks for it.

    Args:
        base: Folder or Hugging Face id of the Base, the model that is trained.
        instruct: Folder or Hugging Face id of the Instruct, the model that gets the update. Its tokenizer and chat
            template are used for both.
        base_revision: Commit, tag or branch of the Base on the hub; pin a commit to make runs repeatable.
        instruct_revision: Commit, tag or branch of the Instruct on the hub.
        trust_remote_code: Run Python code that comes with the model. Dangerous: only for authors you trust, and only
            with pinned revisions.
    """

    base: str
    instruct: str
    base_revision: str | None = None
    instruct_revision: str | None = None
    trust_remote_code: bool = False

    def base_folder(self) -> Path:
        """The local folder of the Base, downloaded first if ``base`` is a hub id.

        Raises:
            PairError: There is no such folder, or the hub does not give it.
        """
        return self._base_folder

    def instruct_folder(self) -> Path:
        """The local folder of the Instruct, downloaded first if ``instruct`` is a hub id.

        Raises:
            PairError: There is no such folder, or the hub does not give it.
        """
        return self._instruct_folder

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The Instruct's tokenizer, with its chat template; the one that both models are used with.

        Raises:
            PairError: It cannot be loaded.
        """
        return self._instruct_tokenizer

    def base_tokenizer(self) -> PreTrainedTokenizerBase:
        """The Base's own tokenizer, only used to compare.

        Raises:
            PairError: It cannot be loaded.
        """
        return self._base_tokenizer

    def config(self) -> PretrainedConfig:
        """The Instruct's config.

        Raises:
            PairError: It is missing, broken, or of an unknown model type.
        """
        return _load_config("instruct", self.instruct_folder(), self.trust_remote_code)

    def base_config(self) -> PretrainedConfig:
        """The Base's config.

        Raises:
            PairError: It is missing, broken, or of an unknown model type.
        """
        return _load_config("base", self.base_folder(), self.trust_remote_code)

    def fingerprints(self) -> dict[str, str]:
        """``{"base": ..., "instruct": ...}``: see :meth:`CheckpointReader.fingerprint`.

        Raises:
            PairError: A folder is missing.
            CheckpointError: A folder holds no readable safetensors.
        """
        return {"base": _fingerprint(self.base_folder()), "instruct": _fingerprint(self.instruct_folder())}

    def check(self, select: Select = "linear") -> list[Problem]:
        """Everything in which the pair does not fit; see :func:`check_pair`."""
        with CheckpointReader(self.base_folder()) as b, CheckpointReader(self.instruct_folder()) as i:
            return _check_shapes(b.tensors, i.tensors)

    def require_fit(self, select: Select = "linear") -> None:
        """Check the pair; log what is to be known, stop at what cannot work.

        Raises:
            PairError: There are errors; one message lists all of them with their remedies.
        """
        problems = self.check(select)
        for problem in problems:
            if problem.severity != "error":
                log.log(logging.WARNING if problem.severity == "warning" else logging.INFO, "%s", problem)
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            listed = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(errors, 1))
            count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
            raise PairError(f"Base '{self.base}' and Instruct '{self.instruct}' do not fit together, {count}:{listed}")

    @cached_property
    def _base_folder(self) -> Path:
        return _resolve("base", self.base, self.base_revision, self.trust_remote_code)

    @cached_property
    def _instruct_folder(self) -> Path:
        return _resolve("instruct", self.instruct, self.instruct_revision, self.trust_remote_code)

    @cached_property
    def _base_tokenizer(self) -> PreTrainedTokenizerBase:
        return _load_tokenizer("base", self.base_folder(), self.trust_remote_code)

    @cached_property
    def _instruct_tokenizer(self) -> PreTrainedTokenizerBase:
        return _load_tokenizer("instruct", self.instruct_folder(), self.trust_remote_code)


def _resolve(who: str, source: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The local folder of a folder name or hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(source) or folder.exists():
        kind = "is a file" if folder.exists() else "is no folder, and cannot be a hub id"
        raise _ProblemError(
            Problem("error", f"{who} model", f"'{source}' {kind}", "a model's folder, or an id such as 'org/name'",
                    f"set pair.{who} to the folder that holds config.json and the safetensors files.")
        )  # fmt: skip
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS
    try:
        # Safe for several ranks at once: the hub's cache locks every file.
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        at = f" at revision '{revision}'" if revision else ""
        raise _ProblemError(
            Problem("error", f"{who} model", f"there is no folder '{source}', and the hub does not give '{source}'{at} "
                    f"({type(error).__name__}: {str(error).splitlines()[0]})", "a model's folder or a reachable hub id",
                    f"check the spelling of pair.{who}; for a gated model accept its licence and log in with "
                    "'hf auth login'; without a network download it elsewhere and give the folder.")
        ) from error  # fmt: skip


def _read_json(who: str, path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _ProblemError(
            Problem("error", f"{who} {path.name}", f"there is no {path}", "the file that every saved model has",
                    f"set pair.{who} to the folder into which the model was saved, or finish its download.")
        ) from error  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:
        raise _ProblemError(
            Problem("error", f"{who} {path.name}", f"{path} is not readable JSON ({error})", "a JSON object",
                    "repair the file, or download the model again.")
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise _ProblemError(
            Problem("error", f"{who} {path.name}", f"{path} holds a {type(value).__name__}", "a JSON object",
                    "repair the file, or download the model again.")
        )  # fmt: skip
    return value


def _load_config(who: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a folder, by transformers."""
    from transformers import AutoConfig

    _read_json(who, folder / "config.json")  # transformers' own error for a broken file does not say which
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _ProblemError(
            Problem("error", f"{who} config.json", f"transformers cannot load {folder / 'config.json'} ({error})",
                    "a model type that this transformers knows",
                    "upgrade transformers; if the model brings its own code and you trust its author, set "
                    "pair.trust_remote_code=true.")
        ) from error  # fmt: skip


def _load_tokenizer(who: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by transformers."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _ProblemError(
            Problem("error", f"{who} tokenizer", f"transformers cannot load the tokenizer in {folder} ({error})",
                    "tokenizer.json and tokenizer_config.json beside the weights",
                    "copy the model's tokenizer files into the folder, or download it again.")
        ) from error  # fmt: skip


def _fingerprint(folder: Path) -> str:
    with CheckpointReader(folder) as reader:
        return reader.fingerprint()


def _check_shapes(base: dict[str, TensorInfo], instruct: dict[str, TensorInfo]) -> list[Problem]:
    if {n: t.shape for n, t in base.items()} == {n: t.shape for n, t in instruct.items()}:
        return []
    return [Problem("error", "tensors", "names or shapes differ", "equal ones", "use the Base of this Instruct.")]
