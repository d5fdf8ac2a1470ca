"""Forgetting: the distance of a model from the untouched Instruct on given conversations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowlit.arguments import takes_plain_values
from shadowlit.data.collate import Collate
from shadowlit.data.conversation import IGNORE_INDEX, Conversation, collect
from shadowlit.data.formats import DOCUMENT
from shadowlit.data.sources import read_conversations
from shadowlit.data.template import Encoded, encode_document, encode_turns
from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import EvalContext, EvalResult, Evaluator
from shadowlit.evaluation.rows import fingerprint, spread
from shadowlit.evaluation.sums import SampleSums, mean, standard_error
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import on_device
from shadowlit.training.objective import supervised_positions

_CHUNK = 1024  # positions whose distributions are in float32 at a time


@takes_plain_values("evaluator")
class Divergence(Evaluator):
    """KL divergence from the untouched Instruct, token by token, on given conversations.

    ``KL(subject ‖ reference) = Σ_v p(v) (log p(v) − log r(v))`` in nats, the mean over the assistant's tokens in the
    rows, each predicted from the row's own text before it (teacher-forced). 0 means that nothing has changed there. The
    direction is that of the penalty in RLHF (arXiv 2203.02155). Not an expectation over the model's own answers, which
    would need sampling.

    Metrics: ``kl``; ``agreement``, the share of tokens whose most probable one is the same in both, which is the
    ``score``; ``stderr`` of ``kl`` over rows; ``num_tokens``, ``num_samples``. Samples: ``index``, ``score``, ``kl``.

    The two models' weights are swapped into one module in turn, so every batch costs two swaps: use few large batches.
    Where the chat template rewrites the history, a row is read once for each of its turns, as in training. Of plain
    text every token counts that has one before it.

    Example::

        EvaluationCallback({"chat": Divergence("chat.jsonl", limit=64)})

    Args:
        data: Conversations or plain text, as for training.
        max_length: Longest row, in tokens; a longer conversation is an error, a longer text is cut into pieces.
        every: Run in the first validation, in every *n*-th validation after it, and in the last one.
        limit: Number of rows to use, evenly spread over the file; null for all.
        batch_size: Rows per process and forward pass.
        ignore_columns: Columns of the rows that are not for the model, as in data.ignore_columns.
    """

    needs_reference = True
    metric_names = ("score", "agreement", "kl", "stderr", "num_tokens", "num_samples")

    def __init__(
        self,
        data: str,
        max_length: int = 4096,
        every: int = 1,
        limit: int | None = None,
        batch_size: int = 16,
        ignore_columns: list[str] = [],  # noqa: B006 - read only, and shown by --help
    ) -> None:
        super().__init__(every, limit, batch_size)
        self.data, self.max_length, self.ignore_columns = data, max_length, list(ignore_columns)
        self._rows: list[tuple[int, list[Encoded]]] | None = None
        self._pad = 0

    def read(self, pair: ModelPair, template_kwargs: dict[str, Any]) -> None:
        """Read and tokenise the rows; refuse malformed ones, too long ones, and ones without supervised tokens."""
        tokenizer, end = pair.tokenizer(), pair.other_tokenizer().eos_token_id
        found = read_conversations(self.data, use="validation", strict=False, ignore=self.ignore_columns)
        chosen = spread(found, self.limit)

        def encode(conversation: Conversation) -> tuple[int, list[Encoded]]:
            first = conversation.messages[0]
            if first["role"] == DOCUMENT:
                end_token_id = end if isinstance(end, int) else None
                turns = encode_document(tokenizer, first["content"], end_token_id, self.max_length)
            else:
                turns = encode_turns(
                    tokenizer, conversation.messages, **{"tools": conversation.tools, **template_kwargs}
                )
            if all(label == IGNORE_INDEX for turn in turns for label in turn.labels):
                raise DataError("has no supervised token. Remove it, or its 'train' or 'weight'.")
            if (longest := _longest(turns)) > self.max_length:
                raise DataError(f"has {longest} tokens. Raise max_length={self.max_length}, or shorten it.")
            return conversation.row, turns

        self._rows = sorted(collect(encode, chosen), key=lambda row: -_longest(row[1]))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = pad if isinstance(pad, int) else 0

    def run(self, context: EvalContext) -> EvalResult:
        """Measure; a collective, to be called on all ranks alike."""
        assert self._rows is not None, "read() comes before run()"
        sums = on_device(SampleSums("kl", "agreement", "num_tokens", "row_kl", "row_kl_squared"), context.device)
        samples: list[dict[str, Any]] = []
        # Of all ranks' rows, so that all run equally many forwards.
        most_turns = max(len(turns) for _, turns in self._rows)
        for rows in self.rank_batches(len(self._rows), context):
            own = [self._rows[row] for row in rows if row >= 0]
            totals = torch.zeros(len(own), 3, dtype=torch.float64)
            for turn in range(most_turns):
                present = [i for i, (_, turns) in enumerate(own) if turn < len(turns)]
                found = self._compare([own[i][1][turn] for i in present], context)
                totals[present] += found
            for (index, _), (kl, same, num) in zip(own, totals.tolist(), strict=True):
                sums.update([{"kl": kl, "agreement": same, "num_tokens": num, "row_kl": kl / num,
                              "row_kl_squared": (kl / num) ** 2}])  # fmt: skip
                samples.append({"index": index, "score": same / num, "kl": kl / num})
        total = sums.compute()
        agreement = mean(total["agreement"], total["num_tokens"])
        return EvalResult(
            {
                "score": agreement,
                "agreement": agreement,
                "kl": mean(total["kl"], total["num_tokens"]),
                "stderr": standard_error(total["row_kl"], total["row_kl_squared"], total["num_samples"]),
                "num_tokens": total["num_tokens"],
                "num_samples": total["num_samples"],
            },
            sorted(samples, key=lambda sample: sample["index"]),
        )

    def signature(self) -> str:
        """Return a hash of the tokenised rows."""
        assert self._rows is not None, "read() comes before signature()"
        return fingerprint(type(self).__name__, self._rows)

    def _compare(self, encoded: list[Encoded], context: EvalContext) -> Tensor:
        """``[B, 3]`` float64 on the CPU: summed divergence, agreeing tokens and tokens of each; two forwards always."""
        filler = Encoded([self._pad] * 2, [IGNORE_INDEX] * 2)
        batch = Collate(self._pad)([{"input_ids": e.input_ids, "labels": e.labels} for e in encoded or [filler]])
        ids, mask = batch["input_ids"].to(context.device), batch["attention_mask"].to(context.device)
        positions = supervised_positions(batch["labels"])
        here = positions.to(context.device)
        logits = context.logits_at(ids, mask, here)
        with context.reference():
            reference = context.logits_at(ids, mask, here)
        kl, same = (values.cpu() for values in divergence(logits, reference))
        values = torch.stack([kl, same, torch.ones_like(kl)], dim=1).double()
        num_rows, length = batch["labels"].shape
        row = positions // length
        return torch.zeros(num_rows, 3, dtype=torch.float64).index_add_(0, row, values)[: len(encoded)]


def divergence(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(p ‖ r)`` ``[N]``, float64 in nats, and whether both have the same most probable token, bool ``[N]``.

    From logits ``[N, V]`` of p and of r, of any floating dtype, in float32. A token of probability 0 adds 0.
    """
    parts, same = [], []
    for some, others in zip(logits.split(_CHUNK), reference.split(_CHUNK), strict=True):
        log_p, log_r = some.float().log_softmax(-1), others.float().log_softmax(-1)
        p = log_p.exp()
        # 0 · log 0 = 0, but a NaN stays one.
        parts.append(torch.where(p == 0, 0, p * (log_p - log_r)).sum(-1).to(accumulation_dtype(p.device)))
        same.append(some.argmax(-1) == others.argmax(-1))
    return torch.cat(parts), torch.cat(same)


def _longest(turns: list[Encoded]) -> int:
    return max((len(turn.input_ids) for turn in turns), default=0)
