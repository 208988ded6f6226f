"""Credit for trainers: per-token advantage weights from token scores. Empty in this version.

It will know scores, and neither attention nor models.
"""
