"""What fits the context."""

from __future__ import annotations

import pytest
from tiny import text_config, tiny

from av_llava.aggregators import settings_of
from av_llava.budgeting import context_length, frames_that_fit


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        (None, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_rotary_scaling_stretches_the_context(rope, wanted):
    changes = {} if rope is None else {"rope_scaling": rope}
    _, processor = tiny("llama", text=changes)
    assert context_length(processor.config) == wanted


def test_default_frames_leave_room_for_text():
    _, processor = tiny("llama", aggregator=settings_of("frame_newline"))  # 17 tokens a frame
    config = processor.config
    assert frames_that_fit(config, 32) == 32
    config.text_config = text_config("llama", max_position_embeddings=400)
    assert frames_that_fit(config, 32) == 17
    config.text_config = text_config("llama", max_position_embeddings=10)
    assert frames_that_fit(config, 32) == 1
