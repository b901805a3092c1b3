"""Measures of a space of features: how far, how spread, how many directions, hubs, margins; centred and whitened."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.evals.intervals import means
from multimodal.evals.ranking import Matches, chance_metrics, ranked
from multimodal.parts import Estimate
from multimodal.threads import one_thread

TILE = 256
"""Rows of a matrix of similarities that are there at a time."""
FOLDS = 5


def alignment(
    x: Tensor,  # [n, D] unit norm
    y: Tensor,  # [n, D] unit norm, each the positive of its row of x
) -> Tensor:  # float64 [n]; the mean is the metric
    """Squared distance of the two of every positive pair: 0 is best. Wang and Isola 2020, with their exponent 2."""
    return (x.double() - y.double()).square().sum(dim=1)


def uniformity(
    x: Tensor,  # [n, D] unit norm
    ids: Tensor,  # int64 [n]
    y: Tensor | None = None,  # [m, D] unit norm; x itself if not given, without the pairs of a row and itself
    y_ids: Tensor | None = None,  # int64 [m]; pairs of one id are left out
    tile: int = TILE,
) -> float:
    """The logarithm of the mean Gaussian potential exp(-2 d^2) of pairs: 0 if all lie at one place.

    Lower is more uniform. Many features that lie evenly on a sphere of many dimensions come near to -4, where each pair
    is orthogonal. Lower are only pairs that point apart, which few can at once: -8 for two opposite places, and for two
    modalities of which each is at one of them. Pairs of the same id (captions of one image, an image and its own
    caption) are positives and left out; with ids that all differ and no `y` it is that of Wang and Isola 2020.
    """
    y, y_ids = (x, ids) if y is None or y_ids is None else (y, y_ids)
    total, count = 0.0, 0
    for rows in torch.split(torch.arange(len(x)), tile):
        cosines = x[rows].double() @ y.double().T
        others = ids[rows, None] != y_ids
        total += torch.exp(4 * (cosines - 1))[others].sum().item()  # d^2 = 2 - 2 cos
        count += int(others.sum())
    return math.log(total / count) if count else math.nan


def modality_gap(
    x: Tensor,  # [n, D] unit norm
    y: Tensor,  # [m, D] unit norm
) -> float:
    """The distance of the mean image from the mean text. Liang et al. 2022."""
    return float((x.double().mean(dim=0) - y.double().mean(dim=0)).norm())


def separability(
    x: Tensor,  # [n, D] unit norm
    y: Tensor,  # [n, D] unit norm, each the other modality of its row of x
    folds: int = FOLDS,
) -> Tensor:  # float64 [2n] 1 where the modality was told right: of all x, then of all y
    """Whether a linear classifier tells images from texts that it has not seen: half of them if modalities are mixed.

    Logistic regression, cross-validated over pairs, so that an image and its caption are in one fold. On one thread, as
    a linear probe is fitted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    features = torch.cat([x, y]).double().numpy()
    modality, pair = np.repeat([0, 1], len(x)), np.tile(np.arange(len(x)), 2)
    with one_thread():
        told = cross_val_predict(
            LogisticRegression(max_iter=1000), features, modality, groups=pair, cv=GroupKFold(n_splits=folds)
        )
    return torch.from_numpy(told == modality).double()


def spectrum(
    features: Tensor,  # [n, D]
) -> Tensor:  # float64 [min(n, D)] falling
    """The singular values of the features as they are, not centred: how much of them lies in how many directions."""
    values: Tensor = torch.linalg.svdvals(features.double())
    return values


def effective_rank(
    singular_values: Tensor,  # [k] not negative
) -> float:
    """The number of directions that are used: e to the entropy of the singular values as shares of their sum.

    n for n orthonormal vectors, 1 where all are the same. Roy and Vetterli 2007.
    """
    shares = singular_values.double() / singular_values.double().sum()
    return math.exp(torch.special.entr(shares).sum().item())


def anisotropy(
    features: Tensor,  # [n, D] unit norm
    groups: Tensor | None = None,  # int64 [n], from 0, of samples that are drawn together: the captions of an image
) -> Callable[[Tensor], Tensor]:  # from how often each group is there, float64 [R, G], to float64 [R]
    """The mean cosine of two different samples: 0 if they point everywhere alike, 1 if all are the same.

    Exact, and linear in memory: the squared norm of the sum has all pairs, and the pairs of a sample with itself are
    taken off. Ethayarajh 2019.
    """
    groups = torch.arange(len(features)) if groups is None else groups
    sizes = torch.bincount(groups).double()
    sums = torch.zeros(len(sizes), features.shape[1], dtype=torch.float64).index_add(0, groups, features.double())
    itself = torch.zeros_like(sizes).index_add(0, groups, features.double().square().sum(dim=1))

    def of(counts: Tensor) -> Tensor:
        squares = counts.square()
        return ((counts @ sums).square().sum(dim=1) - squares @ itself) / ((counts @ sizes).square() - squares @ sizes)

    return of


def k_occurrence(
    queries: Tensor,  # [n, D] unit norm
    items: Tensor,  # [m, D] unit norm
    k: int,
    tile: int = TILE,
) -> Tensor:  # int64 [m], in sum n x k
    """How often each item is among the `k` nearest of a query. Radovanovic et al. 2010."""
    counts = torch.zeros(len(items), dtype=torch.int64)
    for rows in torch.split(queries, tile):
        found = (rows @ items.T).topk(k, dim=1, sorted=False).indices
        counts += torch.bincount(found.flatten(), minlength=len(items))
    return counts


