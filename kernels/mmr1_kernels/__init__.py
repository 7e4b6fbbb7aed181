"""Scoring kernels of mmr1_ds: statistics of groups of sampled responses. The package needs numpy only."""

from mmr1_kernels.edit_distance import mean_edit_distance
from mmr1_kernels.ops import group_statistics
from mmr1_kernels.records import GroupStatistics

__all__ = ["GroupStatistics", "group_statistics", "mean_edit_distance"]
