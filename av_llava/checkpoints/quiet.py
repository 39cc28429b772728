"""Keeps other libraries quiet while a checkpoint is read; the caller's settings come back.

Contract: what a library would have said about a checkpoint becomes an error or a log record of
ours. Nothing is printed, and nothing is hidden but what is named here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

BITSANDBYTES = "bitsandbytes.backends.cpu.ops"
_KERNEL = "gemm_4bit_forward"


@contextmanager
def without_bars() -> Iterator[None]:
    """Hold back transformers' bars alone: its own switch would change the hub's for good."""
    from transformers.utils import logging as hf_logging

    before = hf_logging._tqdm_active
    hf_logging._tqdm_active = False
    try:
        yield
    finally:
        hf_logging._tqdm_active = before


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hold back transformers' bars and its report of missing keys.

    A tower beside the checkpoint is in that report; what is really missing becomes an error.
    """
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        hf_logging.set_verbosity(before)


def not_about_the_kernel(record: logging.LogRecord) -> bool:
    """Filter of logging: drop what bitsandbytes says where an optional kernel is absent.

    It says so whenever it is imported, which PEFT does unasked, and the kernel is not used here
    (:mod:`quantize`).
    """
    return _KERNEL not in str(record.msg)
