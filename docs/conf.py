"""The site, built by `make docs`. Its pages include README and DESIGN, and do not repeat them."""

import re
import sys
import zlib
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import drawings  # noqa: E402

project = "C3A"
author = "the C3A authors"
version = release = metadata.version("c3a")
html_title = f"C3A {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["drawn"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning"]
autodoc_typehints_format = "short"
napoleon_use_rtype = False
# A variable of types, for "the same kind of model": it has no place of its own.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "c3a.patch.Model",
        "c3a.fsdp.Model",
        "DeviceMesh",
        "MixedPrecisionPolicy",
        "torch.distributed.tensor.placement_types.Placement",
    )
]
copybutton_prompt_text = ">>> "
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

# Names of other projects, with their places, in files of our own: no build asks the network.
DRAWN = HERE / "drawn"
DRAWN.mkdir(exist_ok=True)
_PLACES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "transformers": "https://huggingface.co/docs/transformers/",
}


def _inventory(name: str) -> str:
    file = DRAWN / f"{name}.inv"
    names = (HERE / "inventories" / f"{name}.txt").read_bytes()
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# compressed by zlib\n"
    file.write_bytes(head.encode() + zlib.compress(names))
    return str(file)


intersphinx_mapping = {name: (place, _inventory(name)) for name, place in _PLACES.items()}

# Where the parts of the included files stand on the site.
_PARTS = {
    "README.md": "first-steps.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "extending.md",
    "CHANGELOG.md": "changelog.md",
    "DESIGN.md#cost": "benchmarks.md#where-the-time-goes",
    "DESIGN.md#the-cuda-library": "cuda.md#the-cuda-library",
    "README.md#the-input-gradient": "from-peft.md#the-input-gradient",
    "README.md#speed-and-memory": "benchmarks.md#speed-and-memory",
    "docs/from-peft.md#staying-with-peft": "from-peft.md#staying-with-peft",
    "docs": "index.md",
    "examples": "custom-code.md",
}
_LINK = re.compile(r"\]\((?:https://github\.com/[^/]+/[^/]+/(?:blob|tree|raw)/[^/]+/)?([^):]+)\)")


def _on_the_site(app, path: Path, docname: str, text: list[str]) -> None:
    """Turn an included file's links to its neighbours into links to the site's pages."""

    def turned(link: re.Match) -> str:
        target = link[1].removesuffix("/")
        target = path.name + target if target.startswith("#") else target
        if target.endswith(".png"):
            return f"](../{target})"
        place = _PARTS.get(target, target.removeprefix("docs/"))
        return f"]({place})"

    text[0] = _LINK.sub(turned, text[0])


def setup(app) -> None:
    drawings.write(DRAWN)
    app.connect("include-read", _on_the_site)
