"""Parameter groups of the optimizer: rates and decay by pattern, and by a file of multipliers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.names import factor_of, host_of_factor, saved_name
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.adapter import type_of
from shadowlit.limits import bounded_matching
from shadowlit.pair.pair import ModelPair


@dataclass
class ParameterGroup:
    """Settings of the trained parameters whose names match a pattern.

    Args:
        match: Regular expression that is searched in the names of the model's or adapter's files, such as
            ``model.layers.0.mlp.up_proj.weight`` or ``model.layers.0.mlp.up_proj.lora_A.weight``.
        lr_scale: Factor of the learning rate, above 0.
        weight_decay: Decoupled weight decay; null for that of the optimizer (and 0 for norms and biases).
    """

    match: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        """Raise if a setting is out of its range."""
        if not 0 < self.lr_scale < math.inf or not 0 <= (self.weight_decay or 0) < math.inf:
            raise ShadowlitError(
                f"model.parameter_groups has {self}; expected an lr_scale above 0 and a weight_decay of at least 0."
            )

    def names(self, names: Collection[str]) -> set[str]:
        """Those of the names that match; a ShadowlitError if none does or the pattern is none."""
        try:
            with bounded_matching(f"model.parameter_groups has match={self.match!r}"):
                found = {name for name in names if re.search(self.match, name)}
        except re.error as error:
            raise ShadowlitError(
                f"model.parameter_groups has match={self.match!r}, which is not a regular expression ({error}). "
                "Correct it, e.g. 'embed_tokens|norm'."
            ) from None
        if not found:
            raise ShadowlitError(
                f"model.parameter_groups has match={self.match!r}, which matches none of the {len(names)} trained "
                f"parameters: {some_of(sorted(names), 3)}. Write a pattern that matches, or remove the group."
            )
        return found


def read_multipliers(file: str | None, pair: ModelPair) -> dict[str, float] | None:
    """Read a JSON file of positive numbers by the name of a tensor in the Base's files; ``None`` for no file.

    Raises:
        ShadowlitError: It can't be read, holds something else, or the Base has no tensor of a name.
    """
    if file is None:
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        wrong = [name for name, value in found.items() if type(value) not in (int, float) or not 0 < value < math.inf]
    except (OSError, ValueError, AttributeError) as error:
        raise ShadowlitError(
            f"model.lr_multipliers is {file}, which can't be read as JSON ({error}). Expected an object of positive "
            'numbers by tensor name: {"model.layers.0.mlp.up_proj.weight": 1.5}.'
        ) from None
    with pair.readers()[0] as base:
        unknown = sorted(found.keys() - base.tensors.keys())
    problems = (wrong, "not a positive number"), (unknown, "not a tensor of pair.base")
    for names, what in problems:
        if names:
            raise ShadowlitError(
                f"model.lr_multipliers is {file}, in which {some_of(names, 3)} is {what}. Correct or remove it."
            )
    return found


def require_loraplus(ratio: float, adapter: PeftConfig | None) -> None:
    """Raise if ``model.loraplus_lr_ratio`` is not a factor of a rate, or if nothing is trained that it applies to."""
    if not 0 < ratio < math.inf:
        raise ShadowlitError(f"model.loraplus_lr_ratio is {ratio:g}; expected a number above 0, e.g. 16 for LoRA+.")
    if ratio != 1 and (adapter is None or type_of(adapter) != "LORA"):
        trained = "null" if adapter is None else f"a {type(adapter).__name__}"
        raise ShadowlitError(
            f"model.loraplus_lr_ratio is {ratio:g}, but model.adapter is {trained}, which has no factors B. Train a "
            "LoraConfig, or leave model.loraplus_lr_ratio out."
        )


def group_parameters(
    named: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    weight_decay: float | None,
    groups: Sequence[ParameterGroup] = (),
    multipliers: dict[str, float] | None = None,
    loraplus_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Torch's parameter groups, one for each learning rate and decay, matrices apart from other parameters.

    Args:
        named: Trained parameters by their names in the module.
        lr: Learning rate that the factors apply to.
        weight_decay: Decay of matrices; ``None`` for the optimizer's own. Norms and biases have none.
        groups: Settings by pattern; the first that matches a name counts.
        multipliers: Factors of the rate by tensor name; those of a matrix apply to both factors of its LoRA.
        loraplus_lr_ratio: Factor of the rate of LoRA's factors B.
    """
    parameters = {saved_name(name): (name, parameter) for name, parameter in named}
    if multipliers is not None and not multipliers.keys() & set(map(host_of_factor, parameters)):
        raise ShadowlitError(
            f"model.lr_multipliers names none of the {len(parameters)} trained parameters, such as "
            f"{some_of(sorted(parameters), 2)}. Name the tensors that are trained, or whose adapters are."
        )
    chosen = [(group, group.names(parameters)) for group in groups]
    found: dict[tuple[float, float | None, bool], list[Tensor]] = {}
    for saved, (name, parameter) in parameters.items():
        group = next((one for one, names in chosen if saved in names), None)
        scale = 1.0 if group is None else group.lr_scale
        scale *= (multipliers or {}).get(host_of_factor(saved), 1.0)
        scale *= loraplus_lr_ratio if factor_of(name) == "B" else 1.0
        decay = weight_decay if parameter.dim() >= 2 else 0.0
        decay = decay if group is None or group.weight_decay is None else group.weight_decay
        found.setdefault((scale, decay, parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            **({} if decay is None else {"weight_decay": decay}),
            **({} if scale == 1 else {"lr": scale * lr}),
        }
        for (scale, decay, _), parameters in found.items()
    ]
