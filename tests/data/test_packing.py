"""Packed samples: none sees another, none is lost, and what is trained is the sum that unpacked samples make."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.blocks import BlockBuilder
from shadowlit.data.collate import Collate, PackCollate
from shadowlit.data.conversation import Conversation
from shadowlit.data.dataset import TokenDataset
from shadowlit.data.module import ShadowData
from shadowlit.data.packing import PackedOrder, best_fit_decreasing, pack_samples
from shadowlit.data.sampler import FILLER, ShardedBatchSampler, count_slots, evaluation_order, grouped_order
from shadowlit.data.template import Encoded
from shadowlit.errors import DataError, ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.parallel import parallelize
from tests.data.templates import talk
from tests.distributed import run_ranks
from tests.tiny import CHATML, make_config, make_tokenizer, save_pair

PAIR = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML))

# -- which samples share a row ------------------------------------------------------------------------------------


def one_by_one(lengths, capacity):
    """Best fit as the books have it: the room left in each pack."""
    rooms = []
    for length in lengths:
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda i: rooms[i])] -= length
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_best_fit_is_that_of_the_books(data):
    capacity = data.draw(st.integers(1, 40))
    lengths = sorted(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)), reverse=True)
    packs = best_fit_decreasing(np.array(lengths), capacity)
    filled = np.bincount(packs, weights=lengths)
    assert sorted(capacity - filled) == one_by_one(lengths, capacity)


def test_best_fit_by_hand():
    """6 and 4 fill a pack, 5 and 3 nearly another, into which the 2 fits better than into a new one."""
    assert best_fit_decreasing(np.array([6, 5, 4, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]
    assert best_fit_decreasing(np.array([3, 3, 3, 3, 3, 1]), 7).tolist()[:5] == [0, 0, 1, 1, 2]
    assert best_fit_decreasing(np.array([], np.int64), 7).tolist() == []


LENGTHS = np.random.default_rng(0).integers(2, 17, 200)


def test_every_epoch_holds_every_sample_once_in_equally_many_packs():
    order = PackedOrder(LENGTHS, 20, seed=3)
    epochs = [list(order(epoch)) for epoch in range(4)]
    for epoch, packs in enumerate(epochs):
        assert len(packs) == len(order) < 1.05 * LENGTHS.sum() / 20 + 4
        assert sorted(i for pack in packs for i in pack) == list(range(200))
        sizes = [int(LENGTHS[list(pack)].sum()) for pack in packs]
        assert max(sizes) <= 20
        assert order.sizes(epoch).tolist() == sizes
        assert sorted(sizes) == sorted(order.sizes(0))
    assert [list(PackedOrder(LENGTHS, 20, seed=3)(epoch)) for epoch in range(4)] == epochs
    together = [frozenset(map(frozenset, packs)) for packs in epochs]
    assert len(set(together)) == 4  # other neighbours, not only another order
    assert list(PackedOrder(LENGTHS, 20, seed=4)(0)) != epochs[0]
    fixed = PackedOrder(LENGTHS, 20, shuffle=False)
    assert list(fixed(0)) == list(fixed(1))
    assert fixed(0)[0][0] == int(np.argmax(LENGTHS))  # the first of the longest begins the first pack


def test_two_ranks_take_the_packs_of_one():
    order = PackedOrder(LENGTHS, 20, seed=3)
    alone = list(ShardedBatchSampler(len(order), 4, order=order).batches(2))
    ranks = [list(ShardedBatchSampler(len(order), 2, 2, rank, order=order).batches(2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone)
    for whole, left, right in zip(alone, *ranks, strict=True):
        assert sorted(whole) == sorted(pack for pack in (*left, *right) if pack != FILLER)
        assert len(left) == len(right)
    sampler = ShardedBatchSampler(len(order), 4, order=order)
    assert list(sampler.batches(2, 5)) == alone[5:]


# -- the row that they make ---------------------------------------------------------------------------------------


def sample(tokens, num_prompt=1):
    return {"input_ids": tokens, "labels": [-100] * num_prompt + tokens[num_prompt:]}


def test_the_docstrings_example():
    assert pack_samples([sample([7, 8, 9]), {"input_ids": [5, 6], "labels": [5, 6]}]) == {
        "input_ids": [7, 8, 9, 5, 6],
        "labels": [-100, 8, 9, -100, 6],
        "position_ids": [0, 1, 2, 0, 1],
    }


def test_packed_rows_are_filled_up_without_a_mask():
    rows = [[sample([1, 2, 3]), sample([4, 5])], [sample([6, 7, 8])]]
    batch = PackCollate(9)(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 8, 9, 9]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]],
        "labels": [[-100, 2, 3, -100, 5], [-100, 7, 8, -100, -100]],
    }
    assert {str(value.dtype) for value in batch.values()} == {"torch.int64"}
    assert PackCollate(9, 4)(rows)["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_a_batch_without_padding_is_one_row():
    batch = PackCollate(9, 4, flatten=True)([sample([1, 2, 3]), sample([4, 5])])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5, 9, 9, 9]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2]],
        "labels": [[-100, 2, 3, -100, 5, -100, -100, -100]],
    }


def test_weights_in_batches_by_hand():
    """Where no sample has weights there is no column, and a sample without weights has 1."""
    weighed = {**sample([1, 2, 3]), "loss_weights": [0.0, 0.5, 2.0]}
    batches = {
        "padded": Collate(9)([weighed, sample([4, 5])]),
        "packed": PackCollate(9)([[sample([4, 5]), weighed], [sample([6, 7, 8])]]),
        "flat": PackCollate(9, 4, flatten=True)([weighed, sample([4, 5])]),
    }
    assert {name: batch["loss_weights"].tolist() for name, batch in batches.items()} == {
        "padded": [[0.0, 0.5, 2.0], [1.0, 1.0, 0.0]],
        "packed": [[1.0, 1.0, 0.0, 0.5, 2.0], [1.0] * 5],
        "flat": [[0.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]],
    }
    assert {batch["loss_weights"].dtype for batch in batches.values()} == {torch.float32}
    for collate in (Collate(9), PackCollate(9), PackCollate(9, flatten=True)):
        assert "loss_weights" not in collate([sample([1, 2, 3]), sample([4, 5])])


def test_a_pack_is_indexed_by_its_samples():
    builder = BlockBuilder()
    for row, tokens in enumerate(([1, 2, 3], [4, 5], [6, 7])):
        builder.add(Encoded(tokens, [-100, *tokens[1:]]), Conversation([], "t.jsonl", row))
    dataset = TokenDataset([builder.take()], ["t.jsonl"], 9)
    assert [one["input_ids"] for one in dataset[(2, 0)]] == [[6, 7], [1, 2, 3]]
    batch = PackCollate(9)([dataset[(2, 0)], dataset[FILLER]])
    assert batch["input_ids"][0].tolist() == [6, 7, 1, 2, 3]
    assert [values[1, :2].tolist() for values in batch.values()] == [[9, 9], [0, 1], [-100, -100]]


# -- models -------------------------------------------------------------------------------------------------------

# Falcon 3 is a llama with a head dimension of its own. Windows are shorter than the samples, so that they bite.
MODELS = {
    "llama": {}, "falcon3": {"head_dim": 16}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 6}, "phi3": {},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": {}, "glm4": {"head_dim": 8}, "granite": {}, "internlm3": {}, "smollm3": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}  # fmt: skip
KERNELS = [
    (arch, kernel) for arch in MODELS for kernel in ("sdpa", "eager") if (arch, kernel) != ("gemma2", "sdpa")
]  # transformers has Gemma 2's soft caps in eager attention only
SAMPLES = [
    sample(torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist(), num_prompt=3)
    for length in (13, 5, 20, 4, 9, 11)
]


def make_model(arch, kernel="sdpa"):
    torch.manual_seed(0)
    config = make_config("llama" if arch == "falcon3" else arch, tied=True)
    config = type(config)(**{**config.to_dict(), **MODELS[arch]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    with torch.no_grad():
        for p in model.parameters():  # attention that is near uniform would hide a leak
            p.add_(torch.randn_like(p) * 0.1)
    return model.train()


def outcome(model, batches):
    """Logits by sample's first three tokens, summed loss and gradient."""
    model.zero_grad()
    total, logits = 0.0, {}
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output = model(**inputs, use_cache=False).logits
        loss = F.cross_entropy(output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
        for row, tokens in zip(output.detach(), batch["input_ids"].tolist(), strict=True):
            for expected in SAMPLES:
                ids = expected["input_ids"]
                for start in range(len(tokens) - len(ids) + 1):
                    if tokens[start : start + len(ids)] == ids:
                        logits[len(ids)] = row[start : start + len(ids)]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return total, logits, gradient


# Relative to the loss, the largest logit and the norm of the gradient. Kernels that round otherwise, those of three
# kinds of CPU among them (ATEN_CPU_CAPABILITY), differ by 1, 6 and 5 units of rounding; a leak changes the leading
# digits.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def assert_same(left, right):
    assert left[0] == pytest.approx(right[0], rel=ROUNDING)
    assert left[1].keys() == right[1].keys() == {len(sample["input_ids"]) for sample in SAMPLES}
    for length, logits in left[1].items():
        assert (right[1][length] - logits).abs().max() <= ROUNDING * logits.abs().max()
    assert (left[2] - right[2]).norm() < ROUNDING * left[2].norm()


def separate():
    return [Collate(0)([one]) for one in SAMPLES]


def packed():
    """Rows of 40 tokens of which the shorter ones are filled up, two in a batch."""
    order = PackedOrder(np.array([len(one["input_ids"]) for one in SAMPLES]), 34, seed=1)
    rows = [[SAMPLES[i] for i in pack] for pack in order(0)]
    assert len(rows) == 2 and {sum(len(one["input_ids"]) for one in row) for row in rows} != {34}
    return [PackCollate(0)(rows)]


@pytest.mark.parametrize("arch, kernel", KERNELS)
def test_packed_is_separate(arch, kernel):
    """Logits, loss and gradient, for rows of best fit and for a batch without padding."""
    model = make_model(arch, kernel)
    expected = outcome(model, separate())
    assert_same(expected, outcome(model, packed()))
    assert_same(expected, outcome(model, [PackCollate(0, 8, flatten=True)(SAMPLES)]))


def test_a_mask_of_ones_would_leak():
    """What the test above would see, were the borders lost."""
    model = make_model("llama")
    (batch,) = packed()
    leaking = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    with pytest.raises(AssertionError):
        assert_same(outcome(model, separate()), outcome(model, [leaking]))


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("how", ["checkpointed", "compiled", "both"])
def test_packed_is_separate_when_recomputed_and_compiled(arch, how, monkeypatch):
    """The mask is made outside of the layers, which are what is compiled and recomputed."""
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_with(self, backend="aot_eager"))
    model = make_model(arch)
    expected = outcome(model, separate())
    parallelize(model, None, activation_checkpointing=how != "compiled", compile_layers=how != "checkpointed")
    assert_same(expected, outcome(model, packed()))
    torch._dynamo.reset()


