"""Every reader gives the same bytes, rows and slices of a tensor, wherever the tensor comes from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.layout import LayoutReader, in_layout_of, in_layout_of_module
from shadowlit.checkpoint.pickled import PickledReader
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described, rows_of
from shadowlit.errors import CheckpointError, GraftError

NAME = "model.embed_tokens.weight"


def stored(folder, **tensors):
    folder.mkdir()
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return CheckpointReader(folder)


@pytest.fixture
def readers(tmp_path):
    """The same tensor, [5, 3] in bfloat16, behind every kind of reader."""
    torch.manual_seed(0)
    whole = torch.randn(5, 3).bfloat16()
    plain = stored(tmp_path / "plain", model__embed_tokens__weight=whole)
    renamed = stored(tmp_path / "renamed", language_model__model__embed_tokens__weight=whole)
    # The Instruct's last two rows come from another dtype, and under the name of another library version.
    short = stored(tmp_path / "short", model__embed_tokens__weight=whole[:3])
    other = torch.cat([torch.full((3, 3), 9.0), whole[3:].float()])
    instruct = stored(tmp_path / "instruct", language_model__model__embed_tokens__weight=other)
    (tmp_path / "pickled").mkdir()
    torch.save({NAME: whole}, tmp_path / "pickled" / "pytorch_model.bin")
    infos = {NAME: TensorInfo(NAME, "BF16", (5, 3), "")}
    found = {
        "folder": plain,
        "pickled": PickledReader(tmp_path / "pickled"),
        "layout": LayoutReader(renamed, plain),
        "aligned": AlignedReader(short, instruct),
        "computed": ComputedReader(Path("memory"), infos, rows_of({NAME: whole}.__getitem__)),
    }
    return whole, found


@pytest.mark.parametrize("kind", ["folder", "pickled", "layout", "aligned", "computed"])
def test_bytes_rows_and_slices(readers, kind):
    whole, reader = readers[0], readers[1][kind]
    assert isinstance(reader, TensorReader)
    assert (reader.info(NAME).shape, reader.info(NAME).code, reader.info(NAME).num_bytes) == ((5, 3), "BF16", 30)
    assert torch.equal(reader.read(NAME), whole)
    for start in range(6):
        for stop in range(start, 6):
            assert np.array_equal(reader.rows(NAME, start, stop), whole[start:stop].float().numpy())
            assert torch.equal(reader.read_slice(NAME, (slice(start, stop), slice(1, 3))), whole[start:stop, 1:3])
    content = whole.view(torch.uint8).numpy().tobytes()
    for start in range(31):  # also within an element, as the fingerprint reads
        for stop in range(start, 31):
            buffer = bytearray(stop - start)
            reader.read_into(memoryview(buffer), NAME, start)
            assert bytes(buffer) == content[start:stop]
    assert reader.fingerprint() == readers[1]["folder"].fingerprint()
    with pytest.raises(CheckpointError, match=r"There is no tensor 'x' in .* which holds 1 tensor "):
        reader.read("x")


def test_an_aligned_base_drops_rows_that_the_instruct_lacks(tmp_path):
    base, instruct = torch.randn(5, 2), torch.randn(3, 2)
    reader = AlignedReader(stored(tmp_path / "b", w=base), stored(tmp_path / "i", w=instruct))
    assert torch.equal(reader.read("w"), base[:3])


def test_scalars_and_empty_tensors_are_computed_too():
    held = {"one": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    reader = ComputedReader(Path("memory"), described({"one": (), "none": (0, 4)}), rows_of(held.__getitem__))
    assert torch.equal(reader.read("one"), held["one"]) and reader.read("none").shape == (0, 4)
    assert reader.rows("one", 0, 1) == np.float32(2.5)
    with pytest.raises(GraftError, match=r"memory holds count \(I64\), expected F64"):
        ComputedReader(Path("memory"), {"count": TensorInfo("count", "I64", (), "")}).require_weights(["count"])


def test_readers_in_their_own_layout_are_returned_as_they_are(tmp_path):
    head, body = torch.zeros(2, 2), torch.zeros(2, 2)
    tied = stored(tmp_path / "tied", model__embed_tokens__weight=body)
    untied = stored(tmp_path / "untied", model__embed_tokens__weight=body, lm_head__weight=head)
    assert in_layout_of(tied, untied) is tied and in_layout_of(untied, tied) is untied
    assert in_layout_of_module(untied, {NAME: (2, 2)}) is untied
    # A graft needs the tie of the other checkpoint; the same bytes twice are one matrix.
    assert LayoutReader(untied, tied).tensors.keys() == {NAME}
    assert LayoutReader(tied, untied).tensors.keys() == {NAME, "lm_head.weight"}
    assert LayoutReader(untied, tied, ties=False).tensors.keys() == {NAME, "lm_head.weight"}
