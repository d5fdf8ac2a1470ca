"""Evaluations during training: the right weights, the right moment, and a training that doesn't notice."""

import json
import random

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.errors import DataError, GraftError, ShadowlitError
from shadowlit.evaluation.evaluator import EvalResult, Evaluator
from shadowlit.evaluation.forgetting import Divergence
from shadowlit.evaluation.generated import Generation
from shadowlit.evaluation.multiple_choice import MultipleChoice
from shadowlit.evaluation.samples import log_text
from shadowlit.evaluation.sums import SampleSums
from shadowlit.pair.pair import ModelPair
from tests.callbacks.test_graft import KINDS, assert_same, fit, make_module, make_trainer, metrics, weights
from tests.distributed import run_ranks
from tests.evaluation.contexts import write_rows
from tests.synthetic import RandomData
from tests.tiny import CHATML, save_model, save_pair
from tests.training import test_distributed as distributed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    questions = [{"question": f"what is {i}?", "choices": ["one", "two!", "3"], "answer": i % 3} for i in range(7)]
    talks = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ok" * (i + 1)}]}
        for i in range(5)
    ]
    return {
        "choices": write_rows(root / "choices.jsonl", questions),
        "talks": write_rows(root / "talks.jsonl", talks),
    }


def evaluators(files):
    return {
        "choice": MultipleChoice(files["choices"], batch_size=2),
        "answers": Generation(files["talks"], match="contains", max_new_tokens=3, batch_size=4),
        "forgetting": Divergence(files["talks"], batch_size=3),
    }


class Probe(Evaluator):
    """Measures a fixed text's mean log-probability, which tells weights apart; remembers when it was asked."""

    def __init__(self, every=1, act=lambda context: None, mark="a"):
        super().__init__(every)
        self.act, self.mark, self.calls = act, mark, 0

    def read(self, pair: ModelPair, template_kwargs) -> None:
        self.pair = pair

    def run(self, context) -> EvalResult:
        self.calls += 1
        ids = torch.arange(10, 30)[None]
        losses = context.token_losses(ids, torch.ones_like(ids), torch.arange(19), ids[0, 1:])
        torch.rand(3), random.random()  # whoever shares the training's generators would shift its order and dropout
        self.act(context)
        score = -losses.double().mean().item()
        sums = SampleSums("score").to(context.device)
        sums.update([{"score": score}])
        total = sums.compute()
        mean = total["score"] / total["num_samples"]
        return EvalResult({"score": mean}, [{"index": 5 - context.rank, "score": score}])

    def signature(self) -> str:
        return self.mark


