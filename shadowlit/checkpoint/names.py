"""Every rule about tensor names: wrappers, canonical spellings, kinds, layers, experts and towers.

Names come from three places: the parameters of a module, possibly wrapped by peft, ``torch.compile``, FSDP or
activation checkpointing; safetensors files, whose spelling depends on the library that wrote them; and users'
patterns. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping

TOWERS = ("language", "vision", "projector")
"""The parts of a vision-language model that can be trained and grafted separately."""

COMPONENTS = ("embeddings", "attention", "mlp", "head", "other", "norms", "vectors")
"""What a tensor is in a transformer; ``vectors`` are biases and whatever else isn't a matrix, such as Mamba's ``D``."""

# What torch.compile, FSDP, activation checkpointing and DDP insert into a parameter's name.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# What peft inserts. Where two adapted parameters share a module, peft nests one wrapper in the other, and only the
# wrapper's name tells their factors apart, so a base_layer that leads to a factor stays.
_PEFT = re.compile(
    r"^base_model\.model\.|\bbase_layer\.(?!(?:base_layer\.)*lora_)|\bmodules_to_save\.[^.]+\.|\boriginal_module\."
    r"|\btoken_adapter\."
)
# The names of peft's layers and parameters, which begin with their type of adapter.
_ADAPTER = re.compile(
    r"\b(?:lora_[A-Za-z]|(?:adamss|beft|b?oft|c3a|delora|fourierft|glora|gralora|hada|hira|hra|ia3|ln_tuning|lokr|miss"
    r"|randlora|road|shira|trainable_tokens|vblora|vera|waveft)_\w)"
)
# A factor in which an update is linear that is the same whatever weights its adapter is on.
_LINEAR_FACTOR = re.compile(
    r"\b(?:lora_B|lora_embedding_A|hada_w1_a|lokr_w1(?:_a)?|vera_lambda_b|fourierft_spectrum|c3a_kernel|gralora_B"
    r"|randlora_lambda|waveft_spectrum|shira_weight|beft_bias)\b"
)
_CHANGES_BIAS = re.compile(r"\b(?:beft|glora|ia3|road)_")
_UNMERGED = re.compile(rf"{_ADAPTER.pattern}|\.base_layer\.|\.modules_to_save\.|\.original_module\.")
_FACTOR = re.compile(r"\blora_((?:embedding_)?[AB])\b")
_FACTOR_IN_MODULE = re.compile(rf"({_ADAPTER.pattern}\w*)\.default\b")
_WHOLE = re.compile(r"\.(original_module|modules_to_save)\.")
_PEFT_ROOT = "base_model.model."
_DOWN_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_(embedding_)?A(?:\.weight)?")

# What precedes the text model: peft's wrapper, a multimodal model, a head's body. Other towers follow it too, and may
# have a body of their own, which transformers 5 no longer names.
_BODY = re.compile(r"^((base_model|model|language_model|transformer)\.)+")
_VISION_BODY = re.compile(r"^(vision_tower)\.vision_model\.")
_MIXTRAL_EXPERT = re.compile(r"(\.experts\.\d+\.)(w[123])\.")
_NEOX_HEAD = re.compile(r"^embed_out\.weight$")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# Experts by canonical keys: one matrix each, or fused, which stacks the rows of one or two matrices of every expert.
GATE_UP, DOWN = "gate_up_proj", "down_proj"
ROWS_OF_FUSED = {GATE_UP: ("gate_proj", "up_proj"), DOWN: (DOWN,)}
"""The matrices of an expert whose rows each fused tensor of a mixture holds, in their order."""
_SINGLE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")

HEAD_KEYS = ("lm_head.weight", "output.weight", "output_layer.weight")
"""Canonical keys of an output head that may be tied to the embedding."""
# fmt: off
EMBEDDING_KEYS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "text_model.embed_tokens.weight",
    "decoder.embed_tokens.weight", "gpt_neox.embed_in.weight", "backbone.embeddings.weight", "tok_embeddings.weight",
    "embedding.word_embeddings.weight",
)
"""Canonical keys of the embedding that such a head is tied to."""
# fmt: on
# Usual names of embedding and output head, for models whose rows are padded beyond the config's vocab_size.
_VOCABULARY = re.compile(
    r"(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|embed_out|lm_head|output(_layer)?)\.weight$"
)
_HEAD = re.compile(r"(lm_head|embed_out|output(_layer)?)\.weight$")

# Usual buffers of models whose code is unknown: frequencies of rotary embeddings, and what GPT-NeoX masks with.
_BUFFER = re.compile(r"\b(inv_freq|masked_bias)$")
_QUANTISED = re.compile(
    r"(\.weight_(scale|packed|zero_point)|_scale_inv|\.qweight|\.qzeros|\.SCB|\babsmax|\.quant_map|\.quant_state\..+"
    r"|\.experts\.\w+_(blocks|scales))$"
)

_NORM = re.compile(r"(^|\.)ln_\w+\.")  # GPT-2's
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_?forward|ffn|experts|\.moe\.|_moe\.|\.fc\d|dense_\w+_to_\w+|(gate|up|down)_proj")
_EMBEDDING = re.compile(r"embed|wte|wpe")

_LAYER = re.compile(r"\.(\d+)\.")
_DECODER_LAYER = re.compile(r"\blayers\.(\d+)\.")
# The experts of a mixture, one matrix per expert (with its number) or all in one tensor, and what routes among them.
_EXPERTS = re.compile(r"(.+)\.experts\.(?:(\d+)\.)?")
_ROUTER = re.compile(r"(.+?)\.(?:gate|router)(?:\.\w+)*")
_ROUTER_MODULE = re.compile(r"(.+)\.(?:gate|router)")

# transformers' names, the same in modules and files. Qwen-VL's projector is part of its vision tower's module, so the
# projector is looked for first.
_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|image_newline|merger|deepstack_merger_list|connector|aligner"
    r"|embed_vision)(\.|$)"
)
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|vision_backbone)(\.|$)")
_SOUND = re.compile(r"(^|\.)(audio_tower|audio_model|embed_audio|audio)(\.|$)")


def canonical_name(name: str) -> str:
    """Return the name that a checkpoint file uses for the parameter called ``name`` in a wrapped module.

    ``base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight`` becomes
    ``model.layers.0.self_attn.q_proj.weight``.
    """
    return _PEFT.sub("", _WRAPPERS.sub("", name))


def canonical_key(name: str) -> str:
    """Return the one spelling that stands for all names that libraries give to the same tensor of a model.

    ``base_model.model.model.layers.0.mlp.up_proj.weight``, ``model.language_model.layers.0.mlp.up_proj.weight`` and
    ``module._orig_mod.model.layers.0.mlp.up_proj.weight`` become ``layers.0.mlp.up_proj.weight``; Mixtral's
    ``block_sparse_moe.experts.3.w1`` becomes ``mlp.experts.3.gate_proj``, and GPT-NeoX's ``embed_out`` its ``lm_head``.
    """
    key = _VISION_BODY.sub(r"\1.", _BODY.sub("", _WRAPPERS.sub("", name))).replace(".block_sparse_moe.", ".mlp.")
    key = _NEOX_HEAD.sub(HEAD_KEYS[0], key)
    return _MIXTRAL_EXPERT.sub(lambda match: f"{match[1]}{_MIXTRAL[match[2]]}.", key)


def stored_names(names: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """Map names used elsewhere to the names under which a checkpoint stores the same tensors.

    transformers writes vision-language models under the names of their first publication, which differ from those of
    its modules: ``language_model.model.layers.0`` for ``model.language_model.layers.0``. A name is mapped to itself if
    it is among ``tensors``, else to the tensor with the same canonical key, else to itself.
    """
    stored = set(tensors)
    keys = {canonical_key(name): name for name in stored}
    return {name: name if name in stored else keys.get(canonical_key(name), name) for name in names}


def is_adapter_name(name: str) -> bool:
    """Return whether ``name`` is one of an adapter's own factors, which no checkpoint of the Base holds."""
    return _ADAPTER.search(name) is not None


