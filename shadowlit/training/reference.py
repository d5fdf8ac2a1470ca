"""Log-probabilities of the answers under the weights at the start: measured once per data set, then looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowlit.errors import ShadowlitError
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.grafting.subject import Subject


class References:
    """Summed log-probabilities of answers under the untouched Base and Instruct, by data set.

    They stay on the device: 16 bytes a sample, and no step has to wait for them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Subject, str], tuple[Any, Tensor]] = {}

    def lacking(self, who: Subject, sets: dict[str, Any]) -> list[str]:
        """The names of ``sets`` that haven't been measured with the weights of ``who``, or were read again."""
        known = self._known
        return [name for name, one in sets.items() if (who, name) not in known or known[who, name][0] is not one]

    def keep(self, who: Subject, name: str, dataset: Any, logps: Tensor) -> None:
        """Remember ``[len(dataset), 2]`` log-probabilities."""
        self._known[who, name] = dataset, logps

    def look_up(self, who: Subject, name: str, samples: Tensor) -> Tensor:
        """The log-probabilities of some samples of a set, ``[N, 2]`` for indices ``[N]``.

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


def sum_by_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of tokens by sequence, in float64 (but on MPS), so that their order makes no difference.

    Args:
        values: ``[N]``.
        sequence: ``[N]`` int64, from 0 to below ``num_sequences``.
        num_sequences: How many there are.

    Returns:
        Two tensors ``[num_sequences]``.
    """
    dtype = accumulation_dtype(values.device)
    sums, counts = values.new_zeros(2, num_sequences, dtype=dtype).unbind()
    ones = torch.ones_like(values, dtype=dtype).detach()
    return sums.index_add(0, sequence, values.to(dtype)), counts.index_add(0, sequence, ones)