def skewness(
    values: Tensor,  # [n]
) -> float:
    """The third standardised moment, as in `scipy.stats.skew`: above 0 where a few are far above all others."""
    centred = values.double() - values.double().mean()
    variance = centred.square().mean().item()
    return centred.pow(3).mean().item() / variance**1.5 if variance > 0 else 0.0


def hubness(
    counts: Tensor,  # int64 [m] from `k_occurrence`
    num_queries: int,
) -> tuple[Estimate, Estimate]:
    """The skewness of how often items are found, and the share of anti-hubs, which never are.

    By chance every query finds any k of the m items, so that counts are binomial. A few hubs that are near to
    everything keep right items from being found.
    """
    share = counts.sum().item() / num_queries / len(counts)  # k / m
    spread = math.sqrt(num_queries * share * (1 - share))
    skewed = Estimate(skewness(counts), chance=(1 - 2 * share) / spread if spread else 0.0, count=len(counts))
    never = (counts == 0).double().mean().item()
    return skewed, Estimate(never, chance=(1 - share) ** num_queries, count=len(counts))


class Margins(NamedTuple):
    """How far each pair is above the hardest negative; NaN where nothing is a negative."""

    image_to_text: Tensor
    """float64 [m], of each caption: the cosine with its image, less that of the wrong caption nearest to the image."""
    text_to_image: Tensor
    """float64 [m], of each caption: the cosine with its image, less that of the wrong image nearest to the caption."""


def margins(
    image_features: Tensor,  # [n, D] unit norm
    text_features: Tensor,  # [m, D] unit norm
    owners: Tensor,  # int64 [m] the image that each caption belongs to
    matches: Matches,  # of images and captions: what is equal to the right one is no negative
    tile: int = TILE,
) -> Margins:
    """Of every pair, against the hardest negative in both directions; below 0 it is not found first."""
    images, texts = image_features.double(), text_features.double()
    to_text = _nearest_wrong(images, texts, matches, tile)[owners]
    to_image = _nearest_wrong(texts, images, matches.reversed, tile)
    pairs = (images[owners] * texts).sum(dim=1)
    return Margins(*((pairs - wrong).masked_fill(wrong.isinf(), torch.nan) for wrong in (to_text, to_image)))


def _nearest_wrong(queries: Tensor, items: Tensor, matches: Matches, tile: int) -> Tensor:
    found = [
        (queries[rows] @ items.T).masked_fill(matches.right(rows), -torch.inf).amax(dim=1)
        for rows in torch.split(torch.arange(len(queries)), tile)
    ]
    return torch.cat(found)


# --- centring and whitening -----------------------------------------------------------------------------------------


def centred(
    features: Tensor,  # [n, D]
    fit: Tensor,  # [m, D] other samples of the same modality
) -> Tensor:  # float64 [n, D] unit norm
    """Without the mean of their modality, which is known from others: closes the gap between the means."""
    return F.normalize(features.double() - fit.double().mean(dim=0), dim=1)


def whitened(
    features: Tensor,  # [n, D]
    fit: Tensor,  # [m, D] other samples of the same modality
) -> Tensor:  # float64 [n, D] unit norm
    """Centred, and with the same variance in every direction, as far as that is known from others.

    By the inverse square root of the covariance, which turns the axes as little as can be (ZCA). The covariance is that
    of Ledoit and Wolf 2004, because there may be fewer samples than dimensions.
    """
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(fit.double().numpy())
    variances, directions = torch.linalg.eigh(torch.from_numpy(np.asarray(covariance)))
    inverse_root = directions * variances.clamp(min=1e-12).rsqrt() @ directions.T
    return F.normalize((features.double() - fit.double().mean(dim=0)) @ inverse_root, dim=1)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "r1": lambda features, fit: features,
    "r1_centred": centred,
    "r1_whitened": whitened,
}


def retrieval_after(
    image_features: Tensor,  # [n, D] unit norm
    text_features: Tensor,  # [m, D] unit norm
    owners: Tensor,  # int64 [m] the image that each caption belongs to
    matches: Matches,  # of images and captions
    seed: int = 0,
) -> dict[str, Estimate]:
    """R@1 in both directions as it is, centred and whitened: `i2t_r1`, `t2i_r1_whitened`.

    Means and covariances are those of one half of the images and their captions, all numbers those of the other half.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(image_features)))
    fit, kept = order[: len(order) // 2], order[len(order) // 2 :].sort().values
    place = torch.full((len(order),), -1).index_put((kept,), torch.arange(len(kept)))
    there = place[owners] >= 0
    new_owners = place[owners[there]]
    to_text = Matches.of(new_owners, matches.images[kept], matches.texts[there])
    chance = tuple(
        chance_metrics(one.counts, size)["r1"]
        for one, size in ((to_text, len(new_owners)), (to_text.reversed, len(kept)))
    )
    metrics: dict[str, Estimate] = {}
    for name, change in CHANGES.items():
        images = change(image_features[kept], image_features[fit])
        texts = change(text_features[there], text_features[~there])
        i2t, t2i = ranked(images, texts, to_text)[0] == 1, ranked(texts, images, to_text.reversed)[0] == 1
        metrics |= means({f"i2t_{name}": i2t}, {f"i2t_{name}": chance[0]})
        metrics |= means({f"t2i_{name}": t2i}, {f"t2i_{name}": chance[1]}, groups=new_owners)
    return metrics