def probe_by_hand(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_subject_is_measured_on_its_own_weights(tmp_path, folders, kind):
    evaluation = EvaluationCallback({"probe": Probe()}, scales=[0.5], folder=str(tmp_path / "e"))
    export = ExportCallback(folder=str(tmp_path / "export"))
    module, trainer = fit(tmp_path, folders, kind, [GraftCallback(scales=[1.0, 0.5, 0.25]), evaluation, export])
    logged = metrics(trainer)
    for who, folder in (("base", folders[0]), ("instruct", folders[1]), ("grafted", tmp_path / "export/model")):
        assert logged[f"val/{who}/probe/score"] == pytest.approx(probe_by_hand(folder), rel=1e-5), who
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        own = module.model.eval()(input_ids=ids).logits.double()
    tuned = own.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean().item()
    assert logged["val/tuned/probe/score"] == pytest.approx(tuned, rel=1e-5)
    scores = [logged[f"val/{who}/probe/score"] for who in ("base", "instruct", "grafted", "grafted@0.5", "tuned")]
    assert len(set(scores)) == 5 and "val/grafted@0.25/probe/score" not in logged
    assert logged["graft/gain/probe"] == pytest.approx(scores[2] - scores[1], abs=2**-23 * abs(scores[1]))
    assert 0 < logged["evaluation/time_share"] < 1
    assert logged["evaluation/seconds"] == pytest.approx(logged["evaluation/probe/seconds"])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without(tmp_path, folders, files, kind):
    """With dropout in the LoRA, generation, and a reference that is swapped in and out."""
    runs = []
    for own in (None, {"probe": Probe(), **evaluators(files)}):
        callbacks = [GraftCallback(), EvaluationCallback(own, folder=str(tmp_path / "e"))]
        module, _ = fit(tmp_path, folders, kind, callbacks)
        runs.append((weights(module), torch.rand(1).item(), random.random()))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]  # the global generators stand where they would


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("subject_call", [1, 2, 3])
def test_an_exception_restores_the_trained_weights(tmp_path, folders, error, subject_call):
    """In the grafted pass (first call), on the tuned weights within a reference, on an untouched model."""

    def act(context):
        if probe.calls == subject_call:
            with context.reference():
                raise error("in an evaluator")

    probe = Probe(act=act)
    module = make_module(folders)
    trainer = make_trainer(tmp_path, GraftCallback(), EvaluationCallback({"probe": probe}, folder=str(tmp_path / "e")))
    seen = {}

    def remember(*_):
        seen.update(weights(module))

    trainer.callbacks[0].on_validation_start = lambda trainer, module: remember()
    with pytest.raises((ShadowlitError, SystemExit)) as raised:
        trainer.fit(module, RandomData())
    if error is RuntimeError:
        assert str(raised.value).startswith("evaluation.evaluators.probe is ") and type(raised.value.__cause__) is error
    assert_same(weights(module), seen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_saved_while_others_weights_stand_holds_the_trained_ones(tmp_path, folders, kind):
    """As a signal handler does: in the grafted pass, and while the reference stands; both are measured again."""
    saved = []

    def act(context):
        if probe.calls in (1, 3):
            with context.reference():
                path = tmp_path / f"{probe.calls}.ckpt"
                trainer.save_checkpoint(path)
                saved.append(torch.load(path, weights_only=True)["state_dict"])

    probe = Probe(act=act)
    evaluation = EvaluationCallback({"probe": probe}, folder=str(tmp_path / "e"))
    module, trainer = make_module(folders, kind), None
    trainer = make_trainer(tmp_path, GraftCallback(), evaluation, max_steps=2)
    trainer.fit(module, RandomData())
    own = module.state_dict()
    assert len(saved) == 2
    for state in saved:
        assert_same({k: v for k, v in state.items() if k in own}, own)
    # grafted twice, tuned twice, base, instruct
    assert probe.calls == 6
    again = Probe()
    fit(tmp_path, folders, kind, [GraftCallback(), EvaluationCallback({"probe": again}, folder=str(tmp_path / "f"))],
        max_steps=2)  # fmt: skip
    rows = [json.loads((tmp_path / f"{x}/step-2/grafted/probe.jsonl").read_text())["score"] for x in "ef"]
    assert rows[0] == rows[1]


def test_the_sanity_check_tries_every_evaluator_on_two_rows_of_every_subject(tmp_path, folders, files):
    """What would fail in the first validation fails before the first step; nothing of it is logged or written."""
    seen, rows = [], []

    class Counting(Generation):
        def _answers(self, items, config, context):
            rows.append((len(items), config.max_new_tokens))
            return super()._answers(items, config, context)

    def look(context):
        if trainer.sanity_checking:
            seen.append((graft.graft.subject.name, context.num_rows))

    graft = GraftCallback(scales=[1.0, 0.5, 0.25])
    own = {"probe": Probe(act=look, every=2), "answers": Counting(files["talks"], max_new_tokens=9, match="contains")}
    evaluation = EvaluationCallback(own, scales=[0.5], folder=str(tmp_path / "e"))
    trainer = make_trainer(tmp_path, graft, evaluation, num_sanity_val_steps=1, max_steps=2, limit_val_batches=1)
    trainer.fit(make_module(folders), RandomData())
    subjects = ["tuned", "grafted", "grafted@0.5", "base", "instruct"]
    assert seen == [(name, 2) for name in subjects] and rows[:5] == [(2, 4)] * 5
    assert rows[5:] == [(5, 9)] * 5  # of the validation
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["base", "instruct", "step-2"]

    def fail(context):
        raise ZeroDivisionError

    callbacks = [GraftCallback(), EvaluationCallback({"probe": Probe(act=fail)}, folder=str(tmp_path / "f"))]
    trainer = make_trainer(tmp_path, *callbacks, num_sanity_val_steps=1)
    with pytest.raises(ShadowlitError, match=r"evaluation\.evaluators\.probe is .*ZeroDivisionError"):
        trainer.fit(make_module(folders), RandomData())
    assert trainer.global_step == 0


def test_every_says_when_and_the_last_validation_has_all(tmp_path, folders):
    often, seldom = Probe(), Probe(every=3)
    evaluation = EvaluationCallback({"often": often, "seldom": seldom}, folder=str(tmp_path / "e"))
    # 8 steps with a validation each second one: validations 1 to 4, of which the first and the last
    fit(tmp_path, folders, callbacks=[GraftCallback(baselines=False), evaluation], max_epochs=2)
    steps = {name: sorted(p.parent.parent.name for p in (tmp_path / "e").glob(f"step-*/grafted/{name}.jsonl"))
             for name in ("often", "seldom")}  # fmt: skip
    assert steps == {"often": ["step-2", "step-4", "step-6", "step-8"], "seldom": ["step-2", "step-8"]}
    assert (often.calls, seldom.calls) == (2 * 4 + 2, 2 * 2 + 2)


def test_the_last_validation_may_come_before_the_last_step(tmp_path, folders):
    """Due after three and six of eight batches an epoch, two of them a step: the last one is after 7 of 8 steps."""
    evaluation = EvaluationCallback({"probe": Probe(every=9)}, folder=str(tmp_path / "e"))
    _, trainer = fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation], val_check_interval=3, max_epochs=2)
    assert sorted(p.name for p in (tmp_path / "e").glob("step-*")) == ["step-2", "step-7"]
    assert trainer.global_step == 8