def is_linear_factor(name: str) -> bool:
    """Return whether ``name`` is a factor by which a scale can be folded into the update of its adapter."""
    return _LINEAR_FACTOR.search(name) is not None


def changes_bias(name: str) -> bool:
    """Return whether a parameter of an adapter belongs to a type that changes the bias of its layer too."""
    return _CHANGES_BIAS.search(name) is not None


def is_original_name(name: str) -> bool:
    """Return whether ``name`` is a frozen original of which peft trains a copy (``modules_to_save``)."""
    return ".original_module." in name


def repeated_keys(keys: Collection[str]) -> frozenset[str]:
    """Return those of the names in peft's file that repeat, with their wrapper, what it holds without.

    It stores modules that train as a whole twice, and their frozen originals, where the vocabulary was resized.
    """
    return frozenset(key for key in keys if (plain := _WHOLE.sub(".", key)) != key and plain in keys)


def factor_of(name: str) -> str | None:
    """Return which factor of LoRA ``name`` is: ``A``, ``B``, ``embedding_A`` or ``embedding_B``; ``None`` if none."""
    found = _FACTOR.search(name)
    return found[1] if found else None


def host_of_factor(name: str) -> str:
    """Return the name of the weight that an adapter's factor belongs to; the name itself for any other tensor."""
    found = _ADAPTER.search(name)
    return name if found is None else weight_of(name[: found.start() - 1])


