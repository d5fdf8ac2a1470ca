"""``shadowlit export``: what fit's own export of the same step writes, from a checkpoint alone."""

import shutil

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from safetensors.torch import load_file

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.delta.delta import Delta
from shadowlit.grafting.manifest import read_manifest
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from tests.callbacks.test_graft import make_trainer
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_pair
from tests.vision.tiny import save_pair as save_vision_pair

PARTS = ["model", "adapter", "delta"]
ADAPTERS = {
    "full": None,
    "lora": {"r": 4},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"q_proj": 5}},
    "experts": {
        "r": 4,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": ["q_proj"],
    },
    "biases": {"r": 4, "bias": "all"},
    "whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
}


def fit(home, folders, kind, graft, world_size=1, subject="grafted", **options):
    """Train two steps, with a checkpoint of each and an export of the last, as the command line leaves them."""
    pair, adapter = dict(zip(("base", "instruct"), map(str, folders), strict=True)), ADAPTERS[kind]
    home.mkdir(parents=True, exist_ok=True)
    config = {
        "pair": pair, "graft": graft, "export": {"parts": PARTS, "subject": subject},
        "model": {"adapter": adapter and {"class_path": "peft.LoraConfig", "init_args": adapter}},
    }  # fmt: skip
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    saving = ModelCheckpoint(home / "checkpoints", "{step}", save_top_k=-1)
    export = ExportCallback(parts=PARTS, folder=str(home / "export"), subject=subject)
    callbacks = [GraftCallback(**graft), saving, export]
    if world_size > 1:
        options["strategy"] = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    module = ShadowModule(ModelPair(**pair), adapter and LoraConfig(**adapter), lr=1e-2 if adapter else 1e-3)
    trainer = make_trainer(home, *callbacks, devices=world_size, max_steps=2, val_check_interval=2, **options)
    trainer.fit(module, RandomData())


def files(folder, but=("shadowlit.json",)):
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def require_equal_export(home, capsys, *options):
    """Everything but the manifests is equal, byte for byte."""
    assert main(["export", "--ckpt", str(home / "checkpoints/step=2.ckpt"), *options]) == 0, capsys.readouterr().err
    expected, found = files(home / "export"), files(home / "export-step-2")
    assert [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)] == []
    manifests = [read_manifest(home / name / "model") for name in ("export", "export-step-2")]
    for key in ("base", "instruct", "scale", "select", "dtype", "metrics", "versions"):
        assert manifests[0][key] == manifests[1][key]
    assert manifests[0]["coverage"]["num_selected_parameters"] == manifests[1]["coverage"]["num_selected_parameters"]


SLOW = pytest.mark.slow
DARE = [{"name": "dare", "density": 0.5}]


@pytest.mark.parametrize(
    ("arch", "kind", "graft"),
    [
        ("qwen3", "full", {"select": "all", "scales": [0.7], "transforms": DARE}),
        ("qwen3", "lora", {"dtype": "float32"}),
        ("qwen3", "rslora", {"select": ["q_proj", "up_proj"], "scales": [0.7, 1.0]}),
        ("qwen3_moe", "experts", {}),
        ("qwen3_vl", "full", {"select": "all"}),  # the frozen vision tower is in the checkpoint
        pytest.param("qwen3", "lora", {"transforms": [{"name": "svd", "rank": 2}]}, marks=SLOW),
        pytest.param("qwen2", "biases", {}, marks=SLOW),
        pytest.param("llama", "whole", {"select": "all"}, marks=SLOW),
        pytest.param("qwen3_moe", "full", {}, marks=SLOW),
        pytest.param("gemma3_text", "lora", {"dtype": "bfloat16"}, marks=SLOW),
    ],
)
def test_the_files_are_those_of_fit(tmp_path, capsys, arch, kind, graft):
    # In larger products numpy and torch round differently.
    size = {"hidden": 256} if graft == {"dtype": "float32"} else {}
    dtype = torch.bfloat16 if arch == "llama" else torch.float32
    save = save_vision_pair if arch == "qwen3_vl" else save_pair
    folders = save(tmp_path, arch, tied=arch == "qwen3", dtype=dtype, **size)
    fit(tmp_path / "run", folders, kind, graft)
    require_equal_export(tmp_path / "run", capsys)


