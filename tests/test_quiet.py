"""Nothing is reported to anyone, nothing is fetched, and nothing distracts the reader."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ov_pixart.quiet import quiet, quiet_imports, silent_nncf, without_log_message
from tests.support.checkpoints import as_published

# Every way to a network is guarded: an attempt is refused, and written to a file, because
# telemetry swallows exceptions and does its sending in a process of its own.
GUARD = """
import multiprocessing.process, socket, sys

def refuse(name):
    def attempt(*args, **kwargs):
        with open("attempts.txt", "a") as file:
            print(name, args, file=file)
        raise OSError("no network in this test")
    return attempt

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))
"""
NO_PROCESS = """
multiprocessing.process.BaseProcess.start = refuse("process")
"""


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def run(script, home, *arguments, **environment):
    """Run a script as a fresh user on a machine that is no CI."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "HF_HUB_OFFLINE") and not name.startswith(("NNCF_", "PYTEST_"))
    }
    inherited |= dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA"), str(home))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=inherited | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    attempts = home / "attempts.txt"
    return done, attempts.read_text() if attempts.exists() else ""


@pytest.mark.slow
def test_import_convert_and_generate_in_silence_and_offline(checkpoint, home, tmp_path):
    source = as_published(checkpoint("alpha"), tmp_path / "source")
    script = """
import json, os
before = dict(os.environ)
import ov_pixart_helper as helper

source, output = sys.argv[1:]
helper.convert_pipeline(source, output, weight_format="int8")
pipeline = helper.OVPixArtAlphaPipeline.from_pretrained(output)
pipeline.set_progress_bar_config(disable=True)
image = pipeline("a small red circle above the sea", num_inference_steps=2).images[0]
assert image.size == (256, 256)
added = {name for name in os.environ if os.environ[name] != before.get(name)}
print(json.dumps([name for name in added if name.startswith(("CI", "HF_", "NNCF", "OPENVINO"))]))
"""
    done, attempts = run(GUARD + NO_PROCESS + script, home, source, tmp_path / "ov")
    assert attempts == ""
    assert json.loads(done.stdout) == []  # and nothing else is printed, nor the environment changed
    assert not (home / "intel").exists() and not (home / "Intel Corporation").exists()

    bar = [text for text in done.stderr.replace("\r", "\n").splitlines() if text.strip()]
    assert [text for text in bar if "component" not in text] == []


def test_the_guard_would_notice(home):
    """`import openvino` alone does report: what the test above finds silent is not so by nature."""
    _, attempts = run(GUARD + NO_PROCESS + "import openvino", home)
    assert "process" in attempts


@pytest.mark.slow
def test_telemetry_that_was_faster_loses_its_consent(home):
    """Where openvino was imported first, its own event is out already; nothing follows."""
    script = """
import os
import openvino
del os.environ["CI"]
assert sys.modules["openvino_telemetry"] is not None
import ov_pixart_helper
from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry
assert init_ovc_telemetry("another name").consent is False
"""
    _, attempts = run(GUARD + NO_PROCESS + script, home, CI="true")
    assert attempts == ""


@pytest.mark.parametrize("module", ["convert", "pipeline", "workers"])
@pytest.mark.slow
def test_every_module_switches_telemetry_off(home, module):
    script = f"""
import ov_pixart.{module}
import openvino, nncf
assert sys.modules["openvino_telemetry"] is None
"""
    _, attempts = run(GUARD + NO_PROCESS + script, home)
    assert attempts == ""


# ---- only our libraries are held back -----------------------------------------------------------


@pytest.mark.parametrize("held_back", [quiet, silent_nncf])
def test_a_hosts_stdout_logs_and_warnings_stay(held_back, capfd, caplog):
    host = logging.getLogger("host.application")
    stdout, level = sys.stdout, host.level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with held_back():
            assert sys.stdout is stdout
            print("printed")
            os.write(1, b"written\n")
            host.warning("logged")
            warnings.warn("host's warning", stacklevel=1)
            assert (host.level, host.disabled) == (level, False)
    assert sorted(capfd.readouterr().out.split()) == ["printed", "written"]
    assert "logged" in caplog.text
    assert [str(one.message) for one in caught] == ["host's warning"]


@pytest.mark.parametrize("held_back", [quiet, silent_nncf, quiet_imports])
def test_levels_and_filters_are_put_back_after_an_error(held_back):
    loggers = [logging.getLogger(name) for name in ("nncf", "openvino", "transformers", "root")]
    levels, filters = [one.level for one in loggers], list(warnings.filters)
    disabled = logging.root.manager.disable
    with pytest.raises(ValueError, match="inside"), held_back():
        raise ValueError("inside")
    assert [one.level for one in loggers] == levels
    assert warnings.filters == filters
    assert logging.root.manager.disable == disabled


def test_our_libraries_log_errors_only(caplog):
    with quiet():
        for name in ("nncf", "transformers", "optimum"):
            logging.getLogger(name).warning("a notice")
            assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    assert "a notice" not in caplog.text


@pytest.mark.parametrize("is_jupyter", [False, True])
def test_nncfs_console_is_quiet_and_put_back(is_jupyter, monkeypatch, capsys):
    import rich

    console = rich.get_console()
    monkeypatch.setattr(console, "is_jupyter", is_jupyter)
    with silent_nncf():
        console.print("a table")
        assert not console.is_jupyter
    assert (console.is_jupyter, console.quiet) == (is_jupyter, False)
    assert "a table" not in capsys.readouterr().out


def test_one_log_message_is_hidden_and_others_are_not(caplog):
    logger = logging.getLogger("some.library")
    with without_log_message("some.library", "truncated"):
        logger.warning("the prompt was truncated")
        logger.warning("another")
    logger.warning("truncated again")
    assert [record.getMessage() for record in caplog.records] == ["another", "truncated again"]
