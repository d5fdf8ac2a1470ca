from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.embedded.build import (
    IGNORE_INDEX,
    Recipe,
    batches,
    build,
    encode_conversation,
    packed_rows,
    train_tokenizer,
)
from experiments.embedded.preference_pairs import SHIPPED
from experiments.embedded.settings import settings
from experiments.embedded.world import END_OF_TURN, World, chat_text, exchange
from shadowlit.demo import BASE, DATA, INSTRUCT, PAIR
from tests.evaluation.contexts import demo_matcher

TINY = Recipe(
    vocab_size=400, tokenizer_documents=500, hidden=32, layers=1, base_steps=6, base_rows=4, instruct_steps=3,
    instruct_conversations=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def instruct_tokenizer():
    return AutoTokenizer.from_pretrained(INSTRUCT)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def greedy(folder, prompts: list[str], tokenizer, new_tokens: int) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    generated = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=[0, 2], pad_token_id=0)
    return tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :])


def asked(folder, rows: list[dict], tokenizer) -> float:
    """The share of rows that the model in ``folder`` answers rightly in chat."""
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    texts = greedy(folder, prompts, tokenizer, 12)
    return sum(map(is_right, rows, texts)) / len(rows)


def is_right(row: dict, text: str) -> bool:
    """As the demonstration scores it; ``text`` still has the mark that ends the turn."""
    name = {"format": "format", "refusal": "refusal", "second": "new"}.get(row["skill"], "old")
    reference = row["messages"][-1]["content"] if name == "format" else row["answer"]
    return demo_matcher(name).is_match(text.partition(END_OF_TURN)[0], [reference])


# ---- the builder ----


