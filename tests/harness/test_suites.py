"""Suites of benchmarks: their tasks exist, and their means and differences are what is derived by hand."""

import math
import pickle

import numpy as np
import pytest
from filelock import FileLock

from shadowlit.errors import EvaluationError
from shadowlit.harness.models import Evaluation
from shadowlit.harness.report import make_report
from shadowlit.harness.suites import (
    Score,
    Suite,
    SuiteScore,
    SuiteTask,
    TaskScore,
    difference,
    load_suites,
    mean_difference,
    mean_of,
    read_scores,
    select_suites,
    suite_difference,
)
from tests.evaluation.contexts import DEMO_PAIR

pytest.importorskip("lm_eval")


def task_score(name, values, weighted=True, score=None, better=True):
    """The score of a task with these samples by subtask; by default the mean over all of them."""
    flat = [value for part in values.values() for value in part]
    score = score or Score(float(np.mean(flat)), float(np.std(flat, ddof=1) / math.sqrt(len(flat))))
    return TaskScore(
        name=name, task=name, metric="acc,none", score=score, higher_is_better=better, num_fewshot=0,
        num_samples=len(flat), values={key: dict(enumerate(part)) for key, part in values.items()}, weighted=weighted,
    )  # fmt: skip


def evaluation(*suites, model="m", chat=True, limit=None):
    return Evaluation(model, chat, suites, {"config": {"limit": limit}}, {})


def test_the_mean_of_a_group_is_plain_and_its_error_that_of_independent_scores():
    mean = mean_of([Score(0.5, 0.03), Score(0.7, 0.04)])
    assert mean.value == pytest.approx(0.6)
    assert mean.stderr == pytest.approx(0.025)  # sqrt(0.0009 + 0.0016) / 2


def test_without_a_task_s_error_the_mean_has_none():
    assert mean_of([Score(0.5, 0.03), Score(0.7)]) == Score(pytest.approx(0.6), None)


def test_a_difference_is_taken_sample_by_sample():
    found = mean_difference([1, 1, 0, 1], [1, 0, 0, 0])
    assert found.value == 0.5
    assert found.stderr == pytest.approx(math.sqrt(1 / 3) / 2)  # of 0 1 0 1: variance 4 · 0.25 / 3, of the mean / 4
    assert mean_difference([1], [0]) == Score(1, None)


def test_in_a_weighted_group_every_sample_counts_alike_and_else_every_subtask():
    ours, theirs = {"a": [1, 1], "b": [0, 1, 1, 1]}, {"a": [0, 1], "b": [0, 1, 0, 1]}
    pooled = difference(task_score("g", ours), task_score("g", theirs))
    d = np.array([1, 0, 0, 0, 1, 0])
    assert pooled.value == pytest.approx(d.mean()) and pooled.stderr == pytest.approx(d.std(ddof=1) / math.sqrt(6))
    plain = difference(task_score("g", ours, weighted=False), task_score("g", theirs, weighted=False))
    assert plain.value == pytest.approx((0.5 + 0.25) / 2)
    assert plain.stderr == pytest.approx(math.hypot(0.5, 0.25) / 2)  # 1 0: sd √½ / √2; 0 0 1 0: sd ½ / √4


def test_samples_that_cannot_be_paired_give_a_difference_without_error():
    one = TaskScore("t", "t", "ppl,none", Score(3.0, 0.1), False, 0, 2, None)
    other = TaskScore("t", "t", "ppl,none", Score(2.5, 0.1), False, 0, 2, None)
    assert difference(other, one) == Score(-0.5, None)
    assert difference(task_score("t", {"t": [1, 0]}), task_score("t", {"t": [1, 0, 0]})).stderr is None


def test_the_difference_of_two_means_is_the_mean_of_the_differences():
    ours = SuiteScore("S", (task_score("x", {"x": [1, 1]}), task_score("y", {"y": [1, 0, 1, 1]})))
    theirs = SuiteScore("S", (task_score("x", {"x": [0, 1]}), task_score("y", {"y": [1, 0, 0, 1]})))
    found = suite_difference(ours, theirs)
    assert found.value == pytest.approx(ours.mean.value - theirs.mean.value)
    assert found.stderr == pytest.approx(math.hypot(0.5, 0.25) / 2)


def samples(values, used_filter="none", metric="acc"):
    return [{"doc_id": i, "filter": used_filter, metric: value} for i, value in enumerate(values)]


