"""Public test tools for authors of adapters and metrics.

`strategies` draws the inputs of attention calls (needs hypothesis), `reference` computes their pattern
the slow and obvious way, and `tiny_models` builds small random models of many families. None of it is
imported by the rest of attnprobe.
"""
