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
from shadowlit.data.formats import DOCUMENT
from shadowlit.data.images import ImageProcessing
from shadowlit.data.sampler import epoch_order
from shadowlit.data.settings import DataSettings
from shadowlit.data.sources import digest_source, folder_of, log_message, read_conversations
from shadowlit.data.template import (
    check_template,
    encode_document,
    encode_question,
    encode_turns,
    load_template,
    renders_date,
)
from shadowlit.errors import DataError, PairError


class Preparation:
    """Reads, tokenises and caches data sets as the settings require."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings, self._template_kwargs = settings, settings.template_kwargs or {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See :attr:`ShadowData.tokenizer`."""
        tokenizer = self.settings.pair.tokenizer()
        if self.settings.chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)  # the pair's own is exported
            tokenizer.chat_template = load_template(self.settings.chat_template)
        check_template(tokenizer, self._template_kwargs)
        if renders_date(tokenizer, self._template_kwargs):
            rank_zero_warn(
                "data: the chat template writes today's date, so the tokens differ from day to day. Set "
                "data.template_kwargs to {date_string: '26 Jul 2024'} or the like."
            )
        return tokenizer

    @cached_property
    def images(self) -> ImageProcessing | None:
        """The processor of a pair of vision-language models; None for text models."""
        try:
            has_images = getattr(self.settings.pair, "has_images", False)
        except PairError:  # a broken config, which the check of the pair reports
            has_images = False
        return ImageProcessing(self.settings.pair) if has_images else None

    @property
    def pad_token_id(self) -> int:
        """The padding token, or else the end of sequence; attention and loss ignore it."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return pad if isinstance(pad, int) else 0

    def samples(self, name: str, sources: list[str], use: str) -> tuple[TokenDataset, DataReport]:
        """Return the samples of a set from the cache; if they aren't there yet, tokenise and cache them."""
        file = self._cache_file(name, sources, use)
        if file is None:
            return self._tokenise(name, self._read(name, sources, use, log_message))
        return self._from_cache(name, file) or self._to_cache(name, sources, use, file)

    def prompts(self, source: str) -> tuple[PromptDataset, DataReport]:
        """Return the tokenised prompts of a source."""
        return tokenise_prompts(
            "predict",
            read_conversations(
                source,
                self.settings.format,
                columns=self.settings.columns,
                ignore=self.settings.ignore_columns or (),
                use="test",
                prompts_only=True,
            ),
            self._encoder(encode_question),
            max_length=self.settings.max_length,
            filler_token=self.pad_token_id,
        )

    def tokenise(
        self, name: str, conversations: Iterable[Conversation], keep: Callable[[Block], None] | None = None
    ) -> tuple[TokenDataset, DataReport]:
        """Tokenise conversations; arguments and errors as in :func:`shadowlit.data.dataset.tokenise`."""
        return tokenise(
            name,
            conversations,
            self._encoder(partial(encode_turns, loss_on=self.settings.loss_on)),
            max_length=self.settings.max_length,
            filler_token=self.pad_token_id,
            overlong=self.settings.overlong,
            drop_unsupervised=self.settings.drop_unsupervised,
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

        def log(text: str, is_warning: bool) -> None:
            messages.append((text, is_warning))
            log_message(text, is_warning)

        conversations = self._read(name, sources, use, log)
        try:
            with write_blocks(file) as written:
                _, report = self._tokenise(name, conversations, written.add)
                end = self._end_of_text if any(c.messages[0]["role"] == DOCUMENT for c in conversations) else None
                origins = list(dict.fromkeys(c.source for c in conversations))
                about = {"report": dataclasses.asdict(report), "sources": origins, "messages": messages, "end": end}
                written.finish(about)
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
            report = DataReport(**{**about["report"], "name": name})
            sources, messages, end = about["sources"], about["messages"], about["end"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"data: {name} is tokenised again, since what was kept is damaged: {error}.")
            return None
        if end is not None and end != self._end_of_text:
            return None
        for text, is_warning in messages:
            log_message(text, is_warning)
        return TokenDataset(blocks, sources, self.pad_token_id, file), report

    def _cache_file(self, name: str, sources: list[str], use: str) -> Path | None:
        """The file of a set; None if it isn't cached, or if a source or the format has no digest."""
        settings = self.settings
        if not settings.cache:
            return None
        custom = find_format(settings.format)
        code = "" if custom is None else custom.digest()
        digests = [digest_source(source, use) for source in sources]
        if None in (code, *digests):
            return None
        limit = settings.limit_train_samples
        key = cache_key(
            self.tokenizer,
            sources=[*zip(sources, digests, strict=True)],
            format=[settings.format, code],
            columns=[settings.columns, settings.ignore_columns],
            samples=settings.samples,
            max_length=settings.max_length,
            overlong=settings.overlong,
            drop_unsupervised=settings.drop_unsupervised,
            choice=[limit, settings.seed] if name == "train" and limit else None,
            system=settings.system,
            loss_on=settings.loss_on,
            template_kwargs=self._template_kwargs,
            date=datetime.date.today().isoformat() if renders_date(self.tokenizer, self._template_kwargs) else None,
            # Paths of images are relative to the folders.
            images=None if self.images is None else [self.images.digest(), *(str(folder_of(s)) for s in sources)],
        )
        folder = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_folder()
        return folder / f"{key}.arrow"

    def _read(self, name: str, sources: list[str], use: str, log: Callable[[str, bool], None]) -> list[Conversation]:
        settings = self.settings
        read = partial(
            read_conversations, format=settings.format, columns=settings.columns, ignore=settings.ignore_columns or (),
            use=use, samples=settings.samples, log=log,
        )  # fmt: skip
        conversations = [conversation for source in sources for conversation in read(source)]
        limit = settings.limit_train_samples
        if name != "train" or limit is None:
            return conversations
        if limit > len(conversations):
            log(f"data: limit_train_samples={limit}, but there are {len(conversations)} rows; all are used.", True)
        chosen = epoch_order(len(conversations), settings.seed)[:limit]
        return [conversations[i] for i in sorted(chosen)]

    def _encoder(self, encode: Callable[..., Any]) -> Callable[[Conversation], Any]:
        """A function that tokenises a conversation by ``encode``, or a document."""
        system, max_length = self.settings.system, self.settings.max_length
        tokenizer, images, template_kwargs = self.tokenizer, self.images, self._template_kwargs

        def encode_row(conversation: Conversation) -> Any:
            messages = conversation.messages
            if messages[0]["role"] == DOCUMENT:
                return encode_document(tokenizer, messages[0]["content"], self._end_of_text, max_length)
            if system and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": system}, *messages]
            return encode(tokenizer, messages, images, **{"tools": conversation.tools, **template_kwargs})

        return encode_row

    @property
    def _end_of_text(self) -> int | None:
        """The token that ends a document in the Base's pre-training."""
        end = self.settings.pair.other_tokenizer().eos_token_id
        return end if isinstance(end, int) else None
