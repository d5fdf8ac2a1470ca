"""``shadowlit init`` writes a configuration that runs as it is written."""

import time
from typing import get_args

import huggingface_hub
import pytest
import torch
import yaml

from shadowlit.cli import init as module
from shadowlit.cli.main import main
from shadowlit.demo import BASE, DATA, INSTRUCT
from shadowlit.pair import hub

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
EMBEDDED = [f"--base={BASE}", f"--instruct={INSTRUCT}"]


@pytest.mark.parametrize("tuning", ["lora", "qlora", "full"])
def test_the_written_file_runs(tmp_path, capsys, monkeypatch, tuning):
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    assert main(["init", *EMBEDDED, f"--tuning={tuning}", f"--train={DATA / 'train_house.jsonl'}",
                 "--max_length=128"]) == 0  # fmt: skip
    assert "run.yaml: 32 conversations of 128 tokens per micro-batch, estimated to need " in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (written["model"]["adapter"] is None) == (tuning == "full")
    assert written["model"].get("quantization") == {"qlora": "nf4"}.get(tuning)
    assert main(["fit", "--config", "run.yaml", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false",
                 "--data.ignore_columns=[skill, answer]"]) == 0  # fmt: skip
    assert list(tmp_path.rglob("export/model/config.json"))


def written(file, *args):
    assert main(["init", *EMBEDDED, f"--out={file}", "--max_length=512", *args]) == 0
    return yaml.safe_load(file.read_text())


def test_a_small_gpu_gets_a_small_batch_and_the_same_step(tmp_path):
    large = written(tmp_path / "large.yaml", "--memory=80GB")
    assert (large["trainer"]["accelerator"], large["trainer"]["precision"]) == ("gpu", "bf16-mixed")
    assert (large["data"]["batch_size"], large["graft"]["offload"]) == (32, False)
    small = written(tmp_path / "small.yaml", "--memory=300MB")
    rows = small["data"]["batch_size"]
    assert rows < 32 and rows * small["trainer"]["accumulate_grad_batches"] == 32
    assert not small["graft"]["offload"]  # the smaller batch suffices
    assert written(tmp_path / "tiny.yaml", "--memory=1MB")["graft"]["offload"]


@pytest.mark.slow
def test_several_gpus_that_are_too_small(tmp_path):
    several = written(tmp_path / "several.yaml", "--memory=1MB", "--devices=4", "--tuning=full")
    assert several["trainer"]["strategy"]["init_args"]["data_parallel_size"] == 4
    assert several["data"]["batch_size"] * several["trainer"]["accumulate_grad_batches"] * 4 == 32
    assert "which is too little" in (tmp_path / "several.yaml").read_text()
    assert several["model"]["activation_checkpointing"] == "full"


def test_a_known_pair_that_is_out_of_reach_is_written_after_one_attempt(tmp_path, monkeypatch, capsys):
    asked = []

    def refuse(self, url, **options):
        asked.append((url, options["timeout"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(type(huggingface_hub.get_session()), "head", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.unreachable.cache_clear()
    file, begun = tmp_path / "a.yaml", time.monotonic()
    assert main(["init", "smollm2-135m", f"--out={file}"]) == 0
    assert main(["plan", f"--config={file}"]) == 1
    hub.unreachable.cache_clear()
    assert asked == [(huggingface_hub.constants.ENDPOINT, 5.0)] and time.monotonic() - begun < 20
    config = yaml.safe_load(file.read_text())
    assert config["pair"]["base_revision"] == "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
    assert config["data"]["batch_size"] == 1 and "not estimated" in file.read_text()
    assert "ConnectionError" not in file.read_text() and max(map(len, file.read_text().splitlines())) < 140
    shown = capsys.readouterr()
    (line, _) = shown.out.splitlines()
    assert line.startswith(f"{file}: 1 conversation of 2,048 tokens per micro-batch, without an estimate of the memory")
    assert "the hub can't be reached: ConnectionError: no network" in line
    assert len([line for line in shown.err.splitlines() if line.startswith("error: ")]) == 1


def test_an_existing_file_is_replaced_on_request_only(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("mine")
    assert main(["init", *EMBEDDED, f"--out={file}"]) == 1
    assert "Add --overwrite to replace it, or name another file with --out." in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert written(file, "--overwrite", "--memory=80GB")["pair"]["base"] == str(BASE)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "Give the name of a known pair"),
        (["smollm2-135m", "--base=x", "--instruct=y"], "Give the name of a known pair"),
        (["--base=x"], "Give the name of a known pair"),
        (["smollm2"], "no known pair 'smollm2'"),
        (["smollm2-135m", "--out=."], "which exists"),
        (["smollm2-135m", "--devices=0"], "devices is 0"),
        ([EMBEDDED[0], "--instruct=./none"], "'./none' is not a folder, and cannot be a hub id"),
    ],
)
def test_wrong_arguments_are_one_line(args, expected, capsys):
    assert main(["init", *args]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("train", [None, "my data: set.jsonl", "a.jsonl", "null", "x #1.jsonl", "1" * 200])
def test_any_path_is_written_as_text(train):
    assert yaml.safe_load(f"train: {module._scalar(train)}  # comment") == {"train": train}


def test_every_kind_of_tuning_has_its_lines():
    assert module._MODELS.keys() == set(get_args(module.Tuning))
