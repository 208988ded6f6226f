"""The preplan-and-anchor rhythm, replicated: Tables 1 and 2 of arXiv 2510.13554v2 on small models.

Run all of it with `python -m experiments.rhythm`; an interrupted run continues where it stopped.
"""
