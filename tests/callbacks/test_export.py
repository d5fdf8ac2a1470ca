"""The update as an artefact of a run."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.names import is_token_tensor
from shadowlit.delta.delta import Delta
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.subject import BASE, Subject
from tests.callbacks.test_graft import KINDS, fit, make_module, make_trainer, metrics, score_by_hand
from tests.synthetic import RandomData
from tests.tiny import save_pair, store_head


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


@pytest.mark.parametrize(("base", "instruct", "kind"), [
    ("own", "own", "full"), ("none", "own", "lora"), ("own", "none", "full"), ("copy", "copy", "full"),
])  # fmt: skip
def test_heads_are_tied_as_transformers_ties_them(tmp_path, base, instruct, kind):
    """config.json says tied, but a file that holds a head of its own is loaded as it is."""
    folders = save_pair(tmp_path, "qwen3")
    for folder, head in zip(folders, (base, instruct), strict=True):
        if head != "none":
            store_head(folder, own=head == "own")
    target = tmp_path / "export"
    callbacks = [GraftCallback(), ExportCallback(parts=["model"], folder=str(target))]
    module, trainer = fit(tmp_path, folders, kind, callbacks, max_steps=2)
    tied = module.model.get_output_embeddings().weight is module.model.get_input_embeddings().weight
    assert tied == ("own" not in (base, instruct))
    validating = make_trainer(tmp_path, GraftCallback())
    validating.validate(make_module(folders, kind), RandomData(), verbose=False)
    fitted, validated = metrics(trainer), metrics(validating)
    for who, folder in (("base", folders[0]), ("instruct", folders[1]), ("grafted", target / "model")):
        by_hand = pytest.approx(score_by_hand(AutoModelForCausalLM.from_pretrained(folder).eval(), [(4, 2)]), rel=1e-6)
        assert fitted[f"val/{who}/right/loss"] == by_hand
        assert who == "grafted" or validated[f"val/{who}/right/loss"] == by_hand
    assert read_manifest(target / "model")["logits_against_validated"]["max_abs"] < 1e-5
    before, after = load_file(folders[1] / "model.safetensors"), load_file(target / "model/model.safetensors")
    assert [name for name in before if is_token_tensor(name) and not torch.equal(before[name], after[name])] == []
    assert (target / "model/config.json").read_bytes() == (folders[1] / "config.json").read_bytes()


def test_only_the_delta_can_be_written(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    fit(tmp_path, folders, "lora", [GraftCallback(), ExportCallback(parts=["delta"], folder=str(tmp_path / "export"))])
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["delta"]
