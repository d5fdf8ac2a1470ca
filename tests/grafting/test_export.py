"""The exported folder is the Instruct's in everything but the weights, whole or not at all, and loads as written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import CheckpointError, ExportError, PairError
from shadowlit.grafting.export import export_adapter, export_folder, model_bytes
from shadowlit.grafting.manifest import add_to_manifest, build_manifest, read_manifest
from shadowlit.grafting.verification import logit_difference
from shadowlit.pair.check import check_pair
from shadowlit.pair.pair import ModelPair
from tests.reloading import reload_logits
from tests.tiny import ARCHITECTURES, save_model, save_pair

IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor([1, 1]), torch.tensor([0, 1])), torch.tensor(0))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> ModelPair:
    base, instruct = save_pair(tmp_path_factory.mktemp("pair"), "qwen3", tied=True)
    return ModelPair(str(base), str(instruct))


@pytest.fixture
def instruct(pair, tmp_path) -> Path:
    """A copy of the Instruct that a test may change."""
    return Path(shutil.copytree(pair.instruct, tmp_path / "instruct"))


STORES = {  # how a store names a file, by its content
    "hub": lambda content: f"models--a--b/blobs/{hashlib.sha256(content).hexdigest()}",
    "hub, small files": lambda content: (
        f"models--a--b/blobs/{hashlib.sha1(b'blob %d' % len(content) + bytes(1) + content).hexdigest()}"
    ),
    "DVC": lambda content: re.sub("^(..)", r"files/md5/\1/", hashlib.md5(content).hexdigest()),
    "git-annex": lambda content: f"SHA256E-s{len(content)}--{hashlib.sha256(content).hexdigest()}.json",
}


def weights(folder: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The folder's weights, moved a little and rounded once."""
    with CheckpointReader(folder) as reader:
        moved = {name: reader.read(name).float() * 1.01 for name in reader.tensors}
        return {name: value.to(dtype or reader.tensors[name].dtype) for name, value in moved.items()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFolder:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_reloads_bit_equal(self, tmp_path, arch, tied):
        source = save_model(tmp_path / "instruct", arch, tied=tied, dtype=torch.bfloat16)
        given = weights(source)
        folder = export_folder(tmp_path / "out", source, given.items(), max_shard_bytes=20_000)
        assert len(list(folder.glob("*.safetensors"))) > 1
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        state = loaded.state_dict()
        assert loaded.dtype == torch.bfloat16 and ("lm_head.weight" in given) != tied
        assert all(torch.equal(state[name], value) for name, value in given.items())
        if tied:
            assert torch.equal(state["lm_head.weight"], given["model.embed_tokens.weight"])

    def test_is_the_instruct_in_everything_else(self, pair, instruct, tmp_path):
        kept = {
            "merges.txt": "m", "vocab.json": "{}", "special_tokens_map.json": "{}", "preprocessor_config.json": "{}",
            "tokenizer.model": "t", "LICENSE": "l", "USE_POLICY.md": "u", "modeling_x.py": "x",
        }  # fmt: skip
        left = ["README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf", "x.pth", ".gitattributes",
                "adapter_config.json", "old.safetensors"]  # fmt: skip
        for name in [*kept, *left]:
            (instruct / name).write_text(kept.get(name, "left"))
        for name in (".cache/x", ".git/config", "original/x.json", "additional_chat_templates/tool.jinja"):
            (instruct / name).parent.mkdir()
            (instruct / name).write_text("sub")
        folder = export_folder(tmp_path / "out", instruct, weights(instruct).items())
        own = {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }
        assert names(folder) == {*kept, *own, "model.safetensors", "shadowlit.json", "additional_chat_templates"}
        for name in {*kept, *own, "additional_chat_templates/tool.jinja"}:
            assert (folder / name).read_bytes() == (instruct / name).read_bytes()

    def test_tokenizer_and_template_load(self, pair, tmp_path):
        folder = export_folder(tmp_path / "out", pair.instruct_folder(), weights(pair.instruct_folder()).items())
        talk = [{"role": "user", "content": "hi"}]
        one, other = pair.tokenizer(), AutoTokenizer.from_pretrained(folder)
        assert one.apply_chat_template(talk, tokenize=False) == other.apply_chat_template(talk, tokenize=False)
        assert check_pair(ModelPair(pair.base, str(folder)), "all") == []

    def test_links_of_the_hub_cache_are_copied_by_content(self, pair, tmp_path):
        snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for path in pair.instruct_folder().iterdir():
            shutil.copyfile(path, blobs / f"blob-{path.name}")
            (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
        folder = export_folder(tmp_path / "out", snapshot, weights(snapshot).items())
        assert not any(path.is_symlink() for path in folder.iterdir())
        assert (folder / "config.json").read_bytes() == (snapshot / "config.json").read_bytes()

    @pytest.mark.parametrize("store", STORES)
    def test_links_into_a_store_are_copied_by_content(self, pair, tmp_path, store):
        """Old downloads to a local folder, DVC and git-annex link every file, weights too, from an ordinary folder."""
        folder = tmp_path / "instruct"
        folder.mkdir()
        for path in pair.instruct_folder().iterdir():
            content = path.read_bytes()
            held = tmp_path / "store" / STORES[store](content)
            held.parent.mkdir(parents=True, exist_ok=True)
            held.write_bytes(content)
            (folder / path.name).symlink_to(held if store == "hub" else os.path.relpath(held, folder))
        given = weights(folder)
        written = export_folder(tmp_path / "out", folder, given.items())
        assert names(written) == names(folder) | {"shadowlit.json"}
        assert not any(path.is_symlink() for path in written.iterdir())
        same = names(folder) - {"model.safetensors"}
        assert {name: (written / name).read_bytes() for name in same} == {
            name: (pair.instruct_folder() / name).read_bytes() for name in same
        }
        assert all(torch.equal(value, given[name]) for name, value in load_file(written / "model.safetensors").items())

    def test_a_tied_head_that_is_stored_stays(self, instruct, tmp_path):
        tensors = load_file(instruct / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, instruct / "model.safetensors", metadata={"format": "pt"})
        folder = export_folder(tmp_path / "out", instruct, tensors.items())
        assert "lm_head.weight" in CheckpointReader(folder).tensors
        assert reload_logits(folder, IDS, MASK).shape == (2, 9, 272)

    def test_another_dtype_is_written_to_the_config(self, instruct, tmp_path):
        given = weights(instruct, torch.bfloat16)
        folder = export_folder(tmp_path / "out", instruct, given.items(), torch.bfloat16)
        before, after = (json.loads((f / "config.json").read_text()) for f in (instruct, folder))
        assert before.pop("dtype") == "float32" and after.pop("dtype") == "bfloat16" and before == after
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16

    def test_old_and_nested_dtype_keys(self, instruct, tmp_path):
        path = instruct / "config.json"
        config = json.loads(path.read_text())
        del config["dtype"]
        path.write_text(
            json.dumps(config | {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "note": "\ud800"})
        )
        folder = export_folder(tmp_path / "out", instruct, weights(instruct, torch.float16).items(), torch.float16)
        after = json.loads((folder / "config.json").read_text())
        assert (after["torch_dtype"], after["text_config"]) == ("float16", {"dtype": "float16"})
        assert "dtype" not in after and after["note"] == "\ud800"  # half of a pair: JSON knows it, UTF-8 doesn't

    def test_manifest_and_provenance(self, pair, tmp_path):
        manifest = build_manifest(pair, scale=0.5, select="linear", metrics={"val/grafted/loss": 1.25})
        folder = export_folder(
            tmp_path / "out", pair.instruct_folder(), weights(pair.instruct_folder()).items(), manifest=manifest
        )
        assert read_manifest(folder) == dict(manifest)
        text = (folder / "shadowlit.json").read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        with safe_open(folder / "model.safetensors", "pt") as file:
            header = file.metadata()
        assert header["format"] == "pt" and header["shadowlit.scale"] == "0.5"
        assert json.loads(header["shadowlit.base"])["fingerprint"] == pair.fingerprints()["base"]


class TestRefusals:
    def refuse(self, source: Path, target: Path, tensors: dict, message: str, dtype=None) -> None:
        with pytest.raises(ExportError, match=message):
            export_folder(target, source, tensors.items(), dtype)
        assert not target.exists() and not list(target.parent.glob(".*"))

    @pytest.mark.parametrize("store", STORES)
    def test_a_file_that_only_looks_like_one_of_a_store_is_refused(self, instruct, tmp_path, store):
        private = tmp_path / STORES[store](b"another content")
        private.parent.mkdir(parents=True, exist_ok=True)
        private.write_text("secret")
        (instruct / "notes.txt").symlink_to(private)
        self.refuse(instruct, tmp_path / "out", weights(instruct), "which lies outside")

    def test_a_full_disk_is_found_before_anything_is_written(self, instruct, tmp_path, monkeypatch):
        """By the size that is written in the end, except for the manifest."""
        given = weights(instruct)
        written = export_folder(tmp_path / "whole", instruct, given.items(), max_shard_bytes=20_000)
        size = sum(path.stat().st_size for path in written.iterdir())
        expected = model_bytes(instruct, CheckpointReader(instruct).tensors, None, 20_000)
        num_shards = len(list(written.glob("*.safetensors")))
        assert size - 20_000 < expected <= size + 2 * 128 * 1024 and num_shards > 2
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))
        free = expected
        export_folder(tmp_path / "out", instruct, given.items(), max_shard_bytes=20_000)
        free = expected - 1
        message = (
            rf"/no will take {expected:,} bytes, but only {free:,} bytes are free on the disk of {tmp_path}\. Free"
        )
        with pytest.raises(ExportError, match=message):
            export_folder(tmp_path / "no", instruct, iter(()), max_shard_bytes=20_000)
        assert names(tmp_path) == {"instruct", "whole", "out"}

    def test_missing_tensors(self, instruct, tmp_path):
        given = weights(instruct)
        del given["model.norm.weight"], given["model.layers.1.mlp.up_proj.weight"]
        message = r"2 of 24 tensors .* not given: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"
        self.refuse(instruct, tmp_path / "out", given, message)

    def test_unknown_tensor(self, instruct, tmp_path):
        given = weights(instruct) | {"lm_head.weight": torch.ones(2)}
        self.refuse(instruct, tmp_path / "out", given, r"'lm_head\.weight' is not among .*24.*leave out a tied")

    def test_other_shape(self, instruct, tmp_path):
        given = weights(instruct) | {"model.norm.weight": torch.ones(16)}
        self.refuse(instruct, tmp_path / "out", given, r"'model\.norm\.weight' has shape \[16\], .* \[32\]")

    @pytest.mark.parametrize(("given", "dtype"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
    def test_dtype_that_is_not_the_final_one(self, instruct, tmp_path, given, dtype):
        message = r"is (bfloat16|float32), expected (bfloat16|float32)\. Round it once"
        self.refuse(instruct, tmp_path / "out", weights(instruct, given), message, dtype)

    def test_no_config(self, instruct, tmp_path):
        (instruct / "config.json").unlink()
        self.refuse(instruct, tmp_path / "out", weights(instruct), "has no config.json")

    def test_nan(self, instruct, tmp_path):
        given = weights(instruct)
        given["model.norm.weight"][3] = float("nan")
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has 1 of 32 values"):
            export_folder(tmp_path / "out", instruct, given.items())
        assert names(tmp_path) == {"instruct"}

    @pytest.mark.parametrize(
        "name", ["notes.txt", "config.json", "tokenizer.json", "additional_chat_templates/x.jinja"]
    )
    def test_link_that_leaves_the_folder(self, instruct, tmp_path, name):
        (tmp_path / "private.json").write_text("{}")
        (instruct / name).unlink(missing_ok=True)
        (instruct / name).parent.mkdir(exist_ok=True)
        (instruct / name).symlink_to(tmp_path / "private.json")
        message = (
            rf"{name} is a link to {tmp_path}/private\.json, which lies outside of {instruct}.*put the file itself"
        )
        self.refuse(instruct, tmp_path / "out", weights(instruct), message)

    def test_link_to_a_folder_outside(self, instruct, tmp_path):
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets" / "key").write_text("k")
        (instruct / "additional_chat_templates").symlink_to(tmp_path / "secrets")
        (instruct / "other").symlink_to(tmp_path / "secrets")  # folders are not copied
        self.refuse(instruct, tmp_path / "out", weights(instruct), "secrets/key, which lies outside")

    def test_blobs_of_the_cache_are_its_own_model_s(self, pair, tmp_path):
        """A link into another model's blobs, or out of blobs that are a link themselves, is not followed."""
        for model in ("one", "other"):
            (tmp_path / model / "blobs").mkdir(parents=True)
            (tmp_path / model / "blobs" / "x").write_text("x")
        snapshot = Path(shutil.copytree(pair.instruct, tmp_path / "one" / "snapshots" / "abc"))
        (snapshot / "notes.txt").symlink_to("../../../other/blobs/x")
        self.refuse(snapshot, tmp_path / "out", weights(snapshot), "other/blobs/x, which lies outside")
        (snapshot / "notes.txt").unlink()
        (snapshot / "notes.txt").symlink_to("../../blobs/x")
        assert (export_folder(tmp_path / "own", snapshot, weights(snapshot).items()) / "notes.txt").read_text() == "x"
        shutil.rmtree(tmp_path / "one" / "blobs")
        (tmp_path / "one" / "blobs").symlink_to(tmp_path / "other" / "blobs")
        self.refuse(snapshot, tmp_path / "out", weights(snapshot), "other/blobs/x, which lies outside")

    def test_link_inside_the_folder_is_copied(self, instruct, tmp_path):
        (instruct / "copy.json").symlink_to("config.json")
        (tmp_path / "alias").symlink_to(instruct)
        folder = export_folder(tmp_path / "out", tmp_path / "alias", weights(instruct).items())
        assert (folder / "copy.json").read_bytes() == (instruct / "config.json").read_bytes()
        assert not (folder / "copy.json").is_symlink()

    def test_links_that_lead_nowhere_and_pipes(self, instruct, tmp_path):
        given = weights(instruct)
        (instruct / "merges.txt").symlink_to(tmp_path / "gone")
        self.refuse(instruct, tmp_path / "out", given, r"merges\.txt is a broken link.*Finish the download")
        (instruct / "merges.txt").unlink()
        (instruct / "merges.txt").symlink_to("merges.txt")
        self.refuse(instruct, tmp_path / "out", given, r"merges\.txt is a broken link")
        (instruct / "merges.txt").unlink()
        os.mkfifo(instruct / "merges.txt")
        self.refuse(instruct, tmp_path / "out", given, r"merges\.txt is a pipe.*expected a file")

    @pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\ud800"])
    @pytest.mark.parametrize("dtype", [None, torch.float32])
    def test_broken_config(self, instruct, tmp_path, text, dtype):
        (instruct / "config.json").write_text(text, "utf-8", "surrogatepass")
        with pytest.raises(PairError, match=rf"{instruct}/config\.json (is not readable JSON|holds a list)"):
            export_folder(tmp_path / "out", instruct, weights(instruct).items(), dtype)
        assert names(tmp_path) == {"instruct"}

    def test_crash_in_the_middle(self, instruct, tmp_path):
        def crash():
            yield next(iter(weights(instruct).items()))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_folder(tmp_path / "out", instruct, crash())
        assert names(tmp_path) == {"instruct"}

    def test_full_disk(self, instruct, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", full)
        self.refuse(instruct, tmp_path / "out", weights(instruct), r"could not be written.*No space left.*free space")

    def test_existing_target(self, instruct, tmp_path):
        before = {path.name: path.read_bytes() for path in instruct.iterdir()}
        with pytest.raises(ExportError, match="exists and is not empty"):
            export_folder(instruct, instruct, weights(instruct).items())
        assert {path.name: path.read_bytes() for path in instruct.iterdir()} == before


@pytest.fixture(scope="module")
def trained(pair):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.instruct), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model


class TestAdapter:
    def test_loads_on_the_instruct(self, pair, trained, tmp_path):
        folder = export_adapter(
            tmp_path / "adapter", pair, trained.peft_config["default"], get_peft_model_state_dict(trained),
            build_manifest(pair, scale=1.0, select="linear"),
        )  # fmt: skip
        assert names(folder) == {
            "adapter_model.safetensors", "adapter_config.json", "shadowlit.json", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja",
        }  # fmt: skip
        reference = trained(input_ids=IDS, attention_mask=MASK).logits
        untouched = AutoModelForCausalLM.from_pretrained(pair.instruct)
        assert logit_difference(untouched(IDS, attention_mask=MASK).logits, reference, MASK)["rms"] > 1e-2
        for loaded in (PeftModel.from_pretrained(untouched, folder), AutoPeftModelForCausalLM.from_pretrained(folder)):
            assert torch.equal(loaded.eval()(input_ids=IDS, attention_mask=MASK).logits, reference)
        config = PeftConfig.from_pretrained(folder)
        assert Path(config.base_model_name_or_path) == Path(pair.instruct).resolve() and config.inference_mode
        assert trained.peft_config["default"].inference_mode is False

    def test_names_the_instruct_at_its_commit(self, pair, trained, tmp_path, monkeypatch):
        commit = "0123456789" * 4
        snapshot = shutil.copytree(pair.instruct, tmp_path / "snapshots" / commit)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
        on_hub = ModelPair(pair.base, "org/instruct")
        state = get_peft_model_state_dict(trained)
        folder = export_adapter(tmp_path / "adapter", on_hub, trained.peft_config["default"], state)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/instruct", commit)
        assert config["target_modules"] == sorted(config["target_modules"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"use_dora": True}, "use_dora=True"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'")],
    )
    def test_refuses_what_means_something_else_on_the_instruct(self, pair, trained, tmp_path, options, message):
        state = get_peft_model_state_dict(trained)
        with pytest.raises(
            ExportError,
            match=f"{message} updates the Instruct differently from the Base.*Export the grafted model instead",
        ):
            export_adapter(tmp_path / "adapter", pair, LoraConfig(r=4, **options), state)
        assert names(tmp_path) == set()

    def test_refuses_names_that_peft_would_skip(self, pair, trained, tmp_path):
        config = trained.peft_config["default"]
        live = {name: value for name, value in trained.state_dict().items() if "lora_" in name}
        with pytest.raises(ExportError, match=r"28 of 28 names .*get_peft_model_state_dict"):
            export_adapter(tmp_path / "adapter", pair, config, live)
        with pytest.raises(ExportError, match="no tensor that PEFT would not load"):
            export_adapter(tmp_path / "adapter", pair, config, {})

    def test_nan(self, pair, trained, tmp_path):
        state = {
            name: torch.full_like(value, float("nan")) for name, value in get_peft_model_state_dict(trained).items()
        }
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            export_adapter(tmp_path / "adapter", pair, trained.peft_config["default"], state)
        assert names(tmp_path) == set()


class TestManifest:
    def test_content(self, pair):
        @dataclasses.dataclass
        class Coverage:
            num_tensors: int = 14
            names: tuple[str, ...] = ("a", "b")

        manifest = build_manifest(
            pair, scale=1.0, select=["q_proj"], dtype=torch.bfloat16, coverage=Coverage(),
            survival={"share": torch.tensor(0.5)}, metrics={"val/grafted/loss": float("nan"), "x": float("inf")},
            config={"out": Path("runs"), "set": {"b", "a"}},
        )  # fmt: skip
        assert json.loads(json.dumps(manifest, allow_nan=False)) == manifest
        assert manifest["instruct"] == {
            "id": pair.instruct, "revision": None, "commit": None, "fingerprint": pair.fingerprints()["instruct"],
        }  # fmt: skip
        assert manifest["select"] == ["q_proj"] and manifest["dtype"] == "bfloat16"
        assert manifest["coverage"] == {"num_tensors": 14, "names": ["a", "b"]}
        assert manifest["survival"] == {"share": 0.5}
        assert manifest["metrics"] == {"val/grafted/loss": "nan", "x": "inf"}
        assert manifest["config"] == {"out": "runs", "set": ["a", "b"]}
        assert manifest["versions"]["torch"] == torch.__version__
        assert set(manifest["versions"]) == {
            "python", "shadowlit", "torch", "transformers", "peft", "lightning", "safetensors",
        }  # fmt: skip

    def test_adding(self, tmp_path):
        with pytest.raises(ExportError, match=r"shadowlit\.json cannot be read.*that shadowlit exported"):
            add_to_manifest(tmp_path, {"a": 1})
        (tmp_path / "shadowlit.json").write_text('{"ü": 1}', encoding="utf-8")
        add_to_manifest(tmp_path, {"logits": {"max_abs": 0.5}})
        assert read_manifest(tmp_path) == {"ü": 1, "logits": {"max_abs": 0.5}}
        assert names(tmp_path) == {"shadowlit.json"}
