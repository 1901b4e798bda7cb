"""The command line: ``c3a info | finetune | merge | inspect``. Each command is a module here."""

import argparse
import sys
from collections.abc import Sequence

from . import finetune, info, inspect, merge

_COMMANDS = (info, finetune, merge, inspect)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="c3a", description="Parameter-efficient fine-tuning by block-circular convolution."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # what reads the output has enough, such as head
        sys.stderr.close()
        return 141
    except KeyboardInterrupt:
        print("\nc3a: interrupted; nothing was written", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "c3a":
            raise
        print(f"c3a: this command needs {error.name}: pip install 'c3a[finetune]'", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"c3a: {str(error).removeprefix('c3a: ')}", file=sys.stderr)
        return 2
    return 0
