"""The registry of known pairs is well-formed; `pairs` lists it, explains it, and checks pairs without their weights."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from safetensors.torch import load_file, save_file

from shadowlit.cli.main import main
from shadowlit.errors import PairError
from shadowlit.pair.check import check_pair
from shadowlit.pair.hub import unreachable
from shadowlit.pair.pair import ModelPair
from shadowlit.pair.registry import find_pair, load_registry, parse_registry
from tests.tiny import save_model, save_pair

REGISTRY = load_registry()
TEXT = (Path(__file__).parents[2] / "shadowlit/pair/pairs.yaml").read_text()
COMMIT = "c" * 40


def registry_of(**entry: object) -> str:
    """A registry of one entry."""
    values = {"name": "a-1", "base": "org/a", "instruct": "org/a-it"} | entry
    pairs = [{key: value for key, value in values.items() if value != "absent"}]
    return yaml.safe_dump({"peculiarities": {"tied": "One."}, "families": [{"family": "a", "pairs": pairs}]})


class TestEntries:
    @pytest.mark.parametrize("pair", REGISTRY.values(), ids=list(REGISTRY))
    def test_is_well_formed(self, pair):
        """The rules once more, in other words than the parser's."""
        for model in (pair.base, pair.instruct):
            organisation, name = model.split("/")
            assert organisation and name and model == model.strip() and not set(model) & set(" :@")
        assert pair.base != pair.instruct
        assert pair.name == pair.name.lower() and REGISTRY[pair.name] is pair
        for revision in (pair.base_revision, pair.instruct_revision):
            assert revision is None or len(bytes.fromhex(revision)) == 20
        assert pair.template_owner == "instruct"  # the only one that the rest of the package knows
        assert all(sentence.endswith(".") for sentence in pair.peculiarities.values())
        assert pair.sigma is None or 0 < pair.sigma < 0.1
        assert pair.official != (pair.base, pair.instruct)
        assert pair.pair() == ModelPair(pair.base, pair.instruct, pair.base_revision, pair.instruct_revision)

    def test_no_pair_twice_and_no_name_twice(self):
        assert len({(pair.base, pair.instruct) for pair in REGISTRY.values()}) == len(REGISTRY)
        assert len(re.findall(r"- name: ", TEXT)) == len(REGISTRY)

    def test_one_model_has_one_commit(self):
        commits: dict[str, set[str | None]] = {}
        for pair in REGISTRY.values():
            commits.setdefault(pair.base, set()).add(pair.base_revision)
            commits.setdefault(pair.instruct, set()).add(pair.instruct_revision)
        assert not {model: found for model, found in commits.items() if len(found) > 1}

    def test_every_peculiarity_is_used(self):
        used = {word for pair in REGISTRY.values() for word in pair.peculiarities}
        assert used == set(yaml.safe_load(TEXT)["peculiarities"])

    def test_families(self):
        families = {pair.family for pair in REGISTRY.values()}
        assert families >= {
            "llama-3.1",
            "llama-3.2",
            "qwen2.5",
            "qwen3",
            "qwen3-moe",
            "qwen3-2507",
            "gemma-2",
            "gemma-3",
        }
        assert families >= {"mistral", "falcon-3", "yi", "seed-coder", "baichuan2", "internlm2", "internlm2.5"}
        assert "glm-4-0414" in families

    def test_the_official_list_is_there_and_put_right(self):
        """examples/model_pair.json of wutaiqiang/Shadow-FT, 31 entries: 14 with an id of no model or another one."""
        wrong = {pair.official for pair in REGISTRY.values() if pair.official}
        right = {(pair.base, pair.instruct) for pair in REGISTRY.values()}
        assert len(OFFICIAL) == 31 and len(wrong) == 14
        assert wrong <= OFFICIAL and wrong | right >= OFFICIAL and not wrong & right

    def test_published_similarities(self):
        known = {pair.name: pair.sigma for pair in REGISTRY.values() if pair.sigma}
        assert known == {"llama-3.1-8b": 0.016, "qwen3-4b-2507": 0.056}

    @pytest.mark.hub
    @pytest.mark.parametrize("pair", REGISTRY.values(), ids=list(REGISTRY))
    def test_exists_on_the_hub(self, pair, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for model, revision in ((pair.base, pair.base_revision), (pair.instruct, pair.instruct_revision)):
            info = huggingface_hub.HfApi().model_info(model, revision=revision)
            assert info.id == model and (revision is None or info.sha == revision)
            assert pair.gated is None or bool(info.gated) == pair.gated
            assert pair.licence is None or f"license:{pair.licence}" in info.tags


def _official() -> set[tuple[str, str]]:
    same_suffix = {"01-ai/Yi-6B": "-Chat", "01-ai/Yi-Coder-9B": "-Chat", "01-ai/Yi-Coder-1.5B": "-Chat"}
    same_suffix |= {"baichuan-inc/Baichuan2-7B": "-Chat", "THUDM/glm-4-32b": "-chat"}
    same_suffix |= {
        f"Qwen/Qwen2.5-{size}": kind for size, kind in (("32B", "-Chat"), ("14B", "-Instruct"), ("7B", "-Chat"))
    }
    same_suffix |= {f"tiiuae/falcon-{size}b": "-instruct" for size in (1, 3, 7, 10)}
    same_suffix |= {f"google/gemma-{size}b": "-it" for size in ("2-2", "2-9", "3-1", "3-4", "3-12", "3-27")}
    same_suffix |= {f"internlm/internlm2-{size}": "-chat" for size in ("7b", "1_8b")}
    same_suffix |= {f"internlm/internlm2_5-{size}": "-chat" for size in ("7b", "1_8b", "20b")}
    pairs = {(base, base + suffix) for base, suffix in same_suffix.items()}
    pairs |= {(f"Qwen/Qwen3-{s}-Base", f"Qwen/Qwen3-{s}") for s in ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B")}
    pairs |= {("ByteDance-Seed/Seed-Coder-8B-Base", "ByteDance-Seed/Seed-Coder-8B-Instruct")}
    return pairs | {("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1")}


OFFICIAL = _official()


class TestParser:
    def test_a_family_gives_what_its_pairs_have_in_common(self):
        family = {"family": "f", "gated": True, "licence": "mit", "peculiarities": ["tied"]}
        pairs = [
            {"name": "a", "base": "o/a", "instruct": "o/b", "peculiarities": ["moe"], "licence": None},
            {"name": "c", "base": "o/c", "instruct": "o/d", "gated": False},
        ]
        document = {"peculiarities": {"tied": "T.", "moe": "M."}, "families": [family | {"pairs": pairs}]}
        first, second = parse_registry(yaml.safe_dump(document)).values()
        assert (first.gated, first.licence, dict(first.peculiarities)) == (True, None, {"tied": "T.", "moe": "M."})
        assert (second.gated, second.licence, dict(second.peculiarities)) == (False, "mit", {"tied": "T."})

    @pytest.mark.parametrize(
        ("entry", "told"),
        [
            ({"name": "Qwen3-4B"}, r"'Qwen3-4B'.*name is 'Qwen3-4B'.*lower-case"),
            ({"name": "absent"}, r"'org/a'.*name is None"),
            ({"instruct": "absent"}, r"'a-1'.*instruct is None.*'org/name'"),
            ({"base": "gemma-3-4b"}, r"'a-1'.*base is 'gemma-3-4b'"),
            ({"base": "org/a "}, r"'a-1'.*base is 'org/a '"),
            ({"instruct": "org/a"}, r"'a-1'.*both 'org/a'.*two models"),
            ({"base_revison": COMMIT}, r"'a-1'.*unknown key 'base_revison'.*'base_revision'"),
            ({"base_revision": "main"}, r"'a-1'.*base_revision is 'main'.*40 hexadecimal"),
            ({"instruct_revision": 7}, r"'a-1'.*instruct_revision is 7"),
            ({"template_owner": "both"}, r"'a-1'.*template_owner is 'both'"),
            ({"gated": "auto"}, r"'a-1'.*gated is 'auto'.*true, false or null"),
            ({"licence": 2.0}, r"'a-1'.*licence is 2\.0"),
            ({"sigma": 1.6}, r"'a-1'.*sigma is 1\.6.*between 0 and 1"),
            ({"peculiarities": ["tied", "tide"]}, r"'a-1'.*'tide' is not explained.*\['tied'\]"),
            ({"official": {"base": "org/a", "instruct": "org/a-it"}}, r"'a-1'.*the same two models"),
            ({"official": ["org/a"]}, r"'a-1'.*official is \['org/a'\]"),
        ],
    )
    def test_an_ill_formed_entry_is_named(self, entry, told):
        with pytest.raises(PairError, match=rf"(?s)Entry {told}.*pairs\.yaml"):
            parse_registry(registry_of(**entry))

    def test_a_name_twice(self):
        document = yaml.safe_load(registry_of())
        document["families"] *= 2
        with pytest.raises(PairError, match=r"'a-1'.*two entries"):
            parse_registry(yaml.safe_dump(document))

    @pytest.mark.parametrize("text", ["", "{", "[]", "families: []"])
    def test_no_registry(self, text):
        with pytest.raises(PairError, match="not YAML with 'peculiarities' and 'families'"):
            parse_registry(text)

    def test_the_nearest_names(self):
        assert find_pair("qwen3-4b").instruct == "Qwen/Qwen3-4B"
        with pytest.raises(PairError, match=r"no known pair 'Gemma-3-4b-pt'.*Did you mean 'gemma-3-4b'.*two folders"):
            find_pair("Gemma-3-4b-pt")


class TestList:
    def test_lists_every_pair_without_torch(self):
        shown = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "shadowlit", "pairs"], capture_output=True, text=True, check=True
        )
        lines = shown.stdout.splitlines()
        for pair in REGISTRY.values():
            (line,) = [line for line in lines if f" {pair.name} " in line]
            assert f" {pair.base} " in line and f" {pair.instruct} " in line
            assert all(word in line for word in pair.peculiarities)
        modules = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
        assert "yaml" in modules and not modules & {"torch", "transformers", "huggingface_hub", "safetensors"}

    def test_show_prints_a_section_for_a_config(self, capsys):
        assert main(["pairs", "show", "qwen3-4b-2507"]) == 0
        shown = capsys.readouterr().out
        assert "0.056" in shown and "rope_theta" in shown
        pair = find_pair("qwen3-4b-2507")
        section = yaml.safe_load(shown[shown.index("pair:\n") :])["pair"]
        assert ModelPair(**section) == pair.pair() and len(section) == 4

    def test_show_leaves_out_what_is_not_known(self, capsys):
        assert main(["pairs", "show", "falcon3-7b"]) == 0
        shown = capsys.readouterr().out
        assert "tiiuae/falcon-7b and tiiuae/falcon-7b-instruct, which is not this pair" in shown
        assert "None" not in shown and "_revision" not in shown

    def test_show_names_the_nearest(self, capsys):
        assert main(["pairs", "show", "llama-3.1-8"]) == 1
        assert "Did you mean 'llama-3.1-8b'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A Base and an Instruct that fit."""
    return save_pair(tmp_path_factory.mktemp("pair"))


