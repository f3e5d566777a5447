"""The OpenAI-compatible endpoint: models, completions and chat completions of base models and checkpoints.

Knows text and OpenAI's JSON. Does not know training or the tinker SDK's wire.
"""
