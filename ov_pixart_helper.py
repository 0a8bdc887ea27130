"""PixArt on OpenVINO: every name that the tutorial uses, in the order of its sections.

Import this before `openvino` or `nncf`: it switches their usage telemetry off. Each line has the
module that holds the code; each module opens with its purpose.
"""

from ov_pixart.quiet import quiet, quiet_imports, silent_nncf

with quiet_imports():  # missing torchvision and the like
    # 0 Choose: what is in a checkpoint's folder
    from ov_pixart.checkpoint import COMPONENTS, MODEL_INDEX, GenerationDefaults
    from ov_pixart.checkpoint import default_settings, family_of, image_sizes
    from ov_pixart.families import ASPECT_RATIOS, Family

    # 1 Convert: torch → ov.Model, checkpoint → folder of IRs
    from ov_pixart.trace import TransformerWrapper, VaeDecoderWrapper, trace_transformer
    from ov_pixart.convert import WEIGHT_FORMATS, convert_pipeline
    from ov_pixart.convert import convert_text_encoder, convert_transformer, convert_vae_decoder
    from ov_pixart.summary import summarize_models

    # 2 Run: compiled models in diffusers' places, and a look inside
    from ov_pixart.components import OVPixArtTextEncoder, OVPixArtTransformer, OVPixArtVae
    from ov_pixart.pipeline import OVDiffusionPipeline
    from ov_pixart.pipeline import OVPixArtAlphaPipeline, OVPixArtSigmaPipeline
    from ov_pixart.guidance import count_evaluations
    from ov_pixart.loading import load_pipeline
    from ov_pixart.insights import WordMaps, film_strip, record_inputs, word_maps

    # 3 Optimise: NNCF's presets (add one: a row in presets.py), and what rounding does
    from ov_pixart.insights import calibrated_range, layer_input, layer_weights
    from ov_pixart.presets import PRESETS, Preset, Recipe
    from ov_pixart.calibration import CAPTIONS, DEFAULT_NUM_SAMPLES, load_calibration_prompts
    from ov_pixart.optimize import optimize_pipeline
    from ov_pixart.summary import summarize_presets

    # 4 Compare: the same images from several versions, and every figure
    from ov_pixart.compare import Comparison, compare_pipelines
    from ov_pixart.judge_preset import judge_preset
    from ov_pixart.plots import activation_range_figure, amplified_difference, evaluations_figure
    from ov_pixart.plots import show_images, weight_grid_figure, word_maps_figure

    # Tools
    from ov_pixart.checks import check_names, named_folders, public, read_json
    from ov_pixart.ir import IR_NAME, STORED_OPTIONS, store_runtime_options, stored_runtime_options
    from ov_pixart.memory import memory_gb, release_memory
    from ov_pixart.storage import write_json

PARTS = COMPONENTS  # earlier names
show_pictures = show_images
