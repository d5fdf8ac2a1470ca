"""Training data that are read during the training, one window of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shadowlit.data.conversation import Conversation
from shadowlit.data.dataset import TokenDataset
from shadowlit.data.loader import quiet
from shadowlit.data.order import make_sampler, pack, require_packable
from shadowlit.data.prepare import Preparation
from shadowlit.data.sampler import FILLER
from shadowlit.data.sources import stream_conversations
from shadowlit.errors import DataError

_PASS = 2**32  # more than the windows of a pass over the data
_LOOKED_AT = 64  # rows that are tokenised before the training begins, unless none of them becomes a sample


@dataclass(frozen=True)
class Position:
    """The next batch of a stream; all numbers count from 0."""

    number: int = 0  # of the pass over the data
    window: int = 0  # in the pass
    batch: int = 0  # in the window
    num_tokens: int = 0  # of the batches that this rank has received so far


class TokenStream(IterableDataset):
    """One rank's batches of an endless stream: repeated passes over the sources, in windows of rows.

    A window is tokenised when its first batch is needed. Its samples are shuffled, packed and split over the ranks like
    a whole data set, so the batches are a function of the sources, the seed and the position alone. Samples that fill
    no global batch form a smaller one at the end of the window, or are left out if the sampler does so. Every rank
    tokenises the whole window and takes its part.
    """

    def __init__(
        self, preparation: Preparation, world_size: int, rank: int, collate: Callable[[list[Any]], dict[str, Tensor]]
    ) -> None:
        self._preparation, self._settings = preparation, preparation.settings
        self._world_size, self._rank, self._collate = world_size, rank, collate
        self.start = Position()

    def first_samples(self) -> TokenDataset:
        """Some of the first samples of a pass: enough to find general errors, or for a preview.

        Raises:
            DataError: The first window has none, or a malformed row.
        """
        rows = next((rows for _, rows in self._windows(0)), [])
        for start in range(0, len(rows), _LOOKED_AT):
            dataset, _ = self._preparation.tokenise("train", rows[start : start + _LOOKED_AT])
            if len(dataset):
                return dataset
        raise DataError(
            f"data.train has no sample in its first {len(rows)} rows. Give a source with rows, raise data.max_length, "
            "or look at data.overlong."
        )

    def __iter__(self) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """Yield the batches from :attr:`start`, each with the position that follows it.

        Raises:
            DataError: The next row is malformed, or a whole pass yields no batch.
        """
        position = self.start
        while True:
            first, num_batches = position.window, 0
            for window, rows in self._windows(first):
                for batch, num_tokens in self._of_window(rows, position):
                    num_batches += 1
                    position = replace(
                        position, batch=position.batch + 1, num_tokens=position.num_tokens + num_tokens
                    )  # fmt: skip
                    yield position, batch
                position = replace(position, window=window + 1, batch=0)
            if not num_batches and not first:
                raise DataError(
                    "a whole pass over data.train gives no batch. Give more rows, lower data.batch_size, or set "
                    "data.drop_last=false."
                )
            position = replace(position, number=position.number + 1, window=0, batch=0)

    def _windows(self, first: int) -> Iterator[tuple[int, list[Conversation]]]:
        settings, size = self._settings, self._settings.stream_window
        sources = (
            stream_conversations(
                source, settings.format, columns=settings.columns, ignore=settings.ignore_columns or ()
            )
            for source in settings.train_sources
        )
        rows = islice(chain.from_iterable(sources), first * size, None)
        number = first
        while window := list(islice(rows, size)):
            yield number, window
            number += 1

    def _of_window(self, rows: list[Conversation], position: Position) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The batches of a window from the position on, and the number of tokens of each."""
        settings = self._settings
        dataset, _ = self._preparation.tokenise("train", rows)
        if not len(dataset):
            return
        require_packable(settings, dataset)
        packs, lengths = pack(settings, dataset), dataset.lengths
        if settings.drop_last and len(packs or dataset) < self._world_size * settings.batch_size:
            return
        sampler = make_sampler(settings, lengths, packs, self._world_size, self._rank, shuffle=settings.shuffle)
        for indices in sampler.batches(position.number * _PASS + position.window, position.batch):
            num_tokens = sum(int(lengths[np.asarray(index)].sum()) for index in indices if index is not FILLER)
            yield self._collate([dataset[index] for index in indices]), num_tokens


class StreamLoader(DataLoader):
    """Loads the batches of a stream; its state is the position of the next batch.

    Its length is that of the whole training, so that Lightning counts one epoch, knows which batch is the last, and
    fetches no batch ahead. A batch counts when it is handed to the training loop.

    Args:
        stream: Stream of batches.
        length: Number of batches in the whole training.
        options: Options of ``torch.utils.data.DataLoader``; at most one worker, since several would change the order.
    """

    dataset: TokenStream

    def __init__(self, stream: TokenStream, length: int, **options: Any) -> None:
        options["num_workers"] = min(1, options.get("num_workers", 0))
        super().__init__(stream, batch_size=None, **quiet(options))
        self._length, self._position = length, Position()

    def __len__(self) -> int:
        """Number of batches in the whole training."""
        return self._length

    def state_dict(self) -> dict[str, int]:
        """The :class:`Position` of the next batch."""
        return asdict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a position that :meth:`state_dict` returned."""
        self._position = Position(**state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches from the position on. A generator, since Lightning creates iterators early and drops them."""
        self.dataset.start = self._position
        for position, batch in super().__iter__():
            self._position = position
            yield batch