def results(weight_by_size):
    """What the harness reports of a group of two tasks, of 2 and 4 samples; its own functions aggregate."""
    from lm_eval.api.metrics import (
        aggregate_subtask_metrics,
        mean_stderr,
        pooled_sample_stderr,
        unweighted_mean_stderr,
    )

    values = {"a": [1.0, 0.0], "b": [1.0, 1.0, 0.0, 1.0]}
    means = [np.mean(part) for part in values.values()]
    errors = [mean_stderr(part) for part in values.values()]
    group = {
        "acc,none": aggregate_subtask_metrics(means, [2, 4], weight_by_size),
        "acc_stderr,none": pooled_sample_stderr(errors, [2, 4]) if weight_by_size else unweighted_mean_stderr(errors),
    }
    rows = {
        name: {"alias": name, "sample_len": len(part), "acc,none": float(m), "acc_stderr,none": e}
        for (name, part), m, e in zip(values.items(), means, errors, strict=True)
    }
    return {
        "results": {"g": {"alias": "g", **group}, **rows},
        "group_subtasks": {"g": ["sub"], "sub": ["a", "b"]},
        "n-shot": {"a": 5, "b": 5},
        "higher_is_better": {"g": {"acc": True}},
        "samples": {name: samples(part) for name, part in values.items()},
    }


@pytest.mark.parametrize(("weight_by_size", "expected"), [(True, 4 / 6), (False, (0.5 + 0.75) / 2)])
def test_a_group_s_score_is_read_with_its_samples(weight_by_size, expected):
    (suite,) = read_scores([Suite(None, (SuiteTask("G", "g"),))], results(weight_by_size))
    (score,) = suite.tasks
    assert score.score.value == pytest.approx(expected) and score.score.stderr > 0
    assert (score.metric, score.num_fewshot, score.num_samples, score.weighted) == ("acc,none", 5, 6, weight_by_size)
    assert score.values == {"a": {0: 1.0, 1: 0.0}, "b": {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0}}


def test_a_score_that_is_no_mean_of_samples_is_not_paired():
    found = results(True)
    found["results"]["a"]["acc,none"] = 0.9
    (suite,) = read_scores([Suite(None, (SuiteTask("a", "a"),))], found)
    assert suite.tasks[0].values is None


def test_an_error_that_the_harness_does_not_give_is_none():
    found = results(True)
    found["results"]["a"]["acc_stderr,none"] = "N/A"
    (suite,) = read_scores([Suite(None, (SuiteTask("a", "a"),))], found)
    assert suite.tasks[0].score == Score(0.5, None)


def test_the_metric_and_filter_of_a_suite_count():
    found = {
        "results": {"t": {"sample_len": 2, "em,strict": 0.0, "em_stderr,strict": 0.0, "em,flexible": 0.5,
                          "em_stderr,flexible": 0.5, "f1,flexible": 0.75, "f1_stderr,flexible": 0.25}},
        "samples": {"t": samples([0, 0], "strict", "em") + samples([0, 1], "flexible", "em")},
    }  # fmt: skip
    chosen = Suite("S", (SuiteTask("T", "t", metric="em", filter="flexible"),))
    (score,) = read_scores([chosen], found)[0].tasks
    assert score.score == Score(0.5, 0.5) and score.values == {"t": {0: 0.0, 1: 1.0}}
    (first,) = read_scores([Suite(None, (SuiteTask("t", "t"),))], found)[0].tasks
    assert first.metric == "em,strict"


def test_the_report_says_what_is_missing_and_has_all_means():
    math_suite = SuiteScore("Math", (task_score("x", {"x": [1, 0]}), task_score("y", {"y": [1, 1]})), ("SVAMP",))
    code = SuiteScore("Code", (task_score("z", {"z": [0, 0]}), task_score("w", {"w": [0, 1]}, better=False)))
    report = make_report([evaluation(math_suite, code, limit=2)])
    assert report.sections[0][-1] == ("mean of Math", "", "", "", "0.7500 ± 0.2500")
    assert report.sections[1][-1] == ("mean of Code", "", "", "", "0.2500 ± 0.2500")
    assert report.sections[2] == (("mean of 2 groups", "", "", "", "0.5000 ± 0.1768"),)  # √(2 · 0.25²) / 2
    assert report.sections[1][1][1] == "acc ↓"
    assert report.notes[0] == "not in lm-evaluation-harness 0.4.13: SVAMP; the mean of Math is over the other 2"
    assert any(note.startswith("only the first 2 samples") for note in report.notes)
    assert "| mean of Math |  |  |  | 0.7500 ± 0.2500 |" in str(report)


def test_the_report_compares_with_the_first_model():
    first = SuiteScore("S", (task_score("x", {"x": [1, 0, 1, 1]}), task_score("y", {"y": [1, 1]})))
    second = SuiteScore("S", (task_score("x", {"x": [0, 0, 0, 1]}), task_score("y", {"y": [1, 1]})))
    report = make_report([evaluation(first, model="one"), evaluation(second, model="two", chat=False)])
    assert report.headings[4:] == ("A", "B", "B − A")
    assert [row[-1] for row in report.sections[0]] == ["−0.5000 ± 0.2887", "+0.0000 ± 0.0000", "−0.2500 ± 0.1443"]
    assert report.models == (("A", "one (chat template)"), ("B", "two (no chat template)"))
    assert "the models differ in whether a chat template was applied" in report.notes