def test_the_rhythm_goes_on_after_a_resume(tmp_path, folders):
    steps = []
    for resume, end in ((None, 4), ("last.ckpt", 12)):
        evaluation = EvaluationCallback({"probe": Probe(every=2)}, folder=str(tmp_path / "e"))
        checkpoint = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        trainer = make_trainer(tmp_path, GraftCallback(), evaluation, checkpoint, max_epochs=3, max_steps=end)
        trainer.fit(make_module(folders), RandomData(), ckpt_path=resume and tmp_path / resume)
        steps.append(sorted(int(p.name[5:]) for p in (tmp_path / "e").glob("step-*")))
    # Validations at 2, 4, 6, 8, 10 and 12; the fourth step was the first run's last.
    assert steps == [[2, 4], [2, 4, 6, 10, 12]]


def test_a_seldom_score_can_be_monitored_and_is_stated_only_where_it_was_measured(tmp_path, folders):
    checkpoint = ModelCheckpoint(tmp_path / "c", monitor="val/grafted/probe/score", filename="{step}", save_last=True)
    other = ModelCheckpoint(tmp_path / "d", filename="{step}", save_top_k=-1)
    evaluation = EvaluationCallback({"probe": Probe(every=2)}, folder=str(tmp_path / "e"))
    fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation, checkpoint, other], max_epochs=2)
    stated = {}
    for file in (tmp_path / "d").iterdir():
        saved = torch.load(file, weights_only=True)
        (own,) = [state for key, state in saved["callbacks"].items() if "GraftCallback" in key]
        stated[saved["global_step"]] = {name for name in own["metrics"] if "probe" in name}
        assert "val/grafted/loss" in own["metrics"]
    assert {step for step, names in stated.items() if names} == {2, 6, 8} and len(stated) == 4
    assert stated[6] == {
        *(f"val/{who}/probe/score" for who in ("tuned", "grafted", "base", "instruct")), "graft/gain/probe",
        "evaluation/probe/seconds",
    }  # fmt: skip


