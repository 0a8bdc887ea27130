"""Pipelines written to a folder, or to a repository on Hugging Face."""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import HfApi
from optimum.intel.openvino.modeling_diffusion import (
    OVDiffusionPipeline,
    OVModelVae,
    OVPipelinePart,
)

from ov_pixart.checkpoint import COMPONENT_FILES, COMPONENTS, MODEL_INDEX, check_replaceable
from ov_pixart.checks import check, check_names, read_json
from ov_pixart.sources import VAE_ENCODER
from ov_pixart.storage import write_json

# of torch pipelines: how weights are stored does not matter here
_NO_EFFECT = ("safe_serialization", "variant", "max_shard_size")
_UPLOAD = ("repo_id", "private", "token", "commit_message", "create_pr")


class SavedPipeline(OVDiffusionPipeline):
    """A pipeline that is written as it is now, swapped components and static shapes included."""

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **options: Any
    ) -> str | None:
        """Write the pipeline to a folder, `model_index.json` last.

        `push_to_hub`: upload it too, and return its address. `options` are then `repo_id` (by
        default the folder's name), `private`, `token`, `commit_message` and `create_pr`, as in
        diffusers.

        Raises ValueError where `save_directory` is a file, the pipeline's own folder or holds other
        files, or where a component cannot be saved, TypeError for an unknown option.
        """
        check_names("save_pretrained", options, [*_UPLOAD, *_NO_EFFECT, "push_to_hub"])
        upload = {name: options[name] for name in _UPLOAD if name in options}
        rule = f"True where {', '.join(upload)}= is given"
        check(push_to_hub or not upload, "push_to_hub", push_to_hub, rule)
        check(bool(str(save_directory)), "save_directory", save_directory, "the path of a folder")
        folder = Path(save_directory)
        index = self._check_saveable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder, index)
        return _upload(folder, **upload) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the pipeline to a repository, made where there is none; return its address.

        Options and errors as in `save_pretrained`.
        """
        with tempfile.TemporaryDirectory(prefix="ov-pixart-") as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)

    def _check_saveable(self, folder: Path) -> dict[str, Any]:
        """The content of the pipeline's own index, before anything is written.

        Raises ValueError for a folder that cannot be written, or a component that is no IR.
        """
        if self._compile_only:
            raise ValueError(
                "A pipeline that was loaded with compile_only=True holds no IRs to save: load it "
                "without, or copy its folder."
            )
        if folder.is_file():
            raise ValueError(f"save_directory={str(folder)!r} is a file: name a folder.")
        own = [Path(one.model_save_dir).resolve() for one in self.components.values()]
        if folder.resolve() in (Path(self.model_save_dir).resolve(), *(one.parent for one in own)):
            raise ValueError(
                f"save_directory={str(folder)!r} is where this pipeline reads its weights from: "
                "choose another folder."
            )
        check_replaceable(folder, argument="save_directory")
        for name in ("text_encoder", "transformer", "vae"):
            network = getattr(self, name)
            is_left_out = name == "text_encoder" and network is None
            fits = is_left_out or isinstance(network, OVPipelinePart | OVModelVae)
            check(fits, name, type(network).__name__, "an OpenVINO component, to be saved")
        rule = "of a class that diffusers has, or it could not be loaded again"
        known = hasattr(diffusers, type(self.scheduler).__name__)
        check(known, "scheduler", self.scheduler, rule)
        return read_json(Path(self.model_save_dir) / MODEL_INDEX)

    def _write(self, folder: Path, index: dict[str, Any]) -> None:
        files = [
            f"{part}/{file}" for part in (*COMPONENTS, VAE_ENCODER) for file in COMPONENT_FILES
        ]
        for name in (MODEL_INDEX, *files):
            # of an earlier pipeline; written into, a hard link would change other folders too
            (folder / name).unlink(missing_ok=True)
        self._save_pretrained(folder)
        # optimum copies configurations and index from the own folder; components may be swapped
        for name, component in self.components.items():
            write_json(dict(component.config), folder / name / "config.json")
        classes = {
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "tokenizer": ["transformers", type(self.tokenizer).__name__],
            "text_encoder": ["transformers", "T5EncoderModel"],
        }
        for name, found in classes.items():
            index[name] = [None, None] if getattr(self, name) is None else found
        write_json(index, folder / MODEL_INDEX)

    def __getstate__(self):
        raise TypeError(
            "An OpenVINO pipeline can be neither copied nor pickled: load its folder once more."
        )


def _upload(
    folder: Path,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder as it is (optimum's own upload drops the names of subfolders)."""
    api = HfApi(token=token)
    repository = api.create_repo(repo_id or folder.name, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload OpenVINO pipeline"
    done = api.upload_folder(
        repo_id=repository, folder_path=folder, commit_message=message, create_pr=create_pr
    )
    return str(done)
