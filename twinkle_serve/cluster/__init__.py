"""Ray actors: the coordinator that owns the promises' ObjectRefs, and the groups of rank workers.

Knows ray. Does not know the wire format or how a step is computed.
"""
