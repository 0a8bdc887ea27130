"""Hide log messages, warnings and progress bars that a reader can do nothing about.

Only the loggers, warnings and bars of the libraries used here are held back; other logs and stdout
are kept. Exception: while NNCF works, nothing is shown on rich's global console, which rich's log
handler also uses. These settings belong to the process: threads wait for each other.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

_LIBRARIES = (
    *("accelerate", "datasets", "diffusers", "nncf", "openvino", "optimum", "peft"),
    *("torch", "transformers"),
)
_one_thread = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the libraries log and warn of below an error: tracing, missing torchvision…"""
    from torch.jit import TracerWarning  # not at the top: it would load torch before the door does

    with _one_thread, contextlib.ExitStack() as undo:
        for name in _LIBRARIES:
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # `module` is the one that a warning points at; TracerWarnings point at any caller
            warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})(\.|$)")
            warnings.filterwarnings("ignore", category=TracerWarning)
            yield


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

    NNCF shows its bars on rich's global console. The console's `quiet` switch alone is not enough:
    in a notebook rich shows its widget before it looks at that switch.
    """
    import rich

    console = rich.get_console()
    with _one_thread, contextlib.ExitStack() as undo:
        for switch, value in (("is_jupyter", False), ("quiet", True)):
            undo.callback(setattr, console, switch, getattr(console, switch))
            setattr(console, switch, value)
        with quiet():
            yield


@contextlib.contextmanager
def hide_loading_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers while they load: one bar is enough."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with _one_thread, contextlib.ExitStack() as undo:
        for log in (diffusers_logging, transformers_logging):
            if log.is_progress_bar_enabled():
                undo.callback(log.enable_progress_bar)
                log.disable_progress_bar()
        yield


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
