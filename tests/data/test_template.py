"""Masks worked out by hand over many turns, for templates of the shapes that are in use."""

import json
from itertools import groupby

import pytest
from tokenizers import Tokenizer

from shadowlit.data.rendering import RewrittenHistoryError, check_template, load_template, renders_date
from shadowlit.data.template import encode, encode_document, encode_question, encode_turns
from shadowlit.data.tokens import tokens_of
from shadowlit.errors import DataError
from tests.data.templates import (
    GEMMA,
    ITEMS,
    LLAMA3,
    MISTRAL,
    MISTRAL_SYSTEM,
    OPENS_THINKING,
    QWEN2,
    QWEN3,
    TOJSON,
    supervised_texts,
    talk,
    tokenizer_with,
    word_tokenizer,
)
from tests.tiny import CHATML, CHATML_UNMARKED, make_tokenizer


def prompt_tokens(tokenizer, messages, **template_kwargs):
    return encode_question(tokenizer, messages, None, **template_kwargs).input_ids


TALK = talk("1+1?", "two", "sure?", " yes\n", system="Be brief.")


def test_a_mask_by_hand():
    """``<|im_start|>user⏎a<|im_end|>⏎<|im_start|>assistant⏎bc<|im_end|>⏎``, one token per byte or special."""
    tokenizer = make_tokenizer(CHATML_UNMARKED)
    encoded = encode(tokenizer, talk("a", "bc"))
    ids, labels = encoded.input_ids, encoded.labels
    num_prompt = 1 + len("user\n") + 1 + 2 + 1 + len("assistant\n")
    b, c, end = tokenizer.convert_tokens_to_ids(["b", "c", "<|im_end|>"])
    assert len(ids) == num_prompt + 4
    assert labels == [-100] * num_prompt + [b, c, end] + [-100]


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_many_turns_carry_loss_up_to_their_end(template):
    tokenizer = make_tokenizer(template)
    encoded = encode(tokenizer, TALK)
    assert supervised_texts(tokenizer, encoded) == ["two<|im_end|>", " yes\n<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids).endswith(" yes\n<|im_end|>\n")


@pytest.mark.parametrize("messages", [TALK, talk("é🙂", "🙂é", "中", "文"), talk("a", "b"), talk("a", "b", "c")])
def test_marks_and_prefixes_agree(messages):
    marked, unmarked = make_tokenizer(CHATML), make_tokenizer(CHATML_UNMARKED)
    assert encode(marked, messages) == encode(unmarked, messages)
    reference = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encode(marked, messages).input_ids == reference["input_ids"]
    assert [label != -100 for label in encode(marked, messages).labels] == [
        bool(m) for m in reference["assistant_masks"]
    ]


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_a_turn_is_left_out_of_the_loss(template):
    tokenizer = make_tokenizer(template)
    messages = talk("a", "b", "c", "d", "e", "f")
    messages[1]["weight"] = messages[5]["weight"] = 0
    encoded = encode(tokenizer, messages)
    assert supervised_texts(tokenizer, encoded) == ["d<|im_end|>"]
    assert encoded.input_ids == encode(tokenizer, talk("a", "b", "c", "d", "e", "f")).input_ids


def weighed_texts(tokenizer, encoded):
    """The text and the weight of every run of supervised tokens with the same weight."""
    weights = encoded.weights or [float(label != -100) for label in encoded.labels]
    assert [label == -100 for label in encoded.labels] == [weight == 0 for weight in weights]
    runs = groupby(zip(encoded.input_ids, weights, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run]), weight) for weight, run in runs if weight]


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_every_token_has_the_weight_of_its_turn(template):
    tokenizer = make_tokenizer(template)
    messages = talk("a", "b", "c", "d", "e", "f", "g", "h")
    for turn, weight in ((1, 0.5), (3, 0.0), (5, 2.25)):
        messages[turn]["weight"] = weight
    expected = [("b<|im_end|>", 0.5), ("f<|im_end|>", 2.25), ("h<|im_end|>", 1.0)]
    assert weighed_texts(tokenizer, encode(tokenizer, messages)) == expected
    assert weighed_texts(tokenizer, encode(tokenizer, messages, loss_on="last")) == expected[2:]
    whole = weighed_texts(tokenizer, encode(tokenizer, messages, loss_on="all"))
    assert whole == [
        ("user\na<|im_end|>\n<|im_start|>assistant\n", 1.0), ("b<|im_end|>", 0.5),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", 1.0),
        ("\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n", 1.0), ("f<|im_end|>", 2.25),
        ("\n<|im_start|>user\ng<|im_end|>\n<|im_start|>assistant\nh<|im_end|>\n", 1.0),
    ]  # fmt: skip
    for loss_on in ("assistant", "last", "all"):
        plain = encode(tokenizer, talk("a", "b", "c", "d"), loss_on=loss_on)
        assert plain.weights is None and (plain.labels[1:] == plain.input_ids[1:]) is (loss_on == "all")


