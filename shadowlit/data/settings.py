"""The data section of a configuration: its keys, their defaults, and the check that they are consistent."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from shadowlit.arguments import fits, takes_plain_values
from shadowlit.data.conversation import raise_all
from shadowlit.data.custom_formats import find_format
from shadowlit.data.formats import Samples
from shadowlit.data.given import Given, Source, values_of
from shadowlit.data.packing import Packing
from shadowlit.data.preference_formats import PREFERENCES
from shadowlit.data.template import LossOn
from shadowlit.data.tokenise import Overlong
from shadowlit.errors import DataError, wrong_names
from shadowlit.pair.pair import ModelPair

_RESERVED = ("train", "predict")
_LEAST = {
    "max_length": 2, "batch_size": 1, "eval_batch_size": 1, "prefetch": 1, "stream_window": 1, "seed": 0,
    "num_workers": 0, "limit_train_samples": 1, "pad_to_multiple_of": 1,
}  # fmt: skip
_NULLABLE = ("num_workers", "limit_train_samples", "pad_to_multiple_of")


_FIELDS = tuple(field.name for field in fields(Source))
_EXPECTED = {
    "path": "a path or the name of a data set",
    "format": "the name of a format",
    "columns": "a mapping of names, e.g. {prompt: question}",
    "ignore_columns": "a list of names",
    "weight": "a number above 0",
    "max_rows": "a whole number of at least 1",
}


@takes_plain_values("data")
@dataclass(eq=False)
class DataSettings:
    """The settings of a data module.

    Args:
        pair: Model pair. Its Instruct provides the tokenizer and the chat template.
        train: Training source, or a list of sources. A source, here and below, is a path, or a mapping of ``path`` and
            any of ``format``, ``columns``, ``ignore_columns``, ``max_rows`` and, in a list of training sources,
            ``weight``. Sources without weights are concatenated. With weights, an epoch has samples of each source in
            proportion to its weight, and ends when the first source has been used up once; see
            ``docs/reference/data.md``.
        validation: Validation sources by name. The names appear in the metrics. A single source is named ``val``.
        test: Test sources by name, for the command test. A single source is named ``test``.
        predict: Source of the prompts for the command predict. Its rows need no answer; an assistant turn at the end
            of a row is treated as the answer and removed.
        format: Format of the sources that name none. messages has columns role and content; sharegpt has conversations
            with from and value; alpaca has instruction, input and output; prompt_completion has prompt and completion;
            text has documents, which are trained on as they are, each followed by the Base's end-of-text token. auto
            detects one of these by the columns of each source. A format of your own is the import path of a function
            (``package.module.function``), or the name of an entry point in the group ``shadowlit.formats``; see
            :mod:`shadowlit.data.custom_formats`. Preference data have formats of their own, which are always
            detected; see :mod:`shadowlit.data.preference_formats`.
        columns: Names of the columns that a format reads, each with the name that the sources have for it, e.g.
            ``{prompt: question, completion: answer}``.
        ignore_columns: Columns and fields of turns that are deliberately left out, as shell patterns, e.g.
            ``[id, "meta_*", messages.timestamp]``. Anything else that has content and doesn't reach the model is an
            error.
        on_bad_row: Treatment of rows that are malformed or can't be used: error stops, after all rows have been
            checked, and lists them; skip leaves them out, counts them in the report and lists them.
        samples: Kind of sample that a row holds: conversations, contexts (conversations with a context for a teacher),
            pairs (a chosen and a rejected answer) or labels (answers that are desirable or not). The command line takes
            it from ``model.objective``.
        max_length: Maximum length of a sample, in tokens.
        overlong: Treatment of samples that are longer: truncate keeps their beginning, drop leaves them out, error
            stops. Documents are split into pieces instead. Prompts of ``predict`` are never truncated; one that is
            too long is an error.
        drop_unsupervised: Leave out samples without a supervised token. Otherwise such a sample is an error.
        packing: How training samples share a row without attending to each other. padding_free concatenates the
            samples of each batch, so that there is no padding; a step has the same samples as without packing.
            best_fit fills rows of ``pack_length`` tokens with whole samples, so that all steps have about the same
            size. null gives every sample a padded row. Packing needs a model that separates samples by their
            ``position_ids``; other models are refused.
        pack_length: Capacity of a best_fit row, in tokens; at least ``max_length``. null is ``max_length``, or twice
            that for preferences, whose samples have two sequences.
        group_by_length: Without packing, build batches of samples of similar length, which reduces padding.
        batch_size: Training rows per rank and micro-batch: samples, or rows packed by best_fit. The effective batch is
            this × ranks × accumulate_grad_batches.
        eval_batch_size: Rows per rank and batch in validation, test and predict; null is ``batch_size``.
        drop_last: Leave out an incomplete last batch of an epoch. Otherwise it is trained on, weighted by its size.
        shuffle: Draw a new order for every epoch, from the seed and the epoch.
        seed: Seed for the order of the samples and for the choice of ``limit_train_samples``. On the command line, 0
            stands for seed_everything.
        limit_train_samples: Number of training rows to use: the first of a permutation drawn from the seed, so a
            smaller choice is part of each larger one. null uses all rows.
        streaming: Read the training data during the training instead of tokenising everything at the start. Sources
            are JSON lines, Parquet, or what ``datasets`` can stream. ``stream_window`` rows at a time are read,
            tokenised, shuffled and packed; passes over the data repeat until ``trainer.max_steps``, which must be
            set. Checkpoints include the position in the stream.
        stream_window: Rows in a window of a stream: the number held in memory, and the furthest that shuffling moves a
            row.
        loss_on: The turns that are trained on: all of the assistant's, its last one, or the whole conversation (all).
            A turn's ``weight`` multiplies the loss of its tokens, and ``train: false`` leaves it out. Documents are
            always trained on whole. See docs/reference/data.md.
        system: System prompt for conversations that have none.
        chat_template: Path of a Jinja file that replaces the Instruct's chat template.
        template_kwargs: Arguments for the chat template, e.g. ``{enable_thinking: false}``.
        pad_to_multiple_of: Multiple to which the length of every batch is rounded up, e.g. 64 for compiled layers.
        cache: Store tokenised data in files. Otherwise every process tokenises them at every start and keeps them in
            memory.
        cache_dir: Folder for these files, which can be deleted at any time; null is ``shadowlit`` in the cache folder
            of ``datasets``.
        num_workers: Worker processes per data loader; 0 prepares batches in the training process. null is two where
            the batches go to a GPU, and 0 elsewhere.
        prefetch: Batches that each worker prepares in advance.

    Attributes:
        train_sources: Sources of the training data, in order.
        validation_sets: Source of each validation set, by the set's name.
        test_sets: Source of each test set, by the set's name.
        predict_source: Source of the prompts, or None.
        row_capacity: Tokens that a row packed by best_fit has room for.
        eval_rows: Rows per rank and batch in validation, test and predict.

    Raises:
        DataError: Settings that can't work, all of them in one message.
    """

    pair: ModelPair
    train: Given | list[Given] | None = None
    validation: Given | dict[str, Given] | None = None
    test: Given | dict[str, Given] | None = None
    predict: Given | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None
    ignore_columns: list[str] | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    samples: Samples = "conversations"
    max_length: int = 4096
    overlong: Overlong = "truncate"
    drop_unsupervised: bool = False
    packing: Packing | None = None
    pack_length: int | None = None
    group_by_length: bool = False
    batch_size: int = 8
    eval_batch_size: int | None = None
    drop_last: bool = False
    shuffle: bool = True
    seed: int = 0
    limit_train_samples: int | None = None
    streaming: bool = False
    stream_window: int = 10_000
    loss_on: LossOn = "assistant"
    system: str | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None
    cache: bool = True
    cache_dir: str | None = None
    num_workers: int | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Fill in what depends on other settings, and check them."""
        self._wrong_sources: list[str] = []
        self.train = [] if self.train is None else self.train if isinstance(self.train, list) else [self.train]
        keys = ["data.train"] if len(self.train) == 1 else [f"data.train[{i}]" for i in range(len(self.train))]
        self.train_sources = [self._source(*each) for each in zip(self.train, keys, strict=True)]
        self.validation, self.test = sets_by_name(self.validation, "val"), sets_by_name(self.test, "test")
        self.validation_sets = {n: self._source(one, f"data.validation.{n}") for n, one in self.validation.items()}
        self.test_sets = {name: self._source(one, f"data.test.{name}") for name, one in self.test.items()}
        self.predict_source = None if self.predict is None else self._source(self.predict, "data.predict")
        if self.pack_length is None:
            self.pack_length = self.max_length * (2 if self.samples in PREFERENCES else 1)
        if self.eval_batch_size is None:
            self.eval_batch_size = self.batch_size
        self.row_capacity, self.eval_rows = self.pack_length, self.eval_batch_size
        self.template_kwargs = dict(self.template_kwargs or {})
        raise_all(list(self._problems()))

    def wanted(self, stage: str | None) -> list[tuple[str, list[Source], str]]:
        """Name, sources and use of each set that a command tokenises; a stream and prompts are not among them.

        Args:
            stage: fit, validate, test or predict; None for all sets that are configured.
        """
        wanted: list[tuple[str, list[Source], str]] = []
        if stage in ("fit", None) and self.train_sources and not self.streaming:
            wanted.append(("train", self.train_sources, "train"))
        if stage in ("fit", "validate", None):
            wanted += [(f"val/{name}", [source], "validation") for name, source in self.validation_sets.items()]
        if stage in ("test", None):
            wanted += [(f"test/{name}", [source], "test") for name, source in self.test_sets.items()]
        return wanted

    @property
    def is_mixed(self) -> bool:
        """Whether the training sources have weights."""
        return any(source.weight is not None for source in self.train_sources)

    def _source(self, given: Given, key: str) -> Source:
        """The source that a user gave for a key, with the defaults of all sources; problems are noted."""
        found, wrong = _read_source(given, key)
        self._wrong_sources += wrong
        if found.weight is not None and not key.startswith("data.train"):
            self._wrong_sources.append(
                f"{key}.weight is {found.weight}, but only training sources are mixed. Remove it."
            )
        return replace(
            found,
            format=self.format if found.format is None else found.format,
            columns=self.columns if found.columns is None else found.columns,
            ignore_columns=self.ignore_columns if found.ignore_columns is None else found.ignore_columns,
        )

    def _problems(self) -> Iterator[str]:
        yield from self._wrong_sources
        unweighted = [i for i, source in enumerate(self.train_sources) if source.weight is None]
        if self.is_mixed and unweighted and not self._wrong_sources:
            yield (
                f"data.train[{unweighted[0]}] ({self.train_sources[unweighted[0]]}) has no weight, but others have "
                "one. Give each training source a weight, or none."
            )
        if self.streaming and self.samples == "contexts":
            yield (
                "data.streaming is true, but model.objective needs the contexts of a teacher, which are read as a "
                "whole. Set data.streaming=false."
            )
        if self.streaming and self.samples in PREFERENCES:
            yield (
                "data.streaming is true, but model.objective learns from preferences, which the untouched model scores "
                "before the training, so that they are read as a whole. Set data.streaming=false."
            )
        if self.loss_on == "all" and self.samples == "contexts":
            yield (
                "data.loss_on is all, but the teacher of model.objective sees a context that the student doesn't, so "
                "only answers can be compared. Set data.loss_on=assistant."
            )
        if self.loss_on == "all" and self.samples in PREFERENCES:
            yield (
                "data.loss_on is all, but model.objective learns from preferences, whose prompts are not trained on. "
                "Set data.loss_on=assistant."
            )
        if self.streaming and self.limit_train_samples is not None:
            yield (
                f"data.limit_train_samples is {self.limit_train_samples}, a choice among all rows, which a stream "
                "doesn't know. Unset it and limit trainer.max_steps, or set data.streaming=false."
            )
        yield from self._problems_of_numbers()
        if self.group_by_length and self.packing is not None:
            yield f"data.group_by_length spares padding, of which data.packing={self.packing} leaves none. Unset one."
        if self.group_by_length and not self.shuffle:
            yield "data.group_by_length makes an order of its own, but data.shuffle is false. Unset one of them."
        for kind, names in (("validation", self.validation_sets), ("test", self.test_sets)):
            yield from wrong_names(f"data.{kind}", names)
            for name in names:
                if name in _RESERVED:
                    yield f"data.{kind} has the name '{name}', which is used already. Rename it."
        yield from _problems_of_format(self.format, "data.format")

    def _problems_of_numbers(self) -> Iterator[str]:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            is_copy = name == "eval_batch_size" and value == self.batch_size
            if value is not None and value < least and not is_copy:
                yield f"data.{name} is {value}; expected at least {least}{', or null' if name in _NULLABLE else ''}."
        if self.row_capacity < self.max_length:
            yield (
                f"data.pack_length is {self.row_capacity}, but a sample may have data.max_length={self.max_length} "
                "tokens. Raise the one or lower the other."
            )


