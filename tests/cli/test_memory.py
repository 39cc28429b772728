"""What would likely fit after memory ran out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from av_llava.cli.failures import is_out_of_memory
from av_llava.cli.memory import Memory, advice, asked_bytes, scale
from av_llava.cli.options import Request

GIB = 2**30


def test_the_size_is_read_from_the_message() -> None:
    message = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
    assert asked_bytes(message) == round(2.5 * GIB)
    assert asked_bytes("Tried to allocate 512.00 MiB.") == 512 * 2**20
    assert asked_bytes("no number") == 0


def test_what_is_recommended_fits_by_the_same_count() -> None:
    memory = Memory(total=24 * GIB, weights=14 * GIB, peak=22 * GIB)
    asked = 40 * GIB  # 48 GiB above the weights for 64 frames, 10 GiB free
    share = scale(memory, asked)
    assert share * 48 <= 10 and share > 0.1
    said = advice("Tried to allocate 40.00 GiB.", memory, 64, Request())
    assert f"--frames {int(64 * share)}." in said


@given(
    st.integers(0, 200 * GIB), st.integers(0, 200 * GIB), st.integers(0, 200 * GIB),
    st.integers(0, 400 * GIB), st.integers(1, 4096),
)  # fmt: skip
def test_advice_is_always_less_than_what_failed(total, weights, peak, asked, frames) -> None:
    share = scale(Memory(total, weights, peak), asked)
    assert 0 <= share <= 0.5
    said = advice("out of memory", Memory(total, weights, peak), frames, Request())
    if frames > 1:
        assert 1 <= int(said.rpartition("--frames ")[2].rstrip(".")) < frames
    else:
        assert "--frames" not in said


def test_kinds_of_exhausted_memory() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert is_out_of_memory(OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
