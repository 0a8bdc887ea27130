"""Serves the demo's page on this machine: from a notebook cell, or alone with `make demo`.

Everything stays here: the server listens on the loopback address only, the page fetches nothing
from elsewhere (no web fonts, no scripts, no analytics) and Gradio's run history is off.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ov_pixart.demo.page import Demo, make_demo
from ov_pixart_helper import check_names, convert_pipeline, optimize_pipeline

ROOT = Path(__file__).resolve().parents[2]

# What was launched last for each value of `port`. A page that nobody serves any more may vanish.
_launched: weakref.WeakValueDictionary[int | None, gr.Blocks] = weakref.WeakValueDictionary()


def launch_demo(demo: gr.Blocks, *, port: int | None = None, **launch_kwargs: Any) -> None:
    """Serve the page on the loopback address and return at once; `demo.close()` ends it.

    A demo launched earlier with the same `port`, or listening on it, is closed first: a cell can
    be run again, and demos on different ports live side by side. Without `port` it is the first
    free one from 7860. Other arguments go to Gradio's `launch`. Afterwards `demo.local_url` is
    the address.
    Raises OSError if another program uses the port, TypeError for an unknown argument.
    """
    known = [*inspect.signature(demo.launch).parameters, "port"]
    check_names("launch_demo", launch_kwargs, known)
    for asked, earlier in list(_launched.items()):
        if earlier.is_running and port in (asked, earlier.server_port):
            earlier.close(verbose=False)
    options: dict[str, Any] = {
        "server_name": "127.0.0.1",
        "server_port": port,
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": True,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": [],
        "ssr_mode": False,
        "height": 900,
        "theme": theme(),
        "css_paths": Path(__file__).with_name("style.css"),
    }
    if isinstance(demo, Demo):
        options["allowed_paths"] = [str(demo.studio.output)]
    with loopback_without_proxy():
        demo.launch(**(options | launch_kwargs))
    _launched[port] = demo
    print(f"The demo is at {demo.local_url}")


@contextlib.contextmanager
def loopback_without_proxy() -> Iterator[None]:
    """Exempt this machine from HTTP_PROXY and the like while Gradio checks that it can be reached.

    A proxy looks for 127.0.0.1 on its own machine.
    """
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    exempt = next(filter(None, before.values()), "")
    os.environ |= dict.fromkeys(names, ",".join(filter(None, [exempt, "127.0.0.1", "localhost"])))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def theme() -> gr.themes.Base:
    """Quiet colours and the system's own fonts, so that the page looks the same offline."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Consolas", "monospace"),
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_950",
        color_accent="*primary_700",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        error_text_color_dark="#fca5a5",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the embedded checkpoint if that is still to do; serve the page until Ctrl+C."""
    parser = argparse.ArgumentParser(description="Serve the PixArt demo on this machine.")
    parser.add_argument("--model", default=ROOT / "assets" / "pixart-tiny", help="hub id or folder")
    parser.add_argument("--models", default=ROOT / "models", type=Path, help="converted models")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args(arguments)
    demo = make_demo(converted(str(options.model), options.models))
    launch_demo(demo, port=options.port)
    print("Press Ctrl+C to stop.")
    with contextlib.suppress(KeyboardInterrupt):
        demo.block_thread()
    demo.close()


VERSIONS = {"int8": "INT8", "int4": "INT4", "hybrid": "Hybrid"}  # folder → name, as in the notebook


def converted(model_id: str, folder: Path) -> dict[str, Path]:
    """FP16 and INT8 weights of a checkpoint, converted if need be, and the notebook's versions.

    A few-step model beside a local checkpoint ("pixart-tiny-lcm" for "pixart-tiny") is one, too.
    """
    folder = folder / Path(model_id).name
    fp16 = convert_pipeline(model_id, folder / "fp16")
    pipelines = {
        "FP16": fp16,
        "INT8 weights": optimize_pipeline(fp16, folder / "int8-weights", "int8-weights"),
    }
    for preset, version in VERSIONS.items():
        if (folder / preset / "model_index.json").is_file():
            pipelines[version] = folder / preset
    few_step = Path(f"{model_id}-lcm")
    if few_step.is_dir():
        pipelines["Four steps"] = convert_pipeline(
            model_id, folder / "lcm", transformer=few_step, scheduler=few_step
        )
    return pipelines
