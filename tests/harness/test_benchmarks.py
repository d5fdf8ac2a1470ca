"""The harness on tasks of one's own: its numbers against computations that don't use it, and the command."""

import ast
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shadowlit.cli.functions import spell_out
from shadowlit.cli.main import main
from shadowlit.errors import EvaluationError
from shadowlit.harness import tasks as tasks_module
from shadowlit.harness.models import evaluate_model, vllm_model
from shadowlit.harness.report import make_report
from shadowlit.harness.tasks import Settings, load_benchmarks
from tests.distributed import run_command
from tests.evaluation.contexts import DEMO_PAIR, demo_rows, write_rows
from tests.tiny import save_model

pytest.importorskip("lm_eval")

BASE, INSTRUCT = DEMO_PAIR
ROWS = demo_rows("old", 20)
MEAN = {"aggregation": "mean", "higher_is_better": True}


def choice_rows():
    """Each question with three answers, the right one in turn at every place; made so that not all are got right."""
    answers = sorted({row["answer"] for row in ROWS})
    rows = []
    for i, row in enumerate(ROWS):
        others = [answer for answer in answers if answer != row["answer"]]
        choices = [others[i % len(others)], others[(5 * i + 1) % len(others)]]
        choices.insert(i % 3, row["answer"] if i % 4 else "no such word")
        rows.append({"question": row["question"], "choices": choices, "gold": i % 3})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of one's own: choice, generation, a group of two, and one that runs code; data beside the YAML files."""
    root = tmp_path_factory.mktemp("tasks")
    write_rows(root / "choice.jsonl", choice_rows())
    write_rows(root / "answers.jsonl", ROWS[:12])
    write_rows(root / "examples.jsonl", ROWS[12:])

    def add(name, **config):
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}), encoding="utf-8")

    data = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    add(
        "choice", **data, dataset_kwargs={"data_files": {"test": "choice.jsonl"}}, output_type="multiple_choice",
        doc_to_choice="{{choices}}", doc_to_target="gold", metric_list=[{"metric": "acc", **MEAN}], tag=["mine"],
    )  # fmt: skip
    generation = {
        "dataset_kwargs": {"data_files": {"test": "answers.jsonl", "train": "examples.jsonl"}},
        "fewshot_split": "train",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    }
    add("answer", **data, **generation, tag=["mine"])
    add("first", **data, **generation)
    add("second", **data, **generation | {"doc_to_target": "8"})
    aggregate = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": False}
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [aggregate]}
    (root / "both.yaml").write_text(yaml.safe_dump(group))
    (root / "loose.yaml").write_text(yaml.safe_dump({"group": "loose", "task": ["first", "choice"]}))
    (root / "code.py").write_text(
        "import os\ndef score(doc, results):\n    return {'allowed': float(os.environ['HF_ALLOW_CODE_EVAL'] == '1')}"
    )
    add("programs", **data, **generation | {"unsafe_code": True, "metric_list": [{"metric": "allowed", **MEAN}]})
    with (root / "programs.yaml").open("a") as file:
        file.write("process_results: !function code.score\n")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Data are cached here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(INSTRUCT, dtype=torch.float32)


def log_likelihood(model, tokenizer, context, continuation):
    """The sum of the log-probabilities of the tokens that come after the context's, in float64."""
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits.double().log_softmax(-1)[0]
    return sum(log_probs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


def own_answers(model, tokenizer, questions, max_new_tokens=10):
    """Greedy answers to single turns, up to a full stop."""
    answers = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id))  # fmt: skip
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)  # fmt: skip
        answers.append(text.split("\n")[0].split(".")[0])
    return answers


def test_multiple_choice_is_the_model_s_likelihoods(folder, model, tokenizer):
    found = evaluate_model(model, tokenizer, "choice", tasks_folder=folder, chat=False)
    likelihoods = [
        [log_likelihood(model, tokenizer, row["question"], f" {choice}") for choice in row["choices"]]
        for row in choice_rows()
    ]
    right = [float(np.argmax(each) == row["gold"]) for each, row in zip(likelihoods, choice_rows(), strict=True)]
    share = float(np.mean(right))
    (score,) = found.suites[0].tasks
    assert 0.2 < share < 1 and score.score.value == pytest.approx(share)
    assert score.score.stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert score.values == {"choice": dict(enumerate(right))}
    logged = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in found.samples["choice"]]
    np.testing.assert_allclose(logged, likelihoods, atol=1e-3)


