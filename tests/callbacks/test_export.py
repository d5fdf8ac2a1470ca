"""The update as an artefact of a run."""

import pytest
import torch

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.delta.delta import Delta
from shadowlit.grafting.subject import BASE, Subject
from tests.callbacks.test_graft import KINDS, fit
from tests.tiny import save_pair


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_delta_is_what_the_exported_model_has_more_than_the_instruct(tmp_path, kind):
    folders = save_pair(tmp_path, "qwen3")
    target = tmp_path / "export"
    fit(tmp_path, folders, kind, [GraftCallback(), ExportCallback(parts=["model", "delta"], folder=str(target))])
    assert not (target / "adapter").exists()
    delta, instruct, grafted = (
        Delta.open(target / "delta"),
        CheckpointReader(folders[1]),
        CheckpointReader(target / "model"),
    )
    changed = [name for name in instruct.tensors if not torch.equal(instruct.read(name), grafted.read(name))]
    assert set(changed) == set(delta.shapes) and len(changed) == 14
    for name in changed:
        gained = grafted.read(name).double() - instruct.read(name).double()
        torch.testing.assert_close(delta.tensor(name).double(), gained, rtol=2**-8, atol=1e-7)
    assert 0 < delta.manifest["stored_error"] < 2**-8 and delta.manifest["kind"] == "delta"


@pytest.mark.parametrize("kind", KINDS)
def test_exported_tensors_own_their_memory(tmp_path, kind):
    """The next swap overwrites what the graft holds, and not what it gave away."""
    folders = save_pair(tmp_path, "qwen3")
    callback = GraftCallback()
    module, _ = fit(tmp_path, folders, kind, [callback], max_steps=2)
    graft = callback.build(module)
    tensors = dict(graft.grafted_tensors())
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    with graft.applied(BASE), graft.applied(Subject("grafted", 0.5)):
        assert [name for name in given if not torch.equal(given[name], tensors[name])] == []
    for tensor in tensors.values():
        tensor.fill_(7.0)
    assert all(torch.equal(tensor, given[name]) for name, tensor in graft.grafted_tensors())


def test_only_the_delta_can_be_written(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    fit(tmp_path, folders, "lora", [GraftCallback(), ExportCallback(parts=["delta"], folder=str(tmp_path / "export"))])
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["delta"]
