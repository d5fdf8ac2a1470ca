"""Tokenised samples as flat arrays, in memory or mapped from an Arrow file that is written atomically."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shadowlit.data.conversation import IGNORE_INDEX, Conversation
from shadowlit.data.template import Encoded
from shadowlit.errors import DataError
from shadowlit.files import written_beside

_COLUMNS = {"source": "q", "row": "q", "line": "q", "desirable": "B", "digest": "Q"}  # with their types in an array
_LISTS = {"images": "binary", "weights": "float32"}  # columns of a list per sample, with Arrow's types
_NONE: list[Any] = []  # the images or the weights of a sample without any, one list for all such samples
_MOST_WEIGHTS = 255  # different ones in a sample
_MOST_TOKENS = 4_000_000  # in a block before it is written, 20 MB
_NUM = 8  # bytes of a number at the end of a file


@dataclass(frozen=True)
class Block:
    """Consecutive samples. Lists of lists would be copied into every worker as their reference counts change.

    Attributes:
        tokens: Tokens, sample after sample, ``[T]`` int32.
        supervised: 0 where a token is unsupervised, otherwise the number of its weight among its sample's weights,
            counted from 1; 1 where the sample has no weights, ``[T]`` uint8.
        ends: End of each sample, after a 0, ``[N + 1]`` int.
        source: Number of the source that each sample came from, ``[N]`` int64.
        row: Row in the source, ``[N]`` int64.
        line: 1-based line in the source, or -1, ``[N]`` int64.
        desirable: 0 for the sequences of a sample that is labelled as undesirable, otherwise 1, ``[N]`` uint8.
        digest: Hash of tokens and images, to find identical samples, ``[N]`` uint64.
        images: Arrow array of a list of packed images for each sample, ``[N]``; None where no sample has any.
        weights: Arrow array of a list of the different weights, float32, of each sample's supervised tokens, ``[N]``; a
            list is empty where all of them are 1, and the array None where all lists are empty.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    ends: np.ndarray
    source: np.ndarray
    row: np.ndarray
    line: np.ndarray
    desirable: np.ndarray
    digest: np.ndarray
    images: Any = None
    weights: Any = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ends) - 1


class BlockBuilder:
    """Collects samples, one by one, into blocks."""

    def __init__(self) -> None:
        self._clear()

    def add(self, sample: Encoded, origin: Conversation) -> None:
        """Add a sample, which must be storable, and where it came from."""
        tokens = array("i", sample.input_ids)
        self._tokens.extend(tokens)
        weights = _NONE
        if sample.weights is None:
            self._supervised.extend(label != IGNORE_INDEX for label in sample.labels)
        else:
            weights = _different_weights(sample)
            numbers = {weight: number for number, weight in enumerate(weights, 1)}
            self._supervised.extend(numbers.get(weight, 0) for weight in sample.weights)
        self._ends.append(len(self._tokens))
        images = [image.pack() for image in sample.images]
        self._lists["images"].append(images or _NONE)
        self._lists["weights"].append(_NONE if weights == [1.0] else weights)  # a sample that was truncated
        content = b"".join([tokens.tobytes(), *images])
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        values = (origin.source_index, origin.row, origin.line or -1, origin.desirable is not False, digest)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    @property
    def is_full(self) -> bool:
        """Whether the block is large enough to be written."""
        return len(self._tokens) >= _MOST_TOKENS

    def take(self) -> Block:
        """Return the samples that were added since the last call, as a block."""
        columns = {name: np.array(column) for name, column in zip(_COLUMNS, self._columns, strict=True)}
        supervised = np.frombuffer(bytes(self._supervised), np.uint8)
        lists = {name: _as_arrow(name, x) for name, x in self._lists.items() if any(x)}
        block = Block(np.array(self._tokens), supervised, np.array(self._ends), **columns, **lists)
        self._clear()
        return block

    def _clear(self) -> None:
        self._tokens, self._supervised, self._ends = array("i"), bytearray(), array("q", [0])
        self._columns = [array(kind) for kind in _COLUMNS.values()]
        self._lists: dict[str, list[list[Any]]] = {name: [] for name in _LISTS}


def require_storable(sample: Encoded) -> None:
    """Raise a DataError for a sample that no block can hold."""
    if len(weights := _different_weights(sample)) > _MOST_WEIGHTS:
        raise DataError(f"has {len(weights)} different weights; expected at most {_MOST_WEIGHTS}. Round them.")


def _different_weights(sample: Encoded) -> list[float]:
    return sorted(set(sample.weights or ()) - {0.0})


def joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the samples of small blocks in blocks that are large enough to be written, and a smaller last one."""
    together: list[Block] = []
    for block in blocks:
        together.append(block)
        if sum(len(one.tokens) for one in together) >= _MOST_TOKENS:
            yield _join(together)
            together = []
    if together:
        yield _join(together)


def _join(blocks: list[Block]) -> Block:
    import pyarrow as pa

    if len(blocks) == 1:
        return blocks[0]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(one, name) for one in blocks]) for name in ("tokens", "supervised", *_COLUMNS)
    }
    lists: dict[str, Any] = {}
    for name in _LISTS:
        given = [getattr(one, name) for one in blocks]
        if any(values is not None for values in given):
            lists[name] = pa.concat_arrays([
                _as_arrow(name, [_NONE] * len(one)) if values is None else values
                for one, values in zip(blocks, given, strict=True)
            ])  # fmt: skip
    starts = np.cumsum([0, *(len(one.tokens) for one in blocks)])
    ends = [one.ends[1:] + start for one, start in zip(blocks, starts, strict=False)]
    return Block(**columns, ends=np.concatenate([[0], *ends]), **lists)


class BlockFile:
    """An Arrow stream of blocks that is being written; ``datasets.Dataset.from_file`` reads it too.

    The stream is followed by a JSON text, its length, and a checksum of everything before.
    """

    def __init__(self, stream: BinaryIO) -> None:
        import pyarrow as pa

        lists = [("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.uint8()))]
        lists += [(name, _list_type(name)) for name in _LISTS]
        columns = [(name, pa.from_numpy_dtype(np.array(array(kind)).dtype)) for name, kind in _COLUMNS.items()]
        self._schema = pa.schema([*lists, *columns])
        self._stream, self._writer = stream, pa.ipc.new_stream(stream, self._schema)

    def add(self, block: Block) -> None:
        """Append a block."""
        import pyarrow as pa

        ends = pa.array(block.ends.astype(np.int32))
        lists = [pa.ListArray.from_arrays(ends, pa.array(x)) for x in (block.tokens, block.supervised)]
        for name in _LISTS:
            values = getattr(block, name)
            lists.append(_as_arrow(name, [_NONE] * len(block)) if values is None else values)
        columns = [pa.array(getattr(block, name)) for name in _COLUMNS]
        self._writer.write_batch(pa.record_batch([*lists, *columns], schema=self._schema))

    def finish(self, about: dict[str, Any]) -> None:
        """End the stream, and append ``about``, which can be turned into JSON."""
        self._writer.close()
        text = json.dumps(about).encode()
        self._stream.write(text + len(text).to_bytes(_NUM, "little"))
        self._stream.flush()
        checksum = zlib.crc32(np.memmap(self._stream.name, np.uint8, "r").data)
        self._stream.write(checksum.to_bytes(_NUM, "little"))


@contextmanager
def write_blocks(file: Path) -> Iterator[BlockFile]:
    """Write blocks to ``file`` atomically; several processes may do so at once.

    Raises:
        OSError: The folder can't be made or written to.
    """
    with written_beside(file) as partial, partial.open("wb") as stream:
        yield BlockFile(stream)


def read_blocks(file: Path, *, verify: bool = True) -> tuple[list[Block], dict[str, Any]]:
    """Map the blocks of a file into memory, and return what was written about them.

    Args:
        file: File that :func:`write_blocks` wrote.
        verify: Compare the checksum, which reads the whole file once, at about a gigabyte per second.

    Raises:
        ValueError: The file isn't complete, or isn't what was written.
        OSError: It can't be read.
    """
    import pyarrow as pa

    content = np.memmap(file, np.uint8, "r")
    end, checksum = content[:-_NUM], int.from_bytes(content[-_NUM:].tobytes(), "little")
    if verify and zlib.crc32(end.data) != checksum:
        raise ValueError(f"{file} doesn't have the checksum {checksum} that was written")
    size = int.from_bytes(end[-_NUM:].tobytes(), "little")
    about = json.loads(end[-_NUM - size : -_NUM].tobytes())
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return [_block_of(batch) for batch in reader], about


def _block_of(batch: Any) -> Block:
    tokens, supervised = batch.column("input_ids"), batch.column("supervised")
    columns = {name: batch.column(name).to_numpy() for name in _COLUMNS}
    lists = {name: batch.column(name) for name in _LISTS if len(batch.column(name).values)}
    flat, marks, ends = tokens.values.to_numpy(), supervised.values.to_numpy(), tokens.offsets.to_numpy()
    return Block(flat, marks, ends, **columns, **lists)


def _as_arrow(name: str, lists: list[list[Any]]) -> Any:
    import pyarrow as pa

    return pa.array(lists, _list_type(name))


def _list_type(name: str) -> Any:
    import pyarrow as pa

    return pa.list_(getattr(pa, _LISTS[name])())
