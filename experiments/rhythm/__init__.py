"""The preplan-and-anchor rhythm, replicated: Tables 1 and 2 of arXiv 2510.13554v2 on small models.

`python -m experiments.rhythm` runs what needs a model, and `make rhythm` computes every number again.
"""
