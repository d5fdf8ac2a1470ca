"""Estimates the memory of a training from configurations and headers: a step is simulated without weights.

The simulation runs the model itself on tensors without data (``FakeTensorMode``) and adds up what is alive, so that
activations and logits follow from the architecture, the precision, the checkpointing and the kernel. Everything else is
a number of parameters times bytes.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.reader import ComputedReader
from shadowlit.data.module import ShadowData
from shadowlit.data.preference_formats import PREFERENCES
from shadowlit.errors import first_line
from shadowlit.grafting.adapter import adapted_layers
from shadowlit.grafting.module import is_swapped
from shadowlit.grafting.parameters import host_of, host_parameters, linear_names
from shadowlit.grafting.selection import resolve
from shadowlit.training.anchors import KL_ROWS
from shadowlit.training.head import HeadLoss, Inputs, Predictions
from shadowlit.training.loading import load_for_training, stored_dtype
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives.tokens import reverse_divergences
from shadowlit.training.varlen import NAME as VARLEN

log = logging.getLogger(__name__)

_MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # bytes per trained parameter


@dataclass(frozen=True)
class Memory:
    """Memory of a rank in bytes, by part. What FSDP2 shards is divided by the number of ranks.

    Attributes:
        rows: Rows of a micro-batch.
        length: Tokens of its longest row.
        num_trained: Number of trained parameters, on all ranks.
        weights: Parameters and buffers: trained ones in float32, frozen ones in the dtype of the files, or in float32
            under ``32-true``.
        moments: Moments of the optimizer: 8 bytes per trained parameter with AdamW, 2 with 8-bit AdamW, NaN with any
            other class.
        frozen: Values of the Instruct, and of the Base where it is trained, that are kept next to the parameters.
        gradients: Gradients: 4 bytes per trained parameter. They exist until the next backward pass, or until
            Lightning frees them before a validation.
        buffers: Communication buffers. DDP: a copy of the gradients. FSDP2: the root unit, whole in the forward and the
            backward pass, with its gradients; two more layers, each of which briefly exists twice; the gradients of
            one layer, and two float32 copies of them, which are reduced.
        activations: Other tensors that are alive in a simulated step, without those of the head.
        head: Tensors that output head and loss add, from the last hidden states on.
        anchored: With two anchors, copies while the Instruct's micro-batches are trained: of the trained weights, of
            frozen ones that the Instruct stores in another dtype, and of the gradients on the Base where the Instruct
            gets several micro-batches, and with their divergence also of a trained head.
        neutral: What a micro-batch of the divergence of two anchors holds more than one that is trained on.
        swapped: Copy of the tuned weights while a graft is scored, and two float32 copies of the largest update that is
            computed as a whole: of an adapter, or with transforms.
        scoring: Tensors that are alive in a simulated batch of a validation.
        offloaded: Moments and frozen values that are kept on the CPU instead of a GPU.
    """

    rows: int
    length: int
    num_trained: int
    weights: float
    moments: float
    frozen: float
    gradients: float
    buffers: float
    activations: float
    head: float
    anchored: float
    neutral: float
    swapped: float
    scoring: float
    offloaded: float

    @property
    def phases(self) -> dict[str, float]:
        """The peaks of a step, and of a grafted validation without the answers of evaluators."""
        held, anchored = self.weights + self.moments + self.frozen, self.anchored + self.neutral
        return {
            "training": held + self.gradients + self.buffers + self.activations + self.head + anchored,
            "validation": held + self.swapped + self.scoring,
        }


def estimate(
    module: ShadowModule, data: ShadowData, graft: GraftCallback, trainer: Mapping[str, Any],
    headers: Mapping[str, TensorInfo], tied: bool = True,
) -> Memory:  # fmt: skip
    """Estimate the memory of a rank; nothing is loaded. What can't be simulated is NaN, with a warning.

    Args:
        module: The module.
        data: The data; if they have not been read, every row counts as ``max_length`` supervised tokens.
        graft: The callback.
        trainer: ``precision``, ``sharing`` (none, ddp or fsdp), ``ranks``, ``device`` (cpu or cuda) and
            ``accumulate_grad_batches``.
        headers: The Instruct's tensors, from the headers of its files.
        tied: Whether both models tie their output heads, if their configs do.
    """
    precision, on_gpu, ranks = trainer["precision"], trainer["device"] == "cuda", trainer["ranks"]
    options = module.architecture(precision, data.packing is not None, tied)
    if options["attn_implementation"] == VARLEN:  # whose borders are data; without a mask sdpa holds the same
        options["attn_implementation"] = "sdpa"
    files = ComputedReader(module.pair.instruct_folder(), headers)
    model = load_for_training(files, device=torch.device("meta"), mesh=None, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    # The update of an adapter, or one that is transformed, exists as a whole, one tensor at a time.
    transformed = any(map(graft.transforms_of, graft.subjects))
    at_once = host_parameters(model) if transformed else adapted_layers(model)
    largest = max((p.numel() for name, p in host_parameters(model).items() if name in at_once), default=0)
    weights = num_bytes([*model.parameters(), *model.buffers()])
    shards = ranks if trainer["sharing"] == "fsdp" else 1
    moments = _MOMENTS.get(str(module.optimizer), math.nan) * num_trained / shards
    graft_bytes = _graft_bytes(model, graft, headers, module.start.weights is not None)
    frozen, saved, copied = (size / shards for size in graft_bytes)
    anchors, aside = module.anchors, 0.0
    if anchors is None or not anchors.loads_instruct:
        copied = 0.0
    elif anchors.sets_aside(trainer["accumulate_grad_batches"]):
        aside = 4 * num_trained / shards
    if anchors is not None and anchors.kl is not None and (head := host_of(model).get_output_embeddings()) is not None:
        aside += num_bytes(p for p in head.parameters() if p.requires_grad)
    buffers = 4.0 * num_trained if trainer["sharing"] == "ddp" else 0.0
    if trainer["sharing"] == "fsdp":
        whole = trainer["accumulate_grad_batches"] > 1 and module.accumulates_whole
        buffers = _gathered(model, 2 if precision == "bf16-mixed" else 4) + 4 * num_trained * whole
    report, multiple = data.reports.get("train"), data.pad_to_multiple_of or 1
    length = data.row_capacity if data.packing == "best_fit" else report.longest if report else data.max_length
    length = -(-length // multiple) * multiple
    rows = data.batch_size * (2 if data.samples in PREFERENCES and data.packing != "best_fit" else 1)
    scored = max((each.longest for name, each in data.reports.items() if name.startswith("val/")), default=length)
    share = report.supervised_share if report else 1.0
    batches = {"training": (rows, length, share), "validation": (data.eval_rows, scored, share)}
    if anchors is not None and anchors.kl is not None:
        kept = data.reports.get(KL_ROWS)
        longest, share = (kept.longest, kept.supervised_share) if kept else (data.max_length, 1.0)
        batches["neutral"] = data.batch_size, -(-longest // multiple) * multiple, share
    peaks = _simulate(module, model, batches, data.packing is not None, precision, trainer["device"])
    away = on_gpu and module.offload_optimizer, on_gpu and graft.offload
    return Memory(
        rows, length, num_trained,
        weights / shards, moments * (not away[0]), frozen * (not away[1]), 4 * num_trained / shards, buffers,
        *peaks[:2], copied * (not away[1]) + aside, peaks[3], saved + 8 * largest / shards, peaks[2],
        moments * away[0] + (frozen + copied) * away[1],
    )  # fmt: skip


class Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that operations have created and that still exist.

    Args:
        model: Model whose parameters, buffers and gradients are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, num_bytes: int) -> None:
        self.now -= num_bytes


def num_bytes(tensors: Iterable[Tensor]) -> float:
    """Bytes of tensors, each counted once."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values()))


