"""The graft on disk: three checkpoints in, one out, a few rows in memory at a time.

For users who have tuned a Base elsewhere and only want the graft. No transformers import: start-up is part of the
speed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shadowlit.errors import GraftError
from shadowlit.graft.arithmetic import add_delta, delta, lost_in_rounding
from shadowlit.graft.checkpoint import CheckpointReader, Streamed
from shadowlit.graft.headers import TensorInfo, some_of
from shadowlit.graft.selection import Coverage, coverage, resolve
from shadowlit.graft.streaming import THREADS, ordered, row_windows

# What training wrappers leave in the names of saved parameters.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_IN_LAYER = re.compile(r"\.\d+\.")


class Update(Protocol):
    """What a tuned checkpoint has learned: by the names of the Base's tensors, in their shapes."""

    shapes: Mapping[str, tuple[int, ...]]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the update ``tuned - base`` of ``name``, in float32."""


class FullUpdate:
    """The difference of two checkpoints of one architecture.

    Names may carry what wrappers left in them (``_orig_mod.``, ``module.``). An output head that the tuned
    checkpoint stores beside its tied embedding, and the Base does not, counts as the embedding it repeats.

    Args:
        base: reader of the Base's checkpoint.
        tuned: reader of the tuned one's.

    Raises:
        GraftError: the checkpoints don't hold the same tensors in the same shapes.
    """

    def __init__(self, base: CheckpointReader, tuned: CheckpointReader) -> None:
        self._base, self._tuned = base, tuned
        self._stored = {_WRAPPERS.sub("", name): name for name in tuned.tensors}
        missing = [name for name in base.tensors if name not in self._stored]
        added = [name for name in self._stored if name not in base.tensors and not self._repeats_embedding(name)]
        shapes = [
            f"{name} {base.tensors[name].shape} and {tuned.tensors[stored].shape}"
            for name, stored in self._stored.items()
            if name in base.tensors and base.tensors[name].shape != tuned.tensors[stored].shape
        ]
        problems = [
            f"{title}: {some_of(names)}"
            for title, names in (("only in the Base", missing), ("only in the tuned one", added), ("shapes", shapes))
            if names
        ]
        if problems:
            raise GraftError(
                f"{tuned.folder} was not tuned from {base.folder}: {'; '.join(problems)}. Give the Base that the "
                "training started from."
            )
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in base.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`Update`."""
        part = (slice(start, stop),)
        return delta(self._tuned.read_slice(self._stored[name], part), self._base.read_slice(name, part))

    def _repeats_embedding(self, name: str) -> bool:
        embedding = next((n for n in self._stored if n.endswith("embed_tokens.weight")), None)
        if not name.endswith("lm_head.weight") or embedding is None:
            return False
        head, body = self._stored[name], self._stored[embedding]
        info = self._tuned.tensors[head]
        return info.shape == self._tuned.tensors[body].shape and all(
            torch.equal(self._tuned.read_slice(head, rows), self._tuned.read_slice(body, rows))
            for rows in ((slice(*window),) for window in row_windows(info))
        )


