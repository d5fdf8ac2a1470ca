"""Every adapter that peft merges, against the equation in float64 with peft's own merge.

What is measured is the table of docs/reference/support-matrix.md, which ``SHADOWLIT_WRITE_DOCS=1 pytest -m ""`` of this
file writes.
"""

import copy
import os
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.delta.folders import graft as write_graft
from shadowlit.errors import GraftError
from shadowlit.grafting.adapter import dependence, require_graftable, stored_values, type_of
from shadowlit.grafting.export import export_adapter, export_folder
from shadowlit.grafting.subject import Subject
from shadowlit.pair.pair import ModelPair
from tests.distributed import run_ranks
from tests.grafting.test_live import IDS, effective_weights, grafted, load, logits, open_graft, train_a_bit
from tests.rounding import require_same_logits
from tests.tiny import save_pair

LAYERS = {"target_modules": ["q_proj", "up_proj", "down_proj"]}
TOKENS = IDS[0, :3].tolist()
ADAPTERS = {
    "LoRA": LoraConfig(r=4, **LAYERS),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, **LAYERS),
    "LoRA, `bias: all`": LoraConfig(r=4, bias="all", **LAYERS),
    "LoRA, `lora_bias`": LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "LoRA, `modules_to_save`": LoraConfig(r=4, modules_to_save=["lm_head", "norm"], **LAYERS),
    "LoRA, `trainable_token_indices`": LoraConfig(r=4, trainable_token_indices=TOKENS, **LAYERS),
    "DoRA": LoraConfig(r=4, use_dora=True, **LAYERS),
    "PiSSA": LoraConfig(r=4, init_lora_weights="pissa", **LAYERS),
    "OLoRA": LoraConfig(r=4, init_lora_weights="olora", **LAYERS),
    "MiCA": LoraConfig(r=4, init_lora_weights="mica", **LAYERS),
    "LoRA, orthogonal start": LoraConfig(r=4, init_lora_weights="orthogonal", **LAYERS),
    "LoHa": peft.LoHaConfig(r=4, **LAYERS),
    "LoKr": peft.LoKrConfig(r=2, decompose_both=True, **LAYERS),
    "VeRA": peft.VeraConfig(r=4, d_initial=1.0, target_modules=["q_proj", "o_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=30, **LAYERS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8, **LAYERS),
    "BOFT": peft.BOFTConfig(boft_block_size=8, **LAYERS),
    "HRA": peft.HRAConfig(r=4, **LAYERS),
    "IA³": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "C3A": peft.C3AConfig(block_size=8, **LAYERS),
    "GraLoRA": peft.GraloraConfig(r=4, gralora_k=2, **LAYERS),
    "RandLoRA": peft.RandLoraConfig(r=4, **LAYERS),
    "WaveFT": peft.WaveFTConfig(n_frequency=30, **LAYERS),
    "SHiRA": peft.ShiraConfig(r=2, **LAYERS),
    "BEFT": peft.BeftConfig(target_modules=["q_proj", "v_proj"]),
    "DeLoRA": peft.DeloraConfig(r=4, **LAYERS),
    "HiRA": peft.HiraConfig(r=4, **LAYERS),
    "MiSS": peft.MissConfig(r=4, **LAYERS),
    "RoAd": peft.RoadConfig(group_size=8, **LAYERS),
    "GLoRA": peft.GloraConfig(r=4, **LAYERS),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, **LAYERS),
    "LayerNorm tuning": peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
}
# Of the largest element of a tensor: float32 products of up to 64 terms, each with a relative error of u √64, at most
# four of them in a row (HRA's reflections), and the subtraction and the addition of the graft.
EXACT = (4 * 8 + 2) * 2**-24