def _simulate(
    module: ShadowModule, model: nn.Module, batches: Mapping[str, tuple[int, int, float]], packs: bool, precision: str,
    device: str,
) -> tuple[float, float, float, float]:  # fmt: skip
    """Peaks of a step without and in the head, of a validation, and of neutral rows above a step, in bytes; the model
    loses layers.

    Only the first layers are simulated, up to where their kinds begin to repeat and once more: each further layer holds
    as much as one of the repetition.
    """
    host = host_of(model)
    parent, name, layers = _layers(model)
    kinds = getattr(host.config.get_text_config(), "layer_types", None) or [0] * len(layers)
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in batches}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            host.tie_weights()
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            way = module.head_loss if module.head_loss in ("logits", "recomputed") else "auto"
            head = HeadLoss(model, way, torch.device(device))
            for count in (min(2 * period, len(layers)), period):
                setattr(parent, name, layers[:count])
                for kind, (rows, length, share) in batches.items():
                    packed = packs and kind == "training"
                    shape = (1, rows * length) if packed else (rows, length)
                    found[kind].append(_run(model, head, shape, share, kind, packed, precision))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        log.warning("plan: activations are not estimated, since the step can't be simulated (%s)", first_line(error))
        return math.nan, math.nan, math.nan, math.nan
    more = max(0, len(layers) - 2 * period) / period
    begins = {kind: one + more * (one - fewer) for kind, ((one, *_), (fewer, *_)) in found.items()}
    (_, in_head, after), (_, in_scoring, _) = found["training"][0], found["validation"][0]
    activations = begins["training"] + max(0.0, after - in_head)
    neutral = begins["neutral"] + max(found["neutral"][0][1:]) if "neutral" in found else 0.0
    return activations, in_head, begins["validation"] + in_scoring, max(0.0, neutral - activations - in_head)


