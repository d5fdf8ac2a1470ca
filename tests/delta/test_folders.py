"""Model folders as they lie on disks: against the equation in float64, rounded once to the stored dtype."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.analysis.deltas import open_delta, open_model
from shadowlit.analysis.similarity import similarity
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.delta.delta import Delta
from shadowlit.delta.folders import graft
from shadowlit.errors import CheckpointError, GraftError, PairError
from shadowlit.grafting.export import export_folder
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.manifest import read_manifest
from shadowlit.pair.buffers import computed_buffers
from shadowlit.pair.check import check_pair
from shadowlit.pair.pair import ModelPair
from shadowlit.training.loading import load_for_training
from tests.tiny import save_model, save_pair

WIDTH, ROWS = 8, 40
SIDES = ("base", "tuned", "instruct")


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.1


def internlm2(layers: int = 2) -> dict[str, torch.Tensor]:
    found = {"model.tok_embeddings.weight": weight(ROWS, WIDTH), "model.norm.weight": weight(WIDTH)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.attention.wqkv.weight": weight(16, WIDTH), f"{at}.attention.wo.weight": weight(WIDTH, WIDTH)}
        found |= {
            f"{at}.feed_forward.w{k}.weight": weight(*((WIDTH, 16) if k == 2 else (16, WIDTH))) for k in (1, 2, 3)
        }
        found |= {f"{at}.attention_norm.weight": weight(WIDTH), f"{at}.ffn_norm.weight": weight(WIDTH)}
    return found | {"output.weight": weight(ROWS, WIDTH)}


def megatron(at: str, attention: str, biases: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A layer of ChatGLM or GPT-NeoX."""
    shapes = {f"{attention}.query_key_value": (24, WIDTH), f"{attention}.dense": (WIDTH, WIDTH)}
    shapes |= {"mlp.dense_h_to_4h": (16, WIDTH), "mlp.dense_4h_to_h": (WIDTH, 16)}
    found = {f"{at}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
    found |= {f"{at}.{name}.bias": weight(shape[0]) for name, shape in shapes.items() if name.endswith(biases)}
    return found | {f"{at}.{name}.weight": weight(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}


def chatglm() -> dict[str, torch.Tensor]:
    found = {"transformer.embedding.word_embeddings.weight": weight(ROWS, WIDTH)}
    for i in range(2):
        found |= megatron(f"transformer.encoder.layers.{i}", "self_attention", ("query_key_value",))
    found["transformer.encoder.final_layernorm.weight"] = weight(WIDTH)
    return found | {"transformer.output_layer.weight": weight(ROWS, WIDTH)}


def gpt_neox() -> dict[str, torch.Tensor]:
    found = {"gpt_neox.embed_in.weight": weight(ROWS, WIDTH)}
    for i in range(2):
        found |= megatron(f"gpt_neox.layers.{i}", "attention", ("query_key_value", "dense", "h_to_4h", "4h_to_h"))
    found["gpt_neox.final_layer_norm.weight"] = weight(WIDTH)
    return found | {"embed_out.weight": weight(ROWS, WIDTH)}


# By architecture its tensors, its config, and what is left out by 'linear'; the code of two is not in transformers.
FOLDERS = {
    "internlm2": (internlm2, {"auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}}),
    "chatglm": (chatglm, {"auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMModel"}}),
    "gpt_neox": (gpt_neox, {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}),
}
BUFFERS = {
    "internlm2": ("model.layers.0.attention.rotary_emb.inv_freq",),
    "chatglm": ("transformer.rotary_pos_emb.inv_freq",),
    "gpt_neox": tuple(f"gpt_neox.layers.0.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")),
}


def buffers(arch: str, value: float) -> dict[str, torch.Tensor]:
    """Frequencies, and GPT-NeoX's masks, as float16 files hold them: -1e9 has become an infinity."""
    found = {name: torch.full((4,), value) for name in BUFFERS[arch]}
    if arch == "gpt_neox":
        found[BUFFERS[arch][0]] = torch.ones(1, 1, 8, 8).tril().bool()
        found[BUFFERS[arch][1]] = torch.tensor(-1e9).half()
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Replace or add tensors of a folder of one file; None removes one."""
    found = load_file(folder / "model.safetensors") | tensors
    return write(folder, {name: tensor for name, tensor in found.items() if tensor is not None})


def read(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def equation(root: Path, name: str, scale: float = 1.0, of: str | None = None) -> torch.Tensor:
    """``instruct + scale * (tuned - base)`` in float64, rounded once; the update is that of the tensor ``of``."""
    base, tuned, instruct = (read(root / side) for side in SIDES)
    exact = instruct[name].double() + scale * (tuned[of or name].double() - base[of or name].double())
    return exact.to(instruct[name].dtype)


def write_three(root: Path, arch: str, dtype: torch.dtype, change=lambda side, found: found) -> Path:
    tensors, config = FOLDERS[arch]
    torch.manual_seed(3)
    base = tensors()
    for distance, side in zip((0.0, 0.02, 0.1), SIDES, strict=True):
        found = {name: t + distance * torch.randn(t.shape) for name, t in base.items()}
        write(root / side, change(side, found), dtype, model_type=arch, vocab_size=ROWS, **config)
    return root


def three(root: Path, **options):
    return graft(root / "base", root / "tuned", root / "instruct", root / "out", **options)


@pytest.fixture
def folders(tmp_path):
    """Base, tuned and Instruct like InternLM2."""
    return write_three(tmp_path, "internlm2", torch.bfloat16)


@pytest.mark.parametrize("select", ["linear", "all"])
@pytest.mark.parametrize("arch", FOLDERS)
def test_architectures_bit_for_bit(tmp_path, arch, select):
    """With buffers that two sides store, of other values: they stay the Instruct's, whatever is selected."""
    stored = {"base": buffers(arch, 1.0), "tuned": buffers(arch, 2.0), "instruct": buffers(arch, 3.0)}
    if arch != "gpt_neox":  # and one that the tuned model lacks
        stored["tuned"] = {}
    write_three(tmp_path, arch, torch.bfloat16)
    for side in SIDES:
        rewrite(tmp_path / side, **stored[side])
    done = three(tmp_path, select=select)
    got, goal = read(tmp_path / "out"), read(tmp_path / "instruct")
    linear = {n for n in goal if ".layers." in n and "norm" not in n} - set(BUFFERS[arch])
    assert done.selected == (linear if select == "linear" else goal.keys() - set(BUFFERS[arch]))
    for name in goal:
        wanted = equation(tmp_path, name) if name in done.selected else goal[name]
        assert torch.equal(got[name], wanted) and got[name].dtype == goal[name].dtype, name
    assert not set(BUFFERS[arch]) & {*done.coverage.left_out, *done.planned.left_out}
    if select == "all":
        assert not done.shares
    else:  # ‖part‖ / ‖update‖ of each tensor that is left out
        base, tuned = read(tmp_path / "base"), read(tmp_path / "tuned")
        norms = {n: float((tuned[n].double() - base[n].double()).norm()) for n in goal if n not in BUFFERS[arch]}
        whole = sum(norm**2 for norm in norms.values()) ** 0.5
        assert done.shares == pytest.approx({n: norms[n] / whole for n in norms if n not in linear}, rel=1e-6)
        assert read_manifest(tmp_path / "out")["survival"]["left_out"] == done.shares


def test_buffers_come_from_the_architecture(tmp_path):
    """What a model persists is not a buffer, and a name that says nothing is one if the model has it unpersisted."""
    stored = {**buffers("gpt_neox", 1.0), "gpt_neox.rotary_emb.original_inv_freq": torch.ones(4)}
    neox = write_three(tmp_path / "neox", "gpt_neox", torch.float32) / "base"
    reader = CheckpointReader(rewrite(neox, **stored, **{"gpt_neox.layers.0.attention.learned": torch.ones(4, 4)}))
    assert computed_buffers(neox, reader.tensors) == stored.keys()


def test_nan_in_base_or_instruct_is_not_a_diverged_run(folders):
    stored = {side: read(folders / side) for side in SIDES}
    paths = [folders / side for side in SIDES]
    matrix = "model.layers.0.feed_forward.w2.weight"
    for name, side in itertools.product((matrix, EMBEDDING), ("base", "instruct")):
        bad = stored[side][name].clone()
        bad.view(-1)[3] = float("nan")
        rewrite(folders / side, **{name: bad})
        told = re.escape(f"'{name}' has 1 of {bad.numel()} values that are NaN or infinite in the ")
        told += f"(Base|Instruct) {re.escape(str(folders / side))}.*(download or save this model again)"
        for dtype, transforms in ((None, ()), ("float32", ()), (None, [{"name": "svd", "rank": 2}])):
            with pytest.raises(CheckpointError, match=told):
                graft(*paths, folders / "no", select=[f"^{re.escape(name)}$", "w1"], dtype=dtype, transforms=transforms)
        if side == "base":
            with pytest.raises(CheckpointError, match=told):
                Delta.make(*paths[:2]).save(folders / "no")
        rewrite(folders / side, **{name: stored[side][name]})


def test_an_export_keeps_buffers_with_infinities(tmp_path):
    """As the graft on disk does, whichever dtype it is written in; infinite weights are still refused."""
    write_three(tmp_path, "gpt_neox", torch.bfloat16)
    stored = read(rewrite(tmp_path / "instruct", **buffers("gpt_neox", 1.0)))
    mask = "gpt_neox.layers.0.attention.masked_bias"
    for dtype in (None, torch.float16):
        given = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in stored.items()}
        export_folder(tmp_path / str(dtype), tmp_path / "instruct", given.items(), dtype)
        got = read(tmp_path / str(dtype))
        assert torch.isinf(got[mask]) and all(torch.equal(got[name], tensor) for name, tensor in given.items())
    stored["embed_out.weight"][0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"'embed_out\.weight' has 1 of 320 values that are NaN or infinite"):
        export_folder(tmp_path / "broken", tmp_path / "instruct", stored.items())


def test_gpt_neox_in_training_is_on_disk(tmp_path):
    """Whose head transformers 5 calls lm_head, and whose files have masks and frequencies in their layers."""
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for side in SIDES:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / side)
        rewrite(tmp_path / side, **buffers("gpt_neox", float(len(side))))
    base, instruct = (CheckpointReader(tmp_path / side) for side in ("base", "instruct"))
    options = {"adapter": None, "device": torch.device("cpu"), "mesh": None, "parallelize": lambda model: None}
    live = LiveGraft(load_for_training(base, config, **options), base, instruct, select="all")
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    live.model.load_state_dict(ended.state_dict())
    done = three(tmp_path, select="all")
    trained, got = dict(live.grafted_tensors()), read(tmp_path / "out")
    assert trained.keys() == got.keys() and "embed_out.weight" in done.selected
    assert all(torch.equal(got[name], tensor) for name, tensor in trained.items())
    assert not torch.equal(got["embed_out.weight"], read(tmp_path / "instruct")["embed_out.weight"])


