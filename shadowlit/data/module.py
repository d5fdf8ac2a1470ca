"""ShadowData: from the configuration's data section to loaders."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from shadowlit.data.blocks import Block, read_blocks, write_blocks
from shadowlit.data.cache import cache_key, default_folder
from shadowlit.data.collate import Collate, PackCollate, PromptCollate
from shadowlit.data.conversation import Conversation, raise_all
from shadowlit.data.dataset import (
    DataReport,
    Overlong,
    PackedDataset,
    PromptDataset,
    TokenDataset,
    count_shared,
    tokenise,
    tokenise_prompts,
)
from shadowlit.data.document import encode_document
from shadowlit.data.formats import DOCUMENT, Format, Message, Samples
from shadowlit.data.images import ImageCollate, ImageProcessing
from shadowlit.data.loader import ResumableLoader, make_loader
from shadowlit.data.packing import PackedOrder, Packing
from shadowlit.data.preference import PreferenceCollate, PreferenceDataset
from shadowlit.data.sampler import Order, ShardedBatchSampler, count_slots, epoch_order, evaluation_order, grouped_order
from shadowlit.data.sources import (
    digest_source,
    fetch,
    folder_of,
    is_remote,
    read_conversations,
    say,
    stream_conversations,
)
from shadowlit.data.stream import StreamLoader, TokenStream
from shadowlit.data.template import Encoded, check_template, encode_question, encode_turns, load_template, renders_date
from shadowlit.errors import DataError, PairError
from shadowlit.pair.pair import ModelPair

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_GPU_WORKERS = 2  # the training process launches kernels, which nothing should interrupt
_LITTLE_FILL = 0.7  # share of tokens in the batches below which the log says what would spare padding

# A stream's loader has the length of the training, and one worker at most.
warnings.filterwarnings("ignore", message=r"Your `IterableDataset` has `__len__` defined")


class ShadowData(LightningDataModule):
    """Conversations, tokenised with the Instruct's chat template, loss on the assistant's turns; or plain text.

    Rows may have images where the pair is one of vision-language models (see :mod:`shadowlit.data.formats`). Paths
    begin in the folder of the data file; images are opened when a batch is put together.

    A source is a ``.json``, ``.jsonl`` or ``.parquet`` file, a folder that ``datasets`` can read, or a data set of
    the hub: ``org/name[/config][@revision][:split]``. Without ``:split`` the only split is read, or the one called
    train, validation or test after its use. Files have no splits.

    What a command needs is read and tokenised when it starts, by one process of each machine, and kept in an Arrow
    file under a key of all that the tokens depend on: the sources' content, the settings, the tokenizer with its
    template, and the code. The next start maps that file into memory, where it takes no room but the system's own
    cache; five bytes a token on the disk, and 45 a sample. The first start holds the sources in memory.

    Needs ``trainer.use_distributed_sampler: false``; the loaders shard by themselves, without duplicates and with
    equally many batches on every rank, and the position in the training data is part of each checkpoint.

    Example::

        data = ShadowData(pair, train="train.jsonl", validation={"new": "new.jsonl", "old": "old.jsonl"})

    Args:
        pair: Its Instruct gives tokenizer and chat template.
        train: Source, or several that are joined.
        validation: Sources by name; the names appear in the metrics. A plain source is named ``val``.
        test: As ``validation``, for the command test. A plain source is named ``test``.
        predict: Source of prompts for the command predict. Rows need no answer; an assistant turn at the end of a
            row is taken for the answer and left out.
        format: Format of all sources: messages (role, content), sharegpt (conversations with from, value), alpaca
            (instruction, input, output), prompt_completion, or text (documents, trained on as they are, each with the
            end of text of the Base's pre-training); auto recognises each source by its columns. Preferences have
            formats of their own, see :mod:`shadowlit.data.preference`.
        samples: What a row holds: conversations, pairs (of answers) or labels (labelled answers). Comes from
            ``model.objective``.
        max_length: Longest sample, in tokens.
        overlong: What happens to longer samples: truncate keeps their beginning, drop leaves them out, error stops.
            Documents are cut into pieces instead.
            Prompts of ``predict`` are never cut; one that is too long is an error.
        drop_unsupervised: Leave out samples without a token with loss, instead of stopping.
        packing: How training samples share a row, without seeing each other. padding_free puts the samples of each
            batch one behind the other, so that none is padded: the same samples per step as without. best_fit fills
            rows of ``pack_length`` tokens with whole samples, so that all steps are about equally large. null for one
            padded row per sample. Needs a model that takes ``position_ids`` for the borders; others are refused.
        pack_length: Most tokens of a row that best_fit fills; null for ``max_length``, which it may not fall short of;
            twice that for preferences, which have two sequences.
        group_by_length: Without packing, train on batches of about equally long samples, which spares padding.
        batch_size: Training rows per rank and step of the loop, samples or best_fit's packs; × ranks ×
            accumulate_grad_batches is the effective batch.
        eval_batch_size: The same for validation, test and predict; null for ``batch_size``.
        drop_last: Leave an incomplete last batch of an epoch out; else it is trained on, and weighs what it holds.
        shuffle: Train in a new order every epoch, drawn from the seed and the epoch.
        seed: Of the order, and of the choice of ``limit_train_samples``.
        limit_train_samples: Train on so many rows only: the first of a permutation drawn from the seed, so a smaller
            choice is part of each larger one. Null for all.
        streaming: Read the training data as the training goes on, instead of tokenising all of them at the start:
            JSON lines, Parquet, or what ``datasets`` streams. ``stream_window`` rows are read, tokenised, shuffled
            and packed at a time, and a pass over the data follows the other until ``trainer.max_steps``, which is
            needed, is reached. The position is part of each checkpoint.
        stream_window: Rows of a window: what is held in memory, and how far a row can move when windows are shuffled.
        system: System text for conversations that have none of their own.
        chat_template: Path of a jinja file, to use instead of the Instruct's template.
        template_kwargs: Arguments of the template, e.g. ``{enable_thinking: false}``.
        pad_to_multiple_of: Round the length of every batch up to a multiple, e.g. 64 for compiled layers.
        cache: Keep tokenised data in files; else every process tokenises them anew, and keeps them in memory.
        cache_dir: Folder of these files, which may be deleted at any time; null for ``shadowlit`` in the cache of
            ``datasets``.
        num_workers: Processes that put batches together, per loader; 0 does it in the training process. null for two
            where batches go to a GPU, and 0 elsewhere.
        prefetch: Batches that each worker keeps ready.

    Raises:
        DataError: Settings that can't work, all of them in one message.
    """

    def __init__(
        self,
        pair: ModelPair,
        train: str | list[str] | None = None,
        validation: dict[str, str] | str | None = None,
        test: dict[str, str] | str | None = None,
        predict: str | None = None,
        format: Format = "auto",
        samples: Samples = "conversations",
        max_length: int = 4096,
        overlong: Overlong = "truncate",
        drop_unsupervised: bool = False,
        packing: Packing | None = None,
        pack_length: int | None = None,
        group_by_length: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        limit_train_samples: int | None = None,
        streaming: bool = False,
        stream_window: int = 10_000,
        system: str | None = None,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        pad_to_multiple_of: int | None = None,
        cache: bool = True,
        cache_dir: str | None = None,
        num_workers: int | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__()
        self.pair = pair
        self.train = [train] if isinstance(train, str) else list(train or [])
        self.streaming, self.stream_window = streaming, stream_window
        self.validation = {"val": validation} if isinstance(validation, str) else dict(validation or {})
        self.test = {"test": test} if isinstance(test, str) else dict(test or {})
        self.predict = predict
        self.format, self.samples = format, samples
        self.max_length, self.overlong, self.drop_unsupervised = max_length, overlong, drop_unsupervised
        self.packing: Packing | None = packing
        longest = max_length if samples == "conversations" else 2 * max_length
        self.pack_length = longest if pack_length is None else pack_length
        self.group_by_length = group_by_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.drop_last, self.shuffle, self.seed = drop_last, shuffle, seed
        self.limit_train_samples = limit_train_samples
        self.system, self.chat_template = system, chat_template
        self.template_kwargs = dict(template_kwargs or {})
        self.pad_to_multiple_of = pad_to_multiple_of
        self.cache, self.cache_dir = cache, cache_dir
        self.num_workers, self.prefetch = num_workers, prefetch
        self.reports: dict[str, DataReport] = {}
        self._sets: dict[str, TokenDataset | PreferenceDataset] = {}
        self.prompts: PromptDataset | None = None
        self._packs: PackedOrder | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._images: ImageProcessing | None = None
        self._resume: dict[str, Any] | None = None
        raise_all(list(self._problems()))

    @property
    def validation_names(self) -> list[str]:
        """The validation sets in the order of their loaders."""
        return list(self.validation)

    @property
    def test_names(self) -> list[str]:
        """The test sets in the order of their loaders."""
        return list(self.test)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The Instruct's tokenizer, with ``chat_template`` in it where that is set.

        Raises:
            DataError: It has no usable chat template, or ``template_kwargs`` don't fit it.
        """
        if self._tokenizer is None:
            tokenizer = self.pair.tokenizer()
            if self.chat_template is not None:
                tokenizer = copy.deepcopy(tokenizer)  # the pair's own is exported
                tokenizer.chat_template = load_template(self.chat_template)
            check_template(tokenizer, self.template_kwargs)
            if renders_date(tokenizer, self.template_kwargs):
                rank_zero_warn(
                    "data: the chat template writes today's date, so another day trains on other tokens. Set "
                    "data.template_kwargs to {date_string: '26 Jul 2024'} or the like."
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def images(self) -> ImageProcessing | None:
        """The processor of a pair of vision-language models; None for one of text models.

        Raises:
            PairError: It can't be loaded.
        """
        if self._images is None:
            try:
                seen = getattr(self.pair, "has_images", False)
            except PairError:  # a broken config, of which the check of the pair tells
                seen = False
            self._images = ImageProcessing(self.pair) if seen else None
        return self._images

    @property
    def pad_token_id(self) -> int:
        """What fills batches up; without a padding token the end of the sequence, which attention and loss skip."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return pad if isinstance(pad, int) else 0

    def prepare_data(self) -> None:
        """Fetch hub data sets and tokenise, in one process per machine, so that the others find them in the cache."""
        sources = [(source, "train") for source in self.train if not self.streaming]
        sources += [(source, "validation") for source in self.validation.values()]
        sources += [(source, "test") for source in (*self.test.values(), *([self.predict] if self.predict else []))]
        for source, use in sources:
            if is_remote(source):
                # What is wrong with it is told in setup, on every rank: one that stops here leaves the others waiting.
                with contextlib.suppress(DataError):
                    fetch(source, use)
        if self.cache and self.trainer is not None and self.trainer.world_size > 1:
            for name, given, use in self._wanted(self.trainer.state.fn):
                with contextlib.suppress(DataError):
                    self._tokenised(name, given, use)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what a command needs, once.

        Args:
            stage: fit, validate, test or predict; None for all that is configured.

        Raises:
            DataError: Everything that is wrong with the sources, up to five problems in one message.
        """
        self._resume = None  # a position that was loaded for an earlier command
        errors = []
        for name, sources, use in self._wanted(stage):
            try:
                if name not in self._sets:
                    self._add(name, *self._tokenised(name, sources, use))
            except DataError as error:
                errors.append(str(error))
        if stage in ("predict", None) and self.predict is not None and self.prompts is None:
            try:
                self._add_prompts(self.predict)
            except DataError as error:
                errors.append(str(error))
        if stage in ("fit", None) and self.streaming and self.train and not errors:
            try:
                self._require_packable(self._stream().first_samples())
            except DataError as error:
                errors.append(str(error))
        raise_all(errors)
        if stage in ("fit", None) and "train" in self._sets:
            self._warn_of_overlap()

    def dataset(self, split: str) -> TokenDataset | PreferenceDataset:
        """A tokenised set: ``train``, ``val/<set>``, ``test/<set>``, or a set's bare name; a stream's first samples.

        Raises:
            DataError: There is no such set, or :meth:`setup` hasn't read it.
        """
        for name in (split, f"val/{split}", f"test/{split}"):
            if name in self._sets:
                return self._sets[name]
        if split == "train" and self.streaming and self.train:
            return self._stream().first_samples()
        known = ", ".join(self._sets) or "none"
        raise DataError(f"there is no data set '{split}'; there are: {known}. Give one of these, or add it to data.")

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """This rank's training batches: ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[B, T]``.

        With packing there are ``position_ids`` that restart at each sample instead of the ``attention_mask``.

        Raises:
            DataError: Nothing to train on, fewer rows than ranks, or a checkpoint taken in the middle of another
                order of samples.
        """
        if not self.train:
            raise DataError("data.train is not set. Give the file to train on.")
        if self.streaming:
            return self._stream_loader()
        dataset = self.dataset("train")
        world_size, rank = self._ranks()
        if len(dataset) < world_size:
            raise DataError(
                f"{len(dataset)} training samples are fewer than the {world_size} ranks. Use fewer devices or more "
                "data."
            )
        sampler = self._training_sampler(dataset, world_size, rank)
        self._count_slots(dataset, sampler)
        loader = ResumableLoader(
            PackedDataset(dataset) if self.packing == "best_fit" and isinstance(dataset, TokenDataset) else dataset,
            sampler,
            epoch=self.trainer.current_epoch if self.trainer is not None else 0,
            batches_per_epoch=self._epoch_length(len(sampler)),
            collate_fn=self._training_collate(
                isinstance(dataset, TokenDataset) and dataset.has_images, isinstance(dataset, PreferenceDataset)
            ),
            **self._loading(keep_workers=True),
        )
        resume, self._resume = self._resume, None
        if resume is not None:
            begun = f"after {resume['batch']} batches of an epoch" if resume.get("batch") else None
            _check_order(resume["order"], self._order(sampler), begun)
            loader.load_state_dict({"epoch": resume["epoch"], "batch": resume["batch"]})
        return loader

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per validation set, in the order of :attr:`validation_names`; keys as in unpacked training.

        Equally long samples share a batch, unless ``trainer.limit_val_batches`` takes some of them only.
        """
        return [self._eval_loader(f"val/{name}") for name in self.validation]

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per test set, in the order of :attr:`test_names`; as :meth:`val_dataloader`.

        Raises:
            DataError: No test set is configured.
        """
        if not self.test:
            raise DataError("data.test is not set. Give the sets to test on, e.g. data.test={math: math.jsonl}.")
        return [self._eval_loader(f"test/{name}") for name in self.test]

    def predict_dataloader(self) -> DataLoader:
        """Prompts, left-padded: ``input_ids`` and ``attention_mask`` ``[B, T]``, ``index`` ``[B]`` (-1: a filler).

        Raises:
            DataError: No prompts are configured.
        """
        if self.prompts is None:
            raise DataError("data.predict is not set. Give the file with the prompts.")
        return self._shard(self.prompts, PromptCollate(self.pad_token_id))

    @property
    def preference_sets(self) -> dict[str, PreferenceDataset]:
        """Sets of pairs or labels that have been read, by ``train``, ``val/<set>`` and ``test/<set>``."""
        return {name: one for name, one in self._sets.items() if isinstance(one, PreferenceDataset)}

    def scoring_loader(self, name: str) -> DataLoader:
        """Every sample of a set of preferences once, over all ranks; batches as in validation."""
        dataset = self.preference_sets[name]
        order = evaluation_order(dataset.longest, self.eval_batch_size * self._ranks()[0])
        return self._shard(dataset, PreferenceCollate(self.pad_token_id, self.pad_to_multiple_of), order)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, and the order that it is a position in."""
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if isinstance(loader, StreamLoader):
            return {**loader.state_dict(), "order": self._stream_order()}
        if not isinstance(loader, ResumableLoader):
            return {}
        return {**loader.state_dict(), "order": self._order(loader.batch_sampler)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader go on from a checkpoint's position."""
        self._resume = state_dict or None

    def trained_tokens(self, epochs: float) -> float:
        """Tokens that a training of so many epochs has seen, on all ranks; of a stream, those of this training."""
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if isinstance(loader, StreamLoader):
            return loader.state_dict()["num_tokens"] * self._ranks()[0]
        return self.reports["train"].num_tokens * epochs if "train" in self.reports else 0.0

    def _problems(self) -> Iterable[str]:
        """What can be told from the settings alone."""
        if self.streaming and self.samples != "conversations":
            yield (
                "data.streaming is true, but model.objective learns from preferences, which are scored by the model's "
                "start before the training and so read as a whole. Set data.streaming=false."
            )
        if self.streaming and self.limit_train_samples is not None:
            yield (
                f"data.limit_train_samples is {self.limit_train_samples}, a choice among all rows, which a stream "
                "doesn't know. Unset it and limit trainer.max_steps, or set data.streaming=false."
            )
        for name, least in (
            ("max_length", 2), ("batch_size", 1), ("eval_batch_size", 1), ("prefetch", 1), ("stream_window", 1)
        ):  # fmt: skip
            if name == "eval_batch_size" and self.eval_batch_size == self.batch_size:
                continue
            if getattr(self, name) < least:
                yield f"data.{name} is {getattr(self, name)}; expected at least {least}."
        if self.num_workers is not None and self.num_workers < 0:
            yield f"data.num_workers is {self.num_workers}; expected at least 0, or null."
        if self.seed < 0:
            yield f"data.seed is {self.seed}; expected at least 0."
        for name in ("limit_train_samples", "pad_to_multiple_of"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"data.{name} is {getattr(self, name)}; expected at least 1, or null."
        if self.pack_length < self.max_length:
            yield (
                f"data.pack_length is {self.pack_length}, but a sample may have data.max_length={self.max_length} "
                "tokens. Raise the one or lower the other."
            )
        if self.group_by_length and self.packing is not None:
            yield f"data.group_by_length spares padding, of which data.packing={self.packing} leaves none. Unset one."
        if self.group_by_length and not self.shuffle:
            yield "data.group_by_length makes an order of its own, but data.shuffle is false. Unset one of them."
        for kind, names in (("validation", self.validation), ("test", self.test)):
            for name in names:
                if not _NAME.fullmatch(name):
                    yield f"data.{kind} has the name '{name}'; expected letters, digits, '_' and '-'. Rename it."
                if name in ("train", "predict"):
                    yield f"data.{kind} has the name '{name}', which is used already. Rename it."

    def _wanted(self, stage: str | None) -> list[tuple[str, list[str], str]]:
        """Name, sources and use of each set that a command needs."""
        wanted: list[tuple[str, list[str], str]] = []
        if stage in ("fit", None) and self.train and not self.streaming:
            wanted.append(("train", self.train, "train"))
        if stage in ("fit", "validate", None):
            wanted += [(f"val/{name}", [source], "validation") for name, source in self.validation.items()]
        if stage in ("test", None):
            wanted += [(f"test/{name}", [source], "test") for name, source in self.test.items()]
        return wanted

    def _tokenised(self, name: str, sources: list[str], use: str) -> tuple[TokenDataset, DataReport]:
        """A set from the cache, into which it is put first if need be."""
        file = self._cache_file(name, sources, use)
        if file is None:
            return self._tokenise(name, self._read(name, sources, use, say))
        known = self._from_cache(name, file)
        if known is not None:
            return known
        said: list[tuple[str, bool]] = []

        def tell(text: str, is_warning: bool) -> None:
            said.append((text, is_warning))
            say(text, is_warning)

        conversations = self._read(name, sources, use, tell)
        try:
            with write_blocks(file) as written:
                _, report = self._tokenise(name, conversations, written.add)
                end = self._end_of_text if any(c.messages[0]["role"] == DOCUMENT for c in conversations) else None
                places = list(dict.fromkeys(c.source for c in conversations))
                written.finish({"report": dataclasses.asdict(report), "sources": places, "said": said, "end": end})
            blocks, _ = read_blocks(file, verify=False)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            rank_zero_warn(
                f"data: {name} can't be kept in {file.parent} ({error}), and is tokenised at every start. Set "
                "data.cache_dir to a folder that can be written to, or data.cache=false."
            )
            return self._tokenise(name, conversations)
        return TokenDataset(blocks, places, self.pad_token_id, file), report

    def _from_cache(self, name: str, file: Path) -> tuple[TokenDataset, DataReport] | None:
        """What an earlier start tokenised, if it is whole."""
        if not file.exists():
            return None
        try:
            blocks, about = read_blocks(file)
            report = dataclasses.replace(DataReport(**about["report"]), name=name)
            sources, said, end = about["sources"], about["said"], about["end"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"data: {name} is tokenised again, since what was kept is damaged: {error}.")
            return None
        if end is not None and end != self._end_of_text:
            return None
        for text, is_warning in said:
            say(text, is_warning)
        return TokenDataset(blocks, sources, self.pad_token_id, file), report

    def _cache_file(self, name: str, sources: list[str], use: str) -> Path | None:
        """Where a set is kept; None where it isn't, or where its sources can't be read."""
        if not self.cache:
            return None
        digests = [digest_source(source, use) for source in sources]
        if None in digests:
            return None
        choice = [self.limit_train_samples, self.seed] if name == "train" and self.limit_train_samples else None
        date = datetime.date.today().isoformat() if renders_date(self.tokenizer, self.template_kwargs) else None
        key = cache_key(
            self.tokenizer,
            sources=[*zip(sources, digests, strict=True)],
            format=self.format,
            samples=self.samples,
            max_length=self.max_length,
            overlong=self.overlong,
            drop_unsupervised=self.drop_unsupervised,
            choice=choice,
            system=self.system,
            template_kwargs=self.template_kwargs,
            date=date,
            **self._image_settings(sources),
        )
        return (Path(self.cache_dir).expanduser() if self.cache_dir else default_folder()) / f"{key}.arrow"

    def _image_settings(self, sources: list[str]) -> dict[str, Any]:
        """What the tokens of images depend on, and where relative paths begin."""
        if self.images is None:
            return {}
        return {"images": self.images.digest(), "folders": [str(folder_of(source)) for source in sources]}

    def _read(self, name: str, sources: list[str], use: str, tell: Callable[[str, bool], None]) -> list[Conversation]:
        conversations = [
            conversation
            for source in sources
            for conversation in read_conversations(source, self.format, use=use, samples=self.samples, tell=tell)
        ]
        limit = self.limit_train_samples
        if name != "train" or limit is None:
            return conversations
        if limit > len(conversations):
            tell(f"data: limit_train_samples={limit}, but there are {len(conversations)} rows; all are used.", True)
        chosen = epoch_order(len(conversations), self.seed)[:limit]
        return [conversations[i] for i in sorted(chosen)]

    def _tokenise(
        self, name: str, conversations: list[Conversation], keep: Callable[[Block], None] | None = None
    ) -> tuple[TokenDataset, DataReport]:
        dataset, report = tokenise(
            name,
            conversations,
            self._encoder(encode_turns),
            max_length=self.max_length,
            filler_token=self.pad_token_id,
            overlong=self.overlong,
            drop_unsupervised=self.drop_unsupervised,
            keep=keep,
        )
        if not report.num_samples:
            raise DataError(
                f"{name} has no sample left: all {report.num_rows} rows were dropped. Raise data.max_length, or give "
                "data with an answer to learn."
            )
        return dataset, report

    def _add(self, name: str, dataset: TokenDataset, report: DataReport) -> None:
        if name == "train":
            self._require_packable(dataset)
        if self.samples != "conversations" and dataset.has_images:
            raise DataError(
                f"{name} has images, but model.objective learns from preferences, which are read as text alone. Train "
                "on conversations (objective: SFT), or give preferences without images."
            )
        whole = dataset if self.samples == "conversations" else PreferenceDataset(dataset)
        rank_zero_info(f"data: {report}")
        if name == "train" and self.packing == "best_fit":
            if whole.lengths.max() > self.pack_length:
                at = int(whole.lengths.argmax())
                raise DataError(
                    f"{whole.origin(at)} has two answers of {whole.lengths[at]} tokens together, which share a row, "
                    f"but data.pack_length is {self.pack_length}. Raise it, or lower data.max_length."
                )
            self._packs = PackedOrder(whole.lengths, self.pack_length, self.seed)
            report = dataclasses.replace(report, num_packs=len(self._packs))
            rank_zero_info(
                f"data: train: packed into {report.num_packs:,} rows of up to {self.pack_length:,} tokens, "
                f"{report.samples_per_pack:.1f} samples and "
                f"{100 * report.num_tokens / report.num_packs / self.pack_length:.1f} % full on average"
            )
        self._sets[name], self.reports[name] = whole, report

    def _require_packable(self, dataset: TokenDataset) -> None:
        if self.packing is not None and dataset.has_images:
            raise DataError(
                f"data.packing is {self.packing!r}, but the training samples have images, whose positions in a row "
                "the models count from the row's beginning, not from the sample's. Set data.packing=null, and "
                "data.group_by_length=true to spare padding."
            )

    def _add_prompts(self, source: str) -> None:
        self.prompts, report = tokenise_prompts(
            "predict",
            read_conversations(source, self.format, use="test", prompts_only=True),
            self._encoder(encode_question),
            max_length=self.max_length,
            filler_token=self.pad_token_id,
        )
        self.reports["predict"] = report
        rank_zero_info(f"data: {report}")

    def _encoder(self, encode: Callable[..., Any]) -> Callable[[list[Message]], Any]:
        return partial(
            _encode, encode, self._encode_document, self.tokenizer, self.images, self.system, self.template_kwargs
        )

    def _encode_document(self, text: str) -> list[Encoded]:
        return encode_document(self.tokenizer, text, self._end_of_text, self.max_length)

    @property
    def _end_of_text(self) -> int | None:
        """The token that ends a document in the Base's pre-training."""
        end = self.pair.other_tokenizer().eos_token_id
        return end if isinstance(end, int) else None

    def _warn_of_overlap(self) -> None:
        for name in self.validation:
            dataset = self._sets[f"val/{name}"]
            shared = count_shared(self._sets["train"], dataset)
            if shared:
                rank_zero_warn(
                    f"data: {shared} of {len(dataset)} samples of val/{name} are in the training data too, token for "
                    "token. Its scores say what was memorised; remove them from one of the two."
                )

    def _training_sampler(
        self, dataset: TokenDataset | PreferenceDataset, world_size: int, rank: int
    ) -> ShardedBatchSampler:
        overfits = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        if self._packs is not None and len(self._packs) < world_size:
            raise DataError(
                f"{len(dataset)} training samples make {len(self._packs)} packs, fewer than the {world_size} ranks. "
                f"Lower data.pack_length={self.pack_length}, or use data.packing=padding_free."
            )
        return self._sampler(dataset.lengths, self._packs, self.shuffle and not overfits, world_size, rank)

    def _sampler(
        self, lengths: np.ndarray, packs: PackedOrder | None, shuffle: bool, world_size: int, rank: int
    ) -> ShardedBatchSampler:
        """Batches of samples of these lengths, or of the packs that they make."""
        size = len(lengths)
        order: Order | None = None
        if packs is not None:
            packs.shuffle = shuffle
            size, order = len(packs), packs
        elif self.group_by_length and shuffle:
            order = partial(grouped_order, lengths, self.batch_size * world_size, self.seed)
        return ShardedBatchSampler(
            size, self.batch_size, world_size, rank, self.seed, shuffle, self.drop_last, order=order
        )

    def _training_collate(
        self, has_images: bool, in_pairs: bool = False
    ) -> Collate | PackCollate | ImageCollate | PreferenceCollate:
        if in_pairs:
            return PreferenceCollate(self.pad_token_id, self.pad_to_multiple_of, self.packing)
        if self.packing is None:
            collate = Collate(self.pad_token_id, self.pad_to_multiple_of)
            if not has_images:
                return collate
            assert self.images is not None
            return ImageCollate(collate, self.images)
        return PackCollate(self.pad_token_id, self.pad_to_multiple_of, flatten=self.packing == "padding_free")

    def _stream(self) -> TokenStream:
        world_size, rank = self._ranks()
        return TokenStream(
            read=self._stream_conversations,
            window_rows=self.stream_window,
            tokenise=partial(
                tokenise,
                "train",
                encode=self._encoder(encode_turns),
                max_length=self.max_length,
                filler_token=self.pad_token_id,
                overlong=self.overlong,
                drop_unsupervised=self.drop_unsupervised,
            ),
            batches=partial(self._window_batches, world_size, rank),
            packed=self.packing == "best_fit",
            collate=self._training_collate(self.images is not None),
        )

    def _stream_conversations(self) -> Iterator[Conversation]:
        for source in self.train:
            yield from stream_conversations(source, self.format)

    def _window_batches(
        self, world_size: int, rank: int, dataset: TokenDataset, number: int, start: int
    ) -> Iterable[list[Any]]:
        self._require_packable(dataset)
        packs = PackedOrder(dataset.lengths, self.pack_length, self.seed) if self.packing == "best_fit" else None
        if self.drop_last and len(packs or dataset) < world_size * self.batch_size:
            return []
        return self._sampler(dataset.lengths, packs, self.shuffle, world_size, rank).batches(number, start)

    def _stream_loader(self) -> StreamLoader:
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1 or getattr(trainer, "overfit_batches", False):
            raise DataError(
                "data.streaming needs trainer.max_steps, since a stream has no end, and no trainer.overfit_batches. "
                "Set the number of optimizer steps, or data.streaming=false."
            )
        loader = StreamLoader(
            self._stream(), trainer.max_steps * trainer.accumulate_grad_batches, **self._loading(keep_workers=False)
        )
        resume, self._resume = self._resume, None
        if resume is not None:
            position = {name: value for name, value in resume.items() if name != "order"}
            begun = f"in window {resume.get('window')} of a stream" if any(position.values()) else None
            _check_order(resume["order"], self._stream_order(), begun)
            loader.load_state_dict(position)
        return loader

    def _stream_order(self) -> dict[str, Any]:
        """What a position of the stream is a position in."""
        return {
            "sources": self.train,
            "stream_window": self.stream_window,
            "global_batch_size": self._ranks()[0] * self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "packing": self.packing,
            "pack_length": self.pack_length,
            "group_by_length": self.group_by_length,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "drop_unsupervised": self.drop_unsupervised,
        }

    def _count_slots(self, dataset: TokenDataset | PreferenceDataset, sampler: ShardedBatchSampler) -> None:
        """Report how much of the batches is padding, for the first epoch."""
        # A padded pair is two rows, both as long as the longest of the batch.
        rows = 2 if isinstance(dataset, PreferenceDataset) and self.packing is None else 1
        lengths = dataset.longest if isinstance(dataset, PreferenceDataset) and rows == 2 else dataset.lengths
        sizes = self._packs.sizes(0) if self._packs is not None else lengths[np.asarray(sampler.order(0))]
        slots = rows * count_slots(
            sizes, self.batch_size, sampler.num_replicas, self.pad_to_multiple_of, self.packing == "padding_free"
        )
        known, self.reports["train"] = (
            self.reports["train"],
            dataclasses.replace(self.reports["train"], num_slots=slots),
        )
        if known.num_slots == slots:
            return
        fill = self.reports["train"].fill
        advice = ""
        if fill < _LITTLE_FILL and self.packing is None:
            advice = ". data.packing would leave no padding" + (
                "" if self.group_by_length else ", group_by_length little"
            )
        rank_zero_info(f"data: train: {100 * fill:.1f} % of what the batches compute are tokens of samples{advice}")

    def _order(self, sampler: ShardedBatchSampler) -> dict[str, Any]:
        """What a position is a position in; the number of ranks isn't part of it, only what they take together."""
        order: dict[str, Any] = {
            "num_samples": sampler.num_samples,
            "global_batch_size": sampler.global_batch_size,
            "seed": sampler.seed,
            "shuffle": sampler.shuffle,
            "drop_last": sampler.drop_last,
        }
        if self.packing == "best_fit":  # padding_free has the order of no packing
            order |= {"packing": self.packing, "pack_length": self.pack_length}
        if self.group_by_length:
            order["group_by_length"] = True
        return order

    def _eval_loader(self, name: str) -> DataLoader:
        """Padded rows, since scores are counted by row; equally long ones together, so that little is padded."""
        dataset = self.dataset(name)
        stage = "test" if name.startswith("test/") else "val"
        limit = getattr(self.trainer, f"limit_{stage}_batches", 1.0)
        # The first batches of a set in another order would be other samples.
        grouped = isinstance(limit, float) and limit == 1.0
        is_pairs = isinstance(dataset, PreferenceDataset)
        lengths = dataset.longest if isinstance(dataset, PreferenceDataset) else dataset.lengths
        order = evaluation_order(lengths, self.eval_batch_size * self._ranks()[0]) if grouped else None
        collate = (PreferenceCollate if is_pairs else Collate)(self.pad_token_id, self.pad_to_multiple_of)
        return self._shard(dataset, collate, order)

    def _shard(
        self,
        dataset: TokenDataset | PromptDataset | PreferenceDataset,
        collate: Collate | PromptCollate | PreferenceCollate,
        order: np.ndarray | None = None,
    ) -> DataLoader:
        sampler = ShardedBatchSampler(
            len(dataset), self.eval_batch_size, *self._ranks(), shuffle=False,
            order=None if order is None else lambda epoch: order,
        )  # fmt: skip
        if getattr(dataset, "has_images", False):
            assert self.images is not None
            return make_loader(dataset, sampler, collate_fn=ImageCollate(collate, self.images), **self._loading())
        return make_loader(dataset, sampler, collate_fn=collate, **self._loading())

    def _loading(self, keep_workers: bool = False) -> dict[str, Any]:
        """How a loader gets its batches ready; workers of a training loader outlive an epoch."""
        on_gpu = torch.cuda.is_available() and not isinstance(
            getattr(self.trainer, "accelerator", None), CPUAccelerator
        )
        workers = (_GPU_WORKERS if on_gpu else 0) if self.num_workers is None else self.num_workers
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": on_gpu}
        if workers:
            options |= {"persistent_workers": keep_workers, "prefetch_factor": self.prefetch}
        return options

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks and this one; 1 and 0 without a trainer."""
        if self.trainer is None:
            return 1, 0
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self.trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise DataError(
                "trainer.use_distributed_sampler is true, which would shard the data a second time. Set it to false."
            )
        return self.trainer.world_size, self.trainer.global_rank

    def _epoch_length(self, num_batches: int) -> int:
        """Batches that the trainer takes of an epoch, as Lightning counts them: a number, or a share as a float."""
        limit = getattr(self.trainer, "limit_train_batches", None)
        if limit is None:
            return num_batches
        return min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)


def _encode(
    encode: Callable[..., Any],
    document: Callable[[str], Any],
    tokenizer: PreTrainedTokenizerBase,
    images: ImageProcessing | None,
    system: str | None,
    template_kwargs: dict[str, Any],
    messages: list[Message],
) -> Any:
    if messages[0]["role"] == DOCUMENT:
        return document(messages[0]["content"])
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return encode(tokenizer, messages, images, **template_kwargs)


def _check_order(before: dict[str, Any], order: dict[str, Any], begun: str | None) -> None:
    """Refuse to go on in the middle of an order that can't be had again; ``begun`` says where the middle is."""
    changed = [
        f"{key} {before.get(key)} → {order.get(key)}"
        for key in dict.fromkeys((*before, *order))
        if before.get(key) != order.get(key)
    ]
    if not changed:
        return
    if begun:
        raise DataError(
            f"the checkpoint was taken {begun}, in an order that these data don't give: {', '.join(changed)}. Resume "
            "with the data, batch size and seed of that run."
        )
    rank_zero_warn(f"data: the run goes on with other data or batches than before: {', '.join(changed)}.")
