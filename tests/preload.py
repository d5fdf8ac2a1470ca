"""Imported once by the server that test processes are forked from: nothing here may run a backward pass."""

import datasets  # noqa: F401
import lightning.pytorch  # noqa: F401
import peft  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
import torchmetrics  # noqa: F401
import transformers
import transformers.models.auto.modeling_auto
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import shadowlit.lightning_cli
import shadowlit.studies.trials.trial  # noqa: F401
