"""ModelPair: a Base and the Instruct that was made from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from shadowlit.arguments import takes_plain_values
from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.pair.folders import (
    _load_processor,
    _load_tokenizer,
    commit_of,
    is_image_text,
    is_tied,
    load_config,
    model_folder,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

Select = str | Sequence[str]
_T = TypeVar("_T")


def _once(method: Callable[[ModelPair], _T]) -> Callable[[ModelPair], _T]:
    """Call a method once per pair, and keep its result among the attributes of the pair, as ``_<name>``."""
    name = f"_{method.__name__}"

    @wraps(method)
    def kept(pair: ModelPair) -> _T:
        if name not in vars(pair):
            vars(pair)[name] = method(pair)
        return vars(pair)[name]

    return kept


@takes_plain_values("pair")
@dataclass(frozen=True)
class ModelPair:
    """A Base and the Instruct that was made from it.

    Nothing is read or downloaded before a method needs it. Each method that reads a folder raises a PairError if the
    folder is missing and the hub does not give it, or if the file that it reads is missing, broken or of an unknown
    type.

    Example::

        pair = ModelPair("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B")
        tokenizer = pair.instruct_tokenizer()

    Args:
        base: Folder or Hugging Face id of the Base, the model that is trained.
        instruct: Folder or Hugging Face id of the Instruct, the model that gets the update. Its tokenizer and
            chat template are used for both, unless ``template_owner`` says otherwise.
        base_revision: Commit, tag or branch of the Base on the hub; pin a commit to make runs repeatable.
        instruct_revision: Commit, tag or branch of the Instruct on the hub.
        trust_remote_code: Run Python code that comes with the model. Dangerous: only for authors you trust,
            and only with pinned revisions.
        template_owner: Model whose tokenizer, chat template and end of turn are used for both models. ``base`` where
            the Instruct has none that is fit to train with, and for a pair with its roles swapped: the Instruct is
            trained, and its update grafted onto the Base (arms I2I and I2B).
    """

    base: str
    instruct: str
    base_revision: str | None = None
    instruct_revision: str | None = None
    trust_remote_code: bool = False
    template_owner: Literal["instruct", "base"] = "instruct"

    _downloads_weights = True  # not a field

    @_once
    def base_folder(self) -> Path:
        """Return the local folder of the Base, downloaded first if ``base`` is a hub id."""
        return self._folder("base", self.base, self.base_revision)

    @_once
    def instruct_folder(self) -> Path:
        """Return the local folder of the Instruct, downloaded first if ``instruct`` is a hub id."""
        return self._folder("instruct", self.instruct, self.instruct_revision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that both models are used with, with its chat template: that of ``template_owner``."""
        return self.base_tokenizer() if self.template_owner == "base" else self.instruct_tokenizer()

    def other_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the model that doesn't own the template: a Base's ends documents as its pre-training
        did.
        """
        return self.instruct_tokenizer() if self.template_owner == "base" else self.base_tokenizer()

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> ModelPair:
        """Return the same pair, whose models are both used with ``tokenizer``, e.g. one with another chat template."""
        pair = copy(self)
        vars(pair)[f"_{self.template_owner}_tokenizer"] = tokenizer
        return pair

    def template_folder(self) -> Path:
        """Return the folder of ``template_owner``, whose generation config says where a turn ends."""
        return self.base_folder() if self.template_owner == "base" else self.instruct_folder()

    @_once
    def base_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the Base's own tokenizer."""
        return _load_tokenizer("base", self.base_folder(), self.trust_remote_code)

    @_once
    def instruct_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the Instruct's own tokenizer."""
        return _load_tokenizer("instruct", self.instruct_folder(), self.trust_remote_code)

    @_once
    def processor(self) -> ProcessorMixin:
        """Return the processor of a vision-language pair, with the tokenizer: that of ``template_owner``.

        Raises:
            PairError: The pair consists of text models, or its processor cannot be loaded.
        """
        owner, folder = self.template_owner, self.template_folder()
        return _load_processor(owner, folder, self._template_config(), self.tokenizer(), self.trust_remote_code)

    @property
    def has_images(self) -> bool:
        """Whether the pair consists of vision-language models, by the config of ``template_owner``."""
        return is_image_text(self._template_config())

    def config(self) -> PretrainedConfig:
        """Return the Instruct's config."""
        return load_config("instruct", self.instruct_folder(), self.trust_remote_code)

    def base_config(self) -> PretrainedConfig:
        """Return the Base's config."""
        return load_config("base", self.base_folder(), self.trust_remote_code)

    @_once
    def ties(self) -> tuple[bool, bool]:
        """Return whether embedding and output head are tied in the Base and in the Instruct; see :func:`is_tied`."""
        with CheckpointReader(self.base_folder()) as base, CheckpointReader(self.instruct_folder()) as instruct:
            return is_tied(self.base_config(), base), is_tied(self.config(), instruct)

    def readers(self) -> tuple[AlignedReader, CheckpointReader]:
        """Readers of the Base, in the shape of its Instruct, and of the Instruct; both know whether they are tied."""
        base, instruct = self.base_folder(), self.instruct_folder()
        readers = AlignedReader.open(base, instruct), CheckpointReader(instruct)
        readers[0].tied, readers[1].tied = self.ties()
        return readers

    def fingerprints(self) -> dict[str, str]:
        """``{"base": ..., "instruct": ...}``: see :meth:`CheckpointReader.fingerprint`.

        Raises:
            PairError: A folder is missing.
            CheckpointError: A folder holds no readable safetensors.
        """
        return {"base": _fingerprint(self.base_folder()), "instruct": _fingerprint(self.instruct_folder())}

    def revisions(self) -> dict[str, str | None]:
        """Return the commit that each model was read at: the hub's, or None for a plain folder."""
        return {"base": commit_of(self.base_folder()), "instruct": commit_of(self.instruct_folder())}

    def _folder(self, who: str, source: str, revision: str | None) -> Path:
        return model_folder(who, source, revision, self.trust_remote_code, self._downloads_weights, f"pair.{who}")

    def _template_config(self) -> PretrainedConfig:
        return self.base_config() if self.template_owner == "base" else self.config()


class PairWithoutWeights(ModelPair):
    """A pair into whose folders no weights are downloaded; its fingerprints may be out of reach."""

    _downloads_weights = False


def _fingerprint(folder: Path) -> str:
    with CheckpointReader(folder) as reader:
        return reader.fingerprint()