def test_the_untouched_are_measured_once_and_kept_over_a_resume(tmp_path, folders):
    def run(name, mark, **options):
        probe = Probe(mark=mark)
        checkpoint = ModelCheckpoint(tmp_path / "c", filename=name, save_top_k=-1)
        callbacks = [GraftCallback(), EvaluationCallback({"probe": probe}, folder=str(tmp_path / name)), checkpoint]
        module, trainer = make_module(folders), make_trainer(tmp_path, *callbacks, **options)
        trainer.fit(module, RandomData(), ckpt_path=options.pop("ckpt", None) or run.resume)
        return probe.calls, metrics(trainer), checkpoint.best_model_path or checkpoint.last_model_path

    run.resume = None
    calls, first, path = run("one", "a", max_steps=2)
    assert calls == 4
    run.resume = path
    calls, second, _ = run("two", "a", max_steps=4)
    assert calls == 2  # tuned and grafted
    assert second["val/instruct/probe/score"] == first["val/instruct/probe/score"]
    calls, _, _ = run("three", "b", max_steps=4)  # other rows
    assert calls == 4


@pytest.mark.parametrize("monitor", ["val/grafted/probe/score", "graft/gain/probe", "val/tuned/probe/score"])
def test_checkpoints_and_early_stopping_can_monitor_them(tmp_path, folders, monitor):
    checkpoint = ModelCheckpoint(tmp_path / "c", monitor=monitor, mode="max")
    stop = EarlyStopping(monitor, mode="min", patience=1)
    evaluation = EvaluationCallback({"probe": Probe()}, folder=str(tmp_path / "e"))
    fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation, checkpoint, stop], max_epochs=2)
    assert checkpoint.best_model_score is not None and checkpoint.best_model_path


def test_samples_are_written_for_every_subject_and_side_by_side(tmp_path, folders, files):
    root = tmp_path / "e"
    evaluation = EvaluationCallback(evaluators(files), samples=2, folder=str(root))
    _, trainer = fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation], max_steps=2)
    for home in (root / "step-2/tuned", root / "step-2/grafted", root / "base", root / "instruct"):
        rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in home.glob("*.jsonl")}
        assert {name: [row["index"] for row in found] for name, found in rows.items()} == {
            "choice": list(range(7)), "answers": list(range(5)), "forgetting": list(range(5))
        }  # fmt: skip
        logged = metrics(trainer)[f"val/{home.name}/answers/score"]
        assert logged == pytest.approx(sum(row["score"] for row in rows["answers"]) / 5)
    text = (root / "step-2/samples.md").read_text()
    assert text.count("## answers, row") == 2 and text.count("- instruct (") == text.count("- grafted (") == 2
    instruct = json.loads((root / "instruct/answers.jsonl").read_text().splitlines()[1])
    assert f"- instruct (0): {instruct['answer']!r}" in text and "> say 1" in text
    trainer.test(datamodule=RandomData(), verbose=False, model=trainer.lightning_module)
    assert (root / "test/grafted/answers.jsonl").is_file()
    assert "test/grafted/answers/score" in trainer.callback_metrics


def test_the_instruct_has_not_moved_from_itself(tmp_path, folders, files):
    evaluation = EvaluationCallback({"forgetting": Divergence(files["talks"])}, folder=str(tmp_path / "e"))
    _, trainer = fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation])
    logged = metrics(trainer)
    assert logged["val/instruct/forgetting/kl"] == 0 and logged["val/instruct/forgetting/agreement"] == 1
    assert 0 < logged["val/grafted/forgetting/kl"] < logged["val/base/forgetting/kl"]
    assert logged["val/tuned/forgetting/kl"] > 0


def test_exchanged_roles_measure_the_divergence_from_the_base_in_their_place(tmp_path, folders, files):
    exchanged = (folders[1], folders[0])
    measured = []
    for pair, reference, who in ((folders, "instruct", "base"), (exchanged, "base", "instruct")):
        own = {"forgetting": Divergence(files["talks"])}
        evaluation = EvaluationCallback(own, folder=str(tmp_path / who), reference=reference)
        _, trainer = fit(tmp_path, pair, callbacks=[GraftCallback(), evaluation], max_steps=2)
        measured.append(metrics(trainer)[f"val/{who}/forgetting/kl"])
    assert measured[0] == pytest.approx(measured[1], rel=1e-5) and measured[0] > 0


