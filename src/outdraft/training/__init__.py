"""Training of drafters: conversations -> (the target's own answers) -> features -> loss -> checkpoint.

The public functions are `train.train` and `plan.plan`. Nothing is imported here, so that reading a config costs no
framework.
"""
