"""What the tests prove of each family, counted from their cases; `python -m tests.proof` writes it for the table.

A layout or a config counts if `make sweep` runs it; `make test` runs a covering sample of them.
"""

from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.support_table import PROOF, Proof, proof_json
from tests.parity import test_families, test_five_steps
from tests.verify.test_real_weights import PUBLISHED


def proofs() -> dict[str, Proof]:
    """model_type -> what is proven, in the order of the registry."""
    return {name: _proof_of(name) for name in FAMILIES}


def _proof_of(model_type: str) -> Proof:
    cases = {name for name, config in test_families.CASES.items() if config["model_type"] == model_type}
    runs = [*test_families.COVERING, *test_families.EVERYTHING]
    places = {place for case, place in runs if case in cases}
    steps = test_five_steps.RECIPE.steps if model_type in test_five_steps.FIRST else 0
    return Proof(len(cases), len(places), steps, tuple(PUBLISHED.get(model_type, ())))


if __name__ == "__main__":
    PROOF.write_text(proof_json(proofs()), encoding="utf-8")
