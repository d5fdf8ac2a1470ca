"""EvaluationCallback: what the tuned, the grafted and the untouched models can do, while the Base trains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from shadowlit.arguments import takes_plain_values
from shadowlit.callbacks.folder import run_folder
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.record import RunTotals, ValidationRecord
from shadowlit.callbacks.schedule import is_last_validation
from shadowlit.callbacks.scores import error_of_paired
from shadowlit.callbacks.stopping import reach_boundary
from shadowlit.callbacks.untouched import Metrics, UntouchedMetrics
from shadowlit.data.conversation import gathered, located, raise_all
from shadowlit.data.protocol import RunData, run_data
from shadowlit.distributed import of_all_ranks
from shadowlit.errors import GraftError, wrong_names
from shadowlit.evaluation.evaluator import EvalContext, EvalResult, Evaluator, require_result
from shadowlit.evaluation.samples import log_text, read_samples, side_by_side
from shadowlit.files import replace_text
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.subject import INSTRUCT, TUNED, UNTOUCHED, Subject
from shadowlit.pair.pair import ModelPair
from shadowlit.plugins import WITHOUT_SUPER, calls, path_of
from shadowlit.training.bar import show
from shadowlit.training.metrics import name_clash
from shadowlit.training.module import ShadowModule

_SANITY_ROWS = 2


@takes_plain_values("evaluation")
class EvaluationCallback(Callback):
    """Measures tasks in every validation, on the tuned Base, the grafted Instruct and the two untouched models.

    Logged are ``val/<subject>/<evaluator>/<metric>``, for the subjects of :class:`GraftCallback`: ``tuned``,
    ``grafted``, ``grafted@0.5``, ``base``, ``instruct``; ``graft/gain/<evaluator>``, the grafted score minus the
    Instruct's; ``evaluation/<evaluator>/seconds``, ``evaluation/seconds`` and ``evaluation/time_share`` (of the run so
    far). The grafted Instruct is measured while GraftCallback has its weights loaded, the untouched models once
    for the same rows and settings. The training trajectory is bit-identical to one without the callback.

    An evaluator with ``every=n`` runs in the first full validation of a fit, in every *n*-th validation after it, and
    in the last one that ``max_steps`` or ``max_epochs`` allow; in ``validate`` and ``test`` it always runs. Where it
    does not run, no metric of it is logged, and Lightning shows callbacks the values from before: monitor metrics of
    evaluators with ``every=1``. The sanity check before the first step runs two rows of every evaluator on every
    subject and discards the results, so that an evaluator that fails does so at once.

    The samples of every evaluator are written to ``<folder>/step-<step>/<subject>/<evaluator>.jsonl`` (those of the
    untouched models to ``<folder>/<subject>/…``, those of the command test to ``<folder>/test/<subject>/…``), one
    object per row with ``index`` and ``score``. Answers side by side go to ``samples.md`` and to the loggers that take
    text.

    Must be listed after GraftCallback; without one, only the tuned model is measured.

    Example::

        math = Generation("math.jsonl", prompt="question", answer="answer", match="numeric")
        Trainer(callbacks=[GraftCallback(), EvaluationCallback({"math": math})])

    Args:
        evaluators: Evaluators by name; the names appear in the metrics.
        scales: Scales of graft.scales, in addition to the first, at which the evaluators run.
        baselines: Whether the untouched Base and Instruct are measured.
        samples: Number of rows of each generating evaluator that are shown side by side.
        folder: Folder of the samples; null for ``evaluation`` in the run's own folder.
        reference: Which untouched model a divergence is measured from: base where the pair's roles are swapped.
        subjects: Models that the evaluators measure besides the untouched ones; without a graft only tuned.
        last_only: Whether the evaluators run only in the last validation of a fit, whatever their ``every``.
        variants: Names of graft.variants on which the evaluators run too.
        only: Names of the evaluators that run; null for all.

    Attributes:
        due: Names of the evaluators that run in the running validation, or else ran in the last one.
    """

    def __init__(
        self,
        evaluators: dict[str, Evaluator] | None = None,
        scales: list[float] = [],  # noqa: B006 - read only, and shown by --help
        baselines: bool = True,
        samples: int = 4,
        folder: str | None = None,
        reference: Literal["instruct", "base"] = "instruct",
        subjects: list[Literal["tuned", "grafted"]] = ["tuned", "grafted"],  # noqa: B006
        last_only: bool = False,
        variants: list[str] | None = None,
        only: list[str] | None = None,
    ) -> None:
        self.evaluators = dict(evaluators or {})
        if wrong := wrong_names("evaluation.evaluators", self.evaluators):
            raise GraftError(wrong[0])
        for name, evaluator in self.evaluators.items():
            if not hasattr(evaluator, "every"):
                raise GraftError(f"evaluation.evaluators.{name} is {path_of(evaluator)}, but {WITHOUT_SUPER}.")
        if unknown := [name for name in only or () if name not in self.evaluators]:
            raise GraftError(
                f"evaluation.only names {', '.join(unknown)}; evaluation.evaluators are "
                f"{', '.join(self.evaluators) or 'none'}. Name some of them."
            )
        if only is not None:
            self.evaluators = {name: each for name, each in self.evaluators.items() if name in only}
        self.scales = list(scales)
        self.baselines = baselines
        self.samples = samples
        self.folder = folder
        self.reference = reference
        self.subjects, self.last_only = list(subjects), last_only
        self.variants = list(variants or ())
        self.record: ValidationRecord | None = None  # GraftCallback's, where there is one
        self._run_totals = RunTotals()
        self._untouched = UntouchedMetrics()
        self._graft: GraftCallback | None = None
        self._pair: ModelPair | None = None  # with the tokenizer that the data are encoded with
        self._settings = ""  # what scores depend on besides the evaluator
        self.due: list[str] = []
        self._validations = 0
        self._found: dict[tuple[Subject, str], EvalResult] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read and check the rows of all evaluators, before any weight is loaded."""
        if not self.evaluators or stage == "predict":
            return
        if not isinstance(pl_module, ShadowModule):
            raise GraftError(
                f"EvaluationCallback needs a ShadowModule, but the module is a {type(pl_module).__name__}."
            )
        self._run_totals = RunTotals()
        self._graft = self._graft_callback(trainer)
        data = run_data(trainer)
        # Which models are measured only matters for the untouched ones, and so where there is a graft.
        fingerprints = {} if self._graft is None else self._graft.fingerprints
        self._settings = f"{trainer.precision} {self.reference} {sorted(fingerprints.items())}"
        if stage == "fit":
            self._validations = 0  # those of an earlier fit; a checkpoint's are loaded after this
        self._read(pl_module, data, data.test_names if stage == "test" else data.validation_names)

    def read(self, module: ShadowModule, data: RunData, graft: GraftCallback | None) -> None:
        """Read and check the rows of all evaluators, as a fit would, without a trainer.

        Args:
            module: The module; its weights aren't needed.
            data: Its data, which need not have been read.
            graft: The callback that grafts, if there is one.

        Raises:
            ShadowlitError: All problems in one message.
        """
        self._graft = graft
        self._read(module, data, data.validation_names)

    def _read(self, module: ShadowModule, data: RunData, names: Sequence[str]) -> None:
        self._pair = module.pair
        if data.chat_template is not None and data.tokenizer is not None:
            self._pair = self._pair.with_tokenizer(data.tokenizer)
        errors = [*self._problems(), *self._clashes(module, names)]
        for name, evaluator in self.evaluators.items():
            with gathered(errors), located(f"evaluation.evaluators.{name}:"), _calls(name, evaluator):
                evaluator.read(self._pair, data.template_kwargs)
                evaluator.signature()
        raise_all(errors)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the time that evaluations take a share of."""
        self._run_totals = RunTotals(started=time.perf_counter())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which evaluators run in this validation; all do in a test."""
        if not self.evaluators:
            return
        if self._graft is not None:
            self.record = self._graft.record
        else:
            assert isinstance(pl_module, ShadowModule)
            self.record = ValidationRecord("test" if trainer.testing else "val", self._run_totals)
            pl_module.callback_metrics = self.record.metrics
        if trainer.sanity_checking:
            due = []
        elif trainer.state.fn != TrainerFn.FITTING or is_last_validation(trainer):
            due = list(self.evaluators)
        elif self.last_only:
            due = []
        else:
            due = [name for name, evaluator in self.evaluators.items() if self._validations % evaluator.every == 0]
        self.due, self._found = due, {}

    def on_subject(self, trainer: Trainer, module: ShadowModule, subject: Subject, record: ValidationRecord) -> None:
        """Run the due evaluators on the tuned and the grafted models; the untouched ones are measured later, once."""
        if self.due and self._is_measured(subject):
            self._measure(trainer, module, subject, self.due)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what GraftCallback has not had measured, and log everything; in the sanity check try everything."""
        if self.evaluators and trainer.sanity_checking:
            assert isinstance(pl_module, ShadowModule)
            self._try_all(trainer, pl_module)
        if self.due:
            assert isinstance(pl_module, ShadowModule) and self.record is not None
            if self._graft is None:
                self.on_subject(trainer, pl_module, TUNED, self.record)
            elif self.baselines:
                self._measure_untouched(trainer, pl_module, self._graft.build(pl_module))
            self._write(trainer, self.record)
            with self.record.added_by(self):
                self._add_metrics(self.record)
        self._validations += trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    on_test_start = on_validation_start
    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """Return the untouched models' scores, and how many validations there were."""
        return {"constants": self._untouched.state, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both over; scores of other rows or settings are measured again."""
        self._untouched.state, self._validations = state_dict["constants"], state_dict["validations"]

    def _problems(self) -> Iterator[str]:
        for name, evaluator in self.evaluators.items():
            if evaluator.needs_reference and self._graft is None:
                yield f"evaluation.evaluators.{name} compares with the Instruct, which needs a GraftCallback. Add one."
        further = self._graft.scales[1:] if self._graft is not None else []
        if unknown := [scale for scale in self.scales if scale not in further]:
            yield f"evaluation.scales has {unknown}, beyond graft.scales {further}. Add them there, after the first."
        named = list(self._graft.variants) if self._graft is not None else []
        if unnamed := [name for name in self.variants if name not in named]:
            yield f"evaluation.variants has {unnamed}, beyond graft.variants {named}. Add them there."

    def _clashes(self, module: ShadowModule, sets: Sequence[str]) -> Iterator[str]:
        """Evaluators with a validation set's name and one of its metrics, as far as their metrics are known."""
        shared = [name for name in self.evaluators if name in sets and len(sets) > 1]
        scores = module.score_names() if shared else set()
        for name in shared:
            if both := sorted(scores & set(self.evaluators[name].metric_names)):
                yield name_clash([f"{name}/{metric}" for metric in both])

    def _graft_callback(self, trainer: Trainer) -> GraftCallback | None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((c for c in callbacks if isinstance(c, GraftCallback)), None)
        if found is not None and callbacks.index(found) > callbacks.index(self):
            raise GraftError(
                "EvaluationCallback is listed before GraftCallback, so the grafted model would be measured after its "
                "scores were collected. List it after GraftCallback in trainer.callbacks."
            )
        return found

    def _run(self, trainer: Trainer, module: ShadowModule, subject: Subject, names: Sequence[str]) -> None:
        assert self.record is not None
        context = self._context(trainer, module)
        for name in names:
            evaluator = self.evaluators[name]
            show(trainer, f"{name} of {subject.name}")
            with self.record.timed(f"evaluation/{name}"), isolate_rng(), _calls(name, evaluator) as key:
                self._found[subject, name] = require_result(evaluator.run(context), key, evaluator)
            module.eval()  # for those that follow, whatever this one left

    def _is_measured(self, subject: Subject) -> bool:
        """Whether the evaluators run on a model that is no untouched one."""
        is_graft = subject.kind == "grafted"
        if is_graft and self._graft is not None and not self._graft.validate:
            return False
        if subject.variant:
            own = subject.variant in self.variants
        else:
            own = subject == TUNED if not is_graft else subject.main or subject.scale in self.scales
        return own and (subject.kind in self.subjects or self._graft is None)

    def _measure(self, trainer: Trainer, module: ShadowModule, subject: Subject, names: Sequence[str]) -> None:
        """Run evaluators on a subject, or take over what they found on another one with the same weights."""
        twin = None if self._graft is None else self._graft.twins.get(subject)
        known = {name: self._found[twin, name] for name in names if twin is not None and (twin, name) in self._found}
        self._found |= {(subject, name): found for name, found in known.items()}
        self._run(trainer, module, subject, [name for name in names if name not in known])

    def _try_all(self, trainer: Trainer, module: ShadowModule) -> None:
        """Run every evaluator on every subject and discard the results; a collective."""
        if self._graft is None:
            self._run(trainer, module, TUNED, list(self.evaluators))
            return
        own = [subject for subject in [TUNED, *self._graft.subjects] if self._is_measured(subject)]
        for subject in [*own, *(UNTOUCHED if self.baselines else ())]:
            run = partial(self._run, trainer, module, subject, list(self.evaluators))
            self._graft.build(module).measure(subject, run)

    def _context(self, trainer: Trainer, module: ShadowModule) -> EvalContext:
        assert module.model is not None and self._pair is not None
        graft = self._graft.build(module) if self._graft is not None else None
        return EvalContext(
            model=module.model,
            head=module.head_losses(),
            pair=self._pair,
            device=module.device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            autocast=trainer.precision_plugin.val_step_context,
            reference=nullcontext if graft is None else partial(graft.applied, Subject(self.reference)),
            template_kwargs=run_data(trainer).template_kwargs,
            num_rows=_SANITY_ROWS if trainer.sanity_checking else None,
            reach_boundary=partial(reach_boundary, trainer),
        )

    def _measure_untouched(self, trainer: Trainer, module: ShadowModule, graft: LiveGraft) -> None:
        def measure(subject: Subject, names: list[str]) -> dict[str, Metrics]:
            graft.measure(subject, partial(self._measure, trainer, module, subject, names))
            return {name: self._found[subject, name].metrics for name in names}

        self._untouched.measure(self._signatures(), measure)

    def _signatures(self) -> dict[str, str]:
        return {name: f"{self.evaluators[name].signature()} {self._settings}" for name in self.due}

    def _add_metrics(self, record: ValidationRecord) -> None:
        scores: dict[tuple[Subject, str], Metrics] = {key: found.metrics for key, found in self._found.items()}
        for name, signature in self._signatures().items() if self.baselines else ():
            known = self._untouched.known(name, signature)
            scores |= {(subject, name): metrics for subject, metrics in known.items()}
        for (subject, name), metrics in scores.items():
            prefix = f"{record.stage}/{subject.name}/{name}"
            record.metrics |= {f"{prefix}/{what}": value for what, value in metrics.items()}
            if subject.kind == "grafted" and subject.main and (INSTRUCT, name) in scores:
                record.metrics[f"graft/gain/{name}"] = metrics["score"] - scores[INSTRUCT, name]["score"]
        for name in self.due:
            record.metrics[f"evaluation/{name}/seconds"] = record.spent(f"evaluation/{name}")
        record.add_cost("evaluation")

    def _write(self, trainer: Trainer, record: ValidationRecord) -> None:
        """Write the samples of all ranks to files, in the order of the rows."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(self.folder or run_folder(trainer) / "evaluation")
        home = root / ("test" if record.stage == "test" else f"step-{trainer.global_step}")
        by_subject: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for (subject, name), found in self._found.items():
            samples = sorted(of_all_ranks(found.samples), key=lambda sample: sample["index"])
            by_subject[subject.name, name] = samples
            place = root if subject in UNTOUCHED else home
            if trainer.is_global_zero:
                lines = (json.dumps(sample, ensure_ascii=False) for sample in samples)
                replace_text(place / subject.name / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        if not trainer.is_global_zero:
            return
        for name in self.due:
            instruct = by_subject.get(("instruct", name)) or read_samples(root / "instruct" / f"{name}.jsonl")
            record.errors[f"{name}/score"] = error_of_paired(instruct, by_subject.get(("grafted", name), []))
        if not self.samples:
            return
        text = side_by_side(by_subject, root, self.due, self.samples)
        if text:
            replace_text(home / "samples.md", text)
            log_text(trainer.loggers, f"{record.stage}/samples", text, trainer.global_step)


def _calls(name: str, evaluator: Evaluator) -> AbstractContextManager[str]:
    contract = "Its methods are those of shadowlit.evaluation.evaluator.Evaluator; correct the class."
    return calls(evaluator, f"evaluation.evaluators.{name}", contract)
