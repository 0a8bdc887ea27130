"""What conversion takes of memory and disk, scaled down; `python -m tests.benchmarks.memory` has
the full size."""

import re
import shutil
import sys
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

import ov_pixart_helper as helper
from tests.benchmarks import memory
from tests.benchmarks.workers import WorkerError, call_in_process

MEGABYTE = 1_000_000
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux limits a process's data"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """T5 and the DiT of 1024-MS with 60 to 80 million weights, in 16 and in 32 bits, in shards."""
    root = tmp_path_factory.mktemp("models")
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=8000,
            d_model=768,
            d_kv=64,
            d_ff=2048,
            num_layers=8,
            num_heads=12,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=12,
        num_layers=6,
        cross_attention_dim=864,
        caption_channels=768,
        sample_size=128,
        use_additional_conditions=True,
    )
    for dtype in (torch.float32, torch.bfloat16):
        for name, model in (("text_encoder", text_encoder), ("transformer", transformer)):
            folder = root / f"{dtype}".removeprefix("torch.") / name
            model.to(dtype).save_pretrained(folder, max_shard_size="50MB")
    return root


def convert_within(
    limit: float, folder: Path, name: str, weight_format: str, tiny: Path, output: Path
) -> None:
    """Convert with at most `limit` bytes more than this process has after a tiny conversion.

    Mapped weight files are no data, but the limit counts them: they come on top.
    """
    import resource  # not on Windows

    memory.convert_one(tiny, name, weight_format, output)
    status = Path("/proc/self/status").read_text()
    in_use = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    mapped = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + mapped + int(limit),) * 2)
    memory.convert_one(folder, name, weight_format, output)


@linux_only
@pytest.mark.parametrize(
    ("stored", "name", "weight_format"),
    [
        ("float32", "text_encoder", "int8"),
        ("bfloat16", "text_encoder", "int4"),
        ("float32", "transformer", "fp16"),
    ],
)
def test_conversion_runs_within_the_memory_that_it_announces(
    models, checkpoint, tmp_path, stored, name, weight_format
):
    announced = helper._cost(models / stored / name, weight_format).free
    rest = (models / stored, name, weight_format, checkpoint("alpha-ms"), tmp_path / "out")
    call_in_process(convert_within, announced + 40 * MEGABYTE, *rest)
    with pytest.raises(WorkerError):  # the limit is one
        call_in_process(convert_within, 0.4 * announced, *rest)


def test_conversion_leaves_the_module_as_it_was(models, tmp_path):
    encoder = helper._load_part(models / "float32" / "text_encoder", T5EncoderModel)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    helper.convert_text_encoder(encoder, tmp_path / "out", weight_format="fp16")
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_weights_beyond_float16_stay_finite(tmp_path):
    encoder = helper.T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    with torch.no_grad():
        encoder.encoder.block[0].layer[0].SelfAttention.q.weight[0, 0] = 1e5
    helper.convert_text_encoder(encoder, tmp_path, weight_format="fp16")
    model = helper.ov.Core().read_model(tmp_path / helper.IR_NAME)
    constants = [node.data for node in model.get_ops() if node.get_type_name() == "Constant"]
    floats = [data for data in constants if data.dtype.kind == "f"]
    assert max(float(abs(data).max()) for data in floats if data.size) < 1e6


Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "available")


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_too_little_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch, resource):
    if resource == "memory":
        monkeypatch.setattr(helper.psutil, "virtual_memory", lambda: Memory(1000))
        expected = pytest.raises(MemoryError, match=r"text_encoder takes .* GB .* are free: close")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 1000))
        expected = pytest.raises(OSError, match=r"needs .* GB of disk, and 0\.0 GB are free: make")
    with expected:
        helper.convert_pipeline(checkpoint("alpha"), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_needs_no_room(checkpoint, tmp_path, monkeypatch):
    folder = helper.convert_pipeline(checkpoint("alpha"), tmp_path)
    monkeypatch.setattr(helper.psutil, "virtual_memory", lambda: Memory(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 1000))
    assert helper.convert_pipeline(checkpoint("alpha"), tmp_path) == folder


def test_the_bar_names_the_model_what_it_takes_and_what_is_done(checkpoint, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        helper.tqdm, "set_description", lambda bar, text, refresh=True: said.append(text)
    )
    helper.convert_pipeline(checkpoint("alpha"), tmp_path, weight_format="int8")
    for name in helper.PARTS:
        pattern = rf"Converting {name}, 0\.\d GB of memory: (\w+).*"
        steps = [match[1] for text in said if (match := re.fullmatch(pattern, text))]
        assert list(dict.fromkeys(steps)) == ["loading", "tracing", "compressing", "writing"]
    assert said[-1] == "Converted"


def test_a_released_text_encoder_is_held_by_nothing(fresh_pipeline):
    pipeline = fresh_pipeline("alpha")
    pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False)
    compiled = weakref.ref(pipeline.text_encoder.request)
    assert compiled() is not None
    pipeline.release_text_encoder()
    assert compiled() is None
