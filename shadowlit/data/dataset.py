"""Tokenised data sets: flat arrays of about five bytes per token, in memory or mapped from a file."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from shadowlit.data.blocks import Block, read_blocks
from shadowlit.data.conversation import IGNORE_INDEX, Conversation, answer_text, place
from shadowlit.data.images import ImageSource
from shadowlit.data.packing import Pack
from shadowlit.data.sampler import FILLER, FILLER_ROW, Filler
from shadowlit.data.template import Encoded
from shadowlit.errors import counted

_COUNTS = (
    "num_rows", "num_samples", "num_split", "num_truncated", "num_dropped", "num_tokens", "num_supervised_tokens",
    "skipped",
)  # fmt: skip


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
        """Return the report of which ``dataclasses.asdict`` made ``values``."""
        return cls(**{**values, "sources": [cls.of_dict(each) for each in values["sources"]]})

    def add(self, other: DataReport) -> None:
        """Count what another report of rows counts."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)

    def __str__(self) -> str:
        """``train: 2,000 samples, 512,345 tokens, 31.0 % supervised, longest 4,096; 3 truncated, 1 dropped``."""
        line = (
            f"{self.name}: {counted(self.num_samples, 'sample')}, {counted(self.num_tokens, 'token')}, "
            f"{100 * self.supervised_share:.1f} % supervised, longest {self.longest:,}"
        )
        if self.drawn is not None:
            line += f"; {counted(self.drawn, 'sample')} per epoch"
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
        """Return the hashes of the samples' tokens and images, ``[len(self)]`` uint64, to find identical samples."""
        return np.concatenate([np.zeros(0, np.uint64), *(block.digest for block in self._blocks)])

    def _find(self, index: int) -> tuple[Block, int]:
        """The block of a sample, and the sample's number in it."""
        sample = range(len(self))[index]
        number = bisect_right(self._firsts, sample) - 1
        return self._blocks[number], sample - self._firsts[number]


class SequencePairs(Dataset):
    """Samples of two token sequences each, made of a data set of sequences.

    Args:
        sequences: Data set that has the two sequences of sample ``i`` at ``2 i`` and ``2 i + 1``.
    """

    def __init__(self, sequences: TokenDataset) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sequences) // 2

    @property
    def source_of(self) -> np.ndarray:
        """Number of the source of each sample, ``[len(self)]`` int64."""
        return self.sequences.source_of[::2]

    @property
    def longest(self) -> np.ndarray:
        """Tokens of the longer sequence of each sample, ``[len(self)]`` int64."""
        return self.sequences.lengths.reshape(-1, 2).max(1)

    def origin(self, index: int) -> str:
        """``sample 17 of train.jsonl (line 18)``."""
        return self.sequences.origin(2 * index)


class PromptDataset(Dataset):
    """Prompts ``{"input_ids": list[int], "index": int, "reference": str | None}``.

    ``index`` is the row, or -1 for the filler, and ``reference`` the text of the row's own answer, if it has one.
    """

    def __init__(self, prompts: list[Encoded], origins: list[Conversation], filler_token: int) -> None:
        self._prompts, self._origins, self._filler_token = prompts, origins, filler_token

    def __len__(self) -> int:
        """Number of prompts, fillers not counted."""
        return len(self._prompts)

    def __getitem__(self, index: int | Filler) -> dict[str, Any]:
        """Prompt ``index``, or the filler."""
        if index is FILLER:
            return {"input_ids": [self._filler_token] * 2, "index": FILLER_ROW, "reference": None}
        prompt, origin = self._prompts[index], self._origins[index]
        reference = answer_text(origin.messages)
        sample: dict[str, Any] = {"input_ids": prompt.input_ids, "index": origin.row, "reference": reference}
        return {**sample, "images": prompt.images, "origin": str(origin)} if prompt.images else sample

    @property
    def has_images(self) -> bool:
        """Whether any prompt has an image."""
        return any(prompt.images for prompt in self._prompts)

    def origin(self, index: int) -> str:
        """``sample 17 of prompts.jsonl (line 18)``."""
        return str(self._origins[index])