NOT_ON_DISK = dict.fromkeys(("PiSSA", "OLoRA", "MiCA"), "whose file lacks the residual")
# Steps by which the logits change enough; of the others 0.1.
STEP = {"HiRA": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen2", tied=False)


def adapter_of(kind):
    warnings.simplefilter("ignore")
    adapter = copy.deepcopy(ADAPTERS[kind])
    require_graftable(adapter)
    return adapter


def truth(folders, merged):
    """An Instruct in float64 with the update of merged weights, and its own logits."""
    base, instruct = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in folders)
    before, start = instruct(IDS).logits.detach(), dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in instruct.named_parameters():
            parameter.add_(merged[name] - start[name])
    return instruct, before


def error(found, expected):
    """The largest error of any tensor in ``found``, relative to the tensor's largest element."""
    errors = {n: (found[n].double() - p).abs().max() / p.abs().max() for n, p in expected.named_parameters()}
    return max(errors.values()).item()


MATRIX = Path(__file__).parents[2] / "docs/reference/support-matrix.md"
COLUMNS = ("live", "on disk", "FSDP2, two ranks", "exported model", "exported adapter")
TABLE = {}  # by kind, what the tests of this run have found for each column


def note(kind, column, found):
    TABLE.setdefault(kind, {})[column] = found if isinstance(found, str) else f"{found * 2**24:.1f} u"


def trained(kind, folders, **options):
    model = load(folders[0], adapter_of(kind), **options)
    train_a_bit(model, size=STEP.get(kind, 0.1))
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_graft_is_peft_s_merge_of_the_base_less_the_base(tmp_path, folders, kind):
    assert open_graft(load(folders[0], adapter_of(kind)), folders, select="all").on_base
    model = trained(kind, folders)
    graft = open_graft(model, folders, select="all")
    before, tuned = {name: p.detach().clone() for name, p in model.named_parameters()}, logits(model)
    expected, untouched = truth(folders, effective_weights(model))
    exported = dict(graft.grafted_tensors())
    note(kind, "live", apart := error(exported, expected))
    assert apart < EXACT
    wanted = expected(IDS).logits
    with graft.applied(grafted(1.0)):
        require_same_logits(logits(model), wanted, wanted - untouched)
        assert all(torch.equal(host.parameter, exported[host.name]) for host in graft._hosts)
    export_folder(tmp_path / "model", folders[1], graft.grafted_tensors())
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert all(torch.equal(p, exported[name]) for name, p in served.named_parameters()), "not as validated"
    note(kind, "exported model", error(dict(served.named_parameters()), expected))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), tuned)
    changed = {n for n, p in expected.named_parameters() if not torch.equal(p.float(), graft._by_name[n].instruct)}
    only_biases = kind == "BEFT"  # whose weights count as adapted
    assert changed == {h.name for h in graft._hosts if h.trained and not (only_biases and h.name.endswith("weight"))}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_s_folder_holds_the_update(tmp_path, folders, kind):
    model = trained(kind, folders)
    expected, _ = truth(folders, effective_weights(model))
    model.peft_config["default"].task_type = "CAUSAL_LM"  # as most adapters have it
    model.save_pretrained(tmp_path / "adapter")
    if kind in NOT_ON_DISK:
        note(kind, "on disk", "refused: its file lacks the residual")
        with pytest.raises(GraftError, match=NOT_ON_DISK[kind]):
            write_graft(folders[0], tmp_path / "adapter", folders[1], tmp_path / "out", select="all")
        return
    write_graft(folders[0], tmp_path / "adapter", folders[1], tmp_path / "out", select="all")
    found = CheckpointReader(tmp_path / "out")
    note(kind, "on disk", apart := error({name: found.read(name) for name in found.tensors}, expected))
    assert apart < EXACT


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_exported_adapter_is_the_graft(tmp_path, folders, kind):
    model = trained(kind, folders)
    graft, config = open_graft(model, folders, select="all"), model.peft_config["default"]
    if settings := dependence(config) or stored_values(config):
        names = re.sub(r"=\[.*?\]", "", settings).replace(" and ", "`, `")
        note(kind, "exported adapter", f"not written: `{names}`")
        return
    scale = 1.0 if graft._layers and next(iter(graft._layers.values())).scaling is None else 0.5
    assert graft.serves_adapter(scale)
    state = get_peft_model_state_dict(model, state_dict=graft.adapter_tensors(scale))
    export_adapter(tmp_path / "adapter", ModelPair(*map(str, folders)), config, state)
    served, expected = (AutoModelForCausalLM.from_pretrained(folders[1]) for _ in range(2))
    untouched = expected.double()(IDS).logits
    served = PeftModel.from_pretrained(served, tmp_path / "adapter")
    expected.load_state_dict(dict(graft.grafted_tensors(scale)), strict=False)
    found = {name: p.detach().float() for name, p in served.merge_and_unload().named_parameters()}
    note(kind, "exported adapter", apart := error(found, expected.double()))
    assert apart < EXACT
    with graft.applied(Subject("adapter", scale)):
        wanted = expected(IDS).logits
        require_same_logits(logits(model), wanted, wanted - untouched)


