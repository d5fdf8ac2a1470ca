"""A pair that fits says nothing; a misfit is named before any weight is loaded, with what to do."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers.activations import ACT2FN

from shadowlit import limits
from shadowlit.errors import CheckpointError, PairError
from shadowlit.pair.check import check_pair, require_fit
from shadowlit.pair.folders import Problem
from shadowlit.pair.pair import ModelPair
from shadowlit.pair.tokens import untrained_rows
from tests.tiny import ARCHITECTURES, CHATML_UNMARKED, SPECIAL, make_tokenizer, save_model, save_pair, store_head


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tied and an untied pair that fit, as a source of copies."""
    root = tmp_path_factory.mktemp("pairs")
    save_pair(root / "tied", "qwen3", tied=True)
    save_pair(root / "untied", "qwen3", tied=False)
    return root


@pytest.fixture
def tied(saved, tmp_path) -> ModelPair:
    shutil.copytree(saved / "tied", tmp_path, dirs_exist_ok=True)
    return ModelPair(str(tmp_path / "base"), str(tmp_path / "instruct"))


@pytest.fixture
def untied(saved, tmp_path) -> ModelPair:
    shutil.copytree(saved / "untied", tmp_path, dirs_exist_ok=True)
    return ModelPair(str(tmp_path / "base"), str(tmp_path / "instruct"))


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def edit_weights(folder: str, change) -> None:
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def fresh(pair: ModelPair) -> ModelPair:
    """The same pair without what it has cached."""
    return ModelPair(pair.base, pair.instruct)


def fresh_exchanged(pair: ModelPair) -> ModelPair:
    return ModelPair(pair.base, pair.instruct, template_owner="base")


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, [str(p) for p in problems]
    return problems[0]


class TestFit:
    @pytest.mark.parametrize("tied_", [True, False])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_every_architecture_fits(self, tmp_path, arch, tied_):
        base, instruct = save_pair(tmp_path, arch, tied=tied_, dtype=torch.bfloat16, shard_size="20KB")
        pair = ModelPair(str(base), str(instruct))
        assert check_pair(pair, "linear") == check_pair(pair, "all") == check_pair(pair, [r"lm_head", r"q_proj"]) == []
        require_fit(pair, "all")

    def test_parts(self, tied):
        assert tied.base_folder() == Path(tied.base) and tied.instruct_folder() == Path(tied.instruct)
        assert tied.tokenizer() is tied.tokenizer() and tied.tokenizer().chat_template
        assert tied.base_tokenizer() is not tied.tokenizer()
        assert tied.config().model_type == tied.base_config().model_type == "qwen3"
        prints = tied.fingerprints()
        assert set(prints) == {"base", "instruct"} and prints["base"] != prints["instruct"]
        assert tied.revisions() == {"base": None, "instruct": None}

    def test_is_an_argument_group(self, tied):
        def fit(pair: ModelPair) -> None: ...

        parser = ArgumentParser(exit_on_error=False)
        parser.add_function_arguments(fit)
        parsed = parser.parse_args([f"--pair.base={tied.base}", f"--pair.instruct={tied.instruct}"])
        assert parser.instantiate(parsed).pair == tied
        assert "Its tokenizer and" in parser.format_help()

    def test_copies_and_pickles(self, tied):
        tied.tokenizer()
        assert copy.deepcopy(tied) == pickle.loads(pickle.dumps(tied)) == tied

    def test_same_model_is_the_direct_arm(self, tied, tmp_path):
        problem = only(check_pair(ModelPair(tied.instruct, tied.instruct), "all"))
        assert (problem.severity, problem.subject) == ("note", "same model")
        shutil.copytree(tied.instruct, tmp_path / "copy")
        problem = only(check_pair(ModelPair(str(tmp_path / "copy"), tied.instruct), "all"))
        assert "the same fingerprint" in problem.found and "I2I" in problem.found


