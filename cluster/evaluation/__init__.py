"""Scores of a run's reactions: whole evaluations beside baselines, checkpoints while training, and the gate for promotion.

Imports reactdiff, config, storage, runtime, telemetry, data, runs.
"""
