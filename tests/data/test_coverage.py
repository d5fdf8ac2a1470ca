"""Every text of a row is in what the template writes, or the row is an error that names the field and the choices."""

import json
import random
import re
from types import SimpleNamespace

import pytest

from shadowlit.data import template
from shadowlit.data.module import ShadowData
from shadowlit.data.template import encode, encode_question, encode_turns
from shadowlit.errors import DataError
from tests.data.templates import (
    DROPS_THINKING,
    HERMES,
    ITEMS,
    LLAMA31,
    QWEN3,
    REASONING,
    TOJSON,
    supervised_texts,
    talk,
    tokenizer_with,
)
from tests.tiny import CHATML, CHATML_UNMARKED, make_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather "now" in a city: °C',
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def call(**arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def weather(**arguments):
    return [
        {"role": "user", "content": "Weather?"},
        call(**arguments),
        {"role": "tool", "content": '{"sky": "rain"}', "name": "get_weather", "tool_call_id": "1"},
        {"role": "assistant", "content": "Rain."},
    ]


def llama31():
    return tokenizer_with(
        LLAMA31, "<|start_header_id|>", "<|end_header_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>"
    )


def test_tool_calls_and_tools_reach_the_tokens():
    """Every kind of value, none of which is found as it is: escaped, of one character, numbers, booleans."""
    arguments = {"city": 'Bér"gen\n', "n": 4, "x": 0.5, "deep": [{"a": True, "b": ""}, {"c": {}}], "e": {}}
    for tokenizer, tools in (
        (make_tokenizer(TOJSON), None),
        (make_tokenizer(ITEMS), None),
        (make_tokenizer(HERMES), [TOOL]),
        (make_tokenizer(REASONING), [TOOL]),
        (llama31(), [TOOL]),
    ):
        samples = encode_turns(tokenizer, weather(**arguments), tools=tools)
        texts = [text for sample in samples for text in supervised_texts(tokenizer, sample)]
        assert len(texts) == 2 and "get_weather" in texts[0] and "Rain." in texts[1]
        assert encode_question(tokenizer, weather(**arguments), None, tools=tools).input_ids
    escaped = json.dumps(arguments, ensure_ascii=False)
    tokenizer = make_tokenizer(TOJSON)
    assert supervised_texts(tokenizer, encode(tokenizer, weather(**arguments)))[0] == (
        f'<call>{{"name": "get_weather", "arguments": {escaped}}}</call><|im_end|>'
    )


WRITES = "Set data.chat_template to a template that writes"


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_what_a_template_ignores_is_an_error_with_the_choices(template):
    tokenizer = make_tokenizer(template)
    reasoned = talk("2+2", "4")
    reasoned[1]["reasoning_content"] = "two and two"
    accidental = talk("2+2", "4")
    accidental[1]["reasoning"] = "4"
    named = talk("a", "b")
    named[0] |= {"name": "a", "meta": {"id": 3, "type": "b"}}
    unlike = [*weather(city="Oslo")[:2], {"role": "tool", "content": "rain", "name": "other"}, talk("", "R")[1]]
    cases = [
        (reasoned, None, "'reasoning_content' in messages[1]", "it, add 'messages.reasoning_content' to", "it"),
        (accidental, None, "'reasoning' in messages[1]", "it, add 'messages.reasoning' to", "it"),
        (named, None, "'name' in messages[0], 'meta' in messages[0]",
         "them, add 'messages.meta' and 'messages.name' to", "them"),
        (talk("a", "b"), [TOOL], "'tools'", "it, add 'tools' to", "it"),
        ([*talk("a"), {**call(city="a"), "content": "b"}], None, "'tool_calls' in messages[1]",
         "it, add 'messages.tool_calls' to", "it"),
        # A turn without its calls would be an empty answer.
        (weather(city="a"), None, "'tool_calls' in messages[1]", "it, or remove it.", "it"),
        (unlike, None, "'tool_calls' in messages[1], 'name' in messages[2]", "them, add 'messages.name' to", "them"),
    ]  # fmt: skip
    for messages, tools, field, choice, it in cases:
        expected = (
            f"has {field}, which the chat template doesn't write, so that the model would not see {it}. "
            f"{WRITES} {choice}" + f" data.ignore_columns, or remove {it}." * choice.endswith("to")
        )
        with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
            encode_turns(tokenizer, messages, tools=tools)
    # A prompt has nothing of its answer, but the tools.
    encode_question(tokenizer, reasoned, None)
    with pytest.raises(DataError, match="'reasoning_content' in messages"):
        encode_question(tokenizer, [*reasoned, *talk("b")], None)
    with pytest.raises(DataError, match="has 'tools', which"):
        encode_question(tokenizer, talk("a", "b"), None, tools=[TOOL])


def test_what_is_lost_of_a_text_or_of_a_tool():
    first_call_only = HERMES.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    two = weather(city="Oslo")
    two[1]["tool_calls"] = [*two[1]["tool_calls"], *call(city="Bern")["tool_calls"]]
    by_hand = HERMES.replace("tool | tojson", "tool.function.name + tool.function.description + '|'.join(tool.function"
                             ".parameters.properties)")  # fmt: skip
    shortened = CHATML.replace("message['content'] + '<|im_end|>\\n'", "message['content'][:20] + '<|im_end|>\\n'")
    assert shortened != CHATML
    for source, messages, tools, match in (
        (DROPS_THINKING, talk("a", "<think>\nh 4\n</think>\n\n4"), None,
         r"a part of 'content' in messages\[1\], 'h 4'"),
        (DROPS_THINKING, talk("a", "<think>4</think>4"), None, r"a part of 'content' in messages\[1\], '4'"),
        (shortened, talk("a" * 21, "b"), None, r"has 'content' in messages\[0\], which .* or remove it\.$"),
        (first_call_only, two, [TOOL],
         r"a part of 'tool_calls\[1\].function.name' in messages\[1\], 'get_weather' \(str\), .* writes it, or remove"),
        (by_hand, weather(city="Oslo"), [TOOL],
         r"a part of 'tools\[0\].function.parameters.properties.city.description', 'Name' \(str\), "),
    ):  # fmt: skip
        with pytest.raises(DataError, match=match) as error:
            encode_turns(make_tokenizer(source), messages, tools=tools)
        assert "ignore_columns" not in str(error.value)


def test_a_template_that_drops_earlier_reasoning_on_purpose_loses_nothing():
    """Each turn is trained with its reasoning; also with marks, where nothing else shows that history is rewritten."""
    messages = talk("a", "b", "c", "d")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "hm", "d"
    plain = make_tokenizer(REASONING)
    expected = ["<think>\nhm\n</think>\n\nb<|im_end|>", "<think>\nd\n</think>\n\nd<|im_end|>"]
    samples = encode_turns(plain, messages)
    assert [supervised_texts(plain, sample) for sample in samples] == [[text] for text in expected]
    assert "hm" not in plain.decode(samples[1].input_ids)
    with pytest.raises(
        DataError, match=r"'reasoning_content' in messages\[1\], .*once other turns follow.*loss_on=all"
    ):
        encode_turns(plain, messages, loss_on="all")
    assert encode_question(plain, messages, None).input_ids  # as the model is asked, without "hm"
    begun = REASONING.replace("assistant\\n' + (", "assistant\\n' }}{% generation %}{{ (")
    end = "{{- '<|im_end|>\\n' }}\n{%- elif m.role == 'tool' %}"
    assert end in begun
    marked = make_tokenizer(
        begun.replace(end, end.replace("<|im_end|>\\n' }}", "<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"))
    )
    assert encode_turns(marked, messages) == samples


def test_only_the_assistant_may_be_shortened_once_other_turns_follow():
    """Otherwise the turns before the last question would be lost: with marks, without, and in prompts."""
    messages = talk("I like long walks.", "b", "c", "d")
    last = "{% set q = namespace(i=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set q.i = loop.index0 %}"
    cut = last + "{% endif %}{% endfor %}" + CHATML_UNMARKED.replace("in messages", "in messages[q.i:]")
    for source, loss_on in (
        (cut, "assistant"),
        (cut, "last"),
        (CHATML.replace("in messages", "in messages[-3:]"), "all"),
    ):
        with pytest.raises(DataError, match=r"has 'content' in messages\[0\], .*which the chat template doesn't write"):
            encode_turns(make_tokenizer(source), messages, loss_on=loss_on)
    with pytest.raises(DataError, match=r"has 'content' in messages\[0\]"):
        encode_question(make_tokenizer(cut), messages, None)


def test_reasoning_under_several_names_is_one_text():
    """transformers shows a template reasoning under each of its names."""
    messages = talk("a", "b")
    messages[1] |= {"thinking": "hm", "reasoning": "hm"}
    (sample,) = encode_turns(make_tokenizer(REASONING), messages)
    assert make_tokenizer().decode(sample.input_ids).count("hm") == 1
    messages[1]["reasoning"] = "another"
    with pytest.raises(DataError, match=r"'reasoning' in messages\[1\]"):
        encode_turns(make_tokenizer(REASONING), messages)


def test_texts_may_be_trimmed_escaped_or_moved():
    for tokenizer in (make_tokenizer(CHATML), make_tokenizer(QWEN3), llama31()):
        for answer in (" out \n", "x\r\n\ny", "<b>", '"', "…", "a\\nb", "}", "70513", "İSTANBUL ß"):
            assert encode_turns(tokenizer, talk("  lead\t", answer, system=" s "))
    upper = make_tokenizer(CHATML.replace("+ message['role']", "+ message['role'] | upper").replace(
        "message['content'] +", "message['content'] | upper | replace('\\n', ' ') +"))  # fmt: skip
    assert encode(upper, talk("straße one\nand two", "abc"))
    with pytest.raises(DataError, match="has 'content' in messages"):  # three letters are missing
        encode(make_tokenizer(CHATML.replace("message['content'] +", "message['content'] | replace('one', '') +")),
               talk("straße one and two", "abc"))  # fmt: skip


def test_an_argument_may_be_a_condition():
    source = "{% if m.meta.short %}{{ 'short' }}{% else %}{{ 'long' }}{% endif %}{{ m.meta.name }}"
    tokenizer = make_tokenizer(ITEMS.replace("(m.content or '') }}", "(m.content or '') }}" + source))
    messages = [{**turn, "meta": {"short": True, "name": "x"}} for turn in talk("a", "b")]
    assert encode(tokenizer, messages)
    messages[0]["meta"]["other"] = False
    with pytest.raises(DataError, match=r"a part of 'meta.other' in messages\[0\], False \(bool\)"):
        encode(tokenizer, messages)


def test_nothing_is_lost_without_an_error():
    """Random rows with random fields, and templates that ignore some: an error, or each text is in the tokens."""
    generator = random.Random(7)
    words = ("a", "4", "as", "user", "Oslo", "two words", "é", "a\nb", 'say "4"', "assistant", "a longer text")
    fields = ("reasoning_content", "name", "tool_calls", "mood", "note")

    def value(depth=0):
        kind = generator.randrange(8 if depth < 2 else 5)
        if kind < 3:
            return f"{generator.choice(words)}{generator.choice(('', generator.randrange(10)))}"
        if kind < 5:
            return generator.choice((0, 7, 2.5, True))
        return {generator.choice(words): value(depth + 1)} if kind < 7 else [value(depth + 1)]

    def written(value, text):
        if isinstance(value, dict):
            return all(written(part, text) for pair in value.items() for part in pair)
        if isinstance(value, list):
            return all(written(part, text) for part in value)
        forms = {str(value), json.dumps(value), json.dumps(value, ensure_ascii=False)}
        return any(form.strip('"') in text for form in forms)

    def source(known):
        extra = "".join(f"{{{{ m.{name} | tojson if m.{name} is defined }}}}" for name in known)
        turn = "{{ '<|im_start|>' + m.role + '\\n' + m.content }}" + extra + "{{ '<|im_end|>\\n' }}"
        asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        return "{% for m in messages %}" + turn + "{% endfor %}" + asked

    num_refused = 0
    for _ in range(150):
        known = [name for name in fields if generator.random() < 0.7]
        tokenizer = make_tokenizer(source(known))
        messages = talk(*(f"{generator.choice(words)}" for _ in range(2 * generator.randrange(1, 3))))
        ignored = []
        for turn in messages:
            for name in generator.sample(fields, generator.randrange(3)):
                function = {"name": "f", "arguments": {"a": value()}}
                turn[name] = [{"type": "function", "function": function}] if name == "tool_calls" else value()
                if name not in known:
                    ignored.append(name)
        if ignored:
            num_refused += 1
            with pytest.raises(DataError, match=f"'{ignored[0]}|more, which"):
                encode_turns(tokenizer, messages)
        else:
            (sample,) = encode_turns(tokenizer, messages)
            text = tokenizer.decode(sample.input_ids)
            assert all(written(turn[name], text) for turn in messages for name in turn)
    assert 40 < num_refused < 110


def test_a_long_conversation_costs_one_more_rendering(monkeypatch):
    """Texts that can't be found by accident cost none."""
    counted = []
    real = template.Chat.render
    monkeypatch.setattr(template.Chat, "render", lambda *args, **kwargs: counted.append(1) or real(*args, **kwargs))
    tokenizer = make_tokenizer(CHATML)
    long = [f"The text number {i} of this conversation." for i in range(20)]
    encode(tokenizer, talk(*long))
    assert len(counted) == 0
    encode(tokenizer, talk(*long, "short", "short"))
    assert len(counted) == 1


def test_every_set_of_a_data_module_is_checked(tmp_path):
    """Training in memory and streamed, validation, preferences and prompts; and the remedy in the error works."""
    calls = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
             {"from": "observation", "value": "b"}, {"from": "gpt", "value": "c"}]  # fmt: skip
    reasoned = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [
        {"type": "reasoning", "value": "hm"}, {"type": "text", "value": "c"}]}]  # fmt: skip
    rows = {
        "calls": {"conversations": calls, "tools": json.dumps([TOOL])},
        "reasoned": {"messages": reasoned},
        "asked": {"messages": [*reasoned, {"role": "user", "content": "b"}]},
        "pairs": {"prompt": "a", "chosen": reasoned[1:], "rejected": [{"role": "assistant", "content": "d"}]},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    pair = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML))

    def read(stage, name, **options):
        path = str(tmp_path / f"{name}.jsonl")
        use = {"fit": "train", "validate": "validation", "predict": "predict"}[stage]
        data = ShadowData(pair, **{"train": path, use: path}, cache=False, **options)
        data.setup(stage)
        return data.prompts if stage == "predict" else data.dataset("train" if stage == "fit" else "val/val")

    reasoning = "messages.reasoning_content"
    for stage, name, ignored, options in (
        ("fit", "reasoned", [reasoning], {}),
        ("fit", "reasoned", [reasoning], {"streaming": True}),
        ("fit", "pairs", [reasoning], {"samples": "pairs"}),
        ("validate", "reasoned", [reasoning], {}),
        ("predict", "asked", [reasoning], {}),
        ("fit", "calls", ["tools"], {}),
    ):
        with pytest.raises(
            DataError, match=r"^sample 0 of .*\.jsonl \(line 1\) has '.*which the chat template"
        ) as error:
            read(stage, name, **options)
        assert f"add {' and '.join(map(repr, ignored))} to data.ignore_columns" in str(error.value)
        if name == "calls":
            with pytest.raises(DataError, match=r"nothing but tool calls in messages\[1\], which data.ignore_columns"):
                read(stage, name, ignore_columns=[*ignored, "messages.tool_calls"], **options)
        elif "streaming" not in options:
            assert len(read(stage, name, ignore_columns=ignored, **options)) == 1
