"""The paper's analysis: couplings, perturbation, knock-out, and how stable head groups are.

Its functions are public as `attnprobe.couplings` and so on. They are not exported here, where a function
would hide the module of the same name.
"""
