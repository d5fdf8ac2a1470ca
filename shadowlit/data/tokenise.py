"""From conversations to a tokenised data set: by all cores, truncated or dropped as asked, and counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from shadowlit.checkpoint.workers import by_processes
from shadowlit.data.blocks import Block, BlockBuilder, joined, require_storable
from shadowlit.data.contexts import both_views
from shadowlit.data.conversation import IGNORE_INDEX, Conversation, FatalDataError, collect, located, raise_all
from shadowlit.data.dataset import DataReport, PromptDataset, TokenDataset
from shadowlit.data.template import Encoded
from shadowlit.errors import DataError

Overlong = Literal["error", "truncate", "drop"]

Skipped = tuple[int, str]
"""A row that is left out: the number of its source, and what is wrong with it."""

_CHUNK = 100  # rows that one process tokenises at a time
_WORTH_FORKING = 2_000  # rows; fewer are done before processes have started


@dataclass(frozen=True)
class _Part:
    """What became of some consecutive rows."""

    blocks: list[Block]
    reports: dict[int, DataReport]  # by the number of the source
    wrong: list[Skipped]


@dataclass(frozen=True)
class _Tokeniser:
    """How rows become samples; the attributes are arguments of :func:`tokenise`."""

    encode: Callable[[Conversation], list[Encoded]]
    max_length: int
    overlong: Overlong
    drop_unsupervised: bool

    def tokenise(self, conversations: Sequence[Conversation]) -> _Part:
        """The samples of some rows, a report for each source, and the rows that are wrong."""
        builder, part = BlockBuilder(), _Part([], {}, [])
        for conversation in conversations:
            report = part.reports.setdefault(conversation.source_index, DataReport(conversation.source))
            report.num_rows += 1
            try:
                with located(conversation):
                    groups = self._groups(conversation)
            except FatalDataError:
                raise
            except DataError as error:
                part.wrong.append((conversation.source_index, str(error)))
                continue
            report.num_split += len(groups) > 1
            for group, fitted in groups:
                self._add(report, builder, conversation, group, fitted)
            if builder.is_full:
                part.blocks.append(builder.take())
        part.blocks.append(builder.take())
        return part

    def _groups(self, conversation: Conversation) -> list[tuple[list[Encoded], list[Encoded] | None]]:
        """The sequences of each sample of a row, and what is kept of them."""
        student = replace(conversation, context=None)
        samples = self.encode(student) or [Encoded([], [])]  # none where no turn is supervised
        groups = [[sample] for sample in samples]
        if conversation.context is not None:
            longest = self.max_length if self.overlong == "truncate" else None
            groups = both_views(samples, self.encode(conversation) or [Encoded([], [])], longest)
        if conversation.other is not None:
            groups = [_both(samples, self.encode(replace(conversation, messages=conversation.other)))]
        is_labelled = conversation.desirable is not None
        fit = partial(_fit_all, max_length=self.max_length, overlong=self.overlong, labelled=is_labelled)
        found = [(group, fit(group, drop_unsupervised=self.drop_unsupervised)) for group in groups]
        for _, fitted in found:
            for sample in fitted or ():
                require_storable(sample)
        return found

    def _add(
        self,
        report: DataReport,
        builder: BlockBuilder,
        conversation: Conversation,
        group: list[Encoded],
        fitted: list[Encoded] | None,
    ) -> None:
        if fitted is None:
            report.num_dropped += 1
            return
        report.num_truncated += any(len(a.input_ids) < len(b.input_ids) for a, b in zip(fitted, group, strict=True))
        report.num_samples += 1
        for sample in fitted:
            builder.add(sample, conversation)
        # Of two views of the same tokens, the longer one.
        for sample in fitted if conversation.context is None else [max(fitted, key=lambda one: len(one.input_ids))]:
            report.num_tokens += len(sample.input_ids)
            report.num_supervised_tokens += _num_supervised(sample)
            report.longest = max(report.longest, len(sample.input_ids))


def tokenise(
    name: str,
    conversations: Sequence[Conversation],
    encode: Callable[[Conversation], list[Encoded]],
    *,
    max_length: int,
    filler_token: int,
    overlong: Overlong = "truncate",
    drop_unsupervised: bool = False,
    sources: Sequence[str] = (),
    skipped: list[Skipped] | None = None,
    num_processes: int = 1,
    advance: Callable[[int], None] = lambda count: None,
    keep: Callable[[Block], None] | None = None,
) -> tuple[TokenDataset, DataReport]:
    """Tokenise conversations, truncate or drop samples that are too long, and count.

    Args:
        name: Name of the set.
        conversations: Conversations that were read.
        encode: Function that turns a conversation into samples.
        max_length: Maximum length of a sample, in tokens.
        filler_token: See :class:`TokenDataset`.
        overlong: Treatment of longer samples: an error, truncation, or dropping.
        drop_unsupervised: Drop samples without a supervised token instead of raising.
        sources: Names of the sources, by their numbers in the conversations; empty to take them from there.
        skipped: Rows that were left out when the sources were read, to which those are added that can't be tokenised.
            None raises them.
        num_processes: Number of processes that share the work, if there is enough of it; the result is the same.
        advance: Function that receives the number of rows that were tokenised since its last call.
        keep: Function that receives blocks of samples as they fill up, so that memory needn't hold all of them; the
            returned data set is then empty. None keeps them in memory.

    Raises:
        DataError: Samples are refused by the template, too long, or without a supervised token; up to five are listed.
    """
    names = {**dict(enumerate(sources)), **{c.source_index: c.source for c in conversations}}
    reports = {index: DataReport(names[index]) for index in sorted(names)}
    wrong: list[Skipped] = []
    chunks = [conversations[start : start + _CHUNK] for start in range(0, len(conversations), _CHUNK)]
    if len(conversations) < _WORTH_FORKING:
        num_processes = 1

    def parts() -> Generator[Block, None, None]:
        work = _Tokeniser(encode, max_length, overlong, drop_unsupervised).tokenise
        with _no_tokenizer_threads(num_processes > 1), closing(by_processes(work, chunks, num_processes)) as done:
            for chunk, part in zip(chunks, done, strict=True):
                for index, report in part.reports.items():
                    reports[index].add(report)
                wrong.extend(part.wrong)
                advance(len(chunk))
                yield from part.blocks

    blocks: list[Block] = []
    with closing(parts()) as small:
        for block in joined(small):
            (keep or blocks.append)(block)
    if skipped is None:
        raise_all([message for _, message in wrong])
    else:
        for index, _ in skipped:
            reports[index].num_rows += 1
        skipped += wrong
        for index, message in skipped:
            reports[index].skipped.append(message)
    whole = DataReport(name)
    for report in reports.values():
        whole.add(report)
    whole.sources = list(reports.values()) if len(reports) > 1 else []
    return TokenDataset(blocks, [report.name for report in reports.values()], filler_token), whole


@contextmanager
def _no_tokenizer_threads(forking: bool) -> Iterator[None]:
    """While processes are forked, the threads of tokenizers, of which they have no copy, are switched off."""
    name = "TOKENIZERS_PARALLELISM"  # read by each process as it begins, which warns if it isn't set
    before = os.environ.get(name)
    if forking:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if forking:
            os.environ.pop(name)
            os.environ |= {} if before is None else {name: before}


def tokenise_prompts(
    name: str,
    conversations: Iterable[Conversation],
    encode: Callable[[Conversation], Encoded],
    *,
    max_length: int,
    filler_token: int,
    skipped: list[Skipped] | None = None,
) -> tuple[PromptDataset, DataReport]:
    """Tokenise prompts; arguments as for :func:`tokenise`. They are never truncated, but refused if too long.

    Raises:
        DataError: Prompts are refused by the template or too long; up to five are listed.
    """

    def fitting(conversation: Conversation) -> tuple[Encoded, Conversation]:
        prompt = encode(conversation)
        if len(prompt.input_ids) > max_length:
            raise DataError(f"has a prompt of {len(prompt.input_ids)} tokens. Raise data.max_length={max_length}.")
        return prompt, conversation

    wrong = [message for _, message in skipped or ()]
    found = collect(fitting, conversations, None if skipped is None else wrong.append)
    prompts = [prompt for prompt, _ in found]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    report = DataReport(name, len(prompts) + len(wrong), len(prompts), num_tokens=sum(lengths), skipped=wrong)
    report.longest = max(lengths, default=0)
    return PromptDataset(prompts, [conversation for _, conversation in found], filler_token), report


def _num_supervised(sample: Encoded) -> int:
    return sum(label != IGNORE_INDEX for label in sample.labels)


def _both(first: list[Encoded], second: list[Encoded]) -> list[Encoded]:
    """The two sequences of a preference sample."""
    if any(sample.weights is not None for sample in (*first, *second)):
        raise DataError(
            "weighs its answer by 'weight', but an objective of preferences compares whole answers, and can't weigh "
            "their parts. Remove 'weight'; 0, which leaves a turn out of the answer, is possible."
        )
    if len(first) != 1 or len(second) != 1:
        raise DataError(
            "has an answer of several turns, and the chat template renders earlier turns differently once later ones "
            "follow, so that no single sequence holds it. Give answers of one turn, or set data.chat_template to a "
            "template with {% generation %} marks."
        )
    return [first[0], second[0]]


def _fit_all(
    group: list[Encoded], max_length: int, overlong: Overlong, drop_unsupervised: bool, labelled: bool
) -> list[Encoded] | None:
    """The sequences of a sample, truncated where needed, or None where the sample is dropped."""
    fitted = []
    for number, sample in enumerate(group):
        # The answer that KTO compares with isn't part of the user's row, and may always be truncated.
        one = _fit(sample, max_length, "truncate" if labelled and number else overlong, drop_unsupervised)
        if one is None:
            return None
        fitted.append(one)
    if len(fitted) > 1 and fitted[0] == fitted[1] and not labelled:
        if drop_unsupervised:
            return None
        raise DataError(
            f"has two answers that are the same tokens, cut to data.max_length={max_length}. Raise it, correct the "
            "row, or set data.drop_unsupervised=true."
        )
    return fitted


def _fit(sample: Encoded, max_length: int, overlong: Overlong, drop_unsupervised: bool) -> Encoded | None:
    """The sample, truncated where needed, or None where it is dropped."""
    length = len(sample.input_ids)
    fitted = sample
    if length > max_length:
        if overlong == "drop":
            return None
        if overlong == "error":
            raise DataError(
                f"has {length} tokens. Raise data.max_length={max_length}, or set data.overlong to truncate or drop."
            )
        if sample.images_end > max_length:  # part of an image can't be read
            raise DataError(
                f"has {len(sample.images)} images of {sample.num_image_tokens} tokens together, the last of which "
                f"ends at token {sample.images_end}, and {max_length} fit. Raise data.max_length={max_length}, give "
                "fewer or smaller images, or set data.overlong=drop."
            )
        fitted = replace(
            sample,
            input_ids=sample.input_ids[:max_length],
            labels=sample.labels[:max_length],
            weights=None if sample.weights is None else sample.weights[:max_length],
        )
    if _num_supervised(fitted):
        return fitted
    if drop_unsupervised:
        return None
    if not _num_supervised(sample):
        raise DataError(
            "has no supervised token: none of its assistant turns is to be trained on. Remove 'train'/'weight' from "
            "one, or set data.drop_unsupervised=true."
        )
    prompt = next(t for t, label in enumerate(sample.labels) if label != IGNORE_INDEX)
    raise DataError(
        f"has no supervised token after truncation to {max_length} tokens (its prompt has {prompt}). "
        "Raise data.max_length or set data.drop_unsupervised=true."
    )
