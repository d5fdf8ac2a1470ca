"""What proves that an exported folder holds the graft and can be loaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import ExportError
from shadowlit.grafting.export import export_folder
from shadowlit.grafting.verification import digested, logit_difference, require_loadable, require_written
from tests.tiny import save_model


@pytest.fixture
def instruct(tmp_path):
    return save_model(tmp_path / "instruct", "qwen3_moe", tied=False)


@pytest.fixture
def exported(tmp_path, instruct):
    """A folder of other weights than the Instruct's, in bfloat16, and the digests of what was to be written."""
    digests: dict[str, str] = {}
    given = {name: (tensor + 1).bfloat16() for name, tensor in load_file(instruct / "model.safetensors").items()}
    tensors = digested(given.items(), digests)
    folder = export_folder(tmp_path / "out", instruct, tensors, torch.bfloat16, max_shard_bytes=20_000)
    return folder, digests


def test_what_was_written_is_found(instruct, exported):
    assert len(list(exported[0].glob("*.safetensors"))) > 2
    require_written(exported[0], instruct, exported[1], torch.bfloat16)
    require_loadable(exported[0])


def test_one_bit_that_changed_is_found(instruct, exported):
    folder, digests = exported
    info = CheckpointReader(folder).tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    with (folder / info.file).open("r+b") as file:
        file.seek(info.start + info.num_bytes - 1)
        last = file.read(1)[0]
        file.seek(info.start + info.num_bytes - 1)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ExportError, match=r"changed after they were written: model\.layers\.1\.mlp\.experts\.2\.down"):
        require_written(folder, instruct, digests, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "dtype", "name"),
    [
        (lambda t: t.pop("model.norm.weight"), torch.bfloat16, r"model\.norm\.weight"),
        (lambda t: t.update(extra=torch.ones(2)), torch.bfloat16, "extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), torch.bfloat16, r"model\.norm\.weight"),
        (lambda t: None, None, r"lm_head\.weight"),  # the Instruct's own dtype is float32
    ],
)
def test_other_names_shapes_and_dtypes_are_found(instruct, exported, tmp_path, change, dtype, name):
    folder, digests = exported
    tensors = {n: CheckpointReader(folder).read(n) for n in CheckpointReader(folder).tensors}
    change(tensors)
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=f"written: {name}"):
        require_written(tmp_path / "other", instruct, digests, dtype)


def test_a_folder_that_does_not_load(instruct):
    (instruct / "config.json").write_text('{"model_type": "hyper9"}')
    with pytest.raises(ExportError, match=r"does not load.*hyper9"):
        require_loadable(instruct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"loads incompletely: missing keys: model\.norm\.weight"),
        (lambda t: t.update(extra=torch.ones(2)), r"loads incompletely: unexpected keys: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "does not load: "),
        (lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"), "does not load: "),
    ],
)
def test_a_folder_that_transformers_cannot_map(instruct, change, message):
    tensors = load_file(instruct / "model.safetensors")
    change(tensors)
    save_file(tensors, instruct / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=message):
        require_loadable(instruct)


def test_difference_by_hand():
    """Differences 0, 3 | 0, 0 | (masked 100, 0): rms √(9/4) = 1.5, the first of two positions disagrees."""
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    b = torch.tensor([[[1.0, 3.0], [0.0, 1.0], [100.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert logit_difference(a, b, mask) == {"max_abs": 3.0, "rms": 1.5, "top1_agreement": 0.5}
    assert logit_difference(a, b, torch.ones(1, 3))["max_abs"] == 100.0
