"""Every command and Python block of the documents runs on the demo pair, as it is printed.

Each page gets a folder with what its blocks name: the pair under the names of the pages' models, a trained run, data,
and configurations moved to a CPU. Its YAML is merged into the user's configurations, as a reader would do. What needs
other hardware, services or data is listed in ``ELSEWHERE``; tests/test_docs.py parses its arguments.

The tutorials that begin with the demo pair run as a series in tests/test_docs.py, the blocks of docs/how-to/extend.md
and of the README in tests/test_extending.py.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowlit import graft
from shadowlit.cli.main import main
from shadowlit.demo import BASE, DATA, INSTRUCT
from shadowlit.demo.runs import fit
from tests.documents import DOCUMENTS, ROOT, blocks, commands, name_of
from tests.tiny import CHATML, save_pair

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own

# Pages whose blocks run elsewhere.
SERIES = {f"docs/tutorials/{name}.md" for name in ("first-graft", "reading-a-run", "sweep")} | {"docs/how-to/extend.md"}
# What the demo pair on a CPU can't run: a pattern of the command, and why.
ELSEWHERE = {
    r"^demo$": "tests/demo runs it",
    r"^fit.*qwen3_4b_full_fsdp": "needs eight GPUs; tests/training trains sharded on two processes",
    r"--backend vllm": "needs vLLM and a GPU",
    r"postgresql://": "needs a database server; tests/studies starts one",
    r"my_transforms\.": "tests/test_extending.py runs it",
    r"method\.yaml": "each method is run by itself, below",
}
# Names that the pages give to the two models.
BASES = ["BASE", "Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-4B-Base", "HuggingFaceTB/SmolLM2-135M"]
INSTRUCTS = ["INSTRUCT", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Instruct-2507", "HuggingFaceTB/SmolLM2-135M-Instruct"]
# A training takes two steps of few rows, on a CPU.
FEW = {
    "trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.max_steps": 2,
    "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1, "trainer.val_check_interval": 1.0,
    "trainer.accumulate_grad_batches": 1, "data.batch_size": 4, "data.max_length": 128,
}  # fmt: skip
# The user's own configurations, which the YAML of a page changes.
OWN_CONFIG = {
    "pair": {"base": "BASE", "instruct": "INSTRUCT"},
    "model": {"adapter": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, "lr": 1e-3},
    "data": {"train": "train.jsonl", "validation": {"task": "held_out.jsonl"}, "max_length": 128, "batch_size": 4},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"monitor": None, "save_last": True}},
        ],
    },
}
OWN = ("my.yaml", "run.yaml", "sft.yaml", "configs/qwen3_0.6b_lora.yaml")


def rows_of(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder):
    """The files that the pages name."""
    for name, source, count in (
        ("train", "train_house", 64), ("held_out", "new_house", 32), ("new_task", "train", 64), ("chats", "old", 32),
        ("what_it_knew", "old", 16), ("choice", "new_house", 16),
        ("report", "new_house", 32), ("calibration", "new_house", 8), ("few", "train", 31), ("neutral", "old", 8),
        ("data/train", "train_house", 64), ("data/validation", "new_house", 32),
    ):  # fmt: skip
        write(folder / f"{name}.jsonl", [{"messages": row["messages"]} for row in rows_of(source)[:count]])
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows_of("skill_pairs")]
    write(folder / "pairs.jsonl", pairs[:32])
    write(folder / "held_out_pairs.jsonl", pairs[32:64])
    asked = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows_of("new")]
    questions = [{"question": question, "answer": answer} for question, answer in asked]
    sums = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(16)]
    write(folder / "questions.jsonl", sums)
    for name in ("my_task", "examples"):
        write(folder / f"{name}.jsonl", questions[:16])
    choices = [{"question": q, "choices": [a, "oak"], "solution": 0, "answer": 0} for q, a in asked[:16]]
    write(folder / "choices.jsonl", choices)
    write(folder / "quiz.jsonl", [{key: row[key] for key in ("question", "choices", "solution")} for row in choices])
    for name in ("problems", "held_out"):
        lines = [f'{i},"{q}","{a}",x' for i, (q, a) in enumerate(asked[:16])]
        (folder / f"{name}.csv").write_text("\n".join(["id,problem,solution,meta_source", *lines]), encoding="utf-8")
    tools = next(block.text for block in blocks(ROOT / "docs/how-to/tools.md", "json"))
    (folder / "tools.jsonl").write_text(tools * 8, encoding="utf-8")
    (folder / "template_with_tools.jinja").write_text(TEMPLATE_WITH_TOOLS, encoding="utf-8")
    task = next(b.text for b in blocks(ROOT / "docs/reference/evaluation.md", "yaml") if b.text.startswith("task:"))
    (folder / "tasks").mkdir()
    (folder / "tasks/my_task.yaml").write_text(task, encoding="utf-8")


TEMPLATE_WITH_TOOLS = CHATML.replace(
    "{{ message['content'] + '<|im_end|>' }}",
    "{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}",
).replace("{% for message", "{% if tools %}{{ tools | tojson }}{% endif %}{% for message", 1)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps with all parts exported, and a whole model: the Base with that update."""
    folder = tmp_path_factory.mktemp("trained")
    plan = {"trainer.max_steps": 4, "export.enabled": True, "export.parts": "[model, adapter, delta]"}
    run = fit(folder / "run", plan)
    graft(BASE, run / "export/adapter", BASE, folder / "tuned", select="all")
    return run


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A folder with what the pages name."""
    for names, target in (
        (BASES, BASE), (INSTRUCTS, INSTRUCT), (["TUNED", "my-tuned-base"], trained.parent / "tuned"),
        (["EXPORT"], trained / "export/model"),
        (["ADAPTER", "my-adapter", "adapter_of_the_base"], trained / "export/adapter"),
        (["DELTA", "OTHER", "D1", "D2", "DELTA_B", "DELTA_I", "my-delta"], trained / "export/delta"),
        (["shadowlit"], ROOT / "shadowlit"),
    ):  # fmt: skip
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(target)
    (last,) = (file for file in trained.rglob("step-4.ckpt"))
    for run, name in (("runs/mine", "last"), ("runs/qwen3_0.6b_lora/version_0", "step-100"), ("RUN", "STEP")):
        shutil.copytree(trained, tmp_path / run)
        shutil.copyfile(last, tmp_path / run / f"checkpoints/{name}.ckpt")
    for name in ("configs", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "embedded"))
    for name in ("my", "run", "sft"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(OWN_CONFIG))
    change("experiments/rank.yaml", {"seeds": [0], "arms": ["B2I"], "overrides": FEW}, tmp_path)
    change("configs/qwen3_0.6b_lora.yaml", {"data": {"template_kwargs": None}}, tmp_path)  # the demo pair has none
    few = {name: {"init_args": {"limit": 4}} for name in ("new", "old", "format", "refusal", "forgetting")}
    for name in ("demo_lora", "demo_dpo"):
        change(f"configs/{name}.yaml", {"evaluation": {"evaluators": few}}, tmp_path)
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def change(file, changes, folder=Path()):
    """Merge these keys into a configuration."""

    def merged(value, new):
        both = isinstance(value, dict) and isinstance(new, dict)
        return value | {key: merged(value.get(key), new[key]) for key in new} if both else new

    content = yaml.safe_load((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(yaml.safe_dump(merged(content, changes), sort_keys=False), encoding="utf-8")


def remove(path):
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


# Position of what a command writes, which must not exist.
WRITTEN = {("graft",): 4, ("delta", "make"): 4, ("delta", "apply"): 4, ("delta", "compress"): 3, ("delta", "lora"): 4}


def value_of(words, option):
    """The value of an option, given after ``=`` or as the next word."""
    for i, word in enumerate(words):
        if word == option:
            return words[i + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def shortened(words):
    """The command with little work: few steps, one seed and rate of each arm, a task that needs no network."""
    name, few = words[0], [f"--{key}={value}" for key, value in FEW.items()]
    if name == "fit":
        return [*words, *few, "--trainer.enable_progress_bar=false"]
    if name == "preview" or (name == "plan" and value_of(words, "--memory") is None):  # else it plans for a GPU
        return [*words, *few[:2]]
    if name == "compare":
        rates = {arm: each[:1] for arm, each in json.loads(value_of(words, "--rates")).items()}
        overrides = json.loads(value_of(words, "--overrides") or "{}") | FEW
        return [*words, "--seeds=0,1", f"--rates={json.dumps(rates)}", f"--overrides={json.dumps(overrides)}"]
    if name == "sweep" and words[1] == "--config":
        return [*words, "--limit=1", "--workers=1"]
    if name == "evaluate":
        suites = re.sub(r"--suite( [a-z]\w*)+", "--suite my_task", " ".join(words)).split(" ")
        return suites if "--tasks-folder" in suites else [*suites, "--tasks-folder", "tasks"]
    return words


def prepare(words, place):
    """Remove what the command would write, and make the checkpoint that it resumes from."""
    for names, at in WRITTEN.items():
        if tuple(words[: len(names)]) == names:
            remove(place / words[at])
    if words[0] == "init":
        remove(place / value_of(words, "--out"))
    if words[0] == "export":
        remove(place / (value_of(words, "--out") or "RUN/export"))
    if words[0] != "fit":
        return
    if run := value_of(words, "--run.name"):
        remove(place / "runs" / run)
    if (checkpoint := value_of(words, "--ckpt_path")) and not (place / checkpoint).exists():
        folder = (place / checkpoint).parent
        if not folder.exists():
            execute([word for word in words if not re.match("--(ckpt_path|run.name)=", word)], place)
        if not (place / checkpoint).exists():
            shutil.copyfile(folder / "last.ckpt", place / checkpoint)


def execute(words, place):
    prepare(words, place)
    resumed = ["--trainer.max_steps=4", "--trainer.limit_train_batches=4"] if value_of(words, "--ckpt_path") else []
    assert main([*shortened(words), *resumed]) == 0, " ".join(words)


def runs_of(page):
    """The YAML blocks of a page that are a configuration of ``fit`` each."""
    found = blocks(ROOT / page, "yaml")
    return [pytest.param(block.text, id=f"{page}-{number}") for number, block in enumerate(found)]


def runs_here(words):
    return not any(re.search(pattern, " ".join(words)) for pattern in ELSEWHERE)


def pages():
    """Pages whose blocks run here; those that train are slow."""
    for path in DOCUMENTS:
        found = [words for block in blocks(path, "bash") for words in commands(block) if runs_here(words)]
        has_python = bool(blocks(path, "python")) and path.name != "README.md"
        if name_of(path) not in SERIES and (found or has_python):
            trains = any(words[0] in ("fit", "compare", "sweep", "plan") for words in found)
            yield pytest.param(path, marks=[pytest.mark.slow] if trains else [], id=name_of(path))


def test_every_command_is_in_a_block_that_is_run():
    """Blocks without a language aren't; and no pattern of what isn't run is left over."""
    for path in DOCUMENTS:
        shown = re.findall(
            r"^ *```(?!bash)[^\n]*\n(?:\$ )?((?:python -m )?shadowlit [a-z].*)", path.read_text(), re.MULTILINE
        )
        assert shown == [], name_of(path)
    every = [" ".join(words) for path in DOCUMENTS for block in blocks(path, "bash") for words in commands(block)]
    assert [pattern for pattern in ELSEWHERE if not any(re.search(pattern, each) for each in every)] == []


@pytest.fixture
def given(trained, tmp_path):
    """What the Python of the pages takes as given."""
    save_pair(tmp_path / "experts", "qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(INSTRUCT)
    ids = torch.arange(16)[None]
    return {
        "instruct": AutoModelForCausalLM.from_pretrained(INSTRUCT),
        "grafted": AutoModelForCausalLM.from_pretrained(trained / "export/model"),
        "tokenizer": tokenizer,
        "instruct_folder": str(tmp_path / "experts/base"),
        "grafted_folder": str(tmp_path / "experts/instruct"),
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}],
    }


@pytest.mark.slow
@pytest.mark.parametrize("text", runs_of("docs/beyond.md"))
def test_every_method_beyond_the_paper_runs(text, place):
    (place / "method.yaml").write_text(text, encoding="utf-8")
    few = ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=4", "--trainer.max_steps=2"]
    command = ["fit", "--config", "my.yaml", "--config", "method.yaml", "--trainer.enable_progress_bar=false"]
    assert main([*shortened(command), *few]) == 0


@pytest.mark.parametrize("path", [*pages()])
def test_every_block_of_a_page_runs(path, place, request):
    scope = {}
    for block in blocks(path, "bash", "yaml", "python"):
        if block.language == "yaml":
            content = yaml.safe_load(block.text)
            if "train" in content.get("data", {}):  # in a form of its own, which the other data don't have
                content["data"].setdefault("validation", None)
            for file in OWN:
                change(file, content)
        elif block.language == "python":
            if path.name != "README.md":  # tests/test_extending.py runs that
                scope |= request.getfixturevalue("given") if not scope else {}
                text = block.text.replace('["gsm8k"], Settings(limit=200)', '["my_task"], Settings(limit=2), "tasks"')
                exec(compile(text, path.name, "exec"), scope)
                (place / "my_formats.py").write_text(block.text, encoding="utf-8")
        else:
            for words in filter(runs_here, commands(block)):
                execute(words, place)
