"""Models on disk or on the hub, which are checked, loaded and described for an evaluation."""

from __future__ import annotations

import gc
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import CheckpointError, EvaluationError
from shadowlit.grafting.manifest import describe_source
from shadowlit.harness.models import Evaluation, evaluate_model, require_room, run, use_chat, vllm_model
from shadowlit.harness.tasks import Benchmarks
from shadowlit.pair.folders import ProblemError, commit_of, load_config, model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated: folders or hub ids of the model and of an adapter in peft's form."""

    source: str
    adapter: str | None

    @property
    def name(self) -> str:
        """The model's name in a report."""
        return self.source if self.adapter is None else f"{self.source} + {self.adapter}"

    def check(self, benchmarks: Benchmarks) -> None:
        """Check config and tokenizer, before any weights are loaded.

        Raises:
            EvaluationError: A chat template is asked for and there is none, or the context has no room for the answers.
            PairError: The config can't be loaded.
        """
        folder = local_folder(self.source, weights=False)
        tokenizer = _tokenizer(folder)
        use_chat(self.source, tokenizer, benchmarks.settings)
        require_room(self.source, load_config("model", folder, False), tokenizer, benchmarks)

    def evaluate(self, benchmarks: Benchmarks, backend: str, dtype: str, device: str) -> Evaluation:
        """Load the model, run the benchmarks and free the model; see :func:`shadowlit.cli.evaluate.evaluate`.

        Raises:
            EvaluationError: The model can't be loaded.
        """
        import torch

        folder = local_folder(self.source)
        adapter = None if self.adapter is None else local_folder(self.adapter)
        tokenizer = _tokenizer(folder)
        if backend == "vllm":
            chat = use_chat(self.source, tokenizer, benchmarks.settings)
            lm = vllm_model(folder, adapter, dtype, benchmarks.settings)
            found = run(self.name, lm, benchmarks, chat)
            del lm
        else:
            model = _load(folder, adapter, dtype, device)
            found = evaluate_model(model, tokenizer, benchmarks, name=self.name)
            del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    def describe(self) -> dict[str, Any]:
        """Return the model's source and fingerprints of its weights, which are empty where they aren't safetensors."""
        folder = local_folder(self.source)
        try:
            with CheckpointReader(folder) as reader:
                fingerprint = reader.fingerprint()
        except CheckpointError as error:
            log.warning("no fingerprint of %s: %s", self.source, error)
            fingerprint = ""
        found: dict[str, Any] = {"source": describe_source(self.source, folder, fingerprint)}
        if self.adapter is not None:
            folder = local_folder(self.adapter)
            weights = folder / "adapter_model.safetensors"
            digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
            found["adapter"] = {"id": self.adapter, "commit": commit_of(folder), "sha256": digest}
        return found


def local_folder(source: str, weights: bool = True) -> Path:
    """Return the folder of a model or adapter; for a hub id it is downloaded, with or without the weights.

    Raises:
        EvaluationError: There is no such folder, and the hub doesn't offer it.
    """
    try:
        return model_folder("model", source, weights=weights)
    except ProblemError as error:
        problem = error.problem
        raise EvaluationError(f"{problem.found}. Expected: {problem.expected}. Check the spelling.") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of transformers, tokenizers, sentencepiece: many types
        raise EvaluationError(
            f"the tokenizer in {folder} cannot be loaded ({error}). Check that the folder is complete."
        ) from error


def _load(folder: Path, adapter: Path | None, dtype: str, device: str) -> Any:
    """Load the model with its adapter; the harness would resize embeddings for an adapter."""
    from transformers import AutoModelForCausalLM

    from shadowlit.kernels import slow_on_cpu

    where: Any = "auto" if device == "all" else {"": str(_device(device))}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=where)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # of transformers, peft, safetensors, the device: many types
        what = folder if adapter is None else f"{folder} with {adapter}"
        raise EvaluationError(f"{what} cannot be loaded ({type(error).__name__}: {error}).") from error
    if slow := slow_on_cpu(model.dtype, model.device):
        log.warning("%s. Set --dtype float32.", slow)
    return model.eval()


def _device(device: str) -> torch.device:
    import torch

    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
