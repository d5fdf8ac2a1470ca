"""Context distillation: a step against whole logits in float64 of texts that are put together by hand."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowlit.data.collate import Collate
from shadowlit.data.context_batches import ContextCollate
from shadowlit.data.module import ShadowData
from shadowlit.data.packing import PackedOrder
from shadowlit.data.preview import preview
from shadowlit.data.sampler import FILLER
from shadowlit.errors import DataError, ShadowlitError
from shadowlit.lightning_cli import main
from shadowlit.pair.pair import ModelPair
from shadowlit.training import linear_loss
from shadowlit.training.objectives import SFT, ContextDistillation
from tests.distributed import run_ranks
from tests.rounding import Start, require_same_update
from tests.tiny import save_pair
from tests.training.test_token_objectives import Recording, fit, make, parameters

ROOT = Path(__file__).parents[2]
SYSTEM, USER, ASSISTANT = ("<|im_start|>" + role + "\n{}<|im_end|>\n" for role in ("system", "user", "assistant"))
OPEN = "<|im_start|>assistant\n"
# Row, what the teacher sees before the answer, what the student sees, the answer, its weight.
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}]
CASES = [
    ({"prompt": "1?", "completion": "ab", "teacher_context": "Be terse."},
     SYSTEM.format("Be terse.") + USER.format("1?"), USER.format("1?"), "ab", 1.0),
    ({"prompt": "2?", "completion": "c", "system": "S", "teacher_context": "Know this."},
     SYSTEM.format("Know this.\n\nS") + USER.format("2?"), SYSTEM.format("S") + USER.format("2?"), "c", 1.0),
    ({"prompt": "3?", "completion": "defgh", "teacher_context": TURNS, "system": "S"},
     SYSTEM.format("S") + USER.format("q") + ASSISTANT.format("z") + USER.format("3?"),
     SYSTEM.format("S") + USER.format("3?"), "defgh", 1.0),
    ({"prompt": "4?", "completion": [{"role": "assistant", "content": "ij", "weight": 0.5}], "teacher_context": "W."},
     SYSTEM.format("W.") + USER.format("4?"), USER.format("4?"), "ij", 0.5),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row, *_ in CASES))
    return save_pair(folder, "qwen3", dtype=torch.bfloat16)


def rows(folders, name="rows.jsonl", **options):
    options = {"train": str(folders[0].parent / name), "max_length": 128, "num_workers": 0, **options}
    return ShadowData(ModelPair(*map(str, folders)), samples="contexts", **{"cache": False, **options})


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("full", lambda: ContextDistillation()),
        ("full", lambda: ContextDistillation("reverse", "instruct")),
        ("lora", lambda: ContextDistillation("both", cross_entropy_weight=0.5)),
        ("lora", lambda: ContextDistillation("forward", "instruct")),
    ],
)
def test_a_step_is_that_of_whole_logits(folders, kind, objective, monkeypatch):
    """The second step, in two micro-batches and small chunks."""
    monkeypatch.setattr(linear_loss, "_CHUNK_ELEMENTS", {"cpu": 1})
    objective = objective()
    module = make(folders, objective, kind, Recording)
    logged = fit(module, rows(folders, batch_size=2), accumulate_grad_batches=2)
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    student, base, instruct = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (folders[0], *folders)
    )
    if kind == "lora":
        student = get_peft_model(student, LoraConfig(r=4, bias="all", target_modules=module.adapter.target_modules))
    student.load_state_dict({name: p.double() for name, p in module.before.items()}, strict=False)
    teacher = {"start": base, "instruct": instruct}[objective.kl_to]

    def predicted(model, prompt, answer):
        """Log-probabilities ``[n, V]`` at the answer's tokens, and these."""
        ids = tokenizer(prompt + OPEN + answer, add_special_tokens=False, return_tensors="pt").input_ids
        count = len(tokenizer(answer, add_special_tokens=False).input_ids)
        return model(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1), ids[0, -count:]

    total, distance, divisor = 0.0, 0.0, 0.0
    for _, seen, unseen, answer, weight in CASES:
        with torch.no_grad():
            r, theirs = predicted(teacher, seen, answer + "<|im_end|>")
        p, targets = predicted(student, unseen, answer + "<|im_end|>")
        assert torch.equal(theirs, targets)
        forward, reverse = (r.exp() * (r - p)).sum(), (p.exp() * (p - r)).sum()
        kl = {"forward": forward, "reverse": reverse, "both": (forward + reverse) / 2}[objective.kl]
        total = total + weight * (kl + objective.cross_entropy_weight * F.nll_loss(p, targets, reduction="sum"))
        distance, divisor = distance + weight * kl.item(), divisor + weight * len(targets)
    (total / divisor).backward()
    assert logged["train/loss"] == pytest.approx(total.item() / divisor, abs=1e-6)
    assert logged["train/kl"] == pytest.approx(distance / divisor, abs=1e-6)
    assert distance / divisor > 1e-3  # more than rounding
    gradients = dict(student.named_parameters())
    for name, gradient in module.gradients.items():
        expected = gradients[name].grad
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=5e-5 * expected.abs().max().item())