def test_the_report_names_tasks_without_error():
    suite = SuiteScore("S", (task_score("x", {"x": [1, 0]}), task_score("y", {"y": [1, 1]}, score=Score(1.0))))
    report = make_report([evaluation(suite)])
    assert report.sections[0][-1][-1] == "0.7500 ± –"
    assert "no standard error from the harness, so none of a mean with it: y" in report.notes


def test_models_in_different_tasks_are_not_compared():
    one, other = SuiteScore(None, (task_score("x", {"x": [1]}, score=Score(1.0)),)), SuiteScore(None, ())
    with pytest.raises(EvaluationError, match="different tasks"):
        make_report([evaluation(one), evaluation(other)])


def test_the_paper_is_its_three_groups_each_once():
    titles = [suite.title for suite in select_suites(["math7", "paper"])]
    assert titles == ["Math-7", "Code-3", "Reasoning-9"]
    assert [len(suite.tasks) for suite in select_suites(["paper"])] == [7, 3, 9]


def test_other_names_are_tasks_of_their_own_without_a_mean():
    suite, others = select_suites(["math7", "gsm8k", "mine", "mine"])  # gsm8k is in Math-7 already
    assert suite.title == "Math-7" and others == Suite(None, (SuiteTask("mine", "mine"),))
    assert SuiteScore(None, (task_score("x", {"x": [1, 0]}), task_score("y", {"y": [1, 1]}))).mean is None


ALL = {task.name: task for suites in load_suites().values() for suite in suites for task in suite.tasks}