def _run(
    model: nn.Module, head: HeadLoss, shape: tuple[int, int], share: float, kind: str, packs: bool, precision: str
) -> tuple[float, float, float]:
    """Bytes alive when the head begins, the most that it adds, and the most that the backward pass adds."""
    training = kind != "validation"
    model.train(training)
    alive = Alive(model)
    at_head: list[float] = []
    in_layers: list[float] = []

    def watch(_: nn.Module, __: Any, embedded: Tensor) -> None:
        if embedded.requires_grad:  # what follows is the embedding's own gradient, when no activation is left
            embedded.register_hook(lambda _: in_layers.append(alive.peak))

    hooks = [host_of(model).get_input_embeddings().register_forward_hook(watch)]
    if head.head is not None:
        hooks.append(head.head.decoder.register_forward_hook(lambda *_: at_head.append(alive.now)))
    ids = torch.empty(shape, dtype=torch.int64)
    positions = torch.empty(max(1, round(ids.numel() * share)), dtype=torch.int64)
    inputs = {"input_ids": ids} if packs else {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
    computing: Any = nullcontext() if precision == "32-true" else torch.autocast("cpu", torch.bfloat16)
    with alive:
        with computing:
            function: Any = head.loss if training else head.token_losses
            if kind == "neutral":
                known = head.predict(inputs, positions, None, live=True)
                function = partial(_divergence, head, known)
            result: Any = function(inputs, positions, torch.empty_like(positions))
        begins = at_head[-1] if at_head else alive.now
        in_head, alive.peak = alive.peak - begins, alive.now
        if training:
            result.backward()
    for hook in hooks:
        hook.remove()
    return begins, in_head, (in_layers[0] if in_layers else alive.peak) - begins


def _divergence(head: HeadLoss, known: Predictions, inputs: Inputs, positions: Tensor, targets: Tensor) -> Tensor:
    return head.map_logits(inputs, positions, targets, reverse_divergences, known).sum()


def _layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The language model's list of layers: the module that holds it, its name there, and the list."""
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and any(isinstance(each, GradientCheckpointingLayer) for each in child)
    ]
    return max(lists, key=lambda each: sum(p.numel() for p in each[2].parameters()))


def _graft_bytes(
    model: nn.Module, graft: GraftCallback, headers: Mapping[str, TensorInfo], on_tuned: bool
) -> tuple[float, float, float]:
    """Bytes that :class:`shadowlit.grafting.live.LiveGraft` holds, and that it saves while a graft or an anchor is
    loaded.
    """
    parameters, layers, usual = host_parameters(model), adapted_layers(model), stored_dtype(headers)
    selected = resolve(graft.select, parameters, linear_names(model), host_of(model).config.model_type)
    signs = len({rows for each in graft.all_transforms for rows in each.gradient_rows})  # a byte per element
    held = saved = copied = 0.0
    for name, parameter in parameters.items():
        stored = headers[name].dtype if name in headers else usual
        size, live = parameter.numel(), parameter.element_size()
        moves = parameter.requires_grad or on_tuned  # away from the Base, whose values are held then
        swapped = is_swapped(not moves, name in layers and name in selected, graft.dtype, stored)
        held += size * ((live if swapped else stored.itemsize) + stored.itemsize * moves)
        held += size * signs * (name in selected and (moves or name in layers))
        saved += 0 if swapped else size * live
        copied += size * live * (moves or not (swapped or stored == parameter.dtype))
    return held, saved, copied


def _gathered(model: nn.Module, itemsize: int) -> float:
    """Bytes that FSDP2 gathers and reduces at a time, see :class:`Memory`, of parameters of ``itemsize`` bytes."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    counts = [[(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()] for module in [model, *layers]]
    (whole, learns), *parts = [tuple(map(sum, zip(*each, strict=True))) for each in counts]
    layer, trained = max(parts)
    root = whole + learns - sum(map(sum, parts))
    return itemsize * (root + 4 * layer + trained) + 2 * 4 * trained
