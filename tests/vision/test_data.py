"""Images in conversations: formats, tokens, masks, pixels, and errors that name the row."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from shadowlit.data.formats import convert_row
from shadowlit.data.images import IMAGE_INPUTS, TOKEN_TYPES, ImageProcessing, ImageSource, image_source
from shadowlit.data.module import ShadowData
from shadowlit.data.sampler import FILLER
from shadowlit.data.template import encode
from shadowlit.errors import DataError, PairError
from shadowlit.pair.pair import ModelPair
from tests.tiny import save_model as save_text_model
from tests.vision.tiny import FAMILIES, SIZE, picture, save_model, template, write_rows

TEXT, IMAGE = {"type": "text", "text": "What?"}, {"type": "image", "path": "0.png"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A pair of each family; both models are one folder, of which only the processor is read."""
    root = tmp_path_factory.mktemp("pairs")
    return {f: ModelPair(*[str(save_model(root / f, f, marked=f != "llava"))] * 2) for f in FAMILIES}


def asked(*parts, answer="Red"):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


def write(folder, *rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        picture(i, SIZE + 14 * i).save(folder / f"{i}.png")
    return str(folder / name)


def make(pair, source, **options):
    data = ShadowData(pair, train=source, **{"cache": False, "shuffle": False, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pixels_are_the_processors_own(pairs, tmp_path, family):
    """A batch is what the processor makes of the same texts and images; only the answers carry loss."""
    rows = [asked(IMAGE, TEXT), asked(TEXT), asked({**IMAGE, "path": "1.png"}, TEXT, {**IMAGE, "path": "2.png"})]
    data = make(pairs[family], write(tmp_path, *rows), batch_size=3)
    batch = next(iter(data.train_dataloader()))
    processor = pairs[family].processor()
    texts = [
        processor.tokenizer.apply_chat_template(
            [
                {**m, "content": [p if p["type"] == "text" else {"type": "image"} for p in m["content"]]}
                if isinstance(m["content"], list)
                else m
                for m in row["messages"]
            ],
            tokenize=False,
        )
        for row in rows
    ]
    images = [[Image.open(tmp_path / f"{i}.png") for i in numbers] for numbers in ([0], [], [1, 2])]
    alone = [processor(images=i or None, text=[t]) for i, t in zip(images, texts, strict=True)]
    together = processor(images=[i for i in images if i], images_kwargs={"return_tensors": "pt"})
    told = processor.tokenizer("Red<|im_end|>")["input_ids"]
    for row, expected in enumerate(alone):
        (ids,) = expected["input_ids"]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["attention_mask"][row].sum() == len(ids)
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == told
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in batch:
                assert batch[name][row, : len(ids)].tolist() == expected[name][0]
    pixels = {name for name in together if name in IMAGE_INPUTS and name not in TOKEN_TYPES}
    assert set(batch) & set(IMAGE_INPUTS) - set(TOKEN_TYPES) == pixels
    for name in pixels:
        torch.testing.assert_close(batch[name], together[name], rtol=0, atol=0)


def test_an_image_that_the_assistant_shows_carries_no_loss(pairs, tmp_path):
    pair = pairs["gemma3"]
    picture(0).save(tmp_path / "0.png")
    part = {"type": "image", "image": ImageSource(str(tmp_path / "0.png"))}
    messages = [
        {"role": "user", "content": "Draw."},
        {"role": "assistant", "content": [{"type": "text", "text": "Here"}, part, {"type": "text", "text": "it is"}]},
    ]
    sample = encode(pair.tokenizer(), messages, ImageProcessing(pair))
    decode = pair.tokenizer().decode
    assert decode([t for t in sample.labels if t != -100]) == "Hereit is<|im_end|>"
    assert decode(sample.input_ids).count("<image_soft_token>") == sample.num_image_tokens == 4
    whole = encode(pair.tokenizer(), messages, ImageProcessing(pair), "all")
    text = decode([t for t in whole.labels if t != -100])
    assert text.startswith("user\nDraw.<|im_end|>") and "<image_soft_token>" not in text


def test_marks_and_prefixes_find_the_same_answers(pairs, tmp_path):
    """Templates without generation marks: the answer is looked for before the images are put in."""
    picture(0).save(tmp_path / "0.png")
    part = {"type": "image", "image": ImageSource(str(tmp_path / "0.png"))}
    turns = [
        {"role": "user", "content": [part, TEXT]},
        {"role": "assistant", "content": "Red"},
        {"role": "user", "content": [TEXT, part]},
        {"role": "assistant", "content": "Blue"},
    ]
    for family in ("qwen3_vl", "gemma3", "llava_next"):
        images, found = ImageProcessing(pairs[family]), []
        for marked in (True, False):
            tokenizer = pickle.loads(pickle.dumps(pairs[family].tokenizer()))
            tokenizer.chat_template = template(family, marked)
            found.append(encode(tokenizer, turns, images))
        assert found[0] == found[1]
        told = [t for t in found[0].labels if t != -100]
        assert tokenizer.decode(told) == "Red<|im_end|>Blue<|im_end|>"


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red"}],
     "images": ["0.png"]},
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}],
     "image": "0.png"},
    {"instruction": "<image>\nWhat?", "output": "Red", "images": [{"path": "0.png", "bytes": None}]},
    {"prompt": "<image>\nWhat?", "completion": "Red", "images": ["0.png"]},
    {"messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "Red"}]}], "images": ["0.png"]},
    asked({"type": "image_url", "image_url": {"url": "0.png"}}, TEXT),
    asked({"type": "image", "url": "0.png", "path": None}, TEXT),
])  # fmt: skip
def test_all_ways_to_give_an_image(pairs, tmp_path, row):
    expected = make(pairs["llava"], write(tmp_path, asked(IMAGE, TEXT))).dataset("train")[0]
    assert expected["images"] == [ImageSource(str(tmp_path / "0.png"), None, (SIZE, SIZE))]
    found = make(pairs["llava"], write(tmp_path, row, name="other.jsonl")).dataset("train")[0]
    assert {**found, "origin": ""} == {**expected, "origin": ""}