def test_buffers_are_ignored_in_every_room(tmp_path):
    """The pair check, the similarity and the delta as the graft: a model of Llama's kind whose Base stores them."""
    base, instruct = save_pair(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = [similarity(base, instruct).similarities[0].sigma, check_pair(ModelPair(str(base), str(instruct)))]
    shutil.copytree(instruct, tmp_path / "tuned")
    rewrite(base, **{name: torch.full((4,), 5.0)})
    rewrite(tmp_path / "tuned", **{name: torch.full((4,), 7.0)})
    assert [similarity(base, instruct).similarities[0].sigma, check_pair(ModelPair(str(base), str(instruct)))] == before
    assert not any(similarity(base, instruct).left_out.values())
    assert similarity(base, tmp_path / "tuned").similarities[0].sigma == before[0]
    assert name not in Delta.make(base, tmp_path / "tuned").shapes
    assert name not in Delta.make(base, instruct).shapes
    assert name not in open_delta(tmp_path / "tuned", base).shapes and name not in open_model(base).tensors


def test_buffers_of_an_earlier_version(tmp_path):
    """GPT-2's files may hold a ``masked_bias`` of -1e4, which no version of its class loads any more."""
    save_model(tmp_path / "base", "gpt2", tied=True)
    name = "transformer.h.0.attn.masked_bias"
    rewrite(tmp_path / "base", **{name: torch.tensor(-1e4)})
    assert name not in open_model(tmp_path / "base").tensors


def test_one_language_model_has_one_type(folders, capsys):
    """Older configs of Qwen2.5-VL hold the language model's settings without a section of its own."""
    kind = {"model_type": "qwen2_5_vl"}
    for side in SIDES:
        write(folders / side, read(folders / side), **kind)
    write(folders / "tuned", read(folders / "tuned"), **kind, text_config={"model_type": "qwen2_5_vl_text"})
    three(folders)
    write(folders / "tuned", read(folders / "tuned"), model_type="llama")
    assert main(["graft", *(str(folders / side) for side in SIDES), str(folders / "no")]) == 1
    told = capsys.readouterr().err
    assert "pair.base" not in told and "give the Base that belongs to the tuned model" in told


def test_values_that_are_not_finite_spoil_no_other_share(folders, capsys):
    broken = read(folders / "tuned")[EMBEDDING]
    broken[1, 2] = math.nan
    rewrite(folders / "tuned", **{EMBEDDING: broken})
    args = [str(folders / side) for side in SIDES[:2]]
    assert main(["graft", *args, str(folders / "instruct"), str(folders / "out")]) == 0
    told = capsys.readouterr().out.replace("\n", " ")
    base, tuned = read(folders / "base"), read(folders / "tuned")
    norms = {name: float((tuned[name].double() - base[name].double()).norm()) for name in base}
    whole = math.hypot(*filter(math.isfinite, norms.values()))
    for text in ("tok_embeddings holds NaN or infinities", f"output {norms[HEAD] / whole:.1%}"):
        assert text in told
    assert main(["delta", "make", *args, str(folders / "delta"), "--select=linear"]) == 0
    assert "tok_embeddings holds NaN or infinities" in capsys.readouterr().out.replace("\n", " ")


def test_another_model_or_number_of_layers_is_refused(folders, capsys):
    config = {"model_type": "chatglm"}
    (folders / "other").mkdir()
    write(folders / "other", read(folders / "instruct"), **config)
    with pytest.raises(PairError, match="model_type is 'internlm2' in the Base, 'chatglm' in the Instruct"):
        graft(folders / "base", folders / "tuned", folders / "other", folders / "out")
    with pytest.raises(PairError, match="model_type is 'internlm2' in the Base, 'chatglm' in the tuned model"):
        graft(folders / "base", folders / "other", folders / "instruct", folders / "out")
    with pytest.raises(PairError, match="model_type is 'internlm2' in the Base, 'chatglm' in the tuned model"):
        Delta.make(folders / "base", folders / "other")
    with pytest.raises(PairError, match="model_type"):
        similarity(folders / "base", folders / "other")
    Delta.make(folders / "base", folders / "tuned").save(folders / "delta")
    apply = ["delta", "apply", str(folders / "delta")]
    assert main([*apply, str(folders / "other"), str(folders / "out")]) == 1
    assert "model_type is 'internlm2' in the delta, 'chatglm' in the Instruct" in capsys.readouterr().err
    one = write(folders / "one", internlm2(layers=1), model_type="internlm2")
    for base, tuned, instruct in (("base", "tuned", one), (one, one, folders / "instruct")):
        with pytest.raises(GraftError, match=r"different numbers of layers \(layers: \d and \d\)"):
            graft(folders / base, folders / tuned, instruct, folders / "out")
    assert main([*apply, str(one), str(folders / "out")]) == 1
    assert "the delta and the Instruct" in (told := capsys.readouterr().err) and "(layers: 2 and 1)" in told
    with pytest.raises(PairError, match="numbers of layers"):
        similarity(folders / "base", one)
    assert not (folders / "out").exists()


EMBEDDING, HEAD = "model.tok_embeddings.weight", "output.weight"


def untie(side: str, tied: set[str]):
    return {HEAD: None} if side in tied else {}


@pytest.mark.parametrize("repeated", [False, True])
def test_a_tied_pair_onto_a_head_of_its_own(folders, repeated):
    """Base and tuned have one tensor for both, so its update is the head's too; also by way of a stored delta."""
    for side in ("base", "tuned"):
        rewrite(folders / side, **{HEAD: read(folders / side)[EMBEDDING] if repeated else None})
    done = three(folders, select="all")
    got = read(folders / "out")
    for name in got:
        of = EMBEDDING if name == HEAD else None
        assert torch.equal(got[name], equation(folders, name, of=of)), name
    assert not done.coverage.left_out
    assert main(["delta", "make", *(str(folders / n) for n in ("base", "tuned", "delta")), "--dtype=float32"]) == 0
    words = [str(folders / n) for n in ("delta", "instruct", "applied")]
    assert main(["delta", "apply", *words, "--select=all"]) == 0
    assert all(torch.equal(tensor, got[name]) for name, tensor in read(folders / "applied").items())


def test_heads_of_their_own_onto_a_tied_instruct(folders, capsys):
    """One tensor can't hold two updates: left out with its share, or refused; a head that did not change is no harm."""
    rewrite(folders / "instruct", **{HEAD: None})
    done = three(folders)
    base, tuned = read(folders / "base"), read(folders / "tuned")
    norms = {name: float((tuned[name].double() - base[name].double()).norm()) for name in base}
    assert done.shares[HEAD] == pytest.approx(norms[HEAD] / sum(n**2 for n in norms.values()) ** 0.5, rel=1e-6)
    for select in ("all", [EMBEDDING, "linear"]):
        with pytest.raises(GraftError, match=r"is tied: its embedding .* is also its output head"):
            graft(folders / "base", folders / "tuned", folders / "instruct", folders / "no", select=select)
    for side in SIDES:  # a head under an unknown name
        rewrite(folders / side, **{"model.projection.weight": torch.ones(ROWS, WIDTH).bfloat16()})
    write(folders / "instruct", read(folders / "instruct"), model_type="internlm2", tie_word_embeddings=False)
    graft(*(folders / side for side in SIDES), folders / "other", select=[EMBEDDING])
    assert torch.equal(read(folders / "other")[EMBEDDING], equation(folders, EMBEDDING))
    write(folders / "instruct", read(folders / "instruct"), model_type="internlm2")
    rewrite(folders / "tuned", **{HEAD: base[HEAD], EMBEDDING: base[EMBEDDING]})
    shutil.rmtree(folders / "out")
    assert not three(folders, select="all").shares
    assert torch.equal(read(folders / "out")[EMBEDDING], read(folders / "instruct")[EMBEDDING])


def test_the_head_of_an_untied_tuned_model_starts_from_the_embedding(folders):
    """A head saved apart, which a tied Base has in its embedding: head + (tuned's head - Base's embedding)."""
    rewrite(folders / "base", **{HEAD: None})
    three(folders, select="all")
    base, tuned, instruct = (read(folders / side) for side in SIDES)
    wanted = (instruct[HEAD].double() + (tuned[HEAD].double() - base[EMBEDDING].double())).bfloat16()
    assert torch.equal(read(folders / "out")[HEAD], wanted)


def test_a_matrix_that_the_instruct_lacks_is_named(folders, capsys):
    name = "model.layers.1.feed_forward.w2.weight"
    rewrite(folders / "instruct", **{name: None})
    args = [str(folders / n) for n in (*SIDES, "out")]
    assert main(["graft", *args]) == 0
    told = capsys.readouterr().out
    assert "trained but left out" in told and "w2" in told
    shares = read_manifest(folders / "out")["survival"]["left_out"]
    assert main(["delta", "make", *args[:2], str(folders / "delta"), "--select=linear"]) == 0
    described = capsys.readouterr().out.replace("\n", " ")
    assert "left out of the update's norm: " in described and f"tok_embeddings {shares[EMBEDDING]:.1%}" in described
    assert 0 < shares[name] < 1 and f"w2 {shares[name]:.1%}" in told
    rewrite(folders / "tuned", **{name: None, "model.layers.0.feed_forward.w2.weight": None})
    lacking = r"is incomplete, or was not tuned from .*only in the Base: model\.layers\.0\.feed_forward\.w2.*Finish its"
    with pytest.raises(GraftError, match=lacking):
        graft(*args[:3], folders / "no")


def test_what_is_left_out_stops_nothing(folders):
    """Added rows, a tensor that only the tuned model has, and buffers of other dtypes outside the selection."""
    more = torch.cat([read(folders / "tuned")[EMBEDDING], torch.ones(4, WIDTH).bfloat16()])
    rewrite(folders / "tuned", **{EMBEDDING: more, "value_head.weight": torch.ones(1, WIDTH)})
    for side in SIDES:
        rewrite(folders / side, **{"model.step": torch.tensor([1 + len(side)]), "model.mask": torch.ones(2, 2).bool()})
    rewrite(folders / "tuned", **{"model.layers.0.step": torch.tensor([1])})
    done = three(folders)
    goal = read(folders / "instruct")
    for name, tensor in read(folders / "out").items():
        assert torch.equal(tensor, equation(folders, name) if name in done.selected else goal[name])
    assert f"{EMBEDDING} ((40, 8) and (44, 8))" in done.coverage.without
    assert "value_head.weight (only in the tuned one)" in str(done.coverage)
    assert "model.layers.0.step (only in the tuned one)" in str(done.coverage)
    rewrite(folders / "tuned", **{"model.layers.0.step": None})
    assert "model.step" in done.coverage.left_out and "model.step" not in done.shares
    with pytest.raises(GraftError, match=r"tuned model has 44 rows of model\.tok_embeddings\.weight, the Base 40"):
        graft(*(folders / side for side in SIDES), folders / "no", select="all")
    with pytest.raises(GraftError, match=r"has 44 rows of .*, the Base 40: .*resized.*'linear' grafts everything else"):
        Delta.make(folders / "base", folders / "tuned")
    rewrite(folders / "tuned", **{EMBEDDING: more[:40]})
    with pytest.raises(
        GraftError, match=r"differ outside .*: only in the tuned one: value_head\.weight.*leave the rest"
    ):
        Delta.make(folders / "base", folders / "tuned")
    rewrite(folders / "tuned", **{"value_head.weight": None})
    assert {"model.step", "model.mask"} <= (read(folders / "out").keys() - graft(
        *(folders / side for side in SIDES), folders / "all", select="all").selected)  # fmt: skip
    assert {"model.step", "model.mask"}.isdisjoint(Delta.make(folders / "base", folders / "tuned").shapes)


def test_a_matrix_of_indices_is_a_buffer_and_a_packed_one_is_not(folders):
    index, matrix = "model.layers.0.attention.relative_position_index", "model.layers.0.feed_forward.w2.codes"
    for number, side in enumerate(SIDES):
        rewrite(folders / side, **{index: torch.full((3, 3), number, dtype=torch.int32)})
    for select in ("linear", "all"):
        done = graft(*(folders / side for side in SIDES), folders / select, select=select)
        assert index not in done.selected and index in done.coverage.left_out
        assert torch.equal(read(folders / select)[index], read(folders / "instruct")[index])
        assert index not in Delta.make(folders / "base", folders / "tuned", select).shapes
    for side in SIDES:
        rewrite(folders / side, **{matrix: torch.ones(3, 3, dtype=torch.int32)})
    for attempt in (lambda: three(folders), lambda: Delta.make(folders / "base", folders / "tuned")):
        with pytest.raises(GraftError, match=r"w2\.codes \(I32\), expected .*Dequantise the model first"):
            attempt()


def adapter(base: Path, folder: Path, rows: int | None = None, seed: int = 7, **options) -> Path:
    """An adapter of random factors, of a Base whose vocabulary may have been resized before."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


ONE_SIDE = (
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
)


@pytest.mark.parametrize("options", ONE_SIDE)
def test_adapters_of_one_side_of_a_tied_pair(tmp_path, options):
    """Refused where embedding and head are selected, for one tensor would hold both; left out by 'linear'.

    Onto an Instruct with a head of its own each side gets its own update, which is zero for the other.
    """
    base, instruct = save_pair(tmp_path, "llama", tied=True)
    tuned = adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(GraftError, match=r"is tied: its embedding .* is also its output head"):
        graft(base, tuned, instruct, tmp_path / "out", select="all")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned)
    with pytest.raises(GraftError, match=r"are one tensor \(tie_word_embeddings\)"):
        LiveGraft(model, CheckpointReader(base), CheckpointReader(instruct))
    done = graft(base, tuned, instruct, tmp_path / "linear")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    side, other = (embedding, head) if "embed_tokens" in str(options) else (head, embedding)
    assert done.coverage.left_out == (side,) and 0 < done.shares[side] < 1
    start = read(base)[embedding]
    stored = load_file(tuned / "adapter_model.safetensors")
    rewrite(instruct, **{head: read(instruct)[embedding] * 0.5})
    graft(base, tuned, instruct, tmp_path / "untied", select="all")
    got, goal = read(tmp_path / "untied"), read(instruct)
    assert torch.equal(got[other], goal[other])
    whole = f"base_model.model.{side}"
    if "modules_to_save" in options:
        update = stored[whole].double() - start.double()
    elif side == embedding:
        down, up = (stored[f"base_model.model.model.embed_tokens.lora_embedding_{x}"].double() for x in "AB")
        update = 4 * (up @ down).T  # lora_alpha / r
    else:
        down, up = (stored[f"base_model.model.lm_head.lora_{x}.weight"].double() for x in "AB")
        update = 4 * up @ down
    torch.testing.assert_close(got[side].double(), goal[side].double() + update, rtol=0, atol=1e-6)
    assert (got[side] - goal[side]).abs().max() > 0.05


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", ONE_SIDE[:3])
def test_adapters_that_are_to_keep_a_tie(tmp_path, options, tied):
    """With ensure_weight_tying, embedding and head of a tied Base have one update; peft ignores it for others."""
    base, instruct = save_pair(tmp_path, "llama", tied=tied)
    torch.manual_seed(0)
    config = LoraConfig(r=2, ensure_weight_tying=True, **{"target_modules": ["q_proj"], **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    ids = torch.arange(64)[None]
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    for _ in range(2):  # the first step leaves one of two factors at its start
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    start = read(base)
    with torch.no_grad():
        moved = {
            embedding: model.get_input_embeddings()(torch.arange(272)) - start[embedding],
            head: model.get_output_embeddings()(torch.eye(32)).T - start[embedding if tied else head],
        }
    delta = Delta.make(base, tmp_path / "adapter")
    delta.save(tmp_path / "delta", torch.float32)
    assert delta.tied == tied
    if tied:  # one tensor, so that nothing is left out of one
        done = graft(base, tmp_path / "adapter", instruct, tmp_path / "tied", select="all")
        assert not done.coverage.left_out and not done.shares
        torch.testing.assert_close(
            read(tmp_path / "tied")[embedding], read(instruct)[embedding] + moved[head], rtol=0, atol=1e-6
        )
        rewrite(instruct, **{head: read(instruct)[embedding] * 0.5})
    graft(base, tmp_path / "adapter", instruct, tmp_path / "out", select="all")
    assert main(["delta", "apply", *(str(tmp_path / n) for n in ("delta", "instruct", "applied")), "--select=all"]) == 0
    goal = read(instruct)
    for got in (read(tmp_path / "out"), read(tmp_path / "applied")):
        for name, update in moved.items():
            torch.testing.assert_close(got[name], goal[name] + update, rtol=0, atol=1e-6)
    assert max(float(update.abs().max()) for update in moved.values()) > 1e-3


def test_a_sum_of_deltas_keeps_what_they_say_of_their_model(tmp_path, capsys):
    """Of adapters of a tied embedding: the head stays. Of other models or ties: refused."""
    base, instruct = save_pair(tmp_path, "llama", tied=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(instruct, **{head: read(instruct)[embedding] * 0.5})
    for number in (1, 2):
        adapter(base, tmp_path / f"a{number}", seed=number, target_modules=["q_proj", "embed_tokens"])
        Delta.make(base, tmp_path / f"a{number}").save(tmp_path / f"d{number}")
    both = f"[{tmp_path / 'd1'},{tmp_path / 'd2'}]"
    for method in ("add", "ties"):
        assert main(["delta", "sum", "--deltas", both, "--out", str(tmp_path / method), "--method", method]) == 0
        manifest, parts = read_manifest(tmp_path / method), read_manifest(tmp_path / "d1")
        assert [manifest[key] for key in ("model_type", "layers", "tied")] == ["llama", parts["layers"], False]
        words = [str(tmp_path / method), str(instruct), str(tmp_path / f"out-{method}"), "--select=all"]
        assert main(["delta", "apply", *words]) == 0
        assert torch.equal(read(tmp_path / f"out-{method}")[head], read(instruct)[head])
    one, other = Delta.open(tmp_path / "d1"), Delta.open(tmp_path / "d2")
    other.manifest["model_type"] = "qwen2"
    with pytest.raises(GraftError, match="deltas differ in model_type: llama, qwen2"):
        one + other
    whole = Delta.of({embedding: torch.ones(272, 32)})
    with pytest.raises(GraftError, match="some change the embedding alone"):
        one + whole
    apart = Delta.of({embedding: torch.zeros(272, 32), head: torch.ones(272, 32)})
    total = whole + apart  # the head of the first is its embedding
    assert not total.tied and torch.equal(total.tensor(head), torch.full((272, 32), 2.0))
    assert not (one + one.only(["model.layers.0.self_attn.q_proj.weight"])).tied


def test_adapters_of_a_resized_vocabulary_have_one_remedy(tmp_path):
    base, instruct = save_pair(tmp_path, "llama", tied=False)
    tuned = adapter(base, tmp_path / "adapter", rows=276, modules_to_save=["embed_tokens", "lm_head"])
    for select in ("all", "embed_tokens"):
        with pytest.raises(GraftError, match=r"has 276 rows of .*, the Base 272: .* selection: 'linear' grafts every"):
            graft(base, tuned, instruct, tmp_path / "out", select=select)
    done = graft(base, tuned, instruct, tmp_path / "out", select="linear")
    assert {name.split(" ")[0] for name in done.coverage.without} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(done.selected) == 2 and done.survival > 0.9


def test_pickled_and_empty_adapters(tmp_path, capsys):
    base, instruct = save_pair(tmp_path, "llama", tied=False)
    tuned = adapter(base, tmp_path / "adapter")
    graft(base, tuned, instruct, tmp_path / "wanted")
    stored = load_file(tuned / "adapter_model.safetensors")
    (tuned / "adapter_model.safetensors").unlink()
    torch.save(stored, tuned / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(adapter_model\.bin\).*Or give --allow_pickle"):
        graft(base, tuned, instruct, tmp_path / "out")
    graft(base, tuned, instruct, tmp_path / "out", allow_pickle=True)
    assert main(["delta", "make", str(base), str(tuned), str(tmp_path / "delta"), "--allow_pickle=true"]) == 0
    wanted = read(tmp_path / "wanted")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read(tmp_path / "out").items())
    empty = {name: tensor.new_empty(0) for name, tensor in stored.items()}
    save_file(empty, tuned / "adapter_model.safetensors")
    with pytest.raises(GraftError, match=r"4 tensors without any elements .*DeepSpeed ZeRO-3.*zero_to_fp32\.py"):
        graft(base, tuned, instruct, tmp_path / "out")
    whole = {name: tensor.new_empty(0) for name, tensor in read(base).items()}
    with pytest.raises(GraftError, match=r"14 tensors without any elements .*DeepSpeed ZeRO-3"):
        graft(base, write(tmp_path / "tuned", whole), instruct, tmp_path / "out")


def test_runs_are_grafted_from_their_checkpoints(tmp_path):
    """A run's folder, its newest checkpoint, and a tied Base that was trained with a head of its own."""
    base, instruct = save_pair(tmp_path, "llama", tied=True)
    torch.manual_seed(0)
    tuned = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in read(base).items()}
    rewrite(instruct, **{"lm_head.weight": torch.randn(272, 32)})
    tuned["lm_head.weight"] = read(base)["model.embed_tokens.weight"] + 0.5
    home = tmp_path / "run"
    (home / "checkpoints").mkdir(parents=True)
    config = {"pair": {"base": str(base), "instruct": str(instruct)}, "model": {"adapter": None}}
    (home / "config.yaml").write_text(json.dumps(config))
    state = {f"model.{name}": tensor for name, tensor in tuned.items()}
    torch.save({"state_dict": state, "global_step": 3}, home / "checkpoints" / "step-3.ckpt")
    start, goal = read(base), read(instruct)
    start["lm_head.weight"] = start["model.embed_tokens.weight"]
    for number, source in enumerate((home, home / "checkpoints" / "step-3.ckpt")):
        graft(base, source, instruct, tmp_path / str(number), select="all")
        got = read(tmp_path / str(number))
        assert all(torch.equal(got[name], goal[name] + (tuned[name] - start[name])) for name in goal)
        assert read_manifest(tmp_path / str(number))["config"]["tuned"].endswith("step-3.ckpt")


