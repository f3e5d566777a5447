"""Twinkle Serve: a self-hosted training service that speaks the tinker wire protocol.

Knows only its version. Importing the package pulls in neither torch nor ray.
"""

__version__ = "0.1.0"
