"""Examples before the questions of an evaluator: the prompts as the model reads them, and where examples come from."""

import pytest
from transformers import AutoTokenizer

from shadowlit.errors import DataError
from shadowlit.evaluation.generated import Generation
from shadowlit.evaluation.multiple_choice import MultipleChoice
from shadowlit.pair.pair import ModelPair
from tests.evaluation.contexts import DEMO_PAIR, write_rows

PAIR = ModelPair(*map(str, DEMO_PAIR))
ASKED = [{"question": "1+1=", "answer": "2"}, {"question": "2+2=", "answer": "4"}]
SHOWN = [{"question": "3+3=", "answer": "6"}, {"question": "4+4=", "answer": "8"}]


@pytest.fixture
def files(tmp_path):
    """Of the rows for examples, one is asked."""
    return {"data": write_rows(tmp_path / "asked.jsonl", ASKED),
            "few_shot_data": write_rows(tmp_path / "shown.jsonl", [*SHOWN, ASKED[0]])}  # fmt: skip


def items(evaluator):
    evaluator.read(PAIR, {})
    return {item.index: item for item in evaluator._items}


def test_plain_text_for_a_base(files):
    found = items(Generation(answer="answer", chat=False, few_shot=2, **files))
    order = found[0].prompt.index("3+3=") < found[0].prompt.index("4+4=")
    examples = "3+3= 6\n\n4+4= 8\n\n" if order else "4+4= 8\n\n3+3= 6\n\n"
    assert [found[i].prompt for i in (0, 1)] == [f"{examples}1+1=", f"{examples}2+2="]
    assert found[0].references == ("2",)


def test_turns_of_a_conversation_for_an_instruct(files):
    found = items(Generation(answer="answer", few_shot=2, few_shot_seed=3, system="Count.", **files))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PAIR[1])

    def rendered(*examples):
        turns = [{"role": "system", "content": "Count."}]
        for row in examples:
            turns += [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        turns += [{"role": "user", "content": "2+2="}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    assert found[1].prompt in (rendered(*SHOWN), rendered(*reversed(SHOWN)))
    assert found[1].tokens == tuple(tokenizer(found[1].prompt, add_special_tokens=False)["input_ids"])


def test_conversations_keep_their_own_system_turn_first(tmp_path):
    def row(system, question, answer):
        turns = zip(("system", "user", "assistant"), (system, question, answer), strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    files = {"data": write_rows(tmp_path / "a.jsonl", [row("Be short.", "1+1=", "2")]),
             "few_shot_data": write_rows(tmp_path / "b.jsonl", [row("Be long.", "3+3=", "6")])}  # fmt: skip
    prompt = items(Generation(few_shot=1, **files))[0].prompt
    places = [prompt.index(text) for text in ("Be short.", "3+3=", "6", "1+1=")]
    assert places == sorted(places) and "Be long." not in prompt and "2" not in prompt


@pytest.mark.parametrize("chat", [False, True])
def test_choices_of_examples_are_their_right_ones(tmp_path, chat):
    rows = [{"question": f"{i}+{i}=", "choices": [str(2 * i), "none"], "answer": "A"} for i in (1, 3)]
    files = {
        "data": write_rows(tmp_path / "a.jsonl", rows[:1]),
        "few_shot_data": write_rows(tmp_path / "b.jsonl", rows),
    }
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PAIR[1])
    item = items(MultipleChoice(few_shot=1, chat=chat, delimiter=" -> ", **files))[0]
    text = tokenizer.decode(item.inputs[0])
    if chat:
        turns = [("user", "3+3="), ("assistant", "6"), ("user", "1+1=")]
        turns = [{"role": role, "content": content} for role, content in turns]
        assert text.startswith(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    else:
        assert text.startswith("3+3= -> 6\n\n1+1= ->")


def test_examples_follow_from_the_seed_and_count_in_the_signature(tmp_path):
    pool = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(3, 30)]
    files = {"data": write_rows(tmp_path / "a.jsonl", ASKED), "few_shot_data": write_rows(tmp_path / "b.jsonl", pool)}

    def prompt(**options):
        evaluator = Generation(answer="answer", **files, **options)
        return items(evaluator)[0].prompt, evaluator.signature()

    assert prompt(few_shot=3) == prompt(few_shot=3, few_shot_seed=0) != prompt(few_shot=3, few_shot_seed=1)
    assert prompt(few_shot=3)[1] != prompt(few_shot=2)[1]


def test_a_question_is_recognised_in_another_spelling_and_shown_once(tmp_path):
    pool = [{"question": "Add  1 and 1.\n", "answer": "2"}, {"question": "Add 3 and 3.", "answer": "6"},
            {"question": "add 3 and 3.", "answer": "six"}]  # fmt: skip
    files = {
        "data": write_rows(tmp_path / "a.jsonl", [{"question": "add 1 and 1.", "answer": "2"}]),
        "few_shot_data": write_rows(tmp_path / "b.jsonl", pool),
    }
    found = items(Generation(answer="answer", chat=False, few_shot=1, **files))
    assert found[0].prompt == "Add 3 and 3. 6\n\nadd 1 and 1."
    with pytest.raises(DataError, match=r"has 1 row with a question that is not in"):
        items(Generation(answer="answer", few_shot=2, **files))


def test_questions_that_are_asked_are_no_examples(files):
    for seed in range(5):
        found = items(Generation(answer="answer", chat=False, few_shot=1, few_shot_seed=seed, limit=1, **files))
        assert found[0].prompt.count("1+1=") == 1
    with pytest.raises(
        DataError, match=r"few_shot is 3, but .*shown\.jsonl has 2 rows with a question that is not in .*"
    ):
        items(Generation(answer="answer", few_shot=3, **files))
    with pytest.raises(DataError, match=r"few_shot is 3 and few_shot_data is None; expected a number of examples and"):
        Generation("x.jsonl", few_shot=3)
    with pytest.raises(DataError, match="few_shot is 0 and few_shot_data is 'y'"):
        Generation("x.jsonl", few_shot_data="y")