def test_a_placeholder_is_a_text_where_no_image_is_spoken_of():
    (user, _) = convert_row(asked({"type": "text", "text": "an <image> tag"}), "messages")
    assert user["content"] == "an <image> tag"


def test_images_in_the_rows_themselves(pairs, tmp_path):
    """Parquet with encoded images, as ``datasets`` writes it; and the cache gives back what it was given."""
    write(tmp_path)
    encoded = (tmp_path / "1.png").read_bytes()
    row = {"prompt": "<image>\nWhat?", "completion": "Red", "images": [{"bytes": encoded, "path": None}]}
    other = {**row, "images": [{"bytes": None, "path": "1.png"}]}
    pq.write_table(pa.Table.from_pylist([row, other]), tmp_path / "p.parquet")
    source = str(tmp_path / "p.parquet")
    options = {"cache": True, "cache_dir": str(tmp_path / "cache"), "batch_size": 2}
    for _ in range(2):  # the second start reads the cache
        data = make(pairs["qwen2_5_vl"], source, **options)
        dataset = pickle.loads(pickle.dumps(data.dataset("train")))
        assert [p.data for p in dataset[0]["images"]] == [encoded]
        assert [p.path for p in dataset[1]["images"]] == [str(tmp_path / "1.png")]
        batch = next(iter(data.train_dataloader()))
        first, second = batch["pixel_values"].chunk(2)
        assert torch.equal(first, second) and first.any()
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    # Equal tokens are told apart by their images.
    assert len(set(dataset.hashes().tolist())) == 2


def test_an_image_lies_upright(pairs, tmp_path):
    """A camera's orientation exchanges width and height, in the tokens as in the pixels."""
    turned = Image.new("RGB", (56, 28))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    measured = image_source("t.jpg", tmp_path).measured()
    assert measured.size == (28, 56) == measured.load().size
    assert ImageSource.unpack(measured.pack()) == measured
    inside = ImageSource(data=(tmp_path / "t.jpg").read_bytes()).measured()
    assert ImageSource.unpack(inside.pack()) == inside and inside.load().size == (28, 56)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_batch_without_images_gets_one_without_loss(pairs, tmp_path, family):
    rows = write_rows(tmp_path, 4, text_every=2)
    data = make(pairs[family], str(rows), batch_size=2)
    loader = data.train_dataloader()
    batch = loader.collate_fn([data.dataset("train")[1], data.dataset("train")[FILLER]])
    assert len(batch["input_ids"]) == 3 and (batch["labels"][2] == -100).all() and "pixel_values" in batch
    assert "pixel_values" not in next(iter(make(pairs[family], write(tmp_path, asked(TEXT))).train_dataloader()))


def test_workers_make_the_same_batches(pairs, tmp_path):
    rows = str(write_rows(tmp_path, 4))
    one, two = (list(make(pairs["gemma3"], rows, batch_size=2, num_workers=n).train_dataloader()) for n in (0, 1))
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    images = ImageProcessing(pairs["qwen2_5_vl"])
    assert pickle.loads(pickle.dumps(images)).digest() == images.digest()


