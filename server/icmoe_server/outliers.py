"""Updates of the right form that are far too large, judged by what the sites of a run usually send."""

from collections.abc import Iterable
from statistics import median

from icmoe.errors import IncompatibleUpdateError


def usual_norm(norms: Iterable[float]) -> float:
    """Size of a usual change: the median, which a minority of the sites cannot move far in either direction.

    Args:
        norms: L2 norms of this round's changes and of those accepted in the rounds just before. Of only two, as in the
            first round of two sites, nobody can say which is the unusual one: their median lies close enough to both.

    Returns:
        0 where there are none.
    """
    return median([*norms] or [0.0])


def check_norm(norm: float, *, usual: float, max_ratio: float) -> None:
    """Refuse a change that is out of all proportion.

    Args:
        norm: L2 norm of a site's change.
        usual: see ``usual_norm``; 0 accepts any.
        max_ratio: of the two.

    Raises:
        IncompatibleUpdateError: if the change is larger.
    """
    if usual > 0 and norm > max_ratio * usual:
        raise IncompatibleUpdateError(
            f"the change has L2 norm {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}; "
            f"federation.max_update_ratio allows {max_ratio:g} times"
        )
