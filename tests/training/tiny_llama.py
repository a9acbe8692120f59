"""A LLaMA of two layers with a tokenizer of bytes, and texts for it: seconds to train."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wdanalysis.training.data.packing import Example

WORDS = [
    "the",
    "weight",
    "of",
    "a",
    "layer",
    "is",
    "both",
    "its",
    "magnitude",
    "and",
    "its",
    "direction",
    "tuned",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; 0 ends a text."""
    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")


def decoded(example: Example) -> str:
    return tokenizer().decode(example.tokens)


def model_folder(folder: Path, *, dtype: torch.dtype = torch.float32, width: int = 16) -> Path:
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def quick() -> Iterator[None]:
    """One thread, since several get in each other's way here; and little for accelerate to collect."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def text_file(path: Path, words: int = 600) -> Path:
    path.write_text(text(words), encoding="utf-8")
    return path


def instruction_file(path: Path, count: int = 20) -> Path:
    records = [
        {"instruction": f"Say {word}.", "input": "", "output": word, "answer": word}
        for word in random.Random(0).choices(WORDS, k=count)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
