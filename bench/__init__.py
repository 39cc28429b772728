"""Benchmarks: each file compares av_llava with what people use today, side by side in one run.

``python -m bench`` runs all of them, ``python -m bench splice pixels`` some. Every file has a
``run(quick)`` that gives rows; before anything is timed, it checks that all contestants agree.
"""
