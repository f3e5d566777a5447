"""What survives a restart: checkpoint directories and the catalogue of runs, sessions and checkpoints.

Knows files and SQL. Does not know HTTP, ray or what the weights mean.
"""