class AdapterUpdate:
    """The update of a LoRA or rsLoRA adapter in peft's form: ``scaling * B @ A``, and modules it stores whole.

    LoRA: arXiv 2106.09685. rsLoRA: arXiv 2312.03732.

    Args:
        base: reader of the Base's checkpoint.
        folder: the adapter's folder.

    Raises:
        GraftError: an adapter whose update can't be had from its files exactly, or that doesn't fit the Base.
    """

    def __init__(self, base: CheckpointReader, folder: Path) -> None:
        # Imported late: peft takes seconds, and whole checkpoints don't need it.
        from peft import PeftConfig

        from shadowlit.graft.adapter import require_graftable, starts_from_weights

        self._base = base
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type != "LORA":
            raise GraftError(f"{folder} holds a {config.peft_type} adapter; expected LoRA or rsLoRA. Merge it first.")
        require_graftable(config)
        if starts_from_weights(config):
            raise GraftError(
                f"{folder} holds an adapter with init_lora_weights={config.init_lora_weights!r}, whose file lacks the "
                "residual that it left in the weights. Convert it to LoRA when saving (peft's "
                "path_initial_model_for_weight_conversion), or save the merged model."
            )
        self._config = config
        self._reader = CheckpointReader(folder, single_file="adapter_model.safetensors")
        self._factors: dict[str, tuple[str, str, bool]] = {}
        self._whole: dict[str, str] = {}
        for stored in self._reader.tensors:
            name = stored.removeprefix("base_model.model.").replace(".base_layer.", ".")
            for down, up in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
                if re.search(rf"\.{down}(\.weight)?$", name):
                    module = name.split(f".{down}")[0]
                    self._factors[f"{module}.weight"] = (stored, stored.replace(down, up), "embedding" in down)
            if ".lora_" not in name:
                self._whole[name] = stored
        adapted = {*self._factors, *self._whole}
        unknown = sorted(name for name in adapted if name not in base.tensors)
        if unknown:
            raise GraftError(
                f"{folder} adapts {some_of(unknown)}, which {base.folder} doesn't have. Give the Base that the "
                "adapter was trained on."
            )
        self.shapes: Mapping[str, tuple[int, ...]] = {name: base.tensors[name].shape for name in adapted}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`Update`."""
        part = (slice(start, stop),)
        # peft may store a host's tensor beside the factors on it: the embedding that it adapts, say.
        total = torch.zeros(())
        if name in self._whole:
            total = delta(self._reader.read_slice(self._whole[name], part), self._base.read_slice(name, part))
        if name not in self._factors:
            return total
        down_name, up_name, embedding = self._factors[name]
        down, up = self._reader.read(down_name).float(), self._reader.read(up_name).float()
        product = (up @ down[:, start:stop]).T if embedding else up[start:stop] @ down
        return total + self._scaling(name.removesuffix(".weight"), down.shape[0]) * product

    def _scaling(self, module: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        pattern = get_pattern_key(self._config.alpha_pattern.keys(), module)
        alpha = self._config.alpha_pattern.get(pattern, self._config.lora_alpha)
        return alpha / (rank**0.5 if self._config.use_rslora else rank)


def open_update(base: CheckpointReader, tuned: Path) -> Update:
    """The update in the folder ``tuned``: a whole checkpoint, or an adapter in peft's form."""
    if (tuned / "adapter_config.json").is_file():
        return AdapterUpdate(base, tuned)
    return FullUpdate(base, CheckpointReader(tuned))


@dataclass(frozen=True)
class Strength:
    """The scale of a graft, and other scales for tensors that match a pattern.

    Attributes:
        default: the scale λ.
        by_pattern: regular expressions, searched in the names, and their scales; the first match counts.
    """

    default: float = 1.0
    by_pattern: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Strength:
        r"""Read ``0.5``, or ``1;layers\.(0|1)\.=0.5``: a number, and pattern=number pairs, separated by ``;``.

        Raises:
            GraftError: anything else.
        """
        default, pairs = 1.0, []
        for item in filter(None, (part.strip() for part in text.split(";"))):
            pattern, _, number = item.rpartition("=")
            try:
                re.compile(pattern)
                value = float(number)
            except (re.error, ValueError) as error:
                raise GraftError(
                    rf"scale has {item!r} ({error}); expected a number, or pattern=number, e.g. '1;layers\.0\.=0.5'."
                ) from None
            if pattern:
                pairs.append((pattern, value))
            else:
                default = value
        return cls(default, tuple(pairs))

    def of(self, name: str) -> float:
        """The scale of tensor ``name``."""
        return next((value for pattern, value in self.by_pattern if re.search(pattern, name)), self.default)

    def require_matches(self, names: frozenset[str]) -> None:
        """Raise for a pattern that matches none of ``names``.

        Raises:
            GraftError: naming the pattern.
        """
        for pattern, _ in self.by_pattern:
            if not any(re.search(pattern, name) for name in names):
                raise GraftError(f"the scale's pattern {pattern!r} matches none of the {len(names)} grafted tensors.")


