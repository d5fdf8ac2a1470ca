"""The graft inside a module, against the equation computed in float64 by independent code."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.distributed import local, local_slices
from shadowlit.errors import GraftError
from shadowlit.grafting.adapter import require_graftable
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.subject import BASE, INSTRUCT, TUNED, Subject
from shadowlit.training.loading import load_for_training
from shadowlit.training.parallel import parallelize
from tests.rounding import require_same_logits
from tests.tiny import ARCHITECTURES, save_model, save_pair

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(7))


def load(folder, adapter=None, device="cpu", mesh=None):
    return load_for_training(
        AlignedReader.open(folder, folder),
        AutoConfig.from_pretrained(folder), adapter=adapter, device=torch.device(device), mesh=mesh,
        parallelize=partial(parallelize, mesh=mesh),
    )  # fmt: skip


def open_graft(model, folders, **options):
    return LiveGraft(model, AlignedReader.open(*folders), CheckpointReader(folders[1]), **options)


def train_a_bit(model, size=0.02, seed=3):
    """Move everything that is trained, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator) * size
                local(parameter).add_(step[local_slices(parameter)])


def grafted(scale):
    return Subject("grafted", scale)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def effective_weights(model):
    """Weights of the trained model with the adapter merged by peft itself, by checkpoint name, in float64."""
    merged = copy.deepcopy(model)
    if hasattr(merged, "merge_and_unload"):
        merged = merged.double().merge_and_unload()
    return {name: p.detach().double() for name, p in merged.named_parameters()}


def truth(folders, model, scale, selected):
    """An Instruct with W_I + scale (W_B+ - W_B) on the selected tensors, computed in float64."""
    base, instruct = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in folders)
    start, tuned = dict(base.named_parameters()), effective_weights(model)
    with torch.no_grad():
        for name, parameter in instruct.named_parameters():
            if name in selected:
                parameter.add_(scale * (tuned[name] - start[name]))
    return instruct


ADAPTERS = {
    "full": None,
    "lora": {"r": 4},
    "rslora": {"r": 4, "use_rslora": True, "lora_alpha": 16},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
    "embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "bias": {"r": 4, "bias": "all"},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
    "olora": {"r": 4, "init_lora_weights": "olora"},
    "modules_to_save": {"r": 4, "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_graft_is_exact_for_every_adapter(tmp_path, kind, scale):
    warnings.simplefilter("ignore")
    folders = save_pair(tmp_path, "qwen2", tied=False)
    options = ADAPTERS[kind]
    adapter = None if options is None else LoraConfig(**{"target_modules": "all-linear", **options})
    require_graftable(adapter)
    model = load(folders[0], adapter)
    train_a_bit(model)
    tuned = logits(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    graft = open_graft(model, folders, select="all")
    expected = truth(folders, model, scale, graft.selected)
    with graft.applied(grafted(scale)):
        got = logits(model)
    wanted = expected(IDS).logits
    require_same_logits(got, wanted, wanted - AutoModelForCausalLM.from_pretrained(folders[1])(IDS).logits)
    exported = dict(graft.grafted_tensors(scale))
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(exported[name].double(), parameter, rtol=0, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [None, {"r": 4}])
def test_five_architectures(tmp_path, arch, tied, adapter):
    folders = save_pair(tmp_path, arch, tied=tied, dtype=torch.bfloat16)
    model = load(folders[0], adapter and LoraConfig(**adapter, target_modules="all-linear"))
    if adapter is None:  # the start is the Base as transformers loads it, in float32
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)))
    graft = open_graft(model, folders, dtype=torch.float32)
    assert graft.on_base
    with graft.applied(grafted(1.0)):  # nothing learned yet: the graft is the Instruct
        reference = AutoModelForCausalLM.from_pretrained(folders[1], dtype="auto" if adapter else torch.float32)
        assert torch.equal(logits(model), logits(reference))
    train_a_bit(model)
    assert graft.on_base is (adapter is not None)  # under an adapter the host never moves
    expected = truth(folders, model, 1.0, graft.selected)
    exported = dict(graft.grafted_tensors())
    assert set(exported) == set(CheckpointReader(folders[1]).tensors)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(exported[name].double(), parameter, rtol=0, atol=1e-6)
    with graft.applied(BASE):
        reference = AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto" if adapter else torch.float32)
        assert torch.equal(logits(model), logits(reference))


