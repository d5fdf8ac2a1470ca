import json
import logging
import math
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed import checkpoint as sharded

from shadowlit.analysis.deltas import open_delta
from shadowlit.analysis.evolution import evolutions
from shadowlit.analysis.run import read_run
from shadowlit.analysis.truncation import losses
from shadowlit.checkpoint.names import saved_name
from shadowlit.cli.main import main
from shadowlit.delta.checkpoints import TrainedReader, latest, open_stage, stages
from shadowlit.demo.runs import fit
from shadowlit.errors import CheckpointError, DataError, GraftError
from tests.tiny import save_model, save_pair

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def run(tmp_path, pair):
    """A run's folder with a configuration of full tuning and no checkpoints."""
    return configured(tmp_path / "run", pair)


def configured(home, pair, adapter=None, select="all"):
    home.mkdir(parents=True)
    base, instruct = map(str, pair)
    config = {"pair": {"base": base, "instruct": instruct}, "model": {"adapter": adapter}, "graft": {"select": select}}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    return home


def tuned(base, seed):
    generator = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    return {name: t + torch.randn(t.shape, generator=generator) for name, t in state.items()}


def write(home, state, step, name=None):
    """As Lightning does it: the module's parameters stand under ``model.``."""
    path = home / "checkpoints" / (name or f"step-{step}.ckpt")
    path.parent.mkdir(exist_ok=True)
    state = {f"model.{n}": t for n, t in state.items()}
    torch.save({"state_dict": state, "global_step": step, "loops": {"fit_loop": {}}}, path)
    return path


def factors(seed, rank=2, out=32, inner=32):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)
    stem = f"base_model.model.{Q}"
    return up, down, {f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": up}


def test_full_tuning_is_the_difference(run, pair):
    state = tuned(pair[0], 1)
    path = write(run, {**state, "lm_head.weight": state["model.embed_tokens.weight"]}, 7)
    (stage,) = stages(run)
    delta = open_stage(stage)
    before = load_file(pair[0] / "model.safetensors")
    assert (stage.step, stage.folder) == (7, path) and delta.shapes.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(delta.tensor(name), state[name] - before[name], rtol=0, atol=0)
    assert {n.split(".")[-2] for n in open_stage(stage, select="q_proj").shapes} == {"q_proj"}


def test_delta_make_names_the_way_for_a_run(run, pair, tmp_path, capsys):
    base, instruct = map(str, pair)
    path = write(run, tuned(pair[0], 1), 7)
    for given in (run, path):
        assert main(["delta", "make", base, str(given), str(tmp_path / "no")]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "is a run of fit or one of its checkpoints" in told and "open_stage(latest(RUN), select='all')" in told
    open_stage(latest(run), select="all").save(tmp_path / "delta", torch.float32)
    assert main(["delta", "apply", str(tmp_path / "delta"), instruct, str(tmp_path / "applied")]) == 0
    assert main(["graft", base, str(run), instruct, str(tmp_path / "grafted")]) == 0
    applied, grafted = (load_file(tmp_path / name / "model.safetensors") for name in ("applied", "grafted"))
    assert applied.keys() == grafted.keys() and all(torch.equal(applied[n], grafted[n]) for n in grafted)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 8, "rank_pattern": {"q_proj": 2}, "lora_alpha": 5, "alpha_pattern": {"q_proj": 8}}, 4.0),
    ],
)
@pytest.mark.parametrize("written", ["init_args", "plain"])
def test_lora_is_the_scaled_product(settings, scaling, written, tmp_path, pair):
    section = {"class_path": "peft.LoraConfig", "init_args": settings} if written == "init_args" else settings
    home = configured(tmp_path / "run", pair, section, select="linear")
    up, down, state = factors(3)
    write(home, state, 4)
    delta = open_delta(home)
    assert delta.shapes == {f"{Q}.weight": (32, 32)}
    torch.testing.assert_close(delta.tensor(f"{Q}.weight"), scaling * up @ down)
    torch.testing.assert_close(delta.rows(f"{Q}.weight", 3, 9), (scaling * up @ down)[3:9])


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (f"model.{Q}.weight", f"{Q}.weight"),
        (f"model._orig_mod.{Q}.weight", f"{Q}.weight"),
        (f"model.base_model.model.{Q}.lora_A.default.weight", f"{Q}.lora_A.weight"),
        ("model.base_model.model.model.embed_tokens.lora_embedding_B.default", "model.embed_tokens.lora_embedding_B"),
        ("model.base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        (f"model.base_model.model.{Q}.base_layer.weight", f"{Q}.weight"),
    ],
)
def test_names(stored, name):
    assert saved_name(stored) == name


