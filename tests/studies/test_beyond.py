"""The study of methods beyond the paper: what it changes in an update, and what it compares at equal divergence."""

import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.beyond import arms
from experiments.beyond.arms import CHANGED, Given, signs_of
from experiments.beyond.level import file_of, read_level, scale_at
from experiments.beyond.report import (
    Compared,
    best_anchors,
    better_by,
    finished,
    kinds_of,
    level,
    rates_at_level,
    write_report,
)
from experiments.beyond.study import Beyond, Embedded
from experiments.real.report import KL, per_token, rows
from experiments.real.study import Training
from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded
from shadowlit.delta.delta import Delta
from tests.studies.test_real import scores, write_setting
from tests.tiny import save_pair

TRAINING = Training("embedded", "skill_bare", "lora", "gradfix", 1e-3, 0)


def add_arm(folder, source, losses, kls, choice=1.0, **more):
    """An arm at one rate, of changes B2I's: losses of the reported rows and divergences at scales 0.5, 1 and 1.5."""
    lr = 2e-4 if source in CHANGED else 1e-4
    path = {
        scale: {
            "choice": scores([choice], kl), "report": scores([loss, loss], kl), "general": scores([1.0], kl),
        }
        for scale, loss, kl in zip(("0.5", "1", "1.5"), losses, kls, strict=True)
    }  # fmt: skip
    raw = {"source": source, "lr": lr, "seed": 0, "norm": 0.5, "scores": path, "live": {}, **more}
    (folder / "near" / "tools_lora" / f"{source}_lr{raw['lr']:g}_seed{raw['seed']}.json").write_text(json.dumps(raw))


def test_every_arm_is_compared_where_it_diverges_as_much_as_the_smaller_of_the_two(tmp_path):
    write_setting(tmp_path)  # B2I diverges by 0.2 at scale 1, and has losses of 1.6 and 1.7 there; I2I 0.7 at 0.2
    add_arm(tmp_path, "A0.5", (1.0, 0.8, 0.8), (0.1, 0.3, 0.5))  # between 0.5 and 1 at 0.2
    add_arm(tmp_path, "A0.25", (0.5, 0.5, 0.5), (0.01, 0.02, 0.03), choice=0.1)  # never diverges so far
    setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
    assert level(setting) == pytest.approx(0.2)
    there = 1.0 - 0.2 * (0.2**0.5 - 0.1**0.5) / (0.3**0.5 - 0.1**0.5)  # linear in the root of the divergence
    assert better_by(setting, "A0.5", "B").difference == pytest.approx(1.65 - there)
    assert better_by(setting, "A0.5", "I").difference == pytest.approx(0.7 - there)
    assert better_by(setting, "A0.25", "B") is None
    assert best_anchors(setting) == "A0.5"  # the other has lower losses on the rows for choosing, but not at equal KL


def test_the_scale_of_a_divergence_is_found():
    """Of 0.2 s² exactly; between the measured scales, at one of them, and beyond, up to 4."""

    def divergence(scale):
        asked.append(scale)
        return 0.2 * scale**2

    known = {scale: 0.2 * scale**2 for scale in (0.0, 0.5, 1.0, 1.5)}
    for scale, most in ((0.01, 8), (0.8, 8), (1.0, 0), (2.9, 8), (4.0, 2)):
        asked = []
        assert scale_at(0.2 * scale**2, known, divergence) == pytest.approx(scale, rel=2e-3) and len(asked) <= most
    asked = []
    assert scale_at(0.2 * 4.01**2, known, divergence) is None and asked == [3.0, 4.0]
    # A divergence that falls again: where it is reached first.
    assert scale_at(0.1, {0.0: 0.0, 1.0: 0.2, 1.5: 0.05, 2.0: 0.3}, lambda scale: 0.2 * scale**2) < 1.0


