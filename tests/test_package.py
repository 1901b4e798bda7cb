"""What is built: libraries that fit any torch, the pybind11 module, the facts of ``c3a info``."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import c3a
from c3a import _library, cuda
from c3a.cli import info

LIBRARIES = _library._libraries("libc3a_*.so")
TORCH = Path(torch.__file__).parent / "lib"


def symbols(library: Path, *options: str) -> set[str]:
    text = subprocess.run(
        ["nm", "-D", *options, library], check=True, capture_output=True, text=True
    ).stdout
    fields = [line.split() for line in text.splitlines()]
    # "w" is taken weakly: from a torch that has it
    return {name.split("@")[0] for *_, kind, name in fields if kind != "w"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_torch_has_every_symbol_that_a_library_takes_from_it(library):
    taken = {
        name
        for name in symbols(library, "--undefined-only")
        if re.match(r"(aoti_)?torch_|_ZN\w*5torch|cufft|cuda|__cuda", name)
    }
    real = [*TORCH.glob("libtorch_c*.so"), *TORCH.parent.parent.glob("nvidia/**/lib*.so.*")]
    has = set().union(*(symbols(path, "--defined-only") for path in real))
    assert len(taken) > 5
    missing = taken - has
    if "cuda" in library.name and torch.version.cuda is None:
        # cuFFT and the runtime may be there without a CUDA build of torch, as wheels.
        here = {path.name for path in real}
        if not any(name.startswith("libcufft.so") for name in here):
            missing = {name for name in missing if not name.startswith("cufft")}
        if not any(name.startswith("libcudart.so") for name in here):
            missing = {name for name in missing if not re.match("(__)?cuda", name)}
        assert missing == {"aoti_torch_get_current_cuda_stream"}
    else:
        assert missing == set()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_a_library_needs_torch_by_name_only_and_no_python(library):
    text = subprocess.run(
        ["readelf", "-d", library], check=True, capture_output=True, text=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", text))
    torchs = {"libtorch_cpu.so", "libtorch_cuda.so"}
    if "cuda12" in library.name:
        torchs |= {"libcufft.so.11", "libcudart.so.12"}
    if "cuda13" in library.name:
        torchs |= {"libcufft.so.12", "libcudart.so.13"}
    if "cuda" in library.name:
        torchs |= {"libc3a_cpu.so"}  # which is loaded first
    systems = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert "libtorch_cpu.so" in needed
    assert needed <= torchs | systems | loader
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_the_library_knows_version_compiler_target_cuda_and_level():
    assert _library.fact("version") == metadata.version("c3a") == c3a.__version__
    assert _library.fact("torch_target") == "2.10"
    assert re.match(r"(GNU|Clang|AppleClang) \d+", _library.fact("compiler"))
    has_library = any("cuda" in library.name for library in LIBRARIES)
    assert (_library.fact("cuda_version") is not None) == has_library
    assert (_library.fact("cuda_architectures") is not None) == has_library
    assert re.match(r"x86-64-v[234](-bf16)?$|aarch64$|generic$|aten$|cuda", _library.cpu_level())


def test_the_pybind11_module_tells_what_the_library_knows():
    module = pytest.importorskip("c3a._C", reason="built with C3A_PYBIND=OFF")
    build = module.build_info()
    assert module.cpu_capability() == _library.cpu_level()
    for name in ("version", "compiler", "torch_target"):
        assert build[name] == _library.fact(name)
    told = build["cuda"] or {"version": None, "architectures": None}
    assert told == {name: _library.fact(f"cuda_{name}") for name in told}


def in_new_process(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    options = ["-S"] if sys.flags.no_site else []
    return subprocess.run(
        [sys.executable, *options, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


SETTINGS = [
    lambda: cuda.path(),
    lambda: cuda.set_path("cufft"),
    lambda: cuda.temporary_limit(),
    lambda: cuda.set_temporary_limit(2**70),
    lambda: cuda.plan_cache(),
    lambda: cuda.set_plan_cache_capacity(3),
    lambda: cuda.clear_plan_cache(),
]


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="the settings are there")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_a_cuda_library_that_is_not_loaded_says_so(setting):
    if _library.loaded_cuda_library.path is not None:
        pytest.skip("the CUDA library is loaded")
    with pytest.raises(RuntimeError, match="^c3a: the CUDA library is not loaded; `c3a info`"):
        setting()


@pytest.mark.skipif("C3A_EMULATED" in os.environ, reason="has no levels")
def test_a_wrong_level_is_an_error_of_the_facts_too():
    code = "import c3a._library as l; print(l.cpu_level())"
    run = in_new_process(f"import os; os.environ['C3A_CPU_LEVEL'] = 'i386'; {code}")
    assert "RuntimeError: c3a: expected C3A_CPU_LEVEL to be one of" in run.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """Copy the installed package."""
    for folder in _library._FOLDERS:
        shutil.copytree(folder, tmp_path / "copy" / "c3a", dirs_exist_ok=True)
    return tmp_path / "copy" / "c3a"


# The hook of an editable installation goes before sys.path.
FIRST_ON_THE_PATH = (
    "import sys, torch; sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]; "
    "sys.path.insert(0, sys.argv[1]); "
)


def test_a_library_that_does_not_load_says_why_and_what_torch_it_needs(copy):
    """As beside torch 2.9, which lacks symbols, or with the wheel of another machine."""
    library = copy / _library.cpu_library().name
    library.write_bytes(b"")
    run = in_new_process(FIRST_ON_THE_PATH + "import c3a", copy.parent)
    assert run.stderr.strip().splitlines()[-1] == (
        f"ImportError: c3a: {library}: file too short; needs torch 2.10 or newer and a build for "
        f"this machine, this is torch {torch.__version__} on {platform.machine()}"
    )


def test_a_folder_without_metadata_is_imported(copy):
    code = (
        "from importlib import metadata; metadata.distributions = lambda **kwargs: (); "
        "metadata.Distribution.from_name = metadata.Distribution.discover = None; "
        "import c3a; print(c3a.__file__, c3a.__version__)"
    )
    run = in_new_process(FIRST_ON_THE_PATH + code, copy.parent)
    assert run.stdout.split() == [str(copy / "__init__.py"), c3a.__version__], run.stderr


def test_an_archive_is_refused_with_advice(copy):
    archive = shutil.make_archive(str(copy.parent / "c3a"), "zip", copy.parent, "c3a")
    run = in_new_process(FIRST_ON_THE_PATH + "import c3a", archive)
    assert re.search(
        rf"ImportError: c3a: cannot be imported from an archive, {archive}/c3a, for its libraries "
        "are loaded from files; install c3a with pip$",
        run.stderr.strip(),
    )


LOAD_A_COPY = """
import importlib.util, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "another", folder + "/__init__.py", submodule_search_locations=[folder]
)
module = sys.modules["another"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


@pytest.mark.parametrize(
    "first", ["import c3a", "import torch as t; t.ops.load_library(sys.argv[2])"]
)
def test_a_second_copy_in_a_process_is_an_error_that_names_both(first, copy):
    library = _library.cpu_library()
    run = in_new_process(f"import sys; {first}\n{LOAD_A_COPY}", copy, library)
    assert run.returncode == 1, run.stderr
    assert run.stderr.strip().splitlines()[-1] == (
        "ImportError: c3a: the operators torch.ops.c3a are loaded already, from "
        f"{library.resolve()}, so those of {copy / library.name} cannot be: one copy of c3a in a "
        "process; after an installation, start Python again"
    )


def test_a_library_that_a_program_has_loaded_before_serves_the_import():
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); import c3a; print('imported')"
    assert in_new_process(code, _library.cpu_library()).stdout == "imported\n"


