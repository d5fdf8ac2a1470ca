"""Preference data: two answers to one prompt, or one answer with a label; from rows to batches that keep them together.

==============================  =====================================================================================
pairs                           ``chosen`` and ``rejected``: texts, lists of messages, or a turn, beside the ``prompt``
                                (a text or messages) or ``conversations`` (ShareGPT) that they answer; or two whole
                                conversations with the same beginning, with or without a column ``prompt``
labels                          ``prompt``, ``completion`` and ``label``, or ``messages`` and ``label``: true for an
                                answer that is desirable, false for one that isn't
==============================  =====================================================================================

A sample has two token sequences, which share a batch and, where rows are packed, a row: the chosen and the rejected
answer; or a labelled answer and, to the same prompt, the answer of the next row, by which KTO measures how far the
model has moved. Loss is on the answers' tokens alone. The two are neighbours in everything that holds sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shadowlit.data.collate import Collate, PackCollate
from shadowlit.data.conversation import Conversation
from shadowlit.data.dataset import TokenDataset
from shadowlit.data.formats import Message, Samples, from_messages, from_sharegpt, said
from shadowlit.data.packing import Pack, Packing, pack_samples
from shadowlit.data.sampler import FILLER
from shadowlit.errors import DataError

_LABELLED = (("prompt", "completion", "label"), ("messages", "label"))
_EXPECTED = {
    "pairs": "'chosen' and 'rejected', beside 'prompt' or 'conversations' or as whole conversations",
    "labels": "'prompt', 'completion' and 'label', or 'messages' and 'label'",
}


def require_columns(columns: Iterable[str], samples: Samples, source: str) -> None:
    """Raise where a source lacks the columns of pairs or labels.

    Raises:
        DataError: The source holds something else.
    """
    found = set(columns)
    needed: tuple[tuple[str, ...], ...] = (("chosen", "rejected"),) if samples == "pairs" else _LABELLED
    if any(found.issuperset(names) for names in needed):
        return
    listed = ", ".join(f"'{name}'" for name in sorted(found)) or "(none)"
    other = ""
    if found.issuperset(("chosen", "rejected")):
        other = " These are pairs: set model.objective to one of pairs, e.g. DPO."
    elif any(found.issuperset(names) for names in _LABELLED):
        other = " These are labelled answers: set model.objective to KTO."
    raise DataError(
        f"{source} has the columns {listed}, but model.objective needs {samples}: {_EXPECTED[samples]}."
        f"{other or ' Rename the columns, or set model.objective to SFT for conversations.'}"
    )


def convert_pair(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """The conversations with the chosen and with the rejected answer; in both, the prompt carries no loss.

    Raises:
        DataError: The row is malformed, its answers are the same, or its two prompts aren't. The message doesn't say
            which row it is.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen[0]["role"] == "assistant" == rejected[0]["role"] and (prompt := _prompt(row)):
        pass
    else:  # whole conversations, which hold the prompt
        prompt, chosen, rejected = _apart(chosen, rejected)
    if _texts(chosen) == _texts(rejected):
        raise DataError(
            "has the same answer in 'chosen' and in 'rejected', so neither is preferred. Correct or remove the row."
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn["role"] == "assistant" for turn in answer):
            raise DataError(f"has no assistant turn in '{name}'. Give the answer the role assistant.")
    prompt = _context(prompt)
    return prompt + chosen, prompt + rejected


def convert_labelled(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], bool]:
    """Prompt, answer and label of a row.

    Raises:
        DataError: The row is malformed or its label isn't a boolean.
    """
    label = row.get("label")
    if not isinstance(label, bool):
        raise DataError(
            f"has {label!r} ({type(label).__name__}) in 'label'; expected true for an answer that is desirable, or "
            "false. Correct or remove the row."
        )
    if row.get("completion") is not None:
        prompt, answer = said(row, "prompt", "user"), said(row, "completion", "assistant")
    else:
        turns = from_messages(row)
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise DataError("has no assistant turn at the end of 'messages' that answers something. Add the answer.")
        prompt, answer = turns[:-1], turns[-1:]
    if not any(turn["role"] == "assistant" for turn in answer):
        raise DataError("has a 'completion' without an assistant turn. Give the answer the role assistant.")
    return _context(prompt), answer, label


def read_preferences(
    rows: Sequence[tuple[Mapping[str, Any], Conversation]], samples: Samples
) -> tuple[list[Conversation], list[str]]:
    """The samples of a source's rows, and what is wrong with those that can't be read.

    Args:
        rows: The columns of each row, and where it came from.
        samples: pairs or labels.
    """
    found: list[Conversation] = []
    errors: list[str] = []
    answers: list[list[Message]] = []
    for columns, origin in rows:
        try:
            if samples == "pairs":
                chosen, rejected = convert_pair(columns)
                found.append(replace(origin, messages=chosen, other=rejected))
            else:
                prompt, answer, label = convert_labelled(columns)
                answers.append(answer)
                found.append(replace(origin, messages=prompt + answer, other=prompt, desirable=label))
        except DataError as error:
            errors.append(f"{origin} {error}")
    if samples == "labels" and not errors:
        if len(found) < 2:
            errors.append(f"{found[0].source} has one row; labels need at least two, one to compare with the other.")
        found = [
            replace(sample, other=[*(sample.other or []), *answers[(number + 1) % len(answers)]])
            for number, sample in enumerate(found)
        ]
    return found, errors