def factor_key(module: str, factor: str) -> str:
    """Return the name of a LoRA factor in peft's files: ``base_model.model.q_proj.lora_A.weight``."""
    return f"{_PEFT_ROOT}{module}.lora_{factor}.weight"


def stored_factors(name: str) -> tuple[str, str]:
    """Return the names in a stored delta of the factors [out, r] and [r, in] whose product a matrix is."""
    return f"{name}.lora_B", f"{name}.lora_A"


def whole_of_factor(name: str) -> str | None:
    """Return the name of the matrix of which a tensor of a stored delta is a factor; ``None`` if it is none."""
    whole, _, factor = name.rpartition(".")
    return whole if whole and factor in ("lora_A", "lora_B") else None


def is_peft_key(name: str) -> bool:
    """Return whether peft would load a tensor of this name; what it would not, it ignores."""
    return name.startswith("base_model.") and ".default." not in name


def peft_key(name: str) -> str:
    """Return the name in peft's files of what :func:`saved_name` returns for a factor."""
    return name if name.startswith("base_model.") else f"{_PEFT_ROOT}{name}"


def host_key(key: str) -> str:
    """Return the name in the host's checkpoint of a tensor that peft's files hold whole, next to the factors."""
    return key.removeprefix(_PEFT_ROOT).replace(".base_layer.", ".")


def adapted_module(key: str) -> str | None:
    """Return the host's module that a tensor of an adapter in peft's form belongs to; ``None`` if it is of all."""
    found = _ADAPTER.search(key)
    assert found is not None
    module = host_key(f"{key[: found.start()]}.").replace(".token_adapter.", ".").strip(".")
    return None if module in ("", "base_model") else module


def factor_pair(key: str) -> tuple[str, str, bool] | None:
    """Return the host's module, factor ``B`` and whether the module is an embedding, if ``key`` is factor ``A``."""
    match = _DOWN_FACTOR.fullmatch(key.replace(".base_layer.", "."))
    if match is None:
        return None
    embedding = match[2] or ""
    return match[1], key.replace(f"lora_{embedding}A", f"lora_{embedding}B"), bool(embedding)


def saved_name(name: str) -> str:
    """Return the name in a model's or adapter's folder of what a checkpoint of a ``ShadowModule`` calls ``name``.

    ``model.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight`` becomes
    ``model.layers.0.mlp.up_proj.lora_A.weight``.
    """
    return _FACTOR_IN_MODULE.sub(r"\1", canonical_name(name.removeprefix("model.")))


def adapter_key(name: str) -> str:
    """Return the one spelling of what :func:`saved_name` and peft's files call a tensor of an adapter."""
    return canonical_key(canonical_name(name)).removesuffix(".weight")


def is_unmerged_name(name: str) -> bool:
    """Return whether ``name`` shows that a stored model still has an adapter that was not merged into its weights."""
    return _UNMERGED.search(name) is not None


