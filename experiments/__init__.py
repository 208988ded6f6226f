"""Experiments: what attnprobe says about real models, each in a folder of its own."""
