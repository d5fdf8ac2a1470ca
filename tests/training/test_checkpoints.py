"""States of optimizers are found by the names of parameters; what belongs to other parameters is refused."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import AdamW

from shadowlit.errors import CheckpointError
from shadowlit.training.checkpoints import Checkpoints, find_for, require_same_parameters
from shadowlit.training.optimizer import by_name, keep_names
from tests.checkpoint.test_saved import write_folder


def trained(names, groups):
    """An optimizer of parameters of equal shapes, ``groups`` by names, after a step that is another for each."""
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in names}
    optimizer = AdamW([{"params": [parameters[n] for n in group], "lr": 1.0 + i} for i, group in enumerate(groups)])
    keep_names(optimizer, parameters.items())
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full((3,), 1.0 + i)
    optimizer.step()
    return parameters, optimizer


def moments(parameters, optimizer):
    return {name: optimizer.state[p]["exp_avg"].tolist() for name, p in parameters.items()}


@pytest.mark.parametrize("how", ["numbers and names", "names alone", "numbers alone"])
def test_states_are_found_by_name(how):
    """Whatever the order and the groups; of a state without names the order counts, as for torch."""
    _, optimizer = trained("abc", ["cb", "a"])
    state = optimizer.state_dict()
    assert [group["param_names"] for group in state["param_groups"]] == [["c", "b"], ["a"]]
    if how == "names alone":  # of a sharded checkpoint
        state = by_name(state)
        assert state["state"].keys() == {"a", "b", "c"} and state["param_groups"][0]["params"] == ["c", "b"]
    if how == "numbers alone":  # of an earlier version
        state["param_groups"] = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
    others, other = trained("cab", ["a", "bc"])
    other.load_state_dict(state)
    wanted = {"a": 0.1, "b": 0.2, "c": 0.3} if how != "numbers alone" else {"a": 0.3, "b": 0.2, "c": 0.1}
    assert moments(others, other) == {name: [pytest.approx(value)] * 3 for name, value in wanted.items()}
    assert [group["lr"] for group in other.param_groups] == ([2.0, 1.0] if how != "numbers alone" else [1.0, 1.0])
    assert all("param_names" not in group for group in other.param_groups)
    assert torch.equal(other.param_groups[0]["params"][0], others["a"])


def test_states_of_other_parameters_are_refused():
    _, optimizer = trained("abc", ["abc"])
    state = optimizer.state_dict()
    with pytest.raises(
        CheckpointError, match=r"for other parameters than those trained now: only one of the two has c, d\."
    ):
        trained("abd", ["abd"])[1].load_state_dict(state)
    del state["param_groups"][0]["param_names"]
    with pytest.raises(CheckpointError, match=r"for other parameters than those trained now \(3 and 2\)\. Resume with"):
        trained("ab", ["ab"])[1].load_state_dict(state)


def test_other_weights_are_refused_by_name_and_shape():
    found = {"a": torch.ones(2), "b": torch.ones(8, 2), "d": torch.ones(1)}
    expected = {"a": torch.ones(2), "b": torch.ones(4, 2), "c": torch.ones(1)}
    require_same_parameters("x.ckpt", found, found)
    problems = r"c is missing, d belongs to no parameter, b is \(8, 2\), not \(4, 2\)\. Resume with"
    message = rf"x.ckpt holds other trained parameters than this run: {problems}"
    with pytest.raises(CheckpointError, match=message):
        require_same_parameters("x.ckpt", found, expected)


def test_reading_with_pickles_is_refused(tmp_path):
    trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), ckpt_path=None)
    with pytest.raises(
        CheckpointError, match=r"weights_only is false, which would run code from .*a.ckpt; expected true"
    ):
        find_for(trainer, tmp_path / "a.ckpt", False)


@pytest.mark.parametrize("path", ["notes", "notes.ckpt", "../outside.ckpt", "../own/../outside.ckpt", "..", "link.ckpt",
                                  "s3://bucket/x.ckpt", "s3::x/../../outside.ckpt"])  # fmt: skip
def test_only_checkpoints_in_a_callback_s_folder_are_removed(tmp_path, path):
    for name in ("own/notes", "own/notes.ckpt", "outside.ckpt"):
        write_folder(tmp_path / name, 1) if name == "outside.ckpt" else (tmp_path / name).mkdir(parents=True)
    (tmp_path / "own/link.ckpt").symlink_to("../outside.ckpt")
    (tmp_path / "own/file.ckpt").touch()
    write_folder(tmp_path / "own/deeper/shards.ckpt", 1)
    before = sorted(tmp_path.rglob("*"))
    own = ModelCheckpoint(tmp_path / "own")
    disk = Checkpoints(Trainer(callbacks=[own], accelerator="cpu", logger=False))
    with pytest.warns(UserWarning, match="is not removed: it is not a checkpoint in a folder of this run's"):
        disk.remove_checkpoint(path if "://" in path else f"{tmp_path}/own/{path}")
    assert sorted(tmp_path.rglob("*")) == before
    for name in ("file.ckpt", "deeper/shards.ckpt"):
        disk.remove_checkpoint(f"{tmp_path}/own/{name}")
        assert not (tmp_path / "own" / name).exists()
