"""The update as an artefact of a run."""

import math
import re
import shutil
import weakref
from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from shadowlit.callbacks import export as export_module
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.names import is_token_tensor
from shadowlit.delta.delta import Delta
from shadowlit.errors import CheckpointError, ExportError, ShadowlitError
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.subject import BASE, Subject
from shadowlit.training.divergence import LossWatch
from shadowlit.training.module import ShadowModule
from tests.callbacks.test_graft import (
    KINDS,
    assert_same,
    fit,
    make_module,
    make_trainer,
    metrics,
    score_by_hand,
    weights,
)
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
    assert delta.manifest["kind"] == "delta"
    if kind == "full":
        assert 0 < delta.manifest["stored_error"] < 2**-8 and not delta.factored
    else:  # as factors, in float32
        assert delta.manifest["stored_error"] == 0 and set(delta.factored) == set(changed)


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
    assert read_manifest(target / "model")["logits_against_validated"]["max_abs"] == 0
    before, after = load_file(folders[1] / "model.safetensors"), load_file(target / "model/model.safetensors")
    assert [name for name in before if is_token_tensor(name) and not torch.equal(before[name], after[name])] == []
    assert (target / "model/config.json").read_bytes() == (folders[1] / "config.json").read_bytes()


def test_a_failed_verification_loses_nothing(tmp_path, monkeypatch):
    """Adapter and delta are written before the model, and nothing that failed has the name of a model."""
    folders, target, times = save_pair(tmp_path, "qwen3"), tmp_path / "export", []

    def fail(folder, *_):
        times.extend(path.name for path in sorted(target.iterdir(), key=lambda path: path.stat().st_ctime_ns))
        raise ExportError("does not load")

    monkeypatch.setattr(export_module, "require_loadable", fail)
    callbacks = [GraftCallback(), ExportCallback(parts=["model", "adapter", "delta"], folder=str(target))]
    with pytest.raises(ExportError, match=r"does not load.* renamed to .*model-rejected; do not use it"):
        fit(tmp_path, folders, "lora", callbacks)
    assert times == ["adapter", "delta", "model"]
    assert sorted(path.name for path in target.iterdir()) == ["adapter", "delta", "model-rejected"]
    assert Delta.open(target / "delta").norm() > 0 and (target / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_changes_on_the_disk_is_refused(tmp_path, monkeypatch, kind):
    folders, target = save_pair(tmp_path, "qwen3"), tmp_path / "export"
    write = export_module.export_folder

    def damaged(folder, *args, **options):
        write(folder, *args, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] += 1e-3
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    monkeypatch.setattr(export_module, "export_folder", damaged)
    export = ExportCallback(parts=["model"], folder=str(target))
    with pytest.raises(ExportError, match=r"written: model\.layers\.0\.mlp\.up_proj\.weight\. Check the disk"):
        fit(tmp_path, folders, kind, [GraftCallback(), export])
    shutil.rmtree(target)
    export.verify = False
    fit(tmp_path, folders, kind, [GraftCallback(), export])


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_weights_are_loaded_one_tensor_at_a_time(tmp_path, kind):
    """And the trained and the frozen ones are back afterwards, bit for bit."""
    folders = save_pair(tmp_path, "qwen3")
    callback = GraftCallback()
    module, _ = fit(tmp_path, folders, kind, [callback], max_steps=2)
    graft, alive, peak = callback.build(module), Counter(), []

    class Watched(CheckpointReader):
        def read(self, name):
            tensor = super().read(name)
            alive[name] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, name)
            peak.append(sum(alive.values()))
            return tensor

    before, held = weights(module), [host.instruct.clone() for host in graft._hosts]
    files = Watched(folders[0])  # other weights than those of the graft
    with graft.loaded(files):
        found = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in weights(module).items()}
        assert [n for n in files.tensors if not torch.equal(found[n], CheckpointReader.read(files, n))] == []
    assert len(peak) == len(files.tensors) and max(peak) == max(info.num_bytes for info in files.tensors.values())
    assert_same(weights(module), before)
    trained = [host.swap is None for host in graft._hosts]
    assert all(torch.equal(h.instruct, t) for h, t, own in zip(graft._hosts, held, trained, strict=True) if own)