def sharded(folders, kinds):
    """For each kind what one of two ranks under FSDP2 grafts, and the logits before and within the graft."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for kind in kinds:
        try:
            model = trained(kind, folders, mesh=mesh)
        except GraftError as refused:
            found[kind] = str(refused)
            continue
        model(input_ids=IDS).logits.sum().backward()
        tuned, graft = logits(model), open_graft(model, folders, select="all")
        with graft.applied(grafted(1.0)):
            inside = logits(model)
        found[kind] = dict(graft.grafted_tensors()), tuned, inside
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["DoRA", "PiSSA", "LoHa", "VeRA", "OFT"], list(ADAPTERS)])
def test_shards_hold_the_graft_of_the_whole(folders, kinds):
    ranks = run_ranks(sharded, 2, folders, kinds)
    for kind in kinds:
        if isinstance(ranks[0][kind], str):
            assert kind == "VB-LoRA" and "share one bank of vectors" in ranks[0][kind]
            note(kind, "FSDP2, two ranks", "refused: shared among layers")
            continue
        model = trained(kind, folders)
        expected, untouched = truth(folders, effective_weights(model))
        wanted = expected(IDS).logits
        for exported, tuned, inside in (found[kind] for found in ranks):
            note(kind, "FSDP2, two ranks", apart := error(exported, expected))
            assert apart < EXACT, kind
            require_same_logits(inside, wanted, wanted - untouched)
            torch.testing.assert_close(tuned, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PEFT_TYPE_TO_CONFIG_MAPPING)
def test_every_type_of_peft_is_proven_or_refused(kind):
    proven = {type_of(adapter) for adapter in ADAPTERS.values()}
    config = LoraConfig()
    config.peft_type = kind
    if str(kind) in proven or getattr(kind, "value", kind) in proven:
        require_graftable(config)
    else:
        with pytest.raises(GraftError, match="not proven to merge"):
            require_graftable(config)


def test_the_table_of_the_documentation_is_what_was_measured():
    start, end = "<!-- measured by tests/grafting/test_adapters.py -->\n", "<!-- measured -->\n"
    before, rest = MATRIX.read_text(encoding="utf-8").split(start)
    written, after = rest.split(end)
    if os.environ.get("SHADOWLIT_WRITE_DOCS"):
        rows = [["adapter", *COLUMNS], ["---"] * 6, *([kind, *(TABLE[kind][c] for c in COLUMNS)] for kind in ADAPTERS)]
        written = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        MATRIX.write_text(f"{before}{start}{written}{end}{after}", encoding="utf-8")
    table = {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in map(cells, written.splitlines()[2:])}
    assert table.keys() == ADAPTERS.keys()
    digits = re.compile(r"(≤ )?[\d.]+ u")  # of other machines, or the bound
    for kind, found in TABLE.items():
        for column, value in found.items():
            written = table[kind][column]
            assert digits.sub("u", written) in (digits.sub("u", value), "not measured"), (kind, column)


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]
