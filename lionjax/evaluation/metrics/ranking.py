# SPDX-License-Identifier: Apache-2.0
"""Metrics of ranked candidates: Visual Dialog's retrieval figures and NDCG (arXiv 1611.08669)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_ranks(scores_S: np.ndarray) -> np.ndarray:
    """Ranks from 1, the highest score first; equal scores share the mean of their ranks. Array (S,)."""
    scores_S = np.asarray(scores_S, np.float64)
    above_S = (scores_S[None, :] > scores_S[:, None]).sum(axis=1)
    equal_S = (scores_S[None, :] == scores_S[:, None]).sum(axis=1)
    return above_S + (equal_S + 1) / 2


def retrieval_scores(ranks_B: Sequence[float]) -> dict[str, float]:
    """R@1, R@5, R@10 and MRR in 0..1, and the mean rank, under the names of VisDial's starter code."""
    ranks = np.asarray(ranks_B, np.float64)
    recalls = {f"r@{k}": float(np.mean(ranks <= k)) for k in (1, 5, 10)}
    return recalls | {"mean": float(ranks.mean()), "mrr": float(np.mean(1 / ranks))}


def ndcg(scores_S: np.ndarray, relevance_S: np.ndarray) -> float:
    """NDCG over the first k candidates, where k is the number of candidates with a relevance above 0; 0..1."""
    relevance_S = np.asarray(relevance_S, np.float64)
    k = int((relevance_S > 0).sum())
    if not k:
        return 0.0
    discount_K = 1 / np.log2(np.arange(k) + 2)
    order = np.argsort(-np.asarray(scores_S, np.float64), kind="stable")[:k]
    return float((relevance_S[order] * discount_K).sum() / (np.sort(relevance_S)[::-1][:k] * discount_K).sum())