def test_flash_attention_gets_the_borders_of_a_flattened_row():
    """Its kernel isn't for CPUs: what transformers hands to it is the begin of each sample, and of the filler."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    positions = PackCollate(0, 8, flatten=True)(SAMPLES)["position_ids"]
    (begins, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    assert begins.tolist() == [0, 13, 18, 38, 42, 51, 62, 64] and longest == 20
    assert _is_packed_sequence(positions, batch_size=1)


# -- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"messages": talk("q" * (1 + i % 5), "answer " * (1 + i * 7 % 4))} for i in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def weighed(path):
    """The same conversations, of which some have a weight, so that batches with and without weights meet."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for i, weight in ((3, 0.25), (4, 3.5), (11, 0.01), (20, 7.0)):
        rows[i]["messages"][1]["weight"] = weight
    file = Path(path).with_name("weighed.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return ModelPair(*map(str, save_pair(tmp_path_factory.mktemp("pair"), "qwen3")))


def losses(pair, path, attn_implementation="sdpa", devices=1, strategy="auto", **options):
    """Loss and tokens of every step of two epochs, and what the data report."""
    seed_everything(0)
    seen = []

    class Module(ShadowModule):
        def log(self, name, value, *args, **kwargs):
            if name in ("train/loss", "train/tokens"):
                seen.append(float(value))

    data = ShadowData(pair, path, **{"batch_size": 4, **options})
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, max_epochs=2,
        accumulate_grad_batches=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Module(pair, lr=1e-2, attn_implementation=attn_implementation), data)
    return seen, data.reports["train"]


