"""Membership inference: was this image among those a model was trained on?

Loss threshold (Yeom et al., 2018): a low loss says yes. LiRA (Carlini et al., 2022): the image's loss is compared with
that of models which surely had it and models which surely had not. Every shadow model is the target once, the others
are the attacker's. The attacker knows all images, the training's settings and the trained weights.
"""

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from privacy.attack_model import Floats

Members = npt.NDArray[np.bool_]


def split_members(num_models: int, num_images: int, seed: int) -> Members:
    """Who trains on what, (models, images): every model has half of the images, every image half of the models.

    Models 0 and 1, 2 and 3, ... have opposite halves.

    Raises:
        ValueError: if either number is odd.
    """
    if num_models % 2 or num_images % 2:
        raise ValueError(f"{num_models} models and {num_images} images: both numbers must be even")
    rng = np.random.default_rng(seed)
    members = np.zeros((num_models, num_images), dtype=np.bool_)
    for first in range(0, num_models, 2):
        members[first, rng.permutation(num_images)[: num_images // 2]] = True
        members[first + 1] = ~members[first]
    return members


def threshold_aucs(losses: Floats, members: Members) -> Floats:
    """AUC of the loss threshold against each model.

    Args:
        losses: (models, images).
        members: (models, images).
    """
    return np.array([auc(-one, held) for one, held in zip(losses, members, strict=True)])


def lira_aucs(losses: Floats, members: Members) -> Floats:
    """AUC of LiRA against each model, the others being its shadow models.

    One variance for all images, because each has few shadow models (the paper's advice). The target's counterpart,
    which had the other half of the images, sits out with it: each image is then in as many shadow models as not,
    whoever is the target. Else the counts alone would tell.
    """
    confidence = -np.log(np.expm1(np.clip(losses, 1e-6, 50.0)))
    found = []
    for target in range(len(losses)):
        pair = (target, target ^ 1)
        others, held = np.delete(confidence, pair, axis=0), np.delete(members, pair, axis=0)
        inside, outside = _mean(others, held), _mean(others, ~held)
        variance = _spread(others, held, inside, outside)
        ratio = (confidence[target] - outside) ** 2 - (confidence[target] - inside) ** 2
        found.append(auc(ratio / variance, members[target]))
    return np.array(found)


def auc(scores: Floats, positive: Members) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _mean(values: Floats, chosen: Members) -> Floats:
    return np.asarray((values * chosen).sum(axis=0) / chosen.sum(axis=0), dtype=np.float64)


def _spread(values: Floats, held: Members, inside: Floats, outside: Floats) -> float:
    residuals = values - np.where(held, inside, outside)
    return max(float(residuals.var()), 1e-12)
