"""The parts of the layer split that vLLM loads or that drive vLLM: nothing else of `split` may."""
