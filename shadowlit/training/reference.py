"""What the weights at the start make of the answers: measured once per data set, looked up in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowlit.errors import ShadowlitError
from shadowlit.grafting.arithmetic import accumulation_dtype

BASE, INSTRUCT = "base", "instruct"


def start_of(subject: str) -> str:
    """Whose weights a subject started from: the Base for what is trained, the Instruct for what is grafted."""
    return INSTRUCT if subject.startswith(("grafted", INSTRUCT)) else BASE


class References:
    """Summed log-probabilities of answers under the untouched Base and Instruct, by data set.

    They stay on the device: 16 bytes a sample, and no step has to wait for them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Any, Tensor]] = {}

    def lacking(self, who: str, sets: dict[str, Any]) -> list[str]:
        """The names of ``sets`` that haven't been measured with the weights of ``who``; a set read anew counts."""
        known = self._known
        return [name for name, one in sets.items() if (who, name) not in known or known[who, name][0] is not one]

    def keep(self, who: str, name: str, dataset: Any, logps: Tensor) -> None:
        """Remember ``[len(dataset), 2]`` log-probabilities."""
        self._known[who, name] = dataset, logps

    def look_up(self, who: str, name: str, samples: Tensor) -> Tensor:
        """The log-probabilities of some samples of a set, ``[N, 2]`` for indices ``[N]``.

        Raises:
            ShadowlitError: The set hasn't been measured.
        """
        if (who, name) not in self._known:
            raise ShadowlitError(
                f"the objective compares with the start of the model, but nothing is known of what the {who} makes of "
                f"'{name}'. Expected a GraftCallback, which holds the start, among the trainer's callbacks; add one, "
                "or choose an objective without a reference: SimPO, ORPO, CPO, ASFT."
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