def linear_on_disk(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the linear layers' weights and biases, told from a checkpoint's headers alone.

    Those are the matrices inside numbered layers, and the biases beside them; embeddings and the output head lie
    outside. Equal to :func:`shadowlit.graft.naming.linear_names` for Llama, Qwen, Mistral and Gemma.
    """
    weights = {
        name for name, info in tensors.items() if _IN_LAYER.search(name) and len(info.shape) >= 2 and "norm" not in name
    }
    modules = {name.removesuffix(".weight") for name in weights}
    biases = {name for name in tensors if name.endswith(".bias") and name.removesuffix(".bias") in modules}
    return frozenset(weights | biases)


class DiskGraft:
    """A graft of checkpoints, checked from their headers and ready to be streamed.

    Args:
        update: what was learned.
        instruct: reader of the Instruct's checkpoint.
        strength: the scale.
        select: which tensors; see :func:`shadowlit.graft.selection.resolve`.
        dtype: of all floating-point tensors of the result; ``None`` for the Instruct's own.

    Raises:
        GraftError: nothing is selected, or a selected tensor has another shape in the Instruct.
    """

    def __init__(
        self,
        update: Update,
        instruct: CheckpointReader,
        strength: Strength,
        select: str | list[str] = "linear",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._update, self._instruct, self._strength, self._dtype = update, instruct, strength, dtype
        selected = resolve(select, instruct.tensors, linear_on_disk(instruct.tensors), "of the Instruct")
        self.selected = selected & frozenset(update.shapes)
        if not self.selected:
            raise GraftError(
                f"none of the {len(selected)} selected tensors has an update; there are updates of "
                f"{some_of(sorted(update.shapes))}. Change the selection, or check the models."
            )
        unequal = [
            f"{name} {update.shapes[name]} and {instruct.tensors[name].shape}"
            for name in sorted(self.selected)
            if update.shapes[name] != instruct.tensors[name].shape
        ]
        if unequal:
            raise GraftError(
                f"the update and the Instruct differ in the shapes of {some_of(unequal)}. Leave them out of the "
                "selection ('linear' leaves out embeddings and head), or graft onto an Instruct of this Base."
            )
        strength.require_matches(self.selected)
        sizes = {name: info.num_elements for name, info in instruct.tensors.items()}
        self.coverage: Coverage = coverage(self.selected, frozenset(update.shapes) & frozenset(sizes), sizes)
        self.num_bytes = sum(
            info.num_elements * self._target_dtype(info).itemsize for info in instruct.tensors.values()
        )
        self._squares = [0.0, 0.0]  # of the scaled update, and of what rounding takes from it

    @property
    def survival(self) -> float:
        """What arrived of the update in the tensors streamed so far: 1 for all of it; see ``lost_in_rounding``."""
        return 1 - (self._squares[1] / self._squares[0]) ** 0.5 if self._squares[0] else 1.0

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, Streamed]]:
        """Yield every tensor of the Instruct, grafted where selected, in parts that threads compute ahead.

        Args:
            advance: called with the bytes of every part that was taken.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for name, info in self._instruct.tensors.items():
                yield name, Streamed(self._target_dtype(info), info.shape, self._parts(pool, name, info, advance))

    def _parts(
        self, pool: ThreadPoolExecutor, name: str, info: TensorInfo, advance: Callable[[int], None]
    ) -> Iterator[Tensor]:
        for part, update_square, lost_square in ordered(
            pool, lambda window: self._part(name, info, *window), row_windows(info)
        ):
            self._squares[0] += update_square
            self._squares[1] += lost_square
            advance(part.nbytes)
            yield part

    @torch.no_grad()
    def _part(self, name: str, info: TensorInfo, start: int, stop: int) -> tuple[Tensor, float, float]:
        target = self._target_dtype(info)
        instruct = self._instruct.read_slice(name, (slice(start, stop),) if info.shape else ())
        if name not in self.selected:
            return instruct.to(target), 0.0, 0.0
        scale = self._strength.of(name)
        update = self._update.rows(name, start, stop)
        assert update.shape == instruct.shape
        lost = lost_in_rounding(instruct, update, scale, target)
        squares = [float(t.square().sum(dtype=torch.float64)) for t in (update, lost)]
        return add_delta(instruct, update, scale).to(target), scale**2 * squares[0], squares[1]

    def _target_dtype(self, info: TensorInfo) -> torch.dtype:
        return self._dtype if self._dtype is not None and info.dtype.is_floating_point else info.dtype
