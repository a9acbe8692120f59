"""Every other method of PEFT, by PEFT itself: its own layer around one weight of the base, filled and merged.

Where PEFT is installed, a new method works as soon as it does there. For each weight a module of the same name is made
around it, the adapter's factors of that module are put in, `merge_and_unload` is called and the weight is taken: memory
holds one module, and nothing of the file is run. What the configuration sets reaches PEFT as plain values of the fields
that its own class declares.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from wdanalysis.checkpoints.adapters.formats import Adapter, AdapterFormat, AdapterSource, Weight, wide
from wdanalysis.checkpoints.adapters.peft_config import MERGE, peft_type
from wdanalysis.checkpoints.adapters.peft_keys import PEFT_PREFIX, sort_parts
from wdanalysis.checkpoints.dtypes import torch_type
from wdanalysis.checkpoints.tensors import FormulaUpdate, StoredTensor
from wdanalysis.errors import CheckpointError

if TYPE_CHECKING:
    import torch

ON_WIDEST = ("PVERA", "RANDLORA")
"""Types whose modules share matrices as wide as the widest of them."""

ON_SHARED = (*ON_WIDEST, "VBLORA")
"""Types whose modules share tensors, and depend on nothing else of each other."""

NOT_OF_ONE_MODULE: Mapping[str, Any] = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "bias": "none",
    "inference_mode": True,
}
"""Settings that choose modules, or are read from the file's tensors: the module is chosen already."""

NOT_OF_THE_FACTORS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("peft_version", "peft_type", "target_modules"),
)
"""Settings that say where an adapter comes from and belongs."""

_ONE_AT_A_TIME = Lock()


def read(source: AdapterSource) -> Adapter:
    """Read the adapted modules, each with PEFT's merge as its formula."""
    method = _Method.of(source)
    own: dict[str, dict[str, StoredTensor]] = {}
    shared: dict[str, StoredTensor] = {}
    rest: dict[str, StoredTensor] = {}
    for key, tensor in source.tensors.items():
        name = PEFT_PREFIX.sub("", key)
        if key.startswith("base_model.") and name == key:
            shared[key] = tensor
        elif match := re.fullmatch(rf"(.+?)\.{re.escape(method.prefix)}.+", name):
            own.setdefault(match[1], {})[key] = tensor
        else:
            rest[key] = tensor
    if not own:
        raise CheckpointError(
            f"{source.path} holds no factor of PEFT's type {method.kind}; save the adapter again."
        )
    if shared and method.kind not in ON_SHARED:
        raise CheckpointError(
            f"{source.path} is an adapter of PEFT's type {method.kind}, whose modules share tensors (such as "
            f"{next(iter(shared))}) in a way that is not known here; {MERGE}."
        )
    parts = sort_parts(replace(source, tensors=rest), re.compile(r"(?!)"))
    widest = _widest(source, own) if method.kind in ON_WIDEST else None
    formulas: list[FormulaUpdate] = []
    for module, tensors in own.items():
        merge = _Merge(source, method, module, {**tensors, **shared}, widest)
        formulas.append(FormulaUpdate(module, method.title, tuple(tensors.values()), merge.weight))
        if source.base_tensor(f"{module}.bias") is not None:
            formulas.append(
                FormulaUpdate(f"{module}.bias", method.title, tuple(tensors.values()), merge.bias)
            )
    return Adapter((), parts.replaced, tuple(parts.notes), method.title, formulas=tuple(formulas))


def _widest(source: AdapterSource, modules: Iterable[str]) -> tuple[int, int]:
    """The most outputs and inputs of any of the modules in the base."""
    outputs = inputs = 0
    for module in modules:
        if (tensor := source.base_tensor(module)) is not None:
            sides = tensor.rows, tensor.row_length
            out, into = sides[::-1] if source.in_by_out(module) else sides
            outputs, inputs = max(outputs, out), max(inputs, into)
    return outputs, inputs


