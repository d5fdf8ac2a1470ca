"""Model folders: finding or downloading them, and reading configs, tokenizers and processors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shadowlit.checkpoint.layout import repeats_embedding
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import PairError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

Severity = Literal["error", "warning", "note"]

# Everything that a folder needs, without pickled weights and weights in other formats.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# A second copy of the weights, in the format of the model's maker.
_HUB_IGNORED = ["consolidated*.safetensors", "original/*"]
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
# Where the processors of older vision-language models keep the chat template.
_PROCESSOR_TEMPLATE = "chat_template.json"
# A tokenizer needs at least one of these files.
_TOKENIZER_FILE = re.compile(r"^(tokenizer\.json|tekken\.json|vocab\..*|.*\.model|.*\.tiktoken)$")


@dataclass(frozen=True)
class Problem:
    """One respect in which the two models of a pair do not fit together.

    Attributes:
        severity: ``error`` stops a run, ``warning`` is logged, ``note`` explains.
        subject: The part of the models concerned, e.g. ``chat template``.
        found: What was found, with names and values.
        expected: What was expected instead; empty where ``found`` implies it.
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

    @classmethod
    def error(cls, subject: str, found: str, expected: str, remedy: str) -> Problem:
        """Return a problem that stops a run."""
        return cls("error", subject, found, expected, remedy)

    @classmethod
    def warning(cls, subject: str, found: str, expected: str, remedy: str) -> Problem:
        """Return a problem that is logged."""
        return cls("warning", subject, found, expected, remedy)

    @classmethod
    def note(cls, subject: str, found: str, remedy: str) -> Problem:
        """Return an explanation, with nothing else expected."""
        return cls("note", subject, found, "", remedy)


