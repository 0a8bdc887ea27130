"""Presets: what is in the graphs, what is on disk, and what happens when something is wrong."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from optimum.intel import OVDiffusionPipeline
from tiny_models import build_checkpoint

import ov_pixart_helper as helper
from ov_pixart_helper import PARTS, PRESETS, OVPixArtAlphaPipeline, optimize_pipeline

PROMPTS = ["a small red circle", "a large blue star above the sea", "a green square on the hill"]
DATA = {"calibration_prompts": PROMPTS, "num_samples": 10, "progress": False}
SMALL_INTEGERS = {"i8", "u8", "i4", "u4"}


@pytest.fixture(scope="module")
def fp16(tmp_path_factory) -> Path:
    """A random α pipeline, converted."""
    folder = tmp_path_factory.mktemp("optimize")
    checkpoint = build_checkpoint(folder / "torch", "alpha")
    return helper.convert_pipeline(checkpoint, folder / "ov" / "fp16")


@pytest.fixture(scope="module")
def optimized(fp16):
    """A function: preset → its folder, made once."""
    made = {}

    def make(preset: str) -> Path:
        if preset not in made:
            made[preset] = optimize_pipeline(fp16, fp16.parent / preset, preset, **DATA)
        return made[preset]

    return make


# ---- reading graphs -----------------------------------------------------------------------------


def layers(folder: Path, part: str) -> dict[str, tuple[str, bool]]:
    """Name of each operation with weights → (type of the weights, whether its input is rounded)."""
    found = {}
    for op in helper._read_ir(folder / part).get_ops():
        if op.get_type_name() not in ("MatMul", "Convolution", "Gather"):
            continue
        at = 0 if op.get_type_name() == "Gather" else 1
        if (kind := stored_type(op.input_value(at).get_node())) is not None:
            found[op.get_friendly_name()] = (kind, is_rounded(op.input_value(0).get_node()))
    return found


def is_rounded(node) -> bool:
    """Whether an activation comes in integers; what only moves values about passes them on."""
    while node.get_type_name() in {"Reshape", "Transpose"}:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize"


def stored_type(node) -> str | None:
    """Follow a weight through its scales to the constant it is stored as, if it is one."""
    passed = {"Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize", "Transpose"}
    while node.get_type_name() in passed:
        node = node.input_value(0).get_node()
    is_matrix = node.get_type_name() == "Constant" and len(node.shape) > 1
    return node.get_element_type().get_type_name() if is_matrix else None


def rounded_inputs(folder: Path, part: str) -> list[str]:
    """Names of the operations that take an activation in 8-bit integers."""
    return [
        port.get_node().get_friendly_name()
        for op in helper._read_ir(folder / part).get_ops()
        if op.get_type_name() == "FakeQuantize"
        and stored_type(op.input_value(0).get_node()) is None
        for port in op.output(0).get_target_inputs()
    ]


def is_in_a_block(name: str) -> bool:
    return "transformer_blocks" in name and "MatMul" in name


# ---- what presets do ----------------------------------------------------------------------------


def test_int8_computes_every_matmul_of_the_blocks_in_integers(optimized):
    blocks = {k: v for k, v in layers(optimized("int8"), "transformer").items() if is_in_a_block(k)}
    assert len(blocks) == 2 * 10  # q, k, v and out, twice, and two of the feed-forward
    assert {kind for kind, _ in blocks.values()} <= {"i8", "u8"}
    assert all(rounded for _, rounded in blocks.values())


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_the_spared_layers_keep_integer_weights_and_take_floating_point(optimized, preset):
    found = layers(optimized(preset), "transformer")
    for part in (".adaln_single.linear/", ".caption_projection.", ".pos_embed.proj/", ".proj_out/"):
        spared = {value for name, value in found.items() if part in name}
        assert spared == {("u8", False)}, part


def test_int4_stores_cross_attention_in_4_bits_and_the_rest_of_the_blocks_as_int8_does(optimized):
    blocks = {k: v for k, v in layers(optimized("int4"), "transformer").items() if is_in_a_block(k)}
    assert {value for name, value in blocks.items() if ".attn2." in name} == {("i4", False)}
    assert {value for name, value in blocks.items() if ".attn2." not in name} == {("i8", True)}


@pytest.mark.parametrize("preset", ["int8", "int4", "hybrid"])
def test_positions_and_timesteps_are_never_rounded(optimized, preset):
    touched = rounded_inputs(optimized(preset), "transformer")
    assert touched
    assert not [name for name in touched if "sinusoids" in name or "pos_embed/" in name]


def test_int8_leaves_attention_itself_in_floating_point(optimized):
    touched = rounded_inputs(optimized("int8"), "transformer")
    assert not [name for name in touched if "ScaledDotProductAttention" in name]


@pytest.mark.parametrize("part", PARTS)
def test_int8_weights_stores_all_matrices_in_8_bits_and_rounds_no_activation(optimized, part):
    found = layers(optimized("int8-weights"), part)
    kinds = {kind for name, (kind, _) in found.items() if "sinusoids" not in name}
    assert kinds == {"u8"}
    assert not rounded_inputs(optimized("int8-weights"), part)


@pytest.mark.parametrize("is_large", [False, True])
def test_scales_are_fitted_unless_the_text_encoder_is_large(is_large, fp16, tmp_path, monkeypatch):
    fitted, compress = [], helper._compress_to_4_bits

    def watch(model, group_size, ignored, dataset):
        if "last_hidden_state" in model.output(0).get_names():
            fitted.append(dataset is not None)
        return compress(model, group_size, ignored, dataset)

    monkeypatch.setattr(helper, "_LARGE", 0 if is_large else 10**9)
    monkeypatch.setattr(helper, "_compress_to_4_bits", watch)
    optimize_pipeline(fp16, tmp_path / "int4", "int4", **DATA)
    assert fitted == [not is_large]


@pytest.mark.parametrize(("preset", "sensitive"), [("int4", "u8"), ("hybrid", "i4")])
def test_int4_stores_the_text_encoder_in_4_bits(optimized, preset, sensitive):
    kinds = {name: kind for name, (kind, _) in layers(optimized(preset), "text_encoder").items()}
    assert {kind for name, kind in kinds.items() if "SelfAttention.q" in name} == {"i4"}
    assert {kind for name, kind in kinds.items() if "SelfAttention.o/" in name} == {sensitive}
    assert {kind for name, kind in kinds.items() if "embed_tokens" in name} == {"u8"}


def test_hybrid_rounds_the_activations_of_everything_but_matmul(optimized):
    found = layers(optimized("hybrid"), "transformer")
    touched = rounded_inputs(optimized("hybrid"), "transformer")
    assert {kind for name, (kind, _) in found.items() if is_in_a_block(name)} == {"u8"}
    assert touched
    assert not [name for name in touched if name.endswith("/MatMul")]


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_the_vae_computes_in_integers(optimized, preset):
    touched = rounded_inputs(optimized(preset), "vae_decoder")
    assert [name for name in touched if name.endswith("/Convolution")]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_plainly_and_stays_close_to_the_source(optimized, fp16, preset):
    pictures = [paint(OVPixArtAlphaPipeline, folder) for folder in (fp16, optimized(preset))]
    error = np.abs(pictures[0] - pictures[1]).mean()
    assert 0 < error < 0.1  # of 1; 0.3 for two random pictures


def paint(loader, folder: Path) -> np.ndarray:
    pipeline = loader.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 64, "width": 96, "use_resolution_binning": False}
    generator = helper.torch.Generator().manual_seed(3)
    return pipeline(PROMPTS[0], generator=generator, output_type="np", **call).images[0]


# ---- settings for run time ----------------------------------------------------------------------


@pytest.mark.parametrize("loader", [OVPixArtAlphaPipeline, OVDiffusionPipeline])
def test_stored_settings_survive_saving_and_arrive_through_either_entrance(
    optimized, tmp_path, loader
):
    stored = dict(PRESETS["int8-weights"].transformer.options)
    assert stored
    first = loader.from_pretrained(optimized("int8-weights"))
    first.save_pretrained(tmp_path / "copy")
    second = loader.from_pretrained(tmp_path / "copy")
    for pipeline in (first, second):
        for name, value in stored.items():
            compiled = pipeline.transformer.request.get_property(name)
            assert str(compiled) == str(value)
    assert np.array_equal(
        paint(loader, optimized("int8-weights")), paint(loader, tmp_path / "copy")
    )


@pytest.mark.parametrize("preset", ["int8", "int4", "hybrid"])
def test_graphs_survive_saving(optimized, tmp_path, preset):
    OVPixArtAlphaPipeline.from_pretrained(optimized(preset)).save_pretrained(tmp_path)
    for part in PARTS:
        assert layers(tmp_path, part) == layers(optimized(preset), part)


# ---- data for calibration -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(optimized, fp16) -> list[dict[str, np.ndarray]]:
    optimized("int8")
    prompts = helper._choose_prompts(PROMPTS, fp16, 10, seed=0)
    data = helper._CalibrationData(fp16, fp16.parent / "calibration", prompts, 10, 0)
    assert (data.folder / f"{data.key}.npz").is_file()
    return data.samples("transformer", progress=False)


def test_samples_hold_both_halves_of_the_guidance(recorded):
    assert len(recorded) == 10
    for sample in recorded:
        assert sample["hidden_states"].shape[0] == 2
        negative, positive = sample["encoder_hidden_states"]
        assert not np.allclose(negative, positive, atol=1e-2)


def test_samples_spread_over_the_timesteps(recorded):
    steps = sorted(float(sample["timestep"][0]) for sample in recorded)
    assert steps[0] < 200
    assert steps[-1] > 900
    assert max(np.diff(steps)) < 200


def test_samples_come_in_several_aspect_ratios(recorded):
    shapes = {sample["hidden_states"].shape[2:] for sample in recorded}
    assert len(shapes) == 2  # two pictures; five in turn if there are more
    assert all(abs(h * w / 32**2 - 1) < 0.1 for h, w in shapes)


def test_pictures_are_drawn_once_for_all_presets(optimized, fp16, tmp_path, monkeypatch):
    optimized("int8")

    def draw(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(helper, "_record_picture", draw)
    optimize_pipeline(fp16, fp16.parent / "again", "hybrid", **DATA)
    with pytest.raises(AssertionError, match="drawn again"):
        optimize_pipeline(fp16, fp16.parent / "again", "int8", **{**DATA, "seed": 1})
    shutil.rmtree(fp16.parent / "again")


def test_pictures_are_drawn_without_the_text_encoder(fp16, tmp_path, monkeypatch):
    loaded, draw = [], helper._record_picture

    def watch(pipeline, **call):
        loaded.append(pipeline.text_encoder.request)
        return draw(pipeline, **call)

    monkeypatch.setattr(helper, "_record_picture", watch)
    data = helper._CalibrationData(fp16, tmp_path, PROMPTS[:2], 10, 0)
    data.samples("vae_decoder", progress=False)
    assert loaded == [None, None]


@pytest.mark.parametrize("has_twin", [False, True])
def test_a_large_text_encoder_reads_captions_in_8_bits(
    has_twin, optimized, fp16, tmp_path, monkeypatch
):
    read, made, encode, make = [], [], helper._encode, helper._optimize_part

    def watch(pipeline, *args):
        model = pipeline.text_encoder.model
        small = [op for op in model.get_ops() if op.get_type_name() == "Constant" and op.shape[1:]]
        read.append({op.get_element_type().get_type_name() for op in small} & SMALL_INTEGERS)
        return encode(pipeline, *args)

    def count(*args):
        made.append(args[1])
        return make(*args)

    folder = Path(optimized("int8")).parent if has_twin else tmp_path
    monkeypatch.setattr(helper, "_LARGE", 0)
    monkeypatch.setattr(helper, "_encode", watch)
    monkeypatch.setattr(helper, "_optimize_part", count)
    data = helper._CalibrationData(fp16, folder / "calibration", PROMPTS[:2], 9, 0)
    data.samples("transformer", progress=False)
    assert read == [{"u8"}] * 2
    assert made == ([] if has_twin else ["text_encoder"])
    assert not list(data.folder.glob(".partial-*"))


def test_the_dit_sees_large_pictures_row_by_row():
    rows = {"encoder_attention_mask": np.ones((2, 120), np.int64), "timestep": np.arange(2.0)}
    at_512 = {"hidden_states": np.random.rand(2, 4, 48, 85).astype(np.float32), **rows}
    assert helper._bearable(at_512) == [at_512]
    at_1024 = {"hidden_states": np.random.rand(2, 4, 128, 128).astype(np.float32), **rows}
    split = helper._bearable(at_1024)
    assert [len(call[name]) for call in split for name in at_1024] == [1] * 6
    for name, value in at_1024.items():
        assert (np.concatenate([call[name] for call in split]) == value).all()


@pytest.mark.parametrize(
    ("size", "count", "largest"),
    [((32, 32), 1, (32, 32)), ((96, 170), 1, (96, 170)), ((256, 256), 4, (128, 128))],
)
def test_the_vae_sees_pieces_of_the_largest_pictures(size, count, largest):
    latents = np.arange(4 * np.prod(size), dtype=np.float32).reshape(1, 4, *size)
    pieces = helper._pieces(latents)
    assert [piece.shape for piece in pieces] == [(1, 4, *largest)] * count
    seen = np.concatenate([piece.ravel() for piece in pieces])
    assert (np.sort(seen) == latents.ravel()).all()


def test_the_same_seed_gives_the_same_bytes(optimized, fp16, tmp_path):
    again = optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)  # draws again, too
    for part in PARTS:
        for suffix in ("xml", "bin"):
            file = f"{part}/openvino_model.{suffix}"
            assert (again / file).read_bytes() == (optimized("int8") / file).read_bytes(), file


def test_the_order_of_statistics_changes_nothing_but_memory(optimized, fp16, tmp_path, monkeypatch):
    from nncf.openvino.graph.model_transformer import OVModelTransformer

    seen, insert = [], OVModelTransformer._insert_outputs

    def watch(model, outputs):
        extended = insert(model, outputs)
        seen.append(len(extended.outputs) - len(model.outputs))
        return extended

    monkeypatch.setattr(OVModelTransformer, "_insert_outputs", staticmethod(watch))
    monkeypatch.setattr(helper, "_statistics_first", contextlib.nullcontext)
    again = optimize_pipeline(fp16, tmp_path / "int8", "int8", **DATA)
    assert max(seen) > 10
    for part in PARTS:
        file = f"{part}/openvino_model.bin"
        assert (again / file).read_bytes() == (optimized("int8") / file).read_bytes(), file


def test_statistics_come_before_the_models_own_output(fp16):
    from nncf.openvino.graph.model_transformer import OVModelTransformer

    model = helper._read_ir(fp16 / "transformer")
    products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
    outputs = [(op.output(0), 0, None) for op in products[:3]]
    with helper._statistics_first():
        extended = OVModelTransformer._insert_outputs(model, outputs)
    assert len(extended.outputs) == 4
    assert "sample" in extended.outputs[-1].get_names()


def test_too_little_disk_is_said_before_anything_is_written(fp16, tmp_path, monkeypatch):
    half = sum(file.stat().st_size for file in fp16.glob("*/*.bin")) / 2  # 8 bits instead of 16

    def free(share):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: (10**12, 0, share * half))

    free(0.9)
    with pytest.raises(OSError, match=r"output_dir=.* needs .* GB of disk, and .* GB are free"):
        optimize_pipeline(fp16, tmp_path / "new", "int8-weights", progress=False)
    assert not list(tmp_path.iterdir())
    free(1.1)
    optimize_pipeline(fp16, tmp_path / "new", "int8-weights", progress=False)
    free(0)  # what is there already needs no room
    optimize_pipeline(fp16, tmp_path / "new", "int8-weights", progress=False)


def test_captions_are_read_from_files(tmp_path):
    files = {
        "csv": "caption,seed\na,1\nb,2\n",
        "jsonl": '{"caption": "a"}\n{"caption": "b"}\n',
        "txt": "a\nb\n",
    }
    for suffix, text in files.items():
        file = tmp_path / f"captions.{suffix}"
        file.write_text(text)
        assert helper.load_calibration_prompts(file) == ["a", "b"]
        assert helper.load_calibration_prompts(str(file), num=1) == ["a"]


def test_data_sets_are_streamed_without_their_code(monkeypatch):
    asked = {}

    def load_dataset(name, **kwargs):
        asked.update(kwargs, name=name)
        return itertools.repeat({"text": "x"})

    monkeypatch.setattr(helper.datasets, "load_dataset", load_dataset)
    read = helper.load_calibration_prompts("some/captions", column="text", split="test", num=3)
    assert read == ["x"] * 3
    assert asked == {"name": "some/captions", "split": "test", "streaming": True}


def test_shipped_captions_suffice_for_the_default_number_of_samples():
    for file in ("natural-calibration.csv", "pixart-tiny-calibration.csv"):
        captions = helper.load_calibration_prompts(helper.CAPTIONS / file)
        assert len(set(captions)) == len(captions) >= helper.DEFAULT_NUM_SAMPLES / 5
    natural = helper.load_calibration_prompts(helper.CAPTIONS / "natural-calibration.csv")
    assert len(natural) >= 300


# ---- doing no work twice ------------------------------------------------------------------------


def test_finished_models_are_kept_and_missing_ones_made(optimized, fp16, tmp_path, monkeypatch):
    folder = shutil.copytree(optimized("int8-weights"), tmp_path / "int8-weights")
    (folder / "model_index.json").unlink()
    (folder / "vae_decoder" / "openvino_model.bin").unlink()
    made = count_made(monkeypatch)
    optimize_pipeline(fp16, folder, "int8-weights", progress=False)
    assert made == ["vae_decoder"]
    assert (folder / "model_index.json").is_file()


def test_a_damaged_model_is_neither_kept_nor_copied(optimized, fp16, tmp_path, monkeypatch):
    folder = shutil.copytree(optimized("int8-weights"), tmp_path / "int8-weights")
    weights = folder / "transformer" / "openvino_model.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(ValueError, match=r"transformer.*damaged.*optimize_pipeline\(") as caught:
        OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)
    assert "\n" not in str(caught.value)
    made = count_made(monkeypatch)
    optimize_pipeline(fp16, tmp_path / "other", "int8-weights", progress=False)
    assert made == ["transformer"]  # the two good ones were copied from the neighbour
    optimize_pipeline(fp16, folder, "int8-weights", progress=False)
    OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


def test_presets_share_models_with_the_same_recipe(optimized, fp16, monkeypatch):
    optimized("int8"), optimized("int8-weights")
    made = count_made(monkeypatch)
    optimize_pipeline(fp16, fp16.parent / "int8-again", "int8", **DATA)
    assert made == []
    shutil.rmtree(fp16.parent / "int8-again")


def test_another_preset_in_the_same_folder_replaces_the_first(optimized, fp16, tmp_path):
    folder = shutil.copytree(optimized("int8"), tmp_path / "folder")
    optimize_pipeline(fp16, folder, "int8-weights", progress=False)
    assert not rounded_inputs(folder, "transformer")
    record = json.loads((folder / "transformer" / "optimization.json").read_text())
    assert record["recipe"]["activations"] is False


def test_nothing_is_left_lying_about(optimized, fp16):
    before = {file.name for file in fp16.iterdir()}
    folder = optimized("int8")
    assert not list(folder.parent.rglob(".partial-*"))
    assert {file.name for file in folder.iterdir()} == before


def count_made(monkeypatch) -> list[str]:
    """The names of the models that are computed from now on."""
    made, optimize_part = [], helper._optimize_part

    def counted(source, name, *args, **kwargs):
        made.append(name)
        return optimize_part(source, name, *args, **kwargs)

    monkeypatch.setattr(helper, "_optimize_part", counted)
    return made


# ---- errors -------------------------------------------------------------------------------------


def fails(error: type[Exception], words: str, *args, **kwargs) -> None:
    """Check that a call fails with one line that holds `words`, and writes nothing."""
    with pytest.raises(error, match=words) as caught:
        optimize_pipeline(*args, progress=False, **kwargs)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_known_ones(fp16, tmp_path):
    fails(ValueError, "'int9' is unknown.*'int8-weights', 'int8'", fp16, tmp_path / "x", "int9")
    assert not (tmp_path / "x").exists()


def test_too_few_captions_are_refused(fp16, tmp_path):
    words = "1 different captions, too few for num_samples=10: give 2 or more"
    few = ["one", "one ", ""]
    fails(ValueError, words, fp16, tmp_path / "x", calibration_prompts=few, num_samples=10)
    fails(ValueError, "too few", fp16, tmp_path / "x", calibration_prompts=[])


def test_captions_that_are_none_are_refused(fp16, tmp_path):
    fails(ValueError, "calibration_prompts=", fp16, tmp_path / "x", calibration_prompts=[1, 2])
    fails(ValueError, "num_samples=0", fp16, tmp_path / "x", num_samples=0)
    missing = tmp_path / "none.csv"
    fails(FileNotFoundError, "none.csv", fp16, tmp_path / "x", calibration_prompts=missing)
    file = tmp_path / "other.csv"
    file.write_text("text\na\n")
    fails(ValueError, "it has 'text'", fp16, tmp_path / "x", calibration_prompts=file)


def test_a_quantized_source_is_refused(optimized, tmp_path):
    for preset in ("int8", "int8-weights"):
        fails(ValueError, "quantized already", optimized(preset), tmp_path / "x")


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_text_encoder_that_is_small_already_is_copied(preset, fp16, tmp_path, monkeypatch):
    source = shutil.copytree(fp16, tmp_path / "fp16")
    torch_folder = fp16.parents[1] / "torch"
    helper.convert_pipeline(torch_folder, source, weight_format={"text_encoder": "int8"})
    monkeypatch.setattr(helper, "_LARGE", 0)
    folder = optimize_pipeline(source, tmp_path / "out", preset, **DATA)
    file = "text_encoder/openvino_model.bin"
    assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert rounded_inputs(folder, "transformer")
    assert paint(OVPixArtAlphaPipeline, folder).std() > 0


def test_a_source_that_is_no_openvino_folder_is_refused(fp16, tmp_path):
    fails(ValueError, "convert_pipeline first", fp16.parents[1] / "torch", tmp_path / "x")
    fails(FileNotFoundError, "no folder", tmp_path / "nowhere", tmp_path / "x")
    fails(FileNotFoundError, "model_index.json", tmp_path, tmp_path / "x")


def test_output_equal_to_source_is_refused(fp16, tmp_path):
    fails(ValueError, "is the source folder", fp16, fp16)
    file = tmp_path / "file"
    file.touch()
    fails(ValueError, "is a file", fp16, file)
