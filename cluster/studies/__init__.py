"""Many runs: a sweep over settings, a comparison of rows and seeds, and scheduled retraining.

Imports reactdiff, config, storage, runtime, telemetry, data, runs, evaluation, driver.
"""
