"""The web page at /console, and the short one at /.

Knows HTML. Everything it shows or does goes through the Backend that the SDK's routes use, as the signed-in
tenant.
"""
