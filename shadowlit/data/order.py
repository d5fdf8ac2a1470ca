"""The order of the training data: how samples are packed, shuffled and split over the ranks in each epoch."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from shadowlit.data.context_batches import ContextDataset
from shadowlit.data.dataset import TokenDataset
from shadowlit.data.given import Source
from shadowlit.data.mixing import MixedPacks, Mixture
from shadowlit.data.packing import PackedOrder
from shadowlit.data.preference import PreferenceDataset
from shadowlit.data.sampler import Order, ShardedBatchSampler, count_slots, grouped_order
from shadowlit.data.settings import DataSettings
from shadowlit.errors import DataError, counted

_CONTENT, _SIZES = "checksum of the samples", "bytes of the files"  # not in checkpoints of earlier versions


def require_packable(settings: DataSettings, dataset: TokenDataset) -> None:
    """Raise if training samples are to be packed and have images."""
    if settings.packing is not None and dataset.has_images:
        raise DataError(
            f"data.packing is {settings.packing!r}, but the training samples have images, whose positions in a row "
            "the models count from the beginning of the row, not of the sample. Set data.packing=null, and "
            "data.group_by_length=true to reduce padding."
        )


def mix(settings: DataSettings, dataset: TokenDataset | PreferenceDataset | ContextDataset) -> Mixture | None:
    """Return the mixture of the training sources, or None without weights; raises if it has none of a source."""
    if not settings.is_mixed:
        return None
    return Mixture(dataset.source_of, [source.weight or 0.0 for source in settings.train_sources], settings.seed)


def pack(
    settings: DataSettings, dataset: TokenDataset | PreferenceDataset | ContextDataset, mixture: Mixture | None = None
) -> PackedOrder | None:
    """Return the packs of all training samples, or None without best_fit; raises if a preference sample is too long."""
    if settings.packing != "best_fit":
        return None
    capacity = settings.row_capacity
    if dataset.lengths.max() > capacity:
        at = int(dataset.lengths.argmax())
        raise DataError(
            f"{dataset.origin(at)} has two answers of {dataset.lengths[at]} tokens together, which share a row, "
            f"but data.pack_length is {capacity}. Raise it, or lower data.max_length."
        )
    if mixture is not None:
        return MixedPacks(mixture, dataset.lengths, capacity, settings.seed, settings.shuffle)
    return PackedOrder(dataset.lengths, capacity, settings.seed)


def make_sampler(
    settings: DataSettings,
    lengths: np.ndarray,
    packs: PackedOrder | None,
    world_size: int,
    rank: int,
    *,
    mixture: Mixture | None = None,
    overfits: bool = False,
) -> ShardedBatchSampler:
    """Return a rank's training batches of the samples with these lengths, ``[N]`` int, or of their packs or mixture.

    With ``overfits``, every epoch is the first one, in the order of the data.
    """
    shuffle = settings.shuffle and not overfits
    order: Order | None = packs if packs is not None else mixture and partial(mixture, shuffle=shuffle)
    if packs is not None:
        packs.shuffle = shuffle
    elif settings.group_by_length and shuffle:
        order = partial(_group, lengths, settings.batch_size * world_size, settings.seed, mixture)
    if overfits and order is not None:
        order = partial(_first_epoch, order)
    size = len(lengths) if packs is mixture is None else len(packs if packs is not None else mixture or ())
    return ShardedBatchSampler(
        size, settings.batch_size, world_size, rank, settings.seed, shuffle, settings.drop_last, order=order
    )


def _group(lengths: np.ndarray, global_batch_size: int, seed: int, mixture: Mixture | None, epoch: int) -> np.ndarray:
    """The samples of an epoch, those of a global batch of similar length."""
    if mixture is None:
        return grouped_order(lengths, global_batch_size, seed, epoch)
    samples = mixture(epoch)
    return samples[grouped_order(lengths[samples], global_batch_size, seed, epoch)]


def _first_epoch(order: Order, epoch: int) -> Any:
    return order(0)


def require_enough(settings: DataSettings, num_samples: int, packs: PackedOrder | None, world_size: int) -> None:
    """Raise if an epoch has fewer samples or packs than there are ranks."""
    if num_samples < world_size:
        raise DataError(
            f"there are {world_size} ranks, but only {counted(num_samples, 'training sample')}. "
            "Use fewer devices or more data."
        )
    if packs is not None and len(packs) < world_size:
        raise DataError(
            f"there are {world_size} ranks, but only {counted(len(packs), 'pack')} of "
            f"{counted(num_samples, 'training sample')}. "
            f"Lower data.pack_length={settings.row_capacity}, or use data.packing=padding_free."
        )


def count_positions(
    settings: DataSettings,
    dataset: TokenDataset | PreferenceDataset | ContextDataset,
    packs: PackedOrder | None,
    sampler: ShardedBatchSampler,
) -> int:
    """Return the number of positions, including padding, that all ranks compute in the first epoch."""
    # A padded preference sample is two rows, both padded to the longest of the batch.
    rows = 2 if isinstance(dataset, PreferenceDataset) and settings.packing is None else 1
    lengths = dataset.longest if isinstance(dataset, PreferenceDataset) and rows == 2 else dataset.lengths
    sizes = packs.sizes(0) if packs is not None else lengths[np.asarray(sampler.order(0))]
    return rows * count_slots(
        sizes,
        settings.batch_size,
        sampler.num_replicas,
        settings.pad_to_multiple_of,
        settings.packing == "padding_free",
    )


def describe_epochs(
    settings: DataSettings,
    sampler: ShardedBatchSampler,
    dataset: TokenDataset | PreferenceDataset | ContextDataset,
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Return the samples, and what their order depends on; not the number of ranks, but the size of the
    global batch.
    """
    order: dict[str, Any] = {
        _CONTENT: f"{zlib.crc32(dataset.hashes().tobytes()):08x}",
        "num_samples": sampler.num_samples,
        "global_batch_size": sampler.global_batch_size,
        "seed": sampler.seed,
        "shuffle": sampler.shuffle,
        "drop_last": sampler.drop_last,
    }
    if settings.packing == "best_fit":  # padding_free keeps the order of samples that aren't packed
        order |= {"packing": settings.packing, "pack_length": settings.row_capacity}
    if settings.group_by_length:
        order["group_by_length"] = True
    if mixture is not None:
        order |= {"weights": [source.weight for source in settings.train_sources], "mixed": mixture.sizes}
    return {**order, **_trained_turns(settings)}