def test_only_the_delta_can_be_written(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    fit(tmp_path, folders, "lora", [GraftCallback(), ExportCallback(parts=["delta"], folder=str(tmp_path / "export"))])
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["delta"]


def try_export(tmp_path, lr, callbacks=(), trainer_options=None, **options):
    """Train a tiny pair with an export to ``export``; return the module and the trainer."""
    module = make_module(save_pair(tmp_path, "qwen3"), lr=lr, **options)
    export = ExportCallback(parts=["delta"], folder=str(tmp_path / "export"))
    trainer = make_trainer(tmp_path, GraftCallback(), export, *callbacks, **(trainer_options or {}))
    trainer.fit(module, RandomData())
    return module, trainer


def test_a_zero_update_is_warned_of_once_and_has_no_survival(tmp_path, recwarn):
    _, trainer = try_export(
        tmp_path, 1e-3, kind="lora", lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda _: 0)
    )
    (told,) = [str(w.message) for w in recwarn if "the update is zero" in str(w.message)]
    assert "zero after 2 steps: no weight that graft.select chooses has changed" in told and "(now linear)" in told
    assert trainer.callback_metrics["graft/delta_norm"] == 0 and "graft/survival" not in trainer.callback_metrics
    zero = {"attention": 0.0, "mlp": 0.0}
    assert read_manifest(tmp_path / "export/delta")["survival"] == {
        "delta_norm": 0.0, "relative_delta": 0.0, "relative_delta_by_component": zero,
    }  # fmt: skip


def test_one_that_is_worse_than_the_instruct_is_exported_with_a_warning(tmp_path, recwarn):
    _, trainer = try_export(tmp_path, 1e-2, kind="lora")
    grafted, instruct, gain = (
        trainer.callback_metrics[name].item() for name in ("val/grafted/loss", "val/instruct/loss", "graft/gain")
    )
    (told,) = [str(w.message) for w in recwarn if "scores worse than the untouched Instruct" in str(w.message)]
    assert f"val/grafted/loss is {grafted:.4g}, val/instruct/loss {instruct:.4g}, graft/gain {gain:.4g}." in told
    assert gain < 0 and (tmp_path / "export/delta").is_dir()


def test_without_a_step_nothing_is_exported(tmp_path):
    with pytest.warns(UserWarning, match="nothing is exported: no step was taken"):
        try_export(tmp_path, 1e-3, trainer_options={"max_steps": 0})
    assert not (tmp_path / "export").exists()


