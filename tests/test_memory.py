"""What conversion takes of memory and disk, scaled down; `python -m benchmarks memory` has the
full size."""

import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

import ov_pixart_helper as helper
from ov_pixart import convert
from ov_pixart.checkpoint import COMPONENTS, load_component
from ov_pixart.cost import conversion_cost
from ov_pixart.workers import WorkerError, call_in_process
from tests.support.refused import refused

PROCESS = 100_000_000  # bytes that libraries take whatever a model's size is


# ---- memory while converting --------------------------------------------------------------------


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


def convert_one(folder: Path, name: str, weight_format: str, output: Path) -> None:
    module = load_component(folder / name, COMPONENTS[name].loader)
    convert.convert_component(name, module, output, weight_format)


def convert_within(
    limit: float, folder: Path, name: str, weight_format: str, tiny: Path, output: Path
) -> None:
    """Convert with at most `limit` bytes more than this process has after a tiny conversion.

    The limit counts mapped weight files as data, which they are not: they come on top.
    """
    import resource  # not on Windows

    convert_one(tiny, name, weight_format, output)
    status = Path("/proc/self/status").read_text()
    in_use = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    mapped = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + mapped + int(limit),) * 2)
    convert_one(folder, name, weight_format, output)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
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
    announced = conversion_cost(models / stored / name, weight_format).free
    rest = (models / stored, name, weight_format, checkpoint("alpha-ms"), tmp_path / "out")
    call_in_process(convert_within, announced + PROCESS, *rest)
    assert (tmp_path / "out" / "openvino_model.xml").is_file()
    with pytest.raises(WorkerError):  # the limit is one
        call_in_process(convert_within, 0.4 * announced, *rest)


# ---- room is checked before anything is done ----------------------------------------------------

Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "available")


@pytest.fixture
def finished(converted, tmp_path) -> Path:
    """A converted folder, while there is room."""
    return shutil.copytree(converted("alpha"), tmp_path / "ov")


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1000))


@pytest.fixture
def little_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 1000))


def test_too_little_memory_is_reported_before_anything_is_written(
    checkpoint, tmp_path, little_memory
):
    with refused(MemoryError, "text_encoder takes", "GB are free: close other programs"):
        helper.convert_pipeline(checkpoint("alpha"), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_reported_before_anything_is_written(checkpoint, tmp_path, little_disk):
    with refused(OSError, "GB of disk, and 0.0 GB are free: make room"):
        helper.convert_pipeline(checkpoint("alpha"), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_finished_components_need_no_room(finished, checkpoint, little_memory, little_disk):
    source = checkpoint("alpha")
    assert helper.convert_pipeline(source, finished, weight_format="fp32") == finished


@pytest.mark.slow
def test_the_bar_names_the_component_its_memory_and_its_stages(checkpoint, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(
        convert.tqdm, "set_description", lambda bar, text, refresh=True: texts.append(text)
    )
    helper.convert_pipeline(checkpoint("alpha"), tmp_path, weight_format="int8")
    for name in COMPONENTS:
        pattern = rf"Converting {name}, 0\.\d GB of memory: (\w+).*"
        stages = [match[1] for text in texts if (match := re.fullmatch(pattern, text))]
        assert list(dict.fromkeys(stages)) == ["loading", "tracing", "compressing", "writing"]
    assert texts[-1] == "Converted"
