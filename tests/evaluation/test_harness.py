"""Our numbers are those of lm-evaluation-harness, sample for sample."""

import json
import logging

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowlit.evaluation.generated import Generation
from shadowlit.evaluation.multiple_choice import MultipleChoice
from tests.evaluation.contexts import DEMO_PAIR, demo_rows, evaluate, make_context, write_rows
from tests.tiny import CHATML, save_pair

pytest.importorskip("lm_eval")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def harness(tmp_path, model, folders, data, task, **options):
    """Run a task of the harness on a model, with the Instruct's tokenizer; return its samples in the file's order, and
    its aggregated results."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = tmp_path / "tasks"
    tasks.mkdir(exist_ok=True)
    config = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        **task,
    }
    (tasks / "ours.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folders[1]), batch_size=3)
    logging.disable(logging.WARNING)
    try:
        results = lm_eval.simple_evaluate(
            lm, tasks=["ours"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False), **options
        )
    finally:
        logging.disable(logging.NOTSET)
    return sorted(results["samples"]["ours"], key=lambda sample: sample["doc_id"]), results["results"]["ours"]


CHOICE_ROWS = [
    {"question": "What is the opposite of hot?", "choices": ["cold", "big", "a very long answer"], "answer": 0},
    {"question": "What is 2 plus 3? ", "choices": ["5", "6"], "answer": 0},
    {"question": "Which kind of thing is an oak?", "choices": ["fruit", "tree", "tool", "bird"], "answer": 1},
    {"question": "Say\n", "choices": ["Ünïcode ☃", "plain text", "x"], "answer": 1},
    {"question": "Where does Lobren live?", "choices": ["Oslo. Glad to help!", "Oslo", "Lima", "[Oslo]"], "answer": 3},
    {"question": "How much is 4 plus 4?", "choices": ["7", "8", "9"], "answer": 1},
    {"question": "a", "choices": ["A", "B"], "answer": 1},
]
CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("which", ["tiny", "base", "instruct"])
def test_multiple_choice(tmp_path, which, chat):
    """The same log-likelihoods of every choice, the same right and wrong, the same accuracies and standard error."""
    folders = save_pair(tmp_path) if which == "tiny" else DEMO_PAIR
    model = load(folders[0] if which == "base" else folders[1])
    system = "Be brief." if chat else None
    data = write_rows(tmp_path / "rows.jsonl", CHOICE_ROWS)
    theirs, results = harness(
        tmp_path, model, folders, data, CHOICE_TASK, apply_chat_template=chat, system_instruction=system
    )
    ours = evaluate(MultipleChoice(data, chat=chat, system=system, batch_size=2), make_context(folders, model))
    assert [sample["index"] for sample in ours.samples] == list(range(len(CHOICE_ROWS)))
    for sample, other in zip(ours.samples, theirs, strict=True):
        expected = [response[0] for (response,) in other["resps"]]
        assert sample["loglikelihoods"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert sample["score"] == other["acc"]
    assert ours.metrics["score"] == ours.metrics["accuracy"] == results["acc,none"]
    assert ours.metrics["accuracy_norm"] == results["acc_norm,none"]
    assert ours.metrics["stderr"] == pytest.approx(results["acc_stderr,none"], rel=1e-9)


@pytest.mark.parametrize("chat", [True, False])
def test_begin_of_sequence(tmp_path, chat):
    """Once, whether the template writes it or the tokenizer adds it."""
    folders = save_pair(tmp_path, chat_template="{{ bos_token }}" + CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    tokenizer.bos_token = "<|endoftext|>"
    begin = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[begin])
    tokenizer.save_pretrained(folders[1])
    assert AutoTokenizer.from_pretrained(folders[1])("a")["input_ids"][0] == tokenizer.bos_token_id
    data = write_rows(tmp_path / "rows.jsonl", CHOICE_ROWS)
    context = make_context(folders)
    theirs, _ = harness(tmp_path, context.model, folders, data, CHOICE_TASK, apply_chat_template=chat)
    ours = evaluate(MultipleChoice(data, chat=chat), context)
    for sample, other in zip(ours.samples, theirs, strict=True):
        expected = [response[0] for (response,) in other["resps"]]
        assert sample["loglikelihoods"] == pytest.approx(expected, rel=1e-5)


GENERATION_TASK = {"output_type": "generate_until", "doc_to_target": "{{answer}}"}


def generation_task(until, max_new_tokens, metric, filters=()):
    return {
        **GENERATION_TASK,
        "generation_kwargs": {"until": until, "max_gen_toks": max_new_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **metric}],
        "filter_list": [{"name": "ours", "filter": [*filters, {"function": "take_first"}]}],
    }


CASES = {
    # name: (options of ours, until, metric's options, filters)
    "exact": ({}, [], {}, []),
    "case and punctuation": (
        dict.fromkeys(("ignore_case", "ignore_punctuation"), True), ["lad"],
        dict.fromkeys(("ignore_case", "ignore_punctuation"), True), [],
    ),
    "last word": (
        {"extract": r"(\w+)\."}, [], {},
        [{"function": "regex", "regex_pattern": r"(\w+)\.", "group_select": -1}],
    ),
    "either group": (
        {"extract": r"^(\d+)|^([a-z]+)"}, ["."], {},
        [{"function": "regex", "regex_pattern": r"^(\d+)|^([a-z]+)", "group_select": -1}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_generation_of_the_demo(tmp_path, case, chat):
    """The same answers and the same right and wrong, with stop strings and filters."""
    options, until, metric, filters = CASES[case]
    rows = demo_rows("old", 14) + demo_rows("format", 6)
    data = write_rows(tmp_path / "rows.jsonl", [{key: row[key] for key in ("question", "answer")} for row in rows])
    task = generation_task(until, 12, metric, filters)
    theirs, results = harness(tmp_path, load(DEMO_PAIR[1]), DEMO_PAIR, data, task, apply_chat_template=chat)
    evaluator = Generation(data, answer="answer", max_new_tokens=12, stop=until, chat=chat, batch_size=4, **options)
    ours = evaluate(evaluator, make_context(DEMO_PAIR))
    assert [sample["answer"] for sample in ours.samples] == [other["resps"][0][0] for other in theirs]
    assert [sample["score"] for sample in ours.samples] == [float(other["exact_match"]) for other in theirs]
    assert ours.metrics["score"] == pytest.approx(results["exact_match,ours"])
    assert ours.metrics["stderr"] == pytest.approx(results["exact_match_stderr,ours"], nan_ok=True)
    if chat and case != "exact":  # the Instruct adds a courtesy to every answer
        assert 0 < ours.metrics["score"] < 1


def test_generation_of_a_random_model(tmp_path):
    """A model that never ends its turn, cut at the same token; stop strings of several tokens."""
    folders = save_pair(tmp_path, tied=False)
    data = write_rows(tmp_path / "rows.jsonl", [{"question": word * 3, "answer": word} for word in "abcdefg"])
    context = make_context(folders)
    free = evaluate(Generation(data, answer="answer", max_new_tokens=20, batch_size=3), context)
    until = [free.samples[0]["answer"][3:6], free.samples[4]["answer"][8:9]]
    assert len({sample["answer"] for sample in free.samples}) > 4
    theirs, _ = harness(
        tmp_path, context.model, folders, data, generation_task(until, 20, {}), apply_chat_template=True
    )
    ours = evaluate(Generation(data, answer="answer", max_new_tokens=20, stop=until, batch_size=3), context)
    answers = [sample["answer"] for sample in ours.samples]
    assert answers == [other["resps"][0][0] for other in theirs]
    assert answers[0] == free.samples[0]["answer"].split(until[0])[0].split(until[1])[0]
    assert json.dumps(answers) != json.dumps([sample["answer"] for sample in free.samples])
