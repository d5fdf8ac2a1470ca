"""The update in the checkpoints of a training run, which may still be running."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, require_regular
from shadowlit.checkpoint.layout import LayoutReader
from shadowlit.checkpoint.names import is_adapter_name, is_original_name, saved_name
from shadowlit.checkpoint.pickled import open_checkpoint
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described, rows_of
from shadowlit.checkpoint.structure import require_parts
from shadowlit.delta.configured import adapter_of, config_above, located, pair_of
from shadowlit.delta.delta import Delta
from shadowlit.errors import CheckpointError, DataError, GraftError
from shadowlit.grafting.disk import linear_on_disk
from shadowlit.grafting.manifest import MANIFEST_FILE, read_manifest
from shadowlit.grafting.selection import resolve
from shadowlit.grafting.tuned import is_run, require_no_graft
from shadowlit.grafting.update import FullUpdate, SummedUpdate, Update
from shadowlit.pair.buffers import open_model
from shadowlit.pair.folders import model_folder
from shadowlit.pair.pair import ModelPair
from shadowlit.pair.side import stated_sides
from shadowlit.pair.weights import require_one_architecture

if TYPE_CHECKING:
    from peft import PeftConfig

log = logging.getLogger(__name__)

_REST = "meta.pt"  # what Lightning stores next to the shards
_CACHED = 2  # whole tensors of a sharded checkpoint


class TrainedReader(ComputedReader):
    """Reads what a Lightning checkpoint holds of the model, by the names of model folders and of peft's files.

    ``step`` is the number of optimizer steps done by then, ``folder`` the path of the checkpoint, ``graft`` the state
    of the run's GraftCallback, empty if it had none, and ``fingerprints`` those of the pair that was trained.

    A file is mapped, so that optimizer states are never read, and stays readable when the run removes it. Sharded
    checkpoints (FSDP2) are read tensor by tensor; the last two are kept.

    Args:
        path: ``*.ckpt``, a file or a folder.

    Raises:
        CheckpointError: It isn't complete, or not a checkpoint of a ``ShadowModule``.
    """

    def __init__(self, path: Path) -> None:
        stored, load, rest = _open_sharded(path) if path.is_dir() else _open_file(path)
        self.step: int = rest["global_step"]
        states = rest.get("callbacks", {}).values()
        self.graft: Mapping[str, Any] = next((state for state in states if state.get("fingerprints")), {})
        self.fingerprints: Mapping[str, str] = self.graft.get("fingerprints", {})
        names = {saved_name(name): name for name in stored if not is_original_name(name)}
        infos = {
            name: TensorInfo(name, _code(path, at, stored[at][1]), stored[at][0], path.name)
            for name, at in sorted(names.items())
        }
        if not infos:
            raise CheckpointError(f"{path} holds no weights. Give a checkpoint of 'shadowlit fit'.")
        super().__init__(path, infos, rows_of(lambda name: load(names[name])))


def latest(run: str | Path) -> TrainedReader:
    """Return the newest complete checkpoint below a run's folder, or the checkpoint itself.

    Raises:
        DataError: There is none.
    """
    folder = Path(run)
    paths = [folder] if folder.suffix == ".ckpt" else sorted(folder.rglob("*.ckpt"), key=_written, reverse=True)
    for path in paths:
        if (found := _opened(path)) is not None:
            return found
    raise _none(folder)


def stages(run: str | Path, most: int | None = None) -> list[TrainedReader]:
    """Return the checkpoints below a run's folder, one per optimizer step, in order.

    One that is being written, or that the run removes in the meantime, is left out with a warning.

    Args:
        run: The run's folder, or a checkpoint.
        most: Largest number of checkpoints; more are thinned out evenly, keeping the first and the last.

    Raises:
        DataError: There are none.
    """
    folder = Path(run)
    # The newest one is kept twice, under its own name and as last.ckpt: the own name comes first.
    paths = sorted(folder.rglob("*.ckpt"), key=lambda path: (path.name.startswith("last"), str(path)))
    found: dict[int, TrainedReader] = {}
    for path in [folder] if folder.suffix == ".ckpt" else paths:
        if (stage := _opened(path)) is not None:
            found.setdefault(stage.step, stage)
    if not found:
        raise _none(folder)
    ordered = [found[step] for step in sorted(found)]
    return [ordered[i] for i in spread(len(ordered), most)]


def open_stage(
    stage: TrainedReader,
    pair: ModelPair | None = None,
    adapter: PeftConfig | None = None,
    select: str | list[str] | None = None,
) -> Delta:
    """Return the update that a checkpoint holds, ``tuned − base``; nothing is read before its rows are asked for.

    Args:
        stage: One of :func:`stages`.
        pair: Pair that was trained; None for the one in the run's ``config.yaml``.
        adapter: Settings of an adapter; None for those in ``config.yaml``.
        select: Tensors, as in ``graft.select``; None for the run's own selection.

    Raises:
        DataError: What isn't given isn't in a configuration either.
        GraftError: The checkpoint doesn't fit the Base, or its adapter has no exact update.
    """
    update = update_of(stage, pair, adapter)
    delta = Delta.from_update(update)
    wanted = select or (config_above(stage.folder)[1].get("graft") or {}).get("select") or "linear"
    # What has no update counts as a matrix: an error if it is selected.
    infos = described({name: update.shapes.get(name, (0, 0)) for name in [*delta.shapes, *update.without]})
    chosen = resolve(wanted, infos, linear_on_disk(infos), "of the update")
    update.require_weights(sorted(chosen))
    return delta.only(chosen)


def update_of(stage: TrainedReader, pair: ModelPair | None = None, adapter: PeftConfig | None = None) -> Update:
    """Return the whole update that a checkpoint holds; arguments and errors are those of :func:`open_stage`."""
    home, config = config_above(stage.folder)
    pair = pair or pair_of(config, home)
    aligned, _ = _learned(pair)  # the run holds experts as its module does, the update shall hold them as the files
    if not any(map(is_adapter_name, stage.tensors)):
        return FullUpdate(aligned, stage, strict=False)
    from shadowlit.grafting.adapter_files import adapter_update  # late: peft takes seconds

    settings = adapter or adapter_of(config, home)
    if (start := _start_of(stage, config, home, pair)) is None:
        return adapter_update(aligned, stage.folder, settings, stage, strict=False)
    return SummedUpdate(start.update, adapter_update(start.reader, stage.folder, settings, stage, strict=False))


@dataclass(frozen=True)
class Start:
    """What a training starts from instead of the Base: the weights of a tuned Base, or an adapter of the Base.

    Attributes:
        reader: Reader of the weights, by the Base's names and in the shapes of the Instruct; or of the adapter's
            tensors, by the names in peft's files.
        update: What was learned, ``tuned - base``.
        adapter: Settings of the adapter; None for weights.
    """

    reader: TensorReader
    update: Update
    adapter: PeftConfig | None = None


def open_start(source: str, pair: ModelPair) -> Start:
    """Open ``model.start_from`` and check from its headers that it is an update of the pair's Base.

    Args:
        source: Folder or hub id of an adapter or of a tuned Base, or a run of ``fit``: its folder, of which the newest
            checkpoint counts, or a ``*.ckpt``.
        pair: Pair that is trained.

    Raises:
        PairError: There is no such folder, or it holds a model of another architecture.
        GraftError: It does not fit the Base, or it is not a start.
    """
    try:
        return _open_run(Path(source), pair) if is_run(Path(source)) else _open_folder(source, pair)
    except (GraftError, CheckpointError, DataError) as error:
        raise GraftError(f"model.start_from is {source!r}: {error}") from error


def _open_folder(source: str, pair: ModelPair) -> Start:
    folder = model_folder("start_from", source, key="model.start_from")
    if not (folder / "adapter_config.json").is_file():
        require_one_architecture(*stated_sides(("base", pair.base_folder()), ("model.start_from", folder)))
        base, instruct = (open_model(one) for one in (pair.base_folder(), pair.instruct_folder()))
        require_no_graft(folder, base, instruct)
        if open_model(folder).fingerprint() == instruct.fingerprint() != base.fingerprint():
            raise GraftError(
                "it holds the weights of pair.instruct, so the update would contain the Instruct's whole difference "
                "from the Base, which the Instruct has already. Expected a tuned Base or an adapter. Leave it out, or "
                "set pair.base to the Instruct too, to train the Instruct itself."
            )
        return _weights(open_model(folder).learned(), pair)
    from shadowlit.grafting.adapter_files import adapter_update, read_adapter_config  # late: peft takes seconds

    made = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else {}
    if (made.get("base") or {}).get("fingerprint") not in (None, pair.fingerprints()["base"]):
        raise GraftError(
            f"it was trained on another Base than {pair.base} (the fingerprint in its {MANIFEST_FILE} differs). Give "
            "an adapter of pair.base, or set pair.base to the one that it was trained on."
        )
    config, reader = read_adapter_config(folder), open_checkpoint(folder, adapter=True)
    return Start(reader, adapter_update(_learned(pair)[0], folder, config), config)


def _open_run(path: Path, pair: ModelPair) -> Start:
    stage = latest(path)
    home, config = config_above(stage.folder)
    if stage.fingerprints.get("base", (found := pair.fingerprints()["base"])) != found:
        raise GraftError(
            f"{stage.folder} was trained from another Base than {pair.base} (the fingerprints of the files differ). "
            "Set pair.base to that Base."
        )
    if not any(map(is_adapter_name, stage.tensors)):
        return _weights(stage, pair)
    if _start_of(stage, config, home, pair) is not None:
        raise GraftError(
            f"the adapter in {stage.folder} was trained on the tuned weights of that run's own model.start_from, and "
            f"is not an update of the Base by itself. Merge both: 'shadowlit graft {pair.base} {path} "
            f"{pair.base} MERGED --select all --dtype float32', and set model.start_from=MERGED."
        )
    return Start(stage, update_of(stage, pair), adapter_of(config, home))


def _weights(tuned: TensorReader, pair: ModelPair) -> Start:
    """The start at a tuned Base's weights, of which its vocabulary may be the Base's or the Instruct's."""
    aligned, instruct = _learned(pair)
    files = open_model(pair.base_folder()).learned()
    if not FullUpdate(files, tuned, strict=False).without:
        tuned = AlignedReader(tuned, instruct)
    update = FullUpdate(aligned, tuned)
    reader = LayoutReader(tuned, aligned)
    reader.tied = pair.ties()[0]
    return Start(reader, update)


