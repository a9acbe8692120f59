"""Adapters of diffusion models find their modules in folders, pipelines and single files, under either's names."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import assert_measured
from safetensors.torch import save_file

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.blocks import in_diffusers
from wdanalysis.errors import CheckpointError, WdAnalysisError
from wdanalysis.merging.merge import merge

Tensors = dict[str, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


# --- names: diffusers' own conversions ----------------------------------------------------------------------


def sd15_names() -> list[str]:
    """Weights of the SD 1.5 UNet in its authors' names."""
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    attention = (
        "norm",
        "proj_in",
        "proj_out",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.ff.net.2",
    )
    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    names += [f"input_blocks.{n}.0.op" for n in (3, 6, 9)]
    names += [f"output_blocks.{n}.conv" for n in ("2.1", "5.2", "8.2")]
    residual = [f"input_blocks.{n}.0" for n in (1, 2, 4, 5, 7, 8, 10, 11)] + [
        "middle_block.0",
        "middle_block.2",
    ]
    residual += [f"output_blocks.{n}.0" for n in range(12)]
    attending = [f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"]
    attending += [f"output_blocks.{n}.1" for n in range(3, 12)]
    names += [f"{block}.{part}" for block in residual for part in resnet]
    names += [f"input_blocks.{n}.0.skip_connection" for n in (4, 7)]
    return names + [f"{block}.{part}" for block in attending for part in attention]


@pytest.mark.formats
def test_the_names_of_sd15_are_those_that_diffusers_converts_to() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    names = sd15_names()
    original = {
        f"model.diffusion_model.{name}.{kind}": torch.tensor(float(i))
        for i, name in enumerate(names)
        for kind in ("weight", "bias")
    }
    converted = utils.convert_ldm_unet_checkpoint(
        dict(original), {"layers_per_block": 2, "class_embed_type": None}
    )
    by_number = {
        float(t): name.removesuffix(".weight") for name, t in converted.items() if name.endswith(".weight")
    }
    assert len(by_number) == len(names)
    for number, name in enumerate(names):
        assert in_diffusers(name.replace(".", "_")) == (by_number[number].replace(".", "_"),)


@pytest.mark.formats
def test_the_names_of_flux_are_those_that_diffusers_converts_to() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    h, rows = 3072, {"qkv": 3 * 3072, "linear1": 7 * 3072}
    double = ["attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin"]
    names = [f"double_blocks.0.{stream}_{part}" for stream in ("img", "txt") for part in double]
    names += [f"single_blocks.0.{part}" for part in ("linear1", "linear2", "modulation.lin")]
    names += [f"{i}.{side}_layer" for i in ("time_in", "vector_in", "guidance_in") for side in ("in", "out")]
    names += ["img_in", "txt_in", "final_layer.linear"]
    original: Tensors = {}
    for number, name in enumerate(names):
        size = rows.get(name.rpartition(".")[2], h)
        original |= {f"{name}.{k}": torch.full((size, 1), float(number)) for k in ("weight", "bias")}
    for name in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        norm = f"{name}.norm"
        original |= {f"{norm}.{role}_norm.scale": torch.ones(1) for role in ("query", "key")}
    original |= {f"final_layer.adaLN_modulation.1.{k}": torch.zeros(2, 1) for k in ("weight", "bias")}
    converted = utils.convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    found: dict[int, list[str]] = {}
    for name, tensor in converted.items():
        if name.endswith(".weight") and "norm_" not in name:
            found.setdefault(int(tensor[0, 0]), []).append(name.removesuffix(".weight").replace(".", "_"))
    for number, name in enumerate(names):
        theirs = [n for n in found[number] if n != "norm_out_linear"]
        assert sorted(in_diffusers(name.replace(".", "_"))) == sorted(theirs), name


@pytest.mark.formats
def test_the_names_of_wan_are_those_that_diffusers_converts_to() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    names = [f"blocks.0.{a}_attn.{role}" for a in ("self", "cross") for role in "qkvo"]
    names += [
        "blocks.0.cross_attn.k_img",
        "blocks.0.cross_attn.v_img",
        "blocks.0.ffn.0",
        "blocks.0.ffn.2",
        "head.head",
    ]
    names += [
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
    ]
    original = {f"{name}.weight": torch.tensor(float(i)) for i, name in enumerate(names)}
    converted = {float(t): name for name, t in utils.convert_wan_transformer_to_diffusers(original).items()}
    for number, name in enumerate(names):
        flat = converted[number].removesuffix(".weight").replace(".", "_")
        assert in_diffusers(name.replace(".", "_")) == (flat,)


@pytest.mark.formats
def test_the_names_of_sd3_are_those_that_diffusers_converts_to() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    names = [f"joint_blocks.0.{stream}_block.{part}" for stream in ("x", "context") for part in parts]
    names += ["joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.attn2.proj"]
    last = [f"joint_blocks.1.{stream}_block.{part}" for stream in ("x", "context") for part in parts]
    others = ["x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    others += [f"{embedder}.mlp.{layer}" for embedder in ("t_embedder", "y_embedder") for layer in (0, 2)]
    original: Tensors = {"pos_embed": torch.zeros(1)}
    for number, name in enumerate([*names, *last, *others]):
        original |= {f"{name}.{kind}": torch.full((6, 1), float(number)) for kind in ("weight", "bias")}
    converted = utils.convert_sd3_transformer_checkpoint_to_diffusers(original)
    found: dict[int, list[str]] = {}
    for name, tensor in converted.items():
        if name.endswith(".weight"):
            found.setdefault(int(tensor.ravel()[0]), []).append(
                name.removesuffix(".weight").replace(".", "_")
            )
    for number, name in enumerate(names):
        assert sorted(in_diffusers(name.replace(".", "_"))) == sorted(found[number]), name


# --- fused matrices -----------------------------------------------------------------------------------------

QKV = ("to_q", "to_k", "to_v")


def flux(folder: Path) -> tuple[Path, Path]:
    """One small model as Black Forest Labs name it, and as diffusers does."""
    torch.manual_seed(0)
    qkv, linear1 = random(12, 4), random(28, 4)
    original = {"double_blocks.0.img_attn.qkv": qkv, "single_blocks.0.linear1": linear1}
    separate = {f"transformer_blocks.0.attn.{n}": w for n, w in zip(QKV, qkv.split(4), strict=True)}
    parts = zip((*(f"attn.{n}" for n in QKV), "proj_mlp"), linear1.split([4, 4, 4, 16]), strict=True)
    separate |= {f"single_transformer_blocks.0.{n}": w for n, w in parts}
    return (
        saved(
            folder / "flux.safetensors", {f"model.diffusion_model.{n}.weight": w for n, w in original.items()}
        ),
        saved(folder / "diffusers.safetensors", {f"{n}.weight": w for n, w in separate.items()}),
    )


def weights(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


def test_an_update_of_a_fused_matrix_is_divided_among_those_of_diffusers(tmp_path: Path) -> None:
    _, base = flux(tmp_path)
    up, down, alpha = random(28, 2), random(2, 4), torch.tensor(4.0)
    name = "lora_unet_single_blocks_0_linear1"
    factors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
    change = 2 * up @ down
    names = [f"single_transformer_blocks.0.{n}.weight" for n in (*(f"attn.{n}" for n in QKV), "proj_mlp")]
    shares = zip(names, change.split([4, 4, 4, 16]), strict=True)
    oracle = {n: weights(base)[n] + share for n, share in shares}
    assert_measured(base, saved(tmp_path / "lora.safetensors", factors), oracle)


@pytest.mark.parametrize("decomposed", [False, True])
def test_updates_of_separate_matrices_change_their_rows_of_a_fused_one(
    tmp_path: Path, decomposed: bool
) -> None:
    base, _ = flux(tmp_path)
    tensors: Tensors = {}
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    tuned = weights(base)[name].clone()
    for index, role in enumerate(QKV):
        if role == "to_k":
            continue
        module = f"transformer.transformer_blocks.0.attn.{role}"
        up, down, rows = random(4, 2 + index), random(2 + index, 4), slice(4 * index, 4 * index + 4)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        tuned[rows] += up @ down
        if decomposed:
            tensors[f"{module}.lora_magnitude_vector"] = m = random(4).abs()
            tuned[rows] *= (m / tuned[rows].norm(dim=1))[:, None]
    assert_measured(base, saved(tmp_path / "lora.safetensors", tensors), {name: tuned})


def test_a_loader_s_rule_is_applied_to_the_rows_of_a_fused_matrix(tmp_path: Path) -> None:
    base, _ = flux(tmp_path)
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    module = "lora_unet_transformer_blocks_0_attn_to_v"
    m = random(4, 1).abs()
    keys, change = factors(module, 4, KOHYA, dora_scale=m)
    before = weights(base)[name]
    applied = (before[8:] + change) * m / before[8:].norm(dim=1, keepdim=True)
    adapter = saved(tmp_path / "lora.safetensors", keys)
    found = wd.compare(base, {"x": adapter}, modules="all", applied_as="comfyui").metrics
    (row,) = found[(found["method"] == "x as comfyui") & (found["delta_d"] > 0)].itertuples()
    after = applied if row.vectors == 4 else torch.cat([before[:8], applied])
    assert row.delta_m == pytest.approx(float(wd.delta_m(before[-row.vectors :], after)), rel=1e-9)


def test_a_magnitude_of_inputs_cannot_be_divided_and_says_so(tmp_path: Path) -> None:
    _, base = flux(tmp_path)
    name = "lora_unet_single_blocks_0_linear1"
    parts = {"lora_up.weight": random(28, 2), "lora_down.weight": random(2, 4), "dora_scale": random(1, 4)}
    adapter = saved(tmp_path / "lora.safetensors", {f"{name}.{part}": t for part, t in parts.items()})
    with pytest.raises(CheckpointError, match=r"is fused, and .* keeps its matrices apart"):
        open_checkpoint(adapter).on(open_checkpoint(base))


# --- folders and pipelines ----------------------------------------------------------------------------------


def pipeline(folder: Path) -> tuple[Path, Any, Any]:
    """A small Stable Diffusion with its folder."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=50, **sizes))
    unet.save_pretrained(folder / "unet")
    text.save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder, unet, text


def peft_merged(model: Any, prefix: str) -> Tensors:
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            merged[f"{prefix}.{name}.weight"] = layer.get_base_layer().weight.detach().clone()
    return merged


@pytest.mark.formats
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_diffusers_saves_of_a_pipeline_is_measured_against_its_folder(
    tmp_path: Path, use_dora: bool
) -> None:
    base, unet, text = pipeline(tmp_path / "sd")
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "use_dora": use_dora}
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_out.0", "conv1"], **options))
    text.add_adapter(LoraConfig(target_modules=["q_proj"], **options))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
    )
    oracle = peft_merged(unet, "unet") | peft_merged(text, "text_encoder")
    assert_measured(base, tmp_path / "lora", oracle)


@pytest.mark.formats
def test_the_old_names_of_diffusers_are_those_of_the_same_modules(tmp_path: Path) -> None:
    base, unet, _ = pipeline(tmp_path / "sd")
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    before = dict(unet.named_parameters())
    tensors, oracle = {}, {}
    for role, name in (("q", "to_q"), ("out", "to_out.0")):
        up, down = torch.randn(8, 2), torch.randn(2, 8)
        tensors |= {
            f"unet.{module}.processor.to_{role}_lora.{side}.weight": t
            for side, t in (("up", up), ("down", down))
        }
        oracle[f"unet.{module}.{name}.weight"] = before[f"{module}.{name}.weight"].detach() + up @ down
    assert_measured(base, saved(tmp_path / "pytorch_lora_weights.safetensors", tensors), oracle)


@pytest.mark.formats
def test_kohya_s_names_as_lycoris_writes_them_are_found_in_a_pipeline(tmp_path: Path) -> None:
    kohya = pytest.importorskip("lycoris.kohya")
    base, unet, text = pipeline(tmp_path / "sd")
    network = kohya.create_network(1.0, 2, 1.0, None, text, unet, algo="lora", preset="attn-mlp")
    network.apply_to(text, unet, True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    adapter = tmp_path / "kohya.safetensors"
    network.save_weights(str(adapter), torch.float32, {})
    names = {f"lora_unet_{n.replace('.', '_')}": f"unet.{n}.weight" for n, _ in unet.named_modules()}
    names |= {f"lora_te_{n.replace('.', '_')}": f"text_encoder.{n}.weight" for n, _ in text.named_modules()}
    loras = [*network.unet_loras, *network.text_encoder_loras]
    assert loras
    oracle = {
        names[lora.lora_name]: (lora.org_weight + lora.get_diff_weight()[0].view(lora.shape)).detach()
        for lora in loras
    }
    assert_measured(base, adapter, oracle)


@pytest.mark.formats
def test_a_pipeline_s_adapter_can_be_merged(tmp_path: Path) -> None:
    base, unet, _ = pipeline(tmp_path / "sd")
    name = "mid_block_attentions_0_proj_in"
    up, down = torch.randn(16, 2), torch.randn(2, 16)
    parts = {f"lora_unet_{name}.lora_up.weight": up, f"lora_unet_{name}.lora_down.weight": down}
    adapter = saved(tmp_path / "lora.safetensors", parts)
    merged = merge(base / "unet", adapter, tmp_path / "merged")
    before = dict(unet.named_parameters())["mid_block.attentions.0.proj_in.weight"].detach()
    after = weights(merged.files[0])["mid_block.attentions.0.proj_in.weight"]
    torch.testing.assert_close(after, before + (up @ down).reshape(before.shape))


# --- writers ------------------------------------------------------------------------------------------------


def sdxl(folder: Path) -> Path:
    """A single file with the tensors of SDXL's three models that are tried here."""
    torch.manual_seed(0)
    layer, clip = "0.self_attn.q_proj", "conditioner.embedders.0.transformer.text_model.encoder.layers"
    tensors = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": random(4, 4),
        f"{clip}.{layer}.weight": random(4, 4),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": random(12, 4),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": random(8, 4),
        "first_stage_model.encoder.conv_in.weight": random(2, 3, 3, 3),
    }
    return saved(folder / "sdxl.safetensors", tensors)


def factors(
    module: str, out: int, spelling: tuple[str, str], **more: torch.Tensor
) -> tuple[Tensors, torch.Tensor]:
    """Keys of one module of rank 2, and its B·A."""
    up, down = random(out, 2), random(2, 4)
    keys = {f"{module}.{spelling[0]}.weight": up, f"{module}.{spelling[1]}.weight": down}
    return keys | {f"{module}.{part}": tensor for part, tensor in more.items()}, up @ down


KOHYA, PEFT = ("lora_up", "lora_down"), ("lora_B", "lora_A")


@pytest.mark.parametrize(
    "unet",
    [
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ],
)
def test_kohya_s_file_finds_all_three_models_of_a_single_sdxl_file(tmp_path: Path, unet: str) -> None:
    base = sdxl(tmp_path)
    before = weights(base)
    encoder, alpha = "text_model_encoder_layers_0", torch.tensor(1.0, dtype=torch.float16)
    tensors, of_unet = factors(f"lora_unet_{unet}", 4, KOHYA, alpha=alpha)
    of_first = factors(f"lora_te1_{encoder}_self_attn_q_proj", 4, KOHYA, alpha=alpha)
    of_second = factors(f"lora_te2_{encoder}_self_attn_k_proj", 4, KOHYA, alpha=torch.tensor(4))
    of_mlp = factors(f"lora_te2_{encoder}_mlp_fc1", 8, KOHYA)
    for keys, _ in (of_first, of_second, of_mlp):
        tensors |= keys
    by_name = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": of_unet / 2,
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": of_first[1]
        / 2,
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": torch.cat(
            [torch.zeros(4, 4), 2 * of_second[1], torch.zeros(4, 4)]
        ),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": of_mlp[1],
    }
    oracle = {name: before[name] + change for name, change in by_name.items()}
    adapter = saved(tmp_path / "kohya.safetensors", tensors)
    fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    pair = before[fused][4:8], oracle.pop(fused)[4:8]
    assert_measured(base, adapter, oracle, modules="attn1|q_proj|c_fc")
    (found,) = wd.compare(base, {"x": adapter}, modules="in_proj").metrics.query("delta_d > 0").itertuples()
    assert found.module.endswith("k")
    assert found.delta_d == pytest.approx(float(wd.delta_d(*pair)), rel=1e-9)
    notes = open_checkpoint(tmp_path / "kohya.safetensors").notes
    assert any("tells no alpha for 1 modules: their scale is 1" in note for note in notes)