class TestSources:
    @pytest.mark.parametrize("source", ["./nowhere", "/no/where", "a/b/c", "", "with space"])
    def test_missing_folder(self, tied, source):
        pair = ModelPair(source, tied.instruct)
        with pytest.raises(PairError, match=rf"base model: '{source}' is not a folder.*set pair\.base"):
            pair.base_folder()
        assert only(check_pair(pair)).severity == "error"

    def test_file_instead_of_folder(self, tied):
        with pytest.raises(PairError, match=r"is a file.*holds config\.json"):
            ModelPair(tied.base, tied.instruct + "/config.json").instruct_folder()

    def test_hub_out_of_reach(self, tied):
        with pytest.raises(PairError, match=r"no folder 'nobody/nothing'.*'v1'.*spelling.*hf auth login"):
            ModelPair("nobody/nothing", tied.instruct, base_revision="v1").base_folder()

    def test_hub_download(self, tied, tmp_path, monkeypatch):
        commit = "0123456789" * 4
        snapshot = tmp_path / "models--org--name" / "snapshots" / commit
        shutil.copytree(tied.base, snapshot)
        asked = []
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(snapshot))
        pair = ModelPair("org/name", tied.instruct, base_revision=commit)
        assert pair.base_folder() == pair.base_folder() == snapshot and len(asked) == 1
        (name,), options = asked[0]
        assert (name, options["revision"]) == ("org/name", commit)
        assert "*.safetensors" in options["allow_patterns"]
        assert not any(p in ("*", "*.bin", "*.py") for p in options["allow_patterns"])
        assert pair.revisions() == {"base": commit, "instruct": None} and check_pair(pair, "all") == []
        moving = only(check_pair(ModelPair("org/name", tied.instruct), "all"))
        assert moving.severity == "note" and "main branch, which can move" in moving.found
        trusting = ModelPair("org/name", tied.instruct, trust_remote_code=True)
        trusting.base_folder()
        assert "*.py" in asked[-1][1]["allow_patterns"]

    def test_revision_of_a_folder_is_ignored_aloud(self, tied):
        problem = only(check_pair(ModelPair(tied.base, tied.instruct, instruct_revision="v1")))
        assert problem.severity == "warning" and "'v1' is ignored" in problem.found

    @pytest.mark.parametrize("text", [None, "{", "[]"])
    def test_broken_config_names_the_file(self, tied, text):
        path = Path(tied.base) / "config.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(PairError, match=r"base config\.json: .*base/config\.json.*To do: "):
            tied.base_config()
        with pytest.raises(PairError, match=r"base/config\.json"):
            require_fit(tied)

    def test_unknown_model_type(self, tied):
        edit_json(Path(tied.base) / "config.json", model_type="hyper9")
        with pytest.raises(PairError, match=r"cannot load .*hyper9.*upgrade transformers"):
            tied.base_config()

    def test_no_tokenizer(self, tied):
        (Path(tied.instruct) / "tokenizer.json").unlink()
        with pytest.raises(PairError, match=r"instruct tokenizer: .*copy the model's tokenizer files"):
            tied.tokenizer()

    def test_only_pickles(self, tied):
        (Path(tied.base) / "model.safetensors").rename(Path(tied.base) / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="only pickled weights"):
            tied.fingerprints()
        with pytest.raises(PairError, match=r"base weights: .*only pickled weights.*save_pretrained"):
            require_fit(tied)

    def test_broken_generation_config(self, tied):
        (Path(tied.instruct) / "generation_config.json").write_text("{")
        assert "generation_config.json is not readable JSON" in only(check_pair(tied)).found


