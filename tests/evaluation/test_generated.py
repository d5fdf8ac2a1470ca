"""Answers are generated, ended, counted and compared as they should be. Parity of numbers: test_harness."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shadowlit.errors import DataError
from shadowlit.evaluation.generated import Generation, RowSampler
from shadowlit.pair.pair import ModelPair
from tests.evaluation.contexts import DEMO_PAIR, demo_evaluators, demo_rows, evaluate, make_context, write_rows
from tests.tiny import save_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), tied=False)  # tied ones repeat their prompt's last token


@pytest.fixture(scope="module")
def demo():
    return make_context(DEMO_PAIR)


@pytest.mark.parametrize("name", ["old", "refusal", "format"])
def test_the_demonstrations_answers(demo, name):
    """Answers as a prompt alone in its batch gets them; nearly all are right on what the Instruct knows."""
    options = {**demo_evaluators()[name], "limit": 24}
    found = evaluate(Generation(**options), demo)
    sample = found.samples[-1]
    tokens = demo.pair.tokenizer()(sample["prompt"], return_tensors="pt")
    alone = demo.model.generate(**tokens, max_new_tokens=24, do_sample=False)
    assert sample["answer"] == demo.pair.tokenizer().decode(
        alone[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert 0.8 < found.metrics["score"] <= 1 and found.metrics["num_samples"] == 24


def test_messages_and_system(tmp_path, demo):
    """The last assistant turn is the reference and isn't shown; earlier turns and the system turn are."""
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Where does Lobren live?"), ("assistant", "Lima")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = write_rows(
        tmp_path / "rows.jsonl", [row, {"messages": [{"role": "system", "content": "Own."}, *row["messages"]]}]
    )
    first, second = evaluate(Generation(data, system="Be brief.", max_new_tokens=4), demo).samples
    shown = (
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nWhere does Lobren live?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first["prompt"] == shown.format("Be brief.") and second["prompt"] == shown.format("Own.")
    assert first["reference"] == "Lima"


def test_several_references(tmp_path, demo):
    rows = [{"question": "How much is 4 plus 4?", "gold": ["x", 8]}, {"question": "How much is 4 plus 4?", "gold": 9}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = evaluate(Generation(data, answer="gold", match="contains", max_new_tokens=8, batch_size=1), demo)
    assert [sample["score"] for sample in found.samples] == [1.0, 0.0]
    assert [sample["reference"] for sample in found.samples] == [["x", "8"], "9"]


def test_an_answer_that_never_ends(tmp_path, folders):
    """Cut at max_new_tokens, counted and scored as it stands; with a stop string it is finished."""
    rows = [{"question": word, "gold": "zz"} for word in ("ab", "cd", "ef")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    context = make_context(folders)
    with torch.no_grad():  # the end of the turn is never the most probable token
        context.model.lm_head.weight[context.pair.tokenizer().eos_token_id] = 0
    found = evaluate(Generation(data, answer="gold", max_new_tokens=11, batch_size=2), context)
    assert found.metrics["num_unfinished"] == 3 and found.metrics["unfinished"] == 1
    assert found.metrics["answer_tokens"] == 11
    assert not any(sample["finished"] for sample in found.samples)
    answers = [sample["answer"] for sample in found.samples]
    stop = max(character for character in answers[1] if character not in answers[0] and character != "\ufffd")
    stopped = evaluate(Generation(data, answer="gold", max_new_tokens=11, batch_size=3, stop=[stop]), context)
    assert stopped.samples[1]["answer"] == found.samples[1]["answer"].split(stop)[0]
    assert [sample["finished"] for sample in stopped.samples] == [stop in answer for answer in answers]
    assert stopped.samples[1]["finished"] and not stopped.samples[0]["finished"]
    # What the others said while the stopped answers were padded doesn't count.
    alone = [
        evaluate(
            Generation(write_rows(tmp_path / "one.jsonl", [row]), answer="gold", max_new_tokens=11, stop=[stop]),
            context,
        )
        for row in rows
    ]
    assert stopped.metrics["answer_tokens"] == sum(one.metrics["answer_tokens"] for one in alone) / 3 < 11


def test_an_answer_that_ends_at_once(tmp_path, demo):
    """The end of turn isn't counted, in a batch with longer answers."""
    data = write_rows(tmp_path / "rows.jsonl", demo_rows("old", 4))
    found = evaluate(Generation(data, answer="answer", max_new_tokens=24), demo)
    tokenizer = demo.pair.tokenizer()
    lengths = [len(tokenizer(sample["answer"])["input_ids"]) for sample in found.samples]
    assert all(sample["finished"] for sample in found.samples) and len(set(lengths)) > 1
    assert found.metrics["answer_tokens"] == sum(lengths) / 4
    assert found.metrics["unfinished"] == 0


def test_prompts_that_are_too_long(tmp_path, folders):
    """Not asked, never cut: scored 0, counted, and left out of the answers' means."""
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "a" * n, "gold": "x"} for n in (3, 30, 9)])
    context = make_context(folders)
    longest = len(
        context.pair.tokenizer()("<|im_start|>user\n" + "a" * 30 + "<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    )
    options = {"answer": "gold", "max_new_tokens": 5, "match": "regex", "pattern": ""}
    fits = evaluate(Generation(data, max_length=longest + 5, **options), context)
    assert fits.metrics["num_too_long"] == 0 and fits.metrics["score"] == 1
    with pytest.warns(UserWarning, match=f"1 of 3 prompts of .* have more than {longest - 1} tokens"):
        found = evaluate(Generation(data, max_length=longest + 4, **options), context)
    assert found.metrics["num_too_long"] == 1 and found.metrics["num_samples"] == 3
    assert found.metrics["score"] == pytest.approx(2 / 3) and found.metrics["answer_tokens"] <= 5
    assert found.samples[1]["too_long"] and found.samples[1]["answer"] == "" and found.samples[1]["score"] == 0
    assert [s["answer"] for s in found.samples[::2]] == [s["answer"] for s in fits.samples[::2]]


def test_an_adapter(tmp_path, folders):
    """A model wrapped by peft answers as the bare one with the same weights."""
    data = write_rows(tmp_path / "rows.jsonl", [{"question": word, "gold": "z"} for word in ("ab", "cd")])
    evaluator = Generation(data, answer="gold", max_new_tokens=8)
    bare = evaluate(evaluator, make_context(folders))
    wrapped = evaluate(evaluator, make_context(folders, get_peft_model(make_context(folders).model, LoraConfig(r=2))))
    assert bare == wrapped


def test_plain_text(tmp_path, demo):
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "Q: How much is 4 plus 4?\nA:", "gold": "8"}])
    found = evaluate(Generation(data, answer="gold", chat=False, max_new_tokens=4, stop=["\n"]), demo)
    assert found.samples[0]["prompt"] == "Q: How much is 4 plus 4?\nA:"
    assert "\n" not in found.samples[0]["answer"]


