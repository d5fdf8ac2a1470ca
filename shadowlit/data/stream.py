"""Training data that are read as the training goes on, a window of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from shadowlit.data.conversation import Conversation
from shadowlit.data.dataset import DataReport, PackedDataset, TokenDataset
from shadowlit.data.sampler import FILLER
from shadowlit.errors import DataError

_PASS = 2**32  # more than the windows of a pass over the data
_LOOKED_AT = 64  # rows that are tokenised before the training begins, unless none of them makes a sample


@dataclass(frozen=True)
class Position:
    """Which batch of a stream comes next, all from 0.

    Attributes:
        number: the pass over the data.
        window: of the pass.
        batch: of the window.
        num_tokens: that this rank has been given until then.
    """

    number: int = 0
    window: int = 0
    batch: int = 0
    num_tokens: int = 0


class TokenStream(IterableDataset):
    """One rank's batches of an endless stream: one pass over the sources after the other, in windows of rows.

    A window is tokenised when it is due. Its samples are shuffled, packed and split over the ranks as a whole data set
    is, so the batches are a function of the sources, the seed and the position, whoever delivers them. What makes no
    whole global batch is a smaller one at the window's end (or is left out, where the sampler does so). Every rank
    tokenises all of the window, of which it takes its part.

    Args:
        read: Gives the conversations of a pass, from the first on.
        window_rows: Conversations of a window.
        tokenise: Makes samples of a window.
        batches: What this rank takes of a window: called with the samples, a number to draw the order from, and the
            batch to begin with.
        packed: What it takes are packs of samples.
        collate: Makes a batch of rows.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Conversation]],
        window_rows: int,
        tokenise: Callable[[list[Conversation]], tuple[TokenDataset, DataReport]],
        batches: Callable[[TokenDataset, int, int], Iterable[list[Any]]],
        packed: bool,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    ) -> None:
        self._read, self._window_rows = read, window_rows
        self._tokenise, self._batches, self._packed, self._collate = tokenise, batches, packed, collate
        self.start = Position()

    def first_samples(self) -> TokenDataset:
        """Some of those that a pass begins with: enough to see what is wrong with all, or to look at a few.

        Raises:
            DataError: The first window has none, or a malformed row.
        """
        rows = next((rows for _, rows in self._windows(0)), [])
        for start in range(0, len(rows), _LOOKED_AT):
            dataset, _ = self._tokenise(rows[start : start + _LOOKED_AT])
            if len(dataset):
                return dataset
        raise DataError(
            f"data.train has no sample in its first {len(rows)} rows. Give a source with rows, raise data.max_length, "
            "or look at data.overlong."
        )

    def __iter__(self) -> Iterator[tuple[Position, dict[str, torch.Tensor]]]:
        """Batches from :attr:`start` on, each after the position that is behind it.

        Raises:
            DataError: A row that is due is malformed, or a whole pass gives no batch.
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
        rows = islice(self._read(), first * self._window_rows, None)
        number = first
        while window := list(islice(rows, self._window_rows)):
            yield number, window
            number += 1

    def _of_window(self, rows: list[Conversation], position: Position) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        dataset, _ = self._tokenise(rows)
        if not len(dataset):
            return
        items: TokenDataset | PackedDataset = PackedDataset(dataset) if self._packed else dataset
        for indices in self._batches(dataset, position.number * _PASS + position.window, position.batch):
            batch = [items[index] for index in indices]
            num_tokens = sum(
                len(item["input_ids"]) for index, item in zip(indices, batch, strict=True) if index is not FILLER
            )
            yield self._collate(batch), num_tokens


class StreamLoader(DataLoader):
    """Delivers a stream's batches, as many as the training needs; its state is the position of the next one.

    Its length is that of the whole training, so Lightning counts one epoch, knows when the last batch comes, and
    fetches none ahead of the position. A batch counts when it is handed to the training loop.

    Args:
        stream: The batches.
        length: Batches of the whole training.
        options: Passed to ``torch.utils.data.DataLoader``; at most one worker, since several would change the order.
    """

    dataset: TokenStream

    def __init__(self, stream: TokenStream, length: int, **options: Any) -> None:
        options["num_workers"] = min(1, options.get("num_workers", 0))
        # Its own generator: else every iteration draws from the global one, and shifts dropout.
        super().__init__(stream, batch_size=None, generator=torch.Generator().manual_seed(0), **options)
        self._length, self._position = length, Position()

    def __len__(self) -> int:
        """Batches of the whole training."""
        return self._length

    def state_dict(self) -> dict[str, int]:
        """The :class:`Position` of the next batch to deliver."""
        return asdict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position that :meth:`state_dict` gave."""
        self._position = Position(**state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from the position on, without end. A generator: Lightning opens iterators early, and drops them."""
        self.dataset.start = self._position
        for position, batch in super().__iter__():
            self._position = position
            yield batch