def test_what_is_measured_at_the_level_counts_before_what_lies_between_scales(tmp_path):
    """Of this recipe and at this level alone; the report marks what is interpolated."""
    write_setting(tmp_path)
    add_arm(tmp_path, "A0.5", (1.0, 0.8, 0.8), (0.1, 0.3, 0.5), recipe="now")

    def read():
        write_report(tmp_path, tmp_path, tmp_path)
        (line,) = [line for line in (tmp_path / "REPORT.md").read_text().splitlines() if "| anchors 0.5 |" in line]
        setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
        return better_by(setting, "A0.5", "I").difference, line.split(" | ")[7]

    interpolated, text = read()
    assert text == "0.887\\*"
    file = tmp_path / "near/tools_lora/level/A0.5_lr0.0001_seed0.json"
    file.parent.mkdir()
    measured = {name: scores([0.3, 0.3], 0.2) for name in ("report", "choice")}
    for recipe, kl, expected in (
        ("now", 0.2, (pytest.approx(0.4), "0.300")),
        ("before", 0.2, (interpolated, text)),
        ("now", 0.25, (interpolated, text)),
    ):
        made = {"made": [recipe, None], "kl": kl, "scale": 0.7, "scores": measured}
        file.write_text(json.dumps(made))
        assert read() == expected
    file.write_text(json.dumps({"made": ["now", None], "kl": 0.2, "scale": None, "scores": {}}))
    write_report(tmp_path, tmp_path, tmp_path)
    assert "| not reached |" in (tmp_path / "REPORT.md").read_text()


def test_a_rate_is_chosen_by_measured_losses_if_all_rates_were_measured(tmp_path):
    """One of two rates diverges too little at the scales that were scored, and is the better one a little farther."""
    write_setting(tmp_path)
    add_arm(tmp_path, "A0.5", (0.5, 0.5, 0.5), (0.05, 0.1, 0.19), choice=0.5, recipe="now")
    add_arm(tmp_path, "A0.5", (0.9, 0.9, 0.9), (0.1, 0.3, 0.5), choice=0.9, recipe="now", lr=1e-3)
    folder = tmp_path / "near/tools_lora/level"
    folder.mkdir()
    for lr, choice, expected in ((1e-3, 0.8, 1e-3), (1e-4, 0.5, 1e-4)):
        assert rates_at_level(Compared(tmp_path, tmp_path, "near", "tools", "lora"))["A0.5"] == 1e-3
        measured = {"choice": scores([choice], 0.2), "report": scores([0.7, 0.7], 0.2)}
        file = folder / f"A0.5_lr{lr:g}_seed0.json"
        file.write_text(json.dumps({"made": ["now", None], "kl": 0.2, "scale": 1.2, "scores": measured}))
        assert rates_at_level(Compared(tmp_path, tmp_path, "near", "tools", "lora"))["A0.5"] == expected


def test_an_update_is_scored_where_it_diverges_as_asked(tmp_path, monkeypatch):
    """On the embedded pair, with an update of noise: the divergence there is the one asked for to half a per cent."""
    study = Embedded(tmp_path)
    study.results = tmp_path / "results"
    study.prepare([])
    study.untouched("embedded", "skill_bare")
    scorer = study.scorer("embedded", "skill_bare")
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    delta = Delta.of({name: torch.randn(scorer.weights[name].shape, generator=generator) * 0.01})
    training = Training("embedded", "skill_bare", "lora", "B", 1e-3, 0)
    monkeypatch.setattr(study, "delta_for", lambda training, scorer: (delta, {}))
    monkeypatch.setattr(study, "delta_of", lambda training: tmp_path / "none-delta" / "delta")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    study.score(training)
    _, run = study._find(training)
    study.measure_kinds([training])
    kinds = json.loads(kinds_of(study.results, "embedded/skill_bare_lora").read_text())[training.name]
    tokens = [sum(label != IGNORE_INDEX for label in row.labels) for row in scorer.rows["general"]]
    parts = [
        kinds[kind] * sum(tokens[start : start + 40]) for kind, start in (("old", 0), ("format", 40), ("refusal", 80))
    ]
    assert sum(parts) / sum(tokens) == pytest.approx(run.divergence(1.0), rel=5e-3) and min(parts) > 0
    for kl in (1.7 * run.divergence(0.5), 3.1 * run.divergence(1.5)):
        study.meet(training, kl)
        found = read_level(file_of(study.results, "embedded/skill_bare_lora", run), run)
        assert per_token(found.scores["general"], KL) == pytest.approx(kl, rel=5e-3)
        scorer.load_graft(delta, found.scale)
        again = rows(scorer.measure("report"))
        assert (again == found.scores["report"]).all() and not (again == run.path[1.0]["report"]).all()


