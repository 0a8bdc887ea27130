"""Folders as the hub has them are read; what is wrong with one is stated in one line."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import PixArtTransformer2DModel
from optimum.intel.openvino import OVDiffusionPipeline
from transformers import T5Tokenizer

import ov_pixart_helper as helper
from ov_pixart.checkpoint import load_component
from tests.support.checkpoints import as_published
from tests.support.folders import flip_a_bit
from tests.support.refused import refused

INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"


# ---- ways to alter a folder ---------------------------------------------------------------------


def lose(name):
    def alter(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return alter


def cut(name, length=1000):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def alter_json(name, **changes):
    def alter(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return alter


def become(name):
    return overwrite(INDEX, json.dumps({"_class_name": name}).encode())


def become_pickled(folder):
    weights = folder / "transformer" / WEIGHTS
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def flip_the_header(folder):
    file = folder / "vae" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[8] ^= 4  # the first byte of the header's JSON
    file.write_bytes(content)


def schedule_with(name):
    return alter_json("scheduler/scheduler_config.json", _class_name=name)


# ---- checkpoints --------------------------------------------------------------------------------

MISSING, WRONG = FileNotFoundError, ValueError
BAD_CHECKPOINTS = {
    "no index": (lose(INDEX), MISSING, "has no model_index.json"),
    "no scheduler": (lose("scheduler"), MISSING, "has no folder 'scheduler'", "scheduler="),
    "no transformer": (lose("transformer"), MISSING, "has no folder 'transformer'"),
    "no tokenizer": (lose("tokenizer"), MISSING, "has no folder 'tokenizer'", "download it"),
    "no vocabulary": (lose("tokenizer/tokenizer.json"), MISSING, "neither tokenizer.json nor"),
    "vocabulary cut": (
        overwrite("tokenizer/tokenizer.json", b"version https://git-lfs.github.com/spec/v1"),
        *(WRONG, "tokenizer", "damaged", "download it again"),
    ),
    "pickled": (become_pickled, WRONG, "only pickled weights", "safe_serialization=True"),
    "weights cut": (cut(f"vae/{WEIGHTS}"), WRONG, "damaged", "download it again"),
    "header flipped": (flip_the_header, WRONG, WEIGHTS, "damaged", "download it again"),
    "Stable Diffusion": (become("StableDiffusionPipeline"), WRONG, "StableDiffusion", "a PixArt"),
    "Flux": (become("FluxPipeline"), WRONG, "holds a FluxPipeline", "choose a PixArt"),
    "its own pipeline": (become(["pipeline", "Mine"]), WRONG, "'Mine'", "choose a PixArt"),
    "index is no JSON": (overwrite(INDEX, b"\x80{"), WRONG, INDEX, "download"),
    "index is a list": (overwrite(INDEX, b"[]"), WRONG, INDEX, "download"),
    "unknown scheduler": (schedule_with("MagicScheduler"), WRONG, "'MagicScheduler'", "scheduler="),
    "a scheduler for flows": (
        schedule_with("FlowMatchEulerDiscreteScheduler"),
        *(WRONG, "'FlowMatchEulerDiscreteScheduler'", "scheduler="),
    ),
    "scheduler of a module": (
        alter_json(INDEX, scheduler=["evil", "S"]),
        *(WRONG, "['evil', 'S']", "never"),
    ),
    "tokenizer of a module": (
        alter_json(INDEX, tokenizer=["evil", "T"]),
        *(WRONG, "['evil', 'T']", "never"),
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_before_anything_is_converted(case, checkpoint, tmp_path):
    alter, kind, *words = case
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    alter(source)
    with refused(kind, *words):
        helper.convert_pipeline(source, tmp_path / "ov")
    assert not list((tmp_path / "ov").rglob("*.xml"))


def test_a_weight_that_is_missing_is_named(checkpoint, tmp_path):
    """A flipped bit in the names of a file of weights: the file as such is sound."""
    folder = shutil.copytree(checkpoint("alpha") / "transformer", tmp_path / "transformer")
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes().replace(b'"proj_out.bias"', b'"proj_out.bhas"'))
    with refused(ValueError, "transformer", "proj_out.bias", "download it again"):
        load_component(folder, PixArtTransformer2DModel)


@pytest.mark.slow
def test_a_folder_as_published_is_converted_in_silence(checkpoint, tmp_path, capfd, caplog):
    """Old class name, a weight that nobody uses, a tokenizer that is one `spiece.model`."""
    source = as_published(checkpoint("alpha"), tmp_path / "source")
    capfd.readouterr()
    folder = helper.convert_pipeline(source, tmp_path / "ov", weight_format="fp32")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "arn" not in printed.err and "Loading weights" not in printed.err
    assert "Converting transformer" in printed.err  # the bar
    assert not caplog.records

    prompt = "a small red circle above the sea"
    saved = T5Tokenizer.from_pretrained(folder / "tokenizer")(prompt).input_ids
    assert saved == T5Tokenizer.from_pretrained(checkpoint("alpha") / "tokenizer")(prompt).input_ids
    assert saved[-1] == 1 and len(set(saved)) > 5


def test_a_hub_id_is_found_in_the_cache(converted, tmp_path):
    snapshot = tmp_path / "cache" / "models--someone--pixart" / "snapshots" / "0123abcd"
    shutil.copytree(converted("alpha"), snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    pipeline = helper.OVPixArtAlphaPipeline.from_pretrained("someone/pixart", compile=False, **hub)
    assert Path(pipeline.model_save_dir) == snapshot
    with refused(FileNotFoundError, "model_id='someone/else'", "Hugging Face"):
        helper.convert_pipeline("someone/else", tmp_path / "ov", **hub)


@pytest.mark.slow
def test_code_in_a_folder_is_neither_run_nor_taken_along(checkpoint, tmp_path, monkeypatch):
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for place in (".", "transformer", "text_encoder", "tokenizer", "scheduler", "vae"):
        (source / place / "evil.py").write_text(code)
    monkeypatch.chdir(source)  # where an import would find it
    automatic = {"AutoConfig": "evil.E", "AutoModel": "evil.E", "AutoTokenizer": ["evil.E", None]}
    alter_json("text_encoder/config.json", auto_map=automatic)(source)
    alter_json("tokenizer/tokenizer_config.json", auto_map=automatic)(source)
    folder = helper.convert_pipeline(source, tmp_path / "ov")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)
    assert not list(folder.rglob("*.py"))
    for place in (source, folder):
        index = (place / INDEX).read_text()
        for name in ("scheduler", "tokenizer", "safety_checker"):
            alter_json(INDEX, **{name: ["evil", "E"]})(place)
            with refused(ValueError, f"its {name} from ['evil', 'E']", "never run"):
                helper.OVPixArtAlphaPipeline.from_pretrained(place)
            (place / INDEX).write_text(index)
    assert not (tmp_path / "ran").exists()


# ---- OpenVINO folders ---------------------------------------------------------------------------

DIT = "transformer/openvino_model"
AGAIN = "convert_pipeline("
BAD_OPENVINO_FOLDERS = {
    "weights cut": (cut(f"{DIT}.bin"), WRONG, "model.bin", "damaged", "run the same convert"),
    "weights replaced": (overwrite(f"{DIT}.bin", bytes(100)), WRONG, "model.bin", "damaged"),
    "graph cut": (cut(f"{DIT}.xml"), WRONG, "model.xml", "damaged", "run the same convert"),
    "no weights": (lose(f"{DIT}.bin"), MISSING, f"{DIT}.bin", AGAIN),
    "no graph": (lose(f"{DIT}.xml"), MISSING, f"{DIT}.xml", AGAIN),
    "no configuration": (lose("transformer/config.json"), MISSING, "config.json", AGAIN),
    "no tokenizer": (lose("tokenizer/tokenizer_config.json"), MISSING, "tokenizer_config.json"),
    "no vocabulary": (lose("tokenizer/tokenizer.json"), MISSING, "neither tokenizer.json nor"),
    "no index": (lose(INDEX), MISSING, "unfinished", AGAIN),
    "unknown scheduler": (schedule_with("MagicScheduler"), WRONG, "'MagicScheduler'", "scheduler="),
    "no scheduler": (lose("scheduler/scheduler_config.json"), MISSING, "scheduler_conf"),
    "Flux": (become("FluxPipeline"), WRONG, "holds a FluxPipeline", "choose a PixArt"),
}


@pytest.mark.parametrize("case", BAD_OPENVINO_FOLDERS.values(), ids=BAD_OPENVINO_FOLDERS)
def test_a_bad_openvino_folder_is_refused(case, converted, tmp_path):
    alter, kind, *words = case
    folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    alter(folder)
    with refused(kind, str(folder), *words):
        helper.OVPixArtAlphaPipeline.from_pretrained(folder)


def test_damage_is_found_on_optimums_own_entrance_too(converted, tmp_path):
    folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    alter_json("transformer/config.json", added="by hand")(folder)
    with refused(ValueError, "transformer", "damaged", AGAIN.rstrip("(")):
        OVDiffusionPipeline.from_pretrained(folder, compile=False)


def test_loading_compares_sizes_and_hashes_nothing(converted, tmp_path):
    """T5-XXL would take tens of seconds; `test_convert.py` shows that converting again hashes."""
    folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    flip_a_bit(folder / f"{DIT}.bin")
    helper.OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


# ---- what a folder recommends -------------------------------------------------------------------

DEFAULTS = {
    "alpha": (20, 4.5, 120, 256, 256),
    "sigma": (20, 4.5, 300, 256, 256),
    "alpha-ms": (20, 4.5, 120, 1024, 1024),
    "lcm": (4, 0.0, 120, 256, 256),
    "alpha-512": (20, 4.5, 120, 512, 512),
    "lcm-ms": (4, 0.0, 120, 1024, 1024),
    "dmd": (1, 1.0, 120, 512, 512, (400,)),
    "sigma-512": (20, 4.5, 300, 512, 512),
    "sigma-1024": (20, 4.5, 300, 1024, 1024),
    "sigma-2k": (20, 4.5, 300, 2048, 2048),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_each_family_has_its_defaults(family, checkpoint):
    expected = helper.GenerationDefaults(*DEFAULTS[family])
    assert helper.default_settings(checkpoint(family)) == expected


@pytest.mark.parametrize("family", ["alpha", "sigma", "alpha-ms"])
def test_conversion_keeps_what_a_folder_recommends(family, checkpoint, converted):
    for read in (helper.default_settings, helper.image_sizes, helper.family_of):
        assert read(converted(family)) == read(checkpoint(family))


def test_image_sizes_are_the_trained_ones_as_height_and_width(checkpoint):
    sizes = helper.image_sizes(checkpoint("alpha-512"))
    assert sizes["1:1"] == (512, 512)
    assert all(
        (width > height) == (name in ("4:3", "3:2", "16:9"))
        for name, (height, width) in sizes.items()
    )


def test_a_checkpoint_without_bins_knows_its_own_square(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("alpha"), tmp_path / "alpha")
    alter_json("transformer/config.json", sample_size=16)(folder)
    assert helper.image_sizes(folder) == {"1:1": (128, 128)}


def test_defaults_of_no_pixart_folder(tmp_path):
    with refused(FileNotFoundError, "model_dir=", "check the path"):
        helper.default_settings(tmp_path / "nowhere")
    become("FluxPipeline")(tmp_path)
    with refused(ValueError, "FluxPipeline", "choose a PixArt"):
        helper.default_settings(tmp_path)
