"""Drafters for engines that scale out: folders that an engine loads (`export.py`), and vLLM's plug-in.

Nothing here decodes. The plug-in's modules are read by vLLM's processes; only `vllm_head.py` imports vLLM when read.
"""