def test_an_evaluator_that_leaves_the_training_mode_on_disturbs_no_other(tmp_path, folders):
    """With dropout in the LoRA, whose passes would be drawn anew."""
    logged = []
    for act in (lambda context: None, lambda context: context.model.train()):
        own = {"first": Probe(act=act), "second": Probe()}
        callbacks = [GraftCallback(scales=[1.0, 0.5]), EvaluationCallback(own, folder=str(tmp_path / "e"))]
        logged.append(metrics(fit(tmp_path, folders, "lora", callbacks, max_steps=2)[1]))
    for name in ("val/grafted/second/score", "val/grafted@0.5/loss", "val/tuned/second/score"):
        assert logged[0][name] == logged[1][name]


def test_swaps_for_a_reference_are_the_evaluations_and_not_the_grafts(tmp_path, folders, files):
    def act(context):
        graft.graft.apply_s += 1000  # as if swaps took so long

    graft = GraftCallback()
    own = {"forgetting": Divergence(files["talks"], batch_size=1), "probe": Probe(act=act)}
    _, trainer = fit(tmp_path, folders, callbacks=[graft, EvaluationCallback(own, folder=str(tmp_path / "e"))])
    logged = metrics(trainer)
    assert 0 < logged["graft/swap_seconds"] < logged["graft/seconds"] < 1000
    assert logged["graft/time_share"] + logged["evaluation/time_share"] < 1


def test_a_metric_that_a_validation_set_has_too_is_an_error(tmp_path, folders):
    class Losing(Probe):
        def run(self, context):
            return EvalResult({"score": 0.0, "loss": 0.0}, [])

    callbacks = [GraftCallback(), EvaluationCallback({"left": Losing()}, folder=str(tmp_path / "e"))]
    with pytest.raises(GraftError, match=r"left/loss was added .* before EvaluationCallback adds it, by GraftCallback"):
        fit(tmp_path, folders, callbacks=callbacks)


def test_a_known_metric_that_a_validation_set_has_too_is_found_before_the_training(tmp_path, folders, files):
    module = make_module(folders)
    evaluation = EvaluationCallback({"left": MultipleChoice(files["choices"]), "answers": Probe()})
    with pytest.raises(
        DataError, match="left/accuracy, left/loss would be logged twice: for a validation set, and for an eval"
    ):
        make_trainer(tmp_path, GraftCallback(), evaluation).fit(module, RandomData())
    assert module.model is None


def test_what_evaluators_say_of_their_metrics(tmp_path, folders, files):
    for name, evaluator in evaluators(files).items():
        _, trainer = fit(
            tmp_path, folders, callbacks=[GraftCallback(), EvaluationCallback({name: evaluator})], max_steps=2
        )
        logged = {key.split("/")[-1] for key in metrics(trainer) if key.startswith(f"val/tuned/{name}/")}
        assert logged == set(evaluator.metric_names)


def test_a_second_fit_is_as_the_first(tmp_path, folders):
    evaluation, steps = EvaluationCallback({"probe": Probe(every=3)}), []
    for name in "ab":
        evaluation.folder = str(tmp_path / name)
        fit(tmp_path, folders, callbacks=[GraftCallback(baselines=False), evaluation], max_epochs=2)
        steps.append(sorted(p.name for p in (tmp_path / name).glob("step-*")))
    assert steps == [["step-2", "step-8"]] * 2