def test_type_checkers_are_told_that_the_package_has_types():
    assert (Path(c3a.__file__).parent / "py.typed").is_file()


def test_the_types_of_the_pybind11_module_are_of_all_that_is_in_it():
    module = pytest.importorskip("c3a._C", reason="built with C3A_PYBIND=OFF")
    stub = ast.parse((Path(c3a.__file__).parent / "_C.pyi").read_text())
    typed = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert typed == {name for name in vars(module) if not name.startswith("_")}


def test_info_prints_what_a_bug_report_needs():
    python = os.path.normpath(sys.executable)
    run = subprocess.run([python, "-m", "c3a", "info"], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == info.report().replace(sys.executable, python)
    for fact in ("c3a", "compiler", "CUDA library", "torch", "CPU capability", "Python", "devices"):
        assert re.search(rf"^{fact}\b", run.stdout, re.MULTILINE) or "device cuda" in run.stdout


BUILD_12 = (
    "with nvcc 12.8 or newer of NVIDIA's toolkit (pip has none of it) and, in the folder of c3a's "
    "sources, C3A_CUDA=ON pip install --force-reinstall --no-deps ., or install a torch built for "
    "CUDA 13"
)
BUILD = "pip install 'cuda-toolkit[nvcc,cufft,cccl]==13.*' and, in the folder of c3a's sources, C3A"


@pytest.mark.parametrize(
    ("cuda", "built", "loads", "said"),
    [
        (None, ["13"], False, "not loaded: this torch is built without CUDA"),
        ("13.0", ["13"], True, "loaded, built for CUDA 13, as this torch"),
        (
            "12.8",
            ["13"],
            False,
            f"not loaded: this torch has CUDA 12, this build of c3a has CUDA 13 only; {BUILD_12}",
        ),
        (
            "11.8",
            ["12", "13"],
            False,
            "not loaded: this torch has CUDA 11, this build of c3a has CUDA 12, 13 only; "
            "install a torch built for CUDA 13",
        ),
        ("12.8", ["12", "13"], True, "loaded, built for CUDA 12, as this torch"),
        (
            "13.0",
            [],
            False,
            f"not loaded: this torch has CUDA 13, this build of c3a is built without CUDA; {BUILD}",
        ),
    ],
)
def test_the_cuda_library_is_loaded_by_a_torch_of_its_cuda_major_only(
    cuda, built, loads, said, tmp_path, monkeypatch
):
    for major in built:
        (tmp_path / f"libc3a_cuda{major}.so").touch()
    monkeypatch.setattr(_library, "_FOLDERS", [tmp_path])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    library = _library.cuda_library()
    assert (library.path is not None) == loads
    assert str(library).startswith(said)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load libraries of these names, with a torch for this CUDA; return what was loaded."""
    monkeypatch.setattr(_library, "_FOLDERS", [tmp_path])
    monkeypatch.setattr(_library, "OPS", object())  # none is loaded yet

    def load(cuda: str | None, gpus: int, *names: str, broken: str = "") -> list[str]:
        def load_library(path):
            if path.name == broken:
                cause = OSError("libcufft.so.12: cannot open shared object file")
                raise OSError(f"Could not load this library: {path}") from cause  # as torch does
            loaded.append(path.name)

        loaded: list[str] = []
        for name in ("libc3a_cpu.so", *names):
            (tmp_path / name).touch()
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.ops, "load_library", load_library)
        _library._load()
        return loaded

    return load


@pytest.mark.parametrize(
    ("cuda", "names", "said"),
    [
        ("13.0", [], f"this build of c3a is built without CUDA; {BUILD}"),
        ("12.8", [], f"built without CUDA; {BUILD_12}"),
        ("12.8", ["libc3a_cuda13.so"], f"has CUDA 13 only; {BUILD_12}"),
    ],
)
def test_a_gpu_without_a_library_is_told_what_mends_it_and_the_cpu_keeps_working(
    cuda, names, said, load
):
    with pytest.warns(
        UserWarning, match=f"torch's own FFTs, several times slower; .*{re.escape(said)}"
    ):
        assert load(cuda, 1, *names) == ["libc3a_cpu.so"]


def test_a_cuda_library_that_does_not_load_is_told_so_and_the_cpu_keeps_working(load):
    with pytest.warns(UserWarning, match="torch's own FFTs.*libcufft.so.12: cannot open"):
        assert load("13.0", 1, "libc3a_cuda13.so", broken="libc3a_cuda13.so") == ["libc3a_cpu.so"]


@pytest.mark.parametrize(
    ("cuda", "gpus", "names"),
    [
        ("12.8", 0, ["libc3a_cuda13.so"]),
        ("13.0", 0, []),
        (None, 1, []),
        ("13.0", 1, ["libc3a_cuda13.so"]),
    ],
)
def test_no_word_is_said_where_nothing_is_lost(cuda, gpus, names, load):
    assert load(cuda, gpus, *names)[0] == "libc3a_cpu.so"  # a warning would be an error


def test_info_tells_of_a_cuda_library_that_did_not_load(monkeypatch):
    failed = _library.CudaLibrary(None, "libcufft.so.12: cannot open shared object file")
    monkeypatch.setattr(_library, "loaded_cuda_library", failed)
    assert re.search("CUDA library +not loaded: libcufft.so.12: cannot", info.report())


def test_the_core_needs_torch_and_safetensors_only(tmp_path):
    """Work with nothing else at hand, but numpy, which safetensors needs to save tensors."""
    core = [line for line in metadata.requires("c3a") if "extra ==" not in line]
    assert core == ["torch>=2.10", "safetensors[torch]>=0.4"]
    code = """
import sys
extras = ("transformers", "peft", "accelerate", "matplotlib", "rich", "scipy")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import c3a, torch
from c3a.cli import main
model = c3a.patch_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], 2)
c3a.save_adapter(model, sys.argv[1])
c3a.load_adapter(c3a.unpatch_model(model), sys.argv[1])
assert main(["info"]) == 0
assert main(["inspect", "nowhere"]) == 2
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "pip install 'c3a[finetune]'" in run.stderr