@dataclass(frozen=True)
class _Method:
    """A PEFT type as the installed PEFT knows it."""

    kind: str
    title: str
    prefix: str
    settings: Mapping[str, Any]

    def config(self, target_modules: str) -> Any:
        """Make PEFT's configuration for modules of this name, a regular expression."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType

        make: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.kind)]
        return make(**copy.deepcopy(dict(self.settings)), target_modules=target_modules)

    @classmethod
    def of(cls, source: AdapterSource) -> _Method:
        config = source.config or {}
        kind = peft_type(config)
        try:
            import peft
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
            from peft.tuners.tuners_utils import BaseTuner
            from peft.utils import PeftType
        except ImportError as error:
            raise CheckpointError(
                f"{source.path} is an adapter of PEFT's type {kind}, which PEFT itself is needed to read; install it "
                f"(`pip install peft`), or {MERGE}."
            ) from error
        known_type = PeftType(kind) if kind in {known.value for known in PeftType} else None
        tuner = None if known_type is None else PEFT_TYPE_TO_TUNER_MAPPING.get(known_type)
        if known_type is None or tuner is None or not issubclass(tuner, BaseTuner):
            raise CheckpointError(
                f"{source.path} is an adapter of PEFT's type {kind}, which PEFT {peft.__version__}, that is installed, "
                f"does not know as a method that tunes weights; install the PEFT that it was made with, or {MERGE}."
            )
        hooks = ("_pre_injection_hook", "_post_injection_hook", "inject_adapter")
        if kind not in ON_SHARED and any(
            getattr(tuner, h, None) is not getattr(BaseTuner, h, None) for h in hooks
        ):
            raise CheckpointError(
                f"{source.path} is an adapter of PEFT's type {kind}, whose modules depend on each other in a way that "
                f"is not known here; {MERGE}."
            )
        known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[known_type])}
        given = {name: value for name, value in config.items() if name not in NOT_OF_THE_FACTORS}
        if unknown := sorted(name for name, value in given.items() if name not in known and value):
            raise CheckpointError(
                f"{source.path} is an adapter with {unknown[0]}, which PEFT {peft.__version__}, that is installed, "
                f"does not know; install the PEFT that it was made with, or {MERGE}."
            )
        fixed = {name: value for name, value in NOT_OF_ONE_MODULE.items() if name in known}
        settings = {name: value for name, value in given.items() if name in known} | fixed
        title = PEFT_TYPE_TO_CONFIG_MAPPING[known_type].__name__.removesuffix("Config")
        return cls(kind, title, tuner.prefix, settings)


@dataclass(frozen=True)
class _Merge:
    """PEFT's merge of one module."""

    source: AdapterSource
    method: _Method
    module: str
    tensors: Mapping[str, StoredTensor]
    widest: tuple[int, int] | None

    def weight(self, weight: Weight) -> Weight:
        """From the base's weight to the tuned one."""
        bias = self.source.base_tensor(f"{self.module}.bias")
        return self._merged(weight, None if bias is None else wide(bias))[0]

    def bias(self, bias: Weight) -> Weight:
        """From the base's bias to the tuned one, which may depend on the weight."""
        tensor = self.source.base_tensor(self.module)
        if tensor is None:
            raise ValueError("its weight is not in the base")
        return self._merged(wide(tensor), bias)[1]

    def _merged(self, weight: Weight, bias: Weight | None) -> tuple[Weight, Weight]:
        import torch

        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                layer = self._filled(self._around(weight, bias))
                layer.merge()
            except ValueError:
                raise
            except Exception as error:  # whatever a method of PEFT raises, it cannot do this
                if "size mismatch" in str(error):
                    raise ValueError("the factors have other sizes") from error
                raise self._not_merged(error) from error
        merged = layer.get_base_layer()
        tuned, tuned_bias = (
            np.empty(0) if tensor is None else tensor.detach().double().numpy().copy()
            for tensor in (merged.weight, getattr(merged, "bias", None))
        )
        return tuned, tuned_bias

    def _filled(self, model: torch.nn.Module) -> Any:
        """PEFT's layer for the module of `model`, in float64, with the factors of the file."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        target = re.escape(self.module) + (rf"|{_WIDEST}" if self.widest else "")
        config = self.method.config(target)
        try:
            adapted = get_peft_model(model, config)
        except TypeError:  # some decompose the weight at once, in float32 at most
            adapted = get_peft_model(model.float(), config)
        given = {key: _as_torch(tensor) for key, tensor in self.tensors.items()}
        loaded: Any = set_peft_model_state_dict(adapted, given)
        own = re.compile(rf"{re.escape(self.module)}\.{re.escape(self.method.prefix)}")
        missing = [key for key in get_peft_model_state_dict(adapted) if own.search(key) and key not in given]
        if missing or loaded.unexpected_keys:
            raise ValueError(
                f"{[*missing, *loaded.unexpected_keys][0]} is only in {'PEFT' if missing else 'the file'}"
            )
        return adapted.double().get_submodule(f"base_model.model.{self.module}")

    def _not_merged(self, error: Exception) -> CheckpointError:
        import peft

        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        return CheckpointError(
            f"PEFT {peft.__version__} cannot merge {self.module} of {self.source.path} ({said}); {MERGE}, "
            "with the PEFT that it was made with."
        )

    def _around(self, weight: Weight, bias: Weight | None) -> torch.nn.Module:
        """A model that holds the module under its own name, and beside it what tells the widest one's sides."""
        import torch

        model = parent = torch.nn.Module()
        *path, last = self.module.split(".")
        for name in path:
            child = torch.nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, self._layer(weight, bias))
        if self.widest is not None:
            widest = torch.nn.Linear(1, 1, bias=False)
            widest.out_features, widest.in_features = self.widest
            one = torch.zeros(1, dtype=torch.float64)
            widest.weight = torch.nn.Parameter(one.expand(self.widest))  # takes no memory
            model.add_module(_WIDEST, widest)
        return model

    def _layer(self, weight: Weight, bias: Weight | None) -> Any:
        """The module of which this is the weight, and the bias where it has one."""
        import torch
        from peft.tuners import tuners_utils

        kind, sides = self._kind(weight)
        of_transformers: Any = vars(tuners_utils)["Conv1D"]  # only training/ imports transformers itself
        nn: Any = torch.nn
        with torch.device("meta"):
            makers: dict[str, Callable[[], Any]] = {
                "Embedding": lambda: nn.Embedding(*sides),
                "Conv1D": lambda: of_transformers(*sides),
                "Linear": lambda: nn.Linear(*sides, bias=bias is not None),
                "Conv1d": lambda: nn.Conv1d(*sides, weight.shape[2], bias=bias is not None),
                "Conv2d": lambda: nn.Conv2d(*sides, weight.shape[2:], bias=bias is not None),
                "Conv3d": lambda: nn.Conv3d(*sides, weight.shape[2:], bias=bias is not None),
            }
            layer = makers[kind]()
        layer.weight = nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
        if getattr(layer, "bias", None) is not None:
            numbers = np.zeros(tuple(layer.bias.shape)) if bias is None else bias.copy()
            layer.bias = nn.Parameter(torch.from_numpy(numbers), requires_grad=False)
        return layer

    def _kind(self, weight: Weight) -> tuple[str, tuple[int, int]]:
        """Name the class that stores such a weight, with the two sizes that it is made of."""
        if weight.ndim < 2 or weight.ndim > 5:
            raise ValueError("it is no weight of a layer that PEFT adapts")
        rows, columns = weight.shape[:2]
        if weight.ndim > 2:
            return f"Conv{weight.ndim - 2}d", (columns, rows)
        if self.source.is_embedding(self.module):
            return "Embedding", (rows, columns)
        return ("Conv1D" if self.source.in_by_out(self.module) else "Linear"), (columns, rows)


_WIDEST = "widest_of_all_modules"


def _as_torch(tensor: StoredTensor) -> torch.Tensor:
    """A factor, or indices, as they are stored."""
    import torch

    if tensor.is_float:
        return torch.from_numpy(wide(tensor))
    numbers = torch.frombuffer(bytearray(tensor.read_bytes()), dtype=torch_type(tensor.dtype))
    return numbers.reshape(tensor.shape)


FORMAT = AdapterFormat("PEFT", lambda names: False, read)
