"""The losslessness audit behind `outdraft verify`: does this drafter, with these settings, keep the target's law here?

Exports what a caller needs; `audit.py` says in which order the checks run.
"""

from outdraft.evaluation.audit.audit import run_audit
from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.settings import AuditSettings
from outdraft.evaluation.audit.verdict import Audit

__all__ = ["Audit", "AuditSettings", "Finding", "run_audit"]