def test_the_import_brings_safetensors_only_and_no_part_of_torch_that_takes_time():
    """Of what ``import torch`` has not imported; triton alone would take 80 ms."""
    code = """
import sys, torch
before = set(sys.modules)
import c3a
print(*(set(sys.modules) - before))
"""
    run = in_new_process(code)
    assert "c3a.linear" in run.stdout, run.stderr
    brought = {name for name in run.stdout.split() if name.split(".")[0] != "c3a"}
    of_torch = {name for name in brought if name.split(".")[0] == "torch"}
    # torch 2.15 leaves nested tensors out; they take a millisecond
    nested = {name for name in of_torch if name.startswith("torch.nested._internal")}
    small = {"torch.utils._device", "torch.fx.experimental._constant_symnode"}
    assert of_torch - nested <= small
    others = {name.split(".")[0] for name in brought - of_torch} - {"safetensors"}
    assert others <= set(sys.stdlib_module_names)


COUNT = """
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    torch.ops.c3a.block_circ_conv(torch.ones(1, 4), torch.ones(1, 1, 4))
assert counter.get_total_flops() == 2.5 * 12 * 2 + 8 + 2 * 2, counter.get_total_flops()
"""
REIMPORT = "del sys.modules['torch.utils.flop_counter']; import torch.utils.flop_counter"


