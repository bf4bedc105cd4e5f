"""Drafters: small models that propose trees of tokens. One file each, all on the protocol of `base.py`."""
