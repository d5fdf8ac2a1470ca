"""Comparisons for real: each training once, whatever is killed; records that say what the models did."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from shadowlit.cli.compare import compare
from shadowlit.cli.main import main
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError, ShadowlitError
from shadowlit.studies.comparison.plan import Training
from shadowlit.studies.comparison.records import read_records
from shadowlit.studies.comparison.runner import own_folder, run
from shadowlit.studies.trials import process
from shadowlit.studies.trials.process import Job, last_words, untouched_failed
from shadowlit.studies.trials.recipe import Recipe
from tests.distributed import Forked
from tests.evaluation.contexts import write_rows
from tests.tiny import save_pair

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A configuration of fit on a tiny pair, in a folder of its own."""
    root = tmp_path_factory.mktemp("setting")
    base, instruct = save_pair(root, "qwen3")
    talks = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}{i}"}]}
        for i in range(8)
    ]
    rows = write_rows(root / "rows.jsonl", talks)
    generation = {"data": rows, "match": "contains", "max_new_tokens": 3}
    own = {
        "said": {"class_path": "shadowlit.evaluation.generated.Generation", "init_args": generation},
        "forgetting": {"class_path": "shadowlit.evaluation.forgetting.Divergence", "init_args": {"data": rows}},
    }
    content = {
        "pair": {"base": str(base), "instruct": str(instruct)},
        "model": {"lr": 1e-3, "adapter": None},
        "data": {"train": rows, "validation": rows, "batch_size": 4},
        "evaluation": {"evaluators": own},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0,
                    "enable_checkpointing": False},
    }  # fmt: skip
    (root / "fit.yaml").write_text(yaml.safe_dump(content))
    return root


def run_compare(setting, out, **options):
    given = {"rates": {"B2I": [1e-3], "I2I": [2e-3]}, "seeds": [0], "arms": "B2I,I2I,B2B,I2B"}
    given |= {"gain": ["said"], "task_scales": [0.5], **options}
    compare(str(setting / "fit.yaml"), out=str(out), threads=1, workers=2, scales=[1.0, 0.5], **given)
    return read_records(out / "records.json")


