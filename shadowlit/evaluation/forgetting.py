"""Forgetting: how far a model has moved from the untouched Instruct on what that one said before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shadowlit.data.collate import Collate
from shadowlit.data.sources import collect, read_conversations
from shadowlit.data.template import Encoded, encode_turns
from shadowlit.errors import DataError
from shadowlit.evaluation.evaluator import Evaluator, Findings, Scene
from shadowlit.evaluation.rows import fingerprint, spread
from shadowlit.evaluation.sums import SampleSums, mean, standard_error
from shadowlit.pair import ModelPair
from shadowlit.training.objective import IGNORE

_CHUNK = 1024  # positions whose distributions are in float32 at a time


class Divergence(Evaluator):
    """KL divergence from the untouched Instruct, token by token, on given conversations.

    ``KL(subject ‖ reference) = Σ_v p(v) (log p(v) − log r(v))`` in nats, the mean over the tokens that the assistant
    says in the rows, each predicted from the row's own text before it (teacher-forced): what the model would say next,
    had it said the same until then. 0 means that nothing has changed there. The direction is that of the penalty in
    RLHF (arXiv 2203.02155). Not an expectation over the model's own answers, which would need sampling.

    Metrics: ``kl``; ``agreement``, the share of tokens whose most probable one is the same in both, which is the
    ``score``; ``stderr`` of ``kl`` over rows; ``num_tokens``, ``num_samples``. Samples: ``index``, ``score``, ``kl``.

    The two models' weights stand in one module in turn, so every batch costs two swaps: few large batches are best.

    Args:
        data: Conversations, as for training. A row that the template splits gives several samples of its index.
        max_length: Longest row, in tokens; a longer one is an error.
        every: Run in every so many-th validation, and in the last one.
        limit: Use only so many rows, evenly spread over the file; null for all.
        batch_size: Rows per process and forward.
    """

    needs_reference = True

    def __init__(
        self, data: str, max_length: int = 4096, every: int = 1, limit: int | None = None, batch_size: int = 16
    ) -> None:
        super().__init__(every, limit, batch_size)
        self.data, self.max_length = data, max_length
        self._rows: list[tuple[int, Encoded]] | None = None
        self._pad = 0

    def read(self, pair: ModelPair, template_kwargs: dict[str, Any]) -> None:
        """Read and tokenise the conversations.

        Raises:
            DataError: No rows, malformed ones, or too long ones; up to five problems in one message.
        """
        tokenizer = pair.tokenizer()
        chosen = spread(read_conversations(self.data, use="validation"), self.limit)

        def encode(conversation: Any) -> list[tuple[int, Encoded]]:
            samples = encode_turns(tokenizer, conversation.messages, **template_kwargs)
            longest = max(len(sample.input_ids) for sample in samples)
            if longest > self.max_length:
                raise DataError(
                    f"{conversation} has {longest} tokens. Raise max_length={self.max_length}, or shorten it."
                )
            return [(conversation.row, sample) for sample in samples]

        self._rows = [row for rows in collect(encode, chosen) for row in rows]
        self._rows.sort(key=lambda row: -len(row[1].input_ids))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = pad if isinstance(pad, int) else 0

    def run(self, scene: Scene) -> Findings:
        """Measure; a collective, to be called on all ranks alike."""
        assert self._rows is not None, "read() comes before run()"
        collate = Collate(self._pad)
        sums = SampleSums("kl", "agreement", "num_tokens", "row_kl", "row_kl_squared").to(scene.device)
        samples: list[dict[str, Any]] = []
        for rows in self.own(len(self._rows), scene):
            own = [self._rows[row] for row in rows if row >= 0]
            encoded = [sample for _, sample in own] or [Encoded([self._pad] * 2, [IGNORE] * 2)]
            batch = collate([{"input_ids": e.input_ids, "labels": e.labels} for e in encoded])
            ids, mask = batch["input_ids"].to(scene.device), batch["attention_mask"].to(scene.device)
            chosen = batch["labels"][:, 1:].to(scene.device) != IGNORE
            logits = scene.logits(ids, mask)[:, :-1][chosen]
            with scene.reference():
                reference = scene.logits(ids, mask)[:, :-1][chosen]
            kl, agrees = divergence(logits, reference)
            counts = chosen.sum(1).tolist()
            found = []
            for (index, _), row_kl, row_agrees in zip(own, kl.split(counts), agrees.split(counts), strict=False):
                total, same, num = row_kl.sum().item(), row_agrees.sum().item(), len(row_kl)
                per_token = total / max(1, num)
                found.append({"kl": total, "agreement": same, "num_tokens": num, "row_kl": per_token,
                              "row_kl_squared": per_token**2})  # fmt: skip
                samples.append({"index": index, "score": same / max(1, num), "kl": per_token})
            sums.update(found)
        total = sums.compute()
        agreement = mean(total["agreement"], total["num_tokens"])
        return Findings(
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
        """A hash of the tokenised rows."""
        assert self._rows is not None, "read() comes before signature()"
        return fingerprint(type(self).__name__, self._rows)


def divergence(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(p ‖ r)`` at each position, and whether both have the same most probable token.

    Args:
        logits: ``[N, V]`` of p, any floating dtype; computed in float32, a chunk of positions at a time.
        reference: ``[N, V]`` of r.

    Returns:
        ``[N]`` float64 in nats, at least 0 but for rounding, and ``[N]`` bool.
    """
    parts, same = [], []
    for p, r in zip(logits.split(_CHUNK), reference.split(_CHUNK), strict=True):
        log_p, log_r = p.float().log_softmax(-1), r.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_r)).sum(-1).double())
        same.append(p.argmax(-1) == r.argmax(-1))
    if not math.prod(logits.shape):
        return logits.new_zeros(0, dtype=torch.float64), logits.new_zeros(0, dtype=torch.bool)
    return torch.cat(parts), torch.cat(same)
