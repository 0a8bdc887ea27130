"""PixArt on OpenVINO: every name that the tutorial uses, in the order it uses them.

Import this before `openvino` or `nncf`: it switches their usage telemetry off. The comments name
the module that holds the code; each module opens with its purpose.
"""

from ov_pixart.quiet import quiet_imports

with quiet_imports():  # missing torchvision and the like
    # 0  Choose      ov_pixart/checkpoint.py   what is in a checkpoint's folder
    # 3  Optimise    ov_pixart/presets.py      add a preset here: one row
    #                ov_pixart/calibration.py  captions, recorded denoising trajectories
    #                ov_pixart/optimize.py     the preset applied
    from ov_pixart.calibration import (
        CAPTIONS,
        DEFAULT_NUM_SAMPLES,
        load_calibration_prompts,
    )
    from ov_pixart.checkpoint import (
        COMPONENTS,
        MODEL_INDEX,
        GenerationDefaults,
        default_settings,
        family_of,
        image_sizes,
    )
    from ov_pixart.checks import read_json

    # 4  Compare     ov_pixart/compare.py      the same images from several versions
    #                ov_pixart/plots.py        every figure
    from ov_pixart.compare import Comparison, compare_pipelines

    # 2  Run         ov_pixart/components.py   compiled models in diffusers' places
    #                ov_pixart/pipeline.py     from_pretrained, reshape, to, the call
    from ov_pixart.components import (
        OVPixArtTextEncoder,
        OVPixArtTransformer,
        OVPixArtVae,
    )

    # 1  Convert     ov_pixart/trace.py        torch → ov.Model, and why tracing is done at 8×12
    #                ov_pixart/convert.py      checkpoint → folder of IRs, in 32, 16, 8 or 4 bits
    from ov_pixart.convert import (
        WEIGHT_FORMATS,
        convert_pipeline,
        convert_text_encoder,
        convert_transformer,
        convert_vae_decoder,
    )
    from ov_pixart.families import Family
    from ov_pixart.ir import (
        IR_NAME,
        STORED_OPTIONS,
        store_runtime_options,
        stored_runtime_options,
    )
    from ov_pixart.memory import release_memory
    from ov_pixart.optimize import optimize_pipeline
    from ov_pixart.pipeline import (
        OVDiffusionPipeline,
        OVPixArtAlphaPipeline,
        OVPixArtSigmaPipeline,
        load_pipeline,
    )
    from ov_pixart.plots import show_images
    from ov_pixart.presets import PRESETS, Preset, Recipe
    from ov_pixart.summary import summarize_models

PARTS = COMPONENTS  # earlier names
show_pictures = show_images

__all__ = [
    "CAPTIONS",
    "COMPONENTS",
    "DEFAULT_NUM_SAMPLES",
    "IR_NAME",
    "MODEL_INDEX",
    "PARTS",
    "PRESETS",
    "STORED_OPTIONS",
    "WEIGHT_FORMATS",
    "Comparison",
    "Family",
    "GenerationDefaults",
    "OVDiffusionPipeline",
    "OVPixArtAlphaPipeline",
    "OVPixArtSigmaPipeline",
    "OVPixArtTextEncoder",
    "OVPixArtTransformer",
    "OVPixArtVae",
    "Preset",
    "Recipe",
    "compare_pipelines",
    "convert_pipeline",
    "convert_text_encoder",
    "convert_transformer",
    "convert_vae_decoder",
    "default_settings",
    "family_of",
    "image_sizes",
    "load_calibration_prompts",
    "load_pipeline",
    "optimize_pipeline",
    "read_json",
    "release_memory",
    "show_images",
    "show_pictures",
    "store_runtime_options",
    "stored_runtime_options",
    "summarize_models",
]
