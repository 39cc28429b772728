"""The command line: one command per file.

Contract: the only part of the package that prints, reads environment variables, configures
logging and sets exit codes. Nothing here imports torch before the cheap checks are done.
"""
