"""Ordering, planning and promises in plain Python, driven by an injected clock.

Knows commands, costs and slots. Does not know torch, ray, HTTP or what a tensor holds.
"""
