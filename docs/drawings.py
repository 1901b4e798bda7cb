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

    def svg(self) -> str:
        return "\n".join(['<div class="drawing">', *self.parts, "</svg></div>\n"])


def _colour(i: int, j: int, position: int) -> str:
    return f"hsl({(i * N + j) * 360 // (M * N)}, 65%, {72 - 11 * position}%)"


def matrix() -> Drawing:
    """``circulant(w)`` for m = 2, n = 3, b = 4: equal numbers have equal colours."""
    side = B * CELL
    width, height = 120 + N * (side + GAP) + 130, 60 + M * (side + GAP)
    drawing = Drawing(width, height, "A block-circulant matrix of 2 by 3 blocks of size 4")
    for i in range(M):
        for j in range(N):
            left, top = 60 + j * (side + GAP), 40 + i * (side + GAP)
            for u in range(B):
                for t in range(B):
                    position = (t - u) % B
                    x, y = left + t * CELL, top + u * CELL
                    drawing.box(x, y, CELL, CELL, colour=_colour(i, j, position), opacity=0.75)
                    middle = x + CELL / 2
                    text = f'<tspan fill="#111">{position}</tspan>'
                    drawing.words(middle, y + CELL / 2 + 5, text, bold=u == 0)
            drawing.words(left + side / 2, 26, f"x{'₀₁₂'[j]}") if i == 0 else None
        drawing.words(40, 40 + i * (side + GAP) + side / 2, f"y{'₀₁'[i]}")
    right = 60 + N * (side + GAP) + 12
    for line, text in enumerate(("number p of", "w[i, j] stands", "where (t − u)", "mod b = p")):
        drawing.words(right, 60 + 20 * line, text, anchor="start", size=13)
    for line, text in enumerate(("first row", "(bold): w[i, j]")):
        drawing.words(right, 160 + 20 * line, text, anchor="start", size=13)
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
    width, height, left, wide = 720, 470, 150, 330
    drawing = Drawing(width, height, "Data flow of a tile of tokens through the fused kernel")
    drawing.box(left - 20, 60, wide + 40, 350, dashed=True)
    drawing.words(left - 10, 52, "a tile of tokens, in cache or shared memory", anchor="start", size=13)
    for number, (name, what, hue) in enumerate(_STEPS):
        y = 75 + 68 * number
        drawing.box(left, y, wide, 48, colour=f"hsl({hue}, 60%, 50%)", opacity=0.22)
        drawing.words(left + wide / 2, y + 20, name, bold=True)
        drawing.words(left + wide / 2, y + 39, what, size=12)
        if number:
            drawing.arrow(left + wide / 2, y - 20, left + wide / 2, y)
    drawing.box(10, 75, 90, 48)
    drawing.words(55, 104, "x")
    drawing.arrow(100, 99, left, 99)
    drawing.box(560, 143, 150, 48)
    drawing.words(635, 163, "w, (m, n, b)")
    drawing.words(635, 181, "kernel", size=12)
    drawing.box(560, 211, 150, 48)
    drawing.words(635, 231, "its spectra, once", size=13)
    drawing.words(635, 249, "scale / b included", size=12)
    drawing.arrow(635, 191, 635, 211)
    drawing.arrow(560, 235, left + wide, 235)
    drawing.box(10, 347, 90, 48)
    drawing.words(55, 376, "base(x)")
    drawing.arrow(100, 371, left, 371)
    drawing.box(560, 347, 150, 48)
    drawing.words(635, 376, "y, in place")
    drawing.arrow(left + wide, 371, 560, 371)
    drawing.words(left + wide / 2, 445, "Main memory is touched by load and store only.", size=13)
    return drawing


def write(folder: Path) -> None:
    (folder / "matrix.html").write_text(matrix().svg(), encoding="utf-8")
    (folder / "flow.html").write_text(flow().svg(), encoding="utf-8")