@pytest.mark.parametrize(
    "imports",
    [
        "import torch.utils.flop_counter, c3a",
        "import c3a, torch.utils.flop_counter",
        "import c3a; from torch.utils import flop_counter as f; import importlib as i; i.reload(f)",
        f"import torch.utils.flop_counter, c3a; {REIMPORT}",
        "import c3a.flops as f; f.register({}); import torch.utils.flop_counter",  # another copy's
    ],
)
def test_flops_are_counted_whenever_the_counter_is_imported(imports):
    code = f"""
import sys, torch; {imports}
{COUNT}
counter = sys.modules["torch.utils.flop_counter"]
assert type(counter.__loader__) is type(torch.__loader__) is type(counter.__spec__.loader)
"""
    run = in_new_process(code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("module", "fails"), [("torch.nn.new", False), ("c3a.linear", True)])
def test_a_warning_of_torchs_own_lines_fails_no_test(module, fails):
    """A torch that is newer than the tests may have new ones; what it says of our lines fails."""
    code = compile("import warnings; warnings.warn('deprecated')", "<test>", "exec")
    if fails:
        with pytest.raises(UserWarning, match="deprecated"):
            exec(code, {"__name__": module})
    else:
        with warnings.catch_warnings(record=True) as said:
            exec(code, {"__name__": module})
        assert [str(warning.message) for warning in said] == ["deprecated"]
