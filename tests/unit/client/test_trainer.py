import math

import numpy as np

from icmoe.config import RunConfig
from icmoe.metrics import ImageScore
from icmoe_client.trainer import dice_per_class, simulated_dropout, summarise, training_seed


def run_config(seed: int = 0, dropout: float = 0.0) -> RunConfig:
    return RunConfig.model_validate(
        {
            "task": {"name": "discs", "classes": {"disc": 1}},
            "train": {"seed": seed},
            "simulation": {"dropout": dropout},
            "federation": {"quorum": 1},
        }
    )


def test_training_seeds_differ_by_run_site_and_round() -> None:
    seeds = {
        training_seed(run_config(seed), site, server_round)
        for seed in (0, 1)
        for site in ("oslo", "bergen")
        for server_round in (1, 2)
    }
    assert len(seeds) == 8
    assert training_seed(run_config(), "oslo", 1) == training_seed(run_config(), "oslo", 1)


def test_dropout_hits_its_share_of_rounds_and_is_the_same_again() -> None:
    run = run_config(dropout=0.3)
    drawn = [simulated_dropout(run, site, r) for site in "abcdefgh" for r in range(1, 101)]
    assert 0.25 < np.mean(drawn) < 0.35
    assert drawn == [simulated_dropout(run, site, r) for site in "abcdefgh" for r in range(1, 101)]
    assert not any(simulated_dropout(run_config(), site, 1) for site in "abc")


def test_means_leave_out_what_is_absent() -> None:
    scores = [
        ImageScore(dice=[1.0, None], hd95=[2.0, None]),
        ImageScore(dice=[0.5, 0.7], hd95=[4.0, 8.0]),
        ImageScore(dice=[None, None], hd95=[None, None]),
    ]
    numbers = summarise(scores)
    assert numbers["num_scored"] == 3
    assert math.isclose(numbers["dice"], (1.0 + 0.6) / 2)
    assert math.isclose(numbers["hd95"], (2.0 + 6.0) / 2)
    np.testing.assert_allclose(dice_per_class(scores), [0.75, 0.7])


def test_without_foreground_there_is_no_score() -> None:
    scores = [ImageScore(dice=[None, None])]
    assert summarise(scores) == {"num_scored": 1}
    assert all(math.isnan(dice) for dice in dice_per_class(scores))
