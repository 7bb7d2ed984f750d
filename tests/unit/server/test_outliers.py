import pytest

from icmoe.errors import IncompatibleUpdateError
from icmoe_server.outliers import check_norm, usual_norm


@pytest.mark.parametrize(
    ("norms", "usual"),
    [([], 0.0), ([2.0], 2.0), ([1.0, 100.0], 50.5), ([1.0, 1.0, 100.0], 1.0), ([1e-6, 1.0, 1.0], 1.0)],
)
def test_the_usual_norm_is_the_median(norms: list[float], usual: float) -> None:
    assert usual_norm(norms) == usual


def test_a_norm_far_above_the_usual_is_refused_with_all_numbers() -> None:
    check_norm(30.0, usual=1.0, max_ratio=30.0)
    with pytest.raises(
        IncompatibleUpdateError, match=r"L2 norm 100, 100 times the usual 1; federation\.max_update_ratio allows 30"
    ):
        check_norm(100.0, usual=1.0, max_ratio=30.0)


def test_where_nothing_moves_there_is_no_measure() -> None:
    check_norm(5.0, usual=0.0, max_ratio=30.0)
