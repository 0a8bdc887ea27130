"""Hold back notices that a reader can do nothing about: one bar and one warning say enough.

Only the loggers, warnings and bars of the libraries used here are touched; a host application
keeps its own logs and its stdout.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LIBRARIES = ("diffusers", "nncf", "openvino", "optimum", "torch", "transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the libraries log and warn of below an error: tracing, missing torchvision…"""
    from torch.jit import TracerWarning  # not at the top: it would load torch before the door does

    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # `module` is the one that a warning points at; TracerWarnings point at any caller
            warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})(\.|$)")
            warnings.filterwarnings("ignore", category=TracerWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what libraries log and warn of below an error while they are imported.

    Their loggers do not exist yet, so that for this moment all loggers are held back.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def silent_nncf() -> Iterator[None]:
    """Suppress NNCF's tables and progress bars; in a notebook the bars leave empty output boxes.

    NNCF draws its bars on rich's global console. `quiet` alone is not enough there: in a notebook
    rich shows its widget before it looks at that switch.
    """
    import rich

    console = rich.get_console()
    switches = console.is_jupyter, console.quiet
    console.is_jupyter, console.quiet = False, True
    try:
        with quiet():
            yield
    finally:
        console.is_jupyter, console.quiet = switches


@contextlib.contextmanager
def hide_loading_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers while they load: one bar is enough."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()
    ]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


@contextlib.contextmanager
def without_log_message(logger: str, words: str) -> Iterator[None]:
    """Hide one log message: records of this logger that contain `words`."""

    def other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logging.getLogger(logger).addFilter(other)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(other)
