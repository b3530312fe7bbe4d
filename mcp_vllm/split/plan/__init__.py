"""Where to split a model: what its layers cost, what two machines and a link are worth, the best cut.

Imports no vLLM: measuring, which needs one, runs in a process of its own or at a stage.
"""