def spread(folders, kind="lora", strategy="auto", world_size=1, accumulate=1, **options):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    module, start = make(folders, ContextDistillation(kl_to="instruct", cross_entropy_weight=0.5), kind), Start()
    data = rows(folders, **{"batch_size": 4 // accumulate // world_size, **options})
    logged = fit(module, data, None, [start], strategy, world_size, accumulate_grad_batches=accumulate)
    return logged, parameters(module), start.weights


@pytest.mark.parametrize("options", [
    {"accumulate": 4},
    {"packing": "padding_free"},
    {"packing": "padding_free", "accumulate": 2},
    {"packing": "best_fit", "pack_length": 256, "batch_size": 4},
], ids=str)  # fmt: skip
def test_accumulated_and_packed_are_the_whole_batch(folders, options):
    expected, weights, _ = spread(folders)
    logged, found, start = spread(folders, **options)
    assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)
    require_same_update(found, weights, start)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_are_one(folders, strategy):
    (one,) = run_ranks(spread, 1, folders)
    for logged, weights, _ in run_ranks(spread, 2, folders, "lora", strategy, 2):
        assert logged == pytest.approx(one[0], rel=1e-4, abs=1e-6)
        require_same_update(weights, one[1], one[2])


# -- data ---------------------------------------------------------------------------------------------------------


def test_samples_have_both_views_and_packs_have_room_for_either(folders):
    data = rows(folders)
    data.setup("fit")
    dataset, tokenizer = data.dataset("train"), data.tokenizer
    for sample, (_, seen, unseen, answer, _weight) in zip(dataset, CASES, strict=False):
        for view, prompt in ((sample, unseen), (sample["teacher"], seen)):
            assert tokenizer.decode(view["input_ids"]).rstrip("\n") == prompt + OPEN + answer + "<|im_end|>"
            assert tokenizer.decode([t for t in view["labels"] if t != -100]) == answer + "<|im_end|>"
    assert dataset.lengths.tolist() == [len(dataset[i]["teacher"]["input_ids"]) for i in range(4)]
    assert data.reports["train"].num_tokens == dataset.lengths.sum()
    batch = ContextCollate(Collate(0))([dataset[1], dataset[FILLER]])  # of a rank that has run out of samples
    for view in ("", "teacher_"):
        sample = dataset[1]["teacher"] if view else dataset[1]
        assert batch[f"{view}attention_mask"].sum(1).tolist() == [len(sample["input_ids"]), 2]
        assert ((batch[f"{view}labels"] != -100).sum(1)).tolist() == [2, 0]
    packs = PackedOrder(dataset.lengths, 140)(0)
    assert packs.sizes(dataset.lengths).max() <= 140
    assert packs.sizes(np.array([len(dataset[i]["input_ids"]) for i in range(4)])).max() <= 140


def test_a_column_of_another_name_and_a_function(folders):
    """``docs`` is read as the context; and a function of one's own returns both."""
    file = folders[0].parent / "named.jsonl"
    file.write_text(json.dumps({"prompt": "1?", "completion": "ab", "docs": "Be terse."}) + "\n")
    expected = rows(folders)
    found = [rows(folders, "named.jsonl", columns={"teacher_context": "docs"})]
    found.append(rows(folders, "named.jsonl", format="tests.training.test_context_distillation.read"))
    for data in (expected, *found):
        data.setup("fit")
        assert data.dataset("train")[0] == expected.dataset("train")[0]


def read(row):
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return turns, row["docs"]


def test_preview_shows_both_views(folders):
    console = Console(file=io.StringIO(), width=200)
    preview(rows(folders), num_samples=1, console=console)
    text = console.file.getvalue()
    assert text.index("rows.jsonl (line 1), student: 25 tokens, 3 supervised") < text.index(
        "rows.jsonl (line 1), teacher: 44 tokens, 3 supervised"
    )
    assert text.count("⟦ab<|im_end|>⟧") == 2
    assert text.count("Be terse.") == 1


def test_the_system_text_of_all_rows_follows_the_context(folders):
    data = rows(folders, system="Always.")
    data.setup("fit")
    text = data.tokenizer.decode(data.dataset("train")[0]["teacher"]["input_ids"])
    assert text.startswith(SYSTEM.format("Be terse.\n\nAlways."))


def test_other_sets_are_the_student_s_view(folders, tmp_path):
    """Validation rows may have the column or not; the cache keeps both kinds apart."""
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "1?", "completion": "ab"}) + "\n")
    file = str(folders[0].parent / "rows.jsonl")
    for _ in range(2):
        sets = {"same": file, "plain": str(tmp_path / "plain.jsonl")}
        data = rows(folders, validation=sets, cache=True, cache_dir=str(tmp_path / "cache"))
        with pytest.warns(UserWarning, match="the training data contain 4 of the 4 samples of val/same"):
            data.setup("fit")
        assert data.dataset("val/same")[0] == data.dataset("val/plain")[0]
        student = data.dataset("train")[0]
        assert data.dataset("val/same")[0] == {name: student[name] for name in ("input_ids", "labels")}


