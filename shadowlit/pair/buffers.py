"""Buffers that a model computes for itself, and that some files hold all the same: nothing is learned in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.names import buffer_key, canonical_key, is_bias, is_usual_buffer, possible_buffers
from shadowlit.checkpoint.pickled import open_checkpoint
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import PairError


def open_model(folder: Path, allow_pickle: bool = False, trust_remote_code: bool = False) -> TensorReader:
    """Open the checkpoint in a folder; its ``computed`` buffers are known, and ``learned()`` is the rest.

    Raises:
        CheckpointError: There is no checkpoint, or it can't be read.
    """
    reader = open_checkpoint(folder, allow_pickle)
    reader.computed = computed_buffers(folder, reader.tensors, trust_remote_code)
    return reader


def computed_buffers(
    folder: Path, tensors: Mapping[str, TensorInfo], trust_remote_code: bool = False
) -> frozenset[str]:
    """Return the names of those ``tensors`` of a folder that its model computes instead of loading them.

    The architecture says which: the model is built on the meta device, and a tensor that it does not load is a buffer
    if the model has a non-persistent one of this name, names it among the keys to ignore, or had one of this usual
    name in an earlier version. Where transformers can't build the model, because its code comes with the folder, usual
    names and forms decide. The model is built only if the folder holds other tensors than weights and biases, since
    importing transformers takes seconds.
    """
    possible = possible_buffers(tensors)
    if not possible:
        return frozenset()
    is_computed = _by_architecture(folder, trust_remote_code)
    return frozenset(name for name in possible if is_computed(tensors[name]))


def _by_architecture(folder: Path, trust_remote_code: bool) -> Callable[[TensorInfo], bool]:
    """What the model in a folder says of a tensor, or what its name and form do if there is no such model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from shadowlit.pair.folders import is_image_text, load_config

    try:
        config = load_config("the", folder, trust_remote_code)
        auto = AutoModelForImageTextToText if is_image_text(config) else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except (PairError, OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError):
        return _looks_computed
    loaded = set(map(canonical_key, model.state_dict()))
    own = {buffer_key(name) for name, _ in model.named_buffers() if canonical_key(name) not in loaded}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def is_computed(info: TensorInfo) -> bool:
        return canonical_key(info.name) not in loaded and (
            buffer_key(info.name) in own
            or is_usual_buffer(info.name)  # of an earlier version of the architecture
            or any(pattern.search(info.name) for pattern in ignored)
        )

    return is_computed


def _looks_computed(info: TensorInfo) -> bool:
    """Whether a tensor has a buffer's name, or is a mask in the place of a bias."""
    is_mask = is_bias(info.name) and (len(info.shape) >= 2 or not info.is_floating_point)
    return is_mask or is_usual_buffer(info.name)
