"""From sources to tokens: read, tokenise, and cache the sets of a data module."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from shadowlit.data.blocks import Block, read_blocks, write_blocks
from shadowlit.data.cache import cache_key, default_folder
from shadowlit.data.contexts import with_context
from shadowlit.data.conversation import Conversation, some_of
from shadowlit.data.custom_formats import find_format
from shadowlit.data.dataset import DataReport, PromptDataset, TokenDataset
from shadowlit.data.formats import DOCUMENT
from shadowlit.data.given import Source
from shadowlit.data.images import ImageProcessing
from shadowlit.data.rendering import check_template, load_template, renders_date
from shadowlit.data.sampler import epoch_order
from shadowlit.data.settings import DataSettings
from shadowlit.data.sources import digest_source, folder_of, log_message, read_conversations
from shadowlit.data.template import encode_document, encode_question, encode_turns
from shadowlit.data.tokenise import Skipped, tokenise, tokenise_prompts
from shadowlit.errors import DataError, PairError, counted
from shadowlit.progress import progress_bar


@dataclass(frozen=True)
class _Read:
    """The rows of a set, the names of its sources, and the rows that are left out; None where these are errors."""

    conversations: list[Conversation]
    sources: list[str]
    skipped: list[Skipped] | None


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

    def samples(
        self, name: str, sources: list[Source], use: str, *, num_processes: int = 1
    ) -> tuple[TokenDataset, DataReport]:
        """Return the samples of a set from the cache; if they aren't there yet, tokenise and cache them.

        Args:
            name: Name of the set.
            sources: Sources of the set.
            use: ``train``, ``validation`` or ``test``.
            num_processes: Number of processes that may tokenise.
        """
        file = self._cache_file(name, sources, use)
        if file is None:
            return self._tokenise(name, self._read(name, sources, use, log_message), num_processes)
        return self._from_cache(name, file) or self._to_cache(name, sources, use, file, num_processes)

    def prompts(self, source: Source) -> tuple[PromptDataset, DataReport]:
        """Return the tokenised prompts of a source."""
        read = self._read("predict", [source], "test", log_message)
        prompts, report = tokenise_prompts(
            "predict",
            read.conversations,
            self._encoder(encode_question),
            max_length=self.settings.max_length,
            filler_token=self.pad_token_id,
            skipped=read.skipped,
        )
        return prompts, _require_samples(report)

    def tokenise(
        self, name: str, conversations: Sequence[Conversation], **options: Any
    ) -> tuple[TokenDataset, DataReport]:
        """Tokenise conversations; options and errors are as in :func:`shadowlit.data.tokenise.tokenise`."""
        return tokenise(
            name,
            conversations,
            self._encoder(partial(encode_turns, loss_on=self.settings.loss_on)),
            max_length=self.settings.max_length,
            filler_token=self.pad_token_id,
            overlong=self.settings.overlong,
            drop_unsupervised=self.settings.drop_unsupervised,
            **options,
        )

    def _tokenise(
        self, name: str, read: _Read, num_processes: int, keep: Callable[[Block], None] | None = None
    ) -> tuple[TokenDataset, DataReport]:
        count = len(read.conversations)
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        with progress_bar(f"tokenising {name}", count) if is_first else nullcontext(_ignore) as advance:
            dataset, report = self.tokenise(
                name,
                read.conversations,
                sources=read.sources,
                skipped=read.skipped,
                num_processes=num_processes,
                advance=advance,
                keep=keep,
            )
        return dataset, _require_samples(report)

    def _to_cache(
        self, name: str, sources: list[Source], use: str, file: Path, num_processes: int
    ) -> tuple[TokenDataset, DataReport]:
        messages: list[tuple[str, bool]] = []

        def log(text: str, is_warning: bool) -> None:
            messages.append((text, is_warning))
            log_message(text, is_warning)

        read = self._read(name, sources, use, log)
        num_skipped = len(read.skipped or ())
        try:
            with write_blocks(file) as written:
                _, report = self._tokenise(name, read, num_processes, written.add)
                is_text = any(c.messages[0]["role"] == DOCUMENT for c in read.conversations)
                end = self._end_of_text if is_text else None
                about = {
                    "report": dataclasses.asdict(report), "sources": read.sources, "messages": messages, "end": end
                }  # fmt: skip
                written.finish(about)
            blocks, _ = read_blocks(file, verify=False)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            rank_zero_warn(
                f"data: {name} can't be kept in {file.parent} ({error}), and is tokenised at every start. Set "
                "data.cache_dir to a folder that can be written to, or data.cache=false."
            )
            if read.skipped is not None:
                del read.skipped[num_skipped:]
            return self._tokenise(name, read, num_processes)
        return TokenDataset(blocks, read.sources, self.pad_token_id, file), report

    def _from_cache(self, name: str, file: Path) -> tuple[TokenDataset, DataReport] | None:
        """The samples that an earlier start tokenised, if the file is intact."""
        if not file.exists():
            return None
        try:
            blocks, about = read_blocks(file)
            report = DataReport.of_dict({**about["report"], "name": name})
            sources, messages, end = about["sources"], about["messages"], about["end"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"data: {name} is tokenised again, since what was kept is damaged: {error}.")
            return None
        if end is not None and end != self._end_of_text:
            return None
        for text, is_warning in messages:
            log_message(text, is_warning)
        return TokenDataset(blocks, sources, self.pad_token_id, file), report

    def _cache_file(self, name: str, sources: list[Source], use: str) -> Path | None:
        """The file of a set; None if it isn't cached, or if a source or its format has no digest."""
        settings = self.settings
        if not settings.cache:
            return None
        digests = []
        for source in sources:
            custom = find_format(source.format or "auto")
            digests.append((digest_source(source.path, use), "" if custom is None else custom.digest()))
        if any(None in both for both in digests):
            return None
        limit = settings.limit_train_samples
        key = cache_key(
            self.tokenizer,
            # The tokens don't depend on how sources are mixed.
            sources=[[vars(replace(one, weight=None)), *both] for one, both in zip(sources, digests, strict=True)],
            on_bad_row=settings.on_bad_row,
            samples=[settings.samples, settings.samples == "contexts" and use],  # which training data alone have
            max_length=settings.max_length,
            overlong=settings.overlong,
            drop_unsupervised=settings.drop_unsupervised,
            choice=[limit, settings.seed] if name == "train" and limit else None,
            system=settings.system,
            loss_on=settings.loss_on,
            template_kwargs=self._template_kwargs,
            date=datetime.date.today().isoformat() if renders_date(self.tokenizer, self._template_kwargs) else None,
            # Paths of images are relative to the folders.
            images=None if self.images is None else [self.images.digest(), *(str(folder_of(s.path)) for s in sources)],
        )
        folder = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_folder()
        return folder / f"{key}.arrow"

    def _read(self, name: str, sources: list[Source], use: str, log: Callable[[str, bool], None]) -> _Read:
        settings = self.settings
        skipped: list[Skipped] | None = [] if settings.on_bad_row == "skip" else None
        conversations: list[Conversation] = []
        for index, source in enumerate(sources):
            wrong: list[str] = []
            found = read_conversations(
                source.path,
                source.format or "auto",
                use=use,
                prompts_only=name == "predict",
                samples=settings.samples,
                columns=source.columns,
                ignore=source.ignore_columns or (),
                max_rows=source.max_rows,
                skip=None if skipped is None else wrong.append,
                log=log,
            )
            conversations += [replace(one, source_index=index) for one in found] if index else found
            if skipped is not None:
                skipped += [(index, message) for message in wrong]
        limit = settings.limit_train_samples
        if name == "train" and limit is not None:
            if limit > len(conversations):
                log(
                    f"data: limit_train_samples={limit}, but the set has only {counted(len(conversations), 'row')}; "
                    "all are used.",
                    True,
                )
            chosen = epoch_order(len(conversations), settings.seed)[:limit]
            conversations = [conversations[i] for i in sorted(chosen)]
        return _Read(conversations, [source.path for source in sources], skipped)

    def _encoder(self, encode: Callable[..., Any]) -> Callable[[Conversation], Any]:
        """A function that tokenises a conversation by ``encode``, or a document."""
        system, max_length = self.settings.system, self.settings.max_length
        tokenizer, images, template_kwargs = self.tokenizer, self.images, self._template_kwargs

        def encode_row(conversation: Conversation) -> Any:
            messages = conversation.messages
            if messages[0]["role"] == DOCUMENT and conversation.context is not None:
                raise DataError("is plain text, before which a teacher's context has no place. Give conversations.")
            if messages[0]["role"] == DOCUMENT:
                return encode_document(tokenizer, messages[0]["content"], self._end_of_text, max_length)
            if system and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": system}, *messages]
            if conversation.context is not None:
                messages = with_context(messages, conversation.context)
            return encode(tokenizer, messages, images, **{"tools": conversation.tools, **template_kwargs})

        return encode_row

    @property
    def _end_of_text(self) -> int | None:
        """The token that ends a document in the Base's pre-training."""
        end = self.settings.pair.other_tokenizer().eos_token_id
        return end if isinstance(end, int) else None


def _require_samples(report: DataReport) -> DataReport:
    """Return the report of a set; raise if no sample of the set is left."""
    if not report.num_samples:
        remedy = "Raise data.max_length, or give data with an answer to learn."
        if report.skipped:
            remedy = f"Rows left out by data.on_bad_row=skip: {len(report.skipped):,}:{some_of(report.skipped)}"
        raise DataError(f"{report.name} has no sample left of {counted(report.num_rows, 'row')}. {remedy}")
    return report


def _ignore(count: int) -> None:
    """Instead of a progress bar."""
