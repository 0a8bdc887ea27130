"""A preset judged on a checkpoint in hand: optimised, compared and measured in one call."""

from pathlib import Path

import pandas as pd

from ov_pixart.checkpoint import COMPONENTS
from ov_pixart.checks import public
from ov_pixart.compare import compare_pipelines
from ov_pixart.optimize import optimize_pipeline
from ov_pixart.summary import quality_text


@public
def judge_preset(
    ov_dir: str | Path, output_dir: str | Path, preset: str = "int8", *, prompts: list[str]
) -> pd.DataFrame:
    """Apply a preset and compare its images with the source's on your own prompts.

    Returns the table of `Comparison.to_dataframe`, a row for the source and one for the preset, at
    the seeds 0, 1, 2…, with a column for each component: the figure of `summarize_models`. Raises
    what `optimize_pipeline` and `compare_pipelines` raise.
    """
    folder = optimize_pipeline(ov_dir, output_dir, preset)
    versions = {"source": ov_dir, preset: folder}
    table = compare_pipelines(versions, prompts, seeds=list(range(len(prompts)))).to_dataframe()
    for name in COMPONENTS:
        table[f"{name}, quality"] = ["", quality_text(Path(folder) / name)]
    return table
