"""Tokenised data sets: flat arrays of about five bytes per token, in memory or mapped from a file."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from shadowlit.checkpoint.workers import by_processes
from shadowlit.data.blocks import Block, BlockBuilder, joined, read_blocks, require_storable
from shadowlit.data.conversation import IGNORE_INDEX, Conversation, FatalDataError, collect, located, place, raise_all
from shadowlit.data.images import ImageSource
from shadowlit.data.packing import Pack
from shadowlit.data.sampler import FILLER, FILLER_ROW, Filler
from shadowlit.data.template import Encoded
from shadowlit.errors import DataError

Overlong = Literal["error", "truncate", "drop"]

Skipped = tuple[int, str]
"""A row that is left out: the number of its source, and what is wrong with it."""

_COUNTS = (
    "num_rows", "num_samples", "num_split", "num_truncated", "num_dropped", "num_tokens", "num_supervised_tokens",
    "skipped",
)  # fmt: skip
_CHUNK = 100  # rows that one process tokenises at a time
_WORTH_FORKING = 2_000  # rows; fewer are done before processes have started


@dataclass
class DataReport:
    """What a set contains, and what happened to the rows of its sources.

    Attributes:
        name: ``train``, ``val/<set>``, ``test/<set>`` or ``predict``.
        num_rows: Rows that were read.
        num_samples: Samples that are used; more than rows where rows were split.
        num_split: Rows in which each assistant turn became a sample of its own.
        num_truncated: Samples that are used truncated to ``max_length``.
        num_dropped: Samples that were left out: too long, or without a supervised token.
        skipped: What is wrong with each row that was left out by ``data.on_bad_row=skip``.
        num_tokens: Tokens of the used samples.
        num_supervised_tokens: Supervised tokens among them.
        longest: Tokens of the longest used sample.
        num_packs: Rows that the samples are packed into; 0 where every sample has a row of its own.
        num_slots: Positions that an epoch computes over all ranks, including padding; 0 before there are batches.
        drawn: Samples that are trained on in an epoch, where that isn't all of them since sources are mixed by weight;
            otherwise None.
        drawn_tokens: Tokens of the samples that are drawn in the first epoch, or None.
        sources: Reports of the sources, each named by its path, where there are several.
    """

    name: str
    num_rows: int = 0
    num_samples: int = 0
    num_split: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest: int = 0
    num_packs: int = 0
    num_slots: int = 0
    drawn: int | None = None
    drawn_tokens: int | None = None
    skipped: list[str] = field(default_factory=list)
    sources: list[DataReport] = field(default_factory=list)

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> DataReport:
        """The report of which ``dataclasses.asdict`` made ``values``."""
        return cls(**{**values, "sources": [cls.of_dict(each) for each in values["sources"]]})

    def add(self, other: DataReport) -> None:
        """Count what another report of rows counts."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)

    def __str__(self) -> str:
        """``train: 2,000 samples, 512,345 tokens, 31.0 % supervised, longest 4,096; 3 truncated, 1 dropped``."""
        line = (
            f"{self.name}: {self.num_samples:,} samples, {self.num_tokens:,} tokens, "
            f"{100 * self.supervised_share:.1f} % supervised, longest {self.longest:,}"
        )
        if self.drawn is not None:
            line += f"; {self.drawn:,} samples per epoch"
        return f"{line}; {self.lost}" if self.lost else line

    @property
    def samples_per_pack(self) -> float:
        """Samples that share a row on average, 1 without packing."""
        return self.samples_per_epoch / self.num_packs if self.num_packs else 1.0

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on."""
        return self.num_samples if self.drawn is None else self.drawn

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that an epoch trains on; of sources that are mixed, those of the first epoch."""
        return self.num_tokens if self.drawn_tokens is None else self.drawn_tokens

    @property
    def fill(self) -> float:
        """Share of the computed positions that hold tokens of samples, in (0, 1]; NaN before there are batches."""
        return self.tokens_per_epoch / self.num_slots if self.num_slots else math.nan

    @property
    def supervised_share(self) -> float:
        """Share of supervised tokens, 0 to 1."""
        return self.num_supervised_tokens / max(1, self.num_tokens)

    @property
    def lost(self) -> str:
        """What was changed or left out, e.g. ``3 truncated, 1 dropped``; empty if nothing was."""
        counts = (
            ("split", self.num_split), ("truncated", self.num_truncated), ("dropped", self.num_dropped),
            ("row skipped" if len(self.skipped) == 1 else "rows skipped", len(self.skipped)),
        )  # fmt: skip
        return ", ".join(f"{count:,} {what}" for what, count in counts if count)


