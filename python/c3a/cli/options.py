"""Options that more than one command has."""

import argparse


def block_size(text: str) -> int | str:
    """Return a number, or ``"auto"``; for argparse."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None