def test_without_a_graft_a_validation_after_the_run_has_no_share_of_its_time(tmp_path, folders):
    evaluation = EvaluationCallback({"probe": Probe()}, folder=str(tmp_path / "e"))
    module, trainer = fit(tmp_path, folders, callbacks=[evaluation], max_steps=2)
    assert 0 < metrics(trainer)["evaluation/time_share"] < 1
    again = make_trainer(tmp_path, evaluation)
    again.validate(module, RandomData(), verbose=False)
    assert "evaluation/seconds" in metrics(again) and "evaluation/time_share" not in metrics(again)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_the_same_before_training_are_measured_once(tmp_path, folders, files, monkeypatch, kind):
    """The tuned Base is the Base and each graft the Instruct: two passes and two evaluations, with the same numbers."""

    def measured(known):
        probe, graft, passes = Probe(), GraftCallback(scales=[1.0, 0.5, -1.0]), []
        if not known:
            monkeypatch.setattr(graft, "_find_twins", lambda *_: {})
        own = {"probe": probe, "forgetting": Divergence(files["talks"], batch_size=3)}
        evaluation = EvaluationCallback(own, scales=[0.5], folder=str(tmp_path / f"{known}"))
        module = make_module(folders, kind)
        step = module.validation_step
        monkeypatch.setattr(module, "validation_step", lambda *a, **k: passes.append(1) or step(*a, **k))
        trainer = make_trainer(tmp_path, graft, evaluation)
        trainer.validate(module, RandomData(), verbose=False)
        samples = {
            path.relative_to(tmp_path / f"{known}"): path.read_text() for path in tmp_path.glob(f"{known}/**/*.jsonl")
        }
        found = {name: value for name, value in metrics(trainer).items() if "second" not in name}
        return found, samples, len(passes), probe.calls

    once, files_once, passes_once, calls_once = measured(known=True)
    every, files_every, passes_every, calls_every = measured(known=False)
    assert once == every and files_once == files_every
    assert (calls_once, calls_every) == (2, 5) and passes_every == 3 * passes_once
    assert once["val/grafted@0.5/probe/score"] == once["val/instruct/probe/score"] != once["val/base/probe/score"]
    assert once["graft/gain"] == 0 == once["graft/gain/probe"]


def test_models_that_differ_before_training_are_measured_each(tmp_path, folders):
    """A graft that is rounded is not the Instruct, and one that was trained is neither."""
    graft = GraftCallback(dtype="bfloat16", scales=[1.0, 0.5])
    make_trainer(tmp_path, graft).validate(make_module(folders), RandomData(), verbose=False)
    assert {who.name: twin.name for who, twin in graft.twins.items()} == {"base": "tuned"}
    module, _ = fit(tmp_path, folders, callbacks=[GraftCallback()])
    graft = GraftCallback(scales=[1.0, 0.5])
    make_trainer(tmp_path, graft).validate(module, RandomData(), verbose=False)
    assert graft.twins == {}


@pytest.mark.parametrize(("options", "validate", "expected"), [
    ({"subjects": ["tuned"]}, True, {"tuned"}), ({"subjects": ["grafted"]}, True, {"grafted", "grafted@0.5"}),
    ({}, False, {"tuned"}), ({}, True, {"tuned", "grafted", "grafted@0.5"}),
])  # fmt: skip
def test_evaluators_measure_the_models_that_are_asked_for(tmp_path, folders, options, validate, expected):
    graft = GraftCallback(scales=[1.0, 0.5], baselines=False, validate=validate)
    evaluation = EvaluationCallback({"probe": Probe()}, scales=[0.5], baselines=False, folder=str(tmp_path), **options)
    _, trainer = fit(tmp_path, folders, callbacks=[graft, evaluation], num_sanity_val_steps=1)
    found = metrics(trainer)
    assert {
        name.split("/")[1] for name in found if name.endswith("probe/score") and name.startswith("val/")
    } == expected
    assert ("val/grafted/loss" in found) == validate and found["graft/delta_norm"] > 0


def test_evaluators_can_wait_for_the_last_validation(tmp_path, folders):
    probe = Probe()
    evaluation = EvaluationCallback({"probe": probe}, folder=str(tmp_path), last_only=True)
    fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation], max_epochs=2)
    assert probe.calls == 4  # tuned, grafted, Base, Instruct; there are several validations