def is_quantised_name(name: str) -> bool:
    """Return whether ``name`` is a part of a quantised weight: its scale, zero point or packed values."""
    return _QUANTISED.search(name) is not None


def possible_buffers(names: Collection[str]) -> list[str]:
    """Return the names that are neither a module's weight, nor the bias of a module with a weight, nor experts'."""
    stored = frozenset(names)
    biases = {name for name in stored if is_bias(name) and weight_of(module_of(name)) in stored}
    return [name for name in names if not (is_weight(name) or name in biases or is_of_experts(name))]


def next_to_modules(names: Collection[str]) -> frozenset[str]:
    """Return the names of what modules with submodules hold themselves, such as ``self_attn.relative_position_index``.

    Quantised weights are never among them: those belong to a linear layer, or to a mixture's experts.
    """
    parents = {module_of(name).rpartition(".")[0] for name in names if is_weight(name)}
    return frozenset(name for name in names if name.rpartition(".")[0] in parents and not is_of_experts(name))


def is_usual_buffer(name: str) -> bool:
    """Return whether ``name`` is a usual name of a buffer that models compute for themselves."""
    return _BUFFER.search(name) is not None


def buffer_key(name: str) -> str:
    """Return the module's last name and the buffer's, which are the same wherever in a model the module lies."""
    return ".".join(name.split(".")[-2:])


def kind_of(name: str) -> str:
    """Return the last module's name in a parameter's name: ``q_proj`` for ``model.layers.0.self_attn.q_proj.weight``.

    For experts, fused or single, the kind includes the matrix and omits the expert's number: ``experts.down_proj``.
    """
    parts = name.split(".")
    if match := _EXPERTS.match(name):
        return f"experts.{name[match.end() :].removesuffix('.weight')}"
    return parts[-2] if len(parts) > 1 else parts[0]


def component_of(name: str, shape: Collection[int]) -> str:
    """Return which of :data:`COMPONENTS` a tensor belongs to, by its name and shape."""
    if len(shape) < 2:
        return "norms" if is_norm(name) else "vectors"
    if is_head(canonical_key(name)):
        return "head"
    if layer_of(name) is None and _EMBEDDING.search(name):
        return "embeddings"
    return "attention" if _ATTENTION.search(name) else "mlp" if _MLP.search(name) else "other"


def in_totals(shapes: Mapping[str, Collection[int]]) -> frozenset[str]:
    """Return the tensors over which a number that compares weights is summed up: the matrices, if there are any.

    Norms' weights may be so large (a norm of 22,666 in Gemma 3 270M, where it is 631 for all matrices) that a total
    over everything would describe them alone. They and biases are reported as components of their own.
    """
    return frozenset(name for name, shape in shapes.items() if len(shape) >= 2) or frozenset(shapes)


def is_bias(name: str) -> bool:
    """Return whether ``name`` is a module's bias."""
    return name.endswith(".bias")


def is_weight(name: str) -> bool:
    """Return whether ``name`` is a module's weight; fused experts are bare parameters, whose names don't say so."""
    return name.endswith(".weight")


def weight_of(module: str) -> str:
    """Return the name of a module's weight."""
    return f"{module}.weight"


def bias_of(module: str) -> str:
    """Return the name of a module's bias."""
    return f"{module}.bias"


def module_of(name: str) -> str:
    """Return the module that a weight or bias belongs to; the name itself for a bare parameter."""
    return re.sub(r"\.(weight|bias)$", "", name)


def leaf_of(module: str) -> str:
    """Return the last part of a module's name: ``q_proj``."""
    return module.rpartition(".")[2]


def is_norm(name: str) -> bool:
    """Return whether a parameter belongs to a normalisation."""
    return "norm" in name or _NORM.search(name) is not None


def is_token_tensor(name: str) -> bool:
    """Return whether ``name`` is a usual name of an embedding or output head, which have one row per token."""
    return _VOCABULARY.search(name) is not None


def is_head(name: str) -> bool:
    """Return whether ``name`` is a usual name of an output head, which a tie makes superfluous."""
    return _HEAD.search(name) is not None