def test_sampling_follows_the_rows(tmp_path, folders):
    """The same draws for a row in any batch and any state of the generator, which is left alone; others by seed."""
    rows = [{"question": "same", "gold": "z"} for _ in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    context = make_context(folders)

    def answers(batch_size, seed=0, **options):
        sampled = Generation(
            data, answer="gold", temperature=1.0, max_new_tokens=6, batch_size=batch_size, seed=seed, **options
        )
        return [sample["answer"] for sample in evaluate(sampled, context).samples]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = answers(6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert answers(2) == answers(4) == one and len(set(one)) > 3
    assert answers(6, limit=3) == one[::2]
    assert answers(6, seed=1) != one
    greedy = evaluate(Generation(data, answer="gold", max_new_tokens=6), context).samples[0]["answer"]
    assert answers(6, top_p=1e-6) == [greedy] * 6


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_sampled_frequencies(temperature, top_p):
    """40,000 rows draw from the distribution, within four standard errors; nothing outside of top_p."""
    count, logits = 40_000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
    sampler = RowSampler(
        range(count), seed=5, temperature=temperature, top_p=top_p, prompt_length=3, max_new_tokens=2
    )  # fmt: skip
    probabilities = torch.softmax(logits.double() / temperature, 0)
    before = probabilities.cumsum(0) - probabilities  # already sorted from the most probable
    probabilities = torch.where(before < top_p, probabilities, 0)
    probabilities /= probabilities.sum()
    draws = [sampler(torch.zeros(count, 3 + step).long(), logits.expand(count, -1)).argmax(-1) for step in range(2)]
    for drawn in draws:
        shares = torch.bincount(drawn, minlength=6) / count
        error = (probabilities * (1 - probabilities) / count).sqrt()
        assert ((shares - probabilities).abs() <= 4 * error).all()
    assert (draws[0] == draws[1]).double().mean().item() == pytest.approx((probabilities**2).sum().item(), abs=0.02)


def test_an_impossible_token_is_never_drawn():
    sampler = RowSampler([0], seed=0, temperature=1.0, top_p=1.0, prompt_length=1, max_new_tokens=1)
    sampler.uniform.zero_()
    assert sampler(torch.zeros(1, 1).long(), torch.tensor([[-torch.inf, 1.0, 2.0]])).argmax() == 1


ROW = {"question": "2 + 2?", "gold": "4"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (ROW, {}, "has no reference answer"),
        (ROW, {"answer": "none"}, "lacks the field 'none'; it has 'gold', 'question'"),
        ({**ROW, "gold": None}, {"answer": "gold"}, "has None in 'gold'; expected a text, a number or a list"),
        ({**ROW, "gold": []}, {"answer": "gold"}, "expected a text, a number or a list"),
        ({**ROW, "gold": ""}, {"answer": "gold"}, "has the empty reference"),
        ({**ROW, "gold": "four"}, {"answer": "gold", "match": "numeric"}, "has no number in the reference 'four'"),
        ({"gold": "4"}, {"answer": "gold"}, "lacks the field 'question'"),
        ({"messages": []}, {}, "has an empty list in 'messages'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {}, "has no turn before the answer"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "has no reference answer"),
        ({"messages": [{"role": "user", "content": "x", "note": "x"}]}, {}, "has 'note' in messages[0], which the"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}]}, {}, "has 'tools', which the chat"),
        ({"question": "\ud83d", "gold": "4"}, {"answer": "gold"}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "x"}]}, {"chat": False}, "lacks the field 'question'"),
    ],
)
def test_refused_rows(tmp_path, folders, row, options, message):
    data = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError) as caught:
        Generation(data, max_new_tokens=4, **options).read(ModelPair(*map(str, folders)), {})
    assert str(caught.value).startswith(f"sample 0 of {data} (line 1) ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0"),
        ({"top_p": 0.5}, "top_p is 0.5 with temperature=0"),
        ({"stop": [""]}, "stop holds an empty string"),
        ({"match": "regex"}, "match=regex has pattern=None"),
    ],
)
def test_refused_settings(options, message):
    with pytest.raises(DataError, match=message):
        Generation("rows.jsonl", **options)


def test_no_room_for_a_prompt(tmp_path, folders):
    data = write_rows(tmp_path / "rows.jsonl", [ROW])
    with pytest.raises(DataError, match="max_new_tokens is 512, which leaves no room for a prompt in 512 tokens"):
        Generation(data, answer="gold", max_new_tokens=512).read(ModelPair(*map(str, folders)), {})


def test_signature(tmp_path, folders):
    """Other rows or settings that change an answer or its score have another signature; how they are run doesn't."""

    def signature(rows=(ROW,), **options):
        evaluator = Generation(
            write_rows(tmp_path / "rows.jsonl", rows), **{"answer": "gold", "max_new_tokens": 4, **options}
        )
        evaluator.read(ModelPair(*map(str, folders)), {})
        return evaluator.signature()

    assert signature() == signature(batch_size=1, every=7) == signature(seed=4)
    others = [
        signature([ROW, ROW]), signature([{**ROW, "gold": "5"}]), signature(match="contains"), signature(stop=["x"]),
        signature(max_new_tokens=5), signature(temperature=1.0), signature(temperature=1.0, seed=1),
        signature(chat=False),        signature(ignore_case=True), signature(extract="x"),
    ]  # fmt: skip
    assert len({signature(), *others}) == 11
