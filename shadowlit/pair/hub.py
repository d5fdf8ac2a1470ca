"""The tensors of a model on the Hugging Face hub, from the headers alone: no weights are downloaded."""

from __future__ import annotations

from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.errors import CheckpointError, first_line


def read_hub_headers(repo_id: str, revision: str | None) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a model's tensors, sorted by name, by range requests of about 100 KB per file.

    Raises:
        CheckpointError: The hub does not give the headers, there are no safetensors files, the index does not match
            the headers, or a dtype is unknown.
    """
    from huggingface_hub import get_safetensors_metadata

    try:
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
