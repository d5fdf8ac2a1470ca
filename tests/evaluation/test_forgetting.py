"""The divergence from the Instruct: by hand, against torch in float64, and between two models as they are loaded."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowlit.data.template import encode_turns
from shadowlit.errors import DataError
from shadowlit.evaluation import forgetting
from shadowlit.evaluation.forgetting import Divergence, divergence
from shadowlit.pair.pair import ModelPair
from tests.data import templates
from tests.evaluation.contexts import DEMO, DEMO_PAIR, evaluate, make_context, write_rows
from tests.tiny import make_tokenizer, save_pair


@contextmanager
def swapped(model, other):
    """Let the weights of ``other`` stand in ``model``."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(other.state_dict())
    yield
    model.load_state_dict(own)


def test_by_hand():
    """p = (1/2, 1/2), r = (3/4, 1/4): ½ log(2/3) + ½ log 2 = ½ log(4/3)."""
    kl, same = divergence(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())
    assert kl.item() == pytest.approx(0.5 * math.log(4 / 3), rel=2**-20)
    assert same.tolist() == [True]  # the first of equals
    kl, same = divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert not same.item() and kl.item() == pytest.approx((math.e - 1) / (math.e + 1), rel=2**-20)


def test_against_torch_in_float64_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(forgetting, "_CHUNK", 3)
    p, r = torch.randn(8, 50), torch.randn(8, 50)
    kl, same = divergence(p, r)
    log_p, log_r = p.double().log_softmax(-1), r.double().log_softmax(-1)
    reference = torch.nn.functional.kl_div(log_r, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl, reference, rtol=1e-5, atol=1e-6)
    assert same.tolist() == (p.argmax(-1) == r.argmax(-1)).tolist()
    assert [len(part) for part in divergence(p[:0], r[:0])] == [0, 0]


def test_a_token_that_cannot_come_adds_nothing_and_a_nan_stays():
    p, r = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[3.0, 1.0, 0.0]]).log()
    assert divergence(p, r)[0].item() == pytest.approx(0.5 * math.log(4 / 3), rel=2**-20)
    assert divergence(torch.zeros(1, 3), r)[0].item() == math.inf
    assert divergence(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2))[0].isnan().all()


def test_between_two_models(tmp_path):
    """The Base against the Instruct of the embedded pair, batched and padded, as row by row in float64."""
    file = str(DEMO / "data/old.jsonl")
    base, instruct = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in DEMO_PAIR)
    context = make_context(DEMO_PAIR, base)

    context = replace(context, reference=lambda: swapped(base, instruct))
    found = evaluate(Divergence(file, limit=9, batch_size=4), context)
    tokenizer = context.pair.tokenizer()
    total, agreeing, count = 0.0, 0, 0
    lines = (DEMO / "data/old.jsonl").read_text().splitlines()
    by_row = []
    for row in (lines[i * len(lines) // 9] for i in range(9)):
        messages = json.loads(row)["messages"]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]])
        prompt = len(
            tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
        )
        with torch.no_grad():
            p, r = (m(input_ids=ids).logits[0, prompt - 1 : -2].double().log_softmax(-1) for m in (base, instruct))
        kl = (p.exp() * (p - r)).sum(-1)
        total, count = total + kl.sum().item(), count + len(kl)
        agreeing += int((p.argmax(-1) == r.argmax(-1)).sum())
        by_row.append(kl.mean().item())
    assert found.metrics["kl"] == pytest.approx(total / count, rel=1e-5)
    assert found.metrics["num_tokens"] == count and found.metrics["num_samples"] == 9
    assert found.metrics["agreement"] == found.metrics["score"] == pytest.approx(agreeing / count)
    deviation = torch.tensor(by_row, dtype=torch.float64).std().item()
    assert found.metrics["stderr"] == pytest.approx(deviation / 3, rel=1e-4)
    assert [s["kl"] for s in found.samples] == pytest.approx(by_row, rel=1e-4)


