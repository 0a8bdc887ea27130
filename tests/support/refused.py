"""`with refused(ValueError, "height=100", "multiple of 16"):` – one line that has the words."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    """The block must raise `kind` with one line that names what is wrong, and the remedy."""
    try:
        yield
    except kind as error:
        message = str(error)
    else:
        raise AssertionError("nothing was refused")
    assert "\n" not in message
    assert "Exception from src" not in message
    assert len(message) < 600
    for word in words:
        assert word in message, message