def describe_stream(settings: DataSettings, world_size: int) -> dict[str, Any]:
    """Return everything that the order of a stream depends on."""
    same = (
        "stream_window", "seed", "shuffle", "drop_last", "packing", "group_by_length", "max_length", "overlong",
        "drop_unsupervised",
    )  # fmt: skip
    return {
        "sources": [_place(source) for source in settings.train_sources],
        "global_batch_size": world_size * settings.batch_size,
        "pack_length": settings.row_capacity,
        **{name: getattr(settings, name) for name in same},
        _SIZES: [_num_bytes(source.path) for source in settings.train_sources],
        **({} if settings.on_bad_row == "error" else {"on_bad_row": settings.on_bad_row}),
        **_trained_turns(settings),
    }


def _num_bytes(path: str) -> int | None:
    """The size of a source's files, by which a replaced one is noticed without reading it; None for the hub."""
    place = Path(path).expanduser()
    if not place.exists():
        return None
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def _place(source: Source) -> str | dict[str, Any]:
    """The rows of a source and their part in the order."""
    chosen = {"weight": source.weight, "max_rows": source.max_rows}
    more = {name: value for name, value in chosen.items() if value is not None}
    return {"path": source.path, **more} if more else source.path


def _trained_turns(settings: DataSettings) -> dict[str, Any]:
    """What is trained, where it isn't the default, which checkpoints of earlier versions don't name."""
    return {} if settings.loss_on == "assistant" else {"loss_on": settings.loss_on}


def check_order(before: dict[str, Any], order: dict[str, Any], position: dict[str, Any]) -> None:
    """Refuse to resume in the middle of an order that can't be reproduced; elsewhere only warn.

    Args:
        before: Description of the order in the checkpoint.
        order: Description of the order of this run.
        position: Position in the checkpoint, as the state of its training loader.

    Raises:
        DataError: The orders differ, or only one of the runs reads a stream.
    """
    is_stream = "sources" in before
    if is_stream != ("sources" in order):
        was, now = str(is_stream).lower(), str(not is_stream).lower()
        raise DataError(
            f"the checkpoint was taken with data.streaming={was}, and this run has {now}: a position in a stream is "
            f"none in a whole data set. Set data.streaming={was} to resume, or start a new run (no ckpt_path, another "
            "run.name)."
        )
    changed = [
        f"{key} {before.get(key)} → {order.get(key)}"
        for key in dict.fromkeys((*before, *order))
        if before.get(key) != order.get(key) and not (key in (_CONTENT, _SIZES) and key not in before)
    ]
    if not changed:
        return
    begun = f"after {position['batch']} batches of an epoch" if position["batch"] else ""
    if is_stream and any(position.values()):
        begun = f"in window {position['window']} of a stream"
    if begun:
        raise DataError(
            f"the checkpoint was taken {begun}, in an order that these data don't give: {', '.join(changed)}. Resume "
            "with the data, batch size and seed of that run."
        )
    rank_zero_warn(f"data: the run resumes with other data or batches than before: {', '.join(changed)}.")