def test_in_the_order_of_steps_each_once(run, pair):
    """step-10 after step-9, whatever their names' order; last.ckpt is one of them."""
    for step in (10, 9, 2):
        write(run, tuned(pair[0], step), step)
    write(run, tuned(pair[0], 10), 10, "last.ckpt")
    found = stages(run)
    assert [(stage.step, stage.folder.name) for stage in found] == [
        (2, "step-2.ckpt"),
        (9, "step-9.ckpt"),
        (10, "step-10.ckpt"),
    ]
    assert [stage.step for stage in stages(run, most=2)] == [2, 10]
    assert [stage.step for stage in stages(run / "checkpoints/step-9.ckpt")] == [9]


def test_the_latest_is_the_one_written_last(run, pair):
    for age, step in enumerate((30, 20, 10)):
        os.utime(write(run, tuned(pair[0], step), step), (1e9 - age, 1e9 - age))
    assert latest(run).step == 30


def test_a_run_in_progress(run, pair, caplog):
    """A checkpoint that is half written is left out and said; one that is removed afterwards can still be read."""
    path = write(run, tuned(pair[0], 1), 1)
    whole = path.read_bytes()
    (path.parent / "step-2.ckpt").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        (stage,) = stages(run)
    assert "step-2.ckpt is left out" in caplog.text and "is being written, or was cut short" in caplog.text
    delta = open_stage(stage)
    path.unlink()
    name = f"{Q}.weight"
    before = load_file(pair[0] / "model.safetensors")[name]
    torch.testing.assert_close(delta.tensor(name), tuned(pair[0], 1)[name] - before)


def test_nothing_to_read(run, tmp_path, pair):
    with pytest.raises(DataError, match=r"holds no complete \*.ckpt. Give the folder of a run with a ModelCheckpoint"):
        stages(run)
    with pytest.raises(DataError, match="holds no complete"):
        latest(run)
    torch.save({"weights": {}}, run / "other.ckpt")
    with pytest.raises(CheckpointError, match="can't be read as a Lightning checkpoint"):
        TrainedReader(run / "other.ckpt")
    torch.save({"state_dict": {}, "global_step": 1}, run / "empty.ckpt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        TrainedReader(run / "empty.ckpt")


def test_without_a_configuration(tmp_path, pair):
    home = tmp_path / "bare"
    home.mkdir()
    write(home, tuned(pair[0], 1), 1)
    with pytest.raises(DataError, match=r"holds no config\.yaml that names a pair"):
        open_delta(home)
    lora = configured(tmp_path / "lora", pair)
    write(lora, factors(1)[2], 1)
    with pytest.raises(DataError, match="with the settings of its adapter"):
        open_delta(lora)


def test_an_adapter_that_starts_from_the_weights_is_refused(tmp_path, pair):
    home = configured(tmp_path / "run", pair, {"r": 2, "init_lora_weights": "pissa"})
    write(home, factors(1)[2], 1)
    with pytest.raises(GraftError, match="lacks the residual"):
        open_delta(home)


def test_another_base(tmp_path, pair):
    other = save_model(tmp_path / "other", hidden=48)
    home = configured(tmp_path / "run", (other, other))
    write(home, tuned(pair[0], 1), 1)
    with pytest.raises(
        GraftError, match=r"was not tuned from .*shapes: .*Give the Base that the training started from"
    ):
        open_delta(home)


def test_a_larger_vocabulary_of_the_instruct(tmp_path):
    """Added rows start as the Instruct's, so that is what their update is counted from."""
    base = save_model(tmp_path / "base", vocab_size=264)
    instruct = save_model(tmp_path / "instruct", seed=1, vocab_size=272)
    home = configured(tmp_path / "run", (base, instruct))
    state = tuned(instruct, 2)
    write(home, state, 3)
    name = "model.embed_tokens.weight"
    found = open_delta(home).tensor(name)
    first, second = load_file(base / "model.safetensors")[name], load_file(instruct / "model.safetensors")[name]
    torch.testing.assert_close(found, state[name] - torch.cat([first, second[264:]]), rtol=0, atol=0)


def test_a_sharded_checkpoint(run, pair, caplog):
    """What FSDP2 leaves: a folder of shards beside the rest; read tensor by tensor."""
    state = tuned(pair[0], 5)
    folder = run / "checkpoints" / "step-6.ckpt"
    named = {f"model.{n}": t for n, t in state.items()}
    sharded.save({"state_dict": named, "optimizer_0": {"x": torch.zeros(3)}}, checkpoint_id=folder, no_dist=True)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="no complete"):
        stages(run)  # meta.pt is written last
    assert "is not a complete sharded checkpoint" in caplog.text
    torch.save({"global_step": 6}, folder / "meta.pt")
    (stage,) = stages(run)
    before = load_file(pair[0] / "model.safetensors")
    delta = open_stage(stage)
    assert stage.step == 6 and delta.shapes.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(delta.tensor(name), state[name] - before[name], rtol=0, atol=0)