class ProblemError(PairError):
    """A PairError that holds a problem of severity ``error``, which the check of the pair collects."""

    def __init__(self, subject: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(subject, found, expected, remedy)
        self.problem = Problem.error(*self.args)  # in which secrets are masked

    def __str__(self) -> str:
        return str(self.problem)


def local_folder(who: str, source: str, key: str) -> Path | None:
    """Return the folder that ``source`` is, or None if it can only be a hub id; see :func:`model_folder`.

    Raises:
        PairError: It is neither.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    is_file = folder.is_file()
    if is_file or not _HUB_ID.fullmatch(source):
        kind = "is a file" if is_file else "is not a folder, and cannot be a hub id"
        raise ProblemError(
            f"{who} model",
            f"'{source}' {kind}",
            "a model's folder, or an id such as 'org/name'",
            f"set {key} to the folder that holds config.json and the safetensors files.",
        )
    return None


def model_folder(
    who: str,
    source: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    key: str = "",
) -> Path:
    """Return the local folder of a model, downloaded first if ``source`` is a hub id.

    Args:
        who: Role of the model, for messages: ``base``, ``instruct`` or ``tuned``.
        source: Folder or hub id.
        revision: Commit, tag or branch on the hub.
        trust_remote_code: Also download Python files.
        weights: Also download the safetensors files.
        key: Setting or argument that holds ``source``, for messages; ``who`` by default.

    Raises:
        PairError: There is no such folder, or the hub does not give it.
    """
    key = key or who
    if folder := local_folder(who, source, key):
        return folder
    from huggingface_hub import snapshot_download

    from shadowlit.pair.hub import unreachable

    patterns = [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS
    ignored = _HUB_IGNORED if weights else [*_HUB_IGNORED, "*.safetensors"]
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ignored}
    reason = unreachable()
    try:
        # Safe for several ranks at once: the hub's cache locks every file.
        return Path(snapshot_download(source, **options, local_files_only=reason is not None))
    except Exception as error:  # of the hub, of httpx, of the disk: many types, one remedy
        at = f" at revision '{revision}'" if revision else ""
        raise ProblemError(
            f"{who} model",
            f"there is no folder '{source}', and the hub does not give '{source}'{at} ({reason or first_line(error)})",
            "a model's folder or a reachable hub id",
            f"check the spelling of {key}; for a gated model accept its licence and log in with "
            "'hf auth login'; without a network download it elsewhere and give the folder.",
        ) from error


def read_json(who: str, path: Path) -> dict[str, Any]:
    """Return a JSON object from a file in a model's folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except FileNotFoundError as error:
        raise ProblemError(
            f"{who} {path.name}",
            f"there is no {path}",
            "the file that every saved model has",
            f"set pair.{who} to the folder into which the model was saved, or finish its download.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ProblemError(
            f"{who} {path.name}",
            f"{path} is not readable JSON ({error})",
            "a JSON object",
            "repair the file, or download the model again.",
        ) from error


def load_config(who: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Return the config in a folder, loaded by transformers."""
    from transformers import AutoConfig

    read_json(who, folder / "config.json")  # transformers' own error for a broken file does not say which
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ProblemError(
            f"{who} config.json",
            f"transformers cannot load {folder / 'config.json'} ({first_line(error)})",
            "a model type that this transformers knows",
            "upgrade transformers; if the model brings its own code and you trust its author, set "
            "pair.trust_remote_code=true.",
        ) from error


def is_tied(config: PretrainedConfig, reader: TensorReader | None = None) -> bool:
    """Return whether transformers ties the output head to the embedding when it loads a folder with these weights.

    It does so if the config says it, unless the files hold a head with other values than the embedding's.
    """
    said = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    return said and (reader is None or repeats_embedding(reader) is not False)


def _load_tokenizer(who: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, loaded by transformers."""
    from transformers import AutoTokenizer

    try:
        # Without any file, transformers silently makes an empty tokenizer of the config's model type.
        if not any(_TOKENIZER_FILE.search(path.name) for path in folder.iterdir()):
            raise FileNotFoundError("no file with a vocabulary")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not tokenizer.chat_template and (folder / _PROCESSOR_TEMPLATE).is_file():  # LLaVA and others
            tokenizer.chat_template = read_json(who, folder / _PROCESSOR_TEMPLATE).get("chat_template")
        return tokenizer
    except Exception as error:
        raise ProblemError(
            f"{who} tokenizer",
            f"transformers cannot load the tokenizer in {folder} ({first_line(error)})",
            "tokenizer.json and tokenizer_config.json next to the weights",
            "copy the model's tokenizer files into the folder, or download it again.",
        ) from error


def is_image_text(config: PretrainedConfig) -> bool:
    """Return whether a config belongs to a model that reads images and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return config.model_type in NAMES and getattr(config, "vision_config", None) is not None


def _load_processor(
    who: str, folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> ProcessorMixin:
    """The processor in a vision-language model's folder, loaded by transformers."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    if not is_image_text(config):
        raise ProblemError(
            f"{who} processor",
            f"'{config.model_type}' is a text model",
            "a vision-language model, such as qwen2_5_vl, gemma3 or llava",
            "remove the images from the data, or give a pair that can see them.",
        )
    try:
        if is_torchvision_available():
            processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        else:
            processor = _processor_of_images(folder, config, trust_remote_code)
        if not hasattr(processor, "image_processor"):
            raise TypeError(f"it is a {type(processor).__name__}, without an image processor")
    except Exception as error:
        raise ProblemError(
            f"{who} processor",
            f"transformers cannot load the processor in {folder} ({first_line(error)})",
            "preprocessor_config.json or processor_config.json next to the tokenizer's files",
            "copy the model's processor files into the folder, or download it again; images also need the package "
            "pillow, and some models torchvision (pip install 'shadowlit[vision]').",
        ) from error
    processor.tokenizer.chat_template = tokenizer.chat_template
    return processor


def _processor_of_images(folder: Path, config: PretrainedConfig, trust_remote_code: bool) -> ProcessorMixin:
    """The processor without its video part, which needs torchvision, whereas images need only Pillow."""
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)

    class ImagesOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            from transformers import AutoImageProcessor, AutoTokenizer

            given = {"trust_remote_code": trust_remote_code}
            loaders: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
            return [
                loaders[name].from_pretrained(folder, **given) if name in loaders else None
                for name in kind.get_attributes()
            ]

    ImagesOnly.__name__ = kind.__name__
    processor: ProcessorMixin = ImagesOnly.from_pretrained(folder)
    return processor


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in the hub's cache, where folders are named after it; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None
