"""Training one run to its end: the loop and engine of each rank, and the driver that launches them stage by stage.

Imports reactdiff, config, storage, runtime, telemetry, data, runs, evaluation.
"""
