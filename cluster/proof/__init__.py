"""The proof that a run cannot be lost: undisturbed, then under a seeded script of faults, on hosts, by commands, as a user would.

Imports config, storage, runtime, telemetry, data, runs, driver, studies, reactdiff.
"""
