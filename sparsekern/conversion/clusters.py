"""Clusters of equal size: k-means whose clusters have a capacity."""

from __future__ import annotations

import torch
from torch.nn import functional as F

ITERATIONS = 10  # the assignment changes little afterwards


def balanced_clusters(features: torch.Tensor, count: int, *, seed: int = 0) -> torch.Tensor:
    """Divide points into clusters of equal size by the cosine of their features.

    The clusters begin at random points. Each iteration fills them again, see `filled`, and moves each centre to the mean of its points.

    Args:
        features: `[points, features]` float; a row of zeros belongs nowhere, and fills the remaining places.
        count: the number of clusters, a divisor of `points`.
        seed: seed of the first centres.

    Returns:
        The cluster of each point, `[points]` int64.
    """
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(features, dim=1)
    first = torch.randperm(len(features), generator=generator)[:count]
    centres = features[first.to(features.device)]
    before = None
    for _ in range(ITERATIONS):
        clusters = filled(features @ F.normalize(centres, dim=1).T, len(features) // count)
        if before is not None and torch.equal(clusters, before):
            break
        members = F.one_hot(clusters, count).to(features.dtype)
        centres, before = members.T @ features, clusters
    return clusters


def filled(similarity: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return the cluster of each point, as if the most similar free pair of a point and a cluster with room were joined again and again.

    It is found by deferred acceptance: each point asks its most similar cluster, and full clusters keep their most similar points.

    Args:
        similarity: `[points, clusters]`.
        capacity: points in a cluster; all clusters together hold all points.

    Returns:
        `[points]` int64.
    """
    points, clusters = similarity.shape
    wishes = similarity.argsort(dim=1, descending=True, stable=True)
    asked = torch.zeros(points, dtype=torch.int64, device=similarity.device)  # how many wishes of a point were refused
    everyone = torch.arange(points, device=similarity.device)
    while True:
        wanted = wishes[everyone, asked]
        liking = similarity[everyone, wanted]
        order = liking.argsort(descending=True, stable=True)
        order = order[wanted[order].argsort(stable=True)]  # by cluster, the most similar first
        sizes = torch.bincount(wanted, minlength=clusters)
        starts = sizes.cumsum(0) - sizes
        rank = everyone - starts[wanted[order]]
        refused = order[rank >= capacity]
        if not len(refused):
            return wanted
        asked[refused] += 1
