"""Small randomly initialised models of real architectures, in local folders, with a byte-level tokenizer."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same template as most published ones have it: without generation marks.
CHATML_UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")

MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and the three special tokens, no merges; 259 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(arch: str, *, tied: bool, vocab_size: int = 272, layers: int = 2, hidden: int = 32):
    """A config of ``arch`` with ``layers`` decoder layers of width ``hidden``, four heads, two key-value heads."""
    extra = dict(MIXTURES.get(arch, {}))
    if arch in ("qwen3", "gemma3_text", "qwen3_moe"):
        extra["head_dim"] = hidden // 4
    if arch == "gemma3_text":
        extra |= {"sliding_window": 64, "query_pre_attn_scalar": hidden // 4}
    return AutoConfig.for_model(
        arch, vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **extra,
    )  # fmt: skip


def save_model(
    folder: Path, arch: str = "qwen3", *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32,
    near: Path | None = None, distance: float = 0.1, chat_template: str | None = CHATML, shard_size: str = "5GB",
    **size: int,
) -> Path:  # fmt: skip
    """Save a random model and tokenizer to ``folder``; with ``near``, that folder's weights moved by ``distance``.

    ``distance`` is relative: each tensor gets noise of ``distance`` times its own standard deviation.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(arch, tied=tied, **size))
    tokenizer = make_tokenizer(chat_template)
    if near is not None:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(near, dtype=torch.float32).state_dict())
    with torch.no_grad():
        for p in model.parameters():
            if near is not None:
                p.add_(torch.randn_like(p) * distance * (p.std(unbiased=False) + 0.02))
            elif p.dim() == 1:  # norms start at a constant: make them differ too
                p.add_(torch.randn_like(p) * 0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def store_head(folder: Path, own: bool, head: str = "lm_head.weight") -> Path:
    """Store an output head in a tied model's file, ``own`` or a copy of the embedding; config.json stays."""
    tensors = load_file(folder / "model.safetensors")
    (embedding,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(len(tensors))) * 0.1
    tensors[head] = embedding + noise.to(embedding.dtype) if own else embedding.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_pair(root: Path, arch: str = "qwen3", save=save_model, **kwargs) -> tuple[Path, Path]:
    """Save a Base and an Instruct close to it under ``root`` with ``save``; return the two folders."""
    made, random_state = _pair(save, arch, **kwargs)
    for name in ("base", "instruct"):
        shutil.copytree(made / name, root / name, dirs_exist_ok=True)
    torch.set_rng_state(random_state)  # the same whether the pair was made for this test or an earlier one
    return root / "base", root / "instruct"


@cache
def _pair(save, arch: str, **kwargs) -> tuple[Path, torch.Tensor]:
    """A pair that is made once in a process, and the state of the random numbers after it."""
    root = Path(tempfile.mkdtemp(prefix="shadowlit-pair-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    base = save(root / "base", arch, seed=0, **kwargs)
    save(root / "instruct", arch, seed=1, near=base, **kwargs)
    return root, torch.get_rng_state()
