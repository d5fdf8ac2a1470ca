"""Attention by sample is attention under a mask, whatever tells the borders."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from shadowlit.data.collate import PackCollate as Packed
from shadowlit.errors import ShadowlitError
from shadowlit.training.separation import require_separation
from shadowlit.training.varlen import NAME, borders_of, kernel_of, takes_borders, varlen_attention
from tests.data.test_packing import MODELS, SAMPLES, assert_same, make_model, outcome, packed, separate
from tests.rounding import require_same_logits


def test_borders_by_hand():
    found = borders_of(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert found.pop("cu_seq_lens_q") is found.pop("cu_seq_lens_k")
    assert found == {"max_length_q": 4, "max_length_k": 4}
    borders = borders_of(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))["cu_seq_lens_q"]
    assert borders.tolist() == [0, 3, 5, 6, 10] and borders.dtype == torch.int32
    assert takes_borders(NAME) and takes_borders("flash_attention_2") and not takes_borders("sdpa")


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_row_by_hand(window, scaling):
    """Against attention under the mask that the borders make, with fewer heads for keys than for queries."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
    sample = (positions == 0).cumsum(1)
    places = torch.arange(9)
    behind = places[:, None] - places
    mask = (sample[:, :, None] == sample[:, None]) & (behind >= 0) & (behind < (window or 9))
    exact = [x.double() for x in (query, key, value)]
    expected, unmasked = (
        F.scaled_dot_product_attention(*exact, each, scale=scaling, enable_gqa=True).transpose(1, 2)
        for each in (mask[:, None], None)
    )
    for told in ({"position_ids": positions}, borders_of(positions)):
        found, weights = varlen_attention(
            torch.nn.Module(), query, key, value, None, scaling=scaling, sliding_window=window, **told
        )
        assert weights is None
        require_same_logits(found, expected, unmasked - expected)  # two of the products that its bound allows for


WITH_CAPS = ("gemma2",)


@pytest.mark.parametrize("arch", [arch for arch in MODELS if arch not in WITH_CAPS])
def test_packed_is_separate(arch):
    """Logits, loss and gradient: of samples alone under sdpa, of packs under varlen, with and without borders."""
    model = make_model(arch)
    expected = outcome(model, separate())
    model.set_attn_implementation(NAME)
    assert_same(expected, outcome(model, separate()))
    (rows,) = packed()
    assert_same(expected, outcome(model, [rows]))
    assert_same(expected, outcome(model, [{**rows, **borders_of(rows["position_ids"])}]))
    assert_same(expected, outcome(model, [Packed(0, 8, flatten=True)(SAMPLES)]))
    require_separation(model)


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
def test_padded_batches_are_left_to_sdpa(arch):
    model = make_model(arch)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 0, 0, 0, 0, 0, 0]])
    mask = (ids > 0).long()
    expected = model(input_ids=ids, attention_mask=mask).logits[mask > 0]
    model.set_attn_implementation(NAME)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[mask > 0], expected)  # by the same kernel


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])  # the second with a window, shorter than the answer
@pytest.mark.parametrize("rows", [1, 2])
def test_answers_to_prompts_of_one_length_are_those_of_sdpa(arch, rows):
    """There is no padding, and so no mask, when a token sees the keys of a cache."""
    model = make_model(arch).eval()
    prompts = torch.randint(3, 250, (rows, 7), generator=torch.Generator().manual_seed(0))
    asked = {
        "input_ids": prompts,
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
    }
    answers = []
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        answers.append(model.generate(**asked, do_sample=False, output_logits=True, return_dict_in_generate=True))
    assert answers[0].sequences.shape == (rows, 19) and torch.equal(answers[0].sequences, answers[1].sequences)
    torch.testing.assert_close(torch.stack(answers[1].logits), torch.stack(answers[0].logits), rtol=1e-4, atol=1e-4)


def test_recomputed_and_compiled_layers():
    from shadowlit.training.parallel import parallelize

    model = make_model("qwen3", NAME)
    expected = outcome(model, separate())
    with pytest.MonkeyPatch.context() as patch:
        compile_with = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda self: compile_with(self, backend="aot_eager"))
        parallelize(model, None, activation_checkpointing=True, compile_layers=True)
    (rows,) = packed()
    assert_same(expected, outcome(model, [{**rows, **borders_of(rows["position_ids"])}]))
    torch._dynamo.reset()


def test_models_that_cap_their_scores_are_refused():
    model = make_model("gemma2", "eager")
    model.set_attn_implementation(NAME)
    with pytest.raises(ShadowlitError, match=r"'varlen', but Gemma2Attention needs 'softcap'.*Set it to 'eager'"):
        outcome(model, separate())


@pytest.mark.parametrize(
    ("packing", "arch", "options", "expected"),
    [
        ("padding_free", "qwen3", {}, NAME),
        ("best_fit", "llama", {}, NAME),
        (None, "qwen3", {}, "sdpa"),
        ("padding_free", "gemma2", {}, "sdpa"),  # caps its scores
        ("padding_free", "qwen3", {"compile_layers": True}, "sdpa"),
        ("padding_free", "qwen3", {"attn_implementation": "eager"}, "eager"),
    ],
)
def test_auto_is_varlen_where_rows_are_packed_and_it_can_be(packing, arch, options, expected):
    name, compiled = options.get("attn_implementation", "auto"), options.get("compile_layers", False)
    assert kernel_of(name, AutoConfig.for_model(arch), packs=packing is not None, compiled=compiled) == expected
