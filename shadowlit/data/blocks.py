"""Tokenised samples as flat arrays, in memory or mapped from an Arrow file that is there complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shadowlit.data.conversation import IGNORE_INDEX, Conversation
from shadowlit.data.template import Encoded

_ABOUT, _CHECKSUM = b"shadowlit", b"checksum"
_COLUMNS = ("source", "row", "line", "desirable", "digest")
_NONE: list[bytes] = []  # the images of a sample that has none, one list for all of them
_MOST_TOKENS = 4_000_000  # of a block before it is written, 20 MB


@dataclass(frozen=True)
class Block:
    """Consecutive samples; lists of lists would be copied into every worker, reference count by reference count.

    Attributes:
        tokens: ``[T]`` int32, sample after sample.
        supervised: ``[T]`` bool, whether a token carries loss.
        ends: ``[N + 1]`` int, where each sample ends, after a 0.
        source: ``[N]`` int64, the number of the source that a sample came from.
        row: ``[N]`` int64, its row there.
        line: ``[N]`` int64, its 1-based line, or -1.
        desirable: ``[N]`` int64, 1 but for the sequences of a sample that is labelled as undesirable, 0.
        digest: ``[N]`` uint64, a hash of its tokens and images, to find equal ones.
        images: Arrow's ``[N]`` lists of packed pictures; None where no sample has one.
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

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ends) - 1


class BlockBuilder:
    """Collects samples, one by one, into a block.

    Attributes:
        sources: Names of the sources in the order of their numbers.
    """

    def __init__(self) -> None:
        self.sources: dict[str, int] = {}
        self._clear()

    def add(self, sample: Encoded, origin: Conversation) -> None:
        """Add a sample and where it came from."""
        tokens = array("i", sample.input_ids)
        self._tokens.extend(tokens)
        self._supervised.extend(label != IGNORE_INDEX for label in sample.labels)
        self._ends.append(len(self._tokens))
        place = (self.sources.setdefault(origin.source, len(self.sources)), origin.row, origin.line or -1)
        for column, value in zip(self._places, place, strict=True):
            column.append(value)
        self._desirable.append(origin.desirable is not False)
        images = [picture.pack() for picture in sample.pictures]
        self._images.append(images or _NONE)
        content = b"".join([tokens.tobytes(), *images])
        self._digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))

    @property
    def is_full(self) -> bool:
        """Whether the block is large enough to be written."""
        return len(self._tokens) >= _MOST_TOKENS

    def take(self) -> Block:
        """What was added since the last call, as a block."""
        supervised = np.frombuffer(bytes(self._supervised), np.bool_)
        source, row, line = (np.array(column, np.int64) for column in self._places)
        block = Block(
            tokens=np.array(self._tokens, np.int32),
            supervised=supervised,
            ends=np.array(self._ends, np.int64),
            source=source,
            row=row,
            line=line,
            desirable=np.array(self._desirable, np.int64),
            digest=np.array(self._digests, np.uint64),
            images=_as_arrow(self._images) if any(self._images) else None,
        )
        self._clear()
        return block

    def _clear(self) -> None:
        self._tokens, self._supervised, self._ends = array("i"), bytearray(), array("q", [0])
        self._places = array("q"), array("q"), array("q")
        self._desirable, self._digests = array("q"), array("Q")
        self._images: list[list[bytes]] = []


class BlockFile:
    """An Arrow stream of blocks that is being written; ``datasets.Dataset.from_file`` reads it too.

    Args:
        stream: Where it goes, open for binary writing.
    """

    def __init__(self, stream: Any) -> None:
        import pyarrow as pa

        lists = [("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.uint8()))]
        kinds = (*[pa.int64()] * 4, pa.uint64())
        self._schema = pa.schema([*lists, *zip(_COLUMNS, kinds, strict=True), ("images", pa.list_(pa.binary()))])
        self._writer = pa.ipc.new_stream(stream, self._schema)
        self._checksum = 0

    def add(self, block: Block) -> None:
        """Append a block."""
        import pyarrow as pa

        ends = pa.array(block.ends.astype(np.int32))
        lists = [pa.ListArray.from_arrays(ends, pa.array(x)) for x in (block.tokens, block.supervised.view(np.uint8))]
        columns = [pa.array(getattr(block, name)) for name in _COLUMNS]
        images = _as_arrow([_NONE] * len(block)) if block.images is None else block.images
        self._writer.write_batch(pa.record_batch([*lists, *columns, images], schema=self._schema))
        self._checksum = _checksum(block, self._checksum)

    def finish(self, about: dict[str, Any]) -> None:
        """Write ``about``, which can be turned into JSON, and end the stream."""
        import pyarrow as pa

        empty = pa.record_batch([pa.array([], field.type) for field in self._schema], schema=self._schema)
        text = json.dumps(about)
        end = {_ABOUT: text, _CHECKSUM: str(zlib.crc32(text.encode(), self._checksum))}
        self._writer.write_batch(empty, custom_metadata=end)
        self._writer.close()


@contextmanager
def write_blocks(file: Path) -> Iterator[BlockFile]:
    """Write blocks to a file of its own name, which takes the place of ``file`` when the block ends well.

    So several processes may write the same file at once: each of them reads a complete one, whoever came last.

    Raises:
        OSError: The folder can't be made or written to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}.", suffix=".partial")
    try:
        with open(handle, "wb") as stream:
            yield BlockFile(stream)
        os.chmod(name, 0o644)  # mkstemp's files are the owner's alone, caches are shared
        os.replace(name, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def read_blocks(file: Path, *, verify: bool = True) -> tuple[list[Block], dict[str, Any]]:
    """Map the blocks of a file into memory, without reading what isn't needed; and what was written about them.

    Args:
        file: What :func:`write_blocks` wrote.
        verify: Compare the checksum, for which everything is read once, at about a gigabyte per second.

    Raises:
        ValueError: The file isn't whole, or not what was written.
        OSError: It can't be read.
    """
    import pyarrow as pa

    blocks, end = [], None
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            while end is None:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
                batch.validate(full=True)
                if metadata is not None:
                    end = metadata[_ABOUT], int(metadata[_CHECKSUM])
                else:
                    blocks.append(_block_of(batch))
    except (pa.ArrowException, StopIteration, KeyError) as error:
        raise ValueError(f"{file} is no complete Arrow file of samples: {error!r}") from error
    if verify:
        checksum = 0
        for block in blocks:
            checksum = _checksum(block, checksum)
        checksum = zlib.crc32(end[0], checksum)
        if checksum != end[1]:
            raise ValueError(f"{file} has the checksum {checksum}, not {end[1]} as written")
    return blocks, json.loads(end[0])


def _block_of(batch: Any) -> Block:
    tokens, supervised = batch.column("input_ids"), batch.column("supervised")
    flat = tokens.values.to_numpy(), supervised.values.to_numpy().view(np.bool_), tokens.offsets.to_numpy()
    images = batch.column("images")
    columns = {name: batch.column(name).to_numpy() for name in _COLUMNS}
    return Block(*flat, **columns, images=images if len(images.values) else None)


def _as_arrow(images: list[list[bytes]]) -> Any:
    import pyarrow as pa

    return pa.array(images, pa.list_(pa.binary()))


def _checksum(block: Block, before: int) -> int:
    for values in (block.tokens, block.supervised, *(getattr(block, name) for name in _COLUMNS)):
        before = zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, before)
    for image in () if block.images is None else block.images.flatten():
        before = zlib.crc32(image.as_buffer(), before)
    return zlib.crc32(np.diff(block.ends).astype(np.int32).tobytes(), before)
