"""The HTTP side: Ray Serve ingress, routes by noun, identity and limits.

Knows FastAPI and the wire. Does not know torch, and holds no state that another replica would miss.
"""
