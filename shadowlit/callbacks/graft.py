"""GraftCallback: the metrics of the grafted Instruct, while the Base trains."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.hooks import RemovableHandle

from shadowlit import text
from shadowlit.arguments import takes_plain_values
from shadowlit.callbacks.gradient_rows import measure_signs, read_gradient_rows
from shadowlit.callbacks.monitored import require_monitored
from shadowlit.callbacks.record import MeasuresSubjects, RunTotals, ValidationRecord, require_subject
from shadowlit.callbacks.scores import error_of_gain, opening_line, score_table, survival_line
from shadowlit.callbacks.stopping import reach_boundary
from shadowlit.callbacks.untouched import Metrics, UntouchedMetrics, data_signature, settings_of
from shadowlit.callbacks.variants import Variant, all_grafts, losses_line, transforms_by_name
from shadowlit.data.protocol import run_data
from shadowlit.data.rendering import load_template
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import GraftError, counted
from shadowlit.evaluation.routing import Routing, routers_of
from shadowlit.grafting.disk import LEAST_SURVIVAL
from shadowlit.grafting.live import LiveGraft, Squares
from shadowlit.grafting.scales import FitScales
from shadowlit.grafting.subject import BASE, INSTRUCT, TUNED, UNTOUCHED, Subject
from shadowlit.grafting.transformed import require_elementwise
from shadowlit.pair.check import require_fit
from shadowlit.progress import make_console
from shadowlit.training.bar import show, stage_of
from shadowlit.training.module import ShadowModule

log = logging.getLogger(__name__)

_GAINS = {"graft/gain": "as exported", "graft/gain_unrounded": "without rounding"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@takes_plain_values("graft")
class GraftCallback(Callback):
    """Runs every validation a second time on the grafted Instruct, ``W_I + scale * (W_B+ - W_B)``.

    Shadow-FT, arXiv 2505.12716. After the validation loop has scored the trained Base, the grafted weights are
    swapped into the module in place, the same batches are run again, and the trained weights are swapped back bit for
    bit. Everything that the module scores is logged for both, ``val/tuned/*`` and ``val/grafted/*``, and next to them
    the untouched models' ``val/base/*`` and ``val/instruct/*``, which are measured once. ``graft/gain`` is the
    Instruct's loss minus the grafted one's: above 0, the graft is better. The training trajectory is bit-identical
    to one without the callback, and no checkpoint ever holds grafted weights. Preference objectives with a reference
    need the callback: it swaps the untouched Base and Instruct in once, to measure the reference.

    ``val/grafted/*`` is the score of the weights that an export writes: an adapter's update is added to the Instruct's
    weights, and the sum is rounded to the export's dtype. ``graft/survival`` is the fraction of the update that
    survives this rounding; it is not logged while the update is zero. The score without it is measured too, where an
    adapter is exported (``val/adapter/*``: the adapter on the Instruct, as a server computes that loads it) and where
    less than half of the update survives (``val/unrounded/*``); ``graft/gain_unrounded`` is its gain.

    With ``model.quantization`` the Base is trained in 4 bits, and ``val/base`` and ``val/tuned`` are measured so. The
    update is the adapter's alone, and the graft is added to the Instruct's weights as they are in its files;
    ``val/grafted_4bit/*`` is the graft with its linear layers quantised after the export, as by a server that loads it
    in 4 bits.

    Also logged: ``graft/delta_norm``, ``graft/relative_delta``, ``graft/delta_norm/<layer>``, ``graft/seconds`` and
    ``graft/time_share`` (of the run so far, in all of the callback's passes), ``graft/swap_seconds`` (in the swaps
    alone).

    For a mixture of experts, ``routing_agreement`` and ``routing_top1_changed`` compare every grafted subject with the
    Instruct on the same tokens, and the tuned model with the Base; see :mod:`shadowlit.evaluation.routing`. For this
    the untouched models' choices stay in the CPU's memory: 2 bytes per model, layer, chosen expert, and supervised
    token of a rank's validation sets.

    Other callbacks can measure the same subjects: see :class:`shadowlit.callbacks.record.MeasuresSubjects`.

    Warning:
        Does not compose with callbacks that swap weights themselves (``WeightAveraging``, ``EMAWeightAveraging``,
        ``StochasticWeightAveraging``).

    Example::

        Trainer(callbacks=[GraftCallback(scales=[1.0, 0.5]), ModelCheckpoint(monitor="val/grafted/loss")])

    Args:
        select: Tensors that get the update: linear (every linear layer except the output head, as in the paper's code),
            all, or regular expressions searched in the tensors' names. In a list of several, the towers of a
            vision-language model (language, vision, projector) restrict the rest: [language, linear].
        scales: Scales of the graft to validate. The first is the main one, logged as ``val/grafted/*``; a further
            one, e.g. 0.5, is logged as ``val/grafted@0.5/*``.
        dtype: The dtype that the graft is rounded to, in validation and in the export. auto: that of the Instruct's
            file.
        offload: Whether the frozen weights of the pair are kept in the CPU's memory.
        baselines: Whether the untouched Base and Instruct are measured once, in the first full validation.
        statistics: Whether norms and survival of the update are logged at every validation.
        adapter: Whether to score the adapter on the Instruct, val/adapter/*, next to the graft; null for
            where the adapter is exported.
        routing: Whether to log how many choices of experts the graft changes, for a mixture of experts. Needs
            baselines; not measured in compiled layers.
        transforms: Transforms of the update, applied in this order before it is scaled, e.g.
            [{name: dare, density: 0.2}]: magnitude, dare, svd, ties, gradfix, or the import path of a function.
            Metrics, norms, survival and exports are those of the transformed update.
        variants: Further grafts by name, each with transforms of its own in place of these, scored in the same
            validation: {dare: {transforms: [{name: dare, density: 0.2}]}} is logged as ``val/grafted@dare/*``.
            ``export.subject`` chooses the one that is exported.
        validate: Whether the grafted models are validated; false if only the tuned model and the update matter.
        fit_scales: Calibration rows on which scales of layers, kinds or tensors, or the best single one, are found
            when the training ends, and how; the export has them (docs/beyond.md). null for the scale as it is given.

    Attributes:
        subjects: The grafts that are validated, the main one first.
        record: The record of the running validation or test, or else of the last one.
        finished: The record of the last complete validation, whose metrics checkpoints and exports state.
        exported: What the export of this fit wrote and how it is loaded, line by line.
        exports_adapter: Whether the run exports the adapter, so that it is scored by default.
        graft: The graft of the module's model, from its first use in a command to the command's end.
        twins: In the running validation, subjects that have the weights of another one, which is measured before:
            ahead of the first step the tuned model is the Base, and every graft the Instruct.
        fingerprints: Fingerprints of the files of ``base`` and ``instruct``, from the command's setup on.
        settings: Settings that a checkpoint's metrics depend on.
    """

    def __init__(
        self,
        select: str | list[str] = "linear",
        scales: list[float] = [1.0],  # noqa: B006 - read only, and shown by --help
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        offload: bool = False,
        baselines: bool = True,
        statistics: bool = True,
        adapter: bool | None = None,
        routing: bool = True,
        transforms: list[dict[str, Any]] = [],  # noqa: B006
        variants: dict[str, Variant] | None = None,
        validate: bool = True,
        fit_scales: FitScales | None = None,
    ) -> None:
        named = {f"{scale:g}" for scale in scales} if all(isinstance(s, int | float) for s in scales) else set()
        if not scales or len(named) < len(scales) or not all(map(math.isfinite, scales)):
            raise GraftError(
                f"graft.scales is {scales}; expected at least one finite number, and none of them twice in its first "
                "six digits, which name its metrics."
            )
        self.transforms, self.variants = Transforms(transforms), transforms_by_name(variants or {})
        self.select = select
        self.scales = list(scales)
        self.subjects = all_grafts(self.scales, variants or {})
        self.dtype = _DTYPES.get(dtype)
        self.offload = offload
        self.baselines = baselines
        self.statistics = statistics
        self.adapter = adapter
        self.exports_adapter = False
        self.exported: list[str] = []
        self.routing = routing
        self.validate = validate
        self.fit_scales = fit_scales
        self.twins: dict[Subject, Subject] = {}
        self.settings: dict[str, Any] = {
            "select": select, "scales": self.scales, "dtype": str(self.dtype), "transforms": self.transforms.specs,
        }  # fmt: skip
        if variants:
            own = [subject for subject in self.subjects if subject.variant]
            self.settings["variants"] = {
                each.variant: {"scale": each.scale, "transforms": self.transforms_of(each).specs} for each in own
            }
        self.graft: LiveGraft | None = None
        self._fits = False  # whether the pair was found to fit, in the command that begins
        self.finished = self.record = ValidationRecord()
        self._run = RunTotals()
        self._untouched = UntouchedMetrics()
        self._instruct_losses: dict[str, dict[str, torch.Tensor]] = {}  # by stage and set: of each sample, [N, 2]
        self._routing: Routing | None = None
        self._routing_on = ""  # signature of the data on which the untouched models' choices were recorded
        self._hook: RemovableHandle | None = None
        self.fingerprints: dict[str, str] = {}

    def before_data(self, trainer: Trainer, pl_module: ShadowModule) -> None:
        """Check the pair, with the chat template of the data: the module calls this before the data are read."""
        data = run_data(trainer)
        template = None if data.chat_template is None else load_template(data.chat_template)
        require_fit(pl_module.pair, self.select, template, data.template_kwargs)
        self._fits = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module, the other callbacks and the pair before any weight is loaded for training."""
        if not isinstance(pl_module, ShadowModule):
            raise GraftError(
                f"GraftCallback needs a ShadowModule or a subclass of it, but the module is a "
                f"{type(pl_module).__name__}. Derive yours from shadowlit.training.module.ShadowModule."
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        require_subject(pl_module, callbacks)
        swapping = [type(c).__name__ for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if swapping:
            raise GraftError(
                f"GraftCallback can't share a run with {', '.join(swapping)}: both swap the module's weights around "
                "validation. Remove one of them."
            )
        if stage == "fit" and self.fit_scales and not any(getattr(each, "fits_scales", False) for each in callbacks):
            raise GraftError(
                "graft.fit_scales finds the scales of the model that is exported, but nothing is exported. Set "
                "export.enabled=true, or remove graft.fit_scales."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for transforms in self.all_transforms:
                require_elementwise(transforms, trainer.world_size)
        read_gradient_rows(trainer, pl_module, self._applied_transforms(trainer))
        if not self._fits:
            self.before_data(trainer, pl_module)
        self._fits = False  # of the next command it isn't known
        self._run = RunTotals()  # not that of an earlier fit, which may have ended by an exception
        fingerprints = {**pl_module.pair.fingerprints(), **pl_module.start.fingerprints()}
        if fingerprints != self.fingerprints:  # what was measured of another pair
            self.fingerprints, self._untouched = fingerprints, UntouchedMetrics()
        if stage == "fit":
            self.finished, self.exported = ValidationRecord(), []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the graft, log what it covers, and make sure that training starts at the Base."""
        self._run = RunTotals(started=time.perf_counter())
        graft = self.build(pl_module)
        rank_zero_info(
            f"graft: {graft.coverage}; frozen weights of {graft.frozen_bytes / 1e6:.1f} MB per rank on the "
            f"{'CPU' if graft.offload else 'device'}, {graft.frozen_bytes / max(1, graft.num_local_parameters):.1f} "
            "bytes per parameter"
        )
        assert isinstance(pl_module, ShadowModule)
        starts = trainer.global_step == 0 and not trainer.ckpt_path and pl_module.start.weights is None
        if starts and not graft.on_base:
            raise GraftError(
                "the module does not start at the Base: its weights differ before the first step. Expected those of "
                "pair.base. To resume from a checkpoint, pass it as ckpt_path."
            )
        self._measure_references(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Predict the batch with the reference of an objective that compares tokens, before the module trains on it."""
        assert isinstance(pl_module, ShadowModule)
        if (subject := pl_module.token_reference) is not None:
            self._measure_reference(pl_module, subject, partial(pl_module.measure_predictions, subject, batch))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if a callback monitors a metric that isn't logged."""
        assert isinstance(pl_module, ShadowModule)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        require_monitored(trainer, pl_module, [name for c in callbacks for name in getattr(c, "evaluators", ())])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a record, and measure the reference of a preference objective where it is not known yet."""
        run = RunTotals() if trainer.sanity_checking else self._run
        self.record = ValidationRecord("test" if trainer.testing else "val", run)
        assert isinstance(pl_module, ShadowModule)
        pl_module.callback_metrics = self.record.metrics
        self._measure_references(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record the tuned model's choices of experts, if it has some."""
        self.build(pl_module)
        if routing := self._recording(trainer):
            routing.begin(TUNED.name)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Watch the routers in the batch."""
        if routing := self._recording(trainer):
            routing.watch()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Record what the routers chose."""
        if routing := self._recording(trainer):
            routing.take(TUNED.name, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the grafted passes, before the module logs the scores of all subjects."""
        assert isinstance(pl_module, ShadowModule)
        graft, record = self.build(pl_module), self.record
        swaps_s = graft.apply_s
        with record.timed("graft"), record.added_by(self):
            self._measure(trainer, pl_module)
        if not trainer.sanity_checking:
            record.metrics["graft/swap_seconds"] = graft.apply_s - swaps_s
            record.add_cost("graft")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was logged; checkpoint callbacks run after this, so a checkpoint holds its own metrics."""
        if not trainer.sanity_checking:
            self.record.close(trainer)
            self.finished = self.record
            metrics, loss = self.record.metrics, f"{self.record.stage}/grafted/loss"
            parts = []  # of what was measured: without baselines there is no gain, and without an update no survival
            if "graft/gain" in metrics:
                parts.append(f"gain {text.number(metrics['graft/gain'], signed=True)}")
            if loss in metrics:
                parts.append(f"grafted loss {text.number(metrics[loss])}")
            if "graft/survival" in metrics:
                parts.append(f"survival {metrics['graft/survival']:.1%}")
            if parts:
                rank_zero_info(f"graft: step {trainer.global_step:,}: {', '.join(parts)}")

    # A test is a validation on other sets.
    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate the answers with the grafted Instruct."""
        self.build(pl_module).apply(self.subjects[0])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the trained weights back."""
        self._restore()

    @contextmanager
    def grafted(self, pl_module: LightningModule, scale: float | None = None) -> Iterator[None]:
        """Load the grafted weights into the module within the context; ``scale`` defaults to the main one."""
        subject = self.subjects[0] if scale is None else Subject("grafted", scale)
        with self.build(pl_module).applied(subject):
            yield

    @property
    def all_transforms(self) -> list[Transforms]:
        """The transforms of all grafts."""
        return [self.transforms, *self.variants.values()]

    def _applied_transforms(self, trainer: Trainer) -> list[Transforms]:
        """Those of the grafts that a command loads: answers are the main one's."""
        return [self.transforms] if trainer.predicting else self.all_transforms

    def transforms_of(self, subject: Subject) -> Transforms:
        """Return the transforms of a graft."""
        return self.variants.get(subject.variant, self.transforms)

    def build(self, pl_module: LightningModule) -> LiveGraft:
        """Return the graft of the module's model; the pair's weights are read at the first call of a command."""
        assert isinstance(pl_module, ShadowModule) and pl_module.model is not None
        if self.graft is None or self.graft.model is not pl_module.model:
            self._release()
            base, instruct = pl_module.pair.readers()
            self.graft = LiveGraft(
                pl_module.model, base, instruct, select=self.select, dtype=self.dtype, offload=self.offload,
                transforms=self.transforms, variants=self.variants, on_tuned=pl_module.start.weights is not None,
            )  # fmt: skip
            base.close()
            # So that the module's state always holds the trained weights: for checkpoint callbacks in any order, and
            # for a signal handler in the middle of a pass.
            self._hook = pl_module.register_state_dict_pre_hook(self._before_state_dict)
            self._routing, self._routing_on = self._new_routing(pl_module), ""
            trainer = pl_module.trainer
            measure_signs(trainer, pl_module, self.graft, self._applied_transforms(trainer))
        return self.graft

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Swap the trained weights back, whatever happened, and free the pair's."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap the trained weights back and free the pair's; after a fit, print the scores of what it ended with."""
        self._release()
        if stage == "fit" and trainer.is_global_zero and self.finished.metrics:
            console, metrics = make_console(), self.finished.metrics
            console.print(score_table(metrics, self.finished.errors, self.finished.step))
            lines = [survival_line(metrics), opening_line(metrics), losses_line(self.subjects, metrics)]
            for line in filter(None, [*lines, *self.exported]):
                console.print(line)

    def state_dict(self) -> dict[str, Any]:
        """Return the pair's fingerprints, the untouched models' scores, and the metrics of the last complete
        validation.
        """
        return {
            "fingerprints": self.fingerprints,
            "settings": self.settings,
            "untouched": self._untouched.state,
            "instruct_losses": self._instruct_losses,
            "metrics": dict(self.finished.metrics),
            "errors": self.finished.errors,
            "step": self.finished.step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores over; refuse a checkpoint of another pair."""
        saved = state_dict["fingerprints"]
        now = self.fingerprints or saved
        if changed := [who for who in {**now, **saved} if saved.get(who) != now.get(who)]:
            key = "model.start_from" if changed[0] == "start" else f"pair.{changed[0]}"
            raise GraftError(
                f"the checkpoint was written with another {' and '.join(changed)} than {key} is now (the "
                "fingerprints of the files differ), so its update belongs to other weights. Use the pair that it was "
                "trained with, pinned by revision, or start a new run (no ckpt_path, another run.name)."
            )
        self.fingerprints = saved
        if constants := state_dict.get("constants"):  # of a checkpoint from before the key "untouched"
            self._untouched.state = {"val": {"signature": state_dict["measured_on"], **constants}}
        else:
            self._untouched.state = state_dict.get("untouched", {})
        self._instruct_losses = state_dict.get("instruct_losses", {})
        self.finished = ValidationRecord(
            metrics=state_dict["metrics"], errors=state_dict.get("errors", {}), step=state_dict.get("step")
        )
        own, before = self.settings, state_dict.get("settings", self.settings)
        differing = [key for key in {**own, **before} if before.get(key) != own.get(key)]
        changed = [f"{key} {before.get(key)} (now {own.get(key)})" for key in differing]
        if changed:
            rank_zero_warn(
                f"graft: the checkpoint was written with another graft: {', '.join(changed)}. Its metrics and its best "
                "score are those of that graft. Resume with the same settings, or start a new run to compare them."
            )
            self.finished = ValidationRecord()

    def _before_state_dict(self, *_: Any) -> None:
        if self.graft is not None:
            self.graft.restore_for_checkpoint()

    def _restore(self) -> None:
        if self._routing is not None:
            self._routing.stop()
        if self.graft is not None:
            self.graft.restore()

    def _release(self) -> None:
        self._restore()
        if self.graft is not None and self._hook is not None:
            self.graft.close()
            self._hook.remove()
        self.graft = self._hook = self._routing = None

    def _measure_references(self, module: LightningModule) -> None:
        """Measure the log-probabilities of a preference objective's reference, with the untouched models' weights."""
        assert isinstance(module, ShadowModule)  # whose own weights are trained already after a resume
        for subject in UNTOUCHED:
            if names := module.lacking_references(subject):
                start = time.perf_counter()
                with isolate_rng():
                    self._measure_reference(module, subject, partial(module.measure_references, subject, names))
                rank_zero_info(
                    f"graft: the untouched {subject.name.capitalize()}'s log-probabilities of {', '.join(names)} were "
                    f"measured in {time.perf_counter() - start:.1f} s"
                )

    def _measure_reference(self, module: ShadowModule, subject: Subject, function: Callable[[], None]) -> None:
        """Measure with the Instruct's weights, or with the Base's, or with what the training started from instead."""
        graft = self.build(module)
        assert module.model is not None
        values = module.start.values(module.model) if subject == BASE else None
        if values is None:
            return graft.measure(subject, function)
        with graft.trained_as(values):
            return function()

    def _measure(self, trainer: Trainer, module: ShadowModule) -> None:
        """Run the passes of one validation and add what they measure to its record."""
        graft, record, main = self.build(module), self.record, self.subjects[0]
        self.twins = self._find_twins(trainer, module, graft)
        squares: Squares | None = {} if self.statistics else None  # the main graft's, found while it is swapped in
        for subject in self._validated:
            self._pass(trainer, module, subject, squares if subject == main else None)
        if trainer.sanity_checking:
            return
        graft.measure(TUNED, partial(self._ask_others, trainer, module, TUNED))
        record.rows |= {subject.name: module.sample_scores(subject) for subject in [TUNED, *self._validated]}
        statistics = graft.statistics(main.scale, squares) if self.statistics else {}
        self.warn_of_zero(trainer, statistics)
        record.metrics |= {f"graft/{name}": value for name, value in statistics.items()}
        unrounded = self._unrounded(module, statistics.get("survival", 1.0)) if self.validate else None
        if unrounded:
            self._pass(trainer, module, unrounded)
        if module.quantization is not None and self.validate:
            self._pass(trainer, module, Subject("grafted_4bit", main.scale))
        untouched = self._measure_untouched(trainer, module)
        for subject, metrics in untouched.items():
            record.metrics |= {f"{record.stage}/{subject.name}/{name}": value for name, value in metrics.items()}
        if untouched and self.validate:
            loss = untouched[INSTRUCT]["loss"]
            record.metrics["graft/gain"] = loss - module.scores(main)["loss"]
            if unrounded:
                record.metrics["graft/gain_unrounded"] = loss - module.scores(unrounded)["loss"]
            before = self._instruct_losses.get(record.stage, {})
            for name, rows in record.rows.get(main.name, {}).items():
                if name in before:
                    record.errors[f"{name}/loss" if name else "loss"] = error_of_gain(before[name], rows[:, :2])
        self._compare_routing(module)
        if statistics.get("survival", 1.0) < LEAST_SURVIVAL:
            self._warn_of_rounding(record.metrics)

    @property
    def _validated(self) -> list[Subject]:
        return self.subjects if self.validate else []

    def _find_twins(self, trainer: Trainer, module: ShadowModule, graft: LiveGraft) -> dict[Subject, Subject]:
        """Find out which subjects have the weights of another before the first step.

        None where each needs its own pass: if choices of experts are recorded, or a subclass has a step of its own.
        """
        step = "test_step" if trainer.testing else "validation_step"
        own_step = getattr(type(module), step) is not getattr(ShadowModule, step)
        if trainer.sanity_checking or trainer.global_step or self._routing is not None or own_step:
            return {}
        is_base, are_instruct = graft.unchanged()
        twins = {BASE: TUNED} if is_base else {}
        if are_instruct and self.validate:
            plain = [subject for subject in self.subjects[1:] if not self.transforms_of(subject)]
            twins |= dict.fromkeys((*plain, INSTRUCT), self.subjects[0])
        return twins

    def _unrounded(self, module: ShadowModule, survival: float) -> Subject | None:
        """The model that is measured for what rounding costs: the adapter on the Instruct, or the graft unrounded."""
        graft, scale = self.build(module), self.scales[0]
        wanted = self.exports_adapter or survival < LEAST_SURVIVAL if self.adapter is None else self.adapter
        if graft.serves_adapter(scale) and wanted:
            return Subject("adapter", scale)
        return Subject("unrounded", scale) if survival < LEAST_SURVIVAL and graft.holds_float32 else None

    def warn_of_zero(self, trainer: Trainer, statistics: Metrics) -> None:
        """Warn, once in a fit, if steps were taken and the update's norm in ``statistics`` is zero."""
        if self._run.started is not None and trainer.global_step and statistics.get("delta_norm") == 0:
            self._warn_once(
                "zero",
                f"graft: the update is zero after {counted(trainer.global_step, 'step')}: no weight that graft.select "
                "chooses has changed, so the grafted model is the Instruct. Check model.lr and its schedule, that "
                f"graft.select (now {self.select}) matches what is trained, and that the training rows have "
                "supervised tokens.",
            )

    def _warn_of_rounding(self, metrics: Metrics) -> None:
        """Warn that most of the update is lost in the export's dtype."""
        gains = [f"{metrics[name]:.4g} {what}" for name, what in _GAINS.items() if name in metrics]
        self._warn_once(
            "rounding",
            f"graft: only {metrics['graft/survival']:.0%} of the update survives rounding to the export's dtype"
            f"{': the gain is ' + ', '.join(gains) if gains else ''}. Export float32 (graft.dtype=float32), or the "
            "update itself: the adapter or the delta (export.parts).",
        )

    def _warn_once(self, what: str, message: str) -> None:
        """Give a warning once in a fit, and in every other command."""
        if what not in self._run.warned:
            self._run.warned.add(what)
            rank_zero_warn(message)

    def _measure_untouched(self, trainer: Trainer, module: ShadowModule) -> dict[Subject, Metrics]:
        """Scores of the untouched models, measured in the first full validation on these data and then remembered."""
        if not self.baselines:
            return {}
        settings = settings_of([module.objective, *module.metrics.values()])
        signature = f"{data_signature(*_batches(trainer))} {trainer.precision} {list(module.metrics)} {settings}"
        stage = self.record.stage

        def measure(subject: Subject, _: list[str]) -> dict[str, Metrics]:
            self._pass(trainer, module, subject)
            rows = self.record.rows[subject.name] = module.sample_scores(subject)
            if subject == INSTRUCT:
                self._instruct_losses[stage] = {name: scores[:, :2].clone() for name, scores in rows.items()}
            return {stage: module.take_scores(subject)}

        again = trainer.testing or (self._routing is not None and self._routing_on != signature)
        self._untouched.measure({stage: signature}, measure, again)
        self._routing_on = "" if trainer.testing else signature
        return self._untouched.known(stage, signature)

    def _pass(self, trainer: Trainer, module: ShadowModule, subject: Subject, squares: Squares | None = None) -> None:
        """Run the batches with the weights of ``subject``, score them, and let the other callbacks measure it."""

        def run() -> None:
            module.take_scores(subject)  # those of a pass that is repeated
            if subject in self.twins:
                module.share_scores(self.twins[subject], subject)
            else:
                # Iterating a loader draws a seed from the global generator: the training must not notice.
                with isolate_rng():
                    self.run_batches(trainer, subject)
            if not module.has_scores(subject):
                step = f"{type(module).__name__}.{'test' if trainer.testing else 'validation'}_step"
                raise GraftError(
                    f"{step} was called with the subject {subject.name} and scored nothing for it; expected that its "
                    f"batches are scored under its name. Pass the subject on: super().{step.rpartition('.')[2]}(batch, "
                    "batch_idx, dataloader_idx, subject)."
                )
            if subject.kind not in ("adapter", "unrounded", "grafted_4bit"):
                self._ask_others(trainer, module, subject)

        self.build(module).measure(subject, run, squares)

    def run_batches(self, trainer: Trainer, subject: Subject) -> None:
        """Run the batches of the running test, else those of a validation, with the weights that are loaded; their
        scores are kept as those of ``subject``.
        """
        step = trainer.strategy.test_step if trainer.testing else trainer.strategy.validation_step
        loaders, limits = _batches(trainer)
        if routing := self._recording(trainer):
            routing.begin(subject.name)
        for index, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
            for number, batch in enumerate(islice(loader, int(limit))):
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
                if routing:
                    routing.watch()
                step(trainer.precision_plugin.convert_input(batch), number, index, subject)
                if routing:
                    routing.take(subject.name, batch)
                show(trainer, f"{stage_of(trainer)} of {subject.name} {number + 1}/{int(limit)}")
                reach_boundary(trainer)

    def _ask_others(self, trainer: Trainer, module: ShadowModule, subject: Subject) -> None:
        """Let the other callbacks measure ``subject``, whose weights are loaded."""
        if trainer.sanity_checking:
            return
        graft = self.build(module)
        swaps_s = graft.apply_s
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MeasuresSubjects):
                with isolate_rng(), self.record.added_by(callback):
                    callback.on_subject(trainer, module, subject, self.record)
        graft.apply_s = swaps_s  # swaps that another callback asked for are not the graft's
        if subject not in self.record.subjects:
            self.record.subjects.append(subject)

    def _new_routing(self, module: ShadowModule) -> Routing | None:
        assert module.model is not None
        if not self.routing or not self.baselines or not routers_of(module.model):
            return None
        if module.compile_layers:
            rank_zero_info("graft: choices of experts can't be seen in compiled layers; no routing agreement is logged")
            return None
        return Routing(module.model)

    def _recording(self, trainer: Trainer) -> Routing | None:
        return None if trainer.sanity_checking or trainer.training else self._routing

    def _compare_routing(self, module: ShadowModule) -> None:
        if self._routing is None:
            return
        for subject in [*self._validated, TUNED]:
            agreement = self._routing.agreement(subject.name, subject.start.name, module.device)
            self.record.metrics |= {f"{self.record.stage}/{subject.name}/{what}": v for what, v in agreement.items()}
            self._routing.forget(subject.name)


def _batches(trainer: Trainer) -> tuple[list[Any], list[float]]:
    """The loaders of the running validation or test, and the number of batches of each."""
    if trainer.testing:
        loaders, limits = trainer.test_dataloaders, trainer.num_test_batches
    else:
        loaders = trainer.val_dataloaders
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return (loaders if isinstance(loaders, list) else [loaders]), limits
