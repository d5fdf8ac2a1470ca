"""From sources to tokens: read, tokenise, and cache the sets of a data module."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from shadowlit.data.blocks import Block, read_blocks, write_blocks
from shadowlit.data.cache import cache_key, default_folder
from shadowlit.data.conversation import Conversation
from shadowlit.data.custom_formats import find_format
from shadowlit.data.dataset import DataReport, PromptDataset, TokenDataset, tokenise, tokenise_prompts
from shadowlit.data.document import encode_document
from shadowlit.data.formats import DOCUMENT, Message
from shadowlit.data.images import ImageProcessing
from shadowlit.data.sampler import epoch_order
from shadowlit.data.settings import DataSettings
from shadowlit.data.sources import digest_source, folder_of, read_conversations, say
from shadowlit.data.template import Encoded, check_template, encode_question, encode_turns, load_template, renders_date
from shadowlit.errors import DataError, PairError


class Preparation:
    """Reads, tokenises and caches sets as the settings say.

    Args:
        settings: Settings of the data.
    """

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The Instruct's tokenizer, with ``chat_template`` instead of its own where that is set.

        Raises:
            DataError: It has no usable chat template, or ``template_kwargs`` don't fit the template.
        """
        tokenizer = self._settings.pair.tokenizer()
        if self._settings.chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)  # the pair's own is exported
            tokenizer.chat_template = load_template(self._settings.chat_template)
        check_template(tokenizer, self._template_kwargs)
        if renders_date(tokenizer, self._template_kwargs):
            rank_zero_warn(
                "data: the chat template writes today's date, so another day trains on other tokens. Set "
                "data.template_kwargs to {date_string: '26 Jul 2024'} or the like."
            )
        return tokenizer

    @cached_property
    def images(self) -> ImageProcessing | None:
        """The processor of a pair of vision-language models; None for text models.

        Raises:
            PairError: The processor can't be loaded.
        """
        try:
            has_images = getattr(self._settings.pair, "has_images", False)
        except PairError:  # a broken config, which the check of the pair reports
            has_images = False
        return ImageProcessing(self._settings.pair) if has_images else None

    @property
    def pad_token_id(self) -> int:
        """Token that fills batches up, which attention and loss skip: the padding token, or the end of sequence."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return pad if isinstance(pad, int) else 0

    def samples(self, name: str, sources: list[str], use: str) -> tuple[TokenDataset, DataReport]:
        """Return the samples of a set from the cache, after they have been put there if necessary.

        Args:
            name: ``train``, ``val/<set>`` or ``test/<set>``.
            sources: Sources that are concatenated.
            use: As in :func:`read_conversations`.

        Raises:
            DataError: A source can't be read, rows are malformed, or no sample is left.
        """
        file = self._cache_file(name, sources, use)
        if file is None:
            return self._tokenise(name, self._read(name, sources, use, say))
        known = self._from_cache(name, file)
        return known if known is not None else self._to_cache(name, sources, use, file)

    def prompts(self, source: str) -> tuple[PromptDataset, DataReport]:
        """Return the tokenised prompts of a source.

        Raises:
            DataError: The source can't be read, or prompts are malformed or too long.
        """
        return tokenise_prompts(
            "predict",
            read_conversations(source, self._settings.format, use="test", prompts_only=True),
            self._encoder(encode_question),
            max_length=self._settings.max_length,
            filler_token=self.pad_token_id,
        )

    def tokenise(
        self, name: str, conversations: Iterable[Conversation], keep: Callable[[Block], None] | None = None
    ) -> tuple[TokenDataset, DataReport]:
        """Tokenise conversations; arguments and errors as in :func:`shadowlit.data.dataset.tokenise`."""
        return tokenise(
            name,
            conversations,
            self._encoder(encode_turns),
            max_length=self._settings.max_length,
            filler_token=self.pad_token_id,
            overlong=self._settings.overlong,
            drop_unsupervised=self._settings.drop_unsupervised,
            keep=keep,
        )

    def _tokenise(
        self, name: str, conversations: list[Conversation], keep: Callable[[Block], None] | None = None
    ) -> tuple[TokenDataset, DataReport]:
        dataset, report = self.tokenise(name, conversations, keep)
        if not report.num_samples:
            raise DataError(
                f"{name} has no sample left: all {report.num_rows} rows were dropped. Raise data.max_length, or give "
                "data with an answer to learn."
            )
        return dataset, report

    def _to_cache(self, name: str, sources: list[str], use: str, file: Path) -> tuple[TokenDataset, DataReport]:
        messages: list[tuple[str, bool]] = []

        def tell(text: str, is_warning: bool) -> None:
            messages.append((text, is_warning))
            say(text, is_warning)

        conversations = self._read(name, sources, use, tell)
        try:
            with write_blocks(file) as written:
                _, report = self._tokenise(name, conversations, written.add)
                end = self._end_of_text if any(c.messages[0]["role"] == DOCUMENT for c in conversations) else None
                origins = list(dict.fromkeys(c.source for c in conversations))
                written.finish({"report": dataclasses.asdict(report), "sources": origins, "said": messages, "end": end})
            blocks, _ = read_blocks(file, verify=False)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            rank_zero_warn(
                f"data: {name} can't be kept in {file.parent} ({error}), and is tokenised at every start. Set "
                "data.cache_dir to a folder that can be written to, or data.cache=false."
            )
            return self._tokenise(name, conversations)
        return TokenDataset(blocks, origins, self.pad_token_id, file), report

    def _from_cache(self, name: str, file: Path) -> tuple[TokenDataset, DataReport] | None:
        """The samples that an earlier start tokenised, if the file is intact."""
        if not file.exists():
            return None
        try:
            blocks, about = read_blocks(file)
            report = dataclasses.replace(DataReport(**about["report"]), name=name)
            sources, messages, end = about["sources"], about["said"], about["end"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"data: {name} is tokenised again, since what was kept is damaged: {error}.")
            return None
        if end is not None and end != self._end_of_text:
            return None
        for text, is_warning in messages:
            say(text, is_warning)
        return TokenDataset(blocks, sources, self.pad_token_id, file), report

    def _cache_file(self, name: str, sources: list[str], use: str) -> Path | None:
        """The file of a set; None where it isn't cached, or its sources or its format have no digest."""
        settings = self._settings
        if not settings.cache:
            return None
        custom = find_format(settings.format)
        digests = [digest_source(source, use) for source in sources]
        if None in digests or (custom is not None and custom.digest() is None):
            return None
        limit = settings.limit_train_samples
        key = cache_key(
            self.tokenizer,
            sources=[*zip(sources, digests, strict=True)],
            format=settings.format if custom is None else [settings.format, custom.digest()],
            samples=settings.samples,
            max_length=settings.max_length,
            overlong=settings.overlong,
            drop_unsupervised=settings.drop_unsupervised,
            choice=[limit, settings.seed] if name == "train" and limit else None,
            system=settings.system,
            template_kwargs=self._template_kwargs,
            date=datetime.date.today().isoformat() if renders_date(self.tokenizer, self._template_kwargs) else None,
            **self._image_settings(sources),
        )
        folder = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_folder()
        return folder / f"{key}.arrow"

    def _image_settings(self, sources: list[str]) -> dict[str, Any]:
        """What the tokens of images depend on, and the folders to which their paths are relative."""
        if self.images is None:
            return {}
        return {"images": self.images.digest(), "folders": [str(folder_of(source)) for source in sources]}

    def _read(self, name: str, sources: list[str], use: str, tell: Callable[[str, bool], None]) -> list[Conversation]:
        settings = self._settings
        conversations = [
            conversation
            for source in sources
            for conversation in read_conversations(
                source, settings.format, use=use, samples=settings.samples, tell=tell
            )
        ]
        limit = settings.limit_train_samples
        if name != "train" or limit is None:
            return conversations
        if limit > len(conversations):
            tell(f"data: limit_train_samples={limit}, but there are {len(conversations)} rows; all are used.", True)
        chosen = epoch_order(len(conversations), settings.seed)[:limit]
        return [conversations[i] for i in sorted(chosen)]

    def _encoder(self, encode: Callable[..., Any]) -> Callable[[list[Message]], Any]:
        return partial(
            _encode, encode, self._encode_document, self.tokenizer, self.images, self._settings.system,
            self._template_kwargs,
        )  # fmt: skip

    @property
    def _template_kwargs(self) -> dict[str, Any]:
        return self._settings.template_kwargs or {}

    def _encode_document(self, text: str) -> list[Encoded]:
        return encode_document(self.tokenizer, text, self._end_of_text, self._settings.max_length)

    @property
    def _end_of_text(self) -> int | None:
        """The token that ends a document in the Base's pre-training."""
        end = self._settings.pair.other_tokenizer().eos_token_id
        return end if isinstance(end, int) else None


def _encode(
    encode: Callable[..., Any],
    document: Callable[[str], Any],
    tokenizer: PreTrainedTokenizerBase,
    images: ImageProcessing | None,
    system: str | None,
    template_kwargs: dict[str, Any],
    messages: list[Message],
) -> Any:
    if messages[0]["role"] == DOCUMENT:
        return document(messages[0]["content"])
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return encode(tokenizer, messages, images, **template_kwargs)
