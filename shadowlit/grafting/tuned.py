"""Opens the update in the folder of a tuned model, and recognises folders that hold something else."""

from __future__ import annotations

from pathlib import Path

from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import GraftError
from shadowlit.grafting.manifest import MANIFEST_FILE, read_manifest
from shadowlit.grafting.update import FullUpdate, Update
from shadowlit.pair.buffers import open_model


def open_update(base: TensorReader, tuned: Path, allow_pickle: bool = False, strict: bool = True) -> Update:
    """Return the update in the folder ``tuned``, by the Base's names: a whole checkpoint, or an adapter in peft's form.

    ``strict`` is that of :class:`shadowlit.grafting.update.FullUpdate`.
    """
    if (tuned / "adapter_config.json").is_file():
        from shadowlit.grafting.adapter_files import adapter_update  # late: peft takes seconds

        return adapter_update(base, tuned, strict=strict, allow_pickle=allow_pickle)
    return FullUpdate(base, open_model(tuned, allow_pickle).learned(), strict)


def is_run(tuned: Path) -> bool:
    """Return whether this is a checkpoint of a run, or a folder of some that is not a model or adapter itself."""
    itself = any((tuned / name).exists() for name in ("config.json", "adapter_config.json"))
    return tuned.exists() and (tuned.suffix == ".ckpt" or (not itself and any(tuned.rglob("*.ckpt"))))


def require_no_graft(tuned: Path, base: TensorReader, instruct: TensorReader) -> None:
    """Raise if a whole model is the result of a graft onto this Instruct, and holds the Instruct's weights."""
    if not (tuned / MANIFEST_FILE).is_file() or (tuned / "adapter_config.json").is_file():
        return
    manifest = read_manifest(tuned)
    made, given = ((manifest.get(who) or {}).get("fingerprint") for who in ("base", "instruct")), (base, instruct)
    prints = [reader.fingerprint() for reader in given]
    if list(made) == prints and prints[0] != prints[1]:
        raise GraftError(
            f"{tuned} is already a graft onto this Instruct ({MANIFEST_FILE}), not a tuned Base: grafted again, it "
            "would contain the difference between Instruct and Base twice. Give the tuned Base, or the folder of a "
            "run of fit, which holds its checkpoints, or a *.ckpt."
        )
