"""Prints samples token by token, to show which tokens are supervised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from shadowlit.data.context_batches import ContextDataset
from shadowlit.data.conversation import IGNORE_INDEX, some_of
from shadowlit.data.dataset import DataReport
from shadowlit.data.module import ShadowData
from shadowlit.data.preference import PreferenceDataset
from shadowlit.errors import DataError, counted
from shadowlit.progress import make_console, make_table

# Two shades each, to distinguish neighbouring tokens.
_SUPERVISED = ("black on green", "black on bright_green")
_UNSUPERVISED = ("", "dim")
_LABELS = {True: ("desirable", "answer to another prompt"), False: ("undesirable", "answer to another prompt")}


def preview(data: ShadowData, split: str = "train", num_samples: int = 3, console: Console | None = None) -> None:
    """Print the first samples of a set, a legend, and a table of the sets that were read.

    Supervised tokens are green; without colours (``NO_COLOR``, a file, a pipe) they are enclosed in ⟦ ⟧. Special tokens
    are printed as they are, and a line break as ⏎.

    Args:
        data: Data module; it is read if it hasn't been.
        split: ``train``, ``predict``, ``val/<set>``, ``test/<set>``, or the name of a set alone (validation first).
        num_samples: Number of samples to print.
        console: Console to print to; None for standard output.

    Raises:
        DataError: There is no such set, or the data can't be used.
    """
    console = console or make_console()
    data.setup(_stage(data, split))
    dataset = data.prompts if split == "predict" else data.dataset(split)
    assert dataset is not None
    coloured = console.color_system is not None and not console.no_color
    for index in range(min(num_samples, len(dataset))):
        sequences: dict[str, dict[str, Any]]
        if isinstance(dataset, PreferenceDataset):
            (pair,) = dataset[index]
            names = ("chosen", "rejected") if data.samples == "pairs" else _LABELS[pair["desirable"]]
            sequences = dict(zip(names, pair["answers"], strict=True))
        elif isinstance(dataset, ContextDataset):
            sequences = {"student": dataset[index], "teacher": dataset[index]["teacher"]}
        else:
            sequences = {"": dataset[index]}
        for what, sample in sequences.items():
            tokens = sample["input_ids"]
            labels = sample.get("labels", [IGNORE_INDEX] * len(tokens))
            supervised = [t for t, label in enumerate(labels) if label != IGNORE_INDEX]
            head = f"{dataset.origin(index)}{what and ', '}{what}: "
            head += f"{counted(len(tokens), 'token')}, {len(supervised)} supervised"
            if "loss_weights" in sample:
                counts = Counter(sample["loss_weights"][t] for t in supervised)
                head += f" ({', '.join(f'{count} with weight {weight:g}' for weight, count in counts.items())})"
            # A rule would cut off a long path and the numbers after it.
            console.print(Text(f"── {head}", style="bold"), soft_wrap=True)
            console.print(render_sample(data.tokenizer, tokens, labels, coloured), soft_wrap=False)
    console.print(_legend(coloured))
    console.print(_table(data.reports.values()))
    for report in data.reports.values():
        if report.skipped:
            console.print(Text(f"rows of {report.name} that are left out:{some_of(report.skipped)}"), soft_wrap=True)


def render_sample(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int], coloured: bool = True
) -> Text:
    """Return a tokenised sample as text in which supervised tokens are coloured, or else enclosed in ⟦ ⟧.

    ``input_ids`` and ``labels`` are ``[T]``, with -100 for unsupervised tokens.
    """
    text = Text()
    pieces = token_texts(tokenizer, input_ids)
    for supervised, run in groupby(range(len(pieces)), key=lambda i: labels[pieces[i][1]] != IGNORE_INDEX):
        if supervised and not coloured:
            text.append("⟦")
        for i in run:
            styles = _SUPERVISED if supervised else _UNSUPERVISED
            text.append(pieces[i][0].replace("\n", "⏎\n"), style=styles[i % 2] if coloured else "")
        if supervised and not coloured:
            text.append("⟧")
    return text


def token_texts(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> list[tuple[str, int]]:
    """Return the text of every token; tokens that share a character, as those of an emoji do, are joined.

    Returns:
        Pairs of a text and the index of the last token in it; the concatenated texts are the whole text.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts: list[tuple[str, int]] = []
    # Tokens are decoded together with the one before, since some tokenizers drop the leading space of the first.
    before: list[int] = []
    pending: list[int] = []
    for i, token in enumerate(input_ids):
        pending.append(token)
        whole, known = str(decode(before + pending)), str(decode(before))
        piece = whole[len(known) :]
        if piece.endswith("\ufffd") and len(pending) < 4 and i + 1 < len(input_ids):
            continue
        texts.append((piece, i))
        before, pending = pending, []
    return texts


def _stage(data: ShadowData, split: str) -> str:
    """The command that reads a split."""
    stages = {name: stage for name, stage in (("train", "fit"), ("predict", "predict")) if getattr(data, name)}
    stages |= {f"val/{name}": "validate" for name in data.validation_names}
    stages |= {f"test/{name}": "test" for name in data.test_names}
    for name in (split, f"val/{split}", f"test/{split}"):
        if name in stages:
            return stages[name]
    raise DataError(
        f"there is no data set '{split}' to preview; the configuration has: {', '.join(stages) or 'none'}. "
        "Choose one of these with --split, or add it to data."
    )


def _legend(coloured: bool) -> Text:
    if not coloured:
        return Text("⟦supervised⟧ unsupervised, ⏎ line break")
    text = Text()
    text.append("supervised", style=_SUPERVISED[0]).append(" ").append("next token", style=_SUPERVISED[1])
    text.append("  unsupervised ").append("next token", style=_UNSUPERVISED[1])
    return text.append("  ⏎ line break")


def _table(reports: Iterable[DataReport]) -> Table:
    """A table with a line for each set that was read, and lines for its sources where it has several."""
    found = list(reports)
    headings = ["set", "rows", "samples", "tokens", "supervised", "longest", "lost"]
    is_mixed = any(report.drawn is not None for report in found)
    if is_mixed:
        headings.insert(3, "per epoch")
    table = make_table(*headings, title="data sets", title_justify="left")
    table.columns[-1].justify = "left"
    for whole in found:
        for report in (whole, *whole.sources):
            numbers = [f"{n:,}" for n in (report.num_rows, report.num_samples, report.num_tokens)]
            if is_mixed:
                part = 100 * report.samples_per_epoch / max(1, whole.samples_per_epoch)
                numbers.insert(2, f"{report.samples_per_epoch:,} ({part:.1f} %)")
            share = f"{report.num_supervised_tokens:,} ({100 * report.supervised_share:.1f} %)"
            table.add_row(report.name, *numbers, share, f"{report.longest:,}", report.lost or "nothing")
    return table
