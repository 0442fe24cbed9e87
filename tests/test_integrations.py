"""The scripts of the pages for mlx-video, diffusers, FastVideo and ComfyUI, with stand-ins for these."""

import importlib
import re
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import stand_ins
from stand_ins import FastVideoPipeline, GenerateAV, GenerateLTX2, LTX2Pipeline, NestedTensor, Tensor, module
from vae_cases import random_latents, small_decoder

import mlx_vae_tiling
from mlx_vae_tiling import decode_frames, load_decoder, load_latents, plan_decode

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ["from_diffusers.py", "from_fastvideo.py", "from_mlx_video.py"]
SCRIPTS += [f"comfyui/mlx_vae_tiling_node/{name}.py" for name in ("__init__", "images", "node")]
PAGES = ("from_diffusers", "from_fastvideo", "from_mlx_video", "comfyui")
LIMIT = "60MB"
# Of frames in [0, 1]: the stream and the whole decode sum in another order. Measured: 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def examples(monkeypatch, tmp_path):
    """Scripts are imported afresh, with this test's stand-ins, and write into a folder of the test's."""
    stand_ins.torch_module(monkeypatch)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES / "comfyui")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("from_", "mlx_vae_tiling_node")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def latents():
    """Two latent frames of 2x3 of the demonstration, normalised, float32: 9 frames of 96x64."""
    return load_latents("demo")[:, :, :2, 3:5, 6:9].astype(mx.float32)


@pytest.fixture(scope="module")
def decoder():
    return load_decoder("demo", dtype="float32")


@pytest.fixture(scope="module")
def expected(decoder, latents):
    """The frames (f, H, W, 3) in [0, 1] of the decode as a whole, in NumPy."""
    return unit_range(decoder(latents))


@pytest.fixture
def demo_everywhere(monkeypatch, decoder):
    """Whatever a script loads, it is the demonstration in float32."""
    loaded = []
    monkeypatch.setattr(
        mlx_vae_tiling, "load_decoder", lambda *given, **more: loaded.append(given) or decoder
    )
    return loaded


def unit_range(video):
    return np.clip(np.array(video[0].astype(mx.float32)).transpose(1, 2, 3, 0) / 2 + 0.5, 0, 1)


def numpy(array):
    return np.array(array)


def near(frames, expected):
    assert frames.shape == expected.shape and frames.dtype == np.float32
    assert np.abs(frames - expected).max() < TOLERANCE
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 40


# diffusers


@pytest.fixture
def diffusers(monkeypatch):
    module("diffusers", monkeypatch, LTX2Pipeline=LTX2Pipeline)
    written = []
    module("diffusers.utils", monkeypatch)
    module("diffusers.utils.export_utils", monkeypatch, encode_video=lambda *given: written.append(given))
    return SimpleNamespace(script=importlib.import_module("from_diffusers"), written=written)


def statistics(decoder):
    return (numpy(getattr(decoder.per_channel_statistics, name)) for name in ("mean", "std"))


def test_diffusers_decode_is_replaced(diffusers, decoder, latents, expected):
    pipe = LTX2Pipeline(numpy(latents), *statistics(decoder))
    plan = plan_decode(decoder, latents.shape, memory_limit="8.6MB")
    assert plan.fits and plan.latent_frames_per_step == 1, "there must be several pieces"
    diffusers.script.replace_decode(pipe.vae, decoder, "8.6MB")
    assert pipe.vae.decoder is None and pipe.vae.encoder == "torch's"
    frames, _ = pipe("a boat", return_dict=False)
    assert near(frames[0], expected)
    assert near(frames[0], np.concatenate(list(decode_frames(decoder, latents, bits=32))))


def test_diffusers_keeps_the_budget(diffusers, decoder, latents):
    vae = SimpleNamespace()
    diffusers.script.replace_decode(vae, decoder, "4MB")
    with pytest.raises(ValueError, match=r"no plan fits in 4\.00 MB"):
        vae.decode(Tensor(numpy(latents)))


