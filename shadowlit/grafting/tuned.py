"""Opens the update in the folder of a tuned model."""

from __future__ import annotations

from pathlib import Path

from shadowlit.checkpoint.reader import TensorReader
from shadowlit.grafting.update import FullUpdate, Update
from shadowlit.pair.buffers import open_model


def open_update(base: TensorReader, tuned: Path, allow_pickle: bool = False, strict: bool = True) -> Update:
    """The update in the folder ``tuned``, by the Base's names: a whole checkpoint, or an adapter in peft's form.

    ``strict`` is that of :class:`shadowlit.grafting.update.FullUpdate`.
    """
    if (tuned / "adapter_config.json").is_file():
        from shadowlit.grafting.adapter_files import adapter_update  # late: peft takes seconds

        return adapter_update(base, tuned, strict=strict, allow_pickle=allow_pickle)
    return FullUpdate(base, open_model(tuned, allow_pickle).learned(), strict)
