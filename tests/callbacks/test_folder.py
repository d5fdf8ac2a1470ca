"""The folder of a run of a Trainer of one's own, with loggers whose runs share theirs, as W&B's do."""

import json
import os
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.folder import run_folder
from shadowlit.callbacks.metrics_file import MetricsFile
from shadowlit.callbacks.predictions import PredictionWriter
from shadowlit.callbacks.record import ValidationRecord
from shadowlit.data.module import ShadowData
from shadowlit.errors import ExportError
from shadowlit.lightning_cli import ShadowTrainer
from shadowlit.pair.pair import ModelPair
from shadowlit.run_parser import ShadowParser
from shadowlit.runs import SaveConfig


class Shared(DummyLogger):
    """Logs to a server, and keeps its local files in the working folder."""

    save_dir = "."
    name = "project"

    def __init__(self, version, save_dir="."):
        super().__init__()
        self.number, self.save_dir = version, save_dir

    @property
    def version(self):
        return self.number


def make(logger, kind=ShadowTrainer, **options):
    return kind(accelerator="cpu", devices=1, logger=logger, enable_progress_bar=False, **options)


def test_the_folder_is_where_the_checkpoints_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loggers = {
        "project/x7": Shared("x7"), "project/version_3": Shared(3), "here/project/x7": Shared("x7", None),
        "runs/csv/version_0": CSVLogger("runs", "csv"), "here": False,
    }  # fmt: skip
    for folder, logger in loggers.items():
        trainer = make(logger, Trainer, default_root_dir="here")
        checkpoint = ModelCheckpoint()
        checkpoint.setup(trainer, SimpleNamespace(), "fit")
        assert os.path.samefile(".", tmp_path) and os.path.normpath(checkpoint.dirpath) == f"{folder}/checkpoints"
        assert str(run_folder(trainer)) == folder
        assert ExportCallback()._target(trainer) == run_folder(trainer) / "export"
        PredictionWriter().write_on_epoch_end(trainer, None, [[{"index": 0, "answer": "a"}]], [])
        assert json.loads((tmp_path / folder / "predictions.jsonl").read_text())["answer"] == "a"
        EvaluationCallback()._write(trainer, ValidationRecord())


def test_no_config_is_lost(tmp_path, monkeypatch):
    """The last one is config.yaml; earlier ones that differ are kept."""
    monkeypatch.chdir(tmp_path)
    parser = ShadowParser()
    parser.add_argument("--lr", type=float)
    for lr in (1.0, 2.0, 2.0, 3.0):
        logger = MetricsFile("runs", "a", is_new=False)
        SaveConfig(parser, parser.parse_args([f"--lr={lr}"])).setup(make(logger), None, "fit")
    found = {file.name: yaml.safe_load(file.read_text())["lr"] for file in (tmp_path / "runs/a").iterdir()}
    assert found == {"config.yaml": 3.0, "config-v1.yaml": 1.0, "config-v2.yaml": 2.0}


def test_every_rank_asks_for_the_folder_of_the_predictions(tmp_path):
    """Which is a collective: the first one would wait for the others for ever."""
    asked = []
    strategy = SimpleNamespace(broadcast=lambda folder: asked.append(folder) or folder)
    trainer = SimpleNamespace(default_root_dir=tmp_path, logger=None, strategy=strategy, is_global_zero=False)
    PredictionWriter().write_on_epoch_end(trainer, None, [], [])
    assert asked == [str(tmp_path)] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [str, lambda path: {"path": path, "max_rows": 1}], ids=["path", "mapping"])
def test_predictions_don_t_overwrite_the_prompts(tmp_path, given):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}")
    module = SimpleNamespace(predict_step=lambda batch, batch_idx: None)
    trainer = SimpleNamespace(
        datamodule=ShadowData(ModelPair("base", "instruct"), predict=given(str(prompts))),
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda error: error),
    )
    with pytest.raises(ExportError, match=r"^predictions.file is '.*prompts.jsonl', which exists and belongs to .*pro"):
        PredictionWriter(str(prompts)).setup(trainer, module, "predict")
    PredictionWriter(str(prompts)).setup(trainer, module, "fit")
    PredictionWriter(str(tmp_path / "answers.jsonl")).setup(trainer, module, "predict")


@pytest.mark.parametrize("file, reason", [("taken/x.jsonl", "Not a directory"), ("folder", "it is a folder")])
def test_predictions_that_cannot_be_written_are_found_before_the_first_answer(tmp_path, file, reason):
    (tmp_path / "taken").touch()
    (tmp_path / "folder").mkdir()
    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda error: error))
    module = SimpleNamespace(predict_step=lambda batch, batch_idx: None)
    writer = PredictionWriter(str(tmp_path / file))
    with pytest.raises(
        ExportError, match=rf"^predictions\.file={tmp_path}/{file} can't be written: .*{reason}.*another file"
    ):
        writer.setup(trainer, module, "predict")
    writer.setup(trainer, module, "fit")
    PredictionWriter(str(tmp_path / "new/x.jsonl")).setup(trainer, module, "predict")
    assert not (tmp_path / "new").exists()
