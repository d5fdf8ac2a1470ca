"""The command line: what a user types, and what stands on the screen and on the disk afterwards."""

import csv
import json
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from shadowlit.analysis.curves import read_metrics
from shadowlit.analysis.run import read_run
from shadowlit.analysis.run_plots import four_curves
from shadowlit.cli.main import COMMANDS, main
from shadowlit.errors import DataError
from shadowlit.text import number
from shadowlit.training.module import ShadowModule
from tests.distributed import run_command
from tests.tiny import save_pair


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pair, 12 training rows, two validation sets, and a configuration that uses them."""
    root = tmp_path_factory.mktemp("run")
    base, instruct = save_pair(root, "qwen3")
    for name, count in (("train", 12), ("left", 4), ("right", 3)):
        lines = []
        for i in range(count):
            turns = [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "yes" * (i % 3 + 1)}]
            lines.append(json.dumps({"messages": turns}) + "\n")
        (root / f"{name}.jsonl").write_text("".join(lines))
    config = {
        "run": {"root": str(root / "runs")},
        "pair": {"base": str(base), "instruct": str(instruct)},
        "model": {"lr": 1e-3, "max_new_tokens": 4},
        "data": {
            "train": str(root / "train.jsonl"), "batch_size": 4, "max_length": 64,
            "validation": {"left": str(root / "left.jsonl"), "right": str(root / "right.jsonl")},
            "test": {"left": str(root / "left.jsonl")}, "predict": str(root / "right.jsonl"),
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"monitor": "val/grafted/loss", "save_last": True},
            }],
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def fitted(root):
    arguments = ["fit", "--config", str(root / "run.yaml"), "--run.name=fitted"]
    assert main(arguments) == 0
    return root / "runs/fitted"


def test_without_a_command_the_commands_are_shown_at_once():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "shadowlit"], capture_output=True, text=True, check=True
    )
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
    assert " torch" not in shown.stderr  # not even imported


def test_an_unknown_command_is_told_with_the_nearest(capsys):
    assert main(["fitt"]) == 2
    assert "there is no command 'fitt'. Did you mean 'fit'?" in capsys.readouterr().err


def test_a_fit_leaves_config_metrics_checkpoint_and_export(fitted):
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    assert config["model"]["lr"] == 1e-3 and config["graft"]["select"] == "linear"
    assert (fitted / "checkpoints/last.ckpt").exists()
    manifest = json.loads((fitted / "export/model/shadowlit.json").read_text())
    assert manifest["config"]["model"]["lr"] == 1e-3
    with (fitted / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    for who in ("tuned", "grafted", "base", "instruct"):
        assert {f"val/{who}/loss", f"val/{who}/left/accuracy", f"val/{who}/right/sequence_accuracy"} <= set(columns)
    assert {"graft/gain", "graft/survival", "graft/delta_norm", "graft/time_share", "train/loss"} <= set(columns)


def test_the_saved_config_runs_again_and_overwrites_nothing(root, fitted):
    before = (fitted / "config.yaml").read_bytes()
    assert main(["fit", "--config", str(fitted / "config.yaml"), "--trainer.max_steps=1", "--run.name=again"]) == 0
    again = yaml.safe_load((root / "runs/again/config.yaml").read_text())
    assert again["trainer"]["max_steps"] == 1
    assert (fitted / "config.yaml").read_bytes() == before


def test_one_seed_for_everything_unless_a_part_has_its_own(root):
    """A second seed of an ablation gives another run; a part's own default of 0 would repeat the first one."""
    arguments = ["fit", "--config", str(root / "run.yaml"), "--trainer.max_steps=1", "--export.enabled=false"]
    assert main([*arguments, "--run.name=seeded", "--seed_everything=3", "--data.seed=5"]) == 0
    config = yaml.safe_load((root / "runs/seeded/config.yaml").read_text())
    assert (config["seed_everything"], config["model"]["seed"], config["data"]["seed"]) == (3, 3, 5)


def test_validate_and_test_a_checkpoint(root, fitted, capsys):
    """Hyperparameters in it change nothing: no class of theirs is imported."""
    checkpoint = fitted / "checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    assert content["world_size"] == 1
    named = root / "named.ckpt"
    torch.save({**content, "hyper_parameters": {"lr": 0.77, "_class_path": "antigravity.Module"}}, named)
    logged = read_metrics(fitted / "metrics.csv")
    for command, path in (("validate", named), ("test", checkpoint)):
        arguments = [command, "--config", str(root / "run.yaml"), f"--ckpt_path={path}"]
        assert main(arguments) == 0
        assert "antigravity" not in sys.modules
        shown = capsys.readouterr().out
        row = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["loss"])
        place = "" if command == "validate" else "left/"  # the test set is one of the validation sets
        values = [logged[f"val/{who}/{place}loss"][-1][1] for who in ("base", "instruct", "tuned", "grafted")]
        assert row[1:5] == [number(value) for value in values]