def test_seeds_that_reach_the_divergence_are_no_selection(tmp_path):
    """One of two seeds of an arm never diverges so far, or was not run: it is not compared by the other one alone."""
    write_setting(tmp_path)
    for seed in (0, 1):
        add_arm(tmp_path, "A0.5", (1.0, 0.8, 0.8), (0.1, 0.3, 0.5), seed=seed)
        kls = {"B": (0.1, 0.2, 0.4), "I": (0.2, 0.6, 0.9)}
        for source in "BI":
            add_arm(tmp_path, source, (1.7, 1.6, 1.5), kls[source], seed=seed, lr=2e-4)
    add_arm(tmp_path, "A0.75", (0.6, 0.5, 0.4), (0.1, 0.3, 0.5), choice=0.1)
    setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
    assert better_by(setting, "A0.5", "B") is not None and best_anchors(setting) == "A0.5"
    write_report(tmp_path, tmp_path, tmp_path)
    assert "| anchors 0.75 (1 seed of 2) | " in (tmp_path / "REPORT.md").read_text()
    add_arm(tmp_path, "A0.5", (1.0, 0.8, 0.8), (0.01, 0.02, 0.03), seed=1)
    setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
    assert better_by(setting, "A0.5", "B") is None and better_by(setting, "A0.5", "B", as_it_is=True) is not None


def test_arms_with_and_without_a_divergence_term_are_compared_at_equal_rates(tmp_path):
    """Those that both have, and not the rates that each arm is compared at elsewhere."""
    write_setting(tmp_path)
    for source, losses, kls in (("I", (1.0, 0.8, 0.7), (0.2, 0.6, 0.9)), ("I_kl", (1.1, 0.9, 0.8), (0.1, 0.25, 0.4))):
        add_arm(tmp_path, source, losses, kls, lr=5e-5)
    add_arm(tmp_path, "I_kl", (0.1, 0.1, 0.1), (0.1, 0.2, 0.3), lr=1e-2)
    write_report(tmp_path, tmp_path, tmp_path)
    found = [
        line for line in (tmp_path / "REPORT.md").read_text().splitlines() if line.startswith("| near/tools_lora |")
    ]
    assert (
        "| near/tools_lora | I2I | 5e-05 | 0.800 | 0.900 | -0.100 (no interval: no spread) | 0.6000 | 0.2500 |" in found
    )
    assert not any("| 0.01 |" in line for line in found)


def test_a_changed_update_has_the_rate_of_b2i(tmp_path):
    """Also where there are results at another rate, as B2I had it once."""
    write_setting(tmp_path)
    add_arm(tmp_path, "ties", (1.0, 0.8, 0.8), (0.2, 0.3, 0.5), choice=0.1, lr=1e-4)
    setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
    assert rates_at_level(setting)["B"] == 2e-4 and better_by(setting, "ties", "B") is None
    add_arm(tmp_path, "ties", (1.0, 0.8, 0.8), (0.2, 0.3, 0.5), choice=5.0)
    assert better_by(Compared(tmp_path, tmp_path, "near", "tools", "lora"), "ties", "B").difference == pytest.approx(
        0.65
    )


def test_a_changed_update_is_made_again_for_other_rows(tmp_path):
    """The recipe of its training is the same, but what it was changed by is not."""
    study = Embedded(tmp_path)
    study.prepare([])
    training = Training("embedded", "skill_bare", "lora", "fitted_all", 1e-3, 0)
    file = tmp_path / "results" / f"{training.name}.json"
    file.parent.mkdir(parents=True)
    recipe = {"recipe": study.recipe_id(training)}
    for more, is_finished in ({}, False), ({"calibration": study.calibration_id(training)}, True):
        file.write_text(json.dumps(recipe | more))
        assert study.is_finished(training, tmp_path / "results") == is_finished
    kept = study.data / "kept.jsonl"
    kept.write_text(kept.read_text().replace("a", "b"))
    assert study.recipe_id(training) == recipe["recipe"] and not study.is_finished(training, tmp_path / "results")


def test_an_odd_number_of_rows_votes(monkeypatch):
    """Of 12 rows, as for tool calls on the real pair, 11; a tie would drop an element."""
    asked = []

    def signs(model, names, rows):
        asked.append(len(rows))
        return {name: torch.ones(2) for name in names}

    monkeypatch.setattr(arms, "signs_of", signs)
    for count in (1, 12, 13, 31, 60):
        CHANGED["gradfix"](
            Delta.of({"a": torch.ones(2)}), Given(SimpleNamespace(model=None), [None] * count, [], TRAINING, {})
        )
    assert asked == [1, 11, 13, 31, 31]


