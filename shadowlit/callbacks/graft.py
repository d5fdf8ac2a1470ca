"""GraftCallback: the metrics of the grafted Instruct, while the Base trains."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import GraftError
from shadowlit.evaluation.routing import Routing, routers_of
from shadowlit.grafting.live import BASE, LiveGraft, Squares
from shadowlit.grafting.transformed import require_elementwise
from shadowlit.pair.check import require_fit
from shadowlit.training.module import TUNED, ShadowModule

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Within = Callable[[Trainer, ShadowModule, str], None]


class GraftCallback(Callback):
    """Runs every validation a second time on the grafted Instruct, ``W_I + scale * (W_B+ - W_B)``.

    Shadow-FT, arXiv 2505.12716. After the validation loop has scored the trained Base, the grafted weights are
    swapped into the module in place, the same batches are run again, and the trained weights are put back bit for
    bit. Everything that the module scores is logged for both: ``val/tuned/*`` and ``val/grafted/*``; and once
    measured, the untouched models' ``val/base/*`` and ``val/instruct/*`` beside them. ``graft/gain`` is the
    Instruct's loss minus the grafted one's: above 0, the graft is better. The training trajectory is bit-identical
    to one without the callback, and no checkpoint ever holds grafted weights. Objectives of preferences that compare
    with the start of the model need it: it puts the untouched Base and Instruct in once, to be measured.

    Also logged: ``graft/delta_norm``, ``graft/relative_delta``, ``graft/delta_norm/<layer>``, ``graft/survival`` (the
    share of the update that arrives in the exported dtype), ``graft/seconds`` and ``graft/time_share`` (of the run so
    far, in all of the callback's passes), ``graft/swap_seconds`` (in the swaps alone).

    Of a mixture of experts also ``routing_agreement`` and ``routing_top1_changed`` of every grafted subject, against
    the Instruct on the same tokens, and of the tuned model against the Base; see :mod:`shadowlit.evaluation.routing`.
    For it the untouched models' choices stay in the CPU's memory: 2 bytes for each of a rank's supervised tokens in the
    validation sets, layer, chosen expert, and model.

    Warning:
        Does not compose with callbacks that swap weights themselves (``WeightAveraging``, ``EMA``).

    Example::

        Trainer(callbacks=[GraftCallback(scales=[1.0, 0.5]), ModelCheckpoint(monitor="val/grafted/loss")])

    Args:
        select: Which tensors get the update: linear (every linear layer but the output head, as the paper's code),
            all, or regular expressions searched in the tensors' names. In a list of several, the towers of a
            vision-language model (language, vision, projector) restrict the rest: [language, linear].
        scales: Strengths of the graft to validate. The first is the main one, logged as ``val/grafted/*``; a further
            one, say 0.5, as ``val/grafted@0.5/*``.
        dtype: The dtype that the graft is rounded to, in validation and in the export. auto: that of the Instruct's
            file.
        offload: Keep the frozen weights of the pair on the CPU.
        baselines: Measure the untouched Base and Instruct once, in the first full validation.
        statistics: Log norms and survival of the update at every validation.
        routing: Of a mixture of experts, log how many choices of experts the graft changes. Needs baselines; not
            measured in compiled layers.
        transforms: Transforms of the update, applied in this order before it is scaled, e.g.
            [{name: dare, density: 0.2}]: magnitude, dare, svd, ties, or the import path of a function. Metrics, norms,
            survival and exports are those of the transformed update.
    """

    def __init__(
        self,
        select: str | list[str] = "linear",
        scales: list[float] = [1.0],  # noqa: B006 - read only, and shown by --help
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        offload: bool = False,
        baselines: bool = True,
        statistics: bool = True,
        routing: bool = True,
        transforms: list[dict[str, Any]] = [],  # noqa: B006
    ) -> None:
        if not scales or len(set(scales)) < len(scales):
            raise GraftError(f"graft.scales is {scales}; expected at least one number, and none of them twice.")
        self.transforms = Transforms(transforms)
        self.select = select
        self.scales = list(scales)
        self.dtype = _DTYPES.get(dtype)
        self.offload = offload
        self.baselines = baselines
        self.statistics = statistics
        self.routing = routing
        self.graft: LiveGraft | None = None
        self.within: list[Within] = []  # called in every pass, while the weights of its subject stand in the module
        self.constants: dict[str, dict[str, float]] = {}  # scores of the untouched models: subject -> metric -> value
        self._measured_on = ""  # the data of these scores
        self._routing: Routing | None = None
        self._routing_on = ""  # the data on which the untouched models' choices were recorded
        self._signed: tuple[list[Any], list, str] = ([], [], "")  # sets, numbers of batches, and their signature
        self.metrics: dict[str, float] = {}  # what the last validation logged
        self.seconds = 0.0
        self._within_s = 0.0
        self._fingerprints: dict[str, str] = {}
        self._fit_start: float | None = None

    # -- before anything runs ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the pair before any weight is loaded for training."""
        if not isinstance(pl_module, ShadowModule):
            raise GraftError(
                f"GraftCallback needs a ShadowModule or a subclass of it, but the module is a "
                f"{type(pl_module).__name__}. Derive yours from shadowlit.training.module.ShadowModule."
            )
        swapping = [type(c).__name__ for c in trainer.callbacks if type(c).__name__ in _SWAPPING_CALLBACKS]  # type: ignore[attr-defined]
        if swapping:
            raise GraftError(
                f"GraftCallback can't share a run with {', '.join(swapping)}: both swap the module's weights around "
                "validation. Remove one of them."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            require_elementwise(self.transforms, trainer.world_size)
        require_fit(pl_module.pair, self.select)
        current = pl_module.pair.fingerprints()
        if self._fingerprints and self._fingerprints != current:
            changed = [who for who in current if current[who] != self._fingerprints.get(who)]
            raise GraftError(_changed_pair(changed))
        self._fingerprints = current

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the graft, say what it covers, and make sure that training starts at the Base."""
        self._fit_start = time.perf_counter()
        graft = self.build(pl_module)
        rank_zero_info(f"graft: {graft.coverage}; {_per_parameter(graft)}")
        if trainer.global_step == 0 and not trainer.ckpt_path and not graft.on_base:
            raise GraftError(
                "the module does not start at the Base: its weights differ before the first step. Expected those of "
                "pair.base. To go on from a checkpoint, pass it as ckpt_path."
            )
        self._references(pl_module)

    # -- the grafted passes -----------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what an objective of preferences compares with, where that isn't known yet."""
        self._references(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._references(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record the tuned model's choices of experts, if it has some."""
        self.build(pl_module)
        if self._routing is not None and not trainer.sanity_checking:
            self._routing.begin(TUNED)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the routers in the batch."""
        if self._routing is not None and not trainer.sanity_checking:
            self._routing.watch()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take what they chose."""
        if self._routing is not None and not trainer.sanity_checking:
            self._routing.take(TUNED, batch)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in validation."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in validation."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the grafted passes, before the module logs the scores of all subjects."""
        self._passes(trainer, pl_module, "val", trainer.val_dataloaders, _val_batches(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was logged; checkpoint callbacks run after this, so a checkpoint holds its own metrics."""
        if not trainer.sanity_checking:
            self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation, on the test sets."""
        self._passes(trainer, pl_module, "test", trainer.test_dataloaders, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the grafted Instruct answer the prompts."""
        self.build(pl_module).apply(self.scales[0])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._restore(pl_module)

    @contextmanager
    def grafted(self, pl_module: LightningModule, scale: float | None = None) -> Iterator[None]:
        """Let the grafted weights stand in the module within the context; ``scale`` defaults to the main one."""
        with self.build(pl_module).applied(self.scales[0] if scale is None else scale):
            yield

    def build(self, pl_module: LightningModule) -> LiveGraft:
        """The graft of the module's model; its frozen shards are read when it is first asked for."""
        assert isinstance(pl_module, ShadowModule) and pl_module.model is not None
        if self.graft is None or self.graft.model is not pl_module.model:
            base = AlignedReader.open(pl_module.pair.base_folder(), pl_module.pair.instruct_folder())
            instruct = CheckpointReader(pl_module.pair.instruct_folder())
            self.graft = LiveGraft(
                pl_module.model, base, instruct, select=self.select, dtype=self.dtype, offload=self.offload,
                transforms=self.transforms,
            )  # fmt: skip
            # Whoever asks for the module's state gets the trained weights: checkpoint callbacks in any order, a
            # signal handler in the middle of a pass.
            pl_module.register_state_dict_pre_hook(self._before_state_dict)
            self._routing = self._new_routing(pl_module)
        return self.graft

    # -- never leave or save grafted weights ------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back, whatever happened."""
        self._restore(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the trained weights back and let go of the pair's."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The pair's fingerprints, the untouched models' scores, and the metrics of the last validation."""
        return {
            "fingerprints": self._fingerprints,
            "constants": self.constants,
            "measured_on": self._measured_on,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores over; refuse a checkpoint of another pair."""
        saved = state_dict["fingerprints"]
        changed = [who for who, value in self._fingerprints.items() if saved.get(who) != value]
        if changed:
            raise GraftError(_changed_pair(changed))
        self._fingerprints = saved
        self.constants, self._measured_on = state_dict["constants"], state_dict["measured_on"]
        self.metrics = state_dict["metrics"]

    # -- private ----------------------------------------------------------------------------------------------

    def _new_routing(self, module: ShadowModule) -> Routing | None:
        assert module.model is not None
        self._routing_on = ""
        if not self.routing or not self.baselines or not routers_of(module.model):
            return None
        if module.compile_layers:
            rank_zero_info("graft: choices of experts can't be seen in compiled layers; no routing agreement is logged")
            return None
        return Routing(module.model)

    def _log_routing(self, module: ShadowModule, stage: str) -> None:
        if self._routing is None:
            return
        for subject in ["grafted", *(f"grafted@{scale:g}" for scale in self.scales[1:]), TUNED]:
            like = "base" if subject == TUNED else "instruct"
            for name, value in self._routing.agreement(subject, like, module.device).items():
                module.log(f"{stage}/{subject}/{name}", value)
            self._routing.forget(subject)

    def _before_state_dict(self, *_: Any) -> None:
        if self.graft is not None:
            self.graft.restore_for_checkpoint()

    def _restore(self, pl_module: LightningModule) -> None:
        if self._routing is not None:
            self._routing.stop()
        if self.graft is not None:
            self.graft.restore()
        if isinstance(pl_module, ShadowModule):
            pl_module.subject = TUNED

    def _references(self, pl_module: LightningModule) -> None:
        """Let the untouched models' weights stand in the module while their log-probabilities are measured.

        Not the weights as they happen to be when the training begins: after a resume those are trained already.
        """
        assert isinstance(pl_module, ShadowModule)
        for who, state in (("base", BASE), ("instruct", 0.0)):
            while names := pl_module.lacking_references(who):
                graft = self.build(pl_module)
                start, interruptions = time.perf_counter(), graft.interruptions
                with isolate_rng(), graft.applied(state):
                    measured = pl_module.measure_references(names)
                # Else a signal handler saved a checkpoint on the way, which put the trained weights back.
                if graft.interruptions == interruptions:
                    pl_module.keep_references(who, measured)
                    rank_zero_info(
                        f"graft: what the untouched {who.capitalize()} makes of {', '.join(names)} was measured in "
                        f"{time.perf_counter() - start:.1f} s"
                    )

    def _passes(self, trainer: Trainer, module: LightningModule, stage: str, loaders: Any, limits: list) -> None:
        assert isinstance(module, ShadowModule)
        start = time.perf_counter()
        self._within_s = 0.0
        graft = self.build(module)
        swap_s = graft.apply_s
        squares: Squares | None = {} if self.statistics else None  # the main scale's, found while it is put in
        self._pass(trainer, module, "grafted", self.scales[0], loaders, limits, squares)
        for scale in self.scales[1:]:
            self._pass(trainer, module, f"grafted@{scale:g}", scale, loaders, limits)
        if trainer.sanity_checking:
            return
        scores = module.scores("grafted")
        constants = self._baselines(trainer, module, stage, loaders, limits)
        self.seconds += time.perf_counter() - start - self._within_s
        for subject, values in constants.items():
            for name, value in values.items():
                module.log(f"{stage}/{subject}/{name}", value)
        if "instruct" in constants:
            module.log("graft/gain", constants["instruct"]["loss"] - scores["loss"], prog_bar=True)
        self._log_routing(module, stage)
        if self.statistics:
            for name, value in graft.statistics(self.scales[0], squares).items():
                module.log(f"graft/{name}", value)
        module.log("graft/seconds", time.perf_counter() - start - self._within_s)
        module.log("graft/swap_seconds", graft.apply_s - swap_s)
        if self._fit_start is not None:
            module.log("graft/time_share", self.seconds / (time.perf_counter() - self._fit_start))

    def _baselines(self, trainer: Trainer, module: ShadowModule, stage: str, loaders: Any, limits: list) -> dict:
        """Scores of the untouched models: measured in the first full validation on these data, then remembered."""
        if not self.baselines:
            return {}
        signature = self._signature(loaders, limits)
        known = self.constants and self._measured_on == signature
        if stage == "val" and known and (self._routing is None or self._routing_on == signature):
            return self.constants
        self._routing_on = signature if stage == "val" else ""
        measured = {}
        for subject, state in (("base", BASE), ("instruct", 0.0)):
            self._pass(trainer, module, subject, state, loaders, limits)
            measured[subject] = module.take_scores(subject)
        if stage == "val":
            self.constants, self._measured_on = measured, signature
        return measured

    def _signature(self, loaders: Any, limits: list) -> str:
        """Tells the data of one validation from those of another; computed when they are other objects than before."""
        sets = [loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])]
        known, known_limits, signature = self._signed
        if (
            known_limits != limits
            or len(known) != len(sets)
            or any(a is not b for a, b in zip(known, sets, strict=True))
        ):
            signature = _signature(sets, limits)
            self._signed = sets, list(limits), signature
        return signature

    def _pass(
        self,
        trainer: Trainer,
        module: ShadowModule,
        subject: str,
        state: float | str,
        loaders: Any,
        limits: list,
        squares: Squares | None = None,
    ) -> None:
        """Run the batches of ``loaders`` with the weights of ``state`` and score them as ``subject``."""
        graft = self.build(module)
        step = trainer.strategy.test_step if trainer.testing else trainer.strategy.validation_step
        loaders = loaders if isinstance(loaders, list) else [loaders]
        routing = None if trainer.sanity_checking else self._routing
        done = False
        while not done:
            interruptions = graft.interruptions
            module.take_scores(subject)
            module.subject = subject
            if routing is not None:
                routing.begin(subject)
            # Iterating a loader draws a seed from the global generator: the training must not notice.
            with (
                isolate_rng(),
                graft.applied(state, squares),
                _restoring_subject(module),
                _progress(trainer, subject, sum(map(int, limits))) as advance,
            ):
                for index, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
                    for number, batch in enumerate(islice(loader, int(limit))):
                        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
                        if routing is not None:
                            routing.watch()
                        step(trainer.precision_plugin.convert_input(batch), number, index)
                        if routing is not None:
                            routing.take(subject, batch)
                        advance()
                module.subject = TUNED
                start, swap_s = time.perf_counter(), graft.apply_s
                if not trainer.sanity_checking:
                    for call in self.within:
                        call(trainer, module, subject)
                self._within_s += time.perf_counter() - start
                graft.apply_s = swap_s  # what was swapped within is not the graft's
                # False if a signal handler saved a checkpoint on the way, which put the trained weights back.
                done = graft.interruptions == interruptions


_SWAPPING_CALLBACKS = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")


@contextmanager
def _restoring_subject(module: ShadowModule) -> Iterator[None]:
    try:
        yield
    finally:
        module.subject = TUNED


@contextmanager
def _progress(trainer: Trainer, subject: str, total: int) -> Iterator[Callable[[], None]]:
    """Show the pass as a line of the running rich progress bar, if there is one."""
    bar = trainer.progress_bar_callback
    display = bar.progress if isinstance(bar, RichProgressBar) and bar.is_enabled else None
    if display is None:
        yield lambda: None
        return
    task = display.add_task(f"[white]{subject}", total=total)
    try:
        yield lambda: display.advance(task)
    finally:
        display.remove_task(task)


def _signature(sets: list[Any], limits: list) -> str:
    """Tells the data of one validation from those of another, the same on all ranks."""
    digest = hashlib.sha256()
    for samples, limit in zip(sets, limits, strict=True):
        content = samples.digests() if hasattr(samples, "digests") else [str(len(samples)).encode()]
        digest.update(f"{limit} {len(content)} ".encode() + b"".join(content))
    return digest.hexdigest()


def _val_batches(trainer: Trainer) -> list:
    return trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches


def _per_parameter(graft: LiveGraft) -> str:
    where = "CPU" if graft.offload else "device"
    return (
        f"frozen weights of {graft.frozen_bytes / 1e6:.1f} MB per rank on the {where}, "
        f"{graft.frozen_bytes / max(1, graft.num_local_parameters):.1f} bytes per parameter"
    )


def _changed_pair(changed: list[str]) -> str:
    return (
        f"the checkpoint was written with another {' and '.join(changed)} than pair.{changed[0]} is now (the "
        "fingerprints of the files differ), so its update belongs to other weights. Use the pair that it was trained "
        "with, pinned by revision, or start anew without ckpt_path."
    )
