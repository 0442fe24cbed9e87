"""Diffusion and tiny decoders load from every published layout; a place with several decoders names them."""

import json
import re

import mlx.core as mx
import pytest
from checkpoint_files import decoder_of, original_json, parameters, split, write, write_json
from diffusion_cases import original_tensors, reference_decoder, reference_file
from tiny_cases import reference_decoder as tiny_decoder
from tiny_cases import stored_tensors

from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.cli import main
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig

CONFIG = json.loads(reference_file()[1]["config"])["vae"]
DIFFUSERS = json.loads(reference_file()[1]["diffusers_config"])


def original():
    """The video VAE's file alone, with its encoder."""
    return original_tensors() | {"encoder.conv_in.conv.weight": mx.zeros((8, 48, 3, 3, 3))}


def in_original_file(folder):
    return write(folder / "ltx-2.5-video-vae-bf16.safetensors", original(), CONFIG)


def in_combined_checkpoint(folder):
    tensors = {f"vae.{name}": value for name, value in original().items()}
    tensors["model.diffusion_model.patchify_proj.weight"] = mx.zeros((8, 8))
    return write(folder / "ltx-2.5.safetensors", tensors, CONFIG)


def diffusers_tensors():
    tensors = {}
    for name, value in original_tensors().items():
        name = name.replace("mlp.0.", "timestep_embedder.linear_1.") if "t_embedder" in name else name
        name = name.replace("mlp.2.", "timestep_embedder.linear_2.") if "t_embedder" in name else name
        name = name.replace(".q_norm.", ".norm_q.").replace(".k_norm.", ".norm_k.")
        name = name.replace("attn.proj.", "attn.to_out.0.")
        if statistic := re.fullmatch(r"per_channel_statistics\.(mean|std)-of-means", name):
            tensors[f"latents_{statistic[1]}"] = value
        elif ".qkv." in name:
            for part, rows in zip("qkv", mx.split(value, 3), strict=True):
                tensors[name.replace(".qkv.", f".to_{part}.")] = rows
        elif name != "decoder.type_emb":
            tensors[name] = value
    return tensors


def in_diffusers_folder(folder):
    write(folder / "diffusion_decoder/diffusion_pytorch_model.safetensors", diffusers_tensors())
    write_json(folder / "diffusion_decoder/config.json", DIFFUSERS)
    return folder


def in_mlx_conversion(folder):
    tensors = {}
    for name, value in original_tensors().items():
        tensors[f"vae_decoder.{name.removeprefix('decoder.').removesuffix('-of-means')}"] = value
    write_json(folder / "vae_decoder_av_config.json", {"vae": CONFIG})
    return write(folder / "vae_decoder_av.safetensors", tensors)


LAYOUTS = [
    (in_original_file, "original"),
    (in_combined_checkpoint, "combined"),
    (in_diffusers_folder, "diffusers"),
    (in_mlx_conversion, "mlx-forge"),
]


def same(one, other):
    one, other = parameters(one), parameters(other)
    return one.keys() == other.keys() and all(bool(mx.array_equal(one[name], other[name])) for name in one)


@pytest.mark.parametrize(("make", "layout"), LAYOUTS)
def test_a_diffusion_decoder_comes_back_from_every_layout(make, layout, tmp_path):
    source = make(tmp_path)
    info = describe_checkpoint(source)
    assert (info.layout, info.version, info.dtype) == (layout, "LTX-2.5 diffusion", "float32")
    assert info.config == reference_decoder().config
    assert info.decoder_bytes == 4 * (info.config.parameters + 2 * info.config.latent_channels)
    assert same(load_decoder(source), reference_decoder())


def test_gates_are_folded_into_what_they_multiply(tmp_path):
    rng = mx.random.key(0)
    tensors, gates = original(), {}
    for name, value in tensors.items():
        for target, gate in ((".attn.proj.", "msa"), (".mlp.w_down.", "mlp"), (".context_proj.", "ctx")):
            if name.startswith("decoder.diff_blocks.") and target in name:
                rng, key = mx.random.split(rng)
                place = f"{name.partition(target)[0]}.gate_{gate}"
                gates.setdefault(place, mx.random.normal(value.shape[:1], key=key))
                tensors[name] = value / (gates[place] if value.ndim == 1 else gates[place][:, None])
    tensors |= gates | {"decoder.coarse_head.weight": mx.zeros((2, 2))}
    loaded = load_decoder(write(tmp_path / "gated.safetensors", tensors, CONFIG))
    for name, value in parameters(reference_decoder()).items():
        assert mx.allclose(parameters(loaded)[name], value, rtol=1e-5, atol=1e-6), name


def test_shapes_tell_widths_where_there_is_no_config(tmp_path):
    info = describe_checkpoint(write(tmp_path / "vae.safetensors", original()))
    told = reference_decoder().config
    assert info.config.stage_channels == told.stage_channels and info.config.head_dim == told.head_dim
    assert info.config.stage_kernels == DiffusionDecoderConfig().stage_kernels


