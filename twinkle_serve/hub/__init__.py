"""ModelScope: where base models come from and who a token belongs to.

Knows the hub's client library. Does not know the engine or the routes.
"""
