"""The listening half: resampling, features, towers, projector, and placement of sound.

Contract: a waveform here is float32 mono at 16 kHz. Counts come from ``placement.plan_audio``
before anything is encoded; importing this package or ``placement`` costs no torch.
"""
