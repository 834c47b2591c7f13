"""Published claims: their register, what chapters measure of them, verdicts, and the ledger."""

from xlvlms_tutorial.claims.claims import (
    CLAIMS,
    VERDICTS,
    Claim,
    claim,
    merge,
    read_register,
    record,
    sentence,
    verdict,
)
from xlvlms_tutorial.claims.ledger import counts, ledger, overview

__all__ = [
    "CLAIMS",
    "VERDICTS",
    "Claim",
    "claim",
    "counts",
    "ledger",
    "merge",
    "overview",
    "read_register",
    "record",
    "sentence",
    "verdict",
]
