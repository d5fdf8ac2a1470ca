"""What an objective may ask a model for: the outputs for one batch in several forms, and those of the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from shadowlit.data.images import IMAGE_INPUTS
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.grafting.subject import Subject
from shadowlit.plugins import described
from shadowlit.training.head import HeadLoss, LogitsFunction, Predictions, Watch
from shadowlit.training.linear_loss import cross_entropies
from shadowlit.training.objective import TokenSums, sum_tokens, supervised_positions

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
        """``[N, 2]``: log-probabilities minus those of the reference; a ShadowlitError if there is none."""
        if self.reference is None:
            raise ShadowlitError(
                "model.objective compares answers with a reference, but its has_reference is false. Set it to true."
            )
        return self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """``[N, 2]``: log-probabilities per token."""
        return self.logps / self.lengths


class Outputs:
    """The model's outputs for one batch of ``input_ids`` and ``labels``, int64 ``[B, T]``, computed on demand.

    Each method runs the model once, so call one of them per batch. All except :meth:`logits` compute the logits of
    a chunk of supervised tokens at a time where the model's head allows it (:class:`shadowlit.training.head.HeadLoss`),
    so that those of a whole batch never exist. With gradients enabled the results have a gradient.

    Attributes:
        batch: The batch.
        positions: ``[N]``, int64, the hidden states that predict a supervised token, as indices into ``B * T``.
        targets: ``[N]``, int64, the supervised tokens.
        weights: ``[N]``, float32, factors of the supervised tokens' losses in training; None where all of them are 1.
    """

    def __init__(
        self,
        head: HeadLoss,
        batch: Batch,
        reference: Callable[[Tensor], Tensor] | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        # The reference gives the log-probabilities [N, 2] of the answers of samples [N]; predictions are a reference's
        # for the supervised tokens of this batch.
        self.batch = batch
        self._head, self._reference, self._predictions = head, reference, predictions
        positions = batch.get("supervised")
        if positions is None:
            positions = supervised_positions(batch["labels"], batch.get("position_ids"))
        self.positions = positions
        self.targets = batch["labels"].flatten().index_select(0, positions + 1)
        self.weights: Tensor | None = None
        if "loss_weights" in batch:
            self.weights = batch["loss_weights"].flatten().index_select(0, positions + 1)
        self._has_divisor = False

    def loss(self) -> Tensor:
        """Return the weighted sum of the cross entropies of the supervised tokens in nats, a float32 scalar."""
        return self._head.loss(model_inputs(self.batch), self.positions, self.targets, self.weights)

    def weighted_sum(self, losses: Tensor) -> Tensor:
        """Return the sum of losses ``[N]``, each multiplied by the weight of its token."""
        return losses.sum() if self.weights is None else (self.weights * losses).sum()

    def total_weight(self) -> Tensor | int:
        """Return the sum of the weights, by which the loss is divided: the number of supervised tokens if there are
        none.
        """
        self._has_divisor = True
        weights = self.weights
        return len(self.targets) if weights is None else weights.sum(dtype=accumulation_dtype(weights.device))

    @property
    def ignores_weights(self) -> bool:
        """Whether tokens have weights, and nothing has asked for their sum."""
        return self.weights is not None and not self._has_divisor

    def token_log_probs(self) -> Tensor:
        """Return the log-probabilities of the supervised tokens in nats, float32 ``[N]``."""
        return -self.map_logits(cross_entropies)

    def map_logits(self, function: LogitsFunction, columns: int | None = None) -> Tensor:
        """``function(logits, targets)`` of all supervised tokens, ``[N]``, or ``[N, columns]``.

        Args:
            function: Function from float32 logits ``[n, V]`` and int64 targets ``[n]`` of a chunk to one number per
                token, ``[n]``. It is called again in the backward pass, so it must depend on nothing else that changes.
                In a training step of an objective with a ``token_reference``, its third argument is the reference's
                float32 logits ``[n, V]``, without a gradient.
            columns: Numbers per token, where the function returns several, ``[n, columns]``.

        Raises:
            ShadowlitError: The function returns something else.
        """
        name = getattr(function, "__qualname__", function)

        def checked(logits: Tensor, targets: Tensor, *reference: Tensor) -> Tensor:
            shape = targets.shape if columns is None else torch.Size((len(targets), columns))
            return require_shape(function(logits, targets, *reference), shape, name)

        inputs = model_inputs(self.batch)
        return self._head.map_logits(inputs, self.positions, self.targets, checked, self._predictions)

    def predictions(self, known: Predictions | None, live: bool) -> Predictions:
        """Return what the model predicts for the supervised tokens; arguments as of :meth:`HeadLoss.predict`."""
        return self._head.predict(model_inputs(self.batch), self.positions, known, live)

    def logits(self) -> Tensor:
        """Return the logits of all positions, ``[B, T, V]``; the label at ``t`` is predicted at ``t - 1``."""
        return self._head.model(**model_inputs(self.batch), use_cache=False).logits

    def token_sums(self, watch: Watch | None = None) -> TokenSums:
        """Return the sums of validation metrics, without a gradient; ``watch`` as of :meth:`HeadLoss.token_losses`."""
        losses, correct = self._head.token_losses(model_inputs(self.batch), self.positions, self.targets, watch)
        return sum_tokens(losses, correct, self.positions, self.batch["labels"], self.batch.get("position_ids"))

    def answers(self, with_reference: bool) -> Answers:
        """Return the log-probabilities of the answers of a batch of preferences, on request with those of the
        reference.

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
        sums, counts = _sum_by_sequence(self.token_log_probs(), sequence, 2 * len(batch["sample"]))
        valid = batch["valid"]
        logps, lengths = (x.view(-1, 2).index_select(0, valid) for x in (sums, counts))
        reference = None
        if with_reference:
            assert self._reference is not None
            reference = self._reference(batch["sample"].index_select(0, valid))
        return Answers(logps, lengths, batch["desirable"].index_select(0, valid), reference)


