"""EvaluationCallback: what the tuned, the grafted and the untouched models can do, while the Base trains."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.sources import raise_all
from shadowlit.errors import DataError, GraftError
from shadowlit.evaluation.evaluator import Evaluator, Findings, Scene
from shadowlit.evaluation.samples import log_text, side_by_side
from shadowlit.graft.live import BASE, LiveGraft
from shadowlit.training.module import TUNED, ShadowModule

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_UNTOUCHED: dict[str, float | str] = {"base": BASE, "instruct": 0.0}


class EvaluationCallback(Callback):
    """Measures tasks in every validation, on the tuned Base, the grafted Instruct and the two untouched models.

    Logged are ``val/<subject>/<evaluator>/<metric>``, for the subjects of :class:`GraftCallback`: ``tuned``,
    ``grafted``, ``grafted@0.5``, ``base``, ``instruct``; ``graft/gain/<evaluator>``, the grafted score minus the
    Instruct's; ``evaluation/<evaluator>/seconds``, ``evaluation/seconds`` and ``evaluation/time_share`` (of the run so
    far). Each can be monitored by a checkpoint or early-stopping callback, best with ``every=1``: what isn't measured
    in a validation isn't logged in it. The grafted Instruct is measured while GraftCallback's weights stand in the
    module; the untouched models once for the same rows and settings. The training trajectory is bit-identical to one
    without the callback.

    The samples of every evaluator are written to ``<folder>/step-<step>/<subject>/<evaluator>.jsonl`` (those of the
    untouched models to ``<folder>/<subject>/…``, those of the command test to ``<folder>/test/<subject>/…``), one
    object per row with ``index`` and ``score``, and answers side by side to ``samples.md`` and to the logger, where it
    takes text.

    Stands after GraftCallback among the trainer's callbacks; without one, only the tuned model is measured.

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
        self._due: list[str] = []
        self._validations = 0
        self._found: dict[tuple[str, str], Findings] = {}
        self._spent: dict[str, float] = {}
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
        template_kwargs = getattr(trainer.datamodule, "template_kwargs", {})  # type: ignore[attr-defined]
        errors = list(self._problems())
        for name, evaluator in self.evaluators.items():
            try:
                evaluator.read(pl_module.pair, template_kwargs)
            except DataError as error:
                errors.append(f"evaluation.evaluators.{name}: {error}")
        raise_all(errors)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the time that evaluations take a share of."""
        self._fit_start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide which evaluators run in this validation."""
        self._begin(trainer, [])
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._validations += fitting
        last = not fitting or trainer.global_step >= trainer.estimated_stepping_batches
        self._due = [n for n, e in self.evaluators.items() if last or self._validations % e.every == 0]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All evaluators run in a test."""
        self._begin(trainer, list(self.evaluators))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what GraftCallback hasn't, and log everything."""
        self._finish(trainer, pl_module, "val")

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

    def _begin(self, trainer: Trainer, due: list[str]) -> None:
        self._due, self._found, self._spent = due, {}, {}

    def _measure(self, trainer: Trainer, module: ShadowModule, subject: str, state: float | str | None) -> None:
        """Run what is due on the weights that stand in the module."""
        kind, _, scale = subject.partition("@")
        if kind in _UNTOUCHED or (scale and not any(f"{s:g}" == scale for s in self.scales)):
            return
        self._run(trainer, module, subject, state, self._due)

    def _run(
        self, trainer: Trainer, module: ShadowModule, subject: str, state: float | str | None, names: Sequence[str]
    ) -> None:
        scene = self._scene(trainer, module, state)
        for name in names:
            start = time.perf_counter()
            with isolate_rng():
                self._found[subject, name] = self.evaluators[name].run(scene)
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - start

    def _scene(self, trainer: Trainer, module: ShadowModule, state: float | str | None) -> Scene:
        assert module.model is not None
        graft = self._graft.build(module) if self._graft is not None else None
        return Scene(
            model=module.model,
            pair=module.pair,
            device=module.device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            autocast=trainer.precision_plugin.val_step_context,
            reference=lambda: _exchanged(graft, _UNTOUCHED[self.reference], state) if graft else nullcontext(),
            template_kwargs=getattr(trainer.datamodule, "template_kwargs", {}),  # type: ignore[attr-defined]
        )

    def _finish(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if not self._due:
            return
        assert isinstance(module, ShadowModule)
        graft = self._graft.build(module) if self._graft is not None else None
        done = False
        while not done:  # again, if a signal handler saved a checkpoint while the reference's weights stood
            interruptions = graft.interruptions if graft else 0
            self._run(trainer, module, TUNED, None, self._due)
            done = graft is None or graft.interruptions == interruptions
        if graft is not None and self.baselines:
            self._measure_untouched(trainer, module, graft)
        self._write(trainer, stage)
        self._log(module, stage)

    def _measure_untouched(self, trainer: Trainer, module: ShadowModule, graft: LiveGraft) -> None:
        known = {n for n in self._due if self.constants.get(n, {}).get("signature") == self.evaluators[n].signature()}
        names = [name for name in self._due if name not in known]
        for subject, state in _UNTOUCHED.items() if names else ():
            done = False
            while not done:
                interruptions = graft.interruptions
                with graft.applied(state):
                    self._run(trainer, module, subject, state, names)
                done = graft.interruptions == interruptions
        for name in names:
            measured = {subject: self._found[subject, name].metrics for subject in _UNTOUCHED}
            self.constants[name] = {"signature": self.evaluators[name].signature(), **measured}

    def _log(self, module: ShadowModule, stage: str) -> None:
        scores = {(subject, name): found.metrics for (subject, name), found in self._found.items()}
        for name, constants in self.constants.items():
            if name in self.evaluators and constants["signature"] == self.evaluators[name].signature():
                scores |= {(subject, name): constants[subject] for subject in _UNTOUCHED}
        for (subject, name), metrics in scores.items():
            for what, value in metrics.items():
                module.log(f"{stage}/{subject}/{name}/{what}", value)
        for name in self._due:
            if ("grafted", name) in scores and ("instruct", name) in scores:
                gain = scores["grafted", name]["score"] - scores["instruct", name]["score"]
                module.log(f"graft/gain/{name}", gain)
            module.log(f"evaluation/{name}/seconds", self._spent[name])
        spent = sum(self._spent.values())
        self.seconds += spent
        module.log("evaluation/seconds", spent)
        if self._fit_start is not None:
            module.log("evaluation/time_share", self.seconds / (time.perf_counter() - self._fit_start))

    def _write(self, trainer: Trainer, stage: str) -> None:
        """Leave the samples of all ranks in files, in the order of the rows."""
        root = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "evaluation")
        home = root / ("test" if stage == "test" else f"step-{trainer.global_step}")
        gathered: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for (subject, name), found in self._found.items():
            samples = sorted(_gather(found.samples), key=lambda sample: sample["index"])
            gathered[subject, name] = samples
            if trainer.is_global_zero:
                place = root if subject in _UNTOUCHED else home
                _replace(place / subject / f"{name}.jsonl", samples)
        if not (trainer.is_global_zero and self.samples):
            return
        text = side_by_side(gathered, root, self._due, self.samples)
        if text:
            home.mkdir(parents=True, exist_ok=True)
            (home / "samples.md").write_text(text, encoding="utf-8")
            log_text(trainer.loggers, f"{stage}/samples", text, trainer.global_step)


@contextmanager
def _exchanged(graft: LiveGraft, reference: float | str, state: float | str | None) -> Iterator[None]:
    """Let the reference's weights stand for a moment, then those of ``state`` again."""
    try:
        graft.apply(reference)
        yield
    finally:
        if state is None:
            graft.restore()
        else:
            graft.apply(state)


def _gather(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized()):
        return samples
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, samples)
    return [sample for part in parts for sample in part]


def _replace(file: Path, samples: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".partial")
    beside.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), encoding="utf-8")
    beside.replace(file)