def test_the_untouched_are_measured_again_with_other_settings(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(GraftCallback, "_find_twins", lambda *_: {})  # as of a trained model
    graft, probe = GraftCallback(), Probe()
    evaluation = EvaluationCallback({"probe": probe}, folder=str(tmp_path / "e"))
    other = folders[0], save_model(tmp_path / "other", near=folders[1], seed=5)
    calls = []
    for pair, reference, precision in (
        (folders, "instruct", "32-true"), (folders, "instruct", "32-true"), (folders, "base", "32-true"),
        (folders, "base", "bf16-mixed"), (other, "base", "bf16-mixed"),
    ):  # fmt: skip
        probe.calls, evaluation.reference = 0, reference
        trainer = make_trainer(tmp_path, graft, evaluation, precision=precision)
        trainer.validate(make_module(pair), RandomData(), verbose=False)
        calls.append(probe.calls)
    assert calls == [4, 2, 4, 4, 4]


def test_the_pair_s_files_are_read_for_their_fingerprints_once(tmp_path, folders, monkeypatch):
    read, original = [], ModelPair.fingerprints
    monkeypatch.setattr(ModelPair, "fingerprints", lambda pair: read.append(pair) or original(pair))
    evaluation = EvaluationCallback({"probe": Probe()}, folder=str(tmp_path / "e"))
    export = ExportCallback(folder=str(tmp_path / "x"), parts=["delta"])
    fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation, export], max_steps=2)
    assert len(read) == 1


def test_evaluators_ask_by_the_template_of_the_data(tmp_path, folders, files):
    (tmp_path / "short.jinja").write_text(CHATML.replace("<|im_start|>", "<"))
    probe = Probe()
    data = ShadowData(
        ModelPair(*map(str, folders)), files["talks"], files["talks"], chat_template=str(tmp_path / "short.jinja"),
        max_length=64,
    )  # fmt: skip
    evaluation = EvaluationCallback({"probe": probe}, folder=str(tmp_path / "e"))
    module = make_module(folders)
    make_trainer(tmp_path, GraftCallback(), evaluation, max_steps=1, val_check_interval=None).fit(module, data)
    assert probe.pair.tokenizer().chat_template == data.tokenizer.chat_template
    assert module.pair.tokenizer().chat_template == CHATML
    assert probe.pair.instruct_folder() == module.pair.instruct_folder()


def test_a_trial_run_leaves_no_files(tmp_path, folders, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"answers": Generation(files["talks"], max_new_tokens=2)}
    _, trainer = fit(tmp_path, folders, callbacks=[GraftCallback(), EvaluationCallback(own)], fast_dev_run=True)
    assert "val/grafted/answers/score" in trainer.callback_metrics
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_the_sanity_check_measures_nothing(tmp_path, folders):
    probe = Probe()
    evaluation = EvaluationCallback({"probe": probe}, folder=str(tmp_path / "e"))
    fit(tmp_path, folders, callbacks=[GraftCallback(), evaluation], max_steps=1, limit_val_batches=1)
    assert probe.calls == 0 and not (tmp_path / "e").exists()


def test_without_a_graft_the_tuned_model_is_measured(tmp_path, folders):
    _, trainer = fit(tmp_path, folders, callbacks=[EvaluationCallback({"p": Probe()}, folder=str(tmp_path / "e"))])
    assert [name for name in metrics(trainer) if name.endswith("p/score")] == ["val/tuned/p/score"]


def test_what_cannot_be_is_told_before_the_training(tmp_path, folders, files):
    broken = write_rows(tmp_path / "broken.jsonl", [{"question": "?", "choices": ["a"], "answer": 0}])
    own = {"few": MultipleChoice(broken)}
    with pytest.raises(DataError) as error:
        fit(tmp_path, folders, callbacks=[GraftCallback(), EvaluationCallback(own, scales=[0.5])])
    for told in ("evaluation.scales has [0.5], beyond graft.scales []", "evaluators.few: ", "broken.jsonl"):
        assert told in str(error.value)
    with pytest.raises(DataError, match="compares with the Instruct, which needs a GraftCallback"):
        fit(tmp_path, folders, callbacks=[EvaluationCallback({"f": Divergence(files["talks"])})])
    chosen = EvaluationCallback({"p": Probe(), "q": Probe()}, only=["q"])
    assert list(chosen.evaluators) == ["q"]
    with pytest.raises(GraftError, match=r"evaluation\.only names r; evaluation\.evaluators are p\. Name some"):
        EvaluationCallback({"p": Probe()}, only=["r"])
    with pytest.raises(GraftError, match="is listed before GraftCallback"):
        fit(tmp_path, folders, callbacks=[EvaluationCallback({"p": Probe()}), GraftCallback()])