def test_a_tied_embedding_is_grafted_once(tmp_path):
    folders = save_pair(tmp_path, "llama", tied=True)
    model = load(folders[0])
    train_a_bit(model)
    graft = open_graft(model, folders, select="all")
    expected = truth(folders, model, 1.0, graft.selected)
    assert "lm_head.weight" not in graft.selected
    with graft.applied(grafted(1.0)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model.lm_head.weight.double(), expected.lm_head.weight, rtol=0, atol=1e-7)


def test_a_diverged_training_leaves_the_untouched_models_finite(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0])
    graft = open_graft(model, folders)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for state, folder in ((BASE, folders[0]), (INSTRUCT, folders[1])):
        with graft.applied(state):
            assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_outside_the_selection_stands_the_instruct_itself(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0])
    train_a_bit(model)
    graft = open_graft(model, folders, select=["q_proj"])
    instruct = dict(AutoModelForCausalLM.from_pretrained(folders[1]).named_parameters())
    with graft.applied(grafted(1.0)):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, instruct[name]) is ("q_proj" not in name)
    assert len(graft.coverage.left_out) == 24 - 2


def test_several_scales_in_a_row_need_no_restore_between(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    for adapter in (None, LoraConfig(r=4, target_modules="all-linear")):
        model = load(folders[0], adapter)
        train_a_bit(model)
        graft = open_graft(model, folders)
        alone = {}
        subjects = [grafted(0.0), grafted(0.5), grafted(1.5), BASE, INSTRUCT]
        for subject in subjects:
            with graft.applied(subject):
                alone[subject] = logits(model)
        assert torch.equal(alone[INSTRUCT], alone[grafted(0.0)])
        for subject in (subjects[number] for number in (1, 3, 2, 4, 0)):
            graft.apply(subject)
            assert torch.equal(logits(model), alone[subject])
        graft.restore()


@pytest.mark.parametrize("adapter", [None, {"r": 4}])
def test_a_subject_applied_within_another_gives_it_back(tmp_path, adapter):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0], LoraConfig(**adapter, target_modules="all-linear") if adapter else None)
    train_a_bit(model)
    graft = open_graft(model, folders)
    tuned = logits(model)
    with graft.applied(INSTRUCT):
        instruct = logits(model)
    for subject in (TUNED, grafted(1.0), BASE, INSTRUCT):
        graft.apply(subject)
        before = logits(model)
        with graft.applied(INSTRUCT):
            assert graft.subject == INSTRUCT and torch.equal(logits(model), instruct)
        assert graft.subject == subject and torch.equal(logits(model), before)
        with graft.applied(TUNED):
            assert torch.equal(logits(model), tuned)
        assert graft.subject == subject and torch.equal(logits(model), before)
        with pytest.raises(KeyboardInterrupt), graft.applied(BASE):
            raise KeyboardInterrupt
        assert subject == BASE or (graft.subject == TUNED and torch.equal(logits(model), tuned))
        graft.apply(TUNED)
        assert torch.equal(logits(model), tuned)
    with graft.applied(grafted(1.0)):
        swaps = graft.apply_s
        with graft.applied(grafted(1.0)):
            assert graft.apply_s == swaps  # nothing to do


def test_a_measurement_is_repeated_when_a_checkpoint_was_saved_meanwhile(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0])
    train_a_bit(model)
    graft = open_graft(model, folders)
    tuned, seen = logits(model), []

    def measure():
        if not seen:
            graft.restore_for_checkpoint()
        seen.append(logits(model))
        return len(seen)

    assert graft.measure(BASE, measure) == 2
    assert torch.equal(seen[0], tuned) and torch.equal(logits(model), tuned)
    with graft.applied(BASE):
        assert torch.equal(seen[1], logits(model))
    assert graft.measure(TUNED, lambda: graft.restore_for_checkpoint()) is None  # the tuned weights: nothing changed


def test_a_module_that_was_moved_is_grafted_where_it_is_now(tmp_path):
    """Lightning moves a module off its device when a command ends, and back: other storage, the same parameters."""
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0], LoraConfig(r=4, target_modules="all-linear"))
    train_a_bit(model)
    graft = open_graft(model, folders)
    with graft.applied(grafted(1.0)):
        before = logits(model)
    tuned = logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with graft.applied(grafted(1.0)):
        assert torch.equal(logits(model), before) and not torch.equal(before, tuned)
    assert torch.equal(logits(model), tuned)


