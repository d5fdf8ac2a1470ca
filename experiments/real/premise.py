"""The premise of the method: is the untouched Base better than its Instruct, and less shaken by other wordings?

arXiv 2601.13244 reports that Bases beat their Instructs on some tasks, and that Instructs lose more on perturbed copies
of the questions. Here: losses of reference solutions, with and without examples, on rows and on their copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.real.rows import Row
from experiments.real.score import Scorer
from shadowlit.data.template import Encoded
from shadowlit.harness.perturbations import PERTURBATIONS, perturb

SHOTS = (0, 2)
AS_IS = "as they are"


def copies(rows: Sequence[Row]) -> dict[str, list[tuple[int, str, str]]]:
    """Number, question and solution of rows of one turn, as they are and perturbed; not every row has every copy."""
    texts = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]
    found = {AS_IS: [(number, *text) for number, text in enumerate(texts)]}
    for kind in PERTURBATIONS:
        found[kind] = []
        for number, (question, answer) in enumerate(texts):
            new = perturb(kind, {"question": question, "answer": answer}, "question", 0, number)
            if new is not None:
                found[kind].append((number, new["question"], new["answer"]))
    return found


def encoded(tokenizer: Any, examples: Sequence[tuple[str, str]], question: str, answer: str, chat: bool) -> Encoded:
    """A question after its examples as turns, or as plain text; the solution is supervised, with its end of turn."""
    if chat:
        turns = [
            {"role": role, "content": text}
            for one in (*examples, (question, ""))
            for role, text in zip(("user", "assistant"), one, strict=True)
        ]
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        ending = "<end_of_turn>"
    else:
        shown = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples]
        prompt = (tokenizer.bos_token or "") + "".join(shown) + f"Question: {question}\nAnswer:"
        ending = "\n\n"
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    # The space is part of the first word's token: alone at the prompt's end, it would be one that no text has there.
    after = tokenizer(("" if chat else " ") + answer.strip() + ending, add_special_tokens=False).input_ids
    return Encoded([*before, *after], [-100] * len(before) + after)


def measure(scorer: Scorer, rows: Sequence[Row], examples: Sequence[Row]) -> dict[str, list[list[float]]]:
    """Scores of the scorer's model by form, number of examples and copy: of each row its number, and the row's columns.

    Args:
        scorer: Has the model's weights.
        rows: Held-out rows of one turn.
        examples: Other rows; the first ones are the examples.
    """
    shown = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in examples[: max(SHOTS)]]
    found = {}
    for name, texts in copies(rows).items():
        for shots in SHOTS:
            for chat in (True, False):
                key = f"{'chat' if chat else 'plain'}/{shots}/{name}"
                scorer.rows[key] = [
                    encoded(scorer.tokenizer, shown[:shots], question, answer, chat) for _, question, answer in texts
                ]
                scores = scorer.measure(key, divergence=False)
                found[key] = [[number, *score] for (number, _, _), score in zip(texts, scores, strict=True)]
    return found
