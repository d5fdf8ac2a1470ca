"""Whatever a template does wrong is an error that says so, and never ends a run with a traceback."""

import threading
import time

import pytest

from shadowlit import limits
from shadowlit.data import rendering
from shadowlit.data.conversation import Conversation, FatalDataError, collect
from shadowlit.data.rendering import check_template
from shadowlit.data.template import encode, encode_question, encode_turns, render_prompt
from shadowlit.errors import DataError
from tests.data.templates import talk
from tests.tiny import CHATML, make_tokenizer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% if j < 0 %}x{% endif %}{% endfor %}{% endfor %}"


def broken(source):
    return make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}" + source)


@pytest.mark.parametrize("source, reason", [
    ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
    ("{{ '{}'.format_map(1) }}", "TypeError: format_map"),
    ("{{ messages[0].content.encode('ascii') }}{{ 'é'.encode('ascii') }}", "UnicodeEncodeError: 'ascii' codec"),
    ("{{ {}.pop('key') }}", "KeyError: 'key'"),
    ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ("{{ [].index(1) }}", "ValueError: 1 is not in list"),
    ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth exceeded"),
    ("{{ none.a.b }}", "'None' has no attribute 'a'"),
    ("{{ messages[0].content.__class__.a }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ raise_exception('not that') }}", "'not that' "),
])  # fmt: skip
def test_an_exception_of_a_template(source, reason):
    tokenizer = broken(source)
    for function in (encode, encode_turns, render_prompt):
        with pytest.raises(DataError, match=rf"^is refused by the chat template: .*{reason}.*its turns: user.*Set|set"):
            function(tokenizer, talk("a", "b"))
    with pytest.raises(DataError, match="is refused by the chat template"):
        encode_question(tokenizer, talk("a"), None)


def test_arguments_nested_too_deep():
    deep: dict = {}
    for _ in range(600):
        deep = {"a": deep}
    messages = talk("a", "b")
    messages[1]["note"] = deep
    with pytest.raises(DataError, match=r"chat template: 'RecursionError|doesn't write"):
        encode(make_tokenizer(CHATML), messages)


def test_a_template_that_does_not_parse_and_named_ones():
    with pytest.raises(DataError, match=r"the chat template is not a jinja template: .* in line 1"):
        encode(make_tokenizer("{% for %}"), talk("a", "b"))
    with pytest.raises(DataError, match=r"the chat template of the Instruct is not a jinja template: .* in line 1"):
        check_template(make_tokenizer("{% for %}"), {})
    named = make_tokenizer(CHATML)
    named.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(DataError, match=r"has the chat templates rag, tool_use, none of which is the default"):
        encode(named, talk("a", "b"))
    named.chat_template = {"tool_use": CHATML.replace("endfor %}", "endfor %}{{ tools | tojson }}"), "default": CHATML}
    plain = encode(named, talk("a", "b"))
    assert plain == encode(make_tokenizer(CHATML), talk("a", "b"))
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert len(encode(named, talk("a", "b"), tools=tools).input_ids) > len(plain.input_ids)


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    """In the main thread by a timer, elsewhere by waiting; and no further row is tried."""
    monkeypatch.setattr(limits, "TIME_LIMIT_S", 0.05)
    tokenizer = broken(ENDLESS)
    rows = [Conversation(talk("a", "b"), "rows.jsonl", number) for number in range(1000)]
    errors = []

    def read():
        try:
            collect(lambda row: encode_turns(tokenizer, row.messages), rows)
        except FatalDataError as error:
            errors.append(str(error))

    start = time.perf_counter()
    read()
    thread = threading.Thread(target=read)
    # Here the endless rendering can't be stopped; a short one takes its place.
    monkeypatch.setattr(rendering, "render_jinja_template", lambda **_: time.sleep(0.3))
    thread.start()
    thread.join()
    assert time.perf_counter() - start < 2
    assert errors == [
        "sample 0 of rows.jsonl is not rendered by the chat template within 0.05 s (its turns: user, assistant), as if "
        "the template never ended. Correct its loops, or set data.chat_template to another template."
    ] * 2  # fmt: skip


def test_the_timer_is_left_as_it_was():
    import signal

    def handler(*_):
        raise AssertionError

    before = signal.signal(signal.SIGVTALRM, handler)
    try:
        encode(make_tokenizer(CHATML), talk("a", "b"))
        assert signal.getsignal(signal.SIGVTALRM) is handler and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 1000)  # another's, which is left alone
        encode(make_tokenizer(CHATML), talk("a", "b"))
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