def is_number(value: Any) -> bool:
    """Return whether this is a number, of Python or numpy, or a tensor of one."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def require_shape(value: Any, shape: torch.Size, function: Any) -> Tensor:
    """Return ``value``, which a function of ``model.objective`` has returned, if it is a tensor of this shape."""
    if isinstance(value, Tensor) and value.shape == shape:
        return value
    raise ShadowlitError(
        f"model.objective: {function} returns {described(value)}; expected a tensor of shape {[*shape]}, one "
        f"{'loss a token or sample' if len(shape) == 1 else 'reward an answer'}. Correct the function."
    )


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the entries of a batch that the model takes."""
    return {name: batch[name] for name in _INPUTS if name in batch}


class References:
    """What the untouched models predict: for preferences, the log-probabilities of answers by data set, on the device
    (16 bytes a sample); for a comparison of tokens, :attr:`predictions` for the micro-batch that is trained on next.
    """

    def __init__(self) -> None:
        self.predictions: Predictions | None = None
        self._known: dict[tuple[Subject, str], tuple[Any, Tensor]] = {}

    def lacking(self, who: Subject, sets: dict[str, Any]) -> list[str]:
        """Return the names of ``sets`` that haven't been measured with the weights of ``who``, or were read again."""
        known = self._known
        return [name for name, one in sets.items() if (who, name) not in known or known[who, name][0] is not one]

    def keep(self, who: Subject, name: str, dataset: Any, logps: Tensor) -> None:
        """Remember ``[len(dataset), 2]`` log-probabilities."""
        self._known[who, name] = dataset, logps

    def look_up(self, who: Subject, name: str, samples: Tensor) -> Tensor:
        """Return the log-probabilities of some samples of a set, ``[N, 2]`` for indices ``[N]``.

        Raises:
            ShadowlitError: The set hasn't been measured.
        """
        if (who, name) not in self._known:
            raise ShadowlitError(
                f"the objective compares with the start of the model, but the {who.name}'s log-probabilities of "
                f"'{name}' are unknown. Expected a GraftCallback, which measures them, among the trainer's callbacks; "
                "add one, or choose an objective without a reference: SimPO, ORPO, CPO, ASFT."
            )
        logps = self._known[who, name][1]
        return logps.to(samples.device).index_select(0, samples)


def _sum_by_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Sums and counts ``[num_sequences]`` of values ``[N]`` by their sequence ``[N]``, in float64 (not on MPS)."""
    dtype = accumulation_dtype(values.device)
    sums, counts = values.new_zeros(2, num_sequences, dtype=dtype).unbind()
    ones = torch.ones_like(values, dtype=dtype).detach()
    return sums.index_add(0, sequence, values.to(dtype)), counts.index_add(0, sequence, ones)
