"""The command that measures the presets on PixArt-tiny."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ov_pixart_helper import GenerationDefaults
from pixart_tiny import presets
from pixart_tiny.presets import FP16, FP16_F32, TORCH, Version
from tests.support.folders import flip_a_bit

CAPTIONS = [("a large red heart on a white background", 1)]


@pytest.fixture
def version(monkeypatch, tmp_path):
    """A torch checkpoint whose pipeline counts its loads in `version.loads`."""
    folder = tmp_path / "checkpoint" / "transformer"
    folder.mkdir(parents=True)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"1234")
    loads = []

    def load(folder):
        loads.append(folder)
        image = Image.new("RGB", (8, 8), (len(loads), 0, 0))
        return FakePipeline(image)

    monkeypatch.setattr(presets.ovp, "load_pipeline", load)
    settings = GenerationDefaults(2, 4.5, max_sequence_length=8, height=8, width=8)
    monkeypatch.setattr(presets.ovp, "default_settings", lambda folder: settings)
    return SimpleNamespace(
        version=Version("torch", tmp_path / "checkpoint"), loads=loads, root=tmp_path / "work"
    )


class FakePipeline:
    def __init__(self, image):
        self.image = image

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompts, **_):
        return SimpleNamespace(images=[self.image] * len(prompts))


def red(images):
    return np.asarray(images[0])[0, 0, 0]


def test_images_are_kept_while_the_checkpoint_is_the_same(version):
    assert red(presets.generate_images(version.version, CAPTIONS, version.root)) == 1
    assert red(presets.generate_images(version.version, CAPTIONS, version.root)) == 1
    assert len(version.loads) == 1


def test_images_of_a_changed_torch_checkpoint_are_generated_anew(version):
    presets.generate_images(version.version, CAPTIONS, version.root)
    weights = version.version.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    flip_a_bit(weights)
    assert red(presets.generate_images(version.version, CAPTIONS, version.root)) == 2


def test_images_of_other_captions_are_generated_anew(version):
    presets.generate_images(version.version, CAPTIONS, version.root)
    assert red(presets.generate_images(version.version, [(CAPTIONS[0][0], 2)], version.root)) == 2


def test_a_fingerprint_has_models_and_configurations_and_no_documents(tmp_path):
    for name in ("vae/config.json", "vae/openvino_model.bin", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = presets.fingerprint(tmp_path)
    assert [*found] == ["vae/config.json", "vae/openvino_model.bin"]
    (tmp_path / "README.md").write_text("another")
    assert presets.fingerprint(tmp_path) == found
    (tmp_path / "vae/config.json").write_text("another")
    assert presets.fingerprint(tmp_path) != found


def figures(**changes):
    labels = (TORCH, FP16_F32, FP16, *presets.PRESETS)
    good = {"right_percent": 95, "psnr_median_db": 60, "psnr_p10_db": 50}
    good |= {"t5_dit_ratio": 0.4, "seconds_to_make": 9}
    return {label: {**good, **changes.get(label, {})} for label in labels}


def test_missed_targets_are_named_with_figure_and_limit():
    assert presets.misses(figures()) == []
    assert presets.misses(figures(int8={"psnr_median_db": 20.0})) == [
        "int8: psnr_median_db 20, target >= 41"
    ]
    assert presets.misses(figures(hybrid={"right_percent": 10})) == []


def test_equal_images_have_infinite_psnr():
    images = [Image.new("RGB", (8, 8), "red")] * 2
    assert presets.likeness(images, images)["psnr_median_db"] == float("inf")


def test_the_table_replaces_the_one_in_the_document(tmp_path):
    result = {"captions": 2, "device": "a processor", "versions": figures()}
    table = presets.format_table(result)
    assert "| PyTorch | 95.0 % | 60.0 dB | 50.0 dB | 0.40 | – | – | – | – |" in table
    document = tmp_path / "presets.md"
    document.write_text(presets.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    presets.write_table("old figures\n", document=document)
    presets.write_table(table, document=document)
    written = document.read_text(encoding="utf-8")
    assert table in written
    assert "old figures" not in written
    assert written.startswith("# Presets")


def test_a_document_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "presets.md").write_text("# Presets\n")
    with pytest.raises(ValueError, match="no place for the table"):
        presets.write_table("", document=tmp_path / "presets.md")


def test_twins_are_a_row_each_and_miss_targets_of_their_own(tmp_path, monkeypatch, version):
    monkeypatch.setattr(presets, "WORK", tmp_path)
    monkeypatch.setattr(presets, "TWINS", {"one": None})
    monkeypatch.setattr(presets, "build_twin", lambda folder, outliers: folder.mkdir(parents=True))
    labels = (FP16, *presets.TWIN_PRESETS)
    versions = [Version(label, tmp_path / label) for label in labels]
    monkeypatch.setattr(presets, "make_versions", lambda *_: versions)
    monkeypatch.setattr(presets, "generate_images", lambda version, *_: version.label)
    right = {label: [1.0] for label in labels} | {"int4": [0.0]}
    monkeypatch.setattr(presets.oracle, "score_pictures", lambda images, _: right[images])
    found = {"psnr_median_db": 38.5, "psnr_p10_db": 30.0}
    monkeypatch.setattr(presets, "likeness", lambda *_: found)
    monkeypatch.setattr(presets, "component_quality", lambda _: {"transformer": "30.0 dB"})
    result = presets.measure_twins(1)
    assert result["misses"] == [
        "one, int8: psnr_median_db 38.5, target >= 39",
        "one, int4: right_percent 0, target >= 97",
    ]
    table = presets.format_twins(result)
    assert "| one | int8 | 100.0 % | 38.5 dB | 30.0 dB | – | 30.0 dB | – |" in table
