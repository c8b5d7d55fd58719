"""Where work is placed: the Ray cluster, tasks on its nodes, devices, scratch folders, and what restarts what.

Imports config, storage.
"""
