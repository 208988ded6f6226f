"""Public test tools for authors of adapters and metrics.

`conformance` is the suite that every adapter must pass, and `families` the table of how each backend reads
each family. `strategies` draws the inputs of attention calls (it needs hypothesis), `reference` computes
their pattern in the slow and obvious way, `tiny_models` builds small random models of many families,
`backends` puts them into each library, and `tiny_trainers` trains them with TRL. The rest of attnprobe
imports none of it.
"""