def test_generation_is_the_model_s_greedy_answer(folder, model, tokenizer):
    found = evaluate_model(model, tokenizer, "answer", tasks_folder=folder)
    answers = own_answers(model, tokenizer, [row["question"] for row in ROWS[:12]])
    assert [sample["resps"][0][0] for sample in found.samples["answer"]] == answers
    right = [float(answer == row["answer"]) for answer, row in zip(answers, ROWS, strict=False)]
    (score,) = found.suites[0].tasks
    assert found.chat and score.values == {"answer": dict(enumerate(right))}
    assert score.score.value == pytest.approx(np.mean(right)) and (score.metric, score.num_fewshot) == (
        "exact_match,none", 0,
    )  # fmt: skip


def test_the_model_s_own_generation_settings_do_not_change_the_answers(folder, model, tokenizer):
    """Its max_new_tokens would come before the task's limit, its penalty would make other answers."""
    before = evaluate_model(model, tokenizer, "answer", tasks_folder=folder)
    model.generation_config = settings = GenerationConfig(
        max_new_tokens=1, repetition_penalty=9.0, do_sample=True, temperature=5.0, eos_token_id=tokenizer.eos_token_id
    )
    after = evaluate_model(model, tokenizer, "answer", tasks_folder=folder)
    assert [s["resps"] for s in after.samples["answer"]] == [s["resps"] for s in before.samples["answer"]]
    assert model.generation_config is settings and settings.max_new_tokens == 1