class TestTensors:
    def test_another_architecture(self, tied, tmp_path):
        other = save_model(tmp_path / "llama", "llama", tied=True)
        with pytest.raises(PairError) as error:
            require_fit(ModelPair(str(other), tied.instruct))
        assert "model_type is 'llama' in the Base, 'qwen3' in the Instruct" in str(error.value)
        assert "only the Instruct has 4 of its 24 tensors (model.layers.0.self_attn.k_norm" in str(error.value)

    def test_more_layers_and_another_width(self, tied, tmp_path):
        other = save_model(tmp_path / "deep", "qwen3", layers=3, hidden=48)
        with pytest.raises(PairError) as error:
            require_fit(ModelPair(str(other), tied.instruct))
        assert "only the Base has 11 of its 35 tensors (model.layers.2." in str(error.value)
        assert "24 of 24 common tensors differ" in str(error.value)
        assert "model.layers.0.input_layernorm.weight [48] and [32]" in str(error.value)

    def test_heads_change_no_shape(self, tied):
        edit_json(Path(tied.base) / "config.json", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        problem = only(check_pair(tied))
        assert (problem.severity, problem.subject) == ("error", "config")
        assert "num_attention_heads is 2 in the Base, 4 in the Instruct" in problem.found

    def test_two_names_of_one_activation_are_no_difference(self, tied):
        assert ACT2FN["swish"](torch.arange(-4.0, 5)).equal(ACT2FN["silu"](torch.arange(-4.0, 5)))
        edit_json(Path(tied.base) / "config.json", hidden_act="swish")
        assert check_pair(tied) == []
        edit_json(Path(tied.base) / "config.json", hidden_act="gelu")
        assert "hidden_act is 'gelu' in the Base, 'silu' in the Instruct" in only(check_pair(tied)).found

    def test_other_settings(self, tied):
        edit_json(Path(tied.base) / "config.json", rms_norm_eps=1e-5)
        problem = only(check_pair(tied))
        assert problem.severity == "warning" and "rms_norm_eps is 1e-05" in problem.found

    def test_stored_dtype(self, tied):
        edit_weights(tied.base, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
        problem = only(check_pair(tied))
        assert (problem.severity, problem.subject) == ("warning", "stored dtype")
        assert "24 of 24 tensors differ" in problem.found and "torch.bfloat16 and torch.float32" in problem.found

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
    def test_quantised_weights(self, tied, dtype):
        name = "model.layers.0.self_attn.q_proj.weight"
        edit_weights(tied.base, lambda t: t.update({name: t[name].to(dtype)}))
        problem = check_pair(tied)[0]
        assert (problem.severity, problem.subject) == ("error", "base quantised")
        assert name in problem.found and "unquantised original (model.quantization=nf4 trains" in problem.remedy

    def test_a_matrix_of_indices_is_not_quantised(self, tied):
        index = {"model.layers.0.self_attn.relative_position_index": torch.ones(2, 2, dtype=torch.int32)}
        for folder in (tied.base, tied.instruct):
            edit_weights(folder, lambda t: t.update(index))
        assert check_pair(tied) == []

    def test_quantisation_config(self, tied):
        edit_json(Path(tied.instruct) / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        problem = only(check_pair(tied))
        assert problem.subject == "instruct quantised" and "(gptq)" in problem.found

    def test_rope_and_context(self, tied):
        rope = {"rope_theta": 1e6, "rope_type": "default"}
        edit_json(Path(tied.instruct) / "config.json", rope_parameters=rope, max_position_embeddings=4096)
        warning, note = check_pair(tied, "all")
        assert (warning.severity, warning.subject) == ("warning", "rope") and "1000000.0" in warning.found
        assert note.severity == "note" and note.remedy == "keep data.max_length at most 512."

    def test_the_old_spelling_of_rope_is_no_difference(self, tied):
        edit_json(Path(tied.base) / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
        assert check_pair(tied) == []


class TestVocabulary:
    @pytest.mark.parametrize("tied_", [True, False])
    @pytest.mark.parametrize(
        ("select", "severity"),
        [("linear", "warning"), ("all", "error"), (r"embed|lm_head", "error"), ([r"q_proj"], "warning")],
    )
    def test_unequal_rows(self, tmp_path, tied_, select, severity):
        base = save_model(tmp_path / "base", tied=tied_, vocab_size=272)
        instruct = save_model(tmp_path / "instruct", tied=tied_, vocab_size=280)
        problem = only(check_pair(ModelPair(str(base), str(instruct)), select))
        assert (problem.severity, problem.subject) == (severity, "vocabulary")
        assert "model.embed_tokens.weight has 272 rows and 280" in problem.found
        assert ("lm_head.weight has 272 rows and 280" in problem.found) != tied_
        if severity == "error":
            assert "graft.select=linear" in problem.remedy and "resize_token_embeddings" in problem.remedy

    @pytest.mark.parametrize(("select", "severity"), [("linear", "warning"), ("all", "error")])
    def test_unequal_ties(self, tmp_path, select, severity):
        base, instruct = save_model(tmp_path / "base", tied=True), save_model(tmp_path / "instruct", tied=False)
        problem = only(check_pair(ModelPair(str(base), str(instruct)), select))
        assert (problem.severity, problem.subject) == (severity, "tied embeddings")
        assert "tie_word_embeddings is True in the Base, False in the Instruct" in problem.found

    @pytest.mark.parametrize("who", ["base", "instruct"])
    def test_a_head_of_its_own_unties_whatever_the_config_says(self, tied, who):
        store_head(Path(getattr(tied, who)), own=True)
        found = f"is {who != 'base'} in the Base, {who != 'instruct'} in the Instruct, as transformers loads"
        for select, severity in (("linear", "warning"), ("lm_head", "error"), ("embed_tokens", "error")):
            problem = only(check_pair(tied, select))
            assert problem.severity == severity and found in problem.found
        store_head(Path(tied.base), own=True)
        store_head(Path(tied.instruct), own=True)
        assert check_pair(fresh(tied), "all") == [] and fresh(tied).ties() == (False, False)

    def test_tied_head_that_one_side_stores(self, tied):
        edit_weights(tied.base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        problem = only(check_pair(tied, "all"))
        assert problem.severity == "note" and "lm_head.weight" in problem.found

    def test_embedding_that_is_missing(self, tied):
        edit_weights(tied.base, lambda t: t.pop("model.embed_tokens.weight"))
        problem = only(check_pair(tied))
        assert problem.severity == "error" and "model.embed_tokens.weight is in one model only" in problem.found

    def test_untied_head_that_is_missing(self, untied):
        edit_weights(untied.base, lambda t: t.pop("lm_head.weight"))
        assert "lm_head.weight is in one model only" in only(check_pair(untied)).found

    def test_token_that_is_only_in_the_instruct(self, tied):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken("<tool>", special=True)])
        tokenizer.save_pretrained(tied.instruct)
        problem = only(check_pair(tied))
        assert problem.severity == "warning" and "only the Instruct's has 1 token: '<tool>'" in problem.found
        other_way = only(check_pair(ModelPair(tied.instruct, tied.base)))
        assert other_way.severity == "note" and "only the Base's has 1 token: '<tool>'" in other_way.found

    def test_id_with_another_meaning(self, tied):
        rename(Path(tied.base), {SPECIAL[1]: "<|header|>"})
        problem = check_pair(tied)[0]
        assert (problem.severity, problem.subject) == ("error", "tokenizer")
        assert "1 id with another token" in problem.found
        assert "258 was '<|header|>', is '<|im_start|>'" in problem.found

    def test_swapped_tokens(self, tied):
        rename(Path(tied.base), {SPECIAL[1]: SPECIAL[2], SPECIAL[2]: SPECIAL[1]})
        assert "2 ids with another token" in check_pair(tied)[0].found

    def test_placeholder_that_the_instruct_named(self, tied):
        rename(Path(tied.base), {SPECIAL[1]: "<|reserved_special_token_0|>"})
        problem = only(check_pair(tied))
        assert problem.severity == "warning" and "1 placeholder of the Base" in problem.found

    def test_equal_tokens_cut_differently(self, tied):
        path = Path(tied.base) / "tokenizer.json"
        state = json.loads(path.read_text())
        state["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(state))
        assert "cut a text differently" in only(check_pair(tied)).found

    @pytest.mark.parametrize(("select", "severity"), [("linear", "warning"), ("all", "error")])
    def test_template_token_without_a_row_in_the_base(self, tmp_path, select, severity):
        base = save_model(tmp_path / "base", vocab_size=257)
        instruct = save_model(tmp_path / "instruct", vocab_size=272)
        rows, lacking = check_pair(ModelPair(str(base), str(instruct)), select)
        assert (rows.severity, rows.subject) == (severity, "vocabulary")
        assert (lacking.severity, lacking.subject) == ("warning", "base vocabulary")
        assert (
            "has 257 rows, too few for 2 tokens of the Instruct's tokenizer, some of which the chat template writes: "
            "'<|im_start|>'"
        ) in lacking.found
        assert "the Instruct's rows" in lacking.remedy

    def test_template_token_without_a_row_in_the_instruct(self, tmp_path):
        folder = save_model(tmp_path / "both", vocab_size=257)
        problems = {p.subject: p for p in check_pair(ModelPair(str(folder), str(folder)))}
        assert problems["instruct vocabulary"].severity == "error"
        assert "tokenizer that belongs to these weights" in problems["instruct vocabulary"].remedy

    def test_the_base_may_own_the_template(self, tied):
        """With exchanged roles the pair fits; the check looks at the owner's template and end of turn."""
        exchanged = ModelPair(tied.instruct, tied.base, template_owner="base")
        assert check_pair(exchanged) == []
        assert exchanged.tokenizer() is exchanged.base_tokenizer()
        assert exchanged.template_folder() == Path(tied.instruct)
        (Path(tied.base) / "chat_template.jinja").unlink()
        assert check_pair(fresh_exchanged(exchanged)) == []
        lacking = only(check_pair(ModelPair(tied.instruct, tied.base)))
        assert "the Instruct's tokenizer has none" in lacking.found and "pair.template_owner" in lacking.remedy
        (Path(tied.instruct) / "chat_template.jinja").unlink()
        assert "the Base's tokenizer has none" in only(check_pair(fresh_exchanged(exchanged))).found

    def test_other_token_without_a_row_in_the_instruct(self, tied):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken(f"<{i}>", special=True) for i in range(20)])
        tokenizer.save_pretrained(tied.instruct)
        problems = {p.subject: p for p in check_pair(tied)}
        assert problems["instruct vocabulary"].severity == problems["base vocabulary"].severity == "warning"
        assert "7 tokens" in problems["instruct vocabulary"].found


def rename(folder: Path, names: dict[str, str]) -> None:
    """Rename tokens in a saved tokenizer."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        for i, old in enumerate(names):
            text = text.replace(old, f"@@{i}@@")
        for i, new in enumerate(names.values()):
            text = text.replace(f"@@{i}@@", new)
        (folder / file).write_text(text)


class TestTemplate:
    def set_template(self, pair: ModelPair, template: str) -> None:
        (Path(pair.instruct) / "chat_template.jinja").write_text(template)

    def test_missing(self, tied):
        (Path(tied.instruct) / "chat_template.jinja").unlink()
        problem = only(check_pair(tied))
        assert (problem.severity, problem.subject) == ("error", "chat template")
        assert "chat_template.jinja into the Instruct's folder" in problem.remedy

    def test_the_base_needs_none(self, tied):
        (Path(tied.base) / "chat_template.jinja").unlink()
        assert check_pair(tied, "all") == []

    def test_that_cannot_be_rendered(self, tied):
        self.set_template(tied, "{{ messages[99].content.nope() }}")
        assert "it cannot be rendered (Undefined" in only(check_pair(tied)).found

    def test_that_never_ends(self, tied, monkeypatch):
        monkeypatch.setattr(limits, "TIME_LIMIT_S", 0.05)
        self.set_template(tied, f"{{% for a in range(99999) %}}{'{% for b in range(99999) %}' * 2}{'{% endfor %}' * 3}")
        assert "it takes more than 0.05 s, as if it never ended" in only(check_pair(tied)).found

    def test_broken_ones_and_several_without_a_default(self, tied, tmp_path):
        self.set_template(tied, "{% for m in messages %}\n{% oops %}")
        problem = only(check_pair(fresh(tied)))
        assert re.search(r"cannot be rendered \(TemplateSyntaxError: .*'oops'.* in line 2\)", problem.found)
        named = Path(tied.instruct) / "additional_chat_templates"
        named.mkdir()
        for name in ("rag", "tool_use"):
            (named / f"{name}.jinja").write_text(CHATML_UNMARKED)
        (Path(tied.instruct) / "chat_template.jinja").unlink()
        problem = only(check_pair(fresh(tied)))
        assert problem.severity == "error" and "has 2 named templates (rag, tool_use), and none" in problem.found
        assert "additional_chat_templates/<name>.jinja" in problem.remedy
        (Path(tied.instruct) / "chat_template.jinja").write_text(CHATML_UNMARKED)
        assert check_pair(fresh(tied)) == []

    def test_another_one_is_checked_instead(self, tied):
        """That of data.chat_template, with its arguments, wherever the Instruct's own is missing or broken."""
        (Path(tied.instruct) / "chat_template.jinja").unlink()
        note = only(check_pair(fresh(tied), chat_template=CHATML_UNMARKED))
        assert note.severity == "note" and "is used, since there is none in the Instruct's tokenizer" in note.found
        self.set_template(tied, "{% oops %}")
        note = only(check_pair(fresh(tied), chat_template=CHATML_UNMARKED))
        assert note.severity == "note" and "which replaces that of the Instruct's tokenizer" in note.found
        error, _ = check_pair(fresh(tied), chat_template="{{ nope() }}" + CHATML_UNMARKED)
        assert "cannot be rendered (UndefinedError: 'nope' is undefined)" in error.found
        assert error.remedy == "repair the file of data.chat_template."
        ends = CHATML_UNMARKED.replace("<|im_end|>", "<|endoftext|>")
        warning, _ = check_pair(fresh(tied), chat_template=ends)
        assert warning.subject == "end of turn" and "'<|endoftext|>'" in warning.found
        needing = "{{ '' if mode is defined else raise_exception('no mode') }}" + CHATML_UNMARKED
        assert check_pair(fresh(tied), chat_template=needing)[0].severity == "error"
        assert only(check_pair(fresh(tied), "linear", True, needing, {"mode": 1})).severity == "note"

    def test_that_refuses_system_turns(self, tied):
        text = tied.tokenizer().chat_template
        refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        self.set_template(tied, refusing + text)
        assert check_pair(fresh(tied)) == []

    def test_that_writes_no_answer_as_it_is_gives_no_judgement(self, tied):
        self.set_template(tied, "{% for m in messages %}<|im_start|>{{ m.content | upper }}{% endfor %}")
        assert check_pair(tied) == []

    def test_end_of_turn_is_no_stop(self, tied):
        edit_json(Path(tied.instruct) / "generation_config.json", eos_token_id=[257])
        problem = only(check_pair(tied))
        assert (problem.severity, problem.subject) == ("warning", "end of turn")
        assert "'<|im_end|>' (id 256), but generation stops at [257]" in problem.found
        assert "add 256 to eos_token_id" in problem.remedy

    @pytest.mark.parametrize("eos", [256, [257, 256]])
    def test_end_of_turn_among_the_stops(self, tied, eos):
        edit_json(Path(tied.instruct) / "generation_config.json", eos_token_id=eos)
        assert check_pair(tied) == []

    def test_stop_from_the_config_without_generation_config(self, tied):
        (Path(tied.instruct) / "generation_config.json").unlink()
        assert "generation stops at nothing" in only(check_pair(tied)).found
        edit_json(Path(tied.instruct) / "config.json", eos_token_id=256)
        assert check_pair(fresh(tied)) == []

    def test_turn_without_end(self, tied):
        self.set_template(tied, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
        assert "ends an assistant's turn with no special token" in only(check_pair(tied)).found


class TestUntrainedTokens:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda e: e[258].zero_(), "all zero"),
            (lambda e: e[258].mul_(0.1), "norm"),
            (lambda e: e[258].copy_(e[270]), "equal to 1 other rows"),
            (lambda e: e[258:].copy_(e[258].clone()), "equal to 13 other rows"),
        ],
    )
    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
    def test_row_that_was_never_trained(self, untied, change, reason, name):
        edit_weights(untied.base, lambda t: change(t[name]))
        problem = only(check_pair(untied))
        assert (problem.severity, problem.subject) == ("warning", "untrained tokens")
        assert "writes 1 token that" in problem.found and "'<|im_start|>'" in problem.found
        assert reason in problem.found and f"in {name}" in problem.found
        assert "modules_to_save" in problem.remedy and "graft.select=all" in problem.remedy

    def test_the_remedy_is_one_that_a_tied_pair_takes(self, tied):
        """The graft refuses adapters of a tied embedding."""
        edit_weights(tied.base, lambda t: t["model.embed_tokens.weight"][258].zero_())
        remedy = only(check_pair(tied)).remedy
        assert "modules_to_save" not in remedy and "full tuning, graft.select=all" in remedy

    def test_tokens_that_the_template_does_not_write_do_not_matter(self, tied):
        edit_weights(tied.base, lambda t: t["model.embed_tokens.weight"][257].zero_())
        assert check_pair(tied) == []

    def test_only_the_base_matters(self, tied):
        edit_weights(tied.instruct, lambda t: t["model.embed_tokens.weight"][258].zero_())
        assert check_pair(tied) == []

    def test_large_vocabulary_is_sampled(self, tmp_path):
        base, instruct = save_pair(tmp_path, vocab_size=20_000, hidden=16)
        pair = ModelPair(str(base), str(instruct))
        assert check_pair(pair, "all") == []
        edit_weights(str(base), lambda t: t["model.embed_tokens.weight"][256].mul_(0.1))
        assert "'<|im_end|>'" in only(check_pair(fresh(pair), "all")).found

    def test_rule(self):
        """Norms 2, 2, 2, 0.3, 0, 1.41, 1.41: the fourth lies below a quarter of the median, 0.35."""
        rows = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0.3, 0], [0, 0], [1, 1], [1, 1]])
        assert untrained_rows(rows) == {
            3: "norm 0.3, median 1.4",
            4: "all zero",
            5: "equal to 1 other rows",
            6: "equal to 1 other rows",
        }
        assert untrained_rows(rows[:3]) == {}


