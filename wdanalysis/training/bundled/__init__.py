"""The model that `wd-analyze train` tunes when it is given none: small, LLaMA-style, pre-trained on Python's library.

`sample_checkpoints/pretrain.py` in the repository made it.
"""

from __future__ import annotations

from pathlib import Path


def bundled_model_folder() -> Path:
    """The folder with `config.json`, `model.safetensors` and `tokenizer.json`, as transformers loads it."""
    return Path(__file__).parent
