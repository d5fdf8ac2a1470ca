"""Every test here needs a CUDA device. SHADOWLIT_GPU_TESTS=cpu runs them on the CPU, to test the tests."""

from __future__ import annotations

import os

import pytest

# Read by cuBLAS when it is first used: its workspace decides whether equal products have equal bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from tests.gpu.older_torch import accept_grouped_heads

ON_CPU = os.environ.get("SHADOWLIT_GPU_TESTS") == "cpu"
ACCELERATOR = "cpu" if ON_CPU else "gpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not (ON_CPU or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def deterministic():
    """Equal bits for equal inputs, so that what must not change anything can be shown to change no bit."""
    accept_grouped_heads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Folders of a Base and an Instruct, by the dtype of their files; matrices large enough to matter to the loss."""
    from safetensors.torch import load_file, save_file

    from tests.tiny import save_pair

    folders = {}
    for dtype in (torch.float32, torch.bfloat16):
        folders[dtype] = save_pair(tmp_path_factory.mktemp("pair"), "qwen3", dtype=dtype, hidden=64)
        for folder in folders[dtype]:
            file = folder / "model.safetensors"
            sizes = {"proj": 4, "embed": 10, "norm": 1}
            tensors = {
                name: tensor * next(size for kind, size in sizes.items() if kind in name)
                for name, tensor in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
    return folders
