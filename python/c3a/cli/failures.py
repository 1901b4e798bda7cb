"""How a failure becomes one line for the user, and which failures do."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors
import torch

WRITING = (OSError, safetensors.SafetensorError)  # where a disk is full, for instance
_LONGEST = 300


def line_for(error: Exception) -> str | None:
    """Return what to tell the user, or None for an error of our own, which deserves a traceback.

    Bad input is a ValueError or an OSError everywhere. Other kinds are meant for the user only
    where one of our own checks raised them, which its message begins by saying.
    """
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_memory or "can't allocate memory" in str(error):
        return "out of memory; a smaller --batch-size, --max-length or --rank needs less"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ValueError | OSError) or str(error).startswith("c3a"):
        return _spoken(error)
    return None


@contextmanager
def working_on(
    what: object, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Turn what is raised about a user's file into a ValueError that says which file.

    Every kind of error only around calls of libraries, which raise all kinds for broken files.
    """
    try:
        yield
    except ModuleNotFoundError:  # about the installation
        raise
    except kinds as error:
        raise ValueError(f"{what}: {brief(error)}") from error


def _spoken(error: Exception) -> str:
    """Return a message without the name of the function that says it."""
    return re.sub(r"^c3a(\.\w+)*: ", "", str(error))


def brief(error: Exception) -> str:
    """Return what an error says in one line of bounded length, with its kind if that matters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"expected text in UTF-8, byte {error.start} is {error.object[error.start]:#04x}"
    text = " ".join(_spoken(error).split())
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
