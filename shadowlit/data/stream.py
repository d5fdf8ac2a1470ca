"""Training data that are read during the training, one window of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from operator import gt
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shadowlit.data.conversation import Conversation, some_of
from shadowlit.data.dataset import TokenDataset
from shadowlit.data.loader import quiet
from shadowlit.data.mixing import take_turns
from shadowlit.data.order import make_sampler, pack, require_packable
from shadowlit.data.prepare import Preparation
from shadowlit.data.sampler import FILLER
from shadowlit.data.sources import stream_conversations
from shadowlit.data.tokenise import Skipped
from shadowlit.errors import DataError, counted

_PASS = 2**32  # more than the windows of a pass over the data
_LOOKED_AT = 64  # rows that are tokenised before the training begins, unless none of them becomes a sample


@dataclass(frozen=True)
class Position:
    """The next batch of a stream; all numbers count from 0."""

    number: int = 0  # of the pass over the data
    window: int = 0  # in the pass
    batch: int = 0  # in the window
    num_tokens: int = 0  # of the batches that this rank has received so far
    taken: tuple[int, ...] = ()  # rows of each source in the windows before, where sources are mixed by weight
    read: tuple[int, ...] = ()  # those among them that belong to the source's current pass


class TokenStream(IterableDataset):
    """One rank's batches of an endless stream: repeated passes over the sources, in windows of rows.

    Sources with weights take turns instead (see :func:`shadowlit.data.mixing.take_turns`), each in passes of its own.

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
        self._listed: set[str] = set()  # rows that are left out, as far as they have been logged

    def first_samples(self) -> TokenDataset:
        """Return some of the first samples of a pass: enough to find general errors, or for a preview.

        Raises:
            DataError: The first window has none, or a malformed row.
        """
        skipped = self._skipped()
        rows = next((rows for _, rows in self._windows(Position(), skipped)), [])
        for start in range(0, len(rows), _LOOKED_AT):
            dataset, _ = self._preparation.tokenise("train", rows[start : start + _LOOKED_AT], skipped=skipped)
            if len(dataset):
                return dataset
        raise DataError(
            f"data.train yields no sample in its first {counted(len(rows), 'row')}. Give a source with rows, raise "
            f"data.max_length, or change data.overlong.{some_of([message for _, message in skipped or ()])}"
        )

    def __iter__(self) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """Yield the batches from :attr:`start`, each with the position that follows it.

        Raises:
            DataError: The next row is malformed, or a whole pass yields no batch.
        """
        position, num_batches = self.start, 0
        from_beginning = not position.window
        while True:
            skipped = self._skipped()
            for following, rows in self._windows(position, skipped):
                for batch, num_tokens in self._of_window(rows, position, skipped):
                    num_batches += 1
                    position = replace(
                        position, batch=position.batch + 1, num_tokens=position.num_tokens + num_tokens
                    )  # fmt: skip
                    yield position, batch
                position = replace(following, num_tokens=position.num_tokens)
                if following.taken and all(map(gt, following.taken, following.read)):  # all have begun again
                    self._require_batches(num_batches, from_beginning)
            self._require_batches(num_batches, from_beginning)
            from_beginning = True
            position = replace(position, number=position.number + 1, window=0, batch=0)

    def _require_batches(self, num_batches: int, from_beginning: bool) -> None:
        if not num_batches and from_beginning:
            raise DataError(
                "a whole pass over data.train gives no batch. Give more rows, lower data.batch_size, or set "
                "data.drop_last=false."
            )

    def _windows(
        self, position: Position, skipped: list[Skipped] | None
    ) -> Iterator[tuple[Position, list[Conversation]]]:
        """The windows from that of the position on, each with the position that follows it; without end if mixed."""
        size = self._settings.stream_window
        sources = range(len(self._settings.train_sources))
        if self._settings.is_mixed:
            yield from self._mixed_windows(position, skipped)
            return
        rows = islice(chain.from_iterable(self._rows(i, skipped) for i in sources), position.window * size, None)
        while window := list(islice(rows, size)):
            position = replace(position, window=position.window + 1, batch=0)
            yield position, window

    def _mixed_windows(
        self, position: Position, skipped: list[Skipped] | None
    ) -> Iterator[tuple[Position, list[Conversation]]]:
        weights = [source.weight or 0.0 for source in self._settings.train_sources]
        taken, read = ([*(given or [0] * len(weights))] for given in (position.taken, position.read))
        rows = [self._endless_rows(i, read, skipped) for i in range(len(weights))]
        turns = take_turns(weights, taken)
        while True:
            order = list(islice(turns, self._settings.stream_window))
            window = [next(rows[i]) for i in order]
            for i in order:
                taken[i] += 1
            position = replace(
                position, window=position.window + 1, batch=0, taken=tuple(taken), read=tuple(read)
            )  # fmt: skip
            yield position, window

    def _endless_rows(self, index: int, read: list[int], skipped: list[Skipped] | None) -> Iterator[Conversation]:
        """The rows of a source from number ``read[index]`` of a pass on, pass after pass, counting them there."""
        while True:
            for conversation in islice(self._rows(index, skipped), read[index], None):
                read[index] += 1
                yield conversation
            if not read[index]:
                source = self._settings.train_sources[index]
                raise DataError(f"{source} has no row that can be used. Give a source with rows, or remove it.")
            read[index] = 0

    def _rows(self, index: int, skipped: list[Skipped] | None) -> Iterator[Conversation]:
        """The rows of a source, once."""
        source = self._settings.train_sources[index]
        for conversation in stream_conversations(
            source.path,
            source.format or "auto",
            columns=source.columns,
            ignore=source.ignore_columns or (),
            max_rows=source.max_rows,
            skip=None if skipped is None else lambda message: skipped.append((index, message)),
        ):
            yield replace(conversation, source_index=index) if index else conversation

    def _skipped(self) -> list[Skipped] | None:
        return [] if self._settings.on_bad_row == "skip" else None

    def _log_skipped(self, skipped: list[Skipped] | None) -> None:
        """Log the rows that are left out and haven't been logged, and forget them."""
        new = [one for one in dict.fromkeys(message for _, message in skipped or ()) if one not in self._listed]
        if new:
            self._listed.update(new)
            rank_zero_warn(
                f"data: train: data.on_bad_row=skip leaves out {counted(len(new), 'row')}, "
                f"{len(self._listed):,} so far:{some_of(new)}"
            )
        if skipped is not None:
            skipped.clear()

    def _of_window(
        self, rows: list[Conversation], position: Position, skipped: list[Skipped] | None
    ) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The batches of a window from the position on, and the number of tokens of each."""
        settings = self._settings
        dataset, _ = self._preparation.tokenise("train", rows, skipped=skipped)
        self._log_skipped(skipped)
        if not len(dataset):
            return
        require_packable(settings, dataset)
        packs, lengths = pack(settings, dataset), dataset.lengths
        if settings.drop_last and len(packs or dataset) < self._world_size * settings.batch_size:
            return
        sampler = make_sampler(settings, lengths, packs, self._world_size, self._rank)
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

    def state_dict(self) -> dict[str, Any]:
        """Return the :class:`Position` of the next batch."""
        return asdict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a position that :meth:`state_dict` returned."""
        self._position = Position(**state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches from the position on. A generator, since Lightning creates iterators early and drops them."""
        self.dataset.start = self._position
        for position, batch in super().__iter__():
            self._position = position
            yield batch