def test_a_batch_without_padding_trains_as_a_padded_one(pair, path):
    """The same samples in every step, so the same curve; computed without a position too many."""
    padded, before = losses(pair, path)
    flat, after = losses(pair, path, packing="padding_free")
    assert flat == pytest.approx(padded, rel=1e-5) and len(padded) == 2 * 2 * 3
    assert padded[0] > padded[-2] + 0.1
    assert after.num_slots == after.num_tokens == before.num_tokens < before.num_slots
    assert after.fill == 1


@pytest.mark.parametrize("options", [{"packing": "padding_free"}, {"packing": "best_fit", "max_length": 64}])
def test_attention_by_sample_trains_as_a_mask_does(pair, path, options):
    masked, _ = losses(pair, path, **options)
    alone, _ = losses(pair, path, attn_implementation="varlen", **options)
    assert alone == pytest.approx(masked, rel=1e-5)


def test_a_model_without_borders_does_not_begin_to_train(tmp_path, path):
    """It trains unpacked, and is asked as soon as packing is set."""
    for seed, name in enumerate(("base", "instruct")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "falcon", vocab_size=272, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        make_tokenizer(CHATML).save_pretrained(tmp_path / name)
    pair = ModelPair(str(tmp_path / "base"), str(tmp_path / "instruct"))
    losses(pair, path)
    with pytest.raises(ShadowlitError, match=r"in 'falcon' with attn_implementation='sdpa' a packed sample changes"):
        losses(pair, path, packing="padding_free")


def losses_on_ranks(folders, path, strategy, size, options):
    pair = ModelPair(*map(str, folders))
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    batch_size = options.get("batch_size", 4) // size
    return losses(pair, path, devices=size, strategy=strategy, **{**options, "batch_size": batch_size})[0]


@pytest.mark.parametrize("options", [
    {"packing": "best_fit", "max_length": 64, "pack_length": 100}, {"group_by_length": True},
    pytest.param({"packing": "padding_free"}, marks=pytest.mark.slow),
], ids=lambda options: options.get("packing", "grouped"))  # fmt: skip
def test_two_processes_train_as_one(tmp_path, path, weighed, options):
    """23 samples, and packs whose number is odd: the last batches are unequal, and filled up. In packs some weigh."""
    folders = save_pair(tmp_path, "qwen3")
    path = weighed if "packing" in options else path
    (one,) = run_ranks(losses_on_ranks, 1, folders, path, "auto", 1, options)
    for strategy in ("ddp", "fsdp2"):
        for rank in run_ranks(losses_on_ranks, 2, folders, path, strategy, 2, options):
            assert rank == pytest.approx(one, rel=1e-4)


def test_a_run_without_validation_exports_what_it_trained_packed(pair, path, tmp_path):
    """What the export is checked with then comes from the training data."""
    data = ShadowData(pair, path, packing="padding_free", batch_size=4)
    export = ExportCallback(folder=str(tmp_path / "export"))
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, max_steps=1, callbacks=[GraftCallback(), export],
    )  # fmt: skip
    trainer.fit(ShadowModule(pair), data)
    manifest = json.loads((tmp_path / "export/model/shadowlit.json").read_text())
    assert manifest["logits_against_validated"]["max_abs"] == 0