class TokenDataset(Dataset):
    """Samples ``{"input_ids": list[int], "labels": list[int]}``; labels of unsupervised tokens are -100.

    A sample with images also has ``images``, which are not opened yet, and ``origin``, its place in the source. One
    whose supervised tokens don't all have weight 1 has ``loss_weights``, a list of floats.
    ``dataset[-1]`` is the last sample, ``dataset[(17, 4)]`` a list of the two samples of a pack, and
    ``dataset[FILLER]`` the filler: two unsupervised tokens.

    Args:
        blocks: Tokenised samples.
        sources: Names of the sources, by their numbers in the blocks.
        filler_token: Token that the filler consists of.
        file: File from which the blocks are mapped, so that a copy in another process maps it too.
    """

    def __init__(
        self, blocks: list[Block], sources: Sequence[str], filler_token: int, file: Path | None = None
    ) -> None:
        self._blocks = [block for block in blocks if len(block)]
        self._sources, self._filler_token, self._file = list(sources), filler_token, file
        self._firsts = np.cumsum([0, *map(len, self._blocks)]).tolist()

    def __len__(self) -> int:
        """Number of samples, fillers not counted."""
        return self._firsts[-1]

    def __getitem__(self, index: int | Pack | Filler) -> Any:
        """A sample, the samples of a pack, or the filler."""
        if isinstance(index, tuple):
            return [self[sample] for sample in index]
        if index is FILLER:
            return {"input_ids": [self._filler_token] * 2, "labels": [IGNORE_INDEX] * 2}
        block, i = self._find(index)
        span = slice(block.ends[i], block.ends[i + 1])
        tokens = block.tokens[span]
        supervised = block.supervised[span]
        labels = np.where(supervised, tokens, IGNORE_INDEX).tolist()
        sample: dict[str, Any] = {"input_ids": tokens.tolist(), "labels": labels}
        if block.weights is not None and (weights := block.weights[i].as_py()):
            sample["loss_weights"] = np.array([0.0, *weights])[supervised].tolist()
        if block.images is not None and (images := block.images[i].as_py()):
            sample |= {"images": [ImageSource.unpack(image) for image in images], "origin": self.origin(index)}
        return sample

    def __getstate__(self) -> dict[str, Any]:
        """Leave out blocks that can be mapped again: pickled, they would be copied into every worker."""
        return {**self.__dict__, "_blocks": None} if self._file is not None else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file again."""
        self.__dict__.update(state)
        if self._file is not None:
            self._blocks = [block for block in read_blocks(self._file, verify=False)[0] if len(block)]

    @property
    def has_images(self) -> bool:
        """Whether any sample has an image."""
        return any(block.images is not None for block in self._blocks)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, ``[len(self)]`` int64."""
        return np.concatenate(
            [np.zeros(0, np.int64), *(np.diff(block.ends).astype(np.int64) for block in self._blocks)]
        )

    @property
    def source_of(self) -> np.ndarray:
        """Number of the source of each sample, ``[len(self)]`` int64."""
        return np.concatenate([np.zeros(0, np.int64), *(block.source for block in self._blocks)])

    @property
    def desirable(self) -> np.ndarray:
        """Whether each sample belongs to an answer that isn't labelled as undesirable, ``[len(self)]`` bool."""
        return np.concatenate([np.zeros(0, np.bool_), *(block.desirable.astype(np.bool_) for block in self._blocks)])

    def origin(self, index: int) -> str:
        """``sample 17 of train.jsonl (line 18)``."""
        block, i = self._find(index)
        line = int(block.line[i])
        return place(self._sources[block.source[i]], int(block.row[i]), line if line > 0 else None)

    def hashes(self) -> np.ndarray:
        """Hashes of the samples' tokens and images, ``[len(self)]`` uint64, to find identical samples."""
        return np.concatenate([np.zeros(0, np.uint64), *(block.digest for block in self._blocks)])

    def _find(self, index: int) -> tuple[Block, int]:
        """The block of a sample, and the sample's number in it."""
        sample = range(len(self))[index]
        number = bisect_right(self._firsts, sample) - 1
        return self._blocks[number], sample - self._firsts[number]


class PromptDataset(Dataset):
    """Prompts ``{"input_ids": list[int], "index": int}``, where ``index`` is the row, or -1 for the filler."""

    def __init__(self, prompts: list[Encoded], origins: list[Conversation], filler_token: int) -> None:
        self._prompts, self._origins, self._filler_token = prompts, origins, filler_token

    def __len__(self) -> int:
        """Number of prompts, fillers not counted."""
        return len(self._prompts)

    def __getitem__(self, index: int | Filler) -> dict[str, Any]:
        """Prompt ``index``, or the filler."""
        if index is FILLER:
            return {"input_ids": [self._filler_token] * 2, "index": FILLER_ROW}
        prompt, origin = self._prompts[index], self._origins[index]
        sample: dict[str, Any] = {"input_ids": prompt.input_ids, "index": origin.row}
        return {**sample, "images": prompt.images, "origin": str(origin)} if prompt.images else sample

    @property
    def has_images(self) -> bool:
        """Whether any prompt has an image."""
        return any(prompt.images for prompt in self._prompts)

    def origin(self, index: int) -> str:
        """``sample 17 of prompts.jsonl (line 18)``."""
        return str(self._origins[index])


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
        samples = self.encode(conversation) or [Encoded([], [])]  # none where no turn is supervised
        groups = [[sample] for sample in samples]
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
        filler_token: As in :class:`TokenDataset`.
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