class TestCheckFolders:
    def test_a_pair_that_fits(self, folders, capsys):
        assert main(["pairs", "check", *map(str, folders)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == (
            "0 errors, 0 warnings, 0 notes: a graft of 'linear' is possible."
        )

    def test_a_misfit(self, folders, tmp_path, capsys):
        other = save_model(tmp_path / "other", "llama")
        assert main(["pairs", "check", str(other), str(folders[1])]) == 1
        shown = capsys.readouterr()
        assert re.search(
            r"^error +architecture: model_type is 'llama' in the Base, 'qwen3' in.* To do: ", shown.out, re.M
        )
        assert re.fullmatch(r"error: \d errors, .*a graft of 'linear' is not possible until the errors.*\n", shown.err)

    def test_what_is_selected_decides(self, folders, tmp_path, capsys):
        other = save_model(tmp_path / "other", vocab_size=280)
        assert main(["pairs", "check", str(other), str(folders[1])]) == 0
        assert main(["pairs", "check", str(other), str(folders[1]), "--select=all"]) == 1
        assert main(["pairs", "check", str(other), str(folders[1]), "--select", '["embed","q_proj"]']) == 1
        assert "error     vocabulary: Base and Instruct are unequal" in capsys.readouterr().out

    def test_data_are_read_too(self, folders, tmp_path, capsys):
        """A row of zeros is in no header."""
        base = shutil.copytree(folders[0], tmp_path / "base")
        tensors = load_file(base / "model.safetensors")
        tensors["model.embed_tokens.weight"][258].zero_()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        assert main(["pairs", "check", str(base), str(folders[1])]) == 0
        assert "untrained tokens" in capsys.readouterr().out

    @pytest.mark.parametrize("words", [[], ["a/b", "c/d", "e/f"]])
    def test_a_wrong_number_of_models(self, words, capsys):
        try:
            status = main(["pairs", "check", *words])
        except SystemExit as stop:
            status = stop.code
        assert status in (1, 2) and "pair" in capsys.readouterr().err.lower()

    def test_an_unknown_name(self, capsys):
        assert main(["pairs", "check", "qwen3-4"]) == 1
        assert "Did you mean 'qwen3-4b'" in capsys.readouterr().err


class Hub:
    """A hub on this machine: what huggingface_hub asks of it, and what it sent."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent: list[tuple[str, int]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                status, headers, data = hub.answer(self.path.split("?")[0], self.headers.get("Range"))
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    hub.sent.append((self.path.split("?")[0], len(data)))
                    self.wfile.write(data)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, path: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/(revision|tree)/\w+", path):
            files = [file for file in sorted((self.root / match[1]).iterdir()) if file.is_file()]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            info = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            return 200, {}, json.dumps(info if match[2] == "revision" else tree).encode()
        match = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path)
        if not match or not (self.root / match[1] / match[2]).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = (self.root / match[1] / match[2]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if span:
            start, stop = map(int, span.removeprefix("bytes=").split("-"))
            return 206, headers, data[start : stop + 1]
        return 200, headers, data


class TestCheckHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch) -> Iterator[Hub]:
        """A hub with org/base and org/instruct, whose weights are much longer than their headers."""
        hub = Hub(tmp_path / "hub")
        endpoint = f"http://127.0.0.1:{hub.server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        unreachable.cache_clear()
        yield hub
        unreachable.cache_clear()
        hub.server.shutdown()
        hub.server.server_close()

    @pytest.mark.parametrize(("shard_size", "num_files"), [("5GB", 1), ("500KB", 3)])
    def test_no_weights_are_downloaded(self, hub, tmp_path, shard_size, num_files):
        base, instruct = save_pair(hub.root / "org", hidden=128, shard_size=shard_size)
        weights = list(base.glob("*.safetensors"))
        assert len(weights) == num_files
        problems = check_pair(ModelPair("org/base", "org/instruct", COMMIT, COMMIT), "all", download=False)
        (note,) = problems
        assert (note.severity, note.subject) == ("note", "weights")
        assert "only the headers of the Base and the Instruct were read" in note.found
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        ranges = [size for path, size in hub.sent if path.endswith(".safetensors")]
        assert len(ranges) == 2 * len(weights) and max(ranges) <= 100_001  # the client's first guess of a header
        whole = sum(file.stat().st_size for folder in (base, instruct) for file in folder.glob("*.safetensors"))
        assert sum(ranges) < whole

    def test_headers_tell_what_does_not_fit(self, hub, capsys):
        save_model(hub.root / "org/base", vocab_size=280)
        save_model(hub.root / "org/instruct", layers=3)
        assert main(["pairs", "check", "org/base", "org/instruct", "--select=all"]) == 1
        shown = capsys.readouterr()
        assert "only the Instruct has 11 of its 35 tensors (model.layers.2." in shown.out
        assert "model.embed_tokens.weight has 280 rows and 272" in shown.out
        assert "'org/base' is read at its main branch, which can move" in shown.out
        assert re.search(r"^error +config: layer_types is ", shown.out, re.M) and "3 errors, " in shown.err

    def test_a_folder_beside_a_hub_id(self, hub, tmp_path):
        base, _ = save_pair(hub.root / "org")
        local = shutil.copytree(base, tmp_path / "local")
        (note,) = check_pair(ModelPair(str(local), "org/instruct", instruct_revision=COMMIT), download=False)
        assert "only the headers of the Instruct" in note.found

    def test_weights_that_are_here_already_are_read(self, hub):
        save_pair(hub.root / "org")
        pair = ModelPair("org/base", "org/instruct", COMMIT, COMMIT)
        assert check_pair(pair, "all") == []
        hub.sent.clear()
        assert check_pair(pair, "all", download=False) == []
        assert not [path for path, _ in hub.sent if path.endswith(".safetensors")]

    def test_a_checked_pair_can_be_downloaded_afterwards(self, hub):
        save_pair(hub.root / "org")
        pair = ModelPair("org/base", "org/instruct", COMMIT, COMMIT)
        assert len(check_pair(pair, download=False)) == 1
        assert check_pair(pair) == []

    def test_pickled_weights(self, hub):
        save_pair(hub.root / "org")
        (hub.root / "org/base/model.safetensors").rename(hub.root / "org/base/pytorch_model.bin")
        problems = check_pair(ModelPair("org/base", "org/instruct", COMMIT, COMMIT), download=False)
        assert problems[0].severity == "error" and problems[0].subject == "base weights"
        assert "'org/base' cannot be read from the hub (NotASafetensorsRepoError" in problems[0].found
        assert not [path for path, _ in hub.sent if path.endswith(".bin")]

    def test_an_index_that_does_not_match(self, hub):
        save_pair(hub.root / "org", shard_size="20KB")
        index = hub.root / "org/base/model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.extra.weight"] = content["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(content))
        problems = check_pair(ModelPair("org/base", "org/instruct", COMMIT, COMMIT), download=False)
        assert problems[0].severity == "error" and "names 'model.extra.weight' in " in problems[0].found

    def test_the_makers_own_copy_is_never_downloaded(self, hub, tmp_path):
        base, _ = save_pair(hub.root / "org")
        shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
        folder = ModelPair("org/base", "org/instruct", COMMIT, COMMIT).base_folder()
        assert (folder / "model.safetensors").exists() and not (folder / "consolidated.safetensors").exists()