def test_diffusers_tensor_is_the_memory_of_the_frames(diffusers, decoder, latents, monkeypatch):
    made = []
    empty = lambda *given: made.append(np.empty(*given)) or made[-1]  # noqa: E731
    monkeypatch.setattr(diffusers.script, "np", SimpleNamespace(empty=empty, float32=np.float32))
    vae = SimpleNamespace()
    diffusers.script.replace_decode(vae, decoder)
    (video,) = vae.decode(Tensor(numpy(latents)), return_dict=False)
    assert video.shape == (1, 3, 9, 64, 96) and np.shares_memory(video.array, made[0])


def test_diffusers_batches_timesteps_and_noise(diffusers):
    """Each video has its timestep, and the noise that the pipeline has mixed in is the only one."""
    decoder = small_decoder("0.9.5")
    latents = random_latents(decoder, 2, 2, 2, 3)
    steps = np.array([0.05, 0.3], np.float32)
    pipe = LTX2Pipeline(numpy(latents), *statistics(decoder), timestep=Tensor(steps, "bfloat16"))
    diffusers.script.replace_decode(pipe.vae, decoder)
    frames, _ = pipe("a boat", return_dict=False)
    for index, step in enumerate(steps):
        one = latents[index : index + 1]
        pieces = decoder.stream(one, latent_frames_per_step=2, timestep=float(step), noise_scale=0)
        assert near(frames[index], unit_range(mx.concatenate(list(pieces), axis=2)))
    assert np.abs(frames[0] - unit_range(decoder(latents[:1], timestep=0.3))).max() > 0.01


def test_diffusers_script(diffusers, decoder, latents, expected, demo_everywhere, monkeypatch):
    pipe = LTX2Pipeline(numpy(latents), *statistics(decoder))
    loads = []
    from_pretrained = lambda *given, **more: loads.append((given, more)) or pipe  # noqa: E731
    monkeypatch.setattr(LTX2Pipeline, "from_pretrained", from_pretrained, raising=False)
    monkeypatch.setattr(diffusers.script, "load_decoder", mlx_vae_tiling.load_decoder)
    diffusers.script.main("a boat", "boat.mp4", LIMIT)
    assert loads == [(("Lightricks/LTX-2",), {"torch_dtype": "bfloat16"})]
    assert demo_everywhere == [("ltx-2",)] and pipe.device == "mps"
    [(video, fps, out, sound, rate)] = diffusers.written
    assert near(video, expected)
    assert (fps, out, sound.shape, sound.device, rate) == (24, "boat.mp4", (2, 100), "cpu", 24000)


# mlx-video


@pytest.fixture
def upsampled(latents):
    """The latents as mlx-video's upsampler gives them, not normalised."""
    statistics = load_decoder("demo").per_channel_statistics
    mean, std = (value.reshape(1, -1, 1, 1, 1) for value in (statistics.mean, statistics.std))
    return latents * std + mean


@pytest.fixture
def mlx_video_levels(latents):
    """The frames of the latents with the noise that mlx-video draws after it has made its decoder."""
    mx.random.seed(0)
    mx.random.normal((3,))
    levels = unit_range(load_decoder("demo")(latents + mx.random.normal(latents.shape) / 8)) * 255
    mx.random.seed(0)
    return levels


def assert_rounded_down(frames, levels):
    """Frames that differ in the last bit may differ by a level."""
    assert frames.shape == levels.shape and frames.dtype == np.uint8
    assert np.abs(frames + 0.5 - levels).max() <= 0.5 + 255 * TOLERANCE


@pytest.fixture
def mlx_video(monkeypatch, upsampled):
    command = module("mlx_video.generate_av", monkeypatch, GenerateAV, upsampled=upsampled)
    return SimpleNamespace(script=importlib.import_module("from_mlx_video"), command=command)


@pytest.mark.parametrize("tiling", ["auto", "none"])
def test_mlx_video_command(mlx_video, mlx_video_levels, tiling, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["from_mlx_video.py"])
    mlx_video.script.main(LIMIT, "--model-repo", "demo", "--tiling", tiling)
    assert_rounded_down(mlx_video.command.frames, mlx_video_levels)


def test_mlx_video_keeps_the_budget(mlx_video, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["from_mlx_video.py"])
    with pytest.raises(ValueError, match=r"no plan fits in 4\.00 MB"):
        mlx_video.script.main("4MB", "--model-repo", "demo")


# FastVideo