def test_dtypes(tmp_path):
    path = in_original_file(tmp_path)
    assert load_decoder(path, dtype="bf16").dtype == mx.bfloat16
    assert load_decoder(path).dtype == mx.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.conv_out.bias": None}, "conv_out.bias is missing"),
        ({"decoder.diff_blocks.0.extra": mx.zeros((2,))}, r"decoder.diff_blocks.0.extra is surplus"),
        (
            {"decoder.diff_blocks.1.attn.qkv.bias": mx.zeros((47,))},
            r"qkv.bias is \(47,\) where \(48,\) is expected",
        ),
    ],
)
def test_tensors_must_be_those_of_the_config(changes, message, tmp_path):
    tensors = {name: value for name, value in (original() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_decoder(write(tmp_path / "vae.safetensors", tensors, CONFIG))


@pytest.mark.parametrize("name", ["taeltx2_3", "taeltx2_3_wide"])
def test_a_tiny_decoder_comes_back(name, tmp_path):
    encoder = {"encoder.0.weight": mx.zeros((64, 48, 3, 3))}
    path = write(tmp_path / f"{name}.safetensors", stored_tensors(name) | encoder)
    info = describe_checkpoint(path)
    assert info.layout == "taehv" and info.config.parameters * 4 == info.decoder_bytes
    assert info.config == tiny_decoder(name).config
    assert same(load_decoder(path), tiny_decoder(name))


def test_a_tiny_decoder_of_other_latents_is_refused(tmp_path):
    tensors = stored_tensors("taeltx2_3")
    tensors["decoder.7.conv.weight"] = tensors["decoder.7.conv.weight"][:24]
    with pytest.raises(ValueError, match="not the tensors of a tiny decoder of LTX latents"):
        load_decoder(write(tmp_path / "taew2_1.safetensors", tensors))


def test_several_decoders_are_named_with_a_word_on_each(tmp_path):
    decoder = decoder_of("ltx-2.3")
    in_diffusers_folder(tmp_path)
    write(tmp_path / "vae/model.safetensors", split(decoder), CONFIG)
    with pytest.raises(
        ValueError,
        match=r"vae/model.safetensors \(convolutional, 0.231 M.*\), "
        r"diffusion_decoder/diffusion_pytorch_model.safetensors \(diffusion, 0.499 M",
    ):
        load_decoder(tmp_path)


def test_files_side_by_side_are_told_apart_by_their_kind(tmp_path):
    conv, tiny = decoder_of("ltx-2.3"), stored_tensors("taeltx2_3")
    in_mlx_conversion(tmp_path)
    write(tmp_path / "vae_decoder.safetensors", split(conv))
    write(tmp_path / "taeltx2_3.safetensors", tiny)
    config = json.loads((tmp_path / "vae_decoder_av_config.json").read_text())
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"\(tiny, for pre.*er.safetensors \(conv.*av.safetensors \(diff"):
        load_decoder(tmp_path)
    # The JSON is the diffusion decoder's, and says nothing of the convolutional one.
    with pytest.raises(
        ValueError, match="comes without a config, and shapes cannot tell the spatial padding"
    ):
        load_decoder(tmp_path / "vae_decoder.safetensors")
    assert same(load_decoder(tmp_path / "vae_decoder.safetensors", config=original_json("ltx-2.3")), conv)
    assert same(load_decoder(tmp_path / "vae_decoder_av.safetensors"), reference_decoder())


def test_a_pruned_decoder_beside_the_whole_one(tmp_path):
    """Both are convolutional and have the same names: their sizes tell them apart."""
    whole, pruned = decoder_of("ltx-2.3"), decoder_of("ltx-2.3-pruna")
    write(tmp_path / "LTX23_video_vae_bf16.safetensors", split(whole), original_json("ltx-2.3"))
    path = write(tmp_path / "pruna.safetensors", split(pruned), original_json("ltx-2.3-pruna"))
    message = (
        "several files .* LTX23_video_vae_bf16.safetensors .*M parameters.*, pruna.safetensors .*M param"
    )
    with pytest.raises(ValueError, match=message):
        load_decoder(tmp_path)
    assert same(load_decoder(path), pruned)
    assert describe_checkpoint(path).version == "LTX-2.3 pruned (PrunaVAED)"


def test_info_says_what_they_are(tmp_path, capsys):
    path = in_diffusers_folder(tmp_path)
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    for part in (
        "LTX-2.5 diffusion",
        "2 attending to 11x11x11, denoising",
        "up 2x1x1",
        "num_inference_steps 1",
    ):
        assert part in told
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["stage_kernels"][-1] == [11, 11, 11]
    path = write(tmp_path / "taeltx2_3.safetensors", stored_tensors("taeltx2_3"))
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "LTX-2 / 2.3 / 2.5 tiny (TAEHV)" in told and "channels that see the frame before" in told


@pytest.mark.parametrize("name", ["taeltx_2", "taeltx2_3_wide"])
def test_names_of_tiny_decoders_that_are_on_no_hub(name):
    with pytest.raises(
        FileNotFoundError, match=f"download {name}.safetensors from github.com/madebyollin/taehv"
    ):
        load_decoder(name)
