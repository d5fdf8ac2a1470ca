"""Rules about tensor names: what they say, and that no other module has rules of its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowlit.checkpoint import names

ROOT = Path(__file__).parents[2] / "shadowlit"

# Parts of tensor names, as a pattern or a string that is compared with names would hold them.
RULE = re.compile(
    r"lora_(embedding_)?[AB]\b|(^|\W)lora_$|base_model\W|base_layer|original_module|modules_to_save|_orig_mod"
    r"|layers(\\?\.|\b.*\\d)|\blm_head\b|embed_(tokens|in|out)\b|\bwte\b|\bexperts\b|(^|\.)(gate|router)s?$"
    r"|\b(gate|up|down|gate_up|[qkvo])_proj\b|\bself_attn\b|\bnorm\b|\b(visual|vision_tower|merger)\b"
    r"|\.(weight|bias)(\b|$)|inv_freq|language_model"
)
# Words that are no rule, by the module that may have them.
ALLOWED = {
    "plotting": {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    },  # rows of a plot
    "cli.delta": {"norm"},  # headings of tables
    "cli.similarity": {"experts"},
    "grafting.adapter": {"modules_to_save"},  # a setting of peft's
    "grafting.adapter_files": {"modules_to_save"},
    "training.loading": {"modules_to_save"},
    "training.quantisation": {"modules_to_save"},
    "training.start": {"modules_to_save"},
}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a module but docstrings, with its line; what an f-string inserts is ``{}``."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values)
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def rules(source: str) -> list[tuple[int, str]]:
    """Strings that look like a rule about names; text for people has spaces."""
    return [(line, text) for line, text in texts(ast.parse(source)) if not re.search(r"\s", text) and RULE.search(text)]


def rules_elsewhere(sources: dict[str, str]) -> list[str]:
    return [
        f"{module}:{line} {text!r}"
        for module, source in sources.items()
        for line, text in rules(source)
        if module != "checkpoint.names" and text not in ALLOWED.get(module, ())
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(ROOT.rglob("*.py"))
    }


def test_no_other_module_has_rules_about_names(sources):
    assert rules_elsewhere(sources) == []
    assert len(rules(sources["checkpoint.names"])) > 20


def test_every_exception_is_needed(sources):
    found = {module: {text for _, text in rules(sources[module])} for module in ALLOWED}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "'lora_B' in name",
        "name.startswith('lora_')",
        "name.endswith('.bias')",
        "name.removesuffix('.weight')",
        "f'{module}.weight'",
        "'.original_module.' in name",
        "f'base_model.model.{module}'",
        "f'{prefix}.lora_A.{name}.weight'",
        "f'{parent}.experts' in modules",
        "name in ('gate', 'router')",
        "'norm' not in name",
        r"re.search(r'\blayers\.(\d+)\.', name)",
        r"re.compile(r'(.+\.experts)\.(\d+)\.down_proj')",
        "HEAD = 'lm_head.weight'",
        r"re.compile(r'(embed_tokens|wte)\.weight$')",
        "name.replace('_orig_mod.', '')",
    ],
)
def test_a_rule_is_found(line):
    (found,) = {text.split(":")[0] for text in rules_elsewhere({"grafting.live": line})}
    assert found == "grafting.live"


@pytest.mark.parametrize(
    "line",
    [
        '"""The layers.0 of lm_head."""',
        "raise GraftError(f'leave {name} out, e.g. lm_head.weight')",
        "getattr(config, 'num_experts')",
        "model.base_model",
    ],
)
def test_text_for_people_is_no_rule(line):
    assert rules(line) == []


def test_factors_of_an_adapter():
    module = "model.layers.0.mlp.up_proj"
    down, up = names.factor_key(module, "A"), names.factor_key(module, "B")
    assert names.factor_pair(down) == (module, up, False)
    assert names.factor_pair(up) is None
    assert names.factor_pair("base_model.model.wte.lora_embedding_A") == (
        "wte", "base_model.model.wte.lora_embedding_B", True,
    )  # fmt: skip
    nested = "base_model.model.mlp.experts.base_layer.lora_A.weight"
    assert names.factor_pair(nested) == ("mlp.experts", nested.replace("_A", "_B"), False)
    kinds = [
        "q.lora_A.default.weight",
        "q.lora_B.weight",
        "q.lora_embedding_A",
        "lora_embedding_B.x",
        "q.lora_magnitude",
    ]
    assert [names.factor_of(name) for name in kinds] == ["A", "B", "embedding_A", "embedding_B", None]
    assert names.is_peft_key(down) and not names.is_peft_key(down.replace("A.", "A.default."))
    assert names.host_key("base_model.model.mlp.gate.base_layer.weight") == "mlp.gate.weight"


def test_the_trained_copy_and_its_original_have_the_name_of_the_files():
    copied = "base_model.model.lm_head.modules_to_save.default.weight"
    original = "base_model.model.lm_head.original_module.weight"
    assert names.canonical_name(copied) == names.canonical_name(original) == "lm_head.weight"
    assert [names.is_original_name(name) for name in (copied, original)] == [False, True]


def test_experts():
    experts = "layers.0.mlp.experts"
    key = names.expert_key(experts, 12, "up_proj")
    assert names.split_expert(key) == (experts, 12, "up_proj")
    assert names.split_expert(f"{experts}.gate_up_proj") is None
    assert names.split_fused(f"{experts}.gate_up_proj") == (experts, names.GATE_UP)
    assert names.split_fused(key) is None
    modules = ["mlp", "mlp.experts", "mlp.gate", "other.gate", "mlp.router", "mlp.router.inner"]
    assert names.router_modules(modules) == ["mlp.gate", "mlp.router"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "layer_07"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.visual.blocks.3.mlp.fc1.weight", "vision_layer_03"),
        ("model.visual.patch_embed.proj.weight", "vision_proj"),
        ("model.visual.merger.mlp.0.weight", "projector_layer_00"),
    ],
)
def test_labels_of_layers(name, label):
    assert names.layer_label(name) == label


@pytest.mark.parametrize(
    ("name", "dims", "component"),
    [
        ("model.embed_tokens.weight", 2, "embeddings"),
        ("transformer.wpe.weight", 2, "embeddings"),
        ("gpt_neox.embed_in.weight", 2, "embeddings"),
        ("embed_out.weight", 2, "head"),
        ("lm_head.weight", 2, "head"),
        ("model.layers.3.self_attn.q_proj.weight", 2, "attention"),
        ("transformer.h.3.attn.c_attn.weight", 2, "attention"),
        ("model.layers.3.attention.wqkv.weight", 2, "attention"),
        ("model.layers.3.mlp.up_proj.weight", 2, "mlp"),
        ("model.layers.3.feed_forward.w1.weight", 2, "mlp"),
        ("model.layers.3.block_sparse_moe.experts.2.w1.weight", 2, "mlp"),
        ("model.layers.3.mlp.experts.gate_up_proj", 3, "mlp"),
        ("model.layers.3.mixer.in_proj.weight", 2, "other"),
        ("model.layers.3.self_attn.q_proj.bias", 1, "vectors"),
        ("model.layers.3.mixer.D", 1, "vectors"),
        ("model.layers.3.self_attn.q_norm.weight", 1, "norms"),
        ("model.layers.3.post_attention_layernorm.weight", 1, "norms"),
        ("transformer.h.3.ln_1.weight", 1, "norms"),
        ("transformer.ln_f.bias", 1, "norms"),
        ("model.norm.weight", 1, "norms"),
    ],
)
def test_components(name, dims, component):
    assert names.component_of(name, (2,) * dims) == component in names.COMPONENTS


def test_totals_are_over_matrices_if_there_are_any():
    assert names.in_totals({"norm.weight": (2,), "q_proj.weight": (2, 2), "q_proj.bias": (2,)}) == {"q_proj.weight"}
    assert names.in_totals({"norm.weight": (2,), "scale": ()}) == {"norm.weight", "scale"}


def test_modules_of_weights_and_biases():
    found = [names.module_of(name) for name in ("mlp.up.weight", "mlp.up.bias", "mlp.experts.down_proj")]
    assert found == ["mlp.up", "mlp.up", "mlp.experts.down_proj"]
    assert [names.is_token_tensor(n) for n in ("model.embed_tokens.weight", "lm_head.weight", "norm.weight")] == [
        1,
        1,
        0,
    ]
    assert [names.is_head(n) for n in ("model.embed_tokens.weight", "lm_head.weight")] == [False, True]