BROKEN = [
    (asked({**IMAGE, "path": "none.png"}),
     r"rows.jsonl \(line 1\) names the image '.*none.png', and there is no such file. .* begins in the folder"),
    (asked({**IMAGE, "path": "rows.jsonl"}),
     r"has the image '.*rows.jsonl', which can't be read \(UnidentifiedImageError"),
    (asked({**IMAGE, "path": "https://a.org/b.png"}), r"'https://a.org/b.png', an address in the net; expected"),
    (asked({"type": "image", "path": 3}), r"has 3 for an image; expected a path, bytes"),
    (asked({"type": "image", "url": "data:image/png;base64,%"}), r"a data: URL that is not base64"),
    (asked({"type": "image"}, TEXT), r"has 0 images in 'images', and 1 places for them"),
    ({**asked(TEXT), "images": ["0.png"]}, r"has 1 image in 'images', and 0 places for them; .* Write <image>"),
    ({**asked({"type": "text", "text": "<image> and <image>"}), "images": ["0.png"]},
     r"has 1 image in 'images', and 2 places"),
    (asked({"type": "video", "path": "a.mp4"}),
     r"'content' of messages\[0\], part 0; expected an object of type text, reasoning, tool_call or image"),
    (asked(IMAGE, {"type": "text", "text": "<|image_pad|>"}),
     r"has 2 image tokens '<\|image_pad\|>' in its rendered text, and 1 image; expected"),
    (asked({"type": "text", "text": "What is <|image_pad|>?"}), r"has 1 image token .* and 0 images"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_bad_images_are_told_with_their_row(pairs, tmp_path, row, message):
    with pytest.raises(DataError, match=f"sample 0 of .*{message}"):
        make(pairs["qwen2_5_vl"], write(tmp_path, row, asked(TEXT)))


def test_a_stray_soft_token_is_told(pairs, tmp_path):
    """Gemma's template writes another token than the one that an image becomes."""
    row = asked(IMAGE, {"type": "text", "text": "<image_soft_token>"})
    with pytest.raises(DataError, match=r"sample 0 .* has 1 image token in its text .* without an image"):
        make(pairs["gemma3"], write(tmp_path, row))


def test_images_that_the_context_does_not_hold(pairs, tmp_path):
    source = write(tmp_path, asked(TEXT), asked(IMAGE, IMAGE, IMAGE, IMAGE, TEXT, answer="R"))
    message = r"sample 1 .* has 4 images of 16 tokens together, the last of which ends at token \d+, and 25 fit\. Raise"
    with pytest.raises(DataError, match=message):
        make(pairs["qwen2_5_vl"], source, max_length=25, drop_unsupervised=True)
    dropped = make(pairs["qwen2_5_vl"], source, max_length=40, overlong="drop")
    assert (len(dropped.dataset("train")), dropped.reports["train"].num_dropped) == (1, 1)


def test_text_models_refuse_images(tmp_path):
    folder = save_text_model(tmp_path / "text", "llama")
    with pytest.raises(DataError, match=r"sample 0 .* has 1 image, but the models of the pair read text only"):
        make(ModelPair(str(folder), str(folder)), write(tmp_path, asked(IMAGE, TEXT)))


def test_packing_refuses_images(pairs, tmp_path):
    with pytest.raises(DataError, match=r"data\.packing is 'best_fit', but the training samples have images"):
        make(pairs["llava"], write(tmp_path, asked(IMAGE, TEXT)), packing="best_fit")
    make(pairs["llava"], write(tmp_path, asked(TEXT)), packing="best_fit")


def test_an_image_that_breaks_or_changes_later_is_told_with_its_row(pairs, tmp_path):
    data = make(pairs["llava"], write(tmp_path, asked(TEXT), asked(IMAGE)))
    sample, collate = data.dataset("train")[1], data.train_dataloader().collate_fn
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])  # its header still tells its size
    with pytest.raises(DataError, match=r"sample 1 of .*\(line 2\) has the image .*which can't be read \(OSError"):
        collate([sample])
    picture(0, 70, 28).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"sample 1 .* of 70×28 pixels, which had 28×28 when its tokens were counted"):
        collate([sample])
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"sample 1 .* no such file"):
        collate([sample])


def test_a_missing_processor_is_told(tmp_path):
    folder = save_model(tmp_path / "m", "llava")
    (folder / "processor_config.json").unlink()
    with pytest.raises(PairError, match=r"instruct processor: .*preprocessor_config.json or processor_config.json"):
        make(ModelPair(str(folder), str(folder)), write(tmp_path, asked(IMAGE)))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_prompts_with_images(pairs, tmp_path, family):
    """Left-padded, with the pixels of each; what the final answer shows isn't part of the prompt."""
    data = ShadowData(pairs[family], predict=write(tmp_path, asked(IMAGE, TEXT), asked(TEXT)), batch_size=2)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    asks = pairs[family].tokenizer().decode(batch["input_ids"][0], skip_special_tokens=False)
    assert asks.endswith("<|im_start|>assistant\n") and batch["attention_mask"][1, 0] == 0
    types = batch.get("mm_token_type_ids", batch.get("token_type_ids"))
    assert types[0].sum() == 4 and types[1].sum() == 0 and batch["index"].tolist() == [0, 1]
    assert "pixel_values" in batch
