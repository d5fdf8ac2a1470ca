"""The disk room: what is read equals what is stored, what is written is what transformers loads, nothing is lost."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint.folder import CheckpointReader, CheckpointWriter, atomic_folder
from shadowlit.errors import CheckpointError, ExportError
from tests.tiny import save_model


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("single"), "qwen3", tied=True, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("sharded"), "llama", tied=False, shard_size="20KB")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def raw_file(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file byte by byte, broken where a test wants it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _closed(reader: CheckpointReader) -> CheckpointReader:
    reader.close()
    return reader


class TestReader:
    @pytest.mark.parametrize("form", ["single", "sharded"])
    def test_reads_what_transformers_saved(self, form, request):
        folder = request.getfixturevalue(form)
        files = sorted(folder.glob("*.safetensors"))
        stored = {name: value for file in files for name, value in load_file(file).items()}
        assert len(files) == (1 if form == "single" else 7)
        with CheckpointReader(folder) as reader:
            assert list(reader.tensors) == sorted(stored)
            for name, value in stored.items():
                info = reader.tensors[name]
                assert (info.dtype, info.shape) == (value.dtype, tuple(value.shape))
                assert (info.num_elements, info.num_bytes) == (value.numel(), value.nbytes)
                assert torch.equal(reader.read(name), value)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_read_slice_equals_slicing(self, sharded, data):
        def part(size: int) -> slice:
            bound = st.none() | st.integers(-size - 2, size + 2)
            return slice(data.draw(bound), data.draw(bound), data.draw(st.none() | st.integers(1, 3)))

        with CheckpointReader(sharded) as reader:
            name = data.draw(st.sampled_from(sorted(reader.tensors)))
            whole = reader.read(name)
            slices = tuple(part(size) for size in whole.shape[: data.draw(st.integers(0, whole.dim()))])
            assert torch.equal(reader.read_slice(name, slices), whole[slices])

    def test_read_slice_reads_only_its_rows(self, single, monkeypatch):
        read, preadv = [], os.preadv
        monkeypatch.setattr(
            os, "preadv", lambda fd, buffers, at: read.append(len(buffers[0])) or preadv(fd, buffers, at)
        )
        CheckpointReader(single).read_slice("model.embed_tokens.weight", (slice(100, 103), slice(4, 8)))
        assert read == [3 * 32 * 2]

    def test_file_that_shrinks_after_opening(self, tmp_path):
        reader = CheckpointReader(save(tmp_path, {"a": torch.ones(1000)}))
        assert reader.read_slice("a", (slice(1),)).item() == 1  # from now on the file is open
        os.truncate(tmp_path / "model.safetensors", 2000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not .*ends before byte .*download"):
            reader.read("a")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="No such file"):
            _closed(reader).read("a")

    def test_file_that_is_replaced_after_its_header_was_read(self, tmp_path):
        """Another save under the same name: its bytes at the old offsets would be other tensors'."""
        reader = CheckpointReader(save(tmp_path, {"a": torch.ones(10), "b": torch.zeros(10)}))
        save(tmp_path, {"a": torch.zeros(9), "b": torch.ones(11)})
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not .*whose header was read"):
            reader.read("a")

    def test_file_that_shrinks_while_its_header_is_read(self, tmp_path, monkeypatch):
        save(tmp_path, {"a": torch.ones(1000)})
        fstat = os.fstat

        def then_cut(handle: int) -> os.stat_result:
            found = fstat(handle)
            os.truncate(tmp_path / "model.safetensors", 30)
            return found

        monkeypatch.setattr(os, "fstat", then_cut)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not .*header cannot be read"):
            CheckpointReader(tmp_path)

    def test_what_is_read_belongs_to_the_caller(self, single):
        with CheckpointReader(single) as reader:
            before = reader.read("model.norm.weight").clone()
            reader.read("model.norm.weight").zero_()
            rows = reader.read_slice("model.embed_tokens.weight", (slice(3, 5),))
            assert rows.untyped_storage().nbytes() == rows.nbytes  # no whole tensor hangs on two rows
            assert torch.equal(reader.read("model.norm.weight"), before)

    def test_reads_again_after_close(self, single):
        reader = CheckpointReader(single)
        before = reader.read("model.norm.weight")
        reader.close()
        assert torch.equal(reader.read("model.norm.weight"), before)

    def test_scalars_and_empty_tensors(self, tmp_path):
        reader = CheckpointReader(save(tmp_path, {"s": torch.tensor(3.0), "e": torch.zeros(0, 4)}))
        assert reader.read("s").item() == 3.0 and reader.read("s").shape == ()
        assert reader.read("e").shape == (0, 4)

    def test_unknown_names_and_too_many_slices(self, single):
        reader = CheckpointReader(single)
        with pytest.raises(CheckpointError, match=r"no tensor 'nope' in .*24 tensors.*right model"):
            reader.read("nope")
        with pytest.raises(CheckpointError, match=r"2 slices .* 1 dimensions \(32,\)"):
            reader.read_slice("model.norm.weight", (slice(1), slice(1)))
        with pytest.raises(CheckpointError, match=r"slice\(None, None, -1\) .* negative step"):
            reader.read_slice("model.norm.weight", (slice(None, None, -1),))

    def test_single_file_before_index_as_in_transformers(self, sharded, single, tmp_path):
        for file in sharded.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
        assert CheckpointReader(tmp_path).tensors == CheckpointReader(single).tensors

    def test_imports_no_transformers(self):
        code = "import sys, shadowlit.checkpoint.folder, shadowlit.pair.pair; sys.exit('transformers' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestBrokenFolders:
    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], r"holds no model\.safetensors and no .*nothing at all"),
            (["notes.txt"], r"1 other files \(notes\.txt\).*folder into which the model was saved"),
            (["pytorch_model.bin"], r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"),
            (["adapter_model.safetensors", "adapter_config.json"], r"files \(adapter_model\.safe.*Merge an adapter"),
            (["adapter_model.safetensors"], r"without its adapter_config\.json.* Copy that file from where"),
        ],
    )
    def test_no_safetensors(self, tmp_path, files, message):
        for name in files:
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
            CheckpointReader(tmp_path / "nowhere")

    def index(self, folder: Path, weight_map: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def test_index_names_missing_file(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        self.index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
        with pytest.raises(CheckpointError, match=r"names 2 files, of which 1 can't be found: y\.safetensors"):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b", "..", ""])
    def test_index_leaves_the_folder(self, tmp_path, file):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        (tmp_path / "in").mkdir()
        self.index(tmp_path / "in", {"a": file})
        with pytest.raises(CheckpointError, match=r"files outside of its folder.*do not trust"):
            CheckpointReader(tmp_path / "in")

    @pytest.mark.parametrize("listed", [["a", "c"], ["a"]])
    def test_index_and_shards_disagree(self, tmp_path, listed):
        save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
        self.index(tmp_path, dict.fromkeys(listed, "x.safetensors"))
        with pytest.raises(CheckpointError, match=r"not match.*it doesn't list 1 tensor of the shards \(b\)") as error:
            CheckpointReader(tmp_path)
        assert ("it names the wrong file for 1 tensor (c)" in str(error.value)) == ("c" in listed)

    def test_shards_without_their_index(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
        with pytest.raises(
            CheckpointError, match=r"shards \(model-00002-of-00002\..*\) without their index\. Copy the"
        ):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize(
        "text",
        ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, '{"weight_map": {}, "x": NaN}'],
    )
    def test_broken_index(self, tmp_path, text):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json .*(JSON|weight_map).*again"):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "x" * 1001])
    def test_names_that_no_tensor_has(self, tmp_path, name):
        """In the index and in a header; messages show them without their control characters."""
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
        self.index(tmp_path, {"a": "x.safetensors", name: "x.safetensors"})
        with pytest.raises(CheckpointError, match=r"index\.json has names that no tensor has.*1 to 1000") as error:
            CheckpointReader(tmp_path)
        assert str(error.value).isprintable()
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        raw_file(tmp_path / "model.safetensors", {name: entry}, b"0000")
        with pytest.raises(CheckpointError, match=r"model\.safetensors .*a tensor named .*1 to 1000") as error:
            CheckpointReader(tmp_path)
        assert str(error.value).isprintable()

    @pytest.mark.parametrize("text", [
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        '{"weight_map": {"a": "y.safetensors"}, "weight_map": {"a": "x.safetensors"}}',
    ])  # fmt: skip
    def test_index_with_a_key_twice(self, tmp_path, text):
        for file in ("x.safetensors", "y.safetensors"):
            save_file({"a": torch.ones(2)}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"index\.json is not readable JSON \(the key '(a|weight_map)' occurs twi"
        ):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize("link", [os.symlink, os.link])
    def test_index_with_two_names_for_one_file(self, tmp_path, link):
        save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
        link(tmp_path / "x.safetensors", tmp_path / "X.safetensors")
        self.index(tmp_path, {"a": "x.safetensors", "b": "X.safetensors"})
        with pytest.raises(CheckpointError, match=r"names one file twice, as X\.safetensors and as x\.safetensors"):
            CheckpointReader(tmp_path)

    def test_index_of_absurd_size_is_not_read(self, tmp_path):
        (tmp_path / "model.safetensors.index.json").touch()
        os.truncate(tmp_path / "model.safetensors.index.json", 2**40)
        with pytest.raises(CheckpointError, match=r"index\.json has 1099511627776 bytes, expected at most 100000000"):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize("place", ["single", "index", "shard"])
    @pytest.mark.parametrize(
        ("kind", "message"),
        [("folder", "is a folder"), ("pipe", "is a pipe, socket or device"), ("device", "is a pipe, socket or device"),
         ("loop", "is a link to .* cannot be read: .*links"), ("gone", "is a link to 'nowhere' and cannot be read")],
    )  # fmt: skip
    def test_what_is_no_file_is_never_opened(self, tmp_path, place, kind, message):
        """A pipe would wait for a writer for ever, /dev/zero never ends."""
        name = {"single": "model.safetensors", "index": "model.safetensors.index.json", "shard": "x.safetensors"}[place]
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"device": "/dev/zero", "loop": name, "gone": "nowhere"}[kind])
        if place == "shard":
            self.index(tmp_path, {"a": name})
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/{name} {message}"):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize("form", ["single", "sharded"])
    def test_links_to_files_are_read(self, tmp_path, form, request):
        """As in the hub's cache; also when weights lie on a larger disk."""
        source = request.getfixturevalue(form)
        for path in source.iterdir():
            (tmp_path / path.name).symlink_to(path)
        with CheckpointReader(tmp_path) as reader, CheckpointReader(source) as direct:
            assert reader.fingerprint() == direct.fingerprint()

    @pytest.mark.parametrize(
        ("header", "data", "message"),
        [
            (b"{nonsense", b"", "header cannot be read"),
            (b"   ", b"", "header cannot be read"),
            (b"{}x", b"", "header cannot be read: Extra data"),
            (b"[" * 100_000, b"", "header cannot be read: maximum recursion"),
            ('{"__metadata__": {"a": "\u00e9"}}'.encode("latin-1"), b"", "header cannot be read: 'utf-8'"),
            ('{"__metadata__": {}}'.encode("utf-16"), b"", "header cannot be read: 'utf-8'"),
            (b'{"\xed\xa0\x80": 1}', b"", "header cannot be read: 'utf-8'"),
            (b'{"\\ud800": 1}', b"", r"a tensor named '\\ud800', expected 1 to 1000 printable"),
            (b'{"a": NaN}', b"", "header cannot be read: NaN is not JSON"),
            (b'{"a": -Infinity}', b"", "header cannot be read: -Infinity is not JSON"),
            (b'{"a": 1, "a": 2}', b"", "the key 'a' occurs twice"),
            (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "the key 'dtype' occurs twice"),
            ({"__metadata__": None}, b"", "__metadata__ None are not a map of strings"),
            ({"__metadata__": {"format": 1}}, b"", "__metadata__ .* are not a map of strings"),
            ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, b"0000", "is not dtype, shape and data_offs"),
            (
                {"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}},
                b"0000",
                "is not dtype, shape and data_offs",
            ),
            ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"0000", "are not counts"),
            (b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [-0, 4]}}', b"0000", "are not counts"),
            ({"a": {"dtype": "F32", "shape": [10**19], "data_offsets": [0, 4]}}, b"0000", "are not counts"),
            (
                b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
                b"",
                "the number 9{200}… is out of range",
            ),
            (b'{"a": {"x": -1e999}}', b"", "the number -1e999 is out of range"),
            ({"a": {"dtype": "F32", "shape": [10**17] * 16, "data_offsets": [0, 4]}}, b"0000", "takes 4000000000000"),
            ({"a": {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}}, b"0000", "has 17 dimensions.* 16"),
            ({"a": {"dtype": "F32", "shape": [0, 2**32], "data_offsets": [0, 0]}}, b"", "but no elements"),
            ({"a": {"dtype": "F32", "shape": [10**17, 0], "data_offsets": [0, 0]}}, b"", "but no elements"),
            ([], b"", "not a JSON object"),
            ({"a": {"dtype": "F32"}}, b"", "is not dtype, shape and data_offsets"),
            ({"a": 7}, b"", "is not dtype, shape and data_offsets"),
            ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000", "are not counts"),
            ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"0000", "are not counts"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000", "takes 8 bytes, not 4"),
            ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000", "begins at byte"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"0000", "tensors end at byte"),
            ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"000000", "tensors end at byte"),
            ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0", "dtype F4; known are F64"),
        ],
    )
    def test_broken_header_names_the_file(self, tmp_path, header, data, message):
        raw_file(tmp_path / "model.safetensors", header, data)
        with pytest.raises(CheckpointError, match=message) as error:
            CheckpointReader(tmp_path)
        assert str(tmp_path / "model.safetensors") in str(error.value)

    def test_overlapping_tensors(self, tmp_path):
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        raw_file(tmp_path / "model.safetensors", {"a": entry, "b": entry}, b"0000")
        with pytest.raises(CheckpointError, match="begins at byte"):
            CheckpointReader(tmp_path)

    @pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
    def test_truncated(self, tmp_path, single, size):
        (tmp_path / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"not a valid safetensors file.*download or save it again"):
            CheckpointReader(tmp_path)

    def test_absurd_header_length_is_not_allocated(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
        with pytest.raises(CheckpointError, match="its header would have"):
            CheckpointReader(tmp_path)


class TestFingerprint:
    def fingerprint(self, folder: Path) -> str:
        with CheckpointReader(folder) as reader:
            return reader.fingerprint()

    def test_sees_values_names_dtypes_and_shapes(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        values = {"a": torch.randn(50, 7, generator=generator), "b": torch.zeros(4)}
        changed = {
            "same": values,
            "first": values | {"a": values["a"].index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(9.0))},
            "last": values | {"a": values["a"].index_put((torch.tensor(49), torch.tensor(6)), torch.tensor(9.0))},
            "name": {"a": values["a"], "c": values["b"]},
            "dtype": values | {"b": values["b"].int()},
            "shape": values | {"b": values["b"].view(2, 2)},
        }
        prints = {k: self.fingerprint(save(tmp_path / k, v)) for k, v in changed.items()}
        assert len(set(prints.values())) == len(changed)
        assert prints["same"] == self.fingerprint(save(tmp_path / "copy", values))

    def test_is_the_same_however_it_is_sharded(self, sharded, tmp_path):
        with CheckpointReader(sharded) as reader, CheckpointWriter(tmp_path) as writer:
            for name in reversed(reader.tensors):
                writer.add(name, reader.read(name))
        assert self.fingerprint(tmp_path) == self.fingerprint(sharded)

    def test_samples_both_ends_of_a_large_tensor(self, tmp_path):
        """32 blocks of 16 KiB out of 4 MiB: its ends are seen, a single value between two blocks is not."""
        value = torch.zeros(4 * 2**20, dtype=torch.uint8)
        prints = {}
        for at in (None, 0, value.numel() - 1, 16 * 1024 + 1):
            edited = value.clone()
            if at is not None:
                edited[at] = 1
            prints[at] = self.fingerprint(save(tmp_path / str(at), {"a": edited}))
        assert len({prints[None], prints[0], prints[value.numel() - 1]}) == 3
        assert prints[16 * 1024 + 1] == prints[None]


class TestWriter:
    @pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 10**9])
    @pytest.mark.parametrize("form", ["single", "sharded"])
    def test_transformers_loads_the_same_bits(self, form, max_shard_bytes, request, tmp_path):
        source = request.getfixturevalue(form)
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        with CheckpointReader(source) as reader, CheckpointWriter(tmp_path, max_shard_bytes, {"from": "x"}) as writer:
            for name in reversed(reader.tensors):
                writer.add(name, reader.read(name))
        files = sorted(tmp_path.glob("*.safetensors"))
        count = {1: len(reader.tensors), 10**9: 1}.get(max_shard_bytes, len(files))
        assert len(files) == count and (count > 1) == (tmp_path / "model.safetensors.index.json").exists()
        if count > 1:
            assert files[0].name == f"model-00001-of-{count:05d}.safetensors"
        models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path)]
        one, other = (model.state_dict() for model in models)
        assert models[0].dtype == models[1].dtype and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_index_is_the_one_that_transformers_writes(self, sharded, tmp_path):
        with CheckpointReader(sharded) as reader, CheckpointWriter(tmp_path, 20_000) as writer:
            for name in reader.tensors:
                writer.add(name, reader.read(name))
        ours, theirs = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path, sharded))
        assert ours["metadata"] == theirs["metadata"]
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()

    def test_shards_keep_to_their_size(self, tmp_path):
        with CheckpointWriter(tmp_path, 100) as writer:
            for i, size in enumerate([10, 10, 10, 30, 5]):  # 40, 40, 40, 120, 20 bytes
                writer.add(f"t{i}", torch.full((size,), float(i)))
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert [index[f"t{i}"][6:11] for i in range(5)] == ["00001", "00001", "00002", "00003", "00004"]

    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=8),
        dtypes=st.lists(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool]),
            min_size=8,
            max_size=8,
        ),
        limit=st.integers(1, 200),
    )
    def test_round_trip_of_any_dtypes(self, tmp_path_factory, sizes, dtypes, limit):
        folder = tmp_path_factory.mktemp("any")
        tensors = {f"t{i}": torch.randn(s).to(t) for i, (s, t) in enumerate(zip(sizes, dtypes, strict=False))}
        with CheckpointWriter(folder, limit) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        back = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        assert back.keys() == tensors.keys() == CheckpointReader(folder).tensors.keys()
        assert all(back[k].dtype == v.dtype and torch.equal(back[k], v) for k, v in tensors.items())

    def test_views_transposes_and_many_small_tensors(self, tmp_path):
        """1,500 headers need more room than a shard keeps: they go to two shards, none is lost."""
        with CheckpointWriter(tmp_path) as writer:
            for i in range(1500):
                writer.add(f"model.layers.{i:05d}.self_attn.q_proj.weight", torch.arange(6.0).view(2, 3).T)
        reader = CheckpointReader(tmp_path)
        assert len(reader.tensors) == 1500 and len(list(tmp_path.glob("*.safetensors"))) == 2
        assert torch.equal(reader.read("model.layers.01499.self_attn.q_proj.weight"), torch.arange(6.0).view(2, 3).T)

    def test_memory_may_be_reused_after_add(self, tmp_path):
        buffer = torch.zeros(3)
        with CheckpointWriter(tmp_path) as writer:
            for i in range(3):
                writer.add(f"t{i}", buffer.fill_(i))
        reader = CheckpointReader(tmp_path)
        assert [reader.read(f"t{i}")[0].item() for i in range(3)] == [0, 1, 2]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
    def test_refuses_nan_and_inf(self, tmp_path, value, dtype):
        with (
            pytest.raises(CheckpointError, match=r"'bad' has 1 of 3 values .*NaN or infinite.*learning rate"),
            CheckpointWriter(tmp_path) as writer,
        ):
            writer.add("good", torch.ones(3))
            writer.add("bad", torch.tensor([1.0, value, 2.0]).to(dtype))
        assert list(tmp_path.iterdir()) == []

    def test_refuses_misuse(self, tmp_path, single):
        writer = CheckpointWriter(tmp_path / "a")
        with pytest.raises(CheckpointError, match="No tensor was added"):
            writer.close()
        writer.add("x", torch.ones(2))
        with pytest.raises(CheckpointError, match="'x' was added twice"):
            writer.add("x", torch.ones(2))
        with pytest.raises(CheckpointError, match="complex128, which safetensors cannot store"):
            writer.add("y", torch.ones(2, dtype=torch.complex128))
        with pytest.raises(CheckpointError, match="'y' is on the meta device"):
            writer.add("y", torch.ones(2, device="meta"))
        writer.close()
        writer.close()
        with pytest.raises(CheckpointError, match="closed writer"):
            writer.add("z", torch.ones(2))
        with pytest.raises(CheckpointError, match=r"holds safetensors files already \(model\.safetensors\)"):
            CheckpointWriter(single)
        with pytest.raises(CheckpointError, match="max_shard_bytes is 0"):
            CheckpointWriter(tmp_path / "b", 0)

    def test_full_disk(self, tmp_path):
        class Full(io.BytesIO):
            def write(self, _):
                raise OSError(28, "No space left on device")

            def close(self):  # what is buffered does not fit either
                raise OSError(28, "No space left on device")

        writer = CheckpointWriter(tmp_path)
        writer.add("a", torch.ones(2))
        writer._shards[0].stream.close()
        writer._shards[0].stream = Full()
        with pytest.raises(CheckpointError, match=r"'b' could not be written.*No space left.*Free some disk"):
            writer.add("b", torch.ones(2))
        assert list(tmp_path.iterdir()) == []


