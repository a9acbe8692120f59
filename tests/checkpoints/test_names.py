"""Names mean what transformers and PEFT say: their modules, saved files and gradients are asked."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from wdanalysis.checkpoints.names import (
    ATTENTION_ROLES,
    ModuleSelection,
    NameIndex,
    closest,
    match,
    recognise,
)
from wdanalysis.errors import CheckpointError, WdAnalysisError

Shapes = dict[str, tuple[int, ...]]

LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 32,
}
GQA = LLAMA | {"num_key_value_heads": 2}
BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 32,
}
T5: dict[str, Any] = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 2, "vocab_size": 32}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "n_positions": 16}
VISION = {k: v for k, v in LLAMA.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FALCON: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
}


def _whisper() -> Any:
    config = hf.WhisperConfig(
        **BART,
        **TOKENS,
        num_mel_bins=8,
        decoder_start_token_id=1,
        max_source_positions=8,
        max_target_positions=8,
    )
    return hf.WhisperForConditionalGeneration(config)


def _llava() -> Any:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**GQA), vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=3
    )
    return hf.LlavaForConditionalGeneration(config)


def _clip() -> Any:
    config = hf.CLIPConfig(
        text_config=LLAMA | {"max_position_embeddings": 8}, vision_config=VISION, projection_dim=8
    )
    return hf.CLIPModel(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA, head_dim=4, tie_word_embeddings=True)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GQA, head_dim=4)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GQA, pad_token_id=0)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**LLAMA)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**LLAMA)),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**LLAMA, embedding_size=16)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=4, vocab_size=32)
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**LLAMA, **TOKENS, cls_token_id=1, sep_token_id=2)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, max_position_embeddings=16)),
    "whisper": _whisper,
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**LLAMA, ffn_dim=24, word_embed_proj_dim=16)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2-cross": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, add_cross_attention=True)),
    "bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**GPT2)),
    "bigcode-heads": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**GPT2, multi_query=False)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**LLAMA)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=32)),
    "falcon-new": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)
    ),
    "falcon-multi-query": lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON)),
    "falcon-old": lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, multi_query=False)),
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**GPT2, rotary_dim=4)),
    "persimmon": lambda: hf.PersimmonForCausalLM(hf.PersimmonConfig(**LLAMA)),
    "fuyu": lambda: hf.FuyuForCausalLM(
        hf.FuyuConfig(**LLAMA, patch_size=4, text_config=LLAMA | {"model_type": "persimmon"})
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=16, n_heads=4, n_layers=2, vocab_size=32)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
    "clip": _clip,
    "llava": _llava,
}

ATTENTION = {"q", "k", "v", "o"}
MLP = {"up", "down"}
GATED = {"gate", "up", "down"}


def _of(stacks: str, roles: set[str]) -> set[str]:
    return {f"{stack}.{role}" for stack in stacks.split() for role in roles}


ENCODER_DECODER = _of("encoder decoder cross", ATTENTION)
IN_EVERY_LAYER: dict[str, set[str]] = {
    **dict.fromkeys(["llama", "qwen3", "gemma2", "phi3", "modernbert"], ATTENTION | GATED),
    **dict.fromkeys(["bert", "roberta", "electra", "distilbert", "opt", "vit"], ATTENTION | MLP),
    **dict.fromkeys(
        ["gpt2", "bigcode", "bigcode-heads", "gpt-neox", "bloom", "codegen", "mpt"], ATTENTION | MLP
    ),
    **dict.fromkeys(["persimmon", "fuyu"], ATTENTION | MLP),
    **dict.fromkeys(["falcon-new", "falcon-multi-query", "falcon-old"], ATTENTION | MLP),
    **dict.fromkeys(["bart", "whisper", "t5"], ENCODER_DECODER | _of("encoder decoder", MLP)),
    "t5-gated": ENCODER_DECODER | _of("encoder decoder", GATED),
    "gpt2-cross": ATTENTION | MLP | _of("cross", ATTENTION),
    "clip": _of("text vision", ATTENTION | MLP),
    "llava": _of("text", ATTENTION | GATED) | _of("vision", ATTENTION | MLP),
}
FUSED = [
    *("gpt2", "bigcode", "bigcode-heads", "gpt-neox", "bloom", "phi3", "codegen", "mpt", "modernbert"),
    *("falcon-new", "falcon-multi-query", "falcon-old", "persimmon", "fuyu"),
]


def _saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _shapes(tensors: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- roles, layers, orientation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_every_role_of_a_saved_model_is_found_once_in_every_layer(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    shapes = _shapes(_saved(model, tmp_path))
    architecture = recognise(shapes, model.config.to_dict())
    matrices = [m for name, shape in shapes.items() if (m := architecture.matrix(name, shape))]
    in_layers = [
        (part.module, m.layer)
        for m in matrices
        if m.layer is not None
        for part in m.parts
        if "rel_bias" not in part.module
    ]
    assert sorted(in_layers) == sorted(
        (module, layer) for module in IN_EVERY_LAYER[kind] for layer in range(2)
    )
    assert architecture.family == model.config.model_type


@pytest.mark.parametrize("kind", MODELS)
def test_a_matrix_is_in_by_out_where_the_module_is_a_conv1d_or_an_embedding(kind: str) -> None:
    model = MODELS[kind]()
    architecture = recognise(_shapes(model.state_dict()), model.config.to_dict())
    outputs = {
        nn.Linear: "out_features",
        Conv1D: "nf",
        nn.Embedding: "embedding_dim",
        nn.Conv2d: "out_channels",
    }
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls in outputs:
                matrix = architecture.matrix(f"{name}.weight", tuple(module.weight.shape))
                assert matrix is not None
                assert matrix.in_by_out == isinstance(module, Conv1D | nn.Embedding), name
                covered = sorted(i for part in matrix.parts for run in part.runs for i in range(*run))
                assert covered == list(range(getattr(module, outputs[cls]))), name


@pytest.mark.parametrize(
    "kind", ["gpt2", "gpt2-cross", "bigcode", "gpt-neox", "mpt", "starcoder2", "gpt-neo"]
)
def test_gpt2_is_told_from_models_of_linear_layers_by_shapes_alone(kind: str) -> None:
    others: dict[str, Callable[[], Any]] = {
        "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**GQA, **TOKENS)),
        "gpt-neo": lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                hidden_size=16,
                num_layers=2,
                num_heads=4,
                vocab_size=32,
                attention_types=[[["global", "local"], 1]],
            )
        ),
    }
    model = (MODELS | others)[kind]()
    architecture = recognise(_shapes(model.state_dict()))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            matrix = architecture.matrix(f"{name}.weight", tuple(module.weight.shape))
            assert matrix is not None
            assert matrix.in_by_out == isinstance(module, Conv1D), name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (16,)),
        ("h.0.attn.c_attn.bias", (48,)),
        ("h.0.attn.bias", (1, 1, 8, 8)),
        ("h.0.attn.masked_bias", ()),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("embeddings.position_ids", (1, 512)),
        ("vit.embeddings.cls_token", (1, 1, 16)),
        ("vit.embeddings.position_embeddings", (1, 5, 16)),
        ("final_logits_bias", (1, 32)),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 48, 16)),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", (2, 2)),
        ("base_model.model.h.0.attn.c_attn.lora_A.default.weight", (8, 16)),
        ("conv.parametrizations.weight.original0", (1, 1, 4)),
    ],
)
def test_biases_norms_buffers_and_fused_experts_are_no_matrices(name: str, shape: tuple[int, ...]) -> None:
    assert recognise({name: shape}).matrix(name, shape) is None


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("blob.blocks.7.mixer.in_proj.weight", 7, "mixer.in_proj"),
        ("model.features.3.weight", 3, "features"),
        ("classifier.weight", None, "classifier"),
    ],
)
def test_an_unknown_name_keeps_its_layer_and_the_rest_of_it(
    name: str, layer: int | None, module: str
) -> None:
    matrix = recognise({name: (8, 4)}).matrix(name, (8, 4))
    assert matrix is not None
    assert (matrix.layer, matrix.parts[0].module, matrix.recognised) == (layer, module, False)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.experts.gate_up_proj_scales",
        "layers.0.self_attn.q_proj._weight_scale",
        "layers.0.self_attn.q_proj._weight_zero_point",
        "layers.0.self_attn.q_proj.biases",
        "layers.0.self_attn.q_proj.weight_scale_inv",
    ],
)
def test_scales_and_zeros_of_quantised_weights_are_no_matrices(name: str) -> None:
    assert recognise({name: (8, 4)}).matrices(name, (8, 4)) == ()


def test_three_dimensions_are_a_convolution_only_where_the_name_says_so() -> None:
    architecture = recognise({})
    assert architecture.matrix("encoder.conv1.weight", (8, 4, 3)) is not None
    assert architecture.matrices("layers.0.memory.weight", (8, 4, 3)) == ()
    assert architecture.is_unread_stack("layers.0.memory.weight", (8, 4, 3))


def test_a_convolution_reads_as_output_channels_by_the_rest() -> None:
    name, shape = "encoder.conv1.weight", (16, 8, 3)
    matrix = recognise({name: shape}).matrix(name, shape)
    assert matrix is not None
    assert matrix.parts[0].runs == ((0, 16),)


# --- fused projections --------------------------------------------------------------------------------------


def _rows_by_gradient(model: Any, fused: nn.Module) -> dict[str, set[int]]:
    """Which outputs of `fused` are q, k and v, asked of the model's own attention.

    One token attends to itself alone, whatever q and k are, so its output depends on v only. What the second
    of two tokens sees of the first are k and v, never its q.
    """
    recorded: list[torch.Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        recorded.append(output)

    def used(tokens: list[int]) -> set[int]:
        recorded.clear()
        last = model(torch.tensor([tokens])).logits[0, -1]
        (last * torch.linspace(-1, 1, len(last))).sum().backward()
        gradient = recorded[0].grad
        assert gradient is not None
        first = gradient.reshape(len(tokens), -1)[0].abs()
        return set(torch.nonzero(first > 1e-9 * first.max()).flatten().tolist())

    with contextlib.ExitStack() as stack:
        stack.callback(fused.register_forward_hook(record).remove)
        v, k_and_v = used([5]), used([5, 9])
    size = recorded[0].shape[-1]
    return {"q": set(range(size)) - k_and_v, "k": k_and_v - v, "v": v}


@pytest.mark.parametrize("kind", FUSED)
def test_q_k_and_v_are_the_rows_that_the_model_itself_uses_as_such(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().double().eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    architecture = recognise(_shapes(model.state_dict()), model.config.to_dict())
    (name, fused) = next(
        (name, module)
        for name, module in model.named_modules()
        if name.endswith(("c_attn", "query_key_value", "qkv_proj", "Wqkv")) and ".1." in name
    )
    matrix = architecture.matrix(f"{name}.weight", tuple(fused.weight.shape))
    assert matrix is not None
    ours = {part.module: {i for run in part.runs for i in range(*run)} for part in matrix.parts}
    assert ours == _rows_by_gradient(model, fused)


def test_queries_of_lightning_attention_lie_by_head() -> None:
    torch.manual_seed(0)
    config = hf.MiniMaxConfig(
        **GQA,
        head_dim=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=4,
        layer_types=["linear_attention", "linear_attention"],
    )
    model = hf.MiniMaxForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")
    name = "model.layers.1.self_attn.qkv_proj"
    matrix = recognise(_shapes(model.state_dict()), config.to_dict()).matrix(f"{name}.weight", (48, 16))
    assert matrix is not None
    ours = {part.module: {i for run in part.runs for i in range(*run)} for part in matrix.parts}
    assert ours["q"] == _rows_by_gradient(model, model.get_submodule(name))["q"]


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.self_attn.query_key_value.weight"]
)
def test_a_model_type_that_is_not_known_vetoes_what_names_suggest(name: str) -> None:
    config = {"model_type": "of-tomorrow", "num_attention_heads": 4}
    matrix = recognise({name: (48, 16)}, config).matrix(name, (48, 16))
    assert matrix is not None
    assert [part.module for part in matrix.parts] == ["qkv"]
    assert matrix.note is not None
    assert name in matrix.note


@pytest.mark.parametrize(
    ("kind", "fused", "following"), [("phi3", "gate_up_proj", "down_proj"), ("modernbert", "Wi", "Wo")]
)
def test_up_is_what_the_mlp_is_linear_in_and_gate_what_it_is_not(
    kind: str, fused: str, following: str
) -> None:
    model = MODELS[kind]().eval()
    mlp = model.model.layers[1].mlp
    name = f"model.layers.1.mlp.{fused}.weight"
    matrix = recognise(_shapes(model.state_dict()), model.config.to_dict()).matrix(name, (48, 16))
    assert matrix is not None
    inputs: list[torch.Tensor] = []
    getattr(mlp, following).register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    x = torch.randn(1, 3, 16)
    mlp(x)
    for part in matrix.parts:
        doubled = torch.ones(48)
        doubled[slice(*part.runs[0])] = 2
        hook = getattr(mlp, fused).register_forward_hook(lambda _module, _args, out, by=doubled: out * by)
        mlp(x)
        hook.remove()
    plain, twice = (
        inputs[0],
        {part.module: after for part, after in zip(matrix.parts, inputs[1:], strict=True)},
    )
    torch.testing.assert_close(twice["up"], 2 * plain)
    assert not torch.allclose(twice["gate"], 2 * plain)


@pytest.mark.parametrize("kind", ["gpt-neox", "bloom", "falcon-new", "bigcode", "bigcode-heads"])
def test_a_projection_fused_by_head_is_left_whole_and_said_so_without_a_config(kind: str) -> None:
    shapes = _shapes(MODELS[kind]().state_dict())
    name = next(name for name in shapes if name.endswith(("query_key_value.weight", "c_attn.weight")))
    matrix = recognise(shapes).matrix(name, shapes[name])
    assert matrix is not None
    assert [part.module for part in matrix.parts] == ["qkv"]
    assert matrix.recognised
    assert matrix.note is not None
    assert "config.json" in matrix.note


def test_internlm2_keeps_the_queries_of_each_key_and_value_head_beside_them() -> None:
    name, heads, kv_heads, head_dim = "model.layers.0.attention.wqkv.weight", 4, 2, 4
    config = {"model_type": "internlm2", "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    matrix = recognise({name: (32, 16)}, config).matrix(name, (32, 16))
    assert matrix is not None
    grouped = torch.arange(32).reshape(
        kv_heads, heads // kv_heads + 2, head_dim
    )  # as its authors' code views it
    expected = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
    for part in matrix.parts:
        assert [i for run in part.runs for i in range(*run)] == expected[part.module].flatten().tolist()


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "model.layers.1.self_attn.W_pack.weight"])
def test_thirds_one_after_the_other_need_no_config(name: str) -> None:
    matrix = recognise({name: (48, 16)}).matrix(name, (48, 16))
    assert matrix is not None
    assert [(p.module, p.runs) for p in matrix.parts] == [
        ("q", ((0, 16),)),
        ("k", ((16, 32),)),
        ("v", ((32, 48),)),
    ]


# --- matching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_names_in_memory_match_names_on_disk_and_tied_ones_the_kept_one(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    memory, disk = model.state_dict(), _saved(model, tmp_path)
    matching = match(memory, disk)
    assert [name for name in matching.only_base if memory[name].ndim > 1] == []
    for name, stored in matching.pairs.items():
        assert torch.equal(memory[name], disk[stored]), (name, stored)
    assert set(matching.tied) == {
        name for name in memory if name not in disk and matching.pairs[name] in memory
    }


@pytest.mark.parametrize(
    ("bare", "headed"),
    [
        (hf.BertModel, hf.BertForSequenceClassification),
        (hf.RobertaModel, hf.RobertaForMaskedLM),
        (hf.DistilBertModel, hf.DistilBertForMaskedLM),
        (hf.GPT2Model, hf.GPT2LMHeadModel),
        (hf.LlamaModel, hf.LlamaForCausalLM),
        (hf.BartModel, hf.BartForConditionalGeneration),
        (hf.ViTModel, hf.ViTForImageClassification),
    ],
)
def test_a_root_prefix_may_be_there_or_not(bare: type[Any], headed: type[Any]) -> None:
    with torch.device("meta"):
        inner, outer = bare(bare.config_class()), headed(headed.config_class())
    prefix = headed.base_model_prefix
    expected = {
        f"{prefix}.{name}": name for name in inner.state_dict() if f"{prefix}.{name}" in outer.state_dict()
    }
    assert match(expected, inner.state_dict()).pairs == expected


def test_wrappers_are_left_out_at_any_depth() -> None:
    inner = nn.ModuleDict({"encoder": nn.Linear(2, 2, bias=False)})
    compiled: Any = torch.compile(nn.DataParallel(inner))
    assert match(inner.state_dict(), compiled.state_dict()).pairs == {
        "encoder.weight": "_orig_mod.module.encoder.weight"
    }
    assert (
        NameIndex(["a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight"]).tensor_of("a.b") is not None
    )


def test_an_unmerged_peft_model_matches_by_its_base_layers_and_saved_modules() -> None:
    import peft

    model = hf.BertForSequenceClassification(hf.BertConfig(**LLAMA))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    )
    matching = match(base, tuned.state_dict())
    assert matching.only_base == ()
    assert matching.pairs["classifier.weight"] == "base_model.model.classifier.modules_to_save.default.weight"
    assert all(torch.equal(base[name], tuned.state_dict()[found]) for name, found in matching.pairs.items())


def test_both_spellings_of_weight_norm_are_one() -> None:
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(2, 3))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    pairs = match(old.state_dict(), new.state_dict()).pairs
    assert pairs["weight_g"] == "parametrizations.weight.original0"
    assert pairs["weight_v"] == "parametrizations.weight.original1"


@pytest.mark.parametrize("kind", MODELS)
def test_every_module_that_an_adapter_can_name_is_found(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    disk = _saved(model, tmp_path)
    index = NameIndex(disk)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            found = index.tensor_of(name)
            assert found is not None, name
            assert torch.equal(disk[found], module.weight), name


def test_a_module_of_another_model_is_not_found() -> None:
    names = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).state_dict()
    assert NameIndex(names).tensor_of("bert.encoder.layer.0.attention.self.query") is None


def test_two_names_that_differ_only_in_prefix_are_matched_exactly_or_not_at_all() -> None:
    both = ["model.encoder.fc.weight", "encoder.fc.weight"]
    assert match(both, both).pairs == {name: name for name in both}
    assert match(["encoder.fc.weight"], both).only_tuned == ("model.encoder.fc.weight",)
    for base, tuned in [(["module.encoder.fc.weight"], both), (both, ["module.encoder.fc.weight"])]:
        with pytest.raises(CheckpointError, match=r"'encoder\.fc\.weight' and 'model\.encoder\.fc\.weight'"):
            match(base, tuned)


def test_a_text_model_is_found_in_its_multimodal_one_and_the_other_way_round() -> None:
    text = hf.Qwen2ForCausalLM(hf.Qwen2Config(**GQA)).state_dict()
    config = hf.Qwen2_5_VLConfig(
        text_config=GQA,
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 4,
            "intermediate_size": 24,
            "out_hidden_size": 16,
        },
    )
    multimodal = hf.Qwen2_5_VLForConditionalGeneration(config).state_dict()
    for base, tuned in ((text, multimodal), (multimodal, text)):
        matching = match(base, tuned)
        assert len(matching.pairs) == len(text)
        assert all("visual" in name for name in (*matching.only_base, *matching.only_tuned))
    older = [
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        for name in multimodal
    ]
    assert not match(older, multimodal).only_base
    assert (
        NameIndex(text).tensor_of("language_model.model.layers.1.mlp.up_proj")
        == "model.layers.1.mlp.up_proj.weight"
    )


def test_the_closest_names_are_told_once_for_all_layers() -> None:
    theirs = [f"blocks.{layer}.attn.{role}" for layer in range(30) for role in ("q_proj", "k_proj")]
    ours = [
        f"model.layers.{layer}.self_attn.{role}"
        for layer in range(30)
        for role in ("q_proj", "k_proj", "v_proj")
    ]
    assert closest(theirs, ours, most=2) == [
        ("blocks.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("blocks.0.attn.k_proj", "model.layers.0.self_attn.k_proj"),
    ]
    assert closest(["aaaa"], ["zzzz"]) == []


def test_metadata_of_safetensors_save_model_tells_which_name_was_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = nn.ModuleDict({"zebra": nn.Linear(3, 3, bias=False), "ant": nn.Linear(3, 3, bias=False)})
    model["zebra"].weight = model["ant"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        matching = match(["zebra.weight", "ant.weight"], file.keys(), metadata=file.metadata())
    assert matching.tied == {"zebra.weight": "ant.weight"}
    assert matching.only_base == ()


def test_a_head_that_is_not_tied_is_missing_and_not_the_input_embedding() -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert match(names, names[:1], tie_word_embeddings=False).only_base == ("lm_head.weight",)
    assert match(names, names[:1]).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert match(names, names[1:]).only_base == ("model.embed_tokens.weight",)


# --- selection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("all", {"q", "decoder.q", "cross.v", "up", "mixer.in_proj"}),
        ("q,v", {"q", "decoder.q", "cross.v"}),
        ("decoder.q, up", {"decoder.q", "up"}),
        (r"layers\.\d{1,2}\.mixer", {"mixer.in_proj"}),
        (["q", r"mixer\."], {"q", "decoder.q", "mixer.in_proj"}),
    ],
)
def test_modules_are_chosen_by_role_by_stack_and_by_regular_expression(
    text: str | list[str], selected: set[str]
) -> None:
    selection = ModuleSelection.parse(text)
    modules = ["q", "decoder.q", "cross.v", "up", "mixer.in_proj"]
    assert {
        m for m in modules if selection.matches(m, f"layers.3.{m}.weight" if "mixer" in m else "w")
    } == selected


@pytest.mark.parametrize("text", ["q_proj(", "", " , ", []])
def test_a_selection_that_cannot_be_read_is_refused(text: str | list[str]) -> None:
    with pytest.raises(WdAnalysisError):
        ModuleSelection.parse(text)


def test_a_fused_attention_projection_counts_as_attention() -> None:
    assert {"q", "k", "v", "o", "qkv"} <= ATTENTION_ROLES
    assert "up" not in ATTENTION_ROLES
