"""Guards on nvcc's output for the CUDA library: what no GPU is needed to see."""

import functools

import pytest

import machine_code
from c3a import _library
from machine_code import CALL, FP64, LOAD_16, SPILL, STORE_16, DeviceFunction

LIBRARIES = _library._libraries("libc3a_cuda*.so")
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]

pytestmark = [
    pytest.mark.skipif(not LIBRARIES, reason="needs a build with the CUDA library"),
    pytest.mark.skipif(not machine_code.tools_are_here(), reason="needs cuobjdump and nvdisasm"),
]


@functools.cache
def functions(architecture: str) -> tuple[DeviceFunction, ...]:
    return tuple(machine_code.device_functions(LIBRARIES[0], architecture))


def those(architecture: str, prefix: str) -> list[DeviceFunction]:
    found = [f for f in functions(architecture) if f.name.startswith(prefix)]
    assert found
    return found


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


def test_every_device_function_is_there(architecture):
    names = [f.name for f in functions(architecture)]
    for length in range(4, 11):
        assert f"transform_kernel<{length}>" in names
        for tokens in (4, 8):
            assert f"convolve<{length}, {tokens}>" in names
    assert sum(name.startswith("product_of_bins") for name in names) == 2 * 3
    assert sum(name.startswith("load_numbers") for name in names) == 3 + 4
    assert sum(name.startswith("store_numbers") for name in names) == 3 + 4
    assert sum(name.startswith("sum_of_parts") for name in names) == 2
    assert "slots_to_bins" in names
    assert len(names) == 21 + 6 + 14 + 2 + 1


def test_nothing_is_spilled_and_nothing_lies_on_a_stack(architecture):
    assert [(f.name, f.stack_bytes) for f in functions(architecture) if f.stack_bytes] == []
    assert [f.name for f in functions(architecture) if f.count(SPILL)] == []


def test_nothing_is_called(architecture):
    assert [f.name for f in functions(architecture) if f.count(CALL)] == []


def test_float32_stays_float32(architecture):
    for f in functions(architecture):
        assert (f.count(FP64) > 0) == f.is_double or f.name.startswith("sum_of_parts"), f.name


def test_registers_leave_room_for_two_thread_blocks(architecture):
    for f in functions(architecture):
        bound = 64 if "numbers" in f.name else 128
        if f.name.startswith("product_of_bins") and f.is_double:
            bound = 224
        assert f.registers <= bound, f.name


def test_activations_move_16_bytes_at_a_time(architecture):
    for prefix in ("load_numbers", "store_numbers", "convolve", "transform_kernel"):
        for f in those(architecture, prefix):
            # A type of numbers each, twice for loads where there is a base.
            loads = 3 + 3 if prefix == "convolve" else 3 if prefix == "transform_kernel" else 1
            assert f.count(LOAD_16) >= loads, f.name
            if prefix != "transform_kernel":
                assert f.count(STORE_16) >= (3 if prefix == "convolve" else 1), f.name


def test_enough_threads_are_at_hand_to_wait_for_memory(architecture):
    for f in functions(architecture):
        # The fused path: a tile of spectra in shared memory, 16 numbers a thread in registers.
        fused = f.name.startswith(("convolve", "transform_kernel"))
        heavy = fused or (f.is_double and "product" in f.name)
        assert f.occupancy() >= (0.12 if heavy else 0.25), (f.name, f.occupancy())


def test_the_table_can_be_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["machine_code.py", str(LIBRARIES[0])])
    monkeypatch.setattr(
        machine_code, "MULTIPROCESSORS", {"sm_90": machine_code.MULTIPROCESSORS["sm_90"]}
    )
    machine_code.main()
    printed = capsys.readouterr().out
    assert "convolve<7, 8>" in printed
    assert "occupancy" in printed
