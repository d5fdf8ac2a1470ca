"""Imported once by the server that distributed tests are forked from: nothing here may run a backward pass."""

import datasets  # noqa: F401
import lightning.pytorch  # noqa: F401
import peft  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
import torchmetrics  # noqa: F401
import transformers
import transformers.models.auto.modeling_auto  # noqa: F401