@pytest.fixture
def fastvideo(monkeypatch, latents):
    monkeypatch.setattr(stand_ins.VideoGenerator, "latents", numpy(latents), raising=False)
    module("fastvideo", monkeypatch, VideoGenerator=stand_ins.VideoGenerator)
    return importlib.import_module("from_fastvideo")


def fastvideo_batch(latents, steps=False):
    tensor = Tensor(numpy(latents), "bfloat16", "mps")
    trajectory = Tensor(np.stack([numpy(latents), -numpy(latents)], axis=1), "bfloat16", "mps")
    return SimpleNamespace(
        latents=tensor,
        output=None,
        return_trajectory_decoded=steps,
        trajectory_latents=trajectory if steps else None,
        trajectory_timesteps=[900, 500] if steps else None,
        trajectory_decoded=None,
    )


def test_fastvideo_stage_is_replaced(fastvideo, decoder, latents, expected):
    pipeline, given_decoder = FastVideoPipeline(), load_decoder("demo", dtype="float32")
    theirs = pipeline.decoding_stage
    fastvideo.replace_stage(pipeline, given_decoder, LIMIT)
    assert theirs not in pipeline.stages and pipeline.stages[1] is pipeline.decoding_stage
    # FastVideo asks for the VAE to be freed; one that was handed in could not be loaded again.
    for _ in range(2):
        batch = fastvideo_batch(latents)
        given = batch.latents
        with pytest.warns(UserWarning, match="vae_cpu_offload keeps the VAE"):
            assert pipeline.forward(batch) is batch
        assert batch.latents is given and batch.trajectory_decoded is None
        assert (batch.output.dtype, batch.output.device) == ("float32", "cpu")
        assert near(batch.output.array[0].transpose(1, 2, 3, 0), expected)
        assert pipeline.decoding_stage.vae is given_decoder


@pytest.mark.filterwarnings("ignore:vae_cpu_offload keeps the VAE")
def test_fastvideo_trajectory_and_latents(fastvideo, decoder, latents, expected):
    pipeline = FastVideoPipeline()
    fastvideo.replace_stage(pipeline, load_decoder("demo", dtype="float32"))
    batch = fastvideo_batch(latents, steps=True)
    pipeline.forward(batch)
    first, second = (step.array[0].transpose(1, 2, 3, 0) for step in batch.trajectory_decoded)
    assert near(first, expected) and near(second, unit_range(decoder(-latents)))
    pipeline.fastvideo_args.output_type = "latent"
    batch = pipeline.forward(fastvideo_batch(latents))
    assert np.array_equal(batch.output.numpy(), numpy(latents))


def test_fastvideo_keeps_the_budget_and_verifies(fastvideo, decoder, latents):
    pipeline = FastVideoPipeline()
    fastvideo.replace_stage(pipeline, decoder, "4MB")
    with pytest.raises(ValueError, match=r"no plan fits in 4\.00 MB"):
        pipeline.forward(fastvideo_batch(latents))
    with pytest.raises(ValueError, match="input of DecodingStage fails in latents"):
        pipeline.forward(fastvideo_batch(latents * float("nan")))


def test_fastvideo_script(fastvideo, expected, demo_everywhere, monkeypatch, capsys):
    monkeypatch.setattr(fastvideo, "load_decoder", mlx_vae_tiling.load_decoder)
    fastvideo.main("a boat", "boat.npy")
    assert np.abs(np.load("boat.npy") - 255 * expected).max() <= 0.5 + 255 * TOLERANCE
    assert "boat.npy: 9 frames" in capsys.readouterr().out and demo_everywhere == [("ltx-2",)]


# ComfyUI


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """ComfyUI's modules, and the class of the node as ComfyUI finds it."""
    asked = []
    module("comfy.utils", monkeypatch, ProgressBar=stand_ins.ProgressBar)
    asks = {"throw_exception_if_processing_interrupted": lambda: asked.append(True)}
    management = module("comfy.model_management", monkeypatch, **asks)
    known = {"demo.safetensors": str(Path(mlx_vae_tiling.__file__).parent / "demo" / "vae.safetensors")}
    module("folder_paths", monkeypatch, get_full_path=lambda folder, name: {"vae": known}[folder].get(name))
    package = importlib.import_module("mlx_vae_tiling_node")
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    (node,) = package.NODE_CLASS_MAPPINGS.values()
    return SimpleNamespace(node=node, management=management, asked=asked)


