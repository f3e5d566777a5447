"""The batched multi-LoRA engine: base model, adapter slots, losses, optimizer, sampler.

Knows torch and transformers. Does not know ray, HTTP, tenants or where checkpoints are kept.
"""
