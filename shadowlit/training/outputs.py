"""What an objective may ask a model for: the outputs for one batch, in several forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from shadowlit.data.images import IMAGE_INPUTS
from shadowlit.errors import ShadowlitError
from shadowlit.training.head import HeadLoss, LogitsFunction, Watch
from shadowlit.training.objective import TokenSums, sum_tokens, supervised_positions
from shadowlit.training.reference import sum_by_sequence

Batch = Mapping[str, Tensor]
# The four before the images belong to packed rows, for attention that takes their borders instead of a mask.
_INPUTS = ("input_ids", "attention_mask", "position_ids",
           "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", *IMAGE_INPUTS)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Two answers to each of ``N`` prompts: chosen and rejected, or the labelled one and one to another prompt.

    Attributes:
        logps: ``[N, 2]`` float64, log-probabilities summed over the answer's tokens, in nats.
        lengths: ``[N, 2]`` float64, number of tokens of each answer.
        desirable: ``[N]`` bool, label of the first answer; true in pairs.
        reference: ``[N, 2]``, ``logps`` under the reference; None where there is none.
        kl: Distance of the policy from the reference in nats, at least 0, with which KTO compares log-ratios.
    """

    logps: Tensor
    lengths: Tensor
    desirable: Tensor
    reference: Tensor | None = None
    kl: Tensor | float = 0.0

    @property
    def ratios(self) -> Tensor:
        """``[N, 2]``: log-probabilities minus those of the reference."""
        assert self.reference is not None
        return self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """``[N, 2]``: log-probabilities per token."""
        return self.logps / self.lengths


class Outputs:
    """The model's outputs for one batch; nothing is computed before it is asked for.

    Each method runs the model once, so call one of them per batch. All but :meth:`logits` compute the logits of a chunk
    of supervised tokens at a time where the model's head allows it (:class:`shadowlit.training.head.HeadLoss`), so that
    those of a whole batch never exist. With gradients enabled the results have a gradient.

    Args:
        head: The model's losses.
        batch: ``input_ids`` and ``labels``, int64 ``[B, T]``, and the other inputs of the model.
        reference: Function from indices of samples ``[N]`` to the ``[N, 2]`` log-probabilities of their answers under
            the reference; None where there is none.

    Attributes:
        batch: The batch.
        positions: ``[N]``, int64, the hidden states that predict a supervised token, as indices into ``B * T``.
        targets: ``[N]``, int64, the supervised tokens.
    """

    def __init__(self, head: HeadLoss, batch: Batch, reference: Callable[[Tensor], Tensor] | None = None) -> None:
        self.batch = batch
        self._head, self._reference = head, reference
        positions = batch.get("supervised")
        if positions is None:
            positions = supervised_positions(batch["labels"], batch.get("position_ids"))
        self.positions = positions
        self.targets = batch["labels"].flatten().index_select(0, positions + 1)

    def loss(self) -> Tensor:
        """The summed cross entropy of the supervised tokens in nats, a float32 scalar."""
        return self._head.loss(model_inputs(self.batch), self.positions, self.targets)

    def token_log_probs(self) -> Tensor:
        """The log-probabilities of the supervised tokens in nats, float32 ``[N]``."""
        return self._head.token_log_probs(model_inputs(self.batch), self.positions, self.targets)

    def map_logits(self, function: LogitsFunction) -> Tensor:
        """``function(logits, targets)`` of all supervised tokens, ``[N]``.

        Args:
            function: Function from float32 logits ``[n, V]`` and int64 targets ``[n]`` of a chunk to one number per
                token, ``[n]``. It is called again in the backward pass, so it must depend on nothing else that changes.
        """
        return self._head.map_logits(model_inputs(self.batch), self.positions, self.targets, function)

    def logits(self) -> Tensor:
        """The logits of all positions, ``[B, T, V]``; the label at ``t`` is predicted at ``t - 1``."""
        return self._head.model(**model_inputs(self.batch), use_cache=False).logits

    def token_sums(self, watch: Watch | None = None) -> TokenSums:
        """The sums that validation metrics are made of, without a gradient.

        Args:
            watch: Function that is called with float32 logits ``[n, V]`` and int64 targets ``[n]`` of every chunk.
        """
        losses, correct = self._head.token_losses(model_inputs(self.batch), self.positions, self.targets, watch)
        return sum_tokens(losses, correct, self.positions, self.batch["labels"], self.batch.get("position_ids"))

    def answers(self, with_reference: bool) -> Answers:
        """The log-probabilities of the answers of a batch of preferences.

        Args:
            with_reference: Whether to look up what the reference makes of them.

        Raises:
            ShadowlitError: The batch holds conversations, or the reference hasn't been measured.
        """
        batch = self.batch
        if "sequence" not in batch:
            raise ShadowlitError(
                "model.objective learns from preferences, but a batch holds conversations. Set samples of ShadowData "
                "to the objective's, pairs or labels, or model.objective to SFT."
            )
        sequence = batch["sequence"].flatten().index_select(0, self.positions)
        sums, counts = sum_by_sequence(self.token_log_probs(), sequence, 2 * len(batch["sample"]))
        valid = batch["valid"]
        logps, lengths = (x.view(-1, 2).index_select(0, valid) for x in (sums, counts))
        reference = None
        if with_reference:
            assert self._reference is not None
            reference = self._reference(batch["sample"].index_select(0, valid))
        return Answers(logps, lengths, batch["desirable"].index_select(0, valid), reference)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """The entries of a batch that the model takes."""
    return {name: batch[name] for name in _INPUTS if name in batch}
