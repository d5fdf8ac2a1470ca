"""Small random vision-language models of four families, with their processors, and pictures for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from tests import tiny
from tests.tiny import make_tokenizer

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "llava_next")

# How each family's template writes an image; the processor makes as many tokens of it as the image has.
_WRITTEN = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "llava": "<image>\n",
    "llava_next": "<image>\n",
}
_TOKENS = {
    "qwen2_5_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "llava": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},
}
_WRAPPED = {"qwen2_5_vl": ["<|vision_start|>", "<|vision_end|>"], "qwen3_vl": ["<|vision_start|>", "<|vision_end|>"]}
SIZE = 28  # pixels of a picture's side; every family makes four tokens or a few more of it


def template(family: str, marked: bool = True) -> str:
    """ChatML whose contents are texts or lists of parts, with an image as the family writes it."""
    said = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {_WRITTEN[family]!r} }}}}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        f"{{% if message['role'] == 'assistant' %}}{begin}{said}{{{{ '<|im_end|>' }}}}{end}{{{{ '\\n' }}}}"
        f"{{% else %}}{said}{{{{ '<|im_end|>\\n' }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def make_processor(family: str, marked: bool = True):
    """A processor as the family's, for pictures of 28 pixels: patches of 7 or 14, the byte-level tokenizer."""
    core = make_tokenizer(None)
    tokens = _TOKENS[family]
    core.add_special_tokens(
        {"additional_special_tokens": [*tokens.values(), *_WRAPPED.get(family, [])]}, replace_extra_special_tokens=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, extra_special_tokens=tokens,
    )  # fmt: skip
    tokenizer.chat_template = template(family, marked)
    given = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if family.startswith("qwen"):
        images = Qwen2VLImageProcessorPil(
            patch_size=7, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 56}
        )
        return _Parts(images, tokenizer, {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family])
    if family == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
        return Gemma3Processor(image_processor=images, image_seq_length=4, **given)
    crop = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    extra = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        return LlavaProcessor(image_processor=CLIPImageProcessorPil(**crop), **extra, **given)
    pins = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(image_grid_pinpoints=pins, **crop), **extra, **given
    )


class _Parts:
    """What a folder holds of a processor, saved without the one for videos, which needs torchvision to be made."""

    def __init__(self, images, tokenizer, kind):
        self.images, self.tokenizer, self.kind = images, tokenizer, kind

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)
        sizes = {"patch_size": 7, "temporal_patch_size": 2, "merge_size": 2}
        about = {"processor_class": self.kind, "video_processor_type": "Qwen2VLVideoProcessor", **sizes}
        (Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(about))
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": self.kind}))


def make_config(family: str, processor, *, tied: bool = True, layers: int = 2, hidden: int = 32):
    """A config of the family, the text model as in ``tests.tiny``, a vision tower of two layers."""
    token = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 288, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"tie_word_embeddings": tied}
    if family.startswith("qwen"):
        ids = {
            "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
            "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
        }  # fmt: skip
        patches = {"patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden}
        shape = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        if family == "qwen2_5_vl":
            patches |= {"window_size": 28, "fullatt_block_indexes": [1]}
        else:
            patches |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            text["head_dim"] = hidden // 4
        return AutoConfig.for_model(
            family, text_config={**text, "rope_parameters": rope}, vision_config={**patches, **shape}, **ids, **config
        )
    if family == "gemma3":
        text |= {"head_dim": hidden // 4, "sliding_window": 64, "query_pre_attn_scalar": hidden // 4}
        vision |= {"model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": 7, "vision_use_head": False}
        return AutoConfig.for_model(
            family, text_config=text, vision_config=vision, image_token_index=token("<image_soft_token>"),
            boi_token_index=token("<start_of_image>"), eoi_token_index=token("<end_of_image>"),
            mm_tokens_per_image=4, **config,
        )  # fmt: skip
    vision |= {"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": 14, "projection_dim": 32}
    config |= {
        "image_token_index": token("<image>"), "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", **text}, "vision_config": vision,
    }  # fmt: skip
    if family == "llava_next":
        config["image_grid_pinpoints"] = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    return AutoConfig.for_model(family, **config)


def save_model(
    folder: Path, family: str, *, tied: bool = True, seed: int = 0, near: Path | None = None, distance: float = 0.1,
    dtype: torch.dtype = torch.float32, marked: bool = True, **size: int,
) -> Path:  # fmt: skip
    """Save a random model and its processor; with ``near``, that folder's weights moved by ``distance``."""
    torch.manual_seed(seed)
    processor = make_processor(family, marked)
    model = AutoModelForImageTextToText.from_config(make_config(family, processor, tied=tied, **size))
    if near is not None:
        model.load_state_dict(AutoModelForImageTextToText.from_pretrained(near, dtype=torch.float32).state_dict())
    with torch.no_grad():
        for p in model.parameters():
            if near is not None:
                p.add_(torch.randn_like(p) * distance * (p.std(unbiased=False) + 0.02))
            elif p.dim() == 1 or not p.any():  # norms and Gemma's projector start at a constant: make them differ
                p.add_(torch.randn_like(p) * 0.05)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_pair(root: Path, family: str, **kwargs) -> tuple[Path, Path]:
    """Save a Base and an Instruct close to it under ``root``; return the two folders."""
    return tiny.save_pair(root, family, save_model, **kwargs)


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def write_rows(folder: Path, count: int, name: str = "train", text_every: int = 4, seed: int = 0) -> Path:
    """Write ``count`` questions about pictures of one colour each; every ``text_every``-th has none, some have two."""
    rows = []
    for i in range(count):
        colours = [list(COLOURS)[(seed + i) % 4], list(COLOURS)[(seed + 3 * i + 1) % 4]][: 1 + (i % 3 == 2)]
        if i % text_every == text_every - 1:
            colours = []
        parts = []
        for k, colour in enumerate(colours):
            size = SIZE + 14 * ((seed + i) % 2)
            pixels = np.asarray(picture(1000 * seed + 10 * i + k, size, SIZE)) // 8 + np.array(COLOURS[colour]) * 7 // 8
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}-{i}-{k}.png")
            parts.append({"type": "image", "path": f"{name}-{i}-{k}.png"})
        parts.append({"type": "text", "text": "Which colour?" if colours else f"Say {i}."})
        answer = " ".join(colours) if colours else f"{i}"
        rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rename_tensors(folder: Path) -> None:
    """Rename a saved model's tensors to what another version of transformers, or the first publication, has."""
    path = folder / "model.safetensors"
    ways = (
        ("visual.", "model.visual."),  # Qwen-VL, later
        ("model.", "model.language_model."),
        ("vision_tower.", "vision_tower.vision_model."),  # Gemma 3 and LLaVA, as they were published
    )
    renamed = {}
    for name, tensor in load_file(path).items():
        old, new = next((way for way in ways if name.startswith(way[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    save_file(renamed, path, metadata={"format": "pt"})