def test_another_graft_of_the_run(tmp_path, capsys):
    """The one that the run exports, or one that is named; the best one is known to fit alone."""
    variants = {"dare": {"transforms": DARE, "scale": 0.7}, "half": {"scale": 0.5}}
    home = tmp_path / "run"
    fit(home, save_pair(tmp_path, "qwen3"), "lora", {"variants": variants}, subject="grafted@dare")
    require_equal_export(home, capsys)
    command = ["export", str(home / "checkpoints/step=2.ckpt"), "--parts=[adapter]"]
    assert main([*command, "--subject", "grafted@half", "--out", str(tmp_path / "half")]) == 0
    manifest = read_manifest(tmp_path / "half/adapter")
    assert (manifest["subject"], manifest["scale"]) == ("grafted@half", 0.5) and "transforms" not in manifest
    assert manifest["metrics"]["val/grafted@half/loss"] > 0
    told = refused(capsys, *command[1:], "--subject=best")
    assert "is 'best', which fit chooses by its scores; expected one of grafted, grafted@dare, grafted@half" in told
    assert "is 'dare', which" in refused(capsys, *command[1:], "--subject=dare")


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=SLOW)])
def test_the_files_of_a_sharded_checkpoint_are_those_of_fit(tmp_path, capsys, kind):
    folders = save_pair(tmp_path, "qwen3")
    run_ranks(fit, 2, tmp_path / "run", folders, kind, {}, 2)
    assert (tmp_path / "run/checkpoints/step=2.ckpt").is_dir()
    require_equal_export(tmp_path / "run", capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a LoRA run with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("run")
    fit(root / "run", save_pair(root, "qwen3"), "lora", {})
    return root / "run"


def refused(capsys, *words):
    assert main(["export", *map(str, words)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and "Traceback" not in told.err
    return " ".join(told.err.split())


def test_an_earlier_step_another_scale_and_some_parts(run, tmp_path, capsys):
    """In any folder: what is graft of the adapter times the scale."""
    shutil.copy(run / "checkpoints/step=1.ckpt", tmp_path / "copy.ckpt")
    command = ["export", str(tmp_path / "copy.ckpt"), "--run", str(run), "--out", str(tmp_path / "x"), "--scale=0.5"]
    assert main([*command, "--parts", "adapter", "delta"]) == 0
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["adapter", "delta"]
    assert main([*command, "--parts=[model]"]) == 0
    delta, base = Delta.open(tmp_path / "x/delta"), CheckpointReader(run.parent / "instruct")
    grafted, halved = (
        CheckpointReader(tmp_path / "x/model"),
        load_file(tmp_path / "x/adapter/adapter_model.safetensors"),
    )
    for name in delta.shapes:
        gained = grafted.read(name).double() - base.read(name).double()
        torch.testing.assert_close(gained, 0.5 * delta.tensor(name).double(), rtol=2**-7, atol=1e-7)
        up, down = (halved[f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight"] for f in "BA")
        torch.testing.assert_close(2 * (up @ down).double(), gained, rtol=1e-4, atol=1e-7)
    manifest = read_manifest(tmp_path / "x/model")
    assert manifest["scale"] == 0.5 and manifest["metrics"] == {}  # those of the run are another scale's


def test_what_is_wrong_is_told_in_a_line(run, tmp_path, capsys):
    last, copy = run / "checkpoints/step=2.ckpt", tmp_path / "copy.ckpt"
    shutil.copy(last, copy)
    assert "no folder above" in (told := refused(capsys, copy)) and "Give the folder of the run as --run" in told
    assert f"{tmp_path} holds no config.yaml" in refused(capsys, copy, "--run", tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/delta").touch()
    assert "x/delta exists and is a file. Nothing was written." in refused(
        capsys, last, "--out", tmp_path / "x", "--parts=[adapter,delta]"
    )
    assert "scale is 0, with which the graft would be the untouched Instruct" in refused(capsys, last, "--scale=0")
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    assert "copy.ckpt is damaged: it was cut short" in refused(capsys, copy, "--run", run)
    assert "doesn't exist. " in refused(capsys, run / "checkpoints/step=3.ckpt")
    other = {**yaml.safe_load((run / "config.yaml").read_text())}
    other["pair"] = {"base": other["pair"]["base"], "instruct": other["pair"]["base"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(other))
    told = refused(capsys, last, "--run", tmp_path)
    assert "was written with another instruct than pair.instruct of" in told
    assert not any(path.name.startswith("export-step") and path.name != "export-step-2" for path in run.iterdir())


def test_an_adapter_that_cannot_be_moved(tmp_path, capsys):
    fit(tmp_path / "run", save_pair(tmp_path, "qwen3"), "biases", {})
    last = tmp_path / "run/checkpoints/step=2.ckpt"
    assert "parts has 'adapter', which can't be written. With " in refused(capsys, last, "--parts", "adapter")


def test_a_residual_is_not_in_the_checkpoint_and_the_run_itself_can_export_it(tmp_path, capsys):
    """As the error says: resumed at its last step, it trains no further and writes the export."""
    folders = save_pair(tmp_path, "qwen3")
    fit(tmp_path / "run", folders, "pissa", {})
    last = tmp_path / "run/checkpoints/step=2.ckpt"
    told = refused(capsys, last)
    assert "lacks the residual that an adapter with init_lora_weights='pissa' leaves" in told
    command = f"fit --config {tmp_path}/run/config.yaml --run.name null --ckpt_path {last} --trainer.max_steps 2"
    assert told.endswith(command)  # with its name, it would be refused as a changed configuration of the run
    export = ExportCallback(folder=str(tmp_path / "again"))
    module = ShadowModule(ModelPair(*map(str, folders)), LoraConfig(**ADAPTERS["pissa"]), lr=1e-2)
    trainer = make_trainer(tmp_path, GraftCallback(), export, max_steps=2, val_check_interval=2)
    trainer.fit(module, RandomData(), ckpt_path=last)
    assert files(tmp_path / "again/model") == files(tmp_path / "run/export/model")


def signs(update: torch.Tensor) -> torch.Tensor:
    return update.sign() * 1e-3


def test_the_configuration_next_to_a_checkpoint_runs_no_code(tmp_path, capsys):
    home, checkpoint = tmp_path / "run", str(tmp_path / "run/checkpoints/step=2.ckpt")
    fit(home, save_pair(tmp_path), "lora", {"select": "all"})
    config = yaml.safe_load((home / "config.yaml").read_text())

    def export(section, **values):
        (home / "config.yaml").write_text(yaml.safe_dump({**config, section: {**config[section], **values}}))
        return ["export", "--ckpt", checkpoint, "--parts", "[delta]", "--out", str(tmp_path / "out")]

    called = {"class_path": "subprocess.getoutput", "init_args": {"cmd": f"touch {tmp_path}/called"}}
    assert main(export("model", adapter=called)) == 1
    assert "model.adapter.class_path 'subprocess.getoutput'; expected a class of peft's" in capsys.readouterr().err
    given = export("graft", transforms=[{"name": "tests.cli.test_export.signs"}])
    assert main(given) == 1
    assert "graft.transforms 'tests.cli.test_export.signs', a function" in capsys.readouterr().err
    assert not (tmp_path / "called").exists() and not (tmp_path / "out").exists()
    assert main([*given, "--trust_config", "true"]) == 0
    assert read_manifest(tmp_path / "out/delta")["transforms"] == [{"name": "tests.cli.test_export.signs"}]
