"""Pre-train the bundled base model from nothing: `python -m sample_checkpoints.pretrain` in the root of the repository.

A small LLaMA-style model and its tokenizer learn the source of Python's library. Minutes on a GPU, hours without.
Prints the held-out loss beside what a model that knows only how often each token occurs cannot beat.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from wdanalysis.training.bundled import bundled_model_folder
from wdanalysis.training.data.text import library_documentation, library_source

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """The model's shape and how it learns."""

    vocabulary: int = 2048
    layers: int = 10
    hidden: int = 96
    intermediate: int = 192
    heads: int = 6
    context: int = 256
    initial_deviation: float = 0.05
    steps: int = 1400
    warmup_steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1.0
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


DEFAULT = Recipe()


def train_tokenizer(texts: Sequence[str], recipe: Recipe) -> Tokenizer:
    """Byte-level byte-pair encoding learnt from `texts`: every text can be encoded, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """The tokens of all texts in a row, each text followed by `END`."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (*text.ids, end)])


def unigram_entropy(tokens: Tensor) -> float:
    """Nats per token that no model can beat that knows only how often each token occurs."""
    share = tokens.bincount() / len(tokens)
    return float(torch.special.entr(share).sum())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, context: int) -> float:
    """Nats per token over windows of `context` tokens that do not overlap; each window's first token is given."""
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    losses = [
        model(batch, labels=batch).loss * len(batch) for batch in torch.split(windows.to(model.device), 64)
    ]
    return float(torch.stack(losses).sum() / len(windows))


def pretrain(recipe: Recipe, tokens: Tensor, held_out: Tensor) -> LlamaForCausalLM:
    """Train a new model on windows at random places of `tokens`."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        initializer_range=recipe.initial_deviation,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=device == "cuda",
    )
    tokens = tokens.to(device)
    window = torch.arange(recipe.context, device=device)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        starts = torch.randint(len(tokens) - recipe.context, (recipe.batch_size, 1), device=device)
        batch = tokens[starts + window]
        loss = cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(recipe.steps // 20, 1) == 0:
            print(
                f"step {step + 1}: training {loss.item():.3f}, "
                f"held out {held_out_loss(model, held_out, recipe.context):.3f} nats/token",
                flush=True,
            )
    return model.cpu()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder: weights in float16, but a configuration that has them computed in float32."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_diff_dict()
    config.pop("transformers_version")
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    config["_name_or_path"] = "wdanalysis/training/bundled"  # as adapters that are trained on it call it
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def main(folder: Path, recipe: Recipe = DEFAULT) -> None:
    """Make tokenizer and model, write them to `folder`, and print the losses."""
    folder.mkdir(parents=True, exist_ok=True)
    source = library_source()
    tokenizer = train_tokenizer([*source, *library_documentation()], recipe)
    tokens, held_out = encode(tokenizer, source), encode(tokenizer, library_source(held_out=True))
    bytes_per_token = sum(len(text.encode()) for text in library_source(held_out=True)) / len(held_out)
    print(f"{len(tokens):,} tokens to train on, {len(held_out):,} held out, {bytes_per_token:.2f} bytes each")

    model = pretrain(recipe, tokens, held_out)
    print(f"{model.num_parameters():,} parameters")
    save(model, tokenizer, folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, nats in (
        ("held-out loss", held_out_loss(stored, held_out, recipe.context)),
        ("unigram entropy", unigram_entropy(held_out)),
    ):
        print(f"{name}: {nats:.3f} nats/token, {nats / bytes_per_token:.3f} nats/byte")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=bundled_model_folder(), help="folder to write the model to (%(default)s)"
    )
    main(parser.parse_args().out)
