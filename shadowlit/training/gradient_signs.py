"""Signs of the loss's gradient at the untouched Instruct, by the majority of a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.headers import some_of
from shadowlit.distributed import local, on_all_ranks
from shadowlit.errors import GraftError
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.subject import INSTRUCT
from shadowlit.training.gradients import gradients_of
from shadowlit.training.head import HeadLoss
from shadowlit.training.objectives import Objective
from shadowlit.training.outputs import Batch, Outputs


def gradient_signs(
    graft: LiveGraft,
    rows: Sequence[Batch],
    head: HeadLoss,
    objective: Objective,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    move: Callable[[Batch], Batch],
    show_row: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Return the sign of each grafted weight's gradient at the untouched Instruct that most rows have; a collective.

    The vote of GradFix (arXiv 2510.09658): ``sign(Σ_row sign(∂L_row/∂W))``. A few rows say little about the size of a
    gradient, and one long or hard row would decide the sign of their sum. Ranks with whole parameters share the rows;
    under FSDP2 all ranks compute every row, so that the signs are those of one process.

    Args:
        graft: Graft of the model, whose trained weights are restored bit for bit.
        rows: Batches of one row each, the same on all ranks; at most 127.
        head: Losses of the model.
        objective: Objective whose loss is differentiated.
        autocast: Context that forward passes run in.
        move: Function that brings a batch to the model's device.
        show_row: Function that shows the number of the row that is next.

    Returns:
        -1, 0 or 1 for each element, int8, of this rank's part of each grafted parameter, by name; 0 where there is no
        majority, or no row reaches the element (an expert that no token chooses). On the CPU where the graft keeps
        frozen weights there.

    Raises:
        GraftError: A loss is not finite, a gradient is not a number, or a grafted weight is in 4 bits.
    """
    parameters = graft.grafted_parameters
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

    def losses() -> Iterator[Tensor]:
        for number, batch in enumerate(rows):
            if not sharded and number % ranks != rank:
                continue
            show_row(number)
            with autocast():
                loss = torch.as_tensor(objective.step(Outputs(head, move(batch)))["loss"])
            if not loss.isfinite():
                raise GraftError(
                    f"the untouched Instruct has a loss of {loss.item()} on row {number} of those that transforms "
                    "need gradients of. Check this row, or give others."
                )
            yield loss

    votes: dict[str, Tensor] = {}
    on_all_ranks(lambda: votes.update(graft.measure(INSTRUCT, lambda: sign_votes(graft.model, parameters, losses()))))
    if ranks > 1 and not sharded:
        for counts in votes.values():
            dist.all_reduce(counts)
    signs = {name: counts.sign_() for name, counts in votes.items()}
    return {name: sign.cpu() for name, sign in signs.items()} if graft.offload else signs


def sign_votes(model: nn.Module, parameters: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the sum of the signs that the gradients of several losses have, for each element of each parameter.

    Args:
        model: Model that the parameters belong to, sharded by FSDP2 or not.
        parameters: Parameters by name.
        losses: At most 127 scalar losses; each is differentiated before the next one is computed.

    Returns:
        -127 to 127 for each element, int8, of this rank's part of each parameter, by name.

    Raises:
        GraftError: A gradient is not a number.
    """
    votes = {name: torch.zeros_like(local(p), dtype=torch.int8) for name, p in parameters.items()}
    wrong: dict[str, Tensor] = {}  # read at the end, so that a GPU waits once

    def take(name: str, gradient: Tensor) -> None:
        wrong[name] = gradient.isnan().any() | wrong.get(name, False)  # whose sign is 0
        votes[name] += gradient.sign().to(torch.int8)

    with torch.enable_grad(), gradients_of(model, parameters, take):
        for loss in losses:
            loss.backward()
    if names := [name for name, found in wrong.items() if found]:
        raise GraftError(
            f"the untouched Instruct's gradients of {some_of(names)} are not numbers on the rows that transforms need "
            "gradients of. Check these rows, or give others."
        )
    return votes
