"""Public test tools for authors of adapters and metrics.

`conformance` is the suite that every adapter passes, and `families` the table of what is read where.
`strategies` draws the inputs of attention calls (needs hypothesis), `reference` computes their pattern
the slow and obvious way, `tiny_models` builds small random models of many families, and `backends` puts
them into each library. None of it is imported by the rest of attnprobe.
"""
