"""Whatever is typed or handed in: it works, or one line says which argument, its value, the mend.

All through public calls, on real files. Not simulated: a full disk is a limit on the size of files
that the system enforces, a read-only place is the kernel's own. Simulated: a generator on another
device, which a PyTorch without that device cannot make.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert import BAD_CHECKPOINTS, flip_a_bit
from test_pipeline import SMALL, draw

import ov_pixart_helper as helper
from ov_pixart_helper import OVPixArtAlphaPipeline, convert_pipeline, optimize_pipeline


def refused(kind, *words):
    """`with refused(ValueError, "height=100", "multiple of 16"):` – one line that has the words."""
    return _Refused(kind, words)


class _Refused:
    def __init__(self, kind, words):
        self.kind, self.words = kind, words

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        assert kind is not None, "nothing was refused"
        if not issubclass(kind, self.kind):
            return False
        message = str(error)
        assert "\n" not in message
        assert "Exception from src" not in message
        assert len(message) < 600
        for word in self.words:
            assert word in message, message
        return True


# ---- calls --------------------------------------------------------------------------------------


def text(prompts=1, tokens=5, width=32, **changes):
    """Embeddings and masks as a call takes them."""
    embeds, mask = torch.zeros(prompts, tokens, width), torch.ones(prompts, tokens)
    names = ("prompt_embeds", "negative_prompt_embeds")
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    call = {"prompt": None, **dict.fromkeys(names, embeds), **dict.fromkeys(masks, mask)}
    return {**call, **changes}


class ElsewhereGenerator(torch.Generator):
    device = torch.device("cuda")


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


ZEROS = torch.zeros
BAD_CALLS = {
    "no prompt": ({"prompt": None}, "prompt=None", "a string"),
    "no prompts": ({"prompt": []}, "prompt=[]", "at least one"),
    "a number among prompts": ({"prompt": ["a", 1]}, "prompt=['a', 1]", "a string"),
    "a number": ({"prompt": 7}, "prompt=7", "a string"),
    "bytes": ({"prompt": b"a"}, "prompt=b'a'", "a string"),
    "too many negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt=['a', 'b']", "of 1"),
    "no negative": ({"negative_prompt": None}, "negative_prompt=None", "a string"),
    "a numeric negative": ({"negative_prompt": 3}, "negative_prompt=3", "a string"),
    "height off the grid": ({"height": 100}, "height=100", "multiple of 16"),
    "negative width": ({"width": -64}, "width=-64", "multiple of 16"),
    "height 0": ({"height": 0}, "height=0", "multiple of 16"),
    "height as text": ({"height": "64"}, "height='64'", "multiple of 16"),
    "height 0, bins": ({"height": 0, "use_resolution_binning": True}, "height=0", "from 1"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0", "from 1"),
    "negative steps": ({"num_inference_steps": -4}, "num_inference_steps=-4", "from 1"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5", "from 1"),
    "a step that is true": ({"num_inference_steps": True}, "num_inference_steps=True", "from 1"),
    "one step": ({"num_inference_steps": 1}, "num_inference_steps=1", "2 or more with DPMSolver"),
    "too many steps": ({"num_inference_steps": 5000}, "num_inference_steps=5000", "1000 or fewer"),
    "no pictures": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0", "from 1"),
    "no tokens": ({"max_sequence_length": 0}, "max_sequence_length=0", "from 1"),
    "no guidance number": ({"guidance_scale": float("nan")}, "guidance_scale=nan", "a number"),
    "endless guidance": ({"guidance_scale": float("inf")}, "guidance_scale=inf", "a number"),
    "guidance as text": ({"guidance_scale": "4.5"}, "guidance_scale='4.5'", "a number"),
    "guidance None": ({"guidance_scale": None}, "guidance_scale=None", "a number"),
    "too many generators": ({"generator": generators(3)}, "generator=[", "list of 1"),
    "too few generators": (
        {"generator": generators(2), "num_images_per_prompt": 3},
        *("generator=[", "list of 3"),
    ),
    "a seed for a generator": ({"generator": 42}, "generator=42", "torch.Generator"),
    "generator elsewhere": ({"generator": ElsewhereGenerator()}, "generator=", "on the CPU"),
    "latents of another size": ({"latents": ZEROS(1, 4, 8, 6)}, "(1, 4, 8, 6)", "(1, 4, 8, 8)"),
    "latents with 3 channels": ({"latents": ZEROS(1, 3, 8, 8)}, "latents=", "(1, 4, 8, 8)"),
    "latents for two": ({"latents": ZEROS(2, 4, 8, 8)}, "latents=", "(1, 4, 8, 8)"),
    "latents as array": ({"latents": np.zeros((1, 4, 8, 8))}, "latents=", "(1, 4, 8, 8)"),
    "embeddings too wide": (text(width=33), "prompt_embeds=(tensor of (1, 5, 33))", "tokens, 32)"),
    "flat embeddings": (text(prompt_embeds=ZEROS(5, 32)), "prompt_embeds=", "(prompts, tokens"),
    "no mask": (text(prompt_attention_mask=None), "prompt_attention_mask=None", "(1, 5)"),
    "mask too long": (text(prompt_attention_mask=ZEROS(1, 6)), "mask=(tensor of (1, 6))", "(1, 5)"),
    "negative mask too short": (
        text(negative_prompt_attention_mask=ZEROS(1, 4)),
        *("negative_prompt_attention_mask=", "(1, 5)"),
    ),
    "no negative mask": (
        text(negative_prompt_attention_mask=None),
        *("negative_prompt_attention_mask=None", "(1, 5)"),
    ),
    "negative embeddings of another length": (
        text(negative_prompt_embeds=ZEROS(1, 4, 32)),
        *("negative_prompt_embeds=", "(1, 5, 32)"),
    ),
    "prompt and embeddings": (text(prompt="a"), "prompt='a'", "None where prompt_embeds"),
    "negative prompt and embeddings": (text(negative_prompt="a"), "negative_prompt='a'", "None"),
    "negative embeddings for text": (
        text(prompt="a", prompt_embeds=None),
        *("negative_prompt_embeds=", "encode both"),
    ),
    "no timesteps": ({"timesteps": []}, "timesteps=[]", "at least one"),
    "rising timesteps": ({"timesteps": [1, 500]}, "timesteps=[1, 500]", "descending"),
    "timesteps that are none": ({"timesteps": [float("nan")]}, "timesteps=[nan]", "numbers"),
    "timesteps as text": ({"timesteps": "999"}, "timesteps='999'", "numbers"),
    "timesteps and sigmas": ({"timesteps": [9, 1], "sigmas": [1.0]}, "sigmas=[1.0]", "None where"),
    "sigmas for DPM-Solver++": ({"sigmas": [9.0, 1.0]}, "sigmas=[9.0, 1.0]", "None with DPMSolver"),
    "output as JPEG": ({"output_type": "jpeg"}, "output_type='jpeg'", "'pil', 'np', 'pt'"),
    "a callback that is none": ({"callback": "print"}, "callback='print'", "a function"),
    "callback never": ({"callback_steps": 0}, "callback_steps=0", "from 1"),
}


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_is_answered_in_one_line(case, ov_pipeline):
    call, *words = case
    with refused(ValueError, *words):
        draw(ov_pipeline("alpha"), **call)


@pytest.mark.parametrize("prompt", ["", " ", ["", ""], "\n", "🦊", "<b>&amp;", "http://a.com"])
@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_odd_prompts_are_drawn(prompt, ov_pipeline):
    picture = draw(ov_pipeline("alpha"), prompt=prompt, num_inference_steps=2)
    assert np.isfinite(picture).all() and picture.std() > 0


# ---- prompts that are too long ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_what_is_cut_off_is_quoted_in_one_line(family, ov_pipeline, caplog):
    call = {**SMALL, "num_inference_steps": 2, "max_sequence_length": 10}
    prompt = "a small red circle above the sea " * 3 + "and a bright star"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ov_pipeline(family)(**{**call, "prompt": prompt, "negative_prompt": prompt})
        ov_pipeline(family)(**{**call, "prompt": "a star"})
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert [message.split()[0] for message in said] == ["prompt", "negative_prompt"]
    for message in said:
        assert "max_sequence_length=10" in message and "star” is cut off" in message
        assert "\n" not in message
    assert not caplog.records  # nobody else speaks of it


def test_fifty_thousand_characters_are_cut_with_a_short_warning(ov_pipeline):
    prompt = "a small red circle above the sea, " * 1500
    assert len(prompt) > 50_000
    with pytest.warns(UserWarning, match="cut off") as caught:
        picture = draw(ov_pipeline("alpha"), prompt=prompt, num_inference_steps=2)
    assert all(len(str(w.message)) < 500 for w in caught)
    assert np.isfinite(picture).all()


# ---- folders to convert -------------------------------------------------------------------------


def become(name):
    def alter(source):
        (source / "model_index.json").write_text(json.dumps({"_class_name": name}))

    return alter


def alter_json(name, **changes):
    def alter(source):
        file = source / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return alter


def overwrite(name, content):
    return lambda source: (source / name).write_bytes(content)


def rename_a_weight(source):
    """A flipped bit in the names of a file of weights: the file as such is sound."""
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes().replace(b'"proj_out.bias"', b'"proj_out.bhas"')
    file.write_bytes(content)


def flip_the_header(source):
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[8] ^= 4  # the first byte of the header's JSON
    file.write_bytes(content)


INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"
BAD_FOLDERS = {
    "Stable Diffusion": (become("StableDiffusionPipeline"), "StableDiffusion", "choose a PixArt"),
    "Flux": (become("FluxPipeline"), "holds a FluxPipeline", "choose a PixArt"),
    "a pipeline of its own": (become(["pipeline", "Mine"]), "'Mine'", "choose a PixArt"),
    "index is no JSON": (overwrite(INDEX, b"\x80{"), "model_index.json", "download"),
    "index is a list": (overwrite(INDEX, b"[]"), "model_index.json", "download"),
    "unknown scheduler": (
        alter_json("scheduler/scheduler_config.json", _class_name="MagicScheduler"),
        *("'MagicScheduler'", "scheduler="),
    ),
    "a scheduler for flows": (
        alter_json(
            "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
        ),
        *("'FlowMatchEulerDiscreteScheduler'", "scheduler="),
    ),
    "scheduler of a module": (alter_json(INDEX, scheduler=["evil", "S"]), "['evil', 'S']", "never"),
    "tokenizer of a module": (alter_json(INDEX, tokenizer=["evil", "T"]), "['evil', 'T']", "never"),
    "weight of another name": (
        rename_a_weight,
        "transformer",
        "proj_out.bias",
        "download it again",
    ),
    "header flipped": (flip_the_header, WEIGHTS, "damaged", "download it again"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_answered_in_one_line(case, checkpoint, tmp_path):
    alter, *words = case
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    alter(source)
    with refused(ValueError, *words):
        convert_pipeline(source, tmp_path / "ov")
    assert not (tmp_path / "ov" / "model_index.json").exists()


def test_missing_pickled_and_truncated_components_have_their_lines():
    """In test_convert, where the folders are altered."""
    assert {"no scheduler", "no transformer", "pickled", "damaged"} <= BAD_CHECKPOINTS.keys()


def test_code_in_a_folder_is_neither_run_nor_taken_along(checkpoint, tmp_path, monkeypatch):
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "source")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for place in (".", "transformer", "text_encoder", "tokenizer", "scheduler", "vae"):
        (source / place / "evil.py").write_text(code)
    monkeypatch.chdir(source)  # where an import would find it
    automatic = {"AutoConfig": "evil.E", "AutoModel": "evil.E", "AutoTokenizer": ["evil.E", None]}
    alter_json("text_encoder/config.json", auto_map=automatic)(source)
    alter_json("tokenizer/tokenizer_config.json", auto_map=automatic)(source)
    folder = convert_pipeline(source, tmp_path / "ov")
    OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)
    assert not list(folder.rglob("*.py"))
    for place in (source, folder):
        index = (place / INDEX).read_text()
        for name in ("scheduler", "tokenizer", "safety_checker"):
            alter_json(INDEX, **{name: ["evil", "E"]})(place)
            with refused(ValueError, f"its {name} from ['evil', 'E']", "never run"):
                OVPixArtAlphaPipeline.from_pretrained(place)
            (place / INDEX).write_text(index)
    assert not (tmp_path / "ran").exists()


# ---- places to write to -------------------------------------------------------------------------


def test_bad_arguments_of_conversion(checkpoint, converted, tmp_path):
    source, out = checkpoint("alpha"), tmp_path / "ov"
    file = tmp_path / "file"
    file.touch()
    for arguments, options, kind, *words in [
        ((None, out), {}, ValueError, "model_id=None", "a folder or"),
        ((7, out), {}, ValueError, "model_id=7", "a folder or"),
        (("", out), {}, ValueError, "model_id=''", "a folder or"),
        ((tmp_path / "none", out), {}, FileNotFoundError, "model_id=", "check the path"),
        ((source, None), {}, ValueError, "output_dir=None", "the path of a folder"),
        ((source, file), {}, ValueError, "output_dir=", "is a file"),
        ((source, source), {}, ValueError, "output_dir=", "is the source folder", "another"),
        ((source, source / "ov"), {}, ValueError, "output_dir=", "lies in the source", "another"),
        ((source, out), {"weight_format": 8}, ValueError, "weight_format=8", "'int8'"),
        ((source, out), {"scheduler": 3}, ValueError, "scheduler=3", "a folder or"),
        ((source, out), {"vae": source / "scheduler"}, FileNotFoundError, "vae=", "name a folder"),
        ((converted("alpha"), out), {}, ValueError, "converted already", "from_pretrained"),
    ]:
        with refused(kind, *words):
            convert_pipeline(*arguments, **options)
    inside = converted("alpha") / "int8"
    with refused(ValueError, "output_dir=", "lies in the source folder", "choose another"):
        optimize_pipeline(converted("alpha"), inside, "int8-weights", progress=False)
    assert not (source / "ov").exists() and not inside.exists() and not out.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a place where nobody may write")
def test_a_read_only_place_is_named(checkpoint, converted):
    place = Path("/sys/pixart")
    with refused(OSError, f"output_dir={str(place)!r}", "cannot be written", "name a folder"):
        convert_pipeline(checkpoint("alpha"), place)
    with refused(OSError, f"output_dir={str(place)!r}", "cannot be written", "name a folder"):
        optimize_pipeline(converted("alpha"), place, "int8-weights", progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the size of files")
@pytest.mark.parametrize("limit", [20_000, 150_000], ids=["at once", "amid the weights"])
def test_a_full_disk_leaves_what_was_finished_and_nothing_half_written(
    limit, checkpoint, converted, tmp_path
):
    import resource

    source, folder = checkpoint("alpha"), tmp_path / "ov"
    shutil.copytree(converted("alpha"), folder)
    shutil.rmtree(folder / "transformer")
    (folder / "model_index.json").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # pytest keeps the progress bars in a file, which has to fit, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with refused(OSError, "output_dir=", "cannot be written", "make room"):
            convert_pipeline(source, folder, weight_format="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.rglob(".partial-*"))
    assert not list((folder / "transformer").iterdir())
    convert_pipeline(source, folder, weight_format="fp32")
    OVPixArtAlphaPipeline.from_pretrained(folder, compile=False)


# ---- folders to load ----------------------------------------------------------------------------


def cut(name, length=1000):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def flip(name):
    return lambda folder: flip_a_bit(folder / name)


def lose(name):
    return lambda folder: (folder / name).unlink()


DIT = "transformer/openvino_model"
BAD_CONVERTED = {
    "weights cut": (cut(f"{DIT}.bin"), ValueError, "model.", "damaged", "run convert_pipeline("),
    "graph cut": (cut(f"{DIT}.xml"), ValueError, "model.xml", "damaged", "run convert_pipeline("),
    "weights flipped": (flip(f"{DIT}.bin"), ValueError, "model.bin", "run convert_pipeline("),
    "graph flipped": (flip(f"{DIT}.xml"), ValueError, "model.xml", "run convert_pipeline("),
    "no weights": (lose(f"{DIT}.bin"), FileNotFoundError, f"{DIT}.bin", "run convert_pipeline("),
    "no graph": (lose(f"{DIT}.xml"), FileNotFoundError, f"{DIT}.xml", "run convert_pipeline("),
    "no configuration": (lose("transformer/config.json"), FileNotFoundError, "config.json", "run"),
    "no index": (lose(INDEX), FileNotFoundError, "unfinished", "run convert_pipeline("),
    "unknown scheduler": (
        alter_json("scheduler/scheduler_config.json", _class_name="MagicScheduler"),
        *(ValueError, "'MagicScheduler'", "scheduler="),
    ),
    "no scheduler": (lose("scheduler/scheduler_config.json"), FileNotFoundError, "scheduler_conf"),
    "Flux": (become("FluxPipeline"), ValueError, "holds a FluxPipeline", "choose a PixArt"),
}


@pytest.mark.parametrize("case", BAD_CONVERTED.values(), ids=BAD_CONVERTED)
def test_a_bad_openvino_folder_is_answered_in_one_line(case, converted, tmp_path):
    alter, kind, *words = case
    folder = shutil.copytree(converted("alpha"), tmp_path / "ov")
    alter(folder)
    with refused(kind, str(folder), *words):
        OVPixArtAlphaPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("device", "word"),
    [("XPU", "XPU"), ("HETERO:NPU,CPU", "NPU"), (None, "None"), ("", "''"), (3, "3")],
)
def test_a_device_that_is_not_there_is_named(device, word, converted):
    with refused(ValueError, "device=", word, "'CPU'"):
        OVPixArtAlphaPipeline.from_pretrained(converted("alpha"), device=device)


def test_a_download_that_differs_from_its_checksum_is_refused(checkpoint, tmp_path):
    """The hub's cache names large files by their SHA-256; other safetensors carry no checksum."""
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "cache" / "snapshot")
    file = source / "vae" / WEIGHTS
    blob = tmp_path / "cache" / helper._sha256(file)
    shutil.move(file, blob)
    file.symlink_to(blob)
    convert_pipeline(source, tmp_path / "good")
    flip_a_bit(blob)
    with refused(ValueError, str(file), "damaged", "download it again"):
        convert_pipeline(source, tmp_path / "bad")
