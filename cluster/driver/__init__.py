"""The driver of one run: which run it is, its stages one after the other, and the worker groups that it launches for them.

Imports reactdiff, config, storage, runtime, telemetry, data, runs, evaluation, training.
"""
