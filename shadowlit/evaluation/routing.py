"""Which experts tokens choose, and how many choices two models share: the effect of a graft on a mixture's routing.

The update of the experts was learned with the Base's choices. Where the grafted model chooses other experts for a token
than the Instruct does, other weights process the token, whether the router itself was grafted or only its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.names import router_modules
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.training.objective import supervised_positions

Batch = Mapping[str, Tensor]


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that choose among experts, by their names, in the order of the layers.

    They are called ``gate`` or ``router``, next to ``experts``, and return the numbers of the chosen experts,
    ``[tokens, k]``, the best first, as transformers' mixtures do (Qwen2-, Qwen3-MoE, Mixtral, OLMoE …).
    """
    modules = dict(model.named_modules())
    return {name: modules[name] for name in router_modules(modules)}


class Routing:
    """Records the experts that tokens choose with the weights that are loaded into a model, for several subjects.

    The model is a mixture of experts, wrapped by peft or sharded or neither, whose layers are not compiled. Only
    positions that predict a supervised token count. Numbers are kept on the CPU in 16 bits: tokens × layers × k × 2
    bytes for each subject.

    Raises:
        ShadowlitError: The model has no known router.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = routers_of(model)
        if not self._routers:
            raise ShadowlitError(
                f"{type(model).__name__} has no router: no module called gate or router next to one called "
                "experts. Give a mixture of experts."
            )
        self._handles: list[RemovableHandle] = []
        self._last: dict[str, Tensor] = {}  # what each router chose in its last call
        self._choices: dict[str, list[Tensor]] = {}  # int16 [supervised tokens, layers, k] of each batch, best first

    def begin(self, subject: str) -> None:
        """Discard the choices of ``subject``, and record them again."""
        self._choices[subject] = []

    def forget(self, subject: str) -> None:
        """Free the choices of ``subject``."""
        self._choices.pop(subject, None)

    def watch(self) -> None:
        """Watch the routers until :meth:`take` or :meth:`stop`."""
        self.stop()
        for name, module in self._routers.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def stop(self) -> None:
        """Stop watching; harmless when nothing is watched."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last.clear()

    def take(self, subject: str, batch: Batch) -> None:
        """Keep what ``subject`` chose in the routers' last calls, at the supervised positions of the batch.

        Raises:
            ShadowlitError: A router was not called, or not with the tokens of this batch.
        """
        last = dict(self._last)
        self.stop()
        labels = batch["labels"]
        odd = [name for name in self._routers if name not in last or len(last[name]) != labels.numel()]
        if odd:
            raise ShadowlitError(
                f"the routers {some_of(odd)} were not called once for each of the {labels.numel()} tokens of a batch, "
                "so their choices can't be recorded. Set graft.routing=false, and report the model's name."
            )
        positions = batch.get("supervised")
        if positions is None:
            positions = supervised_positions(labels, batch.get("position_ids"))
        chosen = torch.stack([last[name].index_select(0, positions) for name in self._routers], dim=1)
        self._choices.setdefault(subject, []).append(chosen.to(torch.int16).cpu())

    def agreement(self, subject: str, like: str, device: torch.device | None = None) -> dict[str, float]:
        """:func:`agreement_of` two subjects on the same batches, over all ranks, which add their sums on ``device``."""
        mine, theirs = self._choices.get(subject), self._choices.get(like)
        if mine is None or theirs is None or len(mine) != len(theirs):
            raise ShadowlitError(
                f"choices of {subject!r} and {like!r} were recorded on {len(mine or [])} and {len(theirs or [])} "
                "batches; expected the same batches of both. Record both on the same data."
            )
        sums = _sums(mine, theirs)
        if dist.is_available() and dist.is_initialized():
            device = device or torch.device("cpu")
            sums = sums.to(device, accumulation_dtype(device))
            dist.all_reduce(sums)
        return _shares(sums)

    def _hook(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found = output if isinstance(output, tuple | list) else [output]
            for tensor in found:
                if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.dim() == 2:
                    self._last[name] = tensor.detach()

        return keep


def agreement_of(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float]:
    """Return how many choices of experts two models share, from their choices ``[N, layers, k]`` in each batch, best
    first.

    Returns:
        ``routing_agreement``, the share of the k chosen experts that both chose, in any order (1: all, k / experts: by
        chance); and ``routing_top1_changed``, the share of tokens and layers whose best expert is another one. Every
        token and layer counts alike.
    """
    return _shares(_sums(mine, theirs))


@torch.no_grad()
def compare_routing(
    folder: Path, other: Path, batches: Iterable[Batch], trust_remote_code: bool = False
) -> dict[str, float]:
    """:func:`agreement_of` the mixtures of experts in two folders, of which one is in memory at a time.

    Args:
        folder: Folder of a mixture of experts.
        other: Folder of another one of the same architecture.
        batches: ``input_ids``, ``labels`` and ``attention_mask``, ``[B, T]``; positions that predict a label count.
        trust_remote_code: Whether to run Python code from the folders.
    """
    from transformers import AutoModelForCausalLM

    batches, found = list(batches), []
    for source in (folder, other):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=trust_remote_code).eval()
        routing = Routing(model)
        routing.begin("")
        for batch in batches:
            routing.watch()
            model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch})
            routing.take("", batch)
        found.append(routing._choices[""])
        del model, routing
    return agreement_of(*found)


def _sums(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Experts that both chose, of how many; and tokens and layers with another best one, of how many."""
    sums = torch.zeros(4, dtype=torch.float64)
    for a, b in zip(mine, theirs, strict=True):
        shared = (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).sum()
        changed = (a[..., 0] != b[..., 0]).sum()
        sums += torch.tensor([shared, a.numel(), changed, a[..., 0].numel()], dtype=torch.float64)
    return sums


def _shares(sums: Tensor) -> dict[str, float]:
    shared, choices, changed, tokens = sums.tolist()
    return {
        "routing_agreement": shared / choices if choices else float("nan"),
        "routing_top1_changed": changed / tokens if tokens else float("nan"),
    }
