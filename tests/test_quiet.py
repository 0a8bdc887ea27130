"""Nothing is reported to anyone, nothing is fetched, and nothing distracts the reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny_models

# What the reader's process does, with every way to a network guarded: an attempt is recorded
# (telemetry swallows exceptions) and refused.
SCRIPT = """
import json, os, socket, sys

attempts = []

def refuse(name):
    def attempt(*args, **kwargs):
        attempts.append([name, repr(args)])
        raise OSError("no network in this test")
    return attempt

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))

import ov_pixart_helper as helper

source, output = sys.argv[1:]
before = dict(os.environ)
helper.convert_pipeline(source, output, weight_format="int8")
pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(output)
pipeline.set_progress_bar_config(disable=True)
picture = pipeline("a small red circle above the sea", num_inference_steps=2).images[0]
assert picture.size == (256, 256)

import time
time.sleep(2)  # telemetry sends from a thread
print(json.dumps({"attempts": attempts, "CI": os.environ.get("CI"), "home": os.listdir()}))
"""


def test_import_convert_and_generate_in_silence_and_offline(checkpoint, tmp_path):
    source = tiny_models.as_published(checkpoint("alpha"), tmp_path / "source")
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "HF_HUB_OFFLINE") and not name.startswith(("NNCF_", "PYTEST_"))
    }
    environment |= {"HOME": str(home), "USERPROFILE": str(home), "LOCALAPPDATA": str(home)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source, tmp_path / "ov"],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # nothing else is printed
    report = json.loads(line)
    assert report["attempts"] == []
    assert report["CI"] is None  # and the reader's environment is as it was
    assert not list(home.glob("**/*telemetry*")), "no consent file either"

    bar = [text for text in done.stderr.replace("\r", "\n").splitlines() if text.strip()]
    strangers = [text for text in bar if "model/s]" not in text and "s/model]" not in text]
    assert strangers == []


def test_telemetry_that_was_faster_loses_its_consent():
    """Where openvino was imported first, its event is out already; nothing follows."""
    script = """
import os, sys
os.environ["CI"] = "true"  # for the import only: nothing may leave this test either
import openvino
del os.environ["CI"]
assert sys.modules["openvino_telemetry"] is not None
import ov_pixart_helper
from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry
assert init_ovc_telemetry("another name").consent is False
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
