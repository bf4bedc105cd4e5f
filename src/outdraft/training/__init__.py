"""Training of drafters: conversations -> (the target's own answers) -> features -> loss -> checkpoint.

The door is `train.py` (`train`, `plan`); nothing is imported here so that reading a config costs no framework.
"""
