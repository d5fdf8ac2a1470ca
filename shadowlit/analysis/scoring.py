"""The validation loss of an Instruct with any update, outside of a training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shadowlit.analysis.deltas import reader_of
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.layout import in_layout_of_module
from shadowlit.data.custom_formats import format_names
from shadowlit.data.module import ShadowData
from shadowlit.data.settings import sets_by_name
from shadowlit.delta.configured import located, require_known
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError
from shadowlit.grafting.arithmetic import add_delta
from shadowlit.grafting.parameters import host_parameters
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import TokenScores, on_device


class Scorer:
    """A pair's Instruct in memory, in float32, and the validation data in the configuration of a run.

    Args:
        pair: Pair whose Instruct is scored.
        config: Configuration of the run.
        folder: Folder of the run, from which relative paths are looked up.
        batches: Number of batches of each validation set; None for all.
        device: Device that computes.
        trust_config: Whether formats that are given by import path are imported and called.

    Raises:
        DataError: The validation data are missing or broken.
    """

    def __init__(
        self,
        pair: ModelPair,
        config: Mapping[str, Any],
        folder: Path,
        batches: int | None = None,
        device: str | torch.device = "cpu",
        trust_config: bool = False,
    ) -> None:
        data = _data(pair, config, folder, trust_config)
        self._batches = [batch for loader in data.val_dataloader() for batch in islice(loader, batches)]
        self._device = torch.device(device)
        model: Any = AutoModelForCausalLM.from_pretrained(
            pair.instruct_folder(), dtype=torch.float32, trust_remote_code=pair.trust_remote_code
        )
        self._model = model.to(self._device).eval()
        self._parameters = host_parameters(self._model)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._reader = in_layout_of_module(CheckpointReader(pair.instruct_folder()), self._shapes)

    @torch.no_grad()
    def loss(self, update: Delta | None) -> float:
        """Return the mean over all supervised tokens of all sets, in nats, of the Instruct, untouched or with an
        update.

        The sum is rounded to the dtype of the Instruct's files, as an export is. The weights are the Instruct's again
        afterwards.

        Raises:
            DataError: The update has tensors that the model lacks, or other shapes.
        """
        # Experts as the model holds them.
        reader = in_layout_of_module(reader_of(str(self._reader.folder), update or Delta.of({})), self._shapes)
        changed = {name: info.shape for name, info in reader.tensors.items()}
        odd = [n for n, s in changed.items() if n not in self._parameters or self._parameters[n].shape != s]
        if odd:
            raise DataError(f"{self._reader.folder} has no {odd[0]} of shape {changed[odd[0]]}. Give its own update.")
        try:
            for name in changed:
                stored = self._reader.read(name)
                self._parameters[name].copy_(add_delta(stored, reader.read(name)).to(stored.dtype))
            return self._score()
        finally:
            for name in changed:
                self._parameters[name].copy_(self._reader.read(name))

    def _score(self) -> float:
        scores = on_device(TokenScores(), self._device)
        for batch in self._batches:
            ids, mask, labels = (batch[n].to(self._device) for n in ("input_ids", "attention_mask", "labels"))
            scores.update(self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)
        return scores.compute()["loss"]


def _data(pair: ModelPair, config: Mapping[str, Any], folder: Path, trusted: bool) -> ShadowData:
    section = config.get("data") or {}
    validation = section.get("validation") or {}
    if not validation:
        raise DataError(f"{folder} has no data.validation in its config.yaml, so that there is nothing to score on.")
    known = inspect.signature(ShadowData).parameters.keys() - {"pair", "train", "test", "predict", "validation"}
    settings = {name: value for name, value in section.items() if name in known}
    if settings.get("chat_template"):
        settings["chat_template"] = located(settings["chat_template"], folder)
    sources = {
        name: {**source, "path": located(source["path"], folder)}
        if isinstance(source, dict)
        else located(str(source), folder)
        for name, source in sets_by_name(validation, "val").items()
    }
    if not trusted:
        formats = [each.get("format") for each in (section, *sources.values()) if isinstance(each, dict)]
        require_known(filter(None, formats), format_names(), "data.format", folder)
    data = ShadowData(pair, validation=sources, **settings)
    data.setup("validate")
    return data
