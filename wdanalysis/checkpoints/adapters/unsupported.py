"""Formats that are recognised in order to say that they are not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from wdanalysis.checkpoints.adapters.formats import Adapter, AdapterFormat, AdapterSource
from wdanalysis.errors import CheckpointError

KEYS: Mapping[str, str] = MappingProxyType(
    {
        r"^(?!base_model\.).*\.hada_w[12]_": "LoHa",
        r"^(?!base_model\.).*\.lokr_w[12]": "LoKr",
        r"^(?!base_model\.).*\.oft_(blocks|diag)\b": "OFT",
    }
)
"""Keys of adapters that are not in PEFT's spelling, for files that come without a configuration."""


def _refused(name: str, keys: str) -> AdapterFormat:
    def recognises(names: Collection[str]) -> bool:
        return any(re.search(keys, key) for key in names)

    def read(source: AdapterSource) -> Adapter:
        raise CheckpointError(
            f"{source.path} is a {name} adapter, which is not supported; merge it into its base first."
        )

    return AdapterFormat(name, recognises, read)


FORMATS = tuple(_refused(name, keys) for keys, name in KEYS.items())