@pytest.fixture(scope="module")
def index(tmp_path_factory, worker_id):
    """Every task of the installed harness; listing them takes ten seconds, so one process does it for all."""
    from shadowlit.harness import tasks

    if worker_id == "master":  # the only process
        yield tasks._harness_index()
        return
    store = tmp_path_factory.getbasetemp().parent / "harness_index.pickle"
    with FileLock(f"{store}.lock"):
        if not store.exists():
            store.write_bytes(pickle.dumps(tasks._harness_index()))
    found = pickle.loads(store.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_harness_index", lambda: found)
        yield found


def leaves(name, index):
    """All settings below a name."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return [config for tagged in entry.tags for config in leaves(tagged, index)]
    if entry.kind.name == "GROUP":
        return [config for child in entry.cfg["task"] for config in leaves(child, index)]
    return [entry.cfg]


@pytest.mark.parametrize("task", [task for task in ALL.values() if task.task], ids=lambda task: task.name)
def test_every_task_of_a_suite_is_in_the_installed_harness(task, index):
    """With its metric, its filter, its direction, and whether it runs code; and, for a group, an aggregate of them."""
    name = task.based_on or task.task
    assert name in index
    below = leaves(name, index)
    for config in below:
        directions = {str(m["metric"]): m["higher_is_better"] for m in config["metric_list"]}
        metric = "pass_at_k" if task.metric == "pass@1" else task.metric
        assert [d for m, d in directions.items() if metric in m] == [task.higher_is_better], directions
        filters = [f["name"] for f in config.get("filter_list") or []] or ["none"]
        assert task.filter in filters
        assert bool(config.get("unsafe_code")) == task.executes_code
        if task.num_fewshot is not None:
            assert config.get("num_fewshot") != 0  # which the harness would keep
    if index[name].kind.name == "GROUP":
        aggregates = index[name].cfg["aggregate_metric_list"]
        (aggregate,) = [a for a in aggregates if a["metric"] == task.metric]
        assert task.filter in aggregate.get("filter_list", task.filter)


def test_what_the_suites_call_missing_is_missing(index):
    gone = {task.name for task in ALL.values() if task.task is None}
    assert gone == {"Minerva", "SVAMP", "LiveCodeBench", "TheoremQA"}
    assert not [name for name in index if any(word in name.lower() for word in ("svamp", "livecode", "theoremqa"))]


def test_hendrycks_math_fails_a_right_answer_with_a_reasoning_and_minerva_math_does_not():
    """Why the suite takes minerva_math for MATH."""
    pytest.importorskip("math_verify")
    from lm_eval.tasks.hendrycks_math.utils import process_results as hendrycks
    from lm_eval.tasks.minerva_math.utils import process_results as minerva

    doc = {"problem": "?", "solution": r"Thus $x=2$, and the answer is $\boxed{4}$.", "answer": "4"}
    answer = [r"We have $x=2$. Then $x^2=4$." + "\n\n" + r"The answer is $\boxed{4}$."]
    assert hendrycks(doc, answer)["exact_match"] == 0
    assert minerva(doc, answer)["math_verify"] == 1


@pytest.mark.parametrize(("name", "hint"), [("gsm8q", "gsm8k"), ("math8", "math7")])
def test_an_unknown_name_is_told_with_the_nearest(name, hint, index):
    from shadowlit.harness.tasks import load_benchmarks

    with pytest.raises(EvaluationError, match=rf"no suite or task '{name}'.*0\.4\.13.*Near it:.*{hint}"):
        load_benchmarks([name])


@pytest.mark.parametrize("names", [["paper"], ["code3"], ["mbpp"], ["humaneval,gsm8k"]])
def test_tasks_that_run_programs_are_refused_before_anything_is_loaded(names, index, monkeypatch):
    from lm_eval.tasks import TaskManager

    from shadowlit.harness.tasks import load_benchmarks

    monkeypatch.setattr(TaskManager, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(EvaluationError, match=r"programs that the model wrote.*--execute-code"):
        load_benchmarks(names)


ROWS = {
    "EleutherAI/hendrycks_math": {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "type": "Algebra"},
    "HuggingFaceH4/MATH-500": {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "answer": "2"},
    "openai/gsm8k": {"question": "1+1?", "answer": "One more.\n#### 2"},
    "Maxwell-Jia/AIME_2024": {"Problem": "1+1?", "Answer": 2},
    "openai/openai_humaneval": {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"},
    "evalplus/humanevalplus": {"prompt": "def g():\n", "test": "def check(g): pass", "entry_point": "g"},
    "cais/mmlu": {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "algebra"},
    "TIGER-Lab/MMLU-Pro": {
        "question": "1+1?", "options": ["1", "2"], "answer": "B", "answer_index": 1, "cot_content": "A: Let's think.",
    },
    "allenai/winogrande": {"sentence": "The _ is red.", "option1": "cat", "option2": "dog", "answer": "1"},
    "EleutherAI/drop": {
        "query_id": "1", "passage": "One cat.", "question": "How many?",
        "answer": {"number": "1", "date": {"day": "", "month": "", "year": ""}, "spans": []},
        "validated_answers": {"number": [], "date": [], "spans": []},
    },
    "allenai/ai2_arc": {"question": "1+1?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
    "SaylorTwift/bbh": {"input": "Sort. Options:\n(A) a\n(B) b\nList: b a", "target": "a b"},
    "Idavidrein/gpqa": {
        "Question": "1+1?", "Correct Answer": "2", "Incorrect Answer 1": "1", "Incorrect Answer 2": "3",
        "Incorrect Answer 3": "4",
    },
}  # fmt: skip
# MMLU-Pro's; each of its subtasks keeps its own rows.
CATEGORIES = (
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
    "math", "other", "philosophy", "physics", "psychology",
)  # fmt: skip
CATEGORIES = tuple(name for name in CATEGORIES for _ in range(6))


def test_the_whole_paper_runs_through_the_harness_own_tasks(index, monkeypatch):
    """Its prompts, filters and scorers, on rows of the data sets' form: every number that counts is reported."""
    pytest.importorskip("math_verify")
    import datasets
    import evaluate as hf_evaluate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shadowlit.harness.models import evaluate_model

    class CodeEval:
        def compute(self, references, predictions, k):
            return {f"pass@{n}": float("def" in predictions[0][0]) for n in k}, {}

    def load(path, name=None, **_):
        rows = [{**ROWS[path], "category": c, "canary": i} for i, c in enumerate(CATEGORIES)]
        data = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "dev", "test"), data))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hf_evaluate, "load", lambda name: CodeEval())
    folder = DEMO_PAIR[1]
    found = evaluate_model(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "paper", limit=2,
        max_new_tokens=2, execute_code=True,
    )  # fmt: skip
    assert [[score.name for score in suite.tasks] for suite in found.suites] == [
        [task.name for task in suite.tasks if task.task] for suite in load_suites()["paper"]
    ]
    for suite, listed in zip(found.suites, load_suites()["paper"], strict=True):
        for score in suite.tasks:
            shots = next(task.num_fewshot for task in listed.tasks if task.name == score.name) or 0
            assert score.values is not None and score.score.stderr is not None, score
            assert score.num_fewshot == shots, score
    report = make_report([found])
    assert report.sections[-1][0][0] == "mean of 3 groups"
    assert [note.partition("; ")[2] for note in report.notes if note.startswith("not in")] == [
        "the mean of Math-7 is over the other 5",
        "the mean of Code-3 is over the other 2",
        "the mean of Reasoning-9 is over the other 8",
    ]
    plus = found.samples["humaneval_plus_instruct"][0]
    assert plus["doc"]["entry_point"] == "g" and plus["pass@1"] == 1.0