@pytest.mark.parametrize(("loss_on", "weight", "message"), [
    ("assistant", 1.0, r"weight 1 .*user \(message 2\).*=assistant trains the assistant's turns only.*loss_on=all\."),
    ("last", 0.5, r"weight 0\.5 .*user \(message 2\).*=last trains the assistant's turns only.*loss_on=all\."),
    ("all", 0.0, r"weight 0 .*user \(message 2\).*every other turn than the assistant's with weight 1.*on=assistant\."),
])  # fmt: skip
def test_a_weight_on_another_turn_is_no_choice(loss_on, weight, message):
    messages = talk("a", "b", "c", "d")
    messages[2]["weight"] = weight
    with pytest.raises(DataError, match=message):
        encode_turns(make_tokenizer(), messages, loss_on=loss_on)
    messages[2]["weight"] = float(loss_on == "all")  # what it has anyway
    assert encode_turns(make_tokenizer(), messages, loss_on=loss_on) == encode_turns(
        make_tokenizer(), talk("a", "b", "c", "d"), loss_on=loss_on
    )


def test_what_is_trained_of_a_rewritten_history():
    """The last turn is one sample, with the others as it sees them; a whole conversation is one, as it is rendered."""
    tokenizer, messages = make_tokenizer(QWEN3), talk("a", "b", "c", "d", "e")
    block = "<think>\n\n</think>\n\n"
    messages[1]["weight"] = 3.0
    samples = encode_turns(tokenizer, messages)
    assert [weighed_texts(tokenizer, s) for s in samples] == [
        [(f"{block}b<|im_end|>", 3.0)], [(f"{block}d<|im_end|>", 1.0)],
    ]  # fmt: skip
    for given in (messages, messages[:4]):
        (sample,) = encode_turns(tokenizer, given, loss_on="last")
        assert supervised_texts(tokenizer, sample) == [f"{block}d<|im_end|>"]
    (whole,) = encode_turns(tokenizer, talk("a", "b", "c"), loss_on="all")
    assert supervised_texts(tokenizer, whole) == [
        "user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    ]
    with pytest.raises(
        DataError, match=r"weighs them.*loss_on=all keeps it one sample.*follow.*Remove 'train'/'weight'"
    ):
        encode_turns(tokenizer, messages, loss_on="all")


def test_a_default_system_prompt_is_rendered_once():
    tokenizer = make_tokenizer(QWEN2)
    encoded = encode(tokenizer, talk("a", "b", "c", "d"))
    assert supervised_texts(tokenizer, encoded) == ["b<|im_end|>", "d<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids).count("Be good.") == 1


def test_llama3_has_one_bos_and_nothing_after_its_end():
    tokenizer = tokenizer_with(
        LLAMA3, "<|start_header_id|>", "<|end_header_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>"
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # it would add a second one
    encoded = encode(tokenizer, talk("a", "  b ", "c", "d", system="s"))
    assert supervised_texts(tokenizer, encoded) == ["b<|eot_id|>", "d<|eot_id|>"]
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.labels[-1] == tokenizer.eos_token_id
    assert prompt_tokens(tokenizer, talk("a", "b")).count(tokenizer.bos_token_id) == 1


def test_gemmas_end_of_turn_is_not_its_end_of_sequence():
    tokenizer = tokenizer_with(GEMMA, "<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>")
    encoded = encode(tokenizer, talk("a", " b ", "c", "d"))
    assert supervised_texts(tokenizer, encoded) == ["b<end_of_turn>", "d<end_of_turn>"]
    with pytest.raises(
        DataError,
        match=r"refused by the chat template: 'System role not supported'.*turns: system, "
        r"user.*move a system text into the first user turn",
    ):
        encode(tokenizer, talk("a", "b", system="s"))
    with pytest.raises(DataError, match=r"must alternate.*turns: user, user"):
        encode(tokenizer, [{"role": "user", "content": "a"}] * 2 + talk("a", "b")[1:])


def test_mistral_has_no_header_for_the_assistant():
    tokenizer = tokenizer_with(MISTRAL, "[INST]", "[/INST]", bos="<s>", eos="</s>")
    encoded = encode(tokenizer, talk("a", "b", "c", "d"))
    assert supervised_texts(tokenizer, encoded) == [" b</s>", " d</s>"]


def test_history_that_is_rewritten_makes_one_sample_per_turn():
    tokenizer = tokenizer_with(MISTRAL_SYSTEM, "[INST]", "[/INST]", bos="<s>", eos="</s>")
    messages = talk("a", "b", "c", "d", system="S")
    with pytest.raises(RewrittenHistoryError, match=r"message 2\).*otherwise once other turns follow.*'.*S.*' against"):
        encode(tokenizer, messages)
    samples = encode_turns(tokenizer, messages)
    assert [tokenizer.decode(sample.input_ids) for sample in samples] == [
        "<s>[INST]S\n\na[/INST]b</s>",
        "<s>[INST]a[/INST]b</s>[INST]S\n\nc[/INST]d</s>",
    ]
    assert [supervised_texts(tokenizer, sample) for sample in samples] == [["b</s>"], ["d</s>"]]


def test_qwen3_strips_the_reasoning_of_earlier_turns():
    tokenizer = make_tokenizer(QWEN3)
    samples = encode_turns(tokenizer, talk("a", "<think>\nhm\n</think>\n\nb", "c", "d"))
    assert [tokenizer.decode(s.input_ids).split("assistant\n", 1)[1] for s in samples] == [
        "<think>\nhm\n</think>\n\nb<|im_end|>\n",
        "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n",
    ]
    assert [supervised_texts(tokenizer, s) for s in samples] == [
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
        ["<think>\n\n</think>\n\nd<|im_end|>"],
    ]


def test_qwen3s_empty_block_carries_no_loss_without_thinking():
    tokenizer = make_tokenizer(QWEN3)
    thinking = encode(tokenizer, talk("a", "b"))
    plain = encode(tokenizer, talk("a", "b"), enable_thinking=False)
    assert thinking.input_ids == plain.input_ids
    assert supervised_texts(tokenizer, thinking) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    assert supervised_texts(tokenizer, plain) == ["b<|im_end|>"]


def test_a_split_conversation_keeps_left_out_turns_out():
    messages = talk("a", "b", "c", "d", "e", "f")
    messages[3]["weight"] = 0
    samples = encode_turns(make_tokenizer(QWEN3), messages, enable_thinking=False)
    assert [supervised_texts(make_tokenizer(), s) for s in samples] == [["b<|im_end|>"], ["f<|im_end|>"]]


def test_what_is_trained_continues_what_is_asked():
    """The tokens before the loss are the prompt that ``encode_question`` asks with."""
    for template, options in ((CHATML, {}), (QWEN2, {}), (QWEN3, {"enable_thinking": False}), (QWEN3, {})):
        tokenizer = make_tokenizer(template)
        sample = encode(tokenizer, talk("a", "b"), **options)
        start = next(t for t, label in enumerate(sample.labels) if label != -100)
        assert prompt_tokens(tokenizer, talk("a", "b"), **options) == sample.input_ids[:start]


def test_a_generation_prompt_that_no_turn_begins_with():
    with pytest.raises(DataError, match=r"message 1\) that doesn't begin with.*<think>.*against.*template_kwargs"):
        encode_turns(make_tokenizer(OPENS_THINKING), talk("a", "b"))


def test_marks_without_the_end_of_turn_get_it():
    template = CHATML.replace("message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
                              "message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}")  # fmt: skip
    assert template != CHATML
    tokenizer = make_tokenizer(template)
    assert supervised_texts(tokenizer, encode(tokenizer, TALK)) == ["two<|im_end|>", " yes\n<|im_end|>"]


def test_marks_that_cover_nothing_are_an_error():
    template = CHATML.replace("message['role'] == 'assistant'", "message['role'] == 'model'")
    with pytest.raises(DataError, match=r"no assistant turn within.*generation.*data.chat_template"):
        encode(make_tokenizer(template), talk("a", "b"))


def test_two_marked_spans_per_turn():
    said = "{{ message['content'] + '<|im_end|>' }}"
    template = CHATML.replace(said, "{{ 'x' }}{% endgeneration %}-{% generation %}" + said)
    tokenizer, messages = make_tokenizer(template), talk("a", "b", "c", "d")
    assert supervised_texts(tokenizer, encode(tokenizer, messages)) == ["x", "b<|im_end|>", "x", "d<|im_end|>"]
    messages[1]["weight"] = messages[3]["weight"] = 0.5
    assert weighed_texts(tokenizer, encode(tokenizer, messages))[0] == ("x", 0.5)
    messages[1]["weight"] = 0  # the spans after the prompt are the last turn's
    assert supervised_texts(tokenizer, encode(tokenizer, messages)) == ["x", "d<|im_end|>"]
    messages[1]["weight"], messages[3]["weight"] = 1, 0
    with pytest.raises(DataError, match=r"2 assistant turns are 4 marked spans.*one span per turn"):
        encode(tokenizer, messages)


@pytest.mark.parametrize("tail, expected", [
    ("<|im_end|>\n<|endoftext|>", "b<|im_end|>"),   # a stopping token ends the turn, whatever follows
    ("\n", "b\n"),                                    # no special token at all: everything counts
    ("<|im_end|> [END]\n", "b<|im_end|>"),           # text behind the stopping token
    ("<|im_start|>\n", "b<|im_start|>"),             # some special token, white space behind it
])  # fmt: skip
def test_where_a_turn_ends(tail, expected):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content if m.role == 'user' else ':' + m.content + '" + tail
        + "' }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )  # fmt: skip
    tokenizer = make_tokenizer(template.replace("\n", "\\n"))
    assert supervised_texts(tokenizer, encode(tokenizer, talk("a", "b", "c", "d")))[0] == expected


def test_an_answer_that_merges_with_its_prompt_is_tokenised_apart():
    """``answer: `` and ``yes`` meet in ``▁yes``, but the model is asked with ``answer:▁`` and has to say ``yes``."""
    template = (
        "{% for m in messages %}{{ 'ask:' + m.content if m.role == 'user' else 'answer: ' + m.content + '</s>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'answer: ' }}{% endif %}"
    )
    tokenizer = word_tokenizer(template)
    encoded = encode(tokenizer, talk("no", "yes"))
    ids, labels = encoded.input_ids, encoded.labels
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "▁yes" in tokenizer.tokenize("answer: yes</s>")
    assert [t for t, label in zip(tokens, labels, strict=True) if label != -100] == ["yes", "</s>"]
    assert ids[:-2] == prompt_tokens(tokenizer, talk("no"))


def merging_tokenizer(template):
    """A byte-level tokenizer that merges two line breaks, and ``⏎⏎`` with ``⏎``."""
    tokenizer = make_tokenizer(template)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] |= {"ĊĊ": 300, "ĊĊĊ": 301}
    core["model"]["merges"] = [["Ċ", "Ċ"], ["ĊĊ", "Ċ"]]
    core["pre_tokenizer"] = {**core["pre_tokenizer"], "use_regex": False}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_the_prompt_that_is_asked_begins_what_is_trained(template):
    """Whatever white space the answers begin with; where nothing merges, the tokens are those of the whole text."""
    tokenizer = merging_tokenizer(template)
    for messages, num_samples in (
        (talk("a", "b", "c", "d"), 1),
        (talk("a", "\n\nb"), 1),
        (talk("a", "b", "c", "\nd"), 1),
        (talk("a", "\nb", "c", "d"), 2),  # the second prompt has the merged token
        (talk("a", "\n", "c", "\n d", "e"), 2),
        (talk("a", " b", "\n", "  d"), 1),
    ):
        samples = encode_turns(tokenizer, messages)
        assert len(samples) == num_samples
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for n, i in enumerate(answers):
            asked = prompt_tokens(tokenizer, messages[:i])
            sample = samples[n if num_samples > 1 else 0]
            assert sample.input_ids[: len(asked)] == asked
            assert sample.labels[len(asked) - 1] == -100 and sample.labels[len(asked)] != -100
            assert supervised_texts(tokenizer, sample)[0 if num_samples > 1 else n] == (
                messages[i]["content"] + "<|im_end|>"
            )
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        assert (samples[-1].input_ids == whole) == (not messages[answers[-1]]["content"].startswith("\n"))
    messages = talk("a", "\nb", "c", "d")
    messages[1]["weight"] = 0  # context, as the next prompt has it
    (sample,) = encode_turns(tokenizer, messages)
    assert sample.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]


def test_an_assistant_that_speaks_first():
    messages = [{"role": "assistant", "content": "Welcome!"}, *talk("Hi", "Hello")]
    for template in (CHATML, CHATML_UNMARKED, ITEMS):
        tokenizer = make_tokenizer(template)
        encoded = encode(tokenizer, messages)
        assert supervised_texts(tokenizer, encoded) == ["Welcome!<|im_end|>", "Hello<|im_end|>"]
        assert tokenizer.decode(encoded.input_ids).startswith(
            "<|im_start|>assistant\nWelcome!<|im_end|>\n<|im_start|>user"
        )
    # Without a turn, there is no default system text, nothing to look at, and no generation prompt within the loop.
    begin, asks, end = CHATML_UNMARKED.partition("{% endfor %}{% if ")
    in_loop = begin + "{% if loop.last and " + end + "{% endfor %}"
    assert asks
    gemma = tokenizer_with(GEMMA, "<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>")
    for tokenizer in (make_tokenizer(QWEN2), make_tokenizer(TOJSON), make_tokenizer(in_loop)):
        with pytest.raises(DataError, match=r"^begins with an assistant turn, for .* prompt.*'weight': 0.*marks"):
            encode_turns(tokenizer, messages)
        encoded = encode(tokenizer, [{**messages[0], "weight": 0}, *messages[1:]])
        assert supervised_texts(tokenizer, encoded) == ["Hello<|im_end|>"]
    with pytest.raises(DataError, match="must alternate"):
        encode_turns(gemma, messages)


def test_no_content_beside_a_tool_call():
    """The turn is trained on exactly what the template writes."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tokenizer = make_tokenizer(ITEMS)
    for content in ({}, {"content": None}, {"content": ""}):
        encoded = encode(tokenizer, [*talk("a"), {"role": "assistant", **content, "tool_calls": [call]}])
        assert supervised_texts(tokenizer, encoded) == ["<function=f><x>1</x></function><|im_end|>"]


def test_half_a_surrogate_pair():
    tokenizer = make_tokenizer(CHATML)
    match = (
        r"^has '\\ud83d', half of a surrogate pair, in 'user\\ncut emoji \\ud83d<\|im_end.*Correct the text or remove"
    )
    with pytest.raises(DataError, match=match.replace("user", ".*user")):
        encode(tokenizer, talk("cut emoji \ud83d", "ok"))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode_question(tokenizer, talk("cut emoji \ud83d"), None)
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode_document(tokenizer, "cut emoji \ud83d", None, 9)
    with pytest.raises(DataError, match="half of a surrogate pair"):
        tokens_of(tokenizer, "\udc00")


def test_the_first_token_carries_no_loss():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    encoded = encode(make_tokenizer(template), [{"role": "assistant", "content": "ab"}])
    ids, labels = encoded.input_ids, encoded.labels
    assert labels == [-100, ids[1]]


def test_prompts_end_before_the_answer():
    tokenizer = make_tokenizer(CHATML)
    asked = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_tokens(tokenizer, talk("a", "b"))) == asked
    assert tokenizer.decode(prompt_tokens(tokenizer, talk("a"))) == asked
    longer = tokenizer.decode(prompt_tokens(tokenizer, talk("a", "b", "c", "d")))
    assert longer == asked + "b<|im_end|>\n" + asked.replace("a<", "c<")
    assert tokenizer.decode(prompt_tokens(tokenizer, talk("a", "b", "c"))) == longer
    with pytest.raises(DataError, match=r"no turn before the answer.*Add the question"):
        prompt_tokens(tokenizer, [{"role": "assistant", "content": "a"}])


def test_no_chat_template_and_no_fast_tokenizer():
    with pytest.raises(DataError, match=r"has no chat template.*chat_template\.jinja.*data\.chat_template"):
        encode(make_tokenizer(None), talk("a", "b"))


def test_template_arguments_are_checked():
    check_template(make_tokenizer(QWEN3), {"enable_thinking": False})
    with pytest.raises(
        DataError, match=r"has enable_thinkin, which the chat template doesn't use; it knows enable_thinking"
    ):
        check_template(make_tokenizer(QWEN3), {"enable_thinkin": False})
    with pytest.raises(DataError, match="it knows no arguments"):
        check_template(make_tokenizer(CHATML), {"enable_thinking": False})


def test_broken_and_ambiguous_templates_are_told():
    with pytest.raises(DataError, match=r"is not a jinja template: .*'oops'.* in line 2\. Correct it"):
        check_template(make_tokenizer("{# #}\n{% oops %}"), {})
    tokenizer = make_tokenizer({"rag": CHATML, "tool_use": CHATML})
    for use in (lambda: check_template(tokenizer, {}), lambda: encode(tokenizer, talk("a", "b"))):
        with pytest.raises(
            DataError, match=r"has the chat templates rag, tool_use, none of which is the default\. Set data"
        ):
            use()
    assert encode(make_tokenizer({"rag": "", "default": CHATML}), talk("a", "b")) == encode(
        make_tokenizer(CHATML), talk("a", "b")
    )


def test_template_files(tmp_path):
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text(CHATML)
    bad.write_text("{% for %}")
    assert load_template(str(good)) == CHATML
    with pytest.raises(DataError, match=r"bad\.jinja is not a jinja template: .* in line 1"):
        load_template(str(bad))
    with pytest.raises(DataError, match=r"none\.jinja can't be read.*path of a jinja file"):
        load_template(str(tmp_path / "none.jinja"))


def test_a_template_that_writes_the_date():
    tokenizer = make_tokenizer("{% if not date_string %}{% set date_string = strftime_now('%d') %}{% endif %}" + CHATML)
    assert renders_date(tokenizer, {}) and not renders_date(tokenizer, {"date_string": "1"})
    assert not renders_date(make_tokenizer(CHATML), {})