def _start_of(stage: TrainedReader, config: Mapping[str, Any], home: Path, pair: ModelPair) -> Start | None:
    """The tuned weights under the adapter in a checkpoint; None if these are the Base's."""
    source, known = (config.get("model") or {}).get("start_from"), stage.fingerprints.get("start")
    if known is None and (stage.fingerprints or source is None):
        return None
    if source is None:
        raise GraftError(
            f"{stage.folder} was trained on the tuned weights of model.start_from, but {home} holds no config.yaml "
            "that names them. Restore it: the update can't be computed without these weights."
        )
    start = open_start(located(source, home), pair)
    if start.adapter is not None:
        return None
    if known not in (None, start.reader.fingerprint()):
        raise GraftError(
            f"{stage.folder} was trained on other weights than model.start_from, {source!r}, holds now (the "
            "fingerprints differ). Restore these weights: they are a part of the update."
        )
    return start


def _learned(pair: ModelPair) -> tuple[AlignedReader, TensorReader]:
    """The learned tensors of the Base, in the shapes of its Instruct, and of the Instruct."""
    base, instruct = (open_model(folder).learned() for folder in (pair.base_folder(), pair.instruct_folder()))
    return AlignedReader(base, instruct), instruct


def _opened(path: Path) -> TrainedReader | None:
    try:
        return TrainedReader(path)
    except (OSError, CheckpointError) as error:
        log.warning("%s is left out: %s", path, error)
        return None


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # the run has removed it since
        return 0.0


