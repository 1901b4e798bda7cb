"""A short run of tests/stress.py, whether it notices mistakes, and where kept memory goes."""

import gc
import threading
import weakref

import pytest
import torch

import c3a
import stress


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_eight_threads_share_layers_and_write_them(capsys):
    status = stress.main(["--seconds", "5"])
    said = capsys.readouterr().out
    print(said)
    assert status == 0
    assert all(job.__name__ in said for job in stress.JOBS)


def test_a_stale_result_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(c3a.prepared, "_is_current", lambda held, *_: held is not None)
    assert stress.main(["--seconds", "60", "--threads", "2"]) == 1
    said = capsys.readouterr().out
    assert "AssertionError" in said


def test_an_exception_in_a_thread_is_reported(monkeypatch, capsys):
    def fail(*_):
        raise ValueError("a job that fails")

    monkeypatch.setattr(stress, "JOBS", {fail: 1})
    assert stress.main(["--seconds", "60"]) == 1
    assert "a job that fails" in capsys.readouterr().out


def test_what_threads_prepared_goes_with_the_layer():
    shared = stress.Layer((48, 32), 16, torch.float32)
    layer = shared.layer.requires_grad_(False)
    kept: list[weakref.ref] = []

    def use(layer):
        for _ in range(20):
            with torch.no_grad():
                layer(torch.randn(3, 48))
            layer(torch.randn(3, 48, requires_grad=True)).sum().backward()
            layer.prepare()
            held = layer._prepared._held
            tensors = (held.copy, held.w_hat, held.w_hat_transposed)
            kept.extend(weakref.ref(t) for t in tensors if t is not None)

    threads = [threading.Thread(target=use, args=(layer,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    alive = {id(t) for t in (reference() for reference in kept) if t is not None}
    assert 2 <= len(alive) <= 3, "only the last ones are kept"
    del layer, shared, threads, thread
    gc.collect()
    assert all(reference() is None for reference in kept)