def test_changes_may_be_classes(setting, capsys, monkeypatch):
    """As the command line reads them."""
    jobs = []

    def kept(found, *_, **__):
        jobs.extend(found)
        raise ShadowlitError("enough")

    monkeypatch.setattr("shadowlit.studies.comparison.runner.run", kept)
    loha = {"class_path": "peft.LoHaConfig", "init_args": {"r": 2}}
    command = ["compare", f"--fit={setting / 'fit.yaml'}", "--seeds=0", f"--out={setting / 'classes'}"]
    assert main([*command, "--overrides", json.dumps({"model.adapter": loha})]) == 1
    assert len(jobs) == 3 and all(f"--model.adapter={json.dumps(loha)}" in job.arguments for job in jobs)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"model.start_from": "runs/sft"}, "model.start_from is 'runs/sft', an update of the Base"),
    ({"model.anchors": {"instruct": 0.3}}, "model.anchors is {'instruct': 0.3}, with which a training of the Instruct"),
])  # fmt: skip
def test_what_belongs_to_a_training_of_the_base_is_refused_for_one_of_the_instruct(setting, capsys, overrides, message):
    command = ["compare", f"--fit={setting / 'fit.yaml'}", "--seeds=0", f"--out={setting / 'start'}"]
    assert main([*command, "--overrides", json.dumps(overrides)]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def compared(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return out, run_compare(setting, out)


def test_two_trainings_give_four_arms_and_the_untouched(compared):
    _, records = compared
    assert [(r.arm, r.lr, r.seed, r.scale) for r in records] == [
        ("Base", None, None, None), ("Instruct", None, None, None),
        ("B2B", 1e-3, 0, None), ("B2I", 1e-3, 0, 1.0), ("B2I", 1e-3, 0, 0.5),
        ("I2I", 2e-3, 0, None), ("I2B", 2e-3, 0, 1.0), ("I2B", 2e-3, 0, 0.5),
    ]  # fmt: skip
    by_arm = {(r.arm, r.scale): r for r in records}
    assert all(set(r.samples["said"]) == set(range(8)) for r in records)
    assert by_arm["Instruct", None].metrics["forgetting/kl"] == 0
    assert by_arm["I2I", None].metrics["forgetting/kl"] > 0
    assert by_arm["Base", None].metrics["forgetting/kl"] > 0


def test_every_arm_is_the_model_that_its_delta_makes(compared, setting):
    """Losses of the four arms against weights put together by hand from the stored deltas and the pair."""
    out, records = compared
    folders = {"B": setting / "base", "I": setting / "instruct"}
    for arm in ("B2B", "B2I", "I2I", "I2B"):
        source, target = arm[0], arm[2]
        name = Training(source, {"B": 1e-3, "I": 2e-3}[source], 0).name
        delta = Delta.open(out / name / "delta")
        model = AutoModelForCausalLM.from_pretrained(folders[target], dtype=torch.float32).eval()
        state = model.state_dict()
        for tensor in delta.shapes:
            state[tensor] += delta.tensor(tensor)
        record = next(r for r in records if r.arm == arm and r.is_whole)
        # The tuned model also has what isn't grafted: norms and embeddings.
        tolerance = 1e-4 if source != target else 2e-2
        assert record.metrics["loss"] == pytest.approx(loss_by_hand(model, setting), rel=tolerance), arm


def loss_by_hand(model, setting):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting / "instruct")
    total, count = 0.0, 0
    for line in (setting / "rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]])
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = range(len(asked), ids.shape[1] - 1)  # without the line break behind the end of the turn
        total -= sum(log_probs[t - 1, ids[0, t]].item() for t in places)
        count += len(places)
    return total / count


def test_metrics_of_two_validation_sets_choose_and_are_reported(setting, tmp_path):
    """No evaluator scores; and the intervals are over the rows, since these make the metric that was logged."""
    lines = (setting / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("choice", lines[:3]), ("report", lines[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("choice", "report")}
    records = run_compare(
        setting, tmp_path / "out", arms="B2I,I2I", gain=None, choose="val/grafted/choice/loss", task_scales=[],
        score="report/loss,report/sequence_accuracy,report/first_token_loss",
        overrides={"data.validation": sets},
    )  # fmt: skip
    by_arm = {(r.arm, r.scale): r for r in records}
    for row in by_arm.values():
        assert "said" not in row.samples and ("forgetting/kl" in row.metrics) == (row.scale != 0.5)
        losses, tokens = row.samples["report/loss"], row.samples["report/num_tokens"]
        assert len(losses) == 5
        first, answers = row.samples["report/first_token_loss"], row.samples["report/num_answers"]
        mean = sum(first[i] * answers[i] for i in first) / sum(answers.values())
        assert mean == pytest.approx(row.metrics["report/first_token_loss"], rel=1e-6)
        mean = sum(losses[i] * tokens[i] for i in losses) / sum(tokens.values())
        assert mean == pytest.approx(row.metrics["report/loss"], rel=1e-6)
    text = (tmp_path / "out/report/REPORT.md").read_text()
    again = re.search(r"Made by: `(.*)`", text)[1]
    assert "--choose val/grafted/choice/loss" in again and "--score report/loss,report/sequence_accuracy" in again
    assert all(word in again for word in ("--scales '[1.0, 0.5]'", "--overrides '{", "--arms B2I,I2I", "--seeds 0"))
    assert "lowest choice/loss" in text and "5 rows" in text and "share rows" not in text
    difference = by_arm["B2I", 1.0].metrics["report/loss"] - by_arm["I2I", None].metrics["report/loss"]
    assert f"{abs(difference):.4f}" in text.split("## Paired differences")[1]
    assert "B2B" not in text.split("## Each arm at its chosen rate")[1].split("## Cost")[0]


def test_facts_cost_and_line(compared):
    out, records = compared
    graft = next(r for r in records if r.arm == "B2I" and r.scale == 1.0)
    b, i = (Delta.open(out / name / "delta") for name in ("B_lr0.001_seed0", "I_lr0.002_seed0"))
    assert graft.facts["cos_deltas"] == pytest.approx(b.cosine(i))
    assert graft.facts["delta_norm"] == pytest.approx(b.norm())
    assert 0 < graft.facts["sigma"] < 1 and 0 < graft.facts["delta_over_offset"] < 1
    assert graft.facts["survival"] > 0.99
    assert set(graft.line) == {0.0, 0.5, 1.0} and graft.line[1.0] == graft.metrics["loss"]
    instruct = next(r for r in records if r.arm == "Instruct")
    assert graft.line[0.0] == instruct.metrics["loss"]
    half = next(r for r in records if r.arm == "B2I" and r.scale == 0.5)
    assert graft.line[0.5] == half.metrics["loss"]
    assert graft.cost["train_s"] > 0 and graft.cost["trained_parameters"] > 1e4
    assert graft.cost["peak_memory_bytes"] > 1e7 and graft.cost["tokens_per_s"] > 0


def test_what_is_finished_is_skipped_and_more_can_be_added(compared, setting):
    out, _ = compared
    before = (out / "B_lr0.001_seed0/result.json").stat().st_mtime_ns
    records = run_compare(setting, out, arms="B2I,I2I", seeds="0,1")
    assert (out / "B_lr0.001_seed0/result.json").stat().st_mtime_ns == before
    assert {(r.arm, r.seed) for r in records if r.seed is not None} == {
        ("B2I", 0), ("I2I", 0), ("B2I", 1), ("I2I", 1)
    }  # fmt: skip
    one, two = (json.loads((out / f"B_lr0.001_seed{s}/result.json").read_text())["metrics"] for s in (0, 1))
    assert one["val/tuned/loss"] != two["val/tuned/loss"]


def test_only_what_is_asked_for_is_measured_and_an_arm_that_is_added_runs_again(setting, tmp_path, caplog):
    out = tmp_path / "out"
    run_compare(setting, out, arms="I2I", rates={"I2I": [2e-3]})
    home = out / "I_lr0.002_seed0"
    logged = json.loads((home / "result.json").read_text())["metrics"]
    assert not [name for name in logged if name.startswith(("val/grafted", "val/base", "val/instruct"))]
    assert [path.name for path in home.glob("evaluation/step-*/*") if path.is_dir()] == ["tuned"]
    untouched = json.loads((out / "untouched/result.json").read_text())["metrics"]
    assert untouched["val/grafted@0.5/said/score"] == untouched["val/instruct/said/score"]
    records = run_compare(setting, out, arms="I2I,I2B", rates={"I2I": [2e-3]})
    assert (
        "I_lr0.002_seed0 runs again, since an arm or an evaluator that is requested now was not measured then"
        in caplog.text
    )
    assert {(r.arm, r.scale) for r in records if r.seed == 0} == {("I2I", None), ("I2B", 1.0), ("I2B", 0.5)}
    assert all("said" in r.samples for r in records)
    again = json.loads((home / "result.json").read_text())["metrics"]
    assert {name: again[name] for name in logged if "/tuned/" in name} == {
        n: logged[n] for n in logged if "/tuned/" in n
    }


def test_another_recipe_needs_another_folder(compared, setting):
    out, _ = compared
    with pytest.raises(DataError, match=r"another recipe; changed since: model\.weight_decay unset → 0\.1\. Give"):
        run_compare(setting, out, overrides={"model.weight_decay": 0.1})


def test_a_recipe_may_change_while_nothing_is_finished(setting, tmp_path, caplog):
    """As after a mistake that all trainings failed of; what an interrupted one has left is removed."""
    before, after = (Recipe(setting / "fit.yaml", {"model.weight_decay": value}) for value in (0.1, 0.2))
    begun = tmp_path / "B_lr0.001_seed0"
    with own_folder(tmp_path, before):
        (begun / "checkpoints").mkdir(parents=True)
        for name in (".lock", "config.yaml", "log.txt"):
            (begun / name).touch()
    (tmp_path / "untouched").mkdir()
    for name in (".lock", "result.json"):  # no training
        (tmp_path / "untouched" / name).touch()
    with own_folder(tmp_path, after):
        assert not (tmp_path / "untouched/result.json").exists()
        assert [path.name for path in begun.iterdir()] == [".lock"]
    assert "model.weight_decay 0.1 → 0.2" in caplog.text
    (begun / "result.json").write_text("{}")
    with pytest.raises(DataError, match=r"model\.weight_decay 0\.2 → 0\.1"), own_folder(tmp_path, before):
        pass
    with own_folder(tmp_path, after):
        pass


def test_wrong_rows_of_an_evaluator_are_told_whole_before_anything_starts(setting, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": f"{i}"} for i in range(3)])
    own = {"class_path": "shadowlit.evaluation.generated.Generation", "init_args": {"data": rows, "match": "numeric"}}
    with pytest.raises(ShadowlitError) as told:
        run_compare(setting, tmp_path / "out", gain=["math"], overrides={"evaluation.evaluators": {"math": own}})
    assert all(word in str(told.value) for word in ("evaluation.evaluators.math", "line 1", "line 3", "answer"))
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_share_a_folder(setting, tmp_path):
    recipe = Recipe(setting / "fit.yaml", {})
    with (
        own_folder(tmp_path, recipe),
        pytest.raises(DataError, match="another comparison is running"),
        own_folder(tmp_path, recipe),
    ):
        pass


def test_a_failing_training_costs_only_itself(compared, setting, tmp_path):
    """A rate at which the training diverges: its graft can't be stored. The report has the others."""
    out = shutil.copytree(compared[0], tmp_path / "out", ignore=shutil.ignore_patterns("records.json", "report"))
    told = (
        r"1 of 3 jobs failed.*B_lr1e\+30_seed0: .*the norm of the update is nan.*an earlier checkpoint\. Fix the cause"
    )
    with pytest.raises(ShadowlitError, match=told):
        run_compare(setting, out, arms="B2I", rates={"B2I": [1e-3, 1e30]})
    records = read_records(out / "records.json")
    assert [r.lr for r in records if r.arm == "B2I" and r.scale == 1.0] == [1e-3]
    assert (out / "report/REPORT.md").is_file()


def compare_again(setting, out):
    rates = {"B2I": [1e-3, 2e-3]}
    compare(str(setting / "fit.yaml"), out=str(out), arms="B2I", rates=rates, seeds="0,1", workers=2, threads=1)


def test_every_training_runs_once_though_the_command_is_killed(setting, tmp_path):
    """SIGKILL while trainings run, and the same command again; orphans end by themselves."""
    told = tmp_path / "told.txt"
    first = Forked(compare_again, setting, tmp_path / "out", out=told)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*/result.json"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline, told.read_text()[-3000:]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")}
    assert Forked(compare_again, setting, tmp_path / "out", out=told).wait(240) == 0, told.read_text()[-3000:]
    found = sorted((tmp_path / "out").glob("*/result.json"))
    assert len(found) == 5  # four trainings and the untouched models
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    grafts = [(r.lr, r.seed) for r in read_records(tmp_path / "out/records.json") if r.arm == "B2I"]
    assert sorted(grafts) == [(lr, seed) for lr in (1e-3, 2e-3) for seed in (0, 1)]


@pytest.mark.slow
def test_a_job_in_a_process_of_its_own_from_the_start(setting, tmp_path):
    """As trainings on several devices are: Lightning may start more processes from it."""
    recipe = Recipe(setting / "fit.yaml", {})
    job = Training("B", 1e-3, 0).job(recipe, tmp_path)
    assert run([job], tmp_path, in_process=False, threads=1) == []
    assert json.loads((tmp_path / job.name / "result.json").read_text())["step"] == 2


def test_a_job_in_a_process_of_its_own_that_fails(tmp_path, monkeypatch):
    """A script in place of the interpreter, which would need seconds to tell that there is no such key."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$@"\nexit 2\n')
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    assert run([Job("bad", ("fit", "--no_such_key=1"))], tmp_path, in_process=False) == ["bad"]
    assert last_words(tmp_path / "bad").endswith("trials.trial " + str(tmp_path / "bad") + " fit --no_such_key=1")


@pytest.mark.parametrize(("log", "words"), [
    ("error: data.batch_size is 0\nKnown: 1, 2.\ntip: --help\n", "error: data.batch_size is 0 Known: 1, 2."),
    ("Traceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA\n\n/a.py:3: UserWarning: late\n",
     "torch.OutOfMemoryError: CUDA"),
    ("ValueError: one\nDuring handling:\nKeyError: 'two'\na note\n", "KeyError: 'two' a note"),
    ("x.DataError: 2 problems:\n  rows.jsonl, line 1\n  rows.jsonl, line 2. Correct them.\n\nlate\n",
     "x.DataError: 2 problems: rows.jsonl, line 1 rows.jsonl, line 2. Correct them."),
    ("loading\nKilled\n\n", "Killed"),
    ("error: data.pair is 3. Give it a folder.\n", "error: data.pair is 3. Give it a folder."),
    ("", "it left no log"),
])  # fmt: skip
def test_the_reason_of_a_failure_is_one_line(tmp_path, log, words):
    (tmp_path / "log.txt").write_text(log)
    assert last_words(tmp_path) == words
    assert f"compare with: {words.removesuffix('.')}. Fix the cause" in str(untouched_failed(tmp_path))


def test_an_interrupted_training_keeps_what_it_resumes_from(setting, tmp_path):
    """In a run of its own folder; what it has exported and measured is made again."""
    folder = tmp_path / "B"
    for name in ("checkpoints", "delta"):
        (folder / name).mkdir(parents=True)
    for name in ("metrics.csv", "config.yaml", "complete.json", "live.json"):
        (folder / name).touch()
    process._clear(Job("B", ("fit", "--x=1")), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "metrics.csv"]
    arguments = Training("B", 1e-3, 0).job(Recipe(setting / "fit.yaml", {}), tmp_path).arguments
    assert {f"--run.root={tmp_path}", "--run.name=B_lr0.001_seed0"} <= {*arguments}


@pytest.mark.parametrize(("options", "message"), [
    ({"gain": ["nothing"]}, "--gain names nothing; the configuration's evaluators are forgetting, said"),
    ({"scales": [0.5, 1.0]}, r"--scales is \[0\.5, 1\.0\]; the first must be 1\.0"),
    ({"arms": "B2X"}, "arms are B2X"),
    ({"workers": 0}, "--workers is 0; expected at least 1"),
    ({"threads": 0}, "--threads is 0; expected at least 1"),
    ({"seeds": "0,x"}, "--seeds is '0,x'; expected whole numbers"),
    ({"overrides": {"evaluation.evaluators": {}}}, r"has no evaluation\.evaluators"),
    ({"score": "other/loss"}, "--score names other/loss, which no validation logs; known are accuracy, "),
    ({"score": "loss", "choose": "loss,accuracy"}, "--choose names loss, accuracy, which have no common mean"),
    ({"score": "forgetting/score"}, "--score names forgetting/score: forgetting measures the agreement"),
    ({"score": "loss", "choose": "forgetting/stderr:lower"}, "--choose names forgetting/stderr: forgetting measures"),
    ({"gain": "forgetting"}, "no score says what is learned: forgetting measures the agreement"),
])  # fmt: skip
def test_what_cannot_be_compared_is_told_at_once(setting, tmp_path, options, message):
    with pytest.raises(ShadowlitError, match=message):
        compare(str(setting / "fit.yaml"), out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_trainings(setting, tmp_path, capsys):
    compare(str(setting / "fit.yaml"), seeds="0,1", dry_run=True, out=str(tmp_path / "out"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 trainings" in shown and "B_lr0.001_seed0" in shown and "I_lr0.001_seed1" in shown
    assert not (tmp_path / "out").exists()
