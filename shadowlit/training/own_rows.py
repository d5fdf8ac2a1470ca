"""Rows that a part of a training needs for itself, and that neither train nor measure anything else."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from shadowlit.data.given import Given, path_in, place_of
from shadowlit.errors import GraftError, counted
from shadowlit.training.anchors import KL_ROWS


def read_own_rows(trainer: Trainer, key: str, source: Given, why: str) -> None:
    """Read and tokenise a source as a validation set is; the data module then has it as the set ``key``.

    Args:
        trainer: Trainer, with its data module.
        key: Key of the source in the configuration.
        source: Source.
        why: Clause that says why the rows of another use won't do.

    Raises:
        GraftError: The data module can't read further sets, or the source has another use in this run.
        DataError: The source can't be read.
    """
    data = data_for(trainer, key)
    if uses := [use for use in uses_of(source, trainer) if use != key]:
        raise GraftError(
            f"{key} is {path_in(source)}, which is {' and '.join(uses)} too: {why}. Give rows of their own."
        )
    data.extra_loader(key, source)


def data_for(trainer: Trainer, key: str) -> Any:
    """Return the data module; raise a GraftError unless it can read the further rows that ``key`` needs."""
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "extra_loader"):
        raise GraftError(
            f"the rows of {key} are read as the data module reads its own sets, but {type(data).__name__} has no "
            "extra_loader. Use ShadowData or a subclass."
        )
    return data


def warn_of_shared_rows(trainer: Trainer, name: str, consequence: str, *, but: Collection[str] = ()) -> None:
    """Warn of rows of the set ``name`` that other sets have too, except ``but``; ``consequence`` is a clause.

    If ``name`` is the key of rows of their own, these others are sets of such rows too.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    keys = [key for _, key in _uses(trainer)]
    for other, count in data.overlap(name, keys if name in keys else ()).items():
        if other not in but:
            rank_zero_warn(
                f"data: {name} shares {counted(count, 'sample')} token for token with {other}, so that {consequence}. "
                "Remove these from one of the two."
            )


def uses_of(source: Given, trainer: Trainer) -> list[str]:
    """Return the keys by which a run reads a source: of its data, its evaluators, and rows of their own."""
    return [key for place, key in _uses(trainer) if place == place_of(source)]


def _uses(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Where the rows of a run are, and their keys."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    for source in getattr(data, "train_sources", ()):
        yield place_of(source.path), "data.train"
    for kind in ("validation", "test"):
        for name, source in getattr(data, f"{kind}_sets", {}).items():
            yield place_of(source.path), f"data.{kind}.{name}"
    anchors = getattr(trainer.lightning_module, "anchors", None)
    if anchors is not None and anchors.kl is not None:
        yield place_of(anchors.kl.data), KL_ROWS
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for key, source in getattr(getattr(callback, "fit_scales", None), "sources", {}).items():
            yield place_of(source), key
        for name, evaluator in getattr(callback, "evaluators", {}).items():
            if isinstance(source := getattr(evaluator, "data", None), str):
                yield place_of(source), f"evaluation.evaluators.{name}.data"
