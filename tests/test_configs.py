"""Every configuration: short, accepted by the parser, and run for two steps on a small pair."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from shadowlit.grafting.manifest import read_manifest
from shadowlit.lightning_cli import main
from tests.distributed import run_ranks
from tests.tiny import save_pair
from tests.vision import tiny as vision

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"), key=lambda path: path.name)
# Defaults that are stated nevertheless: what a reader looks for first.
STATED = {".data.max_length", ".model.adapter", ".model.lr", ".model.train_towers", ".trainer.precision"}

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_there_are_configurations():
    names = {path.stem for path in CONFIGS}
    assert names >= {"demo_lora", "demo_full", "demo_fsdp", "qwen3_0.6b_lora", "qwen3_4b_full_fsdp", "paper"}


@every_config
def test_the_header_says_what_a_user_needs_first(path):
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    for part in ("Memory:", "Launch:", "Override:", f"configs/{path.name}"):
        assert part in header


def leaves(value, prefix=""):
    """Dotted keys and values; a list is a value. The parser spells a class out where it can be inferred."""
    if not isinstance(value, dict) or not value:
        return {prefix.replace(".init_args", ""): value}
    return {key: leaf for name, part in value.items() for key, leaf in leaves(part, f"{prefix}.{name}").items()}


@every_config
def test_the_parser_accepts_it_and_understands_what_is_written(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code in (0, None)
    understood = leaves(yaml.safe_load(capsys.readouterr().out))
    for key, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
        if key != ".trainer.callbacks":  # printed with all their defaults
            assert understood[key] == value, key


def test_no_key_repeats_a_default(capsys):
    """--help and the reference have the defaults; a file has what is its own."""
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    defaults = leaves(yaml.safe_load(capsys.readouterr().out))
    assert len(defaults) > 100
    for path in CONFIGS:
        given = leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
        repeated = {key for key, value in given.items() if key in defaults and defaults[key] == value}
        assert repeated - STATED == set(), path.name


def test_a_misspelt_key_is_an_error(tmp_path, capsys):
    text = CONFIGS[0].read_text(encoding="utf-8").replace("eval_batch_size:", "eval_batchsize:")
    (tmp_path / "typo.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(tmp_path / "typo.yaml"), "--print_config"])
    assert stop.value.code == 2
    assert "eval_batchsize" in capsys.readouterr().err


def test_an_option_of_one_evaluator_can_be_set_from_the_command_line(capsys):
    args = ["fit", "--config", str(ROOT / "configs/demo_lora.yaml"), "--print_config"]
    with pytest.raises(SystemExit):
        main([*args, "--evaluation.evaluators.new.init_args.limit=20", "--evaluation.samples=0"])
    found = yaml.safe_load(capsys.readouterr().out)["evaluation"]
    assert found["evaluators"]["new"]["init_args"]["limit"] == 20 and found["samples"] == 0
    assert found["evaluators"]["old"]["init_args"]["limit"] is None
    with pytest.raises(SystemExit):
        main([*args, "--evaluation.evaluators.new.init_args.limmit=20"])
    assert "limmit" in capsys.readouterr().err


def test_a_path_of_data_is_no_configuration(tmp_path, capsys):
    """Files of one JSON array, or of a single row, are data and not the mapping of a source."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name, rows in (("array.json", [row, row]), ("one.jsonl", row)):
        (tmp_path / name).write_text(json.dumps(rows))
        data = yaml.safe_dump({"data": {"train": str(tmp_path / name), "validation": {"x": str(tmp_path / name)}}})
        (tmp_path / "data.yaml").write_text(data)
        args = ["fit", "--config", str(ROOT / "configs/demo_lora.yaml"), "--print_config"]
        for given in (["--config", str(tmp_path / "data.yaml")], [f"--data.train={tmp_path / name}"]):
            with pytest.raises(SystemExit):
                main([*args, *given])
            found = yaml.safe_load(capsys.readouterr().out)["data"]
            assert found["train"] == str(tmp_path / name)


def effective_batch(name):
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))
    trainer = config["trainer"]
    return config["data"]["batch_size"] * trainer["devices"] * trainer.get("accumulate_grad_batches", 1)


def test_effective_batches_are_those_that_are_promised():
    assert effective_batch("paper") == effective_batch("qwen3_4b_full_fsdp") == 256
    assert effective_batch("demo_fsdp") == effective_batch("demo_full")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small pairs in bfloat16, as published ones are, and 16 conversations."""
    root = tmp_path_factory.mktemp("tiny")
    for arch in ("qwen3", "llama"):
        (root / arch).mkdir()
        save_pair(root / arch, arch, tied=arch == "qwen3", dtype=torch.bfloat16)
    vision.save_pair(root / "llava", "llava", dtype=torch.bfloat16)
    vision.write_rows(root / "llava", 16, "rows", text_every=8)
    turns = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes" * (i % 3)}] for i in range(16)
    ]
    rows = [
        json.dumps({"messages": [question, {**answer, "content": answer["content"] + "!"}]})
        for question, answer in turns
    ]
    (root / "rows.jsonl").write_text("\n".join(rows))
    return root


def fit(args):
    """Train; return the optimizer steps and the logged names."""
    torch.set_num_threads(1)
    trainer = main(args).trainer
    return trainer.global_step, sorted(trainer.callback_metrics), trainer.log_dir


# tests/training/test_distributed.py runs the sharded demonstration too, as Lightning launches it.
@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in ("demo_fsdp", "demo_full") else [])
    for path in CONFIGS
])  # fmt: skip
def test_two_steps_on_a_small_pair(path, tiny, tmp_path, monkeypatch):
    """As written but for the pair, the data, the devices and the length; sharded ones on two processes."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    sharded = "strategy" in config["trainer"]
    size = 2 if sharded else 1
    args = [
        "fit", f"--config={path}", "--trainer.accelerator=cpu", f"--trainer.devices={size}", "--trainer.max_steps=2",
        "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.accumulate_grad_batches=1",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        f"--run.root={tmp_path}",
    ]  # fmt: skip
    if sharded:
        args.append(f"--trainer.strategy.init_args.data_parallel_size={size}")
    if path.stem.startswith("demo"):
        args += ["--data.limit_train_samples=64", "--data.batch_size=4", "--data.eval_batch_size=4"]
        args += [f"--evaluation.evaluators.{name}.init_args.limit=4" for name in config["evaluation"]["evaluators"]]
    else:
        pair = tiny / ("llama" if "Llama" in config["pair"]["base"] else "qwen3")
        rows = tiny / "rows.jsonl"
        if "train_towers" in config["model"]:
            pair, rows = tiny / "llava", tiny / "llava/rows.jsonl"
        args += [
            f"--pair.base={pair / 'base'}", f"--pair.instruct={pair / 'instruct'}", f"--data.train={rows}",
            f'--data.validation={{"task": "{rows}"}}', "--data.batch_size=2", "--data.template_kwargs={}",
            "--data.max_length=256", "--data.num_workers=0",
        ]  # fmt: skip
    steps, logged, folder = run_ranks(fit, 2, args)[0] if sharded else fit(args)
    assert steps == 2
    assert {"val/tuned/loss", "val/grafted/loss", "val/instruct/loss", "graft/gain", "graft/survival"} <= set(logged)
    manifest = read_manifest(Path(folder) / "export/model")
    assert manifest["config"]["model"]["lr"] == config["model"]["lr"]
    assert (Path(folder) / "export/adapter").exists() is (config["model"]["adapter"] is not None)