def run(node, samples, **inputs):
    """As ComfyUI runs a node: by the declared inputs, the defaults where there is nothing else."""
    declared = type(node).INPUT_TYPES()["required"]
    defaults = {name: kind[1]["default"] for name, kind in declared.items() if len(kind) > 1}
    given = defaults | {"decoder": "demo", "memory_limit": LIMIT} | inputs
    assert set(given) | {"samples"} == set(declared)
    outputs = getattr(node, node.FUNCTION)(samples={"samples": samples}, **given)
    assert type(node).RETURN_TYPES == ("IMAGE",) and len(outputs) == 1
    return outputs[0].numpy()


@pytest.fixture
def demo_images(latents):
    """What the demonstration gives in the dtype of its weights, which the node leaves as it is."""
    return unit_range(load_decoder("demo")(latents))


@pytest.mark.parametrize("name", ["demo", "demo.safetensors"])
def test_comfyui_latents_in_images_out(comfyui, latents, demo_images, name):
    images = run(comfyui.node(), Tensor(numpy(latents), "bfloat16", "mps"), decoder=name)
    own = np.concatenate(list(decode_frames(load_decoder("demo"), latents, memory_limit=LIMIT, bits=32)))
    assert images.dtype == np.float32 and np.array_equal(images, own)
    assert np.abs(images - demo_images).max() < 2 / 255
    assert images.min() >= 0 and images.max() <= 1


def test_comfyui_takes_the_video_of_nested_latents_and_batches(comfyui, latents):
    sound = Tensor(np.zeros((1, 8, 4, 16), np.float32))
    single = run(comfyui.node(), Tensor(numpy(latents)))
    nested = run(comfyui.node(), NestedTensor([Tensor(numpy(latents)), sound]))
    both = run(comfyui.node(), Tensor(np.concatenate([numpy(latents), -numpy(latents)])))
    assert np.array_equal(single, nested)
    assert both.shape == (18, 64, 96, 3) and np.array_equal(both[:9], single)
    assert np.array_equal(both[9:], run(comfyui.node(), Tensor(-numpy(latents))))


def test_comfyui_progress_and_interruption(comfyui, latents):
    node = comfyui.node()
    run(node, Tensor(numpy(latents)))
    assert (stand_ins.ProgressBar.last.total, stand_ins.ProgressBar.last.current) == (9, 9)
    assert comfyui.asked

    def interrupted():
        raise stand_ins.Interrupted

    comfyui.management.throw_exception_if_processing_interrupted = interrupted
    with pytest.raises(stand_ins.Interrupted):
        run(node, Tensor(numpy(latents)), keep_decoder=False)
    assert stand_ins.ProgressBar.last.current == 0 and node.decoder is None


