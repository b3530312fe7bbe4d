"""What would stop mcp_vllm from working here, and how to mend it.

One module for each kind of check, each a function that returns `Check`s, raises nothing and is
bounded in time. `mcp_vllm.cli.doctor` puts them together.
"""