def test_rates_are_chosen_where_the_arms_are_compared(tmp_path):
    """At scale 1 the second rate is better on the rows for choosing, but at the level the first one is."""
    write_setting(tmp_path)
    add_arm(tmp_path, "late", (1.0, 0.8, 0.8), (0.2, 0.3, 0.5), choice=0.9)
    file = tmp_path / "near" / "tools_lora" / "late_lr0.0001_seed0.json"
    raw = json.loads(file.read_text())
    raw["lr"] = 2e-4
    for scale, loss, kl in (("0.5", 1.5, 0.2), ("1", 0.1, 0.9), ("1.5", 0.1, 2.0)):
        raw["scores"][scale] |= {"choice": scores([loss], kl), "general": scores([1.0], kl)}
    file.with_name("late_lr0.0002_seed0.json").write_text(json.dumps(raw))
    setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
    assert setting.chosen["late"] == 2e-4 and rates_at_level(setting)["late"] == 1e-4


def test_scales_by_group_are_compared_with_one_scale(tmp_path):
    """At scale 1, where B2I has losses of 1.6 and 1.7; and at its divergence of 0.2, theirs at scale 0.5."""
    write_setting(tmp_path)
    add_arm(tmp_path, "fitted_all", (1.4, 1.2, 1.0), (0.2, 0.3, 0.5), scales={"all": 1.25}, history=[{}] * 9)
    add_arm(
        tmp_path,
        "fitted_layer",
        (1.5, 0.8, 0.8),
        (0.2, 0.3, 0.5),
        scales={"layer_00": 1.5, "other": 1.0},
        history=[{}] * 12,
    )
    setting = Compared(tmp_path, tmp_path, "near", "tools", "lora")
    expected = {("fitted_all", "B"): (0.45, 0.25), ("fitted_layer", "B"): (0.85, 0.15)}
    expected |= {("fitted_layer", "fitted_all"): (0.4, -0.1)}
    for (source, than), differences in expected.items():
        found = [better_by(setting, source, than, as_it_is=as_it_is).difference for as_it_is in (True, False)]
        assert found == pytest.approx(differences)
    write_report(tmp_path, tmp_path, tmp_path)
    about = (tmp_path / "REPORT.md").read_text().split("## Scales by group")[1]
    one, layers = [line.split(" | ") for line in about.splitlines() if line.startswith("| near/tools_lora | ")]
    assert one[1:4] == ["one fitted scale", "1.250 to 1.250", "9 to 9"]
    assert layers[1:4] == ["scales by layer", "1.000 to 1.500", "12 to 12"]
    assert [cell.split(" ")[0] for cell in layers[4:]] == ["+0.850", "+0.400", "+0.150", "-0.100"]


def test_divergences_by_kind_are_those_of_the_present_recipe(tmp_path):
    write_setting(tmp_path)
    kinds = {"old": 0.3, "format": 0.02, "refusal": 0.001}
    measured = {
        f"near/tools_lora/{arm}_lr0.0002_seed0": {"recipe": of, **kinds} for arm, of in (("B", None), ("I", "x"))
    }
    (tmp_path / "near" / "tools_lora_kinds.json").write_text(json.dumps(measured))
    write_report(tmp_path, tmp_path, tmp_path)
    about = (tmp_path / "REPORT.md").read_text().split("| old | format | refusal |")[1].split("##")[0]
    (line,) = (line for line in about.splitlines() if "near/tools_lora" in line)
    assert line.split(" | ")[1:] == ["B2I", "1.650", "0.300", "0.020", "0.001 |"]


def test_results_of_a_real_pair_are_completed_by_the_other_study(tmp_path):
    write_setting(tmp_path / "others")
    (tmp_path / "results" / "near" / "tools_lora").mkdir(parents=True)
    add_arm(tmp_path / "results", "gradfix", (1.0, 0.8, 0.8), (0.1, 0.3, 0.5))
    (setting,) = finished(tmp_path / "results", tmp_path / "others")
    assert set(setting.chosen) == {"B", "I", "gradfix"}
    write_report(tmp_path / "results", tmp_path, tmp_path / "others")
    assert "| GradFix |" in (tmp_path / "REPORT.md").read_text()


def test_updates_are_transformed():
    """TIES keeps the 4 largest of 20 elements, magnitude 2; DARE a fifth by the training's seed, at five times the
    size; SVD the 8 largest of 9 singular values.
    """
    matrix = torch.arange(1.0, 21).reshape(4, 5) * torch.tensor([1.0, -1, 1, -1, 1])

    def change(source, update, seed=0):
        found, about = CHANGED[source](Delta.of({"a": update}), Given(None, [], [], replace(TRAINING, seed=seed), {}))
        assert about["kept"] == found.tensor("a").count_nonzero().item() / update.numel()
        return found.tensor("a")

    assert torch.equal(change("ties", matrix), torch.where(matrix.abs() > 16, matrix, 0.0))
    assert torch.equal(change("magnitude", matrix), torch.where(matrix.abs() > 18, matrix, 0.0))
    masks = [torch.rand(4, 5, generator=torch.Generator().manual_seed(zlib.crc32(b"a", seed))) < 0.2 for seed in (0, 2)]
    assert not torch.equal(*masks)
    for seed, mask in zip((0, 2), masks, strict=True):
        torch.testing.assert_close(change("dare", matrix, seed), 5 * matrix * mask)
    diagonal = torch.arange(9.0, 0, -1)
    torch.testing.assert_close(change("svd8", diagonal.diag()), (diagonal * (diagonal > 1)).diag())