def test_the_model_and_the_random_generators_are_left_as_they_were(folder, model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pad, states = tokenizer.pad_token, (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    tokenizer.pad_token = None
    evaluate_model(model, tokenizer, ["choice", "answer"], tasks_folder=folder, limit=2)
    assert tokenizer.pad_token is None
    tokenizer.pad_token = pad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_wrapped_adapter_is_evaluated_as_the_merged_model(tmp_path, folder, model, tokenizer):
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    found = evaluate_model(wrapped, tokenizer, ["choice", "answer"], tasks_folder=folder, limit=8)
    merged = evaluate_model(wrapped.merge_and_unload(), tokenizer, ["choice", "answer"], tasks_folder=folder, limit=8)
    likelihoods = [[s["filtered_resps"] for s in each.samples["choice"]] for each in (found, merged)]
    np.testing.assert_allclose(*[[[a[0] for a in sample] for sample in each] for each in likelihoods], atol=1e-3)
    assert [s["resps"] for s in found.samples["answer"]] == [s["resps"] for s in merged.samples["answer"]]


def test_loaded_tasks_serve_several_models_alike(folder, model, tokenizer):
    benchmarks = load_benchmarks(["mine"], Settings(limit=6), folder)
    one, other = (evaluate_model(model, tokenizer, benchmarks, name=name) for name in ("one", "other"))
    report = make_report([one, other])
    assert [row[0] for row in report.sections[0]] == ["answer", "choice"]  # the tasks of the tag
    assert {row[-1] for row in report.sections[0]} == {"+0.0000 ± 0.0000"}
    with pytest.raises(EvaluationError, match="settings were given with loaded benchmarks: limit"):
        evaluate_model(model, tokenizer, benchmarks, limit=2)


def test_a_group_counts_subtasks_as_its_file_says(folder, model, tokenizer):
    found = evaluate_model(model, tokenizer, "both", tasks_folder=folder)
    (score,) = found.suites[0].tasks
    answers = own_answers(model, tokenizer, [row["question"] for row in ROWS[:12]])
    right = [
        [float(a == row["answer"]) for a, row in zip(answers, ROWS, strict=False)],
        [float(a == "8") for a in answers],
    ]
    errors = [np.std(part, ddof=1) / math.sqrt(12) for part in right]
    assert score.score.value == pytest.approx(np.mean(right)) and score.num_samples == 24
    assert score.score.stderr == pytest.approx(math.hypot(*errors) / 2)


def test_a_group_without_a_score_gives_its_tasks(folder, model, tokenizer):
    found = evaluate_model(model, tokenizer, "loose", tasks_folder=folder, limit=2)
    assert [score.task for score in found.suites[0].tasks] == ["first", "choice"]


def test_examples_come_from_their_split_by_the_seed(folder, model, tokenizer):
    def prompts(**settings):
        found = evaluate_model(model, tokenizer, "answer", tasks_folder=folder, limit=3, chat=False, **settings)
        assert found.suites[0].tasks[0].num_fewshot == settings["fewshot"]
        return [sample["arguments"][0][0] for sample in found.samples["answer"]]

    two = prompts(fewshot=2)
    examples = {f"{row['question']} {row['answer']}" for row in ROWS[12:]}
    for prompt, row in zip(two, ROWS, strict=False):
        *shots, question = prompt.split("\n\n")
        assert len(shots) == 2 and set(shots) <= examples and question == row["question"]
    assert two == prompts(fewshot=2, seed=1234) != prompts(fewshot=2, seed=5)


def test_examples_that_would_hold_the_answer_are_refused(folder):
    with pytest.raises(EvaluationError, match="fewshot is 1, but task 'choice' has 0 examples besides the samples"):
        load_benchmarks(["choice"], Settings(fewshot=1), folder)
    with pytest.raises(EvaluationError, match="fewshot is 9, but task 'answer' has 8 examples"):
        load_benchmarks(["answer"], Settings(fewshot=9), folder)


def test_system_message_template_arguments_and_answer_length_reach_the_model(folder, model, tokenizer):
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ 'thinking ' if thinking else '' }}" + template
    try:
        found = evaluate_model(
            model, tokenizer, "answer", tasks_folder=folder, limit=2, system="Be brief.", max_new_tokens=1,
            template_kwargs={"thinking": True},
        )  # fmt: skip
    finally:
        tokenizer.chat_template = template
    for sample in found.samples["answer"]:
        prompt, arguments = sample["arguments"][0]
        assert prompt.startswith("thinking <|im_start|>system\nBe brief.<|im_end|>")
        assert arguments["max_gen_toks"] == 1 and len(tokenizer(sample["resps"][0][0])["input_ids"]) <= 1


def test_local_tasks_need_no_network_and_no_index_of_the_harness(folder, model, tokenizer, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tasks_module, "_harness_index", lambda: pytest.fail("the index was read"))
    for names in (["choice", "answer", "both"], [str(folder / "answer.yaml")]):
        assert evaluate_model(model, tokenizer, names, tasks_folder=folder, limit=1).suites