def test_ai_toolkit_s_names_and_magnitudes_are_read(tmp_path: Path) -> None:
    base, _ = flux(tmp_path)
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    m = random(12).abs()
    keys, change = factors("diffusion_model.double_blocks.0.img_attn.qkv", 12, PEFT, magnitude=m)
    v = weights(base)[name] + change
    oracle = {name: v * (m / v.norm(dim=1))[:, None]}
    assert_measured(base, saved(tmp_path / "toolkit.safetensors", keys), oracle)


def test_onetrainer_s_magnitudes_of_the_inputs_are_read(tmp_path: Path) -> None:
    _, base = flux(tmp_path)
    name, m = "transformer_blocks.0.attn.to_q.weight", random(1, 4).abs()
    module = "lora_transformer_transformer_blocks_0_attn_to_q"
    keys, change = factors(module, 4, KOHYA, dora_scale=m, alpha=torch.tensor(1.0))
    v = weights(base)[name] + change / 2
    assert_measured(base, saved(tmp_path / "onetrainer.safetensors", keys), {name: v * m / v.norm(dim=0)})


def test_alpha_in_the_metadata_of_a_model_s_own_adapter_counts_by_module(tmp_path: Path) -> None:
    _, base = flux(tmp_path)
    tensors, oracle = {}, {}
    for role, scale in (("to_q", 3.0), ("to_k", 5.0)):
        keys, change = factors(f"transformer_blocks.0.attn.{role}", 4, PEFT)
        tensors |= keys
        name = f"transformer_blocks.0.attn.{role}.weight"
        oracle[name] = weights(base)[name] + scale * change
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"attn.to_k": 10}, "rank_pattern": {}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    assert_measured(base, saved(tmp_path / "lora.safetensors", tensors, metadata), oracle)


