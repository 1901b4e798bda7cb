"""The emulated machine itself: what it lets pass and what it stops (the rest: mutants.py)."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from c3a import _library

needs_machine = pytest.mark.skipif(
    os.environ.get("C3A_EMULATED") is None, reason="needs the emulated machine"
)

R2C, C2R, D2Z, Z2D = 0x2A, 0x2C, 0x6A, 0x6C
SUCCESS, INVALID_PLAN, INVALID_SIZE, NO_WORKSPACE = 0, 1, 8, 13


def library() -> ctypes.CDLL:
    preloaded = ctypes.CDLL(None)
    has = hasattr(preloaded, "c3a_emulation_events")
    return preloaded if has else ctypes.CDLL(_library._libraries("libc3a_cpu.so")[0])


class Plan:
    """cuFFT's calls, on NumPy's memory."""

    def __init__(self, kind, length, batch, strides, embed=True):
        self.cufft, self.kind = library(), kind
        self.handle, self.size = ctypes.c_int(), ctypes.c_size_t()
        assert self.cufft.cufftCreate(ctypes.byref(self.handle)) == SUCCESS
        assert self.cufft.cufftSetAutoAllocation(self.handle, 0) == SUCCESS
        bins = length // 2 + 1
        sides = (length, bins) if kind in (R2C, D2Z) else (bins, length)
        embeds = [ctypes.byref(ctypes.c_longlong(n)) if embed else None for n in sides]
        wide = ctypes.c_longlong
        in_stride, in_distance, out_stride, out_distance = map(wide, strides)
        self.made = self.cufft.cufftMakePlanMany64(
            *(self.handle, 1, ctypes.byref(wide(length))),
            *(embeds[0], in_stride, in_distance, embeds[1], out_stride, out_distance),
            *(kind, wide(batch), ctypes.byref(self.size)),
        )
        self.workspace = np.zeros(self.size.value, np.uint8)

    def execute(self, source, result, workspace=True):
        if workspace:
            self.cufft.cufftSetWorkArea(self.handle, self.workspace.ctypes.data_as(ctypes.c_void_p))
        name = {R2C: "R2C", C2R: "C2R", D2Z: "D2Z", Z2D: "Z2D"}[self.kind]
        return getattr(self.cufft, f"cufftExec{name}")(
            self.handle,
            source.ctypes.data_as(ctypes.c_void_p),
            result.ctypes.data_as(ctypes.c_void_p),
        )


@needs_machine
@pytest.mark.parametrize("length", [1, 2, 5, 6, 16])
@pytest.mark.parametrize(("forward", "backward", "real"), [(R2C, C2R, "f4"), (D2Z, Z2D, "f8")])
def test_transforms_are_numpys_with_the_strides_that_were_asked_for(
    length, forward, backward, real
):
    batch, bins = 3, length // 2 + 1
    x = np.random.default_rng(0).normal(size=(batch, length)).astype(real)
    expected = np.fft.rfft(x)
    tolerance = 1e-5 if real == "f4" else 1e-13
    spectra = np.full((bins, batch), np.nan, expected.dtype if real == "f8" else "c8")
    plan = Plan(forward, length, batch, (1, length, batch, 1))
    assert plan.execute(x, spectra) == SUCCESS
    np.testing.assert_allclose(spectra.T, expected, atol=tolerance)
    assert np.isnan(plan.workspace.view(real)).all()

    back = np.full((batch, length), np.nan, real)
    plan = Plan(backward, length, batch, (batch, 1, 1, length))
    assert plan.execute(spectra, back) == SUCCESS
    np.testing.assert_allclose(back, x * length, atol=length * tolerance)
    assert np.isnan(spectra).all(), "an inverse transform overwrites its input"


@needs_machine
def test_strides_without_embeddings_are_ignored_as_cufft_ignores_them():
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("f4")
    spectra = np.zeros((2, 4), "c8")
    assert Plan(R2C, 6, 2, (1, 6, 2, 1), embed=False).execute(x, spectra) == SUCCESS
    np.testing.assert_allclose(spectra, np.fft.rfft(x), atol=1e-5)


@needs_machine
def test_what_cufft_refuses_is_refused():
    x, spectra = np.zeros((2, 6), "f4"), np.zeros((4, 2), "c8")
    assert Plan(R2C, 0, 2, (1, 0, 2, 1)).made == INVALID_SIZE
    assert Plan(R2C, 6, 0, (1, 6, 2, 1)).made == INVALID_SIZE
    plan = Plan(R2C, 6, 2, (1, 6, 2, 1))
    assert plan.execute(x, spectra, workspace=False) == NO_WORKSPACE
    assert plan.execute(x, spectra) == SUCCESS
    assert plan.execute(x, spectra, workspace=False) == NO_WORKSPACE, "it was one execution's"
    plan.kind = D2Z
    assert plan.execute(x, spectra) == INVALID_PLAN
    assert plan.cufft.cufftDestroy(plan.handle) == SUCCESS
    assert plan.cufft.cufftDestroy(plan.handle) == INVALID_PLAN


STOPPED = {
    "is not on the current stream": "machine.c3a_emulation_use(0, 1)",
    "of a plan of another device": "machine.c3a_emulation_use(1, 0)",
    "not aligned to complex numbers": "x = np.zeros(13, 'f4')[1:]",
    "in place": "spectra = x",
    "while a graph is captured": "machine.c3a_emulation_capture(1); Plan(R2C, 6, 2, (1, 6, 2, 1))",
}


@needs_machine
@pytest.mark.parametrize("said", STOPPED)
def test_what_cufft_would_not_notice_stops_the_process(said):
    code = f"""
import numpy as np
from test_cuda_emulation import Plan, R2C, library
machine = library()
x, spectra = np.zeros(12, 'f4'), np.zeros((4, 2), 'c8')
plan = Plan(R2C, 6, 2, (1, 6, 2, 1))
{STOPPED[said]}
plan.execute(x, spectra)
"""
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, *(path for path in sys.path if path)])
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode < 0
    assert "CUDA emulation: cufft" in run.stderr
    assert said in run.stderr


def test_every_mutant_finds_the_text_that_it_breaks():
    program = Path(__file__).parent / "cuda_emulation" / "mutants.py"
    spec = importlib.util.spec_from_file_location("mutants", program)
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    assert mutants.without_a_place() == []