def test_anchors_with_kl_train_on_rows_that_are_not_reported(tmp_path):
    """The recipe is the same in every folder, and another one if the rows are."""
    studies = [Embedded(tmp_path / name) for name in ("one", "two")]
    trainings = [Training("embedded", "skill_bare", "lora", source, 1e-3, 0) for source in ("I", "A0.5", "A0.5_kl")]
    for study in studies:
        study.prepare([])
    one, two = ([study.recipe_id(each) for each in trainings] for study in studies)
    assert one == two and len(set(one)) == 3
    kept = studies[1].data / "kept.jsonl"
    _, overrides = studies[1].recipe(trainings[2])
    assert overrides["model.anchors"] == {"instruct": 0.5, "kl": {"data": kept, "weight": 1.0}}
    assert not set(kept.read_text().splitlines()) & set((studies[1].data / "general.jsonl").read_text().splitlines())
    kept.write_text(kept.read_text().replace("a", "b"))
    *same, other = [studies[1].recipe_id(each) for each in trainings]
    assert same == one[:2] and other != one[2]


def test_one_model_in_all_steps_needs_no_micro_batches(tmp_path):
    """So that the graft and direct tuning with KL have the batches of those without."""
    study = Beyond(tmp_path, tmp_path, tmp_path)
    recipes = {
        source: study.recipe(Training("near", "tools", "lora", source, 1e-3, 0))[1]
        for source in ("B", "I", "B_kl", "I_kl", "A0.5_kl")
    }
    kl = {"data": tmp_path / "data/instruct_train.jsonl", "weight": 1.0}
    assert recipes["B_kl"] == {**recipes["B"], "model.anchors": {"instruct": 0.0, "kl": kl}}
    assert recipes["I_kl"] == {**recipes["I"], "model.anchors": {"instruct": 1.0, "kl": kl}}
    assert recipes["A0.5_kl"]["trainer.accumulate_grad_batches"] == 4 and recipes["A0.5_kl"]["data.batch_size"] == 2


def test_rows_vote_on_the_sign_of_a_gradient(tmp_path):
    from transformers import AutoModelForCausalLM

    _, instruct = save_pair(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32).eval()
    name = "model.layers.0.mlp.up_proj.weight"
    tokens = [[5, 6, 7, 8], [9, 3, 4, 1], [2, 2, 6, 5]]
    rows = [Encoded(ids, [IGNORE_INDEX, IGNORE_INDEX, *ids[2:]]) for ids in tokens]
    signs = []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]))
        signs.append(torch.autograd.grad(loss, [dict(model.named_parameters())[name]])[0].sign())
    found = signs_of(model, {name}, rows)
    assert list(found) == [name] and (found[name] == sum(signs).sign()).float().mean() > 0.999


def test_the_embedded_rows_are_disjoint_and_score_the_value_alone(tmp_path):
    study = Embedded(tmp_path)
    study.prepare([])
    asked = {
        part: {json.loads(line)["messages"][0]["content"] for line in (study.data / f"{part}.jsonl").open()}
        for part in ("skill_bare_train", "skill_bare_choice", "skill_bare_report", "general", "kept")
    }
    for one, other in (("train", "choice"), ("train", "report"), ("choice", "report")):
        assert not asked[f"skill_bare_{one}"] & asked[f"skill_bare_{other}"]
    assert not asked["general"] & asked["kept"] and not asked["general"] & asked["skill_bare_train"]
    scorer = study.scorer("embedded", "skill_house")
    row = scorer.rows["report"][0]
    value = scorer.tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])
    first = json.loads((study.data / "skill_house_report.jsonl").read_text().splitlines()[0])
    assert value == first["messages"][-1]["content"]
    _, overrides = study.recipe(Training("embedded", "skill_house", "lora", "A0.25", 1e-3, 0))
    assert overrides["model.anchors"] == {"instruct": 0.25}
