"""Scores of models on chat rows, row by row: loss, first token, exactness, and divergence from the Instruct.

Models compute in float32; a graft is rounded to the dtype of the Instruct's files first, as its export is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.sources import read_conversations
from shadowlit.data.template import Encoded, encode_turns
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError, first_line
from shadowlit.grafting.arithmetic import add_delta

BATCH_SIZE = 8
COLUMNS = ("loss", "tokens", "first", "exact", "kl")
"""Numbers of a row: summed loss in nats, supervised tokens, loss of the first one, whether every token is the most
probable one, and the summed KL divergence from the Instruct in nats (empty where it is not measured)."""


@dataclass
class Scorer:
    """Scores weights that are loaded into one model, on encoded rows.

    Args:
        instruct: Folder of the Instruct: its weights are the reference of the divergence, its tokenizer reads the rows.
        sets: Files of rows by their names.
        condensed: Sets whose rows are summarised by a single one, see :func:`condense`.
    """

    instruct: Path
    sets: dict[str, Path]
    condensed: frozenset[str] = frozenset()
    reference: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.instruct)
        self.model = AutoModelForCausalLM.from_pretrained(self.instruct, dtype=torch.float32).eval()
        self.stored = AutoConfig.from_pretrained(self.instruct).dtype
        self.head = self.model.get_output_embeddings().weight.detach().clone()
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.rows = {name: self.read(file) for name, file in self.sets.items()}

    def read(self, file: Path) -> list[Encoded]:
        """Token ids and labels of a file's rows, as a training reads them."""
        found = read_conversations(str(file), use="validation", strict=True)
        turns = [encode_turns(self.tokenizer, conversation.messages) for conversation in found]
        return [encoded for (encoded,) in turns]

    def load(self, folder: Path) -> None:
        """Load another model's weights."""
        self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())

    def load_graft(self, delta: Delta, scale: float, onto: Path | None = None) -> None:
        """Load ``Instruct + scale * delta``, rounded as its export is; or the same on another model, ``onto``."""
        if onto is None:
            self.model.load_state_dict(self.weights)
        else:
            self.load(onto)
        own = self.model.state_dict()
        for name in delta.shapes:
            own[name].copy_(add_delta(own[name], delta.tensor(name), scale).to(self.stored))

    @torch.no_grad()
    def measure(self, name: str, *, keep: bool = False, divergence: bool = True) -> list[list[float]]:
        """The numbers :data:`COLUMNS` of every row of a set.

        Args:
            name: Name of the set.
            keep: Remember the hidden states as the reference of the divergence.
            divergence: Measure the divergence from the reference.
        """
        found: dict[int, list[float]] = {}
        kept: dict[int, Tensor] = {}
        for rows, inputs in self._batches(name):
            hidden = self.model.model(**inputs).last_hidden_state
            for place, row in enumerate(rows):
                labels = torch.tensor(self.rows[name][row].labels)
                at = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
                states, targets = hidden[place, at], labels[at + 1]
                logs = (states @ self.model.get_output_embeddings().weight.T).log_softmax(-1)
                losses = -logs.gather(1, targets[:, None])[:, 0]
                exact = bool((logs.argmax(-1) == targets).all())
                found[row] = [float(losses.sum()), len(targets), float(losses[0]), float(exact)]
                if keep:
                    kept[row] = states
                elif divergence:
                    others = (self.reference[name][row] @ self.head.T).log_softmax(-1)
                    found[row].append(float((logs.exp() * (logs - others)).sum()))
        if keep:
            self.reference[name] = kept
        scores = [found[row] for row in sorted(found)]
        return [
            [round(number, 5) for number in row] for row in (condense(scores) if name in self.condensed else scores)
        ]

    def _batches(self, name: str) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows of similar length, padded on the right."""
        rows = self.rows[name]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids))
        for start in range(0, len(order), BATCH_SIZE):
            some = order[start : start + BATCH_SIZE]
            longest = max(len(rows[row].input_ids) for row in some)
            ids = torch.zeros(len(some), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(some):
                length = len(rows[row].input_ids)
                ids[place, :length] = torch.tensor(rows[row].input_ids)
                mask[place, :length] = 1
            yield some, {"input_ids": ids, "attention_mask": mask}


def read_reference(file: Path, rows: Mapping[str, Sequence[Encoded]]) -> dict[str, dict[int, Tensor]]:
    """Return the reference of the divergence from a file: by set and row, the untouched Instruct's states.

    Raises:
        DataError: The file is damaged: it is no such file, has other rows than ``rows``, or numbers that aren't finite.
    """
    try:
        found: dict[str, dict[int, Tensor]] = torch.load(file, weights_only=True)
        expected = {name: set(range(len(own))) for name, own in rows.items()}
        if {name: set(states) for name, states in found.items()} != expected:
            raise ValueError("it does not have the states of all rows")
        if not all(state.isfinite().all() for states in found.values() for state in states.values()):
            raise ValueError("its states are not finite")
    except Exception as error:  # of pickle, zipfile or torch: many types, one meaning
        raise DataError(f"{file} is damaged ({first_line(error)}). Remove it: the study measures it again.") from error
    return found


def condense(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """One row for many: sums of losses, tokens and divergences, means of the first token's loss and of exactness."""
    columns = [sum(column) for column in zip(*scores, strict=True)]
    return [[x / len(scores) if name in ("first", "exact") else x for name, x in zip(COLUMNS, columns, strict=False)]]


def gradient_norm(folder: Path, rows: list[Encoded]) -> tuple[float, float]:
    """Loss per token of some rows, and the norm of its gradient by all weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:])
    total = 0.0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        (loss / tokens).backward()
        total += loss.item()
    squares = sum(float(p.grad.square().sum(dtype=torch.float64)) for p in model.parameters() if p.grad is not None)
    return total / tokens, squares**0.5