def _none(folder: Path) -> DataError:
    return DataError(
        f"{folder} holds no complete *.ckpt. Give the folder of a run with a ModelCheckpoint callback; "
        "every_n_train_steps and save_top_k=-1 keep the checkpoints of its whole course."
    )


_Opened = tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], Callable[[str], Tensor], Mapping[str, Any]]


def _open_file(path: Path) -> _Opened:
    require_regular(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a complete checkpoint: it is being written, or was cut short.")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state, _ = content["state_dict"], content["global_step"]
    except Exception as error:  # of pickle, zipfile, torch or a missing key: many types, one meaning
        raise CheckpointError(
            f"{path} can't be read as a Lightning checkpoint ({type(error).__name__}: {str(error).splitlines()[:1]})."
        ) from error
    require_parts(path, content)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, state.__getitem__, content


def _open_sharded(path: Path) -> _Opened:
    from shadowlit.checkpoint import sharded

    if not (path / sharded.INDEX).is_file() or not zipfile.is_zipfile(path / _REST):
        raise CheckpointError(f"{path} is not a complete sharded checkpoint: it is being written, or was cut short.")
    found = sharded.tensor_entries(sharded.read_index(path), "state_dict.")

    @lru_cache(maxsize=_CACHED)
    def load(name: str) -> Tensor:
        tensor = torch.empty(found[name][0], dtype=found[name][1])
        sharded.read_tensors(path, {f"state_dict.{name}": tensor}, alone=True)
        return tensor

    rest = sharded.load_plain(path / _REST)
    if not isinstance(rest, Mapping) or "global_step" not in rest:
        raise CheckpointError(f"{path / _REST} is not a part of a checkpoint: it lacks global_step.")
    require_parts(path, rest)
    return found, load, rest


def _code(path: Path, name: str, dtype: torch.dtype) -> str:
    code = dtype_code(dtype)
    if code is None:
        raise CheckpointError(f"{path} holds tensor '{name}' of dtype {dtype}; expected floating-point weights.")
    return code


def spread(count: int, most: int | None) -> Sequence[int]:
    """Return at most ``most`` of ``count`` indices, evenly spread, with both ends."""
    if most is None or count <= most:
        return range(count)
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)} | {count - 1})