def test_a_row_whose_history_is_rewritten_is_one_sample(tmp_path):
    """Qwen3's template strips earlier reasoning, so that each turn is read with the history that it had."""
    said = [("a?", "<think>\nb\n</think>\n\nc"), ("d?", "ef"), ("g?", "h")]
    talk = [
        message
        for asked, answer in said
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    rows = [{"messages": talk}, {"messages": talk[:2]}, {"messages": talk[2:4]}]
    folders = save_pair(tmp_path, "qwen3")
    pair = ModelPair(*map(str, folders)).with_tokenizer(make_tokenizer(templates.QWEN3))
    model, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    calls = []

    def evaluate_on(rank, world_size):
        model.eval()
        context = replace(
            make_context(folders, model, rank, world_size), pair=pair, reference=lambda: swapped(model, other)
        )
        counter = model.model.register_forward_hook(lambda *_: calls.append(rank))
        found = evaluate(Divergence(write_rows(tmp_path / "rows.jsonl", rows), batch_size=2), context)
        counter.remove()
        return found

    found = evaluate_on(0, 1)
    assert [sample["index"] for sample in found.samples] == [0, 1, 2]
    total, count = 0.0, 0
    for turn in encode_turns(pair.tokenizer(), talk):
        ids, chosen = torch.tensor([turn.input_ids]), torch.tensor(turn.labels)[1:] != -100
        with torch.no_grad():
            p, r = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1)[chosen] for m in (model, other.eval()))
        total, count = total + (p.exp() * (p - r)).sum().item(), count + len(p)
    assert found.samples[0]["kl"] == pytest.approx(total / count, rel=1e-3)  # small: float32's rounding shows
    calls.clear()
    parts = [evaluate_on(rank, 2) for rank in (0, 1)]
    assert calls.count(0) == calls.count(1) > 0
    assert sorted(sample["index"] for part in parts for sample in part.samples) == [0, 1, 2]


def test_plain_text_counts_from_its_second_token_to_its_end(tmp_path):
    file = write_rows(tmp_path / "text.jsonl", [{"text": "Oslo is far."}])
    context = make_context(DEMO_PAIR)
    found = evaluate(Divergence(file), context)
    num_tokens = len(context.pair.tokenizer()("Oslo is far.", add_special_tokens=False)["input_ids"])
    assert found.metrics["num_tokens"] == num_tokens - 1 + 1  # and the token that ends the document
    assert found.metrics["kl"] == 0 and found.metrics["agreement"] == 1


def test_bad_rows(tmp_path):
    context = make_context(DEMO_PAIR)
    long = [{"messages": [{"role": "user", "content": "a " * 40}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(DataError, match=r"sample 0 of .*long\.jsonl.* tokens\. Raise max_length=32"):
        evaluate(Divergence(write_rows(tmp_path / "long.jsonl", long), max_length=32), context)
    silent = [{"messages": [long[0]["messages"][0], {"role": "assistant", "content": "b", "weight": 0}]}]
    with pytest.raises(DataError, match=r"sample 0 of .*silent\.jsonl.* has no supervised token"):
        evaluate(Divergence(write_rows(tmp_path / "silent.jsonl", silent)), context)
    silent[0]["messages"][1] = {"role": "assistant", "content": "b", "reasoning_content": "b"}
    with pytest.raises(DataError, match=r"sample 0 of .*lost\.jsonl.* 'reasoning_content' in messages\[1\], which the"):
        evaluate(Divergence(write_rows(tmp_path / "lost.jsonl", silent)), context)
    with pytest.raises(DataError, match="nothing to learn"):
        evaluate(Divergence(write_rows(tmp_path / "asked.jsonl", [{"messages": long[0]["messages"][:1]}])), context)


def test_other_rows_have_another_signature(tmp_path):
    context = make_context(DEMO_PAIR)
    signatures = []
    for limit in (3, 4, 3):
        evaluator = Divergence(str(DEMO / "data/old.jsonl"), limit=limit)
        evaluator.read(context.pair, {})
        signatures.append(evaluator.signature())
    assert signatures[0] == signatures[2] != signatures[1]
