"""Pipelines that are saved come back as they were; uploads, with the hub's client replaced."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import HfApi
from optimum.intel.openvino import OVDiffusionPipeline

import ov_pixart_helper as helper
from tests.support.checkpoints import build_checkpoint
from tests.support.parity import F32, assert_same, generate, load_exact
from tests.support.refused import refused


def test_saved_and_loaded_it_generates_the_same(fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline("sigma")
    helper.store_runtime_options(pipeline.vae_decoder.model, DYNAMIC_QUANTIZATION_GROUP_SIZE=64)
    pipeline.save_pretrained(tmp_path)
    again = helper.OVPixArtSigmaPipeline.from_pretrained(tmp_path, ov_config=F32)
    assert_same(generate(again), generate(pipeline), 1e-6)
    assert again.vae_decoder.ov_config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "64"


def test_a_swapped_scheduler_comes_back(fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False)
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "swapped")
    given = fresh_pipeline("alpha", compile=False, scheduler=diffusers.DDIMScheduler())
    given.save_pretrained(tmp_path / "given")
    for name, expected in (("swapped", "LCMScheduler"), ("given", "DDIMScheduler")):
        again = OVDiffusionPipeline.from_pretrained(tmp_path / name, compile=False)
        assert type(again.scheduler).__name__ == expected
    assert helper.default_settings(tmp_path / "swapped").num_inference_steps == 4


def test_swapped_components_come_back(fresh_pipeline, checkpoint, tmp_path):
    """With their configurations: the DiT of 1024-MS needs its own."""
    source = build_checkpoint(tmp_path / "source", "alpha-ms", seed=1)
    other = load_exact(helper.convert_pipeline(source, tmp_path / "other", weight_format="fp32"))
    pipeline = fresh_pipeline("alpha")
    for name in ("transformer", "text_encoder", "vae"):
        setattr(pipeline, name, getattr(other, name))
    pipeline.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "other")
    again = load_exact(tmp_path / "saved")
    assert again.transformer.config.sample_size == 128
    assert_same(generate(again), generate(other), 1e-6)


def test_a_scheduler_that_could_not_be_loaded_again_is_not_saved(fresh_pipeline, tmp_path):
    class MyScheduler(diffusers.DDIMScheduler):
        pass

    pipeline = fresh_pipeline("alpha", compile=False, scheduler=MyScheduler())
    with refused(ValueError, "scheduler=MyScheduler", "a class that diffusers has"):
        pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 64, 64, 1), (-1, 64, 80, -1)])
def test_static_shapes_come_back(shape, fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False).reshape(*shape)
    pipeline.save_pretrained(tmp_path)
    again = load_exact(tmp_path, compile=False)
    assert again.is_dynamic == pipeline.is_dynamic == (-1 in shape)
    for name, model in pipeline.ov_models.items():
        for port, other in zip(model.inputs, again.ov_models[name].inputs, strict=True):
            assert port.get_partial_shape() == other.get_partial_shape()
    if -1 not in shape:
        with refused(ValueError, "height=128", "64"):
            generate(again, height=128)
        assert OVDiffusionPipeline.from_pretrained(tmp_path, compile_only=True).height == 64
    free = load_exact(tmp_path, compile=False, dynamic_shapes=True)
    assert (free.batch_size, free.height, free.width) == (-1, -1, -1)


def test_a_pipeline_is_not_saved_over_its_own_weights(ov_pipeline, converted):
    with pytest.raises(ValueError, match=r"save_directory=.*choose another"):
        ov_pipeline("alpha").save_pretrained(converted("alpha"))


@pytest.fixture
def uploads(monkeypatch, tmp_path) -> dict[str, Path]:
    """What was uploaded: a copy of the folder for each repository, in place of the hub."""
    found: dict[str, Path] = {}

    class Repository:
        def __init__(self, repo_id: str):
            self.repo_id = f"me/{repo_id}" if "/" not in repo_id else repo_id

    def create_repo(api, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        return Repository(repo_id)

    def upload_folder(api, *, repo_id, folder_path, commit_message, create_pr):
        assert commit_message
        found[repo_id] = shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return f"https://huggingface.co/{repo_id}/tree/main/"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return found


def test_an_upload_is_a_folder_that_can_be_loaded(fresh_pipeline, ov_pipeline, uploads, tmp_path):
    pipeline = fresh_pipeline("alpha")
    assert "/me/pixart/" in pipeline.save_pretrained(tmp_path / "pixart", push_to_hub=True)
    assert "/us/small/" in pipeline.push_to_hub("us/small", private=True, token="hf_1")
    assert set(uploads) == {"me/pixart", "us/small"}
    for folder in uploads.values():
        assert_same(generate(load_exact(folder)), generate(ov_pipeline("alpha")), 1e-6)


def test_a_folder_with_other_files_is_left_alone(fresh_pipeline, checkpoint, tmp_path, monkeypatch):
    """A torch checkpoint would be taken for an OpenVINO folder afterwards."""
    pipeline = fresh_pipeline("alpha", compile=False)
    source = shutil.copytree(checkpoint("alpha"), tmp_path / "torch")
    before = sorted(source.rglob("*"))
    with refused(ValueError, f"save_directory={str(source)!r}", "holds other files", "new folder"):
        pipeline.save_pretrained(source)
    assert sorted(source.rglob("*")) == before
    monkeypatch.chdir(tmp_path)
    with refused(ValueError, "save_directory=''", "the path of a folder"):
        pipeline.save_pretrained("")


def test_what_cannot_be_saved_leaves_the_target_as_it_was(fresh_pipeline, converted, tmp_path):
    target = shutil.copytree(converted("alpha"), tmp_path / "target")
    before = {file: file.stat().st_mtime_ns for file in target.rglob("*") if file.is_file()}
    compiled = fresh_pipeline("alpha", compile_only=True)
    with refused(ValueError, "compile_only=True holds no IRs"):
        compiled.save_pretrained(target)
    other = load_exact(target)
    pipeline = fresh_pipeline("alpha", text_encoder=other.text_encoder)
    pipeline.release_text_encoder()
    with refused(ValueError, "save_directory=", "reads its weights from"):
        pipeline.save_pretrained(target)
    moved = shutil.copytree(converted("alpha"), tmp_path / "moved")
    lost = load_exact(moved)
    shutil.rmtree(moved)
    with pytest.raises(FileNotFoundError):
        lost.save_pretrained(target)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_swapped_vae_comes_back_with_its_encoder(fresh_pipeline, checkpoint, tmp_path):
    options = {"weight_format": "fp32", "vae_encoder": True}
    other = load_exact(helper.convert_pipeline(checkpoint("alpha"), tmp_path / "other", **options))
    pipeline = fresh_pipeline("alpha")
    pipeline.vae = other.vae
    pipeline.save_pretrained(tmp_path / "saved")
    images = torch.rand(1, 3, 64, 64)
    expected = other.vae.encode(images).latent_dist.mean
    again = load_exact(tmp_path / "saved").vae.encode(images).latent_dist.mean
    assert torch.allclose(again, expected, atol=1e-5)


def test_a_pipeline_without_text_encoder_and_tokenizer_comes_back(fresh_pipeline, tmp_path):
    lean = fresh_pipeline("alpha", text_encoder=None, tokenizer=None, compile=False)
    lean.save_pretrained(tmp_path)
    assert load_exact(tmp_path, compile=False).tokenizer is None


def test_options_of_saving_are_not_ignored(fresh_pipeline, uploads, tmp_path):
    pipeline = fresh_pipeline("alpha", compile=False)
    with refused(TypeError, "save_pretrained has no argument 'privat'", "'private'"):
        pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, privat=True)
    with refused(ValueError, "push_to_hub=False", "repo_id="):
        pipeline.save_pretrained(tmp_path / "saved", repo_id="us/small")
    assert not (tmp_path / "saved").exists()
    assert not uploads
    assert pipeline.save_pretrained(tmp_path / "saved", safe_serialization=True) is None
    assert isinstance(load_exact(tmp_path / "saved", compile=False), OVDiffusionPipeline)
