"""Records as runs of a batch leave them."""

from xlvlms_tutorial.claims.claims import judged


def run(value, seed=0, half=0.1, **changes):
    """A record of one run, with the verdict that follows from its numbers."""
    fields = {
        "id": "IMA-1",
        "chapter": "alignment",
        "model": "pocket-llava",
        "dataset": "scenes",
        "seeds": [seed],
        "variant": "v",
        "against": "shuffled labels",
        "interval_over": "pictures",
        "choice": "fixed",
        "scale": "pocket",
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": 50,
        "verdict": "not judged yet",
        "between_machines": False,
        "versions": {"xlvlms_tutorial": "0.1.0"},
    } | changes
    if "verdict" not in changes and fields["low"] <= fields["value"]:
        fields["verdict"] = judged(fields, "a test")["verdict"]
    return fields
