"""Drafters for engines that scale out: folders that an engine loads (`export.py`), and vLLM's plug-in.

vLLM's processes import the plug-in; only `vllm_head.py` imports vLLM at import time.
"""