def test_paths_relative_to_where_the_run_was_started(tmp_path, pair, monkeypatch):
    """The configuration says models/base; the run lies beside it, and the reader somewhere else."""
    shutil.copytree(pair[0], tmp_path / "models/base")
    shutil.copytree(pair[1], tmp_path / "models/instruct")
    home = configured(tmp_path / "runs/a/version_0", ("models/base", "models/instruct"))
    write(home, tuned(pair[0], 1), 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_delta(home).norm() > 0


@pytest.mark.parametrize("kind", [
    "lora", "full of a mixture",
    pytest.param("full", marks=pytest.mark.slow), pytest.param("lora of a mixture", marks=pytest.mark.slow),
])  # fmt: skip
def test_equal_to_what_a_real_run_logged(kind, tmp_path):
    """The norm of the update at every checkpoint, and the loss of the graft, as the callback measured them."""
    plan = {
        "trainer.max_steps": 4, "trainer.val_check_interval": 2, "graft.baselines": True,
        "trainer.limit_val_batches": 1.0, "data.limit_train_samples": 64,
    }  # fmt: skip
    plan |= {"model.adapter": "null", "model.lr": 3e-4} if "full" in kind else {}
    if "mixture" in kind:  # its experts lie fused in the run, and one by one in the pair's files
        base, instruct = save_pair(tmp_path, "qwen3_moe", tied=False)
        plan |= {"pair.base": str(base), "pair.instruct": str(instruct), "trainer.limit_val_batches": 2}
    home = fit(tmp_path / "run", plan)
    run = read_run(home)
    found = evolutions({"run": home})["run"]
    assert dict(zip(found.steps, found.norms, strict=True)) == pytest.approx(
        dict(run.points("graft/delta_norm")), rel=1e-5
    )
    scored = losses(open_delta(home), home, ranks=[1000], densities=[1.0])
    assert scored.untouched == pytest.approx(run.last("val/instruct/loss"), rel=1e-5)
    assert scored.whole == pytest.approx(run.last("val/grafted/loss"), rel=1e-5)
    assert scored.by_rank[1000.0] == pytest.approx(scored.whole, rel=1e-4)
    assert scored.by_density[1.0] == scored.whole
    assert abs(scored.whole - scored.untouched) > 1e-4


def test_checkpoints_hold_only_safe_types(tmp_path):
    """A pickle that would run code is refused, and not run."""

    class Evil:
        def __reduce__(self):
            return (json.loads, ("[1]",))

    torch.save({"state_dict": {"model.x": torch.ones(1)}, "global_step": 1, "e": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        TrainedReader(tmp_path / "evil.ckpt")
