"""Training of drafters: conversations -> (the target's own answers) -> features -> loss -> checkpoint.

The doors are `train.py` (`train`) and `plan.py` (`plan`); nothing is imported here so that reading a config costs no
framework.
"""
