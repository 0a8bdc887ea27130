"""PixArt on OpenVINO: every name that the tutorial uses, in the order it uses them.

Import this before `openvino` or `nncf`: it switches their usage telemetry off. The comments name
the module that holds the code; each module opens with its purpose.
"""

from ov_pixart.quiet import quiet, quiet_imports, silent_nncf

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
    #                ov_pixart/insights.py     film strip, word maps, weights and activations
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
    from ov_pixart.insights import (
        WordMaps,
        calibrated_range,
        film_strip,
        layer_input,
        layer_weights,
        word_maps,
    )
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
    from ov_pixart.plots import (
        activation_range_figure,
        evaluations_figure,
        show_images,
        weight_grid_figure,
        word_maps_figure,
    )
    from ov_pixart.presets import PRESETS, Preset, Recipe
    from ov_pixart.storage import write_json
    from ov_pixart.summary import summarize_models, summarize_presets
    from ov_pixart.trace import TransformerWrapper, VaeDecoderWrapper, trace_transformer

PARTS = COMPONENTS  # earlier names
show_pictures = show_images