@pytest.mark.parametrize(("path", "message"), [
    ("https://a.org/a.ckpt", "ckpt_path is https://a.org/a.ckpt, an address; expected a path of this machine"),
    ("{}/none/a.ckpt", "a.ckpt doesn't exist. Expected a *.ckpt, file or folder, that 'fit' has written."),
])  # fmt: skip
def test_a_wrong_checkpoint_is_told_before_anything_is_loaded(root, path, message, capsys, monkeypatch):
    monkeypatch.setattr(ShadowModule, "configure_model", None)
    assert main(["fit", "--config", str(root / "run.yaml"), f"--ckpt_path={path.format(root)}"]) == 2
    assert message in capsys.readouterr().err


def test_predict_writes_the_grafted_answers_in_order(root, fitted):
    target = root / "answers.jsonl"
    checkpoint = fitted / "checkpoints/last.ckpt"
    arguments = ["predict", "--config", str(root / "run.yaml"), f"--ckpt_path={checkpoint}"]
    assert main([*arguments, f"--predictions.file={target}", "--data.batch_size=2"]) == 0
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert answers[0]["answer"] == greedy(fitted / "export/model", root / "right.jsonl")
    rows = [json.loads(line)["messages"] for line in (root / "right.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(fitted / "export/model")
    for answer, messages in zip(answers, rows, strict=True):
        *prompt, last = messages if messages[-1]["role"] == "assistant" else [*messages, {"content": None}]
        assert answer["reference"] == last["content"]
        assert answer["prompt"] == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def greedy(folder, prompts):
    """The first prompt's answer, by transformers alone."""
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = json.loads(prompts.read_text().splitlines()[0])["messages"][:-1]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_print_config_shows_every_key_and_takes_overrides(root, capsys):
    arguments = ["fit", "--config", str(root / "run.yaml"), "--model.adapter.r=3", "--graft.scales=[1.0,0.5]"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["adapter"]["init_args"]["r"] == 3
    assert config["graft"]["scales"] == [1.0, 0.5]
    assert config["trainer"]["use_distributed_sampler"] is False


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--model.learning_rate=1", "learning_rate"),
        ("--graft.scale=1", "scale"),
        ("--model.adapter.rank=8", "rank"),
        ("--model.lr=fast", "fast"),
    ],
)
def test_a_typo_or_a_wrong_type_is_an_error(root, argument, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(root / "run.yaml"), argument])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_help_is_made_from_the_docstrings(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Tensors that get the update" in shown
    assert "Peak learning rate of AdamW" in shown


@pytest.mark.parametrize("words, expected", [
    (["init"], "shadowlit init [PAIR]"), (["graft"], "shadowlit graft BASE TUNED INSTRUCT OUT"),
    (["pairs", "check"], "shadowlit pairs [options] check PAIR ..."),
])  # fmt: skip
def test_help_shows_what_is_given_as_words(words, expected, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {expected} [--key=value ...]\n")


def test_an_error_of_the_user_is_told_without_a_traceback(root, tmp_path):
    failed = run_command(tmp_path, "fit", "--config", str(root / "run.yaml"), "--data.train=none.jsonl")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: none.jsonl does not exist")
    assert "Traceback" not in failed.stderr


def test_preview_shows_the_mask(root, capsys):
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    (root / "train.json").write_text(json.dumps(rows))  # which the parser could take for a list of sources
    (root / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    files = [f"--data.train={root / 'train.json'}", f"--data.validation.left={root / 'one.jsonl'}"]
    assert main(["preview", "--config", str(root / "run.yaml"), "--num_samples=1", *files]) == 0
    shown = capsys.readouterr().out
    assert "⟦" in shown and "yes" in shown


def test_curves_of_the_run(fitted, tmp_path):
    series = read_metrics(fitted / "metrics.csv")
    assert series["val/grafted/loss"][0][0] == 3  # three steps of four rows
    axes = four_curves(read_run(fitted), sets=("left", "right")).axes
    assert [(axis.get_title(), axis.get_ylabel()) for axis in axes] == [
        (name, what) for what in ("loss (nats per token)", "token accuracy") for name in ("left", "right")
    ]
    assert all(len(axis.get_lines()) == 4 for axis in axes)
    (nothing,) = four_curves(read_run(fitted), ("loss",), ("middle",)).axes
    assert "has not logged val/…/loss" in nothing.texts[0].get_text()
    with pytest.raises(DataError, match=r"there is no .*metrics.csv"):
        read_metrics(tmp_path / "metrics.csv")