class TestReport:
    def test_all_errors_at_once(self, tied):
        (Path(tied.instruct) / "chat_template.jinja").unlink()
        (Path(tied.base) / "tokenizer.json").write_text("{")
        edit_json(Path(tied.base) / "config.json", quantization_config={"quant_method": "fp8"}, head_dim=16)
        with pytest.raises(PairError) as error:
            require_fit(tied)
        message = str(error.value)
        assert message.startswith(f"Base '{tied.base}' and Instruct '{tied.instruct}' do not fit together, 4 errors:")
        for i, subject in enumerate(("base tokenizer", "base quantised", "config", "chat template"), 1):
            assert f"\n  {i}. {subject}: " in message
        assert message.count("To do: ") == 4

    def test_warnings_are_logged_and_let_pass(self, tied, caplog):
        edit_json(Path(tied.base) / "config.json", rms_norm_eps=1e-5, max_position_embeddings=64)
        with caplog.at_level(logging.INFO, "shadowlit.pair.check"):
            require_fit(tied)
        assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
        assert "rms_norm_eps" in caplog.records[0].getMessage()

    def test_both_models_unreadable(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(PairError) as error:
            require_fit(ModelPair(str(tmp_path / "empty"), "./nowhere"))
        assert "base config.json" in str(error.value) and "base weights" in str(error.value)
        assert "instruct model: './nowhere'" in str(error.value)

    def test_broken_pattern_is_left_to_the_selection(self, tied):
        assert check_pair(tied, "(") == []

    def test_order(self, tied):
        edit_json(Path(tied.base) / "config.json", rms_norm_eps=1e-5, max_position_embeddings=64, head_dim=16)
        assert [p.severity for p in check_pair(tied)] == ["error", "warning", "note"]