class PreferenceDataset(Dataset):
    """Pairs of sequences from a set in which they are neighbours; an item is a list of samples.

    ``data[3]`` is a list of one, ``data[(3, 1)]`` a pack of two; index -1 is the filler. A sample is ``{"answers": [two
    of TokenDataset's], "sample": its index, "desirable": bool}``.

    Args:
        sequences: The two sequences of sample ``i`` at ``2 i`` and ``2 i + 1``.
    """

    def __init__(self, sequences: TokenDataset) -> None:
        self.sequences = sequences
        self._desirable = sequences.desirable[::2]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sequences) // 2

    def __getitem__(self, index: int | Pack) -> list[dict[str, Any]]:
        """The samples of a pack, or a single one in a list."""
        return [self._sample(one) for one in (index if isinstance(index, tuple) else (index,))]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, both of its sequences, ``[len(self)]`` int64."""
        return self.sequences.lengths.reshape(-1, 2).sum(1)

    @property
    def longest(self) -> np.ndarray:
        """Tokens of the longer sequence of each sample, ``[len(self)]`` int64."""
        return self.sequences.lengths.reshape(-1, 2).max(1)

    def origin(self, index: int) -> str:
        """``sample 17 of train.jsonl (line 18)``."""
        return self.sequences.origin(2 * index)

    def hashes(self) -> np.ndarray:
        """A hash of each sample's tokens and label, ``[len(self)]`` uint64."""
        first, second = self.sequences.hashes().reshape(-1, 2).T
        return first * np.uint64(0x9E3779B97F4A7C15) + second * np.uint64(3) + self._desirable.astype(np.uint64)

    def digests(self) -> list[bytes]:
        """As :meth:`hashes`, eight bytes each."""
        return [value.tobytes() for value in self.hashes()]

    def _sample(self, index: int) -> dict[str, Any]:
        places = (FILLER, FILLER) if index == FILLER else (2 * index, 2 * index + 1)
        desirable = index != FILLER and bool(self._desirable[index])
        return {"answers": [self.sequences[place] for place in places], "sample": index, "desirable": desirable}


@dataclass(frozen=True)
class PreferenceCollate:
    """Puts the sequences of samples into a batch, and says which is which.

    Attributes:
        pad_token_id: As of :class:`Collate`.
        pad_to_multiple_of: As of :class:`Collate`.
        packing: None for a row per sequence, padding_free for one row, best_fit for a row per item.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packing: Packing | None = None

    def __call__(self, items: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Return what :class:`Collate` or :class:`PackCollate` does, and four more.

        ``sequence`` ``[B, T]``: the number of the sequence that a token belongs to, -1 for none; sample ``i`` has
        ``2 i`` and ``2 i + 1``. ``sample`` ``[N]``: each sample's index in the data set. ``desirable`` ``[N]`` bool.
        ``valid`` ``[V]``: the samples that aren't fillers.
        """
        samples = [sample for item in items for sample in item]
        lines = [[answer] for sample in samples for answer in sample["answers"]]
        batch: dict[str, Tensor]
        if self.packing is None:
            batch = Collate(self.pad_token_id, self.pad_to_multiple_of)([line[0] for line in lines])
        else:
            if self.packing == "padding_free":
                lines = [[answer for line in lines for answer in line]]
            else:
                lines = [[answer for sample in item for answer in sample["answers"]] for item in items]
            packs = [pack_samples(line) for line in lines]
            batch = PackCollate(self.pad_token_id, self.pad_to_multiple_of)(packs)
        sequence = np.full(batch["input_ids"].shape, -1, np.int64)
        number = 0
        for places, line in zip(sequence, lines, strict=True):
            begin = 0
            for answer in line:
                end = begin + len(answer["input_ids"])
                places[begin:end] = number
                begin, number = end, number + 1
        index = torch.tensor([sample["sample"] for sample in samples])
        return {
            **batch,
            "sequence": torch.from_numpy(sequence),
            "sample": index,
            "desirable": torch.tensor([sample["desirable"] for sample in samples]),
            "valid": (index != FILLER).nonzero().flatten(),
        }


def _answer(row: Mapping[str, Any], name: str) -> list[Message]:
    """The turns of an answer: a text, a list of turns, or one turn; with role and content, or from and value."""
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in value):
        try:
            return from_sharegpt({"conversations": value})
        except DataError as error:
            raise DataError(str(error).replace("conversations", name)) from None
    return said({name: value} if name in row else {}, name, "assistant")


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """What is answered, from its own column."""
    if row.get("prompt") is not None:
        prompt = said(row, "prompt", "user")
        if isinstance(row.get("system"), str) and row["system"] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": row["system"]}, *prompt]
    elif row.get("conversations") is not None:
        prompt = from_sharegpt(row, True)
    else:
        raise DataError(
            "has answers in 'chosen' and 'rejected', but no prompt. Add the column 'prompt', or give whole "
            "conversations."
        )
    return prompt


def _apart(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The common beginning of two conversations, and what follows in each."""
    same = 0
    for left, right in zip(_texts(chosen), _texts(rejected), strict=False):
        if left != right:
            break
        same += 1
    if same == len(chosen) == len(rejected):  # told by whoever compares the answers
        same -= 1
    if not same:
        raise DataError(
            "has 'chosen' and 'rejected' with different first turns; expected two answers to the same prompt. Give "
            "conversations with the same beginning, or the answers alone and a column 'prompt'."
        )
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) == same:
            raise DataError(f"has nothing in '{name}' that the other doesn't begin with. Correct or remove the row.")
        if turns[same]["role"] != "assistant":
            raise DataError(
                f"has different prompts: turn {same} of '{name}', where 'chosen' and 'rejected' part, is the "
                f"{turns[same]['role']}'s; expected an answer. Correct or remove the row."
            )
    return chosen[:same], chosen[same:], rejected[same:]


def _context(prompt: list[Message]) -> list[Message]:
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in prompt]


def _texts(turns: list[Message]) -> list[Message]:
    return [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
