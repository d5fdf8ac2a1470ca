"""The Hugging Face hub: whether it can be reached, and a model's tensors from the headers alone, without weights."""

from __future__ import annotations

from functools import cache

from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.errors import CheckpointError, first_line

_TIMEOUT_S = 5.0


@cache
def unreachable() -> str | None:
    """Why the hub can't be reached, or None if it can; asked once per process.

    The hub's client repeats a request five times over half a minute, with a line for each, which without a network is
    time lost. What an earlier download left in the cache can still be used.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception as error:  # of the client, which is another library in each version of the hub's
        return f"the hub can't be reached: {first_line(error)}"
    return None


def read_hub_headers(repo_id: str, revision: str | None) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a model's tensors, sorted by name, by range requests of about 100 KB per file.

    Raises:
        CheckpointError: The hub does not give the headers, there are no safetensors files, the index does not match
            the headers, or a dtype is unknown.
    """
    from huggingface_hub import get_safetensors_metadata

    try:
        if reason := unreachable():
            raise ConnectionError(reason)
        metadata = get_safetensors_metadata(repo_id, revision=revision)
    except Exception as error:  # of the hub, of httpx, of a broken header: many types, one remedy
        raise CheckpointError(
            f"the safetensors headers of '{repo_id}' cannot be read from the hub ({first_line(error)}). Expected: "
            "model.safetensors, or its index and shards. Pickled weights are never loaded: convert them with "
            "save_pretrained on a machine where you trust them, and give the folder"
        ) from error
    tensors: dict[str, TensorInfo] = {}
    for name, file in sorted(metadata.weight_map.items()):
        entry = metadata.files_metadata[file].tensors.get(name)
        if entry is None:
            raise CheckpointError(
                f"the index of '{repo_id}' on the hub names '{name}' in {file}, which does not hold it"
            )
        tensors[name] = TensorInfo(name, entry.dtype, tuple(entry.shape), file)
        try:
            _ = tensors[name].itemsize
        except KeyError as error:
            raise CheckpointError(
                f"tensor '{name}' of '{repo_id}' on the hub has dtype {entry.dtype}, which is unknown here. Expected: "
                "a floating-point dtype such as BF16"
            ) from error
    return tensors
