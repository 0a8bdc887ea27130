"""PixArt on OpenVINO: the library behind the tutorial, in the order an image travels.

trace → convert → components → pipeline → loading: from a checkpoint to a pipeline that generates.
presets, calibration → optimize: from a pipeline to a smaller, faster one.
compare, plots: what that gains and costs. insights, summary: a look inside, and tables.

Below them: families, checkpoint, hub, lora, cost, compress, call_checks, checks, storage, ir,
memory, workers, quiet, and upstream, which holds every patch of other packages. Importing any of
them switches the usage telemetry of OpenVINO and NNCF off.
"""

from ov_pixart.upstream import telemetry_off

telemetry_off()