def embedding_in(keys: Container[str]) -> str | None:
    """Return the canonical key of the embedding among ``keys``."""
    return next((key for key in EMBEDDING_KEYS if key in keys), None)


def head_in(keys: Container[str]) -> str | None:
    """Return the canonical key of the output head among ``keys``."""
    return next((key for key in HEAD_KEYS if key in keys), None)


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a parameter belongs to, from 0; ``None`` outside numbered layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """Count the numbered layers by what precedes the number: ``{"layers": 28, "visual.blocks": 32}``."""
    counts: dict[str, int] = {}
    for name in names:
        parts = _LAYER.split(canonical_key(name), maxsplit=1)
        if len(parts) == 3:
            counts[parts[0]] = max(counts.get(parts[0], 0), int(parts[1]) + 1)
    return counts


def layer_label(name: str) -> str:
    """Return the label under which a parameter's layer is logged: ``layer_07``, or its kind outside the layers.

    Labels of towers other than the language model begin with the tower's name, so that their blocks stay apart.
    """
    tower, decoder = tower_of(name), _DECODER_LAYER.search(name)
    if tower != "language":
        number = layer_of(name)
        return f"{tower}_{kind_of(name)}" if number is None else f"{tower}_layer_{number:02d}"
    return f"layer_{int(decoder[1]):02d}" if decoder else kind_of(name)


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a parameter belongs to, from 0; ``None`` for fused experts and the rest."""
    match = _EXPERTS.match(name)
    return int(match[2]) if match and match[2] else None


def is_of_experts(name: str) -> bool:
    """Return whether a parameter belongs to a mixture's experts, fused or single. Shared experts do not count."""
    return _EXPERTS.match(name) is not None


def routers(names: Iterable[str]) -> frozenset[str]:
    """Return the routers among ``names``: a gate or router next to a mixture's experts."""
    names = list(names)
    mixtures = {match[1] for name in names if (match := _EXPERTS.match(name))}
    return frozenset(name for name in names if (match := _ROUTER.fullmatch(name)) and match[1] in mixtures)


def is_experts(module: str) -> bool:
    """Return whether a module holds all experts of a layer as bare parameters, as in transformers 5."""
    return leaf_of(module) == "experts"


def router_modules(modules: Iterable[str]) -> list[str]:
    """Return the routers among the names of modules: a gate or router next to ``experts``."""
    known = dict.fromkeys(modules)
    return [name for name in known if (match := _ROUTER_MODULE.fullmatch(name)) and f"{match[1]}.experts" in known]


def expert_key(experts: str, number: int, kind: str) -> str:
    """Return the name of one expert's matrix: ``mlp.experts.3.up_proj.weight``."""
    return f"{experts}.{number}.{kind}.weight"


def split_expert(key: str) -> tuple[str, int, str] | None:
    """Split the canonical key of one expert's matrix into the experts' name, its number and its kind."""
    match = _SINGLE_EXPERT.fullmatch(key)
    return (match[1], int(match[2]), match[3]) if match else None


def split_fused(key: str) -> tuple[str, str] | None:
    """Split the canonical key of a fused tensor into the experts' name and one of :data:`ROWS_OF_FUSED`."""
    match = _FUSED_EXPERTS.fullmatch(key)
    return (match[1], match[2]) if match else None


def tower_of(name: str) -> str:
    """Return the tower that a tensor or module belongs to: one of :data:`TOWERS`, or ``audio``.

    Whatever belongs to no other tower belongs to the language model, and so does all of a text model.
    """
    if _SOUND.search(name):
        return "audio"
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language"


def count_towers(names: Iterable[str]) -> dict[str, int]:
    """Count how many of ``names`` belong to each tower. Towers without any are left out."""
    counts = Counter(tower_of(name) for name in names)
    return {tower: counts[tower] for tower in (*TOWERS, "audio") if counts[tower]}


def split_selection(select: str | Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a selection into the towers that it names and the rest: ``linear``, ``all``, patterns."""
    parts = [select] if isinstance(select, str) else list(select)
    return [part for part in parts if part in TOWERS], [part for part in parts if part not in TOWERS]
