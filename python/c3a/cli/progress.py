"""A progress bar over layers, on a terminal."""

from collections.abc import Callable, Iterable


def tracker(what: str) -> Callable[[Iterable[str]], Iterable[str]]:
    """Return what shows how many names were taken of those that it is given."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def tracked(names: Iterable[str]) -> Iterable[str]:
        names = list(names)
        if not console.is_terminal:
            return names
        return track(names, what, console=console, transient=True)

    return tracked
