"""Where to split a model: what layers cost, what machines and a link are worth, the best cut.

Imports no vLLM: measuring, which needs one, runs in a process of its own or at a stage.
"""