def test_comfyui_budget_and_seed(comfyui, latents, monkeypatch):
    node = comfyui.node()
    with pytest.raises(ValueError, match="raise the memory limit"):
        run(node, Tensor(numpy(latents)), memory_limit="4MB")
    noisy = small_decoder("0.9.5")
    monkeypatch.setattr(sys.modules["mlx_vae_tiling_node.node"], "load_decoder", lambda source: noisy)
    z = random_latents(noisy, 1, 2, 2, 3)
    first, again, other = (run(node, Tensor(numpy(z)), decoder="noisy", decoder_seed=n) for n in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    whole = mx.concatenate(list(noisy.stream(z, seed=1, latent_frames_per_step=2)), axis=2)
    assert near(first, unit_range(whole))


def test_comfyui_keeps_and_frees_the_decoder(comfyui, latents, monkeypatch):
    loads = []
    nodes, load = [comfyui.node()], sys.modules["mlx_vae_tiling_node.node"].load_decoder
    name = "mlx_vae_tiling_node.node.load_decoder"

    def load_alone(source):
        assert nodes[0].decoder is None, "two decoders are in memory"
        loads.append(source)
        return load(source)

    monkeypatch.setattr(name, load_alone)
    samples = Tensor(numpy(latents))
    mx.clear_cache()
    before = mx.get_active_memory()
    run(nodes[0], samples)
    run(nodes[0], samples)
    assert loads == ["demo"] and mx.get_active_memory() - before > 3e6
    run(nodes[0], samples, decoder="demo.safetensors")
    assert len(loads) == 2 and loads[1].endswith("vae.safetensors")
    run(nodes[0], samples, decoder="demo.safetensors", keep_decoder=False)
    assert mx.get_active_memory() - before < 1e5 and mx.get_cache_memory() == 0
    run(nodes[0], samples)
    # "Free model and node cache" drops the node.
    nodes.clear()
    assert mx.get_active_memory() - before < 1e5 and mx.get_cache_memory() == 0


def test_comfyui_latents_are_those_that_load_latents_reads(comfyui, latents):
    """What Save Latent writes is in the form that the node is given."""
    mx.save_safetensors("out.safetensors", {"latent_tensor": latents, "latent_format_version_0": mx.zeros(0)})
    saved = load_latents(Path("out.safetensors").rename("out.latent"))
    assert np.array_equal(
        run(comfyui.node(), Tensor(numpy(saved))), run(comfyui.node(), Tensor(numpy(latents)))
    )


# The pages


def blocks(page):
    text = (EXAMPLES / f"{page}.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_block(code, **names):
    exec(code, names)
    return names


def test_pages_of_diffusers(diffusers, decoder, latents, expected, demo_everywhere):
    replaced, saved = blocks("from_diffusers")
    pipe = LTX2Pipeline(numpy(latents), *statistics(decoder))
    run_block(replaced, pipe=pipe)
    assert near(pipe("a boat", return_dict=False)[0][0], expected)
    run_block(saved.replace("clip.mp4", "clip.npy"), pipe=pipe)
    assert np.abs(np.load("clip.npy") - 255 * expected).max() <= 0.5 + 255 * TOLERANCE


def test_pages_of_mlx_video_itself(upsampled, mlx_video_levels, monkeypatch):
    command = module("mlx_video.models.ltx_2.generate", monkeypatch, GenerateLTX2, upsampled=upsampled)
    own = importlib.import_module("from_mlx_video")
    monkeypatch.setattr(own, "load_decoder", lambda path: {"model/vae/decoder": load_decoder("demo")}[path])
    monkeypatch.setattr(GenerateLTX2, "VideoDecoder", type("VideoDecoder", (GenerateLTX2.VideoDecoder,), {}))
    run_block(blocks("from_mlx_video")[0])
    assert_rounded_down(command.frames, mlx_video_levels)


def test_pages_of_mlx_video(latents, expected, demo_everywhere, monkeypatch):
    import av

    with wave.open("clip.wav", "wb") as sound:
        sound.setparams((1, 2, 24000, 9000, "NONE", ""))
        sound.writeframes(bytes(18000))
    _, kept, ported = blocks("from_mlx_video")
    run_block(kept, latents=latents)
    with av.open("clip.mp4") as clip:
        assert clip.streams.video[0].frames == 9 and len(clip.streams.audio) == 1
    decoder_block = type("VideoDecoder", (), {"model_dir": Path("model")})
    module("ltx_pipelines_mlx.utils.blocks", monkeypatch, VideoDecoder=decoder_block)
    run_block(ported)
    assert decoder_block().decode_and_stream(latents, "ported.npy", frame_rate=25.0) == "ported.npy"
    assert demo_everywhere[-1] == (Path("model/vae_decoder.safetensors"),)
    assert np.abs(np.load("ported.npy") - 255 * expected).max() <= 0.5 + 255 * TOLERANCE


@pytest.mark.filterwarnings("ignore:vae_cpu_offload keeps the VAE")
def test_pages_of_fastvideo(fastvideo, latents, expected, demo_everywhere):
    (replaced,) = blocks("from_fastvideo")
    pipeline = FastVideoPipeline()
    run_block(replaced, pipeline=pipeline)
    batch = pipeline.forward(fastvideo_batch(latents))
    assert near(batch.output.array[0].transpose(1, 2, 3, 0), expected)


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_linked_and_link_somewhere(page):
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert f"(examples/{page}.md)" in readme
    text = (EXAMPLES / f"{page}.md").read_text()
    links = re.findall(r"\]\(([^):]+)\)", text)
    assert links and all((EXAMPLES / link.split("#")[0]).exists() for link in links)
