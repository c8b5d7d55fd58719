"""Numbers of a running job: counted on each rank, served to Prometheus, shown on a terminal, and kept in the run's folder.

Imports storage, runtime.
"""
