"""The command line. Each command is a module here."""

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import convert, export_lora, finetune, info, inspect, merge
from .failures import line_for

_COMMANDS = (info, finetune, merge, inspect, export_lora, convert)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 for bad input, 130 for Ctrl-C.

    An error that is nobody's input's fault is a defect here, and keeps its traceback.
    """
    parser = argparse.ArgumentParser(
        prog="c3a", description="Parameter-efficient fine-tuning by block-circular convolution."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == []:  # what older argparses make of --name=--
            parser.error(f"argument --{name.replace('_', '-')}: expected a value")
    try:
        with _ctrl_c_stays_itself(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except KeyboardInterrupt:
        print("\nc3a: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what reads the output has enough, such as head
        sys.stderr.close()
        return 141
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "c3a":
            raise
        print(f"c3a: this command needs {error.name}: pip install 'c3a[finetune]'", file=sys.stderr)
        return 2
    except Exception as error:
        line = line_for(error)
        if line is None:
            raise
        print(f"c3a: {line}", file=sys.stderr)
        return 2
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"c3a: warning: {str(message).removeprefix('c3a: ')}", file=sys.stderr)


@contextmanager
def _ctrl_c_stays_itself() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C also where a library turned it into another error."""
    pressed = False

    def on_ctrl_c(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