def test_validated_weights_are_those_of_the_exported_dtype(tmp_path):
    """Full tuning: the float32 masters hold the values that a bfloat16 file will hold."""
    folders = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    model = load(folders[0])
    train_a_bit(model, size=1e-4)
    graft = open_graft(model, folders)
    exported = dict(graft.grafted_tensors())
    assert {t.dtype for t in exported.values()} == {torch.bfloat16}
    with graft.applied(grafted(1.0)):
        assert all(torch.equal(p, exported[name].float()) for name, p in model.named_parameters())


def test_statistics_against_independent_numbers(tmp_path):
    folders = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    for adapter in (None, LoraConfig(r=4, target_modules="all-linear")):
        model = load(folders[0], adapter)
        train_a_bit(model, size=1e-4 if adapter is None else 0.01)
        graft = open_graft(model, folders)
        numbers = graft.statistics(0.5)
        squares = {}
        with graft.applied(grafted(0.5), squares):
            pass
        assert squares.keys() == graft.selected
        assert graft.statistics(0.5, squares) == numbers
        start = dict(AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64).named_parameters())
        goal = dict(AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float64).named_parameters())
        tuned = effective_weights(model)
        updates = {name: tuned[name] - start[name] for name in graft.selected}
        lost = {
            name: (goal[name] + 0.5 * update).bfloat16().double() - goal[name] - 0.5 * update
            for name, update in updates.items()
        }
        norm = lambda tensors: torch.cat([t.flatten() for t in tensors]).norm().item()  # noqa: E731
        assert numbers["delta_norm"] == pytest.approx(norm(updates.values()), rel=1e-4)
        relative = norm(updates.values()) / norm(goal[name].detach() for name in updates)
        assert numbers["relative_delta"] == pytest.approx(relative, rel=1e-4)
        assert numbers["survival"] == pytest.approx(1 - norm(lost.values()) / norm(updates.values()) / 0.5, abs=2e-3)
        assert numbers["survival"] < 0.99
        in_layer = [update for name, update in updates.items() if "layers.1." in name]
        assert numbers["delta_norm/layer_01"] == pytest.approx(norm(in_layer), rel=1e-4)


def test_large_norms_do_not_swamp_the_totals(tmp_path):
    """As in Gemma: norms' weights of 100, in which bfloat16 holds nothing of an update of 1e-4."""
    folders = save_pair(tmp_path, "gemma3_text", dtype=torch.bfloat16)
    for folder in folders:
        state = load_file(folder / "model.safetensors")
        large = {name: tensor + 100 if tensor.ndim == 1 else tensor for name, tensor in state.items()}
        save_file(large, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folders[0])
    train_a_bit(model, size=1e-4)
    numbers = open_graft(model, folders, select="all").statistics()
    start, goal = ({n: t.double() for n, t in load_file(f / "model.safetensors").items()} for f in folders)
    tuned = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    norm = lambda tensors: torch.cat([t.flatten() for t in tensors]).norm().item()  # noqa: E731
    matrices, norms = ([n for n, t in tuned.items() if (t.ndim == 1) == one] for one in (False, True))
    for key, names in (("", matrices), ("/norms", norms), ("/mlp", [n for n in matrices if ".mlp." in n])):
        updates = {name: tuned[name] - start[name] for name in names}
        lost = [(goal[n] + update).bfloat16().double() - goal[n] - update for n, update in updates.items()]
        relative = norm(updates.values()) / norm(goal[name] for name in names)
        assert numbers[f"relative_delta{key}"] == pytest.approx(relative, rel=1e-3)
        assert numbers[f"survival{key}"] == pytest.approx(1 - norm(lost) / norm(updates.values()), abs=5e-3)
    parts = {key.partition("/")[2] for key in numbers if key.startswith("survival/")}
    assert parts == {"attention", "embeddings", "mlp", "norms"}
    assert numbers["relative_delta"] > 20 * norm(tuned[n] - start[n] for n in tuned) / norm(goal.values())
    assert numbers["survival/norms"] < 0.05 < 0.5 < numbers["survival"]  # over everything it would be near 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_of_a_large_parameter_is_one(tmp_path, dtype):
    graft = open_graft(load(save_pair(tmp_path, "qwen3")[0]), (tmp_path / "base", tmp_path / "instruct"))
    live = torch.randn(1100, 1000).to(dtype)
    saved = graft._copy(live)
    assert saved.dtype == dtype and torch.equal(saved, live)
    live.zero_()
    assert saved.abs().max() > 1


