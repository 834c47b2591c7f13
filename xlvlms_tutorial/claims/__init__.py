"""Published claims: their register, what chapters measure of them, verdicts, and the ledger."""

from xlvlms_tutorial.claims.checks import check, read_checks
from xlvlms_tutorial.claims.claims import (
    CLAIMS,
    OBSERVATIONS,
    VERDICTS,
    Claim,
    claim,
    merge,
    read_register,
    record,
    sentence,
    verdict,
)
from xlvlms_tutorial.claims.findings import findings, findings_table
from xlvlms_tutorial.claims.headlines import (
    SIZES,
    headlines,
    holm,
    multiplicity,
    write_claims,
)
from xlvlms_tutorial.claims.ledger import counts, headline_table, ledger, overview
from xlvlms_tutorial.claims.pooled import pool, random_effects, read_runs
from xlvlms_tutorial.claims.pooled_ledger import agreement, pooled_table
from xlvlms_tutorial.claims.tables import data_dictionary, ledger_tables, write_tables

__all__ = [
    "CLAIMS",
    "OBSERVATIONS",
    "SIZES",
    "VERDICTS",
    "Claim",
    "agreement",
    "check",
    "claim",
    "counts",
    "data_dictionary",
    "findings",
    "findings_table",
    "headline_table",
    "headlines",
    "holm",
    "ledger",
    "ledger_tables",
    "merge",
    "multiplicity",
    "overview",
    "pool",
    "pooled_table",
    "random_effects",
    "read_checks",
    "read_register",
    "read_runs",
    "record",
    "sentence",
    "verdict",
    "write_claims",
    "write_tables",
]
