"""Draws the site's two pictures as SVG: a block-circulant matrix, and the fused kernel's data flow.

Lines and words take the page's colour (``currentColor``), so they are readable in light and dark.
"""

from pathlib import Path

M, N, B = 2, 3, 4  # of the matrix drawn
CELL, GAP = 34, 10


class Drawing:
    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" role="img" aria-label="{title}" font-family="inherit" '
            'font-size="14" fill="currentColor">'
        ]

    def box(self, x, y, width, height, *, colour="none", opacity=1.0, dashed=False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}" '
            f'fill-opacity="{opacity}" stroke="currentColor" stroke-opacity="0.6"{dash}/>'
        )

    def words(self, x, y, text, *, anchor="middle", size=14, bold=False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{weight}>{text}</text>'
        )

    def arrow(self, x1, y1, x2, y2) -> None:
        dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        a, b = x2 - 8 * dx, y2 - 8 * dy
        head = f"{x2},{y2} {a - 4 * dy},{b - 4 * dx} {a + 4 * dy},{b + 4 * dx}"
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{a}" y2="{b}" stroke="currentColor" '
            f'stroke-width="1.5"/><polygon points="{head}"/>'
        )

    def html(self, kind: str) -> str:
        return "\n".join([f'<div class="{kind}">', *self.parts, "</svg></div>\n"])


def _colour(i: int, j: int, position: int) -> str:
    return f"hsl({(i * N + j) * 360 // (M * N)}, 65%, {88 - 6 * position}%)"


def matrix() -> Drawing:
    """``circulant(w)`` for m = 2, n = 3, b = 4: equal numbers have equal colours."""
    side = B * CELL
    width, height = 30 + N * (side + GAP), 30 + M * (side + GAP)
    drawing = Drawing(width, height, f"A block-circulant matrix of {M} by {N} blocks of size {B}")
    for j in range(N):
        drawing.words(30 + j * (side + GAP) + side / 2, 20, f"x{'₀₁₂'[j]}")
    for i in range(M):
        drawing.words(12, 35 + i * (side + GAP) + side / 2, f"y{'₀₁'[i]}")
        for j in range(N):
            left, top = 30 + j * (side + GAP), 30 + i * (side + GAP)
            for u in range(B):
                for t in range(B):
                    position = (t - u) % B
                    x, y = left + t * CELL, top + u * CELL
                    drawing.box(x, y, CELL, CELL, colour=_colour(i, j, position))
                    drawing.words(
                        x + CELL / 2,
                        y + CELL / 2 + 5,
                        f'<tspan fill="#111">{position}</tspan>',
                        bold=u == 0,
                    )
    return drawing


_STEPS = (  # words, what it moves or does, colour's hue
    ("load", "x, in its own dtype; converted on the way", 210),
    ("transform", "n real FFTs of length b a token", 150),
    ("product", "each bin: a complex (m, n) matrix times n numbers", 40),
    ("inverse", "m real FFTs of length b a token", 150),
    ("add, round, store", "onto the base layer's result, once", 210),
)


def flow() -> Drawing:
    """The steps of a tile of tokens, and what each reads and writes."""
    left, wide, side, aside = 100, 330, 70, 490
    width, height = aside + 130, 430
    drawing = Drawing(width, height, "Data flow of a tile of tokens through the fused kernel")
    drawing.box(left - 14, 30, wide + 28, 352, dashed=True)
    drawing.words(left - 14, 20, "a tile of tokens, in cache or shared memory", anchor="start")
    for number, (name, what, hue) in enumerate(_STEPS):
        y = 45 + 68 * number
        drawing.box(left, y, wide, 48, colour=f"hsl({hue}, 60%, 50%)", opacity=0.25)
        drawing.words(left + wide / 2, y + 20, name, bold=True)
        drawing.words(left + wide / 2, y + 39, what, size=12)
        if number:
            drawing.arrow(left + wide / 2, y - 20, left + wide / 2, y)
    drawing.box(1, 45, side, 48)
    drawing.words(1 + side / 2, 74, "x")
    drawing.arrow(1 + side, 69, left, 69)
    drawing.box(aside, 113, 129, 48)
    drawing.words(aside + 65, 133, "kernel w")
    drawing.words(aside + 65, 151, "(m, n, b)", size=12)
    drawing.box(aside, 181, 129, 48)
    drawing.words(aside + 65, 201, "its spectra, once")
    drawing.words(aside + 65, 219, "times scale / b", size=12)
    drawing.arrow(aside + 65, 161, aside + 65, 181)
    drawing.arrow(aside, 205, left + wide, 205)
    drawing.box(1, 317, side, 48)
    drawing.words(1 + side / 2, 346, "base(x)")
    drawing.arrow(1 + side, 341, left, 341)
    drawing.box(aside, 317, 129, 48)
    drawing.words(aside + 65, 346, "y, in its place")
    drawing.arrow(left + wide, 341, aside, 341)
    drawing.words(left + wide / 2, 410, "Only load and store touch main memory.", size=13)
    return drawing


def write(folder: Path) -> None:
    (folder / "matrix.html").write_text(matrix().html("drawing"), encoding="utf-8")
    (folder / "flow.html").write_text(flow().html("drawing wide"), encoding="utf-8")