def test_factors_that_are_not_finite_leave_the_untouched_models_alone(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0], LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(math.nan)
    graft, ids = open_graft(model, folders), torch.arange(8)[None]
    for subject, folder in zip((BASE, INSTRUCT), folders, strict=True):
        with graft.applied(subject), torch.no_grad():
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits)
    assert model(input_ids=ids).logits.isnan().all()


def test_adapter_export_folds_scale_and_selection(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0], LoraConfig(r=4, target_modules="all-linear"))
    train_a_bit(model)
    graft = open_graft(model, folders, select=["q_proj"])
    tensors = graft.adapter_tensors(0.5)
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert set(tensors) == set(factors)
    for name, tensor in tensors.items():
        scale = 1.0 if "lora_A" in name else 0.5 if "q_proj" in name else 0.0
        assert torch.equal(tensor, factors[name] * scale)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_qalora": True}, "use_qalora=True can't be grafted exactly: its factors act on pooled inputs"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens.* some positions only"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' is computed from activations"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
    ],
)
def test_what_can_not_be_exact_is_refused_with_the_reason(options, reason):
    with pytest.raises(GraftError, match=reason):
        require_graftable(LoraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_an_adapter_on_one_side_of_a_tied_embedding_is_refused(tmp_path, options):
    folders = save_pair(tmp_path, "qwen3", tied=True)
    with pytest.raises(GraftError, match=r"are one tensor \(tie_word_embeddings\)"):
        load(folders[0], LoraConfig(r=2, **options))


def test_a_frozen_weight_that_is_not_the_bases_is_an_error(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0], LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.model.model.norm.weight.data[0] += 1
    with pytest.raises(GraftError, match=r"model\.norm\.weight is frozen .* but is not the Base's"):
        open_graft(model, folders)


def test_unmatched_names_are_an_error(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    (tmp_path / "other").mkdir()
    others = save_pair(tmp_path / "other", "llama")
    with pytest.raises(GraftError, match=r"Instruct's checkpoint .* has no tensor .*q_norm"):
        open_graft(load(folders[0]), (folders[0], others[1]))


def test_several_active_adapters_are_refused(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = load(folders[0], LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = ["default", "second"]
    with pytest.raises(GraftError, match="active adapters"):
        open_graft(model, folders)


@pytest.mark.parametrize("sizes", [(272, 280), (280, 272)])
@pytest.mark.parametrize("tied", [True, False])
def test_unequal_vocabularies_take_the_instructs_rows(tmp_path, sizes, tied):
    base = save_model(tmp_path / "base", "qwen3", tied=tied, vocab_size=sizes[0])
    instruct = save_model(tmp_path / "instruct", "qwen3", tied=tied, vocab_size=sizes[1], seed=1)
    reader = AlignedReader.open(base, instruct)
    stored = CheckpointReader(base).tensors
    assert sum(info.shape != stored[name].shape for name, info in reader.tensors.items()) == (1 if tied else 2)
    model = load_for_training(
        reader, AutoConfig.from_pretrained(base, vocab_size=sizes[1]), adapter=None, device=torch.device("cpu"),
        mesh=None, parallelize=lambda model: None,
    )  # fmt: skip
    own, other = (AutoModelForCausalLM.from_pretrained(f).model.embed_tokens.weight for f in (base, instruct))
    shared = min(sizes)
    embedding = model.model.embed_tokens.weight
    assert torch.equal(embedding[:shared], own[:shared])
    assert torch.equal(embedding[shared:], other[shared:])
    assert torch.equal(reader.read_slice("model.embed_tokens.weight", (slice(268, 271), slice(0, 5))),
                       embedding[268:271, :5])  # fmt: skip
    train_a_bit(model)
    graft = open_graft(model, (base, instruct))
    with graft.applied(grafted(1.0)):
        assert torch.equal(embedding, other)  # outside the selection: the Instruct's own, all of its rows
    exported = dict(graft.grafted_tensors())
    assert exported["model.embed_tokens.weight"].shape[0] == sizes[1]
