"""How many patients a site needs: the noise that a budget asks for, and what is left of it in the mean gradient."""

from collections.abc import Sequence

from performance.document import number, table

from icmoe.errors import BudgetExhaustedError
from icmoe.privacy.accounting import round_of, solve_noise_multiplier

PATIENTS = (13, 26, 52, 104, 208, 416, 832)
EPSILONS = (8.0, 3.0, 1.0)
SHARE = 4
"""A step expects a quarter of the patients, so that steps and their number are the same at every size."""


def noise_table(*, num_rounds: int, local_epochs: int, delta: float, patients: Sequence[int] = PATIENTS) -> str:
    """Noise multiplier for each epsilon, and the noise in each number of the mean gradient, in units of the clip."""
    header = ["patients a site", *(f"epsilon {epsilon:g}: sigma / noise of the mean" for epsilon in EPSILONS)]
    rows = []
    for num_units in patients:
        cells = [
            _cell(epsilon, num_units, num_rounds=num_rounds, local_epochs=local_epochs, delta=delta)
            for epsilon in EPSILONS
        ]
        rows.append([str(num_units), *cells])
    return table(header, rows)


def _cell(epsilon: float, num_units: int, *, num_rounds: int, local_epochs: int, delta: float) -> str:
    batch = max(1, num_units // SHARE)
    sample_rate, num_steps = round_of(num_units=num_units, batch_size=batch, local_epochs=local_epochs)
    try:
        sigma = solve_noise_multiplier(
            target_epsilon=epsilon, delta=delta, sample_rate=sample_rate, num_steps=num_steps * num_rounds
        )
    except BudgetExhaustedError:
        return "not possible"
    return f"{number(sigma)} / {number(sigma / batch)}"
