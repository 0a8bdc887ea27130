"""PixArt on OpenVINO: the library behind the tutorial, in the order an image travels.

trace        torch module → ov.Model            presets      what NNCF does to which layers
convert      checkpoint → folder of IRs         calibration  captions, recorded denoising
components   compiled models in diffusers' places   optimize the presets applied
pipeline     the α and Σ pipelines              compare      versions side by side
plots        every figure

Below them: families, checkpoint, call_checks, checks, storage, ir, memory, workers, quiet, and
upstream, which holds every patch of other packages. Importing any of them first switches the usage
telemetry of OpenVINO and NNCF off.
"""

from ov_pixart.upstream import telemetry_off

telemetry_off()
