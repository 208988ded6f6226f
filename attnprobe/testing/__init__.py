"""Public test tools for authors of adapters and metrics.

`conformance` is the suite that every adapter must pass; its models and calls are in `conformance_cases`, and
`model_state` says whether a model is as it was. `all_families` tries every causal family of transformers and
makes a table: `family_models` builds a tiny model of each, of sizes from `family_sizes`, and `family_checks`
tries everything with one (its calls and the oracle are in `family_cases`, the result in `family_report`).
`strategies` draws the inputs of attention calls (it needs hypothesis), `reference` computes their pattern in
the slow and obvious way, `tiny_models` builds small random models of some families for everyday tests
(`tiny_vision` those that see images), `backends` puts them into each library, and `tiny_trainers` trains them
with TRL. The rest of attnprobe imports none of it.
"""