def test_neither_a_graft_nor_a_run_of_another_base_is_a_tuned_one(tmp_path):
    base, instruct = save_pair(tmp_path, "llama", tied=True)
    tuned = {name: tensor + 0.1 for name, tensor in read(base).items()}
    state = {f"model.{name}": tensor for name, tensor in tuned.items()}
    callbacks = {"GraftCallback": {"fingerprints": ModelPair(str(base), str(instruct)).fingerprints()}}
    torch.save({"state_dict": state, "global_step": 3, "callbacks": callbacks}, tmp_path / "step-3.ckpt")
    graft(base, tmp_path / "step-3.ckpt", instruct, tmp_path / "out")
    with pytest.raises(GraftError, match=r"out is already a graft onto this Instruct .*Give the tuned Base"):
        graft(base, tmp_path / "out", instruct, tmp_path / "no")
    rewrite(base, **{"model.norm.weight": torch.zeros(32)})
    with pytest.raises(GraftError, match=r"was not trained from .*fingerprints differ.*config\.yaml"):
        graft(base, tmp_path / "step-3.ckpt", instruct, tmp_path / "no")


def test_a_folder_of_checkpoints_names_them(tmp_path):
    base, instruct = save_pair(tmp_path, "llama", tied=False)
    adapter(base, tmp_path / "output" / "checkpoint-20")
    for role in ("tuned", "instruct"):
        given = {"base": base, "tuned": base, "instruct": instruct, role: tmp_path / "output"}
        with pytest.raises(CheckpointError, match=r"models or adapters below it \(.*output/checkpoint-20\)\. Give the"):
            graft(**given, out=tmp_path / "out")