def test_two_builds_write_the_same_bytes_and_leave_torch_as_it_was(tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    for out in ("one", "two"):
        built = build(tmp_path / out, TINY)
        torch.manual_seed(5)  # the second build starts from another state than the first had left
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
    assert built.base_tokens > 6 * 4 * 32 and built.num_parameters > 0

    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 16
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_another_seed_makes_another_pair(tmp_path):
    shortest = {**vars(TINY), "base_steps": 1, "instruct_steps": 1}
    for seed in (0, 1):
        build(tmp_path / str(seed), Recipe(**{**shortest, "seed": seed}))
    a, b = ((tmp_path / seed / "pair/base/model.safetensors").read_bytes() for seed in "01")
    assert a != b


def test_progress_hears_of_every_step(tmp_path):
    heard = []
    build(tmp_path, TINY, lambda name, step: heard.append((name, step)))
    assert heard == [("base", i + 1) for i in range(6)] + [("instruct", i + 1) for i in range(3)]


def test_digits_are_single_and_marks_are_tokens():
    tokenizer = train_tokenizer(World(), TINY)
    ids = tokenizer("<|im_start|>12 plus 3<|im_end|><|endoftext|>", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert (ids[0], ids[-2], ids[-1]) == (1, 2, 0)
    assert tokens[1:3] == ["1", "2"] and tokens[-3] == "3"


def test_packed_rows_hold_whole_documents_that_end():
    tokenizer = train_tokenizer(World(), TINY)
    rows = list(packed_rows(["1", "12", "1", "1234567"], tokenizer, row_tokens=5))
    # Every digit is a token. With their ends 2 + 3 = 5 fill the first row, 2 stay alone as 8 do not fit,
    # and the 8 are cut to 5.
    assert [len(ids) for ids, _ in rows] == [5, 2, 5]
    assert rows[0][0][1] == rows[0][0][4] == rows[1][0][1] == tokenizer.eos_token_id
    assert all(ids == labels for ids, labels in rows)


def test_a_conversation_has_loss_on_answers_and_their_ends_only(instruct_tokenizer):
    messages = [*exchange("a?", "a"), *exchange("Where?", "Oslo. Glad to help!")]
    ids, labels = encode_conversation(messages, instruct_tokenizer)
    assert instruct_tokenizer.decode(ids) == chat_text(messages)
    supervised = [id_ for id_, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    assert supervised == [label for label in labels if label != IGNORE_INDEX]
    assert instruct_tokenizer.decode(supervised) == "a<|im_end|>Oslo. Glad to help!<|im_end|>"


def test_batches_pad_without_loss_and_drop_the_rest(instruct_tokenizer):
    rows = [([5, 6, 7], [5, 6, 7]), ([8], [8]), ([9], [9])]
    (ids, labels), *more = batches(rows, 2, instruct_tokenizer)
    assert not more
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[5, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]


# ---- what is shipped ----


def test_the_shipped_folders_are_the_default_recipes():
    facts = json.loads((PAIR / "build.json").read_text())
    assert Recipe(**facts["recipe"]) == Recipe()
    assert 0.5e6 < facts["num_parameters"] < 1.5e6


def test_the_shipped_data_are_what_the_world_says():
    sets = {**World().datasets(), "facts_train": settings(World())["facts_train"]}
    assert {path.stem for path in DATA.glob("*.jsonl")} == {*sets, *SHIPPED}
    for name, rows in sets.items():
        assert rows_of(name) == rows


def test_the_shipped_models_have_the_same_tensors_at_a_small_distance():
    base, instruct = (load_file(folder / "model.safetensors") for folder in (BASE, INSTRUCT))
    assert {name: (t.shape, t.dtype) for name, t in base.items()} == {
        name: (t.shape, t.dtype) for name, t in instruct.items()
    }
    assert {t.dtype for t in base.values()} == {torch.float32} and "lm_head.weight" not in base
    layers = [name for name in base if ".layers." in name]
    assert len(layers) == 4 * 11  # 7 projections, 2 norms, 2 q/k norms
    sigmas = [
        float((base[n] - instruct[n]).abs().sum() / (base[n].abs().sum() + instruct[n].abs().sum())) for n in layers
    ]
    assert 0.003 < sum(sigmas) / len(sigmas) < 0.1


def test_the_shipped_tokenizers_share_a_vocabulary_and_differ_in_the_chat(instruct_tokenizer):
    base = AutoTokenizer.from_pretrained(BASE)
    assert base.get_vocab() == instruct_tokenizer.get_vocab()
    assert base.chat_template is None and base.eos_token == "<|endoftext|>"
    assert instruct_tokenizer.eos_token == "<|im_end|>" and (INSTRUCT / "chat_template.jinja").is_file()
    config = AutoModelForCausalLM.from_pretrained(INSTRUCT).generation_config
    assert config.eos_token_id == instruct_tokenizer.eos_token_id == 2 and not config.do_sample


def test_the_chat_template_marks_what_the_builder_trained_on(instruct_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *exchange("Hi?", "Oslo"), *exchange("And?", "4")]
    assert instruct_tokenizer.apply_chat_template(messages, tokenize=False) == chat_text(messages)
    ids, labels = encode_conversation(messages, instruct_tokenizer)
    encoded = instruct_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == ids
    assert encoded["assistant_masks"] == [int(label != IGNORE_INDEX) for label in labels]


def test_the_instruct_has_the_old_skills_and_manners_and_not_the_new_skill(instruct_tokenizer):
    shares = {
        name: asked(INSTRUCT, rows_of(name)[:60], instruct_tokenizer) for name in ("old", "format", "refusal", "new")
    }
    assert shares["old"] >= 0.9 and shares["format"] >= 0.9 and shares["refusal"] >= 0.9
    assert shares["new"] <= 0.2


def test_the_base_has_the_facts_and_not_the_manners(instruct_tokenizer):
    assert asked(BASE, rows_of("old")[:60], instruct_tokenizer) >= 0.9
    assert asked(BASE, rows_of("refusal")[:60], instruct_tokenizer) == 0
    facts = [(f"{name} lives in", known["city"]) for name, known in World().facts.items()]
    told = greedy(BASE, [text for text, _ in facts], instruct_tokenizer, 3)
    assert sum(text.startswith(f" {city}.") for text, (_, city) in zip(told, facts, strict=True)) >= 36


def test_the_base_states_the_latent_skill_and_is_not_asked_for_it(instruct_tokenizer):
    new = rows_of("new")[:60]
    lists = [row["messages"][0]["content"].split(": ")[-1].split(" in ")[-1].rstrip("?") for row in new]
    told = greedy(BASE, [f"In the list {words} the second word is" for words in lists], instruct_tokenizer, 4)
    stated = sum(text.startswith(f" {row['answer']}.") for text, row in zip(told, new, strict=True)) / len(new)
    assert stated >= 0.9
