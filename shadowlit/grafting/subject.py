"""Subject: one of the models that a validation measures, as a value that is passed along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Subject:
    """A model whose weights the training module can hold; its metrics are logged under its name.

    Attributes:
        kind: ``tuned`` is the trained Base, ``grafted`` the Instruct with the update as it is exported, ``base`` and
            ``instruct`` are the untouched models. ``unrounded`` is the graft before it is rounded to the export's
            dtype, ``adapter`` the Instruct with the adapter on it, as a server computes that loads an adapter, and
            ``grafted_4bit`` the graft with its linear layers quantised, as a server computes that loads it in 4 bits.
            ``anchored`` is the Instruct with everything that is trained, unrounded and not transformed, and with the
            adapter at work: what a training with two anchors computes the Instruct's micro-batches with. ``fitted`` is
            the graft with the scales that were fitted when the training ended.
        scale: Scale λ of the update that a graft adds; 0 for models without a graft.
        main: Whether this graft is the main one, called ``grafted``; any other has its scale in its name,
            ``grafted@0.5``, or its variant's name, ``grafted@dare``.
        variant: Name of the transforms of its update; empty for those that all grafts without a variant share.
    """

    kind: Literal["tuned", "grafted", "grafted_4bit", "unrounded", "adapter", "anchored", "fitted", "base", "instruct"]
    scale: float = 0.0
    main: bool = True
    variant: str = ""

    @property
    def name(self) -> str:
        """The name in metrics and in the names of files."""
        return self.kind if self.main else f"{self.kind}@{self.variant or f'{self.scale:g}'}"

    @property
    def start(self) -> Subject:
        """The untouched model that the subject started from: the Instruct for a graft, the Base for the tuned model."""
        return BASE if self.kind in ("tuned", "base") else INSTRUCT


TUNED, BASE, INSTRUCT = Subject("tuned"), Subject("base"), Subject("instruct")
UNTOUCHED = (BASE, INSTRUCT)
ANCHORED = Subject("anchored", 1.0)


def grafts(scales: Sequence[float]) -> list[Subject]:
    """Return the grafts at several scales; the first one is the main one."""
    return [Subject("grafted", scale, main=number == 0) for number, scale in enumerate(scales)]
