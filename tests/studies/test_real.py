"""The study on a real language model: its rows are disjoint, and its report compares what it says it compares."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.real.answers import FORMS, right_call, right_number
from experiments.real.premise import copies, encoded
from experiments.real.report import (
    KL,
    Run,
    Setting,
    _premise_on_copies,
    advantage,
    at_equal_divergence,
    is_extrapolated,
    leave_one_out,
    write_report,
)
from experiments.real.rows import alpaca, chat, gsm8k, tool_calls, write
from experiments.real.score import condense, read_reference
from experiments.real.study import Study, Training, trainings
from shadowlit.errors import CheckpointError, DataError


def scores(losses, kl, tokens=10.0):
    """Rows of one loss each, with a divergence."""
    return [[loss * tokens, tokens, loss, 0.0, kl * tokens] for loss in losses]


def write_setting(folder, pair="near", task="tools", graft=(2.0, 1.5), direct=(1.0, 0.5)):
    """Untouched models at a loss of 3, and both arms at two rates: losses and divergences at scales 0.5, 1 and 1.5.

    The second rate is better on the rows for choosing and worse on those that are reported.
    """
    untouched = {name: scores([3.0, 3.0], 0.0) for name in ("choice", "report", "general", "identity")}
    found = {"instruct": {**untouched, "initial": [3.0, 1.0]}, "base": {**untouched, "initial": [2.0, 4.0]}}
    home = folder / pair / f"{task}_lora"
    home.mkdir(parents=True)
    offset = {"offset": 1.0, "base": 10.0, "instruct": 10.0, "sigma": 0.01}
    (folder / pair / f"{task}_untouched.json").write_text(json.dumps({**found, "offset": offset}))
    kls, spreads = {"B": (0.1, 0.2, 0.4), "I": (0.2, 0.6, 0.9)}, {"B": 0.1, "I": 0.0}  # spread: between the two rows
    for source, (first, second) in (("B", graft), ("I", direct)):
        spread = spreads[source]
        for lr, loss, choice in ((1e-4, first, 2.0), (2e-4, second, 1.0)):
            path = {
                f"{scale:g}": {
                    "choice": scores([choice, choice], kl),
                    "report": scores([loss + 0.1 / scale, loss + 0.1 / scale + spread], kl),
                    "general": scores([1.0], kl), "identity": scores([1.0], kl),
                }
                for scale, kl in zip((0.5, 1.0, 1.5), kls[source], strict=True)
            }  # fmt: skip
            raw = {"source": source, "lr": lr, "seed": 0, "norm": 0.5, "scores": path, "live": {}}
            if source == "B":
                raw["scores"]["B2B"] = {"report": scores([1.0], 0.3), "general": scores([1.0], 0.3)}
            (home / f"{source}_lr{lr:g}_seed0.json").write_text(json.dumps(raw))


def test_rates_are_chosen_on_other_rows_and_arms_compared_at_equal_divergence(tmp_path):
    write_setting(tmp_path)
    setting = Setting(tmp_path, "near", "tools", "lora")
    assert setting.chosen == {"B": 2e-4, "I": 2e-4}
    levels, ((graft, direct),) = at_equal_divergence(setting)
    assert levels == pytest.approx([0.2])  # the smaller of 0.2 and 0.6, which I2I has at scale 0.5
    assert graft[:, 0] / graft[:, 1] == pytest.approx([1.6, 1.7])
    assert direct[:, 0] / direct[:, 1] == pytest.approx([0.5 + 0.2] * 2)
    assert advantage([(graft, direct)]).difference == pytest.approx(0.7 - 1.65)  # negative: the graft's loss is higher


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: text.replace("report", "other"), lambda text: "[]",
    lambda text: text.replace('"norm"', '"name"').replace('"instruct"', '"nobody"'),
])  # fmt: skip
@pytest.mark.parametrize("name", ["near/tools_untouched.json", "near/tools_lora/I_lr0.0002_seed0.json"])
def test_a_damaged_result_is_named(tmp_path, damage, name):
    write_setting(tmp_path)
    file = tmp_path / name
    file.write_text(damage(file.read_text()))
    with pytest.raises(DataError, match=rf"{name} is damaged \(\w+.*\)\. Restore it, or remove it"):
        Setting(tmp_path, "near", "tools", "lora")


@pytest.mark.parametrize("name", ["choice", "general"])
def test_a_score_that_is_not_finite_is_damage_in_every_set(tmp_path, name):
    """A divergence of NaN left a seed out of the comparison at equal divergence, a loss of NaN could choose a rate."""
    write_setting(tmp_path)
    file = tmp_path / "near" / "tools_lora" / "B_lr0.0002_seed0.json"
    raw = json.loads(file.read_text())
    raw["scores"]["1"][name][0][KL if name == "general" else 0] = float("nan")
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=rf"{file.name} is damaged \(ValueError.*\)\. Restore it, or remove it"):
        Setting(tmp_path, "near", "tools", "lora")


def test_a_damaged_reference_is_named(tmp_path):
    file, rows = tmp_path / "near-tools.pt", {"choice": ["a", "b"], "general": ["c"]}
    reference = {"choice": {1: torch.ones(2, 3), 0: torch.ones(1, 3)}, "general": {0: torch.ones(4, 3)}}
    torch.save(reference, file)
    assert read_reference(file, rows)["general"][0].shape == (4, 3)
    whole = file.read_bytes()
    for damage in (b"", b"text", whole[: len(whole) // 2], whole[:-10]):
        file.write_bytes(damage)
        with pytest.raises(DataError, match=r"near-tools\.pt is damaged \(\w+: .*\)\. Remove it: the study measures"):
            read_reference(file, rows)
    others = ([1], {}, {"choice": reference["choice"]}, {**reference, "general": {}})
    for damage in (*others, {**reference, "general": {0: torch.full((4, 3), torch.nan)}}):
        torch.save(damage, file)
        with pytest.raises(DataError, match=r"near-tools\.pt is damaged"):
            read_reference(file, rows)


def test_the_path_is_linear_in_the_root_of_the_divergence_and_begins_at_the_instruct(tmp_path):
    write_setting(tmp_path)
    (run,) = Setting(tmp_path, "near", "tools", "lora").of("B")
    assert isinstance(run, Run) and run.learned(0.0) == 0.0
    halfway = run.at_divergence(0.05)  # between the Instruct (3.0 at 0) and scale 0.5 (1.7 at 0.1)
    assert halfway is not None and halfway[:, 0] / halfway[:, 1] == pytest.approx(
        [3 - 1.3 * 0.5**0.5, 3 - 1.2 * 0.5**0.5]
    )
    assert run.at_divergence(0.5) is None


def test_the_report_says_which_arm_is_better(tmp_path):
    write_setting(tmp_path / "results")
    write_setting(tmp_path / "results", task="gsm8k", graft=(0.5, 0.4), direct=(2.0, 2.5))
    write_report(tmp_path / "results", tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| near/")}
    assert "I2I" in rows["near/tools_lora"].split(" | ")[-1] and "B2I" in rows["near/gsm8k_lora"].split(" | ")[-1]
    assert (tmp_path / "learned_against_kl.png").stat().st_size > 10_000


def test_a_comparison_below_the_smallest_measured_scale_is_marked(tmp_path):
    write_setting(tmp_path, graft=(2.0, 1.5), direct=(1.0, 0.5))  # level 0.2, measured from 0.1 and 0.2 on
    setting = Setting(tmp_path, "near", "tools", "lora")
    assert not is_extrapolated(setting)
    for run in setting.runs:
        if run.source == "B":  # the level is 0.15 now, and I2I's smallest divergence 0.2
            run.path[1.0]["general"][:, KL] *= 0.75
    assert is_extrapolated(setting)


def test_a_threshold_is_fitted_on_the_other_settings():
    names = ["a", "a", "b", "b", "c", "c"]
    values, better = np.array([1.0, 9.0, 2.0, 8.0, 3.0, 7.0]), np.array([False, True] * 3)
    assert leave_one_out(names, values, better) == 1.0
    assert leave_one_out(["a", "b"], np.array([1.0, 2.0]), np.array([True, True])) == 1.0  # by the majority
    assert leave_one_out(["a", "a", "b", "b"], values[:4], np.array([True, True, False, False])) == 0.0  # nobody else's
    better[4:] = [True, False]  # c contradicts: its two are missed, and it misleads no one else's threshold to the end
    assert leave_one_out(names, values, better) <= 4 / 6


def test_rows_of_tools_are_called_once_and_prompts_of_alpaca_are_told_apart(tmp_path):
    def conversation(request, call):
        turns = [("human", "hello"), ("gpt", "hi"), ("human", request), ("function_call", call), ("observation", "ok")]
        return {"tools": "[]", "conversations": [{"from": who, "value": text} for who, text in turns]}

    calls = [("one", "f(1)"), ("two", "f(2)"), ("three", "f(1)"), ("two", "f(3)")]
    (tmp_path / "tools.json").write_text(json.dumps([conversation(*each) for each in calls]))
    rows = tool_calls(tmp_path / "tools.json")
    assert len({row["messages"][-1]["content"] for row in rows}) == len(rows) < 4
    assert all([m.get("train") for m in row["messages"]] == [None, None, False, None, True] for row in rows)
    instructions = [{"instruction": "a", "input": "", "output": "x"}, {"instruction": "a", "input": "", "output": "y"}]
    (tmp_path / "alpaca.json").write_text(json.dumps([*instructions, {"instruction": "b", "input": "c", "output": ""}]))
    assert [row["messages"][1]["content"] for row in alpaca(tmp_path / "alpaca.json")] == ["x"]
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    assert gsm8k(tmp_path / "gsm8k.jsonl", "So: ")[0]["messages"][1]["content"] == "So: a"


def test_answers_are_judged_by_their_own_rules():
    call = '{"name": "f", "arguments": {"a": 1, "b": [2]}}'
    assert right_call('{"arguments": {"b": [2], "a": 1}, "name": "f"}', call)
    assert not right_call('{"name": "f", "arguments": {"a": 1, "b": 2}}', call) and not right_call("f(1)", call)
    solution = "3 * 400 = <<3*400=1200>>1200\n#### 1,200"
    assert right_number("So it is 1200.", solution) and right_number("#### 1,200.0", solution)
    assert not right_number("1200 minus 200", solution) and not right_number("none", solution)
    good = ("Yes", "PARIS.", "- fig\n- kiwi\n- plum", "1. red\n2. blue\n3. pink", '{"city": "Paris"}', "Will it rain?",
            "Spring", "7", '"Merci"', "[The Sea]", "Certainly! A river flows.", "cat; dog", "The blue door is open.",
            "william shakespeare.", "Bread is good for you.", "Water is wet. Done.")  # fmt: skip
    bad = ("Yes, it is.", "Paris", "apple, pear, fig", "red, blue, green", "Paris", "It rains.", "A season is Spring.",
           "Seven", "Merci", "The Sea", "A river, certainly.", "cat and dog", "The door is open.", "Shakespeare",
           "Bread is made of flour and water.", "Done with water.")  # fmt: skip
    for (_, pattern), right, wrong in zip(FORMS, good, bad, strict=True):
        assert re.fullmatch(pattern, right) and not re.fullmatch(pattern, wrong), pattern


def test_a_copy_is_compared_with_its_own_original(tmp_path):
    """Two rows as they are, of which the second has a copy: it costs 0.5 nats per token the one, 0 the other."""

    def row(number, loss, tokens=10.0):
        return [number, loss * tokens, tokens, loss, 0.0]

    def model(second, copied):
        return {"chat/0/as they are": [row(0, 1.0), row(1, second)], "chat/0/numbers": [row(1, copied, 20.0)]}

    (tmp_path / "near").mkdir()
    raw = {"base": model(2.0, 2.5), "instruct": model(3.0, 3.0)}
    (tmp_path / "near" / "premise.json").write_text(json.dumps(raw))
    _, _, as_is, copy = _premise_on_copies(tmp_path, "near").splitlines()
    assert "| 1.500 | 2.000 | +0.500" in as_is
    assert "+0.500 (no interval: no spread) | +0.000 (no interval: no spread)" in copy


def test_copies_are_of_the_rows_that_can_be_perturbed():
    rows = [
        chat("Anna has 13 apples and buys 25. How many?", "She has 13+25=<<13+25=38>>38.\n#### 38"),
        chat("Why?", "Because."),
    ]
    found = copies(rows)
    assert [number for number, _, _ in found["numbers"]] == [0] and len(found["as they are"]) == 2
    ((_, question, answer),) = found["numbers"]
    first, second = (int(n) for n in re.findall(r"\d+", question))
    assert answer.endswith(f"#### {first + second}") and (first, second) != (13, 25)


def test_a_condensed_set_has_the_sums_and_means_of_its_rows():
    many = [[4.0, 2.0, 3.0, 1.0, 0.5], [9.0, 7.0, 1.0, 0.0, 1.5]]
    one = condense(many)
    assert one == [[13.0, 9.0, 2.0, 0.5, 2.0]] and condense([row[:4] for row in many]) == [[13.0, 9.0, 2.0, 0.5]]


def write_models(study):
    for folder in (study.base, study.instruct("near")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")


def test_results_of_another_recipe_are_made_again(tmp_path, monkeypatch):
    study = Study(tmp_path / "shared", tmp_path / "runs", tmp_path / "results")
    training = Training("near", "tools", "lora", "B", 1e-3, 0)
    for name in ("tools_train", "tools_choice", "tools_report", "alpaca", "identity"):
        write([chat("a", name)], study.data / f"{name}.jsonl")
    write_setting(study.results)
    write_models(study)
    file = study.results / "near" / "tools_lora" / "B_lr0.0002_seed0.json"
    other = file.with_name("B_lr0.0001_seed0.json")
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "recipe": study.recipe_id(training)}))  # rate and seed are in its name
    with pytest.raises(DataError, match=r"results of B .* by different recipes"):
        Setting(study.results, "near", "tools", "lora")
    cosines = study.results / "near" / "tools_lora_cosines.json"
    cosines.write_text("{}")
    study.remove_others("near", "tools", "lora")
    assert file.exists() and not other.exists() and not cosines.exists()
    changed = file.with_name("ties_lr0.0002_seed0.json")
    changed.write_text(json.dumps({**raw, "source": "ties"}))
    cosines.write_text("{}")
    study.remove_others("near", "tools", "lora")
    assert not changed.exists() and cosines.exists()  # which are of the two arms that are trained

    before, reference = {study.recipe_id(training)}, study.reference_of("near", "tools")
    monkeypatch.setattr("experiments.real.study.EPOCHS", {"tools": 4})
    before.add(study.recipe_id(training))
    write([chat("a", "another")], study.data / "identity.jsonl")
    before.add(study.recipe_id(training))
    references = {reference, study.reference_of("near", "tools")}
    (study.instruct("near") / "model.safetensors").write_bytes(b"others")
    assert len(references | {study.reference_of("near", "tools")}) == 3  # new rows and new models are scored too
    assert len(before) == 3 and study.recipe_id(training) in before


def test_the_report_says_on_which_models_results_were_made(tmp_path):
    study = Study(tmp_path, tmp_path, tmp_path / "results")
    write_models(study)
    before = study.models_id("near")
    (study.base / "model.safetensors").write_bytes(b"others")
    assert study.models_id("near") != before
    (study.instruct("near") / "model.safetensors").rename(study.instruct("near") / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"near/model has no safetensors files.*Restore them"):
        study.models_id("near")

    write_setting(tmp_path / "results")
    first, *_, last = sorted((tmp_path / "results/near/tools_lora").glob("*_seed*.json"))
    for file, models in ((first, "aaa"), (last, "bbb")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "models": models}))
    write_report(tmp_path / "results", tmp_path)
    said = (tmp_path / "REPORT.md").read_text()
    assert "Models: aaa (1 of 4 runs), not recorded (2 of 4 runs), bbb (1 of 4 runs)." in said


def test_an_arm_may_try_further_rates_and_seeds_are_of_the_chosen_ones():
    setting, rates = ("near", "tools", "lora"), {"B": (1e-4, 2e-4, 4e-4), "I": (1e-4, 2e-4)}
    first = [(each.source, each.lr) for each in trainings(setting, rates, None)]
    assert first == [("B", 1e-4), ("I", 1e-4), ("B", 2e-4), ("I", 2e-4), ("B", 4e-4)]
    others = [(each.source, each.lr, each.seed) for each in trainings(setting, rates, {"B": 4e-4, "I": 1e-4})]
    assert others == [("I", 1e-4, 1), ("B", 4e-4, 1), ("I", 1e-4, 2), ("B", 4e-4, 2)]


def test_answers_are_given_again_when_another_rate_is_chosen(tmp_path, monkeypatch):
    study = Study(tmp_path / "shared", tmp_path / "runs", tmp_path / "results")
    asked = []
    monkeypatch.setattr(study, "delta_of", lambda training: None)
    monkeypatch.setattr(study, "in_a_process", lambda step, arguments: asked.append((step, arguments)))
    trained = tuple(Training("near", "tools", "lora", source, 1e-3, 0) for source in "BI")
    file = study.results / "near" / "tools_lora_answers.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"trainings": [training.name for training in trained]}))
    study.answer(trained)
    assert not asked
    other = (replace(trained[0], lr=2e-3), trained[1])
    study.answer(other)
    assert asked == [("answers", {training.source: training.__dict__ for training in other})]


def test_cosines_are_of_the_updates_by_the_current_recipe(tmp_path, monkeypatch):
    class Stand:
        def __init__(self, folder):
            self.recipe = folder.parents[3].name

        def cosine(self, other):
            return f"{self.recipe} {other.recipe}"

    study = Study(tmp_path / "shared", tmp_path / "runs", tmp_path / "results")
    monkeypatch.setattr(study, "recipe_id", lambda training: "bbb")
    monkeypatch.setattr("experiments.real.study.Delta.open", Stand)
    for recipe in ("aaa", "bbb"):  # the first one is another recipe's
        for source in "BI":
            (study.runs / f"trainings/{recipe}/near/tools_lora/{source}_lr0.001_seed0-delta/delta").mkdir(parents=True)
    study.measure_cosines("near", "tools", "lora")
    found = json.loads((study.results / "near" / "tools_lora_cosines.json").read_text())
    assert found == {"lr0.001_seed0": "bbb bbb"}


def test_the_space_before_a_plain_answer_belongs_to_its_first_word():
    """A tokenizer of words that have their space with them, as many real ones do."""

    class Words:
        bos_token = "<bos>"

        def __init__(self):
            self.known = {}

        def __call__(self, text, add_special_tokens):
            pieces = re.findall(r"<bos>| ?\w+|\s|.", text)
            return SimpleNamespace(input_ids=[self.known.setdefault(piece, len(self.known)) for piece in pieces])

    tokenizer = Words()
    row = encoded(tokenizer, [("Why", "Because")], "How", "So", chat=False)
    whole = "<bos>Question: Why\nAnswer: Because\n\nQuestion: How\nAnswer: So\n\n"
    assert row.input_ids == tokenizer(whole, add_special_tokens=False).input_ids
    assert [label for label in row.labels if label != -100] == tokenizer(" So\n\n", add_special_tokens=False).input_ids


def test_models_are_measured_once_and_in_processes_of_their_own(tmp_path, monkeypatch):
    study = Study(tmp_path / "shared", tmp_path / "runs", tmp_path / "results")
    asked = []
    monkeypatch.setattr(study, "in_a_process", lambda step, arguments: asked.append((step, *arguments.values())))
    for name in ("tools_choice", "tools_report", "alpaca", "identity", "gsm8k_report", "gsm8k_train"):
        write([chat("a", name)], study.data / f"{name}.jsonl")
    write_models(study)
    (study.results / "near").mkdir(parents=True)
    (study.results / "near" / "tools_untouched.json").touch()
    study.untouched("near", "tools")  # its reference is missing
    study.reference_of("near", "tools").touch()
    study.untouched("near", "tools")
    assert asked == [("untouched", "near", "tools")]

    premise = study.results / "near" / "premise.json"
    study.premise("near")
    premise.write_text(json.dumps({"rows": study._premise_rows_id()}))
    study.premise("near")
    assert asked[1:] == [("premise", "near")]
    write([chat("a", "other")], study.data / "gsm8k_report.jsonl")
    study.premise("near")
    assert asked[2:] == [("premise", "near")]
