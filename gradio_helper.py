"""The demo: a page that generates with converted pipelines and shows every denoising step.

demo = make_demo({"FP16": "models/pixart-tiny/fp16", "INT8": "models/pixart-tiny/int8"})
launch_demo(demo)
demo.close()
"""

# ov_pixart/demo/settings.py    what can be asked for, what is refused, what a PNG carries
# ov_pixart/demo/studio.py      loads pipelines, generates, previews
from ov_pixart.demo.page import make_demo  # layout, events and the `/generate` endpoint
from ov_pixart.demo.serve import launch_demo, main  # loopback only; the command line
from ov_pixart.demo.settings import Settings, read_settings

if __name__ == "__main__":
    main()
