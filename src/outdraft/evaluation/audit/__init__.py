"""The losslessness audit behind `outdraft verify`: a check that this drafter, with these settings, keeps the target's
output distribution on this machine.

This module exports the public names; `audit.py` runs the checks in order.
"""

from outdraft.evaluation.audit.audit import run_audit
from outdraft.evaluation.audit.findings import Audit, AuditSettings, Finding

__all__ = ["Audit", "AuditSettings", "Finding", "run_audit"]