AFTER_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'].upper() if messages[0]['role'] == 'system' else message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("row", "options", "message"), [
    ({}, {}, r"sample 1 of .* has nothing in 'teacher_context', which model.objective shows to the teacher alone"),
    ({"teacher_context": ""}, {}, r"sample 1 of .* has nothing in 'teacher_context'"),
    ({"teacher_context": 3}, {}, r"has 3 \(int\) in 'teacher_context'; expected a text or a list of messages"),
    ({"teacher_context": "x" * 120}, {}, r"has 1\d\d tokens with its 'teacher_context'.*Raise data.max_length=128"),
    ({"teacher_context": "x" * 120}, {"overlong": "drop"}, None),
    ({}, {"on_bad_row": "skip"}, None),
    ({}, {"streaming": True}, r"data.streaming is true, but model.objective needs the contexts"),
    ({}, {"loss_on": "all"}, r"data.loss_on is all, but the teacher of model.objective sees a context"),
])  # fmt: skip
def test_rows_without_a_context_and_settings_that_do_not_fit(folders, tmp_path, row, options, message):
    rest = {"prompt": "1?", "completion": "ab"}
    lines = [{**rest, "teacher_context": "C."}, {**rest, **row}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if message is None:
        data = rows(folders, train=str(tmp_path / "rows.jsonl"), **options)
        data.setup("fit")
        assert len(data.dataset("train")) == 1
        return
    with pytest.raises(DataError, match=message):
        rows(folders, train=str(tmp_path / "rows.jsonl"), **options).setup("fit")


def test_answers_that_a_context_changes_are_refused(folders, tmp_path):
    (tmp_path / "template.jinja").write_text(AFTER_SYSTEM)
    lines = ({"prompt": "1?", "completion": "ab", "teacher_context": "3"}, {"text": "d", "teacher_context": "3"})
    for line, message in zip(
        lines, ("has other supervised tokens with 'teacher_context'", "is plain text"), strict=True
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
        data = rows(folders, train=str(tmp_path / "rows.jsonl"), chat_template=str(tmp_path / "template.jinja"))
        with pytest.raises(DataError, match=message):
            data.setup("fit")


def test_an_objective_without_a_teacher_and_a_weight_out_of_range(folders):
    with pytest.raises(ShadowlitError, match=r"SFT, which needs conversations, but the data module gives contexts"):
        fit(make(folders, SFT()), rows(folders))
    with pytest.raises(ShadowlitError, match=r"cross_entropy_weight is -1; expected a number of at least 0"):
        ContextDistillation(cross_entropy_weight=-1)


def test_the_documented_example(tmp_path):
    """The row and the objective of the page, by the command line."""
    page = (ROOT / "docs/reference/objectives.md").read_text(encoding="utf-8").split("## Context distillation")[1]
    row, settings = re.search(r"```json\n(.*?)```\n\n```yaml\n(.*?)```", page, re.DOTALL).groups()
    base, instruct = save_pair(tmp_path, "qwen3")
    (tmp_path / "rows.jsonl").write_text(4 * row)
    (tmp_path / "run.yaml").write_text(settings + "  lr: 3.0e-4\n  warmup_ratio: 0\n")
    main([
        "fit", f"--config={tmp_path}/run.yaml", f"--pair.base={base}", f"--pair.instruct={instruct}",
        f"--data.train={tmp_path}/rows.jsonl", "--data.cache=false", "--data.batch_size=4",
        f"--run.root={tmp_path}/runs", "--trainer.max_steps=20", "--trainer.accelerator=cpu", "--trainer.devices=1",
        "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
        "--export.enabled=false",
    ])  # fmt: skip
    (file,) = (tmp_path / "runs").rglob("metrics.csv")
    with file.open(newline="") as table:
        losses = [float(one["train/loss"]) for one in csv.DictReader(table) if one["train/loss"]]
    assert len(losses) == 20
    assert losses[-1] < 0.1 * losses[0]