@pytest.mark.parametrize("turns", ["equal", "weighed"])
def test_packs_carry_the_loss_of_their_samples(pair, path, weighed, turns):
    """One step per epoch over all samples: whatever shares a row or a micro-batch, it is the same step."""
    path = weighed if turns == "weighed" else path
    unpacked, _ = losses(pair, path, batch_size=12)
    packed, report = losses(pair, path, max_length=64, packing="best_fit", pack_length=190)
    assert packed == pytest.approx(unpacked, rel=1e-5) and len(packed) == 2 * 2
    if turns == "weighed":
        flat, _ = losses(pair, path, batch_size=12, packing="padding_free")
        assert flat == pytest.approx(unpacked, rel=1e-5)
    assert 4 < report.num_packs <= 8 and report.samples_per_pack == pytest.approx(23 / report.num_packs)
    assert 0.8 < report.fill <= 1


# -- the module ---------------------------------------------------------------------------------------------------


def test_batches_of_packs_from_a_file(path, caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data = ShadowData(PAIR, path, path, packing="best_fit", max_length=100, pack_length=150, batch_size=2)
        with pytest.warns(UserWarning, match="23 of 23 samples"):
            data.setup("fit")
        batches = list(data.train_dataloader())
    assert all(batch.keys() == {"input_ids", "position_ids", "labels"} for batch in batches)
    report = data.reports["train"]
    assert f"train: packed into {report.num_packs:,} rows of up to 150 tokens, " in caplog.text
    assert report.num_slots == sum(batch["input_ids"].numel() for batch in batches)
    supervised = sum((batch["labels"] != -100).sum().item() for batch in batches)
    assert supervised == report.num_supervised_tokens
    for batch in batches:
        begins = batch["position_ids"] == 0
        assert (batch["labels"][begins] == -100).all()
        # The template's first token, or the filler's.
        first = {"<|im_start|>", data.tokenizer.pad_token}
        assert set(data.tokenizer.convert_ids_to_tokens(batch["input_ids"][begins].tolist())) <= first
    assert data.val_dataloader()[0].collate_fn == Collate(data.pad_token_id)  # scores are counted by row


def test_the_log_says_what_is_padding(path, caplog):
    for options, said in (
        ({"pad_to_multiple_of": 64}, "tokens of samples. data.packing would leave no padding, group_by_length little"),
        ({"packing": "padding_free", "pad_to_multiple_of": 64}, "tokens of samples"),
    ):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            data = ShadowData(PAIR, path, batch_size=23, **options)
            data.setup("fit")
            (batch,) = data.train_dataloader()
            list(data.train_dataloader())
        report = data.reports["train"]
        assert report.num_slots == batch["labels"].numel()
        lines = [record.message for record in caplog.records if "of what the batches compute" in record.message]
        assert lines == [f"data: train: {100 * report.num_tokens / batch['labels'].numel():.1f} % of what the batches "
                         f"compute are {said}"]  # fmt: skip


def test_settings_that_contradict_each_other():
    with pytest.raises(
        DataError, match=r"data\.pack_length is 100, but a sample may have data\.max_length=200 tokens\. Raise the one"
    ):
        ShadowData(PAIR, "t.jsonl", packing="best_fit", max_length=200, pack_length=100)
    with pytest.raises(DataError, match=r"group_by_length spares padding, of which data\.packing=best_fit leaves none"):
        ShadowData(PAIR, "t.jsonl", packing="best_fit", group_by_length=True)
    with pytest.raises(DataError, match=r"group_by_length makes an order of its own, but data\.shuffle is false"):
        ShadowData(PAIR, "t.jsonl", group_by_length=True, shuffle=False)


def test_fewer_packs_than_ranks(path):
    data = ShadowData(PAIR, path, packing="best_fit")
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(
        DataError, match=r"there are 2 ranks, but only 1 pack of 23 training samples\. Lower data\.pack_length=4096"
    ):
        data.train_dataloader()


# -- grouped by length --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 300), size=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_grouped_is_a_permutation(n, size, seed, epoch):
    lengths = np.random.default_rng(seed).integers(2, 50, n)
    order = grouped_order(lengths, size, seed, epoch)
    assert sorted(order) == list(range(n))
    assert (order == grouped_order(lengths, size, seed, epoch)).all()


def test_grouped_batches_need_little_padding_and_follow_no_course():
    lengths = np.random.default_rng(0).integers(2, 500, 5003)
    order = grouped_order(lengths, 8, seed=1)
    shuffled = np.random.default_rng(0).permutation(5003)
    padding = [count_slots(lengths[o], 4, 2) / lengths.sum() - 1 for o in (order, shuffled)]
    assert padding[0] < 0.03 < 0.4 < padding[1]
    means = lengths[order[:5000]].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    assert abs(lengths[order[:2504]].mean() / lengths.mean() - 1) < 0.1
    assert (grouped_order(lengths, 8, 1, 1) != order).any()


def test_slots_by_hand():
    """Two ranks of two rows: 5 1 | 4 2 and, in the last batch, 3 | nothing."""
    sizes = np.array([5, 4, 1, 2, 3])
    assert count_slots(sizes, 2, 2) == 2 * 5 + 2 * 4 + 3
    assert count_slots(sizes, 2, 2, multiple=4) == 2 * 8 + 2 * 4 + 4
    assert count_slots(sizes, 2, 2, multiple=4, flatten=True) == 8 + 8 + 4


def test_grouped_batches_from_a_file(path):
    data = ShadowData(PAIR, path, group_by_length=True, batch_size=4)
    data.setup("fit")
    batches = list(data.train_dataloader())
    grouped = data.reports["train"].num_slots
    assert grouped == sum(batch["labels"].numel() for batch in batches)
    assert sum(len(batch["labels"]) for batch in batches) == 23
    plain = ShadowData(PAIR, path, batch_size=4)
    plain.setup("fit")
    plain.train_dataloader()
    assert grouped < plain.reports["train"].num_slots


# -- validation ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 100), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_evaluation_puts_equally_long_samples_together(n, size, seed):
    lengths = np.random.default_rng(seed).integers(2, 50, n)
    order = evaluation_order(lengths, size)
    assert sorted(order) == list(range(n))
    batches = [order[start : start + size] for start in range(0, n, size)]
    if n >= size:
        assert 0 in order[:size] or 0 in batches[-1]
        assert [batch.min() for batch in batches if len(batch) == size] == sorted(
            batch.min() for batch in batches if len(batch) == size
        )
    # No order needs less padding.
    assert count_slots(lengths[order], size) == count_slots(np.sort(lengths)[::-1], size)


def test_validation_is_grouped_unless_some_of_it_is_left_out(path):
    data = ShadowData(PAIR, validation=path, test=path, batch_size=4)
    data.setup()
    slots = {}
    for limit in (1.0, 0.5, 3):
        data.trainer = SimpleNamespace(
            world_size=1, global_rank=0, limit_val_batches=limit, limit_test_batches=1.0, accelerator=None
        )
        (loader,) = data.val_dataloader()
        rows = [row[row != -100].tolist() for batch in loader for row in batch["labels"]]
        slots[limit] = sum(batch["labels"].numel() for batch in loader), rows
    in_order = [[t for t in data.dataset("val/val")[i]["labels"] if t != -100] for i in range(23)]
    assert slots[0.5] == slots[3] and slots[3][1] == in_order
    assert slots[1.0][1] != in_order and sorted(slots[1.0][1]) == sorted(in_order)
    assert slots[1.0][0] < slots[3][0]


def test_scores_do_not_depend_on_the_order(pair, path):
    scores = []
    for limit in (1.0, 6):  # all six batches, in the set's own order
        data = ShadowData(pair, validation=path, batch_size=4)
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, use_distributed_sampler=False, limit_val_batches=limit,
        )  # fmt: skip
        (found,) = trainer.validate(ShadowModule(pair), data, verbose=False)
        scores.append(found)
    assert scores[0] == pytest.approx(scores[1], rel=ROUNDING) and len(scores[0]) == 5


# -- loading ------------------------------------------------------------------------------------------------------


def test_workers_where_a_gpu_waits_for_batches(path, monkeypatch):
    from lightning.pytorch.accelerators import CPUAccelerator

    def loader(accelerator=None, **options):
        data = ShadowData(PAIR, path, **options)
        data.setup("fit")
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0, accelerator=accelerator)
        return data.train_dataloader(), data._loading()

    assert loader()[0].num_workers == 0 and not loader()[0].pin_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train, evaluation = loader(prefetch=5)
    assert (train.num_workers, train.prefetch_factor, train.pin_memory, train.persistent_workers) == (2, 5, True, True)
    assert not evaluation["persistent_workers"]  # one set of processes for each validation set would stay behind
    assert loader(num_workers=0)[0].num_workers == 0
    assert loader(CPUAccelerator())[0].num_workers == 0
