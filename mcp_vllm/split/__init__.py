"""The layer split: an engine whose middle layers run at a stage, a process elsewhere.

Nothing here imports vLLM but `split/engine`. docs/split.md walks through a step.
"""