class TestAtomicFolder:
    def test_appears_whole(self, tmp_path):
        target = tmp_path / "new" / "out"
        with atomic_folder(target) as folder:
            assert folder.parent == target.parent and not target.exists()
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("x")
        assert (target / "sub" / "file").read_text() == "x"
        assert [p.name for p in target.parent.iterdir()] == ["out"]
        mask = os.umask(0)
        os.umask(mask)
        assert target.stat().st_mode & 0o777 == 0o777 & ~mask

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_crash_leaves_nothing(self, tmp_path, error):
        with pytest.raises(error), atomic_folder(tmp_path / "out") as folder, CheckpointWriter(folder, 10) as writer:
            writer.add("a", torch.ones(4))
            writer.add("b", torch.ones(4))
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_existing_target_is_never_touched(self, tmp_path):
        target = tmp_path / "out"
        target.mkdir()
        (target / "precious").write_text("x")
        with (
            pytest.raises(ExportError, match=r"exists and is not empty \(precious\).*Choose another target"),
            atomic_folder(target),
        ):
            pytest.fail("must not be entered")
        with pytest.raises(ExportError, match="is a file"), atomic_folder(target / "precious"):
            pytest.fail("must not be entered")
        assert (target / "precious").read_text() == "x" and [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_empty_target_and_link_to_it(self, tmp_path):
        (tmp_path / "disk" / "empty").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
        with atomic_folder(tmp_path / "link") as folder:
            (folder / "file").write_text("x")
        assert (tmp_path / "disk" / "empty" / "file").read_text() == "x"
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["empty"]

    def test_target_that_appears_meanwhile_loses_neither(self, tmp_path):
        target = tmp_path / "out"
        with (
            pytest.raises(ExportError, match=r"finished folder was kept as .*partial") as error,
            atomic_folder(target) as folder,
        ):
            (folder / "ours").write_text("x")
            target.mkdir()
            (target / "theirs").write_text("y")
        assert (target / "theirs").read_text() == "y"
        assert (folder / "ours").read_text() == "x" and str(folder) in str(error.value)

    def test_parent_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ExportError, match="Cannot write next to"), atomic_folder(tmp_path / "file" / "out"):
            pytest.fail("must not be entered")