def sets_by_name(sets: Given | dict[str, Given] | None, name: str) -> dict[str, Given]:
    """Return the sources that a user gave, by the names of their sets; a single one is named ``name``."""
    if sets is None:
        return {}
    if isinstance(sets, Mapping) and not ("path" in sets and sets.keys() <= set(_FIELDS)):
        return dict(sets)
    return {name: sets}


def _read_source(given: Any, key: str) -> tuple[Source, list[str]]:
    """The source that a user gave, as far as it can be used, and what is wrong with it."""
    values = values_of(given)
    if "path" not in values:
        others = ", ".join(name for name in _FIELDS if name != "path")
        problem = f"{key} is {given!r}; expected a path, or a mapping of path and any of {others}. Add the path."
        return Source(""), [problem]
    kinds, wrong = typing.get_type_hints(Source), []
    for name in [name for name in values if name not in _FIELDS]:
        near = difflib.get_close_matches(str(name), _FIELDS, n=1)
        wrong.append(
            f"{key} has the key {name!r}; expected some of {', '.join(_FIELDS)}. "
            + (f"Did you mean {near[0]}?" if near else "Remove it.")
        )
        del values[name]
    for name, value in list(values.items()):
        is_number = name in ("weight", "max_rows") and value is not None
        if not fits(value, kinds[name]) or value == "" or (is_number and not 0 < value < math.inf):
            null = "" if name == "path" else ", or null"
            wrong.append(f"{key}.{name} is {value!r}; expected {_EXPECTED[name]}{null}.")
            del values[name]
    if values.get("format") is not None:
        wrong += _problems_of_format(values["format"], f"{key}.format")
    return Source(**{"path": "", **values}), wrong


def _problems_of_format(format: str, key: str) -> list[str]:
    try:
        find_format(format)
    except DataError as error:
        return [str(error).replace("data.format", key)]
    return []
