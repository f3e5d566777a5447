"""The base model over many ranks: which strategy, where a rank stands, and how ranks talk.

Knows torch.distributed; knows neither Ray nor who started the ranks (cluster/).
"""
