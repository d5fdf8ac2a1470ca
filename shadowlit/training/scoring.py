"""Scores the weights that a module holds: validation, test, prediction, and the references of preferences."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from shadowlit.data.context_batches import teachers_batch
from shadowlit.data.images import IMAGE_INPUTS
from shadowlit.data.protocol import run_data
from shadowlit.errors import DataError, ShadowlitError, as_usage, wrong_names
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.grafting.subject import BASE, INSTRUCT, TUNED, Subject
from shadowlit.pair.pair import ModelPair, PairWithoutWeights
from shadowlit.plugins import path_of
from shadowlit.training.generation import generate, greedy_config
from shadowlit.training.head import HeadLoss, Way, evaluating
from shadowlit.training.metrics import Scores, TokenScores, name_clash
from shadowlit.training.objectives import Objective
from shadowlit.training.outputs import Batch, Outputs, References, model_inputs
from shadowlit.training.rehearsal import rehearse

# Values that are logged here have already been reduced over the ranks, once and exactly.
warnings.filterwarnings(
    "ignore", message=r"It is recommended to use `self.log\('(val|test|graft|evaluation|time)/.*sync_dist=True"
)


class ScoringModule(LightningModule):
    """Scores the weights that ``model`` holds, whose name, the subject, the caller knows.

    Args:
        pair: The Base and the Instruct.
        objective: Objective whose metrics are logged.
        head_loss: Implementation of the loss; see :class:`shadowlit.training.head.HeadLoss`.
        max_new_tokens: Longest answer that ``predict`` generates, in tokens.
        metrics: More metrics by name.
    """

    def __init__(
        self, pair: ModelPair, objective: Objective, head_loss: Way, max_new_tokens: int, metrics: dict[str, Metric]
    ) -> None:
        super().__init__()
        if wrong := wrong_names("model.metrics", metrics):
            raise ShadowlitError(wrong[0])
        self.pair, self.objective, self.metrics = pair, objective, metrics
        self.head_loss, self.max_new_tokens = head_loss, max_new_tokens
        self.callback_metrics: dict[str, float] = {}  # by callbacks in the running validation, logged with the scores
        self.model: nn.Module | None = None
        self._head_loss: HeadLoss | None = None
        self._scores: dict[tuple[Subject, str], Scores] = {}  # by subject and set; the set "" is all of them
        self._references = References()

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits ``[B, T, V]`` of a batch with ``input_ids`` ``[B, T]``.

        What else the batch has of ``attention_mask`` and ``position_ids``, both ``[B, T]``, reaches the model, and so
        does what a processor makes of images (:data:`shadowlit.data.images.IMAGE_INPUTS`). Rows packed from several
        conversations come with ``position_ids`` that restart at each, and without a mask.
        """
        assert self.model is not None
        return self.model(**model_inputs(batch), use_cache=False).logits

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0, subject: Subject = TUNED) -> None:
        """Add a batch to the scores of ``subject``, whose weights are loaded. An override passes it on to ``super``."""
        data = run_data(self.trainer)
        names = data.test_names if self.trainer.testing else data.validation_names
        self._score(batch, names[dataloader_idx] if names else str(dataloader_idx), subject)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answer the prompts of a left-padded batch greedily, with the weights that are loaded.

        Returns:
            One ``{"index": row in the file, "prompt": text, "answer": text, "reference": text or None}`` per prompt.
            The prompt is what the model has read, with its special tokens and without padding.
        """
        assert self.model is not None
        tokenizer = self.pair.tokenizer()
        config = greedy_config(self.pair.template_folder(), tokenizer, self.max_new_tokens)
        images = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        prompts = batch["input_ids"], batch["attention_mask"], images
        answers = generate(self.model, tokenizer, config, *prompts, synced_gpus=self.trainer.world_size > 1)
        texts = [
            tokenizer.decode(ids[mask.bool()].tolist())
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        references = batch.get("reference", [None] * len(texts))  # which only our own data have
        rows = zip(batch["index"].tolist(), texts, answers, references, strict=True)
        return [
            {"index": index, "prompt": text, "answer": answer.text, "reference": reference}
            for index, text, answer, reference in rows
            if index >= 0
        ]

    def on_validation_epoch_end(self) -> None:
        """Log the scores of every subject, and what callbacks measured."""
        self._log_scores("test" if self.trainer.testing else "val")

    on_test_epoch_end = on_validation_epoch_end

    def configure_scores(self) -> Metric:
        """Return the metric that each set is scored with, for every subject. ``model.metrics`` adds others to it.

        Its ``compute()`` returns a dict from metric names to numbers. A :class:`TokenScores`, or a subclass that
        doesn't override ``update``, gets the sums of a batch through ``add``, without materialising the full logits.
        Any other metric, and a subclass that overrides ``update(logits, labels)``, gets ``[B, T, V]`` and ``[B, T]``
        tensors. With an objective of preferences, ``update`` gets :class:`shadowlit.training.outputs.Answers` instead.
        """
        return self.objective.configure_scores()

    def score_names(self) -> set[str]:
        """Return the names of the metrics that every validation set is scored with, found by scoring random logits.

        Raises:
            ShadowlitError: The objective returns something else than sums; a metric can't be updated, gives something
                that is not a number, or has another's name.
        """
        # Of a model on the hub no weights are downloaded for this.
        vocabulary = PairWithoutWeights(**asdict(self.pair)).config().get_text_config().vocab_size
        with as_usage():
            return rehearse(self.objective, self.configure_scores, self.metrics, vocabulary)

    def lacking_references(self, who: Subject) -> list[str]:
        """Return the preference sets that the objective needs ``who``'s log-probabilities of and that are not measured
        yet.
        """
        if not self.objective.has_reference:
            return []
        sets = run_data(self.trainer).preference_sets
        # The training data only ever meet the model that is trained.
        return self._references.lacking(who, {n: one for n, one in sets.items() if who == BASE or n != "train"})

    @torch.no_grad()
    def measure_references(self, who: Subject, names: list[str]) -> None:
        """Measure the answers of preference sets with the weights of the untouched model ``who``, which are loaded.

        A collective: every rank does its share of each set.
        """
        assert self.model is not None
        data = run_data(self.trainer)
        for name in names:
            dataset = data.preference_sets[name]
            logps = torch.zeros(len(dataset), 2, dtype=accumulation_dtype(self.device), device=self.device)
            with evaluating(self.model), self.trainer.precision_plugin.val_step_context():
                for batch in data.scoring_loader(name):
                    batch = self.trainer.strategy.batch_to_device(batch)
                    found = Outputs(self.head_losses(), batch).answers(with_reference=False)
                    logps[batch["sample"].index_select(0, batch["valid"])] = found.logps
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(logps)
            self._references.keep(who, name, dataset, logps)

    @property
    def token_reference(self) -> Subject | None:
        """The untouched model whose predictions of single tokens the objective compares with, if it does."""
        known = {None: None, "start": BASE, "instruct": INSTRUCT}
        if self.objective.token_reference not in known:
            raise ShadowlitError(
                f"model.objective is {path_of(self.objective)}, whose token_reference is "
                f"{self.objective.token_reference!r}; expected 'start', 'instruct' or None. Correct the class."
            )
        return known[self.objective.token_reference]

    def measure_predictions(self, who: Subject, batch: Batch) -> None:
        """Keep what ``who``, whose weights are loaded, predicts in a batch, for the training step on it."""
        assert self.model is not None
        outputs = Outputs(self.head_losses(), teachers_batch(batch) or batch)
        with evaluating(self.model), self.trainer.precision_plugin.val_step_context():
            self._references.predictions = outputs.predictions(self._references.predictions, live=who == BASE)

    def head_losses(self) -> HeadLoss:
        """Return the implementation of the model's losses, chosen on first use, when its weights are loaded."""
        assert self.model is not None
        if self._head_loss is None or self._head_loss.model is not self.model:
            self._head_loss = HeadLoss(self.model, self.head_loss)
        return self._head_loss

    def has_scores(self, subject: Subject) -> bool:
        """Return whether batches were scored for ``subject`` in the running validation."""
        return any(who == subject for who, _ in self._scores)

    def scores(self, subject: Subject) -> dict[str, float]:
        """Return the metrics of ``subject`` in the running validation, by ``<metric>`` and ``<set>/<metric>``.

        Reduced over all ranks; every rank must call it.
        """
        return {
            f"{name}/{what}" if name else what: value
            for (who, name), metric in self._scores.items()
            if who == subject
            for what, value in metric.compute().items()
        }

    def sample_scores(self, subject: Subject) -> dict[str, Tensor]:
        """Return the numbers of each sample in the running validation, ``[N, 5]`` by set.

        They are those of :attr:`shadowlit.training.objective.TokenSums.by_sample`.

        The set "" is all of them. Empty for an objective whose scores are not losses of tokens. A collective.
        """
        owns = {name: one.own for (who, name), one in self._scores.items() if who == subject}
        return {name: own.by_sample() for name, own in owns.items() if isinstance(own, TokenScores) and own.takes_sums}

    def share_scores(self, subject: Subject, other: Subject) -> None:
        """Let ``other``, whose weights are those of ``subject``, have its scores in the running validation."""
        self._scores |= {(other, name): metric for (who, name), metric in self._scores.items() if who == subject}

    def take_scores(self, subject: Subject) -> dict[str, float]:
        """Return the metrics of ``subject`` and forget them, so that they are not logged at the validation's end."""
        taken = self.scores(subject)
        self._scores = {key: metric for key, metric in self._scores.items() if key[0] != subject}
        return taken

    def _outputs(self, batch: Batch, who: Subject, name: str) -> Outputs:
        """The model's outputs for a batch of the set ``name``, with the references of ``who``."""
        predictions = None
        if name == "train" and self.token_reference is not None:
            predictions = self._references.predictions
            if predictions is None:
                raise ShadowlitError(
                    f"model.objective is {type(self.objective).__name__} with a distance from the "
                    f"{self.token_reference.name}, whose predictions are unknown. Expected a GraftCallback, which "
                    "measures them, among the trainer's callbacks; add one, or leave the distance out (kl_weight=0)."
                )
        return Outputs(self.head_losses(), batch, partial(self._references.look_up, who, name), predictions)

    def _score(self, batch: Batch, set_name: str, subject: Subject) -> None:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        several = isinstance(loaders, list) and len(loaders) > 1
        # A single set is all sets together.
        keys = [(subject, name) for name in (("", set_name) if several else ("",))]
        for key in keys:
            if key not in self._scores:
                self._scores[key] = Scores(self.configure_scores(), self.metrics, self.device)
        stage = "test" if self.trainer.testing else "val"
        outputs = self._outputs(batch, subject.start, f"{stage}/{set_name}")
        self.objective.score(outputs, [self._scores[key] for key in keys])

    def _log_scores(self, stage: str) -> None:
        added, self.callback_metrics = self.callback_metrics, {}
        for subject in dict.fromkeys(who for who, _ in self._scores):
            scores, prefix = self.scores(subject), f"{stage}/{subject.name}/"
            if twice := [prefix + name for name in scores if prefix + name in added]:
                raise DataError(name_clash(twice))
            for name, value in scores.items():
                self.log(prefix + name, value, prog_bar=name == "loss")
        for name, value in added.items():
            self.log(name, value, prog_bar=name in ("graft/gain", "graft/survival"))
        self._scores.clear()
