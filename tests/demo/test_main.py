"""The demonstration, cut short: what it prints and what it leaves."""

import json

import torch
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.scores import SUBJECTS
from shadowlit.demo.__main__ import SETS, main
from shadowlit.grafting.manifest import read_manifest


def test_the_demonstration_ends_with_table_plot_and_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal: what is piped has its own width
    short = [f"--evaluation.evaluators.{name}.init_args.limit=20" for name in (*SETS, "forgetting")]
    main(["--config", "configs/demo_lora.yaml", "--trainer.max_steps=24", "--trainer.enable_progress_bar=false",
          "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1",
          f"--run.root={tmp_path}", *short])  # fmt: skip
    shown = capsys.readouterr().out
    run = tmp_path / "demo_lora/version_0"
    headings = [word for title in SUBJECTS.values() for word in title.split()]  # which may take two lines
    assert all(title in shown for title in (*headings, *(f"{name}: exact match" for name in SETS.values())))
    assert f'AutoModelForCausalLM.from_pretrained("{run}/export/model")' in shown
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((run / "demo.json").read_text())
    # The untouched models don't depend on the training: the Instruct knows the old, and not the new.
    assert found["exact_match"]["instruct"]["old"] > 0.95 > 0.05 > found["exact_match"]["instruct"]["new"]
    assert found["exact_match"]["base"]["refusal"] < 0.05
    assert found["teacher_forced"]["test/tuned/new/loss"] < found["teacher_forced"]["test/base/new/loss"]
    assert read_manifest(run / "export/model")["logits_against_validated"]["max_abs"] == 0
    model = AutoModelForCausalLM.from_pretrained(run / "export/model")
    assert model.dtype == torch.float32
