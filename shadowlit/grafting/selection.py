"""Which tensors of the Instruct receive the update, and the report of what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.names import count_towers, is_of_experts, kind_of, routers, split_selection, tower_of
from shadowlit.errors import GraftError
from shadowlit.limits import bounded_matching


@dataclass(frozen=True)
class Coverage:
    """What a selection covers of a model: numbers of tensors, except where the name says parameters (elements).

    Attributes:
        left_out: Names of tensors that were trained but receive no update, so that what they learned is discarded.
        without: Tensors that are left out because no update can be taken of them, each with the reason.
        towers: Name, number of selected tensors and number of all tensors of each tower.
    """

    num_selected: int
    num_tensors: int
    num_selected_parameters: int
    num_parameters: int
    left_out: tuple[str, ...]
    num_experts: int = 0
    num_selected_experts: int = 0
    num_routers: int = 0
    num_selected_routers: int = 0
    towers: tuple[tuple[str, int, int], ...] = ()
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.describe()

    def describe(self, left_out: str = "trained but left out") -> str:
        """Return the report in a line, in which ``left_out`` says what the tensors of that name are."""
        text = (
            f"{self.num_selected} of {self.num_tensors} tensors, {_count(self.num_selected_parameters)} of "
            f"{_count(self.num_parameters)} parameters"
        )
        if self.num_experts:
            text += (
                f"; of the mixtures of experts {self.num_selected_experts} of {self.num_experts} tensors of experts, "
                f"{self.num_selected_routers} of {self.num_routers} of routers"
            )
        if len(self.towers) > 1:
            text += f" ({', '.join(f'{tower} {chosen} of {total}' for tower, chosen, total in self.towers)})"
        if self.left_out:
            kinds = Counter(kind_of(name) for name in self.left_out)
            listed = ", ".join(f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.items())
            text += f"; {left_out}: {listed}"
        if self.without:
            text += f"; left out, without an update: {some_of(self.without)}"
        return text


def resolve(select: str | list[str], names: Iterable[str], linear: frozenset[str], model_type: str) -> frozenset[str]:
    """Return the names that ``select`` chooses.

    Args:
        select: ``linear`` (every linear layer except the output head), ``all``, or one or several
            regular expressions, searched in the names. A list may hold several of these, and the names of towers of a
            vision-language model (``language``, ``vision``, ``projector``), to which all else is restricted:
            ``[language, projector, linear]``. Towers alone select all of their tensors.
        names: Names of all tensors of the model.
        linear: Names that ``linear`` stands for.
        model_type: Name of the architecture, for messages.

    Raises:
        GraftError: A pattern is not a regular expression, or one of them matches nothing, or the model has no such
            tower.
        ShadowlitError: Matching a pattern would take too long.
    """
    names = list(names)
    towers, parts = split_selection(select)
    missing = [tower for tower in towers if not any(tower_of(name) == tower for name in names)]
    if missing:
        listed = ", ".join(f"{tower} ({count})" for tower, count in count_towers(names).items())
        raise GraftError(
            f"graft.select names the tower {', '.join(missing)}, but none of the {len(names)} tensors of model "
            f"type {model_type!r} belongs to it; there are {listed}. Choose among these."
        )
    if towers:
        names = [name for name in names if tower_of(name) in towers]
        parts = parts or ["all"]
    chosen_names: set[str] = set()
    for pattern in parts:
        try:
            with bounded_matching(f"graft.select has {pattern!r}"):
                chosen = (
                    linear.intersection(names)
                    if pattern == "linear"
                    else {name for name in names if pattern == "all" or re.search(pattern, name)}
                )
        except re.error as error:
            raise GraftError(
                f"graft.select has {pattern!r}, which is not a regular expression ({error}). "
                "Expected 'linear', 'all', or regular expressions such as 'self_attn'."
            ) from None
        if not chosen:
            raise _nothing(pattern, names, model_type)
        chosen_names |= chosen
    if not chosen_names:
        raise _nothing(str(select), names, model_type)
    return frozenset(chosen_names)


def coverage(selected: frozenset[str], trained: frozenset[str], sizes: Mapping[str, int]) -> Coverage:
    """Report what ``selected`` covers of a model with tensors of ``sizes`` elements, ``trained`` ones named."""
    experts, gates, chosen = frozenset(filter(is_of_experts, sizes)), routers(sizes), count_towers(selected)
    return Coverage(
        num_selected=len(selected),
        num_tensors=len(sizes),
        num_selected_parameters=sum(sizes[name] for name in selected),
        num_parameters=sum(sizes.values()),
        left_out=tuple(sorted(trained - selected)),
        num_experts=len(experts),
        num_selected_experts=len(experts & selected),
        num_routers=len(gates),
        num_selected_routers=len(gates & selected),
        towers=tuple((tower, chosen.get(tower, 0), total) for tower, total in count_towers(sizes).items()),
    )


def _nothing(select: str, names: list[str], model_type: str) -> GraftError:
    kinds = ", ".join(dict.fromkeys(kind_of(name) for name in names))
    return GraftError(
        f"0 of {len(names)} tensors matched selection {select!r} for model type {model_type!r}; its tensors belong "
        f"to {kinds}. Set graft.select to 'all' or to a pattern that matches them, e.g. '(q_proj|v_proj)'."
    )


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
