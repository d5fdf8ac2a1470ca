"""The data module: from the data section of a configuration to loaders."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from shadowlit.checkpoint.workers import num_cores
from shadowlit.data.collate import Collate, PackCollate, PromptCollate
from shadowlit.data.context_batches import ContextCollate, ContextDataset
from shadowlit.data.conversation import gathered, raise_all, some_of
from shadowlit.data.dataset import DataReport, PromptDataset, TokenDataset
from shadowlit.data.given import Given
from shadowlit.data.images import ImageCollate
from shadowlit.data.loader import ResumableLoader, make_loader
from shadowlit.data.mixing import Mixture
from shadowlit.data.order import (
    check_order,
    count_positions,
    describe_epochs,
    describe_stream,
    make_sampler,
    mix,
    pack,
    require_enough,
    require_packable,
)
from shadowlit.data.packing import PackedOrder
from shadowlit.data.preference import PreferenceCollate, PreferenceDataset
from shadowlit.data.preference_formats import PREFERENCES
from shadowlit.data.prepare import Preparation
from shadowlit.data.sampler import ShardedBatchSampler, evaluation_order
from shadowlit.data.settings import DataSettings
from shadowlit.data.sources import is_remote, open_hub
from shadowlit.data.stream import StreamLoader, TokenStream
from shadowlit.errors import DataError, counted
from shadowlit.files import replace_text

_Loader = TypeVar("_Loader", bound=ResumableLoader | StreamLoader)
_GPU_WORKERS = 2  # more would disturb the training process, which launches kernels
_LOW_FILL = 0.7  # share of tokens in the batches below which the log advises how to reduce padding

# A stream's loader has the length of the training, and one worker at most.
warnings.filterwarnings("ignore", message=r"Your `IterableDataset` has `__len__` defined")


class ShadowData(DataSettings, LightningDataModule):
    """Conversations in the Instruct's chat template, by default supervised on the assistant's turns; or plain text.

    A source is a ``.json``, ``.jsonl`` or ``.parquet`` file, a folder that ``datasets`` can read, or a data set on
    the hub: ``org/name[/config][@revision][:split]``. Without ``:split`` the only split is read, or else the one named
    train, validation or test, depending on the use. Files have no splits. Rows may have images if the pair consists of
    vision-language models (see :mod:`shadowlit.data.formats`); their paths are relative to the folder of the data file,
    and they are opened when a batch is built.

    One process per machine reads and tokenises what a command needs, and stores it in an Arrow file under a key of
    everything that the tokens depend on: the content of the sources, the settings, the tokenizer with its template, and
    the code. Later starts map that file into memory. It takes five bytes per token and 50 per sample on disk. The first
    start holds the sources in memory.

    The module needs ``trainer.use_distributed_sampler: false``: its loaders shard by themselves, without duplicates and
    with the same number of batches on every rank. Checkpoints include the position in the training data.

    Example::

        data = ShadowData(pair, train="train.jsonl", validation={"new": "new.jsonl", "old": "old.jsonl"})

    The settings are attributes of the module, and are described in :class:`~shadowlit.data.settings.DataSettings`;
    ``validation_names`` and ``test_names`` are the names of the sets, in the order of their loaders.
    """

    def __post_init__(self) -> None:
        """Check the settings; nothing is read."""
        LightningDataModule.__init__(self)
        super().__post_init__()
        self.validation_names, self.test_names = list(self.validation_sets), list(self.test_sets)
        self.reports: dict[str, DataReport] = {}
        self.prompts: PromptDataset | None = None
        self._preparation = Preparation(self)
        self._sets: dict[str, TokenDataset | PreferenceDataset | ContextDataset] = {}
        self._extra: dict[str, Given] = {}  # sources of those that are none of the configured sets
        self._packs: PackedOrder | None = None
        self._mixture: Mixture | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The Instruct's tokenizer, with ``chat_template`` instead of its own where that is set.

        Raises:
            DataError: It has no usable chat template, or ``template_kwargs`` don't fit the template.
        """
        return self._preparation.tokenizer

    @property
    def pad_token_id(self) -> int:
        """Token that fills batches up; attention and loss skip it."""
        return self._preparation.pad_token_id

    def prepare_data(self) -> None:
        """Download hub data sets and tokenise, in one process per machine, so that the others find all in the cache."""
        sources = [(source, use) for _, sources, use in self.wanted(None) for source in sources]
        for source, use in [*sources, *([(self.predict_source, "test")] if self.predict_source else [])]:
            if is_remote(source.path):
                # Errors are raised by setup, on every rank: if only one rank stopped here, the others would wait.
                with contextlib.suppress(DataError):
                    open_hub(source.path, use)
        if self.cache and self.trainer is not None and self.trainer.world_size > 1:
            for wanted in self.wanted(self.trainer.state.fn):
                with contextlib.suppress(DataError):
                    self._preparation.samples(*wanted, num_processes=num_cores())

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what a command needs, once.

        Args:
            stage: fit, validate, test or predict; None for everything that is configured.

        Raises:
            DataError: All problems with the sources, of which one message lists up to five.
        """
        self._resume = None  # a position that was loaded for an earlier command
        errors: list[str] = []
        # Several ranks share the cores, and find all in the cache that the first of them has written.
        num_processes = num_cores() if self.trainer is None or self.trainer.world_size == 1 else 1
        for name, sources, use in self.wanted(stage):
            if name not in self._sets:
                with gathered(errors):
                    self._add(name, *self._preparation.samples(name, sources, use, num_processes=num_processes))
        if stage in ("predict", None) and self.predict_source is not None and self.prompts is None:
            with gathered(errors):
                self.prompts, self.reports["predict"] = self._preparation.prompts(self.predict_source)
                self._log(self.reports["predict"])
        if stage in ("fit", None) and self.streaming and self.train and not errors:
            with gathered(errors):
                require_packable(self, self._stream().first_samples())
                if self.is_mixed:
                    total = sum(source.weight or 0.0 for source in self.train_sources)
                    shares = (f"{100 * (s.weight or 0.0) / total:.1f} % from {s}" for s in self.train_sources)
                    rank_zero_info(f"data: train: of any rows of the stream {', '.join(shares)}")
        raise_all(errors)
        self._write_skipped()
        if stage in ("fit", None) and "train" in self._sets:
            self._warn_of_overlap()

    def dataset(self, split: str) -> TokenDataset | PreferenceDataset | ContextDataset:
        """Return a tokenised set; of a stream its first samples.

        Args:
            split: ``train``, ``val/<set>``, ``test/<set>``, or the name of a set alone.

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

        With packing, ``position_ids`` that restart at each sample replace the ``attention_mask``.

        Raises:
            DataError: There is nothing to train on, there are fewer rows than ranks, or a checkpoint was taken in the
                middle of another order of samples.
        """
        if not self.train:
            raise DataError("data.train is not set. Give the file to train on.")
        if self.streaming:
            return self._stream_loader()
        dataset = self.dataset("train")
        world_size, rank = self._ranks()
        require_enough(self, self.reports["train"].samples_per_epoch, self._packs, world_size)
        overfits = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        sampler = make_sampler(
            self, dataset.lengths, self._packs, world_size, rank, mixture=self._mixture, overfits=overfits
        )
        self._report_padding(dataset, sampler)
        limit = self._limit("train")
        loader = ResumableLoader(
            dataset,
            sampler,
            epoch=self.trainer.current_epoch if self.trainer is not None else 0,
            batches_per_epoch=int(limit * len(sampler)) if isinstance(limit, float) else limit,
            collate_fn=self._training_collate(getattr(dataset, "has_images", False)),
            **self._loading(keep_workers=True),
        )
        return self._resumed(loader)

    def val_dataloader(self) -> list[DataLoader]:
        """Return one loader per validation set, in the order of :attr:`validation_names`; keys as in unpacked training.

        Samples of similar length share a batch, unless ``trainer.limit_val_batches`` takes only some of them.
        """
        return [self._eval_loader(f"val/{name}", self._limit("val")) for name in self.validation_names]

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader per test set, in the order of :attr:`test_names`; otherwise as :meth:`val_dataloader`.

        Raises:
            DataError: No test set is configured.
        """
        if not self.test:
            raise DataError("data.test is not set. Give the sets to test on, e.g. data.test={math: math.jsonl}.")
        return [self._eval_loader(f"test/{name}", self._limit("test")) for name in self.test_names]

    def predict_dataloader(self) -> DataLoader:
        """Return left-padded prompts: ``input_ids`` and ``attention_mask`` ``[B, T]``, ``index`` ``[B]`` (-1 for a
        filler).

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
        """Loader of every sample of a set of preferences, once over all ranks; batches are as in validation."""
        return self._eval_loader(name)

    def extra_loader(self, name: str, given: Given, batch_size: int | None = None) -> DataLoader:
        """Loader of every sample of a source that is none of the configured sets, once over all ranks.

        It is read and tokenised at the first call, as a validation set is, and again for another source.

        Args:
            name: Name of the set, which is also its key in messages.
            given: Source.
            batch_size: Rows per rank and batch; None for ``data.batch_size``.

        Raises:
            DataError: The source can't be read, or a row is malformed.
        """
        if self._extra.get(name) != given:
            source = self._source(given, name)
            raise_all(self._wrong_sources)
            self._add(name, *self._preparation.samples(name, [source], "validation"))
            self._extra[name] = given
        return self._eval_loader(name, batch_size=batch_size or self.batch_size)

    def overlap(self, name: str, extra: Collection[str] = ()) -> dict[str, int]:
        """Return how many samples of a set are, token for token, in each configured set that was read, if any are.

        ``extra`` are names of :meth:`extra_loader` that are compared with too.
        """
        own, hidden = self.dataset(name).hashes(), {name, *(self._extra.keys() - {*extra})}
        others = {n: one.sequences if isinstance(one, ContextDataset) else one for n, one in self._sets.items()}
        counts = {n: int(np.isin(own, one.hashes()).sum()) for n, one in others.items() if n not in hidden}
        return {n: count for n, count in counts.items() if count}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, and a description of the order that it belongs to."""
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if not isinstance(loader, ResumableLoader | StreamLoader):
            return {}
        return {**loader.state_dict(), "order": self._order_of(loader)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the training loader resume from the position in a checkpoint: the next one, or the one that exists."""
        self._resume = state_dict or None
        # A strategy that restores after its setup does so when the number of steps was estimated with a loader.
        if self.trainer is not None and self.trainer.strategy.restore_checkpoint_after_setup:
            loader = self.trainer.train_dataloader
            if isinstance(loader, ResumableLoader | StreamLoader):
                self._resumed(loader)

    def trained_tokens(self, epochs: float) -> float:
        """Tokens, over all ranks, that a training of ``epochs`` epochs has seen; of a stream those of this training."""
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if isinstance(loader, StreamLoader):
            return loader.state_dict()["num_tokens"] * self._ranks()[0]
        return self.reports["train"].tokens_per_epoch * epochs if "train" in self.reports else 0.0

    def _add(self, name: str, dataset: TokenDataset, report: DataReport) -> None:
        if name == "train":
            require_packable(self, dataset)
        if self.samples != "conversations" and dataset.has_images:
            raise DataError(
                f"{name} has images, but model.objective learns from {self.samples}, which are read as text alone. "
                "Train on conversations (objective: SFT), or give rows without images."
            )
        whole: TokenDataset | PreferenceDataset | ContextDataset = dataset
        if self.samples in PREFERENCES:
            whole = PreferenceDataset(dataset)
        elif self.samples == "contexts" and name == "train":
            whole = ContextDataset(dataset)
        mixture = mix(self, whole) if name == "train" else None
        if mixture is not None:
            report.drawn, report.drawn_tokens = len(mixture), int(whole.lengths[mixture(0, self.shuffle)].sum())
            for source, count in zip(report.sources, mixture.counts.tolist(), strict=False):
                source.drawn = count
        self._log(report)
        packs = pack(self, whole, mixture) if name == "train" else None
        if packs is not None:
            self._packs, report.num_packs = packs, len(packs)
            rank_zero_info(
                f"data: train: packed into {counted(report.num_packs, 'row')} of up to {self.row_capacity:,} tokens, "
                f"{report.samples_per_pack:.1f} samples and "
                f"{100 * report.tokens_per_epoch / report.num_packs / self.row_capacity:.1f} % full on average"
            )
        if name == "train":
            self._mixture = mixture
        self._sets[name], self.reports[name] = whole, report

    def _log(self, report: DataReport) -> None:
        """Log what a set and its sources contain, and list the rows that are left out."""
        rank_zero_info(f"data: {report}")
        for source in report.sources:
            share = 100 * source.samples_per_epoch / report.samples_per_epoch
            rank_zero_info(f"data: {share:.1f} % of {report.name} from {source}")
        if report.skipped:
            rank_zero_warn(
                f"data: {report.name}: data.on_bad_row=skip leaves out {len(report.skipped):,} of "
                f"{counted(report.num_rows, 'row')}:{some_of(report.skipped)}"
            )

    def _write_skipped(self) -> None:
        """List all rows that are left out in the run's folder, if there is one, which is that of a logger."""
        lines = [f"{name}: {what}\n" for name, report in self.reports.items() for what in report.skipped]
        trainer: Any = self.trainer
        if lines and getattr(trainer, "loggers", None):
            folder = Path(trainer.log_dir)  # a collective
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                replace_text(folder / "skipped_rows.txt", "".join(lines))

    def _warn_of_overlap(self) -> None:
        trained = self._sets["train"]
        known = (trained.sequences if isinstance(trained, ContextDataset) else trained).hashes()
        for name in self.validation_names:
            dataset = self._sets[f"val/{name}"]
            shared = int(np.isin(dataset.hashes(), known).sum())
            if shared:
                rank_zero_warn(
                    f"data: the training data contain {shared:,} of the {counted(len(dataset), 'sample')} of "
                    f"val/{name} token for token. Its scores measure what was memorised; remove these from one of the "
                    "two."
                )

    def _training_collate(
        self, has_images: bool
    ) -> Collate | PackCollate | ImageCollate | PreferenceCollate | ContextCollate:
        options = self.pad_token_id, self.pad_to_multiple_of
        if self.samples in PREFERENCES:
            return PreferenceCollate(*options, self.packing)
        padded = Collate(*options)
        collate = padded if self.packing is None else PackCollate(*options, flatten=self.packing == "padding_free")
        if self.samples == "contexts":
            return ContextCollate(collate)
        return self._with_images(padded) if has_images and self.packing is None else collate

    def _with_images(self, collate: Collate | PromptCollate | PreferenceCollate) -> ImageCollate:
        assert self._preparation.images is not None
        return ImageCollate(collate, self._preparation.images)

    def _stream(self) -> TokenStream:
        collate = self._training_collate(self._preparation.images is not None)
        return TokenStream(self._preparation, *self._ranks(), collate)

    def _stream_loader(self) -> StreamLoader:
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1 or getattr(trainer, "overfit_batches", False):
            raise DataError(
                "data.streaming needs trainer.max_steps, since a stream has no end, and no trainer.overfit_batches. "
                "Set the number of optimizer steps, or data.streaming=false."
            )
        length = trainer.max_steps * trainer.accumulate_grad_batches
        return self._resumed(StreamLoader(self._stream(), length, **self._loading(keep_workers=False)))

    def _resumed(self, loader: _Loader) -> _Loader:
        """The loader at the position in the checkpoint, if one was loaded."""
        state, self._resume = self._resume, None
        if state is not None:
            position = {name: value for name, value in state.items() if name != "order"}
            check_order(state["order"], self._order_of(loader), position)
            loader.load_state_dict(position)
        return loader

    def _order_of(self, loader: ResumableLoader | StreamLoader) -> dict[str, Any]:
        if isinstance(loader, StreamLoader):
            return describe_stream(self, self._ranks()[0])
        return describe_epochs(self, loader.batch_sampler, self._sets["train"], self._mixture)

    def _report_padding(
        self, dataset: TokenDataset | PreferenceDataset | ContextDataset, sampler: ShardedBatchSampler
    ) -> None:
        """Put the number of positions of the first epoch into the report, and log the share that padding takes."""
        report, num_slots = self.reports["train"], count_positions(self, dataset, self._packs, sampler)
        if report.num_slots == num_slots:
            return
        report.num_slots = num_slots
        advice = ""
        if report.fill < _LOW_FILL and self.packing is None:
            advice = ". data.packing would leave no padding" + (
                "" if self.group_by_length else ", group_by_length little"
            )
        rank_zero_info(
            f"data: train: {100 * report.fill:.1f} % of what the batches compute are tokens of samples{advice}"
        )

    def _limit(self, stage: str) -> int | float | None:
        """The trainer's limit on the batches of a stage: a number, or a share as a float."""
        return getattr(self.trainer, f"limit_{stage}_batches", 1.0)

    def _eval_loader(self, name: str, limit: int | float | None = 1.0, batch_size: int | None = None) -> DataLoader:
        """Padded rows, since scores are counted by row; rows of similar length together, which reduces padding."""
        dataset = self.dataset(name)
        # In another order, the first batches of a set would have other samples.
        grouped = isinstance(limit, float) and limit == 1.0
        is_pairs = isinstance(dataset, PreferenceDataset)
        lengths = dataset.longest if isinstance(dataset, PreferenceDataset) else dataset.lengths
        batch_size = batch_size or self.eval_rows
        order = evaluation_order(lengths, batch_size * self._ranks()[0]) if grouped else None
        collate = (PreferenceCollate if is_pairs else Collate)(self.pad_token_id, self.pad_to_multiple_of)
        return self._shard(dataset, collate, order, batch_size)

    def _shard(
        self,
        dataset: TokenDataset | PromptDataset | PreferenceDataset | ContextDataset,
        collate: Collate | PromptCollate | PreferenceCollate,
        order: np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> DataLoader:
        sampler = ShardedBatchSampler(
            len(dataset), batch_size or self.eval_rows, *self._ranks(), shuffle=False,
            order=None if order is None else lambda epoch: order,
        )  # fmt: skip
        collate_fn = self._with_images(collate) if getattr(dataset, "has_images", False) else collate
        return make_loader(dataset, sampler, collate_fn=collate_fn, **self._loading())

    def _loading(self, keep_workers: bool = False) -> dict[str, Any]:
        """Options of a loader; the workers of a training loader outlive an epoch."""
        on_gpu = torch.cuda.is_available() and not isinstance(
            getattr(self.trainer, "accelerator", None), CPUAccelerator
        )
        workers = (_GPU_WORKERS if on_gpu else 0) if self.num_workers is None else self.num_workers
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": on_gpu}
        if workers:
            options |= {"persistent_workers": keep_workers, "prefetch_factor": self.prefetch}
        return options

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and the rank of this process; 1 and 0 without a trainer."""
        if self.trainer is None:
            return 1, 0
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self.trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise DataError(
                "trainer.use_distributed_sampler is true, which would shard the data a second time. Set it to false."
            )
        return self.trainer.world_size, self.trainer.global_rank