def test_programs_run_only_with_consent_which_ends_with_the_call(folder, model, tokenizer, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(EvaluationError, match=r"programs: .*programs that the model wrote.*--execute-code"):
        evaluate_model(model, tokenizer, "programs", tasks_folder=folder)
    found = evaluate_model(model, tokenizer, "programs", tasks_folder=folder, limit=2, execute_code=True)
    assert found.suites[0].tasks[0].score.value == 1.0 and "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    evaluate_model(model, tokenizer, "programs", tasks_folder=folder, limit=2, execute_code=True)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"fewshot": -1}, "fewshot is -1; expected at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": "auto:x"}, "batch_size is 'auto:x'; expected a number, auto, or auto:N"),
        ({"batch_size": "0"}, "batch_size is '0'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(EvaluationError, match=message):
        Settings(**settings)


def test_automatic_batches_on_a_cpu_have_a_fixed_size():
    assert [Settings(batch_size=size).batch_size_on("cpu") for size in ("auto", "auto:4", "3")] == ["8", "8", "3"]
    assert Settings(batch_size="auto:4").batch_size_on("cuda") == "auto:4"


def test_a_missing_data_file_is_told_with_where_it_was_looked_for(tmp_path):
    config = {"task": "gone", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        EvaluationError, match=r"task 'gone' .*reads gone\.jsonl, .*neither in the working folder nor in"
    ):
        load_benchmarks(["gone"], tasks_folder=tmp_path)


def test_broken_data_are_told_with_the_task(tmp_path, folder):
    config = yaml.safe_load((folder / "answer.yaml").read_text())
    (tmp_path / "answer.yaml").write_text(yaml.safe_dump(config))
    for name in ("answers", "examples"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": ')
    with pytest.raises(EvaluationError, match="task 'answer' cannot be loaded"):
        load_benchmarks(["answer"], tasks_folder=tmp_path)


def test_a_broken_yaml_file_is_told_although_the_harness_passes_over_it(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(EvaluationError, match=r"broken\.yaml is not a valid task of the harness"):
        load_benchmarks(["broken"], tasks_folder=tmp_path)
    (tmp_path / "broken.yaml").write_text("include: nowhere.yaml\ntask: broken")
    with pytest.raises(EvaluationError, match=r"broken\.yaml needs .*nowhere\.yaml, which does not exist"):
        load_benchmarks(["broken"], tasks_folder=tmp_path)
    with pytest.raises(EvaluationError, match="names no task"):
        (tmp_path / "broken.yaml").write_text("dataset_path: json")
        load_benchmarks([str(tmp_path / "broken.yaml")])
    with pytest.raises(EvaluationError, match="which does not exist"):
        load_benchmarks(["broken"], tasks_folder=tmp_path / "nowhere")


def test_a_task_twice_is_refused(folder):
    with pytest.raises(EvaluationError, match="task 'first' is in 'both' and in 'first'"):
        load_benchmarks(["both", "first"], tasks_folder=folder)


def test_without_a_template_chat_is_off_and_cannot_be_asked_for(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert not evaluate_model(model, tokenizer, "answer", tasks_folder=folder, limit=1).chat
    with pytest.raises(EvaluationError, match=r"chat is true, but the tokenizer of .*base has no chat template"):
        evaluate_model(model, tokenizer, "answer", tasks_folder=folder, chat=True)


def test_answers_must_leave_room_for_the_prompt(folder, model, tokenizer):
    with pytest.raises(
        EvaluationError, match=r"up to 512 tokens leave no room .* in the 512 tokens of .*answer.*less than"
    ):
        evaluate_model(model, tokenizer, ["choice", "answer"], tasks_folder=folder, max_new_tokens=512)


def test_what_is_not_installed_is_told(monkeypatch, capsys):
    found = tasks_module.find_spec
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None if name == "vllm" else found(name))
    command = ["evaluate", str(INSTRUCT), "--suite", "gsm8k"]
    assert main([*command, "--backend", "vllm"]) == 1
    assert "backend is vllm, which is not installed. Run pip install vllm" in capsys.readouterr().err
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None)
    assert main(command) == 1
    assert "not installed. Run pip install 'shadowlit[eval]'" in capsys.readouterr().err


def test_vllm_gets_model_adapter_and_settings(tmp_path, monkeypatch):
    import lm_eval.api.registry

    (tmp_path / "adapter_config.json").write_text('{"r": 64}')
    monkeypatch.setattr(lm_eval.api.registry, "get_model", lambda name: lambda **given: {"name": name, **given})
    settings = Settings(seed=3, template_kwargs={"enable_thinking": False})
    assert vllm_model(Path("m"), tmp_path, "bfloat16", settings) == {
        "name": "vllm", "pretrained": "m", "dtype": "bfloat16", "batch_size": "auto", "seed": 3,
        "chat_template_args": {"enable_thinking": False}, "lora_local_path": str(tmp_path), "max_lora_rank": 64,
    }  # fmt: skip
    source = Path(lm_eval.__file__).with_name("models") / "vllm_causallms.py"  # which imports vllm
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
    (vllm,) = [node for node in classes if node.name == "VLLM"]
    init = next(node for node in vllm.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert {"pretrained", "dtype", "batch_size", "seed", "chat_template_args", "lora_local_path", "max_lora_rank"} <= {
        argument.arg for argument in init.args.args
    }


def test_the_command_compares_models_and_leaves_everything(tmp_path, folder):
    """Once as a user runs it, without network; everything else in this process."""
    args = [
        "evaluate", "--model", str(BASE), str(INSTRUCT), "--suite", "choice", "answer", "--tasks-folder", str(folder),
        "--chat", "false", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    shown = run_command(tmp_path, *args)
    assert shown.returncode == 0, shown.stderr
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    rows = {
        letter: [json.loads(line) for line in (out / f"samples/{letter}/choice.jsonl").read_text().splitlines()]
        for letter in "AB"
    }
    right = {letter: np.array([row["acc"] for row in rows[letter]]) for letter in "AB"}
    d = right["B"] - right["A"]
    expected = [f"{np.mean(x):.4f} ± {np.std(x, ddof=1) / math.sqrt(len(x)):.4f}" for x in (right["A"], right["B"], d)]
    expected[2] = ("+" if d.mean() >= 0 else "") + expected[2].replace("-", "−")
    line = next(line for line in shown.stdout.splitlines() if line.startswith("choice"))
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == ["choice", "acc", "0", "20", *expected]
    assert f"| choice | acc | 0 | 20 | {' | '.join(expected)} |" in (out / "report.md").read_text()
    assert f"B = {INSTRUCT} (no chat template)" in shown.stdout and "INFO" not in shown.stderr
    scores = results["models"]["B"]["suites"][0]["tasks"]
    assert scores[0]["score"]["value"] == pytest.approx(right["B"].mean())
    assert len(results["models"]["B"]["source"]["fingerprint"]) == 64
    assert results["versions"]["lm_eval"] == "0.4.13" and results["config"]["suite"] == ["choice", "answer"]
    assert set(results["models"]["A"]["harness"]["results"]) == {"choice", "answer"}


def test_the_command_puts_an_adapter_on_the_last_model(tmp_path, folder, capsys):
    """The vocabulary is larger than the tokenizer: the harness' own way would cut the embeddings and move scores."""
    plain = save_model(tmp_path / "plain")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(plain), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    command = [
        "evaluate", str(plain), str(plain), "--adapter", str(tmp_path / "adapter"), "--suite=choice", "--limit=4",
        "--tasks_folder", str(folder), "--device=cpu", "--out", str(tmp_path / "out"), "--chat=false",
    ]  # fmt: skip
    assert main(command) == 0
    assert f"B = {plain} + {tmp_path / 'adapter'}" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "adapter")
    models = {"A": AutoModelForCausalLM.from_pretrained(plain), "B": tuned.merge_and_unload()}
    for letter, reference in models.items():
        rows = map(json.loads, (tmp_path / f"out/samples/{letter}/choice.jsonl").read_text().splitlines())
        for row, data in zip(rows, choice_rows(), strict=False):
            for answer, choice in zip(row["filtered_resps"], data["choices"], strict=True):
                expected = log_likelihood(reference.eval(), tokenizer, data["question"], f" {choice}")
                assert float(answer[0]) == pytest.approx(expected, abs=2e-3)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["models"]["B"]["adapter"]["sha256"]) == 64 and "adapter" not in results["models"]["A"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "answer", "--out", "FULL"], "which exists already"),
        (["--suite", "answer", "--device", "gpu"], "device is 'gpu'; expected auto, all, cpu"),
        (["--suite", "answer", "--adapter", "FULL"], "adapter_config.json"),
        (["--suite", ","], "no suite was given"),
        (["--suite", "answer", "--limit", "0"], "limit is 0"),
        (["--suite", "programs"], "--execute-code"),
        (["--suite", "answer", "--max-new-tokens", "600"], "leave no room"),
    ],
)
def test_the_command_refuses_before_it_loads_a_model(options, message, tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    options = [option.replace("FULL", str(tmp_path)) for option in options]
    assert main(["evaluate", str(INSTRUCT), "--tasks-folder", str(folder), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [("no/such/folder", "not a folder"), ("EMPTY", "there is no"), ("org/none", "the hub does not give")],
)
def test_the_command_tells_a_model_that_is_not_there(model, message, tmp_path, folder, capsys):
    model = model.replace("EMPTY", str(tmp_path))
    assert main(["evaluate", str(INSTRUCT), model, "--suite", "answer", "--tasks-folder", str(folder)]) == 1
    assert message in capsys.readouterr().err


def test_help_imports_neither_torch_nor_the_harness():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "shadowlit", "evaluate", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--execute_code" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "shadowlit.harness.tasks" in imported  # the command's module is there
    assert not imported & {"torch", "lm_eval", "transformers", "datasets"}


def test_an_option_that_is_a_list_takes_all_words_after_it():
    from shadowlit.cli.evaluate import evaluate

    assert spell_out(evaluate, ["--model", "a", "b", "--suite=x", "--limit", "3", "--execute-code"]) == [
        '--model=["a", "b"]', '--suite=["x"]', "--limit", "3", "--execute_code=true",
    ]  # fmt: skip
    assert spell_out(evaluate, ["a", "b", "--suite", '["x", "y"]']) == ['--model=["a", "b"]', '--suite=["x", "y"]']


def test_perturbed_copies_are_scored_next_to_the_rows_as_they_are(tmp_path, folder, capsys, monkeypatch):
    """Through the command: only the rows that could be perturbed are in the copy, under their own numbers."""
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"question": f"{row['question']} Nina asks." if i % 3 else row["question"], "answer": row["answer"]}
            for i, row in enumerate(ROWS[:9])]  # fmt: skip
    write_rows(tmp_path / "own.jsonl", rows)
    task = yaml.safe_load((folder / "answer.yaml").read_text())
    task |= {"task": "own", "dataset_kwargs": {"data_files": {"test": "own.jsonl"}}}
    task.pop("fewshot_split")
    task.pop("tag")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    out = tmp_path / "out"
    words = ["--suite", "own", f"--tasks_folder={tmp_path}", "--perturb", "names", "numbers", "distractors"]
    assert main(["evaluate", str(INSTRUCT), *words, f"--out={out}", "--device=cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "own names A 6 of 9" in shown and "own numbers A 0 of 9 – – –" in shown and "own distractors A 9 of 9" in shown
    )
    found = json.loads((out / "results.json").read_text())
    names, numbers, _ = found["perturbed"]
    assert (names["num_rows"], names["num_perturbed"], numbers["models"]["A"]) == (9, 6, None)
    scores = {
        name: {s["doc_id"]: s["exact_match"] for s in map(json.loads, (out / f"samples/A/{name}.jsonl").open())}
        for name in ("own", "own_names", "own_distractors")
    }
    stored = [json.loads(line) for line in (out / "perturbed/own_names.jsonl").open()]
    assert [row["index"] for row in stored] == [1, 2, 4, 5, 7, 8] and stored[0]["original"] == rows[1]
    assert "Nina" not in stored[0]["perturbed"]["question"]
    before = [scores["own"][i] for i in (1, 2, 4, 5, 7, 8)]
    after = [scores["own_names"][i] for i in range(6)]
    assert names["models"]["A"]["before"] == pytest.approx(sum(before) / 6)
    assert names["models"]["A"]["difference"]["value"] == pytest.approx((sum(after) - sum(before)) / 6)
    assert len(scores["own_distractors"]) == 9 and "| own | names | A | 6 of 9 |" in (out / "report.md").read_text()


def test_what_cannot_be_perturbed_is_told_before_a_model_is_loaded(folder):
    with pytest.raises(EvaluationError, match="perturb has 'letters'; expected one or more of names, numbers, words"):
        Settings(perturb=("letters",))
    with pytest.raises(EvaluationError, match="perturb works on single tasks, and both is a group"):
        load_benchmarks(["both"], Settings(perturb=("names",)), folder)
    with pytest.raises(EvaluationError, match=r"has the columns .*, none of which .*\(text is none\)"):
        load_benchmarks(["first"], Settings(perturb=("names",), perturb_field="text"), folder)
