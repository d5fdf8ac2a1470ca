"""From samples to tensors: padded on the right for training, on the left for generation. Picklable, for workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.packing import loss_weights, pack_samples

Sample = dict[str, Any]


@dataclass(frozen=True)
class Collate:
    """Pads samples on the right to the longest of the batch.

    Attributes:
        pad_token_id: Token that fills ``input_ids``; its attention is 0 and its label -100, so any token will do.
        pad_to_multiple_of: Multiple to which the length is rounded up, which avoids recompilations; None for the
            length itself.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[B, T]``.

        Where a sample has ``loss_weights``, these are returned too, float32 ``[B, T]``.
        """
        length = _round_up(max(len(sample["input_ids"]) for sample in samples), self.pad_to_multiple_of)
        return {
            "input_ids": _fill(samples, "input_ids", length, self.pad_token_id),
            "attention_mask": _fill([{"mask": [1] * len(s["input_ids"])} for s in samples], "mask", length, 0),
            "labels": _fill(samples, "labels", length, IGNORE_INDEX),
            **_weights(samples, length),
        }


@dataclass(frozen=True)
class PackCollate:
    """Builds packed rows, without a mask, since ``position_ids`` that restart say where each sample begins.

    Attributes:
        pad_token_id: Token that fills ``input_ids`` after a shorter row, like one more, unsupervised sample.
        pad_to_multiple_of: See :class:`Collate`.
        flatten: Concatenate all samples of the batch into one row, which needs no padding (``padding_free``).
            Otherwise each item is a row.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    flatten: bool = False

    def __call__(self, items: Sequence[Sample | list[Sample]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``position_ids`` and ``labels``, each int64 ``[B, T]``; B is 1 where flattened.

        ``loss_weights`` as in :class:`Collate`.

        Args:
            items: Samples, or packs of them.
        """
        packs = [item if isinstance(item, list) else [item] for item in items]
        if self.flatten:
            packs = [[sample for pack in packs for sample in pack]]
        sizes = [sum(len(sample["input_ids"]) for sample in pack) for pack in packs]
        length = _round_up(max(sizes), self.pad_to_multiple_of)
        rows = []
        for pack, size in zip(packs, sizes, strict=True):
            free = length - size
            filling = {"input_ids": [self.pad_token_id] * free, "labels": [IGNORE_INDEX] * free}
            rows.append(pack_samples([*pack, filling] if free else pack))
        batch = {name: _fill(rows, name, length, 0) for name in ("input_ids", "position_ids", "labels")}
        return {**batch, **_weights(rows, length)}


@dataclass(frozen=True)
class PromptCollate:
    """Pads prompts on the left with ``pad_token_id``, so that answers are generated at the right end of every row."""

    pad_token_id: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return ``input_ids`` and ``attention_mask``, int64 ``[B, T]``, ``index``, int64 ``[B]``, and ``reference``.

        ``reference`` is a list of the texts of the rows' own answers, None where there is none.
        """
        length = max(len(sample["input_ids"]) for sample in samples)
        rows = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": torch.tensor([[self.pad_token_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            "index": torch.tensor([sample["index"] for sample in samples]),
            "reference": [sample.get("reference") for sample in samples],
        }


def _weights(rows: Sequence[Sample], length: int) -> dict[str, Tensor]:
    """The column ``loss_weights``, float32 ``[B, length]``, if any row has weights."""
    if not any("loss_weights" in row for row in rows):
        return {}
    return {"loss_weights": _fill([{"weights": loss_weights(row)} for row in rows], "weights", length, 0.0)}


def _fill(rows: Sequence[Sample], name: str, length: int, value: float) -> Tensor:
    """A column of all rows, ``[B, length]``, with ``value`` after the end of each; int64, or float32 for floats."""
    filled = np.full((len(rows), length), value, np.float32 if isinstance(value, float) else np.int64)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row[name])] = row[name]
    return torch.from_numpy(filled)


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple
