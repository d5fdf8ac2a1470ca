"""EvaluationCallback: what the tuned, the grafted and the untouched models can do, while the Base trains."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.schedule import is_last_validation
from shadowlit.data.conversation import raise_all
from shadowlit.data.protocol import run_data
from shadowlit.distributed import of_all_ranks
from shadowlit.errors import DataError, GraftError
from shadowlit.evaluation.evaluator import Evaluator, Findings, Scene
from shadowlit.evaluation.samples import log_text, side_by_side
from shadowlit.files import replace_text
from shadowlit.grafting.live import BASE, LiveGraft
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import TUNED, ShadowModule

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_UNTOUCHED: dict[str, float | str] = {"base": BASE, "instruct": 0.0}


class EvaluationCallback(Callback):
    """Measures tasks in every validation, on the tuned Base, the grafted Instruct and the two untouched models.

    Logged are ``val/<subject>/<evaluator>/<metric>``, for the subjects of :class:`GraftCallback`: ``tuned``,
    ``grafted``, ``grafted@0.5``, ``base``, ``instruct``; ``graft/gain/<evaluator>``, the grafted score minus the
    Instruct's; ``evaluation/<evaluator>/seconds``, ``evaluation/seconds`` and ``evaluation/time_share`` (of the run so
    far). The grafted Instruct is measured while GraftCallback's weights stand in the module; the untouched models once
    for the same rows and settings. The training trajectory is bit-identical to one without the callback.

    An evaluator with ``every=n`` runs in the first full validation of a fit, in each n-th after it, and in the last one
    that ``max_steps`` or ``max_epochs`` allow; in ``validate`` and ``test`` always. Where it doesn't run, nothing of it
    is logged, and Lightning shows callbacks the values from before: monitor metrics of evaluators with ``every=1``.

    The samples of every evaluator are written to ``<folder>/step-<step>/<subject>/<evaluator>.jsonl`` (those of the
    untouched models to ``<folder>/<subject>/…``, those of the command test to ``<folder>/test/<subject>/…``), one
    object per row with ``index`` and ``score``, and answers side by side to ``samples.md`` and to the logger, where it
    takes text.

    Stands after GraftCallback among the trainer's callbacks; without one, only the tuned model is measured.

    Example::

        math = Generation("math.jsonl", prompt="question", answer="answer", match="numeric")
        Trainer(callbacks=[GraftCallback(), EvaluationCallback({"math": math})])

    Args:
        evaluators: What to measure, by name; the names appear in the metrics.
        scales: Those of graft.scales, beyond the first, that are measured too.
        baselines: Measure the untouched Base and Instruct.
        samples: How many rows of each generating evaluator are shown side by side.
        folder: Of the samples; null for ``evaluation`` in the run's own folder.
        reference: Which untouched model a divergence is measured from: base where the pair's roles are exchanged.
    """

    def __init__(
        self,
        evaluators: dict[str, Evaluator] | None = None,
        scales: list[float] = [],  # noqa: B006 - read only, and shown by --help
        baselines: bool = True,
        samples: int = 4,
        folder: str | None = None,
        reference: Literal["instruct", "base"] = "instruct",
    ) -> None:
        self.evaluators = dict(evaluators or {})
        self.scales = list(scales)
        self.baselines = baselines
        self.samples = samples
        self.folder = folder
        self.reference = reference
        # Metrics of the untouched models: evaluator -> signature, subject -> metric -> value.
        self.constants: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self._graft: GraftCallback | None = None
        self._pair: ModelPair | None = None  # with the tokenizer that the data are encoded with
        self._settings = ""  # what scores depend on beside the evaluator
        self._due: list[str] = []
        self._validations = 0
        self._found: dict[tuple[str, str], Findings] = {}
        self._spent: dict[str, float] = {}
        self._logged: dict[str, set[str]] = {}  # names of metrics, by evaluator
        self._fit_start: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read and check the rows of all evaluators, before any weight is loaded."""
        if not self.evaluators or stage == "predict":
            return
        if not isinstance(pl_module, ShadowModule):
            raise GraftError(
                f"EvaluationCallback needs a ShadowModule, but the module is a {type(pl_module).__name__}."
            )
        self._graft = self._graft_callback(trainer)
        if self._graft is not None and self._measure not in self._graft.within:
            self._graft.within.append(self._measure)
        data = run_data(trainer)
        self._pair = pl_module.pair
        if data.chat_template is not None and data.tokenizer is not None:
            self._pair = self._pair.with_tokenizer(data.tokenizer)
        self._settings = f"{trainer.precision} {self.reference}"
        errors = list(self._problems())
        for name, evaluator in self.evaluators.items():
            try:
                evaluator.read(self._pair, data.template_kwargs)
            except DataError as error:
                errors.append(f"evaluation.evaluators.{name}: {error}")
        raise_all(errors)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the time that evaluations take a share of."""
        self._fit_start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which evaluators run in this validation."""
        if trainer.sanity_checking:
            self._begin([])
        elif trainer.state.fn != TrainerFn.FITTING or is_last_validation(trainer):
            self._begin(list(self.evaluators))
        else:
            self._begin([name for name, e in self.evaluators.items() if self._validations % e.every == 0])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All evaluators run in a test."""
        self._begin(list(self.evaluators))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what GraftCallback hasn't, and log everything."""
        self._finish(trainer, pl_module, "val")
        self._validations += trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave scores of earlier validations out of what a checkpoint and an export say of this one."""
        if self._graft is not None:
            for name in self._logged.keys() - self._due:
                for metric in self._logged[name]:
                    self._graft.metrics.pop(metric, None)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._finish(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """The untouched models' scores, and how many validations there were."""
        return {"constants": self.constants, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both over; scores of other rows or settings are measured anew."""
        self.constants, self._validations = state_dict["constants"], state_dict["validations"]

    # -- private ----------------------------------------------------------------------------------------------

    def _problems(self) -> Iterator[str]:
        for name, evaluator in self.evaluators.items():
            if not _NAME.fullmatch(name):
                yield f"evaluation.evaluators has the name '{name}'; expected letters, digits, '_' and '-'."
            if evaluator.needs_reference and self._graft is None:
                yield f"evaluation.evaluators.{name} compares with the Instruct, which needs a GraftCallback. Add one."
        further = self._graft.scales[1:] if self._graft is not None else []
        if unknown := [scale for scale in self.scales if scale not in further]:
            yield f"evaluation.scales has {unknown}, beyond graft.scales {further}. Add them there, after the first."

    def _graft_callback(self, trainer: Trainer) -> GraftCallback | None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((c for c in callbacks if isinstance(c, GraftCallback)), None)
        if found is not None and callbacks.index(found) > callbacks.index(self):
            raise GraftError(
                "EvaluationCallback stands before GraftCallback, so that the grafted model would be measured after its "
                "scores were logged. Let it follow GraftCallback in the list of callbacks."
            )
        return found

    def _begin(self, due: list[str]) -> None:
        self._due, self._found, self._spent = due, {}, {}

    def _measure(self, trainer: Trainer, module: ShadowModule, subject: str) -> None:
        """Run what is due on the weights that stand in the module."""
        kind, _, scale = subject.partition("@")
        if kind in _UNTOUCHED or (scale and not any(f"{s:g}" == scale for s in self.scales)):
            return
        self._run(trainer, module, subject, self._due)

    def _run(self, trainer: Trainer, module: ShadowModule, subject: str, names: Sequence[str]) -> None:
        scene = self._scene(trainer, module)
        for name in names:
            start = time.perf_counter()
            with isolate_rng():
                self._found[subject, name] = self.evaluators[name].run(scene)
            module.eval()  # for those that follow, whatever this one left
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - start

    def _scene(self, trainer: Trainer, module: ShadowModule) -> Scene:
        assert module.model is not None and self._pair is not None
        graft = self._graft.build(module) if self._graft is not None else None

        def reference() -> AbstractContextManager[None]:
            return nullcontext() if graft is None else graft.exchanged(_UNTOUCHED[self.reference])

        return Scene(
            model=module.model,
            head=module.head_losses(),
            pair=self._pair,
            device=module.device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            autocast=trainer.precision_plugin.val_step_context,
            reference=reference,
            template_kwargs=run_data(trainer).template_kwargs,
        )

    def _finish(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if not self._due:
            return
        assert isinstance(module, ShadowModule)
        graft = self._graft.build(module) if self._graft is not None else None
        _undisturbed(graft, lambda: self._run(trainer, module, TUNED, self._due))
        if graft is not None and self.baselines:
            self._measure_untouched(trainer, module, graft)
        self._write(trainer, stage)
        self._log(module, stage)

    def _measure_untouched(self, trainer: Trainer, module: ShadowModule, graft: LiveGraft) -> None:
        names = [name for name in self._due if self._known(name) is None]

        def measure(subject: str, state: float | str) -> None:
            with graft.applied(state):
                self._run(trainer, module, subject, names)

        for subject, state in _UNTOUCHED.items() if names else ():
            _undisturbed(graft, partial(measure, subject, state))
        for name in names:
            measured = {subject: self._found[subject, name].metrics for subject in _UNTOUCHED}
            self.constants[name] = {"signature": self._signature(name), **measured}

    def _signature(self, name: str) -> str:
        return f"{self.evaluators[name].signature()} {self._settings}"

    def _known(self, name: str) -> dict[str, Any] | None:
        """What the untouched models reached on these rows with these settings, if it is known."""
        constants = self.constants.get(name)
        return constants if constants is not None and constants["signature"] == self._signature(name) else None

    def _log(self, module: ShadowModule, stage: str) -> None:
        scores = {(subject, name): found.metrics for (subject, name), found in self._found.items()}
        for name in self._due if self.baselines else ():
            if (constants := self._known(name)) is not None:
                scores |= {(subject, name): constants[subject] for subject in _UNTOUCHED}
        self._require_own_names(module, scores)
        for (subject, name), metrics in scores.items():
            for what, value in metrics.items():
                self._log_one(module, name, f"{stage}/{subject}/{name}/{what}", value)
        for name in self._due:
            if ("grafted", name) in scores and ("instruct", name) in scores:
                gain = scores["grafted", name]["score"] - scores["instruct", name]["score"]
                self._log_one(module, name, f"graft/gain/{name}", gain)
            self._log_one(module, name, f"evaluation/{name}/seconds", self._spent[name])
        spent = sum(self._spent.values())
        self.seconds += spent
        module.log("evaluation/seconds", spent)
        if self._fit_start is not None and stage == "val":
            module.log("evaluation/time_share", self.seconds / (time.perf_counter() - self._fit_start))

    def _log_one(self, module: ShadowModule, evaluator: str, name: str, value: float) -> None:
        self._logged.setdefault(evaluator, set()).add(name)
        module.log(name, value)

    def _require_own_names(self, module: ShadowModule, scores: dict[tuple[str, str], dict[str, float]]) -> None:
        """Raise where a metric has the name of a validation set's, since Lightning would log the mean of both."""
        taken = module.scores(TUNED).keys()
        clashes = {f"{name}/{what}" for (_, name), metrics in scores.items() for what in metrics} & taken
        if clashes:
            raise DataError(
                f"{', '.join(sorted(clashes))} would be logged for a validation set and for an evaluator of its name. "
                "Rename one of the two, in data.validation, data.test or evaluation.evaluators."
            )

    def _write(self, trainer: Trainer, stage: str) -> None:
        """Leave the samples of all ranks in files, in the order of the rows."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "evaluation")
        home = root / ("test" if stage == "test" else f"step-{trainer.global_step}")
        gathered: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for (subject, name), found in self._found.items():
            samples = sorted(of_all_ranks(found.samples), key=lambda sample: sample["index"])
            gathered[subject, name] = samples
            if trainer.is_global_zero:
                place = root if subject in _UNTOUCHED else home
                lines = (json.dumps(sample, ensure_ascii=False) for sample in samples)
                replace_text(place / subject / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        if not (trainer.is_global_zero and self.samples):
            return
        text = side_by_side(gathered, root, self._due, self.samples)
        if text:
            replace_text(home / "samples.md", text)
            log_text(trainer.loggers, f"{stage}/samples", text, trainer.global_step)


def _undisturbed(graft: LiveGraft | None, measure: Callable[[], None]) -> None:
    """Measure, and again if a signal handler saved a checkpoint meanwhile, which put the tuned weights back."""
    done = False
    while not done:
        interruptions = graft.interruptions if graft else 0
        measure()
        done = graft is None or graft.interruptions == interruptions
