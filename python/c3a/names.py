"""Which modules are meant by names, ends of names and regular expressions."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence

# A stranger's regular expression may take for ever, and nothing within a process can stop it.
SECONDS = 5.0
_LITERAL = r"(?:[\w-]|\\[^\w\s])+"
_ENDS = re.compile(rf"\.\*\\\.(?:({_LITERAL})|\(({_LITERAL}(?:\|{_LITERAL})*)\))\$?")
_WHOLE = re.compile(rf"{_LITERAL}(?:\|{_LITERAL})*")
_PLAIN = re.compile(r"[\w.-]+")
_MOST_SHAPES = 1000
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
left, found = dict(enumerate(names)), {}
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    try:
        match = re.compile(pattern).fullmatch
        for place, name in list(left.items()):
            if matched := match(name):
                found[place] = number, matched.groupdict().get("index")
                del left[place]
    except Exception as error:
        print(json.dumps(str(error)))
        sys.exit(1)
print(json.dumps(list(found.items())))
"""


def ends(name: str) -> list[str]:
    """Return a name and its ends, each from a dot on.

    >>> ends("encoder.0.query")
    ['encoder.0.query', '0.query', 'query']
    """
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def matches(targets: str | Collection[str], name: str) -> bool:
    """Tell whether a module is meant, by the rules of adapter configurations.

    A string is a regular expression for the whole name; otherwise each entry is a name or the end
    of one, at a dot (a set is looked up, a list searched).
    """
    if isinstance(targets, str):
        return _compiled(targets).fullmatch(name) is not None
    return any(end in targets for end in ends(name))


def block_size_from_pattern(pattern: Mapping[str, int], name: str) -> int | None:
    """Return the block size that a mapping gives a module, or None.

    A key is a module's whole name, or a regular expression for the end of it, at a dot.
    """
    if name in pattern:
        return pattern[name]
    for key, block_size in pattern.items():
        if _compiled(rf"(.*\.)?({key})").fullmatch(name):
            return block_size
    return None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"c3a.patch_model: {pattern!r} is not a regular expression: {error}"
        ) from None


# The same for patterns of strangers, over all names at once: in time, or not at all.


def fully_matched(pattern: str, names: Sequence[str]) -> set[str]:
    """Return the names that a regular expression matches as a whole.

    Raises ValueError where it is none, or takes longer than ``SECONDS``.
    """
    if matched := _ENDS.fullmatch(pattern):
        wanted = _literals(matched[1] or matched[2])
        return {name for name in names if any(end in wanted for end in ends(name)[1:])}
    if _WHOLE.fullmatch(pattern):
        wanted = _literals(pattern)
        return {name for name in names if name in wanted}
    return {names[place] for place in _first_matches([pattern], names)}


def first_keys(
    keys: Sequence[str], names: Sequence[str], *, proper: bool = False
) -> list[str | None]:
    """Return for each name the first key that matches an end of it, or None.

    Keys are regular expressions. ``proper`` leaves out the whole name. Raises as ``fully_matched``.
    """
    found: list[int | None] = [None] * len(names)
    plain = {key: number for number, key in reversed([*enumerate(keys)]) if _PLAIN.fullmatch(key)}
    # A dot stands for any character: keys are compared by the shape that their dots give them.
    shapes: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
    for key, number in plain.items():
        dots = tuple(place for place, character in enumerate(key) if character == ".")
        shapes.setdefault(len(key), {}).setdefault(dots, {})[key] = number
    if sum(map(len, shapes.values())) > _MOST_SHAPES:
        plain, shapes = {}, {}
    for place, name in enumerate(names):
        for end in ends(name)[proper:]:
            for dots, same_shape in shapes.get(len(end), {}).items():
                characters = list(end)
                for dot in dots:
                    characters[dot] = "."
                here, before = same_shape.get("".join(characters)), found[place]
                if here is not None and (before is None or here < before):
                    found[place] = here
    others = [number for number, key in enumerate(keys) if key not in plain]
    head = r".*\." if proper else r"(.*\.)?"
    for place, (number, _) in _first_matches(
        [rf"{head}({keys[number]})" for number in others], names
    ).items():
        number, before = others[number], found[place]
        if before is None or number < before:
            found[place] = number
    return [None if number is None else keys[number] for number in found]


def layer_numbers(patterns: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Return the number of the layer that each name is in, by ``layers_pattern``.

    A pattern is a regular expression for what stands before the number, at a dot; without any, it
    is the first number from the third part of a name on. Raises as ``fully_matched``.
    """
    if patterns and not all(re.fullmatch(r"\w+", pattern) for pattern in patterns):
        numbered = [rf"(?:.*?\.)?{pattern}\.(?P<index>\d+)\..*" for pattern in patterns]
        found = _first_matches(numbered, names)
        return {names[place]: int(index) for place, (_, index) in found.items() if index}
    numbers: dict[str, int] = {}
    wanted: Sequence[str | None] = patterns or [None]
    for name in names:
        parts = name.split(".")
        for pattern in wanted:
            places = (
                place
                for place in range(2 if pattern is None else 1, len(parts) - 1)
                if parts[place].isdecimal() and pattern in (None, parts[place - 1])
            )
            if (place := next(places, None)) is not None:
                numbers[name] = int(parts[place])
                break
    return numbers


def _literals(alternatives: str) -> set[str]:
    return {re.sub(r"\\(.)", r"\1", literal) for literal in re.findall(_LITERAL, alternatives)}


def _first_matches(
    patterns: Sequence[str], names: Sequence[str]
) -> dict[int, tuple[int, str | None]]:
    """Return by the place of a name which pattern matches all of it first, and its ``index``."""
    if not patterns:
        return {}
    if not sys.executable or getattr(sys, "frozen", False):
        raise ValueError(
            f"{shown(patterns[0])} is a regular expression, which a Python interpreter of its own "
            "has to match, and there is none"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, names]).encode(),
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        begun = (late.stdout or b"0").split()
        pattern = patterns[int(begun[-1])]
        raise ValueError(
            f"the regular expression {shown(pattern)} takes more than {SECONDS:g} s; names, or "
            "ends of names, take no time"
        ) from None
    *tried, result = done.stdout.decode().splitlines() or [""]
    if done.returncode == 1 and tried:
        raise ValueError(
            f"{shown(patterns[int(tried[-1])])} is not a regular expression: {json.loads(result)}"
        )
    if done.returncode:
        raise ValueError(f"the regular expressions {shown(patterns)} end a Python interpreter")
    return {place: (number, index) for place, (number, index) in json.loads(result)}


def shown(value: object) -> str:
    """Return a value, which may be a file's, as one short line."""
    text = re.sub(r"\s*\n\s*", " ", repr(value))
    return text if len(text) <= 200 else f"{text[:200]}..."
