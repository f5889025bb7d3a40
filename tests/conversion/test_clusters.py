"""Clusters of equal size, against a loop over pairs."""

import pytest
import torch

from sparsekern.conversion.clusters import balanced_clusters, filled


def pair_by_pair(similarity: torch.Tensor, capacity: int) -> list[int]:
    """Join the most similar pair of a free point and a cluster with room, again and again."""
    points, clusters = similarity.shape
    found, room = [-1] * points, [capacity] * clusters
    pairs = sorted((-float(similarity[p, c]), p, c) for p in range(points) for c in range(clusters))
    for _, point, cluster in pairs:
        if found[point] < 0 and room[cluster]:
            found[point], room[cluster] = cluster, room[cluster] - 1
    return found


@pytest.mark.parametrize(("points", "clusters"), [(1, 1), (6, 2), (12, 4), (60, 5), (8, 8)])
def test_filled_as_pair_by_pair(points, clusters):
    similarity = torch.rand(points, clusters, generator=torch.Generator().manual_seed(points))
    assert filled(similarity, points // clusters).tolist() == pair_by_pair(similarity, points // clusters)


def test_points_that_belong_together_are_found():
    generator = torch.Generator().manual_seed(3)
    truth = torch.randperm(40, generator=generator) % 4
    directions = torch.eye(4).repeat_interleave(5, dim=1)
    features = directions[truth] * torch.rand(40, 1, generator=generator).add(0.5)
    features += 0.05 * torch.rand(40, 20, generator=generator)
    found = balanced_clusters(features, 4, seed=1)
    assert all(len(set(truth[found == cluster].tolist())) == 1 for cluster in range(4))


def test_every_cluster_has_the_same_size_whatever_the_points():
    features = torch.zeros(24, 6)
    features[:9] = torch.rand(9, 6, generator=torch.Generator().manual_seed(0))  # and points that are nowhere
    for seed in range(3):
        assert torch.bincount(balanced_clusters(features, 6, seed=seed), minlength=6).tolist() == [4] * 6