def test_loggers_that_take_text_get_it():
    class Board:
        def __init__(self):
            self.experiment, self.texts = self, []

        def add_text(self, *args):
            self.texts.append(args)

    class Table:
        def log_text(self, **options):
            self.options = options

    board, table = Board(), Table()
    log_text([board, table, object()], "val/samples", "text", 7)
    assert board.texts == [("val/samples", "text", 7)]
    assert table.options == {"key": "val/samples", "columns": ["text"], "data": [["text"]], "step": 7}


def train_and_evaluate(folders, files, kind, strategy, world_size, root):
    own = evaluators(files)
    # Generation comes first: a forward pass before it would leave FSDP2's embeddings gathered.
    evaluation = EvaluationCallback({"answers": own.pop("answers"), "probe": Probe(), **own}, folder=str(root))
    module = distributed.make_module(folders, kind)
    callbacks, options = [GraftCallback(), evaluation], {"max_steps": 2, "num_sanity_val_steps": 1}
    trainer = distributed.make_trainer(strategy, world_size, callbacks, **options)
    trainer.fit(module, RandomData())
    logged = {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}
    module.max_new_tokens = 3
    rows = [{"index": i, "input_ids": torch.arange(10 * i + 5, 10 * i + 9), "attention_mask": torch.ones(4).long()}
            for i in range(trainer.global_rank, 4, world_size)]  # fmt: skip
    batches = trainer.predict(module, DataLoader(rows, batch_size=1))
    return logged, {answer["index"]: answer["answer"] for batch in batches for answer in batch}


@pytest.mark.parametrize(("kind", "strategy"), [
    ("lora", "fsdp2"), *(pytest.param(*both, marks=pytest.mark.slow) for both in (("lora", "ddp"), ("full", "fsdp2"))),
])  # fmt: skip
def test_two_processes_find_what_one_finds(tmp_path, folders, files, kind, strategy):
    """Seven and five rows over two ranks: uneven shards neither hang nor count twice. They predict the same too."""
    ((one, answers),) = run_ranks(train_and_evaluate, 1, folders, files, kind, "auto", 1, tmp_path / "one")
    ranks = run_ranks(train_and_evaluate, 2, folders, files, kind, strategy, 2, tmp_path / "two")
    assert len(answers) == 4 and ranks[0][1] | ranks[1][1] == answers
    for rank, _ in ranks:
        assert rank.keys() == one.keys()
        for name, value in one.items():
            assert rank[name] == pytest.approx(value, rel=2e-4, abs=1e-5, nan_ok=True), name
    for name, count in (("choice", 7), ("answers", 5), ("forgetting", 5)):
        rows = [
            [json.loads(line) for line in (tmp_path / which / f"step-2/grafted/{name}.jsonl").read_text().splitlines()]
            for which in ("one", "two")
        ]
        assert [row["index"] for row in rows[1]] == list(range(count))
        assert [row["score"] for row in rows[0]] == pytest.approx([row["score"] for row in rows[1]], abs=1e-6)
    order = (tmp_path / "two/step-2/tuned/probe.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in order] == [4, 5]


@pytest.mark.parametrize("name", ["my ev", "a/b", ""])
def test_a_name_that_would_not_be_one_part_of_a_metric_is_refused_at_once(name):
    with pytest.raises(GraftError, match=f"evaluation.evaluators has the name '{name}'; expected letters"):
        EvaluationCallback({name: Probe()})