class NeverTrains(ShadowModule):
    """Fails in the first step."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("a step was taken")


def refuse_export(tmp_path, folders, message, error=ExportError, **options):
    export = ExportCallback(**{"folder": str(tmp_path / "export"), **options})
    trainer = make_trainer(tmp_path, GraftCallback(), export)
    with pytest.raises(error, match=message):
        trainer.fit(make_module(folders, "lora", NeverTrains), RandomData())
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob(".*"))


def test_an_export_that_will_fail_is_found_before_the_first_step(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    (tmp_path / "file").touch()
    refuse_export(tmp_path, folders, rf"Cannot write next to {tmp_path}/file/x/model", folder=str(tmp_path / "file/x"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/adapter").symlink_to("nowhere")
    refuse_export(tmp_path, folders, "linked holds an export already", folder=str(tmp_path / "linked"))
    (folders[1] / "merges.txt").symlink_to("nowhere")
    refuse_export(tmp_path, folders, r"merges\.txt is a broken link")
    (folders[1] / "merges.txt").unlink()
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    message = r"tensor 'model\.norm\.weight' of \S+/instruct holds NaN or infinities, and so would the grafted model"
    refuse_export(tmp_path, folders, message, CheckpointError)


def test_a_size_of_files_that_cannot_be_is_wrong_usage():
    with pytest.raises(ExportError, match="max_shard_bytes is 0; expected a positive number"):
        ExportCallback(max_shard_bytes=0)


def test_a_disk_without_room_for_what_will_be_written_is_found_before_the_first_step(tmp_path, monkeypatch):
    """By the size of all parts as they are written in the end, for which the disk has exactly enough room or not."""
    folders, parts = save_pair(tmp_path, "qwen3"), ["model", "adapter", "delta"]
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))
    message = (
        r"^the export to \S+export \(model [\d.]+ kB, adapter [\d.]+ kB, delta [\d.]+ kB\) will take ([\d,]+) bytes, "
    )
    export = ExportCallback(parts=parts, folder=str(tmp_path / "export"))
    with pytest.raises(ExportError, match=message) as error:
        make_trainer(tmp_path, GraftCallback(), export).fit(make_module(folders, "lora", NeverTrains), RandomData())
    expected = int(re.search(message, str(error.value))[1].replace(",", ""))
    free = expected
    fit(tmp_path, folders, "lora", [GraftCallback(), ExportCallback(parts=parts, folder=str(tmp_path / "export"))])
    written = {part: sum(f.stat().st_size for f in (tmp_path / "export" / part).iterdir()) for part in parts}
    small = sum((tmp_path / "export" / part / "shadowlit.json").stat().st_size for part in parts)
    assert expected == pytest.approx(sum(written.values()) - small, rel=0.02) and min(written.values()) > 20_000


class ReadsLate(ShadowModule):
    """Leaves the losses unread in every step, as on a GPU."""

    def on_before_optimizer_step(self, optimizer):
        self.losses.check = lambda: None
        super().on_before_optimizer_step(optimizer)
        del self.losses.check


@pytest.mark.parametrize(
    ("cls", "saves", "steps_per_validation"),
    [(ShadowModule, True, 3), (ReadsLate, True, 4), (ReadsLate, False, 3), (ReadsLate, False, 4)],
)
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, cls, saves, steps_per_validation):
    """Before the next checkpoint, before the next validation, at the end."""
    found = r"the training loss is nan at step 3, at lr 1e\+30; the last finite loss was 5\.\d+, at step 2\. Lower"
    module = make_module(save_pair(tmp_path, "qwen3"), cls=cls, lr=1e30, warmup_ratio=0, schedule="constant")
    saving = [ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=-1), OnExceptionCheckpoint(tmp_path)]
    options = {"val_check_interval": 2 * steps_per_validation, "max_steps": 3}
    trainer = make_trainer(tmp_path, GraftCallback(), *(saving if saves else ()), **options)
    with pytest.raises(ShadowlitError, match=found):
        trainer.fit(module, RandomData())
    saved = sorted(path.name for path in tmp_path.rglob("*.ckpt"))
    assert saved == (["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"] if saves else [])
    assert "val/tuned/loss" not in trainer.callback_metrics
    with pytest.raises(ShadowlitError, match=found):
        trainer.save_checkpoint(tmp_path / "late.ckpt")
    assert not (tmp_path / "late.ckpt").exists()
    make_trainer(tmp_path, limit_val_batches=1).validate(module, RandomData(), verbose=False)  # is another command


@pytest.mark.parametrize(
    ("steps", "found"), [(-1, "the training loss is nan at step 3"), (1, "the norm of the update is")]
)
def test_a_training_that_diverged_is_not_exported(tmp_path, recwarn, steps, found):
    """Told to continue, or diverged in its last step, after which there is no loss."""
    with pytest.raises(ExportError, match=f"nothing is exported: {found}"):
        try_export(tmp_path, 1e30, trainer_options={"max_steps": steps}, on_nan="warn")
    told = [str(w.message) for w in recwarn if "The training continues (model.on_nan=warn)" in str(w.message)]
    assert len(told) == (steps != 1) and not (tmp_path / "export").exists()


def test_losses_on_a_device_are_read_together():
    watch = LossWatch("stop")
    for step, loss in enumerate((3.5, 2.25, math.inf, math.nan), start=1):
        watch.add(step, 1e-3, torch.tensor(loss))
    for _ in range(2):  # and remembered
        with pytest.raises(
            ShadowlitError, match=r"is inf at step 3, at lr 0\.001; the last finite loss was 2\.25, at step 2"
        ):
            watch.check()
    watch = LossWatch("stop")
    watch.check()
    watch.add(1, 1e-3, torch.tensor(math.nan))
    with pytest.raises(
        ShadowlitError, match=r"at lr 0\.001; no earlier loss of this run was finite, so check the weights"
    ):
        watch.check()