def test_two_text_encoders_that_a_name_may_mean_are_not_guessed_between(tmp_path: Path) -> None:
    names = [
        f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj.weight"
        for encoder in ("text_encoder", "text_encoder_2")
    ]
    base = saved(tmp_path / "both.safetensors", {name: random(4, 4) for name in names})
    keys, _ = factors("lycoris_text_model_encoder_layers_0_self_attn_q_proj", 4, KOHYA)
    with pytest.raises(CheckpointError, match=r"could be text_encoder.* or text_encoder_2"):
        open_checkpoint(saved(tmp_path / "lora.safetensors", keys)).on(open_checkpoint(base))


def test_an_adapter_of_another_model_says_that_nothing_matches(tmp_path: Path) -> None:
    base, _ = flux(tmp_path)
    keys, _ = factors("lora_unet_down_blocks_1_attentions_0_proj_in", 4, KOHYA)
    with pytest.raises(WdAnalysisError, match=r"none of the 1 modules that .* adapts"):
        wd.compare(base, {"x": saved(tmp_path / "lora.safetensors", keys)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_a.lora_up.weight": (4, 2)}, "has only up, which is no whole update"),
        ({"lora_unet_a.lora_up.weight": (4, 2), "lora_unet_a.lora_down.weight": (3, 4)}, "share no rank"),
        ({"lora_unet_a.hada_w1_a": (4, 2), "lora_unet_a.what": (1,)}, "holds 'lora_unet_a.what'"),
        ({"lora_unet_a.lora_up.weight": (4, 2), "lora_unet_a.alpha": (2,)}, "and no number|no whole update"),
        ({"lora_unet_a.dora_scale": (3, 1)}, "does not fit|fits neither"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_what_is_wrong(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    base = saved(tmp_path / "base.safetensors", {"a.weight": random(4, 4)})
    adapter = saved(tmp_path / "x.safetensors", {name: random(*shape) for name, shape in tensors.items()})
    with pytest.raises(WdAnalysisError, match=message):
        wd.compare(base, {"x": adapter}, modules="all")


# --- hostile files ------------------------------------------------------------------------------------------

ENDINGS = [
    *(
        "lora_up.weight",
        "lora_down.weight",
        "lora_mid.weight",
        "alpha",
        "dora_scale",
        "hada_w1_a",
        "hada_w1_b",
    ),
    *(
        "hada_w2_a",
        "hada_w2_b",
        "hada_t1",
        "lokr_w1",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "oft_blocks",
        "rescale",
    ),
    *("diff", "diff_b", "w_norm", "on_input", "weight", "a1.weight", "b1.weight", "magnitude", "nonsense"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["lora_unet_a_b", "unet.a.b", "lycoris_a_b"]), st.sampled_from(ENDINGS)),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
        ),
        min_size=1,
        max_size=7,
    )
)
def test_whatever_a_file_holds_only_our_own_errors_come_out(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[tuple[str, str], tuple[list[int], torch.dtype]]
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    base = saved(folder / "base.safetensors", {"a.b.weight": torch.ones(4, 3), "c.weight": torch.ones(2, 2)})
    tensors = {
        f"{module}.{part}": torch.ones(shape, dtype=kind) for (module, part), (shape, kind) in drawn.items()
    }
    adapter = saved(folder / "adapter.safetensors", tensors)
    with contextlib.suppress(WdAnalysisError):
        wd.compare(base, {"x": adapter}, modules="all")
