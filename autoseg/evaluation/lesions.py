"""Lesions: the connected components of a label, and which of a prediction are those of a reference.

The rule of matching. Components are connected through faces, edges or corners (26 neighbours in 3D, 8 in 2D). Two
components, one of the prediction and one of the reference, may match if their intersection over union is at least a
minimum. Each matches at most one other; of all ways to match them the one with the largest sum of intersections over
unions is taken. So a prediction that runs two lesions into one finds at most one of them, and of a lesion that is
predicted in two pieces at most one piece is right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from autoseg.evaluation.metrics import Counts


def count_lesions(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], *, min_iou: float) -> Counts:
    """Counts components: `overlap` are the pairs that match.

    Dice, recall and precision of these counts are the F1, recall and precision of lesions.

    Args:
        prediction: any number of axes.
        reference: the same shape.
        min_iou: intersection over union from which two components may match, above 0.
    """
    neighbours = np.ones((3,) * reference.ndim, bool)
    found, n_found = ndimage.label(prediction, neighbours)
    wanted, n_wanted = ndimage.label(reference, neighbours)
    n_matched = 0
    if n_found and n_wanted:
        both = prediction & reference
        pairs = (found[both] - 1, wanted[both] - 1)
        shape = (n_found, n_wanted)
        overlap = sparse.coo_array((np.ones(len(pairs[0]), np.int64), pairs), shape).tocsr().tocoo()
        found_sizes, wanted_sizes = np.bincount(found[prediction])[1:], np.bincount(wanted[reference])[1:]
        union = found_sizes[overlap.row] + wanted_sizes[overlap.col] - overlap.data
        ious = overlap.data / union
        allowed = ious >= min_iou
        n_matched = _count_matches(ious[allowed], overlap.row[allowed], overlap.col[allowed])
    return Counts(overlap=n_matched, predicted=int(n_found), reference=int(n_wanted))


def _count_matches(weights: NDArray[np.float64], rows: NDArray[np.integer], columns: NDArray[np.integer]) -> int:
    """Pairs in the matching of rows and columns that has the largest sum of weights.

    Args:
        weights: (pairs,), positive.
        rows: (pairs,), from 0.
        columns: (pairs,), from 0.
    """
    # Most have no choice but each other; matching the others takes time with the square of their number.
    is_only = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)
    if is_only.all():
        return len(weights)
    weights, rows, columns = weights[~is_only], rows[~is_only], columns[~is_only]
    _, rows = np.unique(rows, return_inverse=True)
    n_rows, n_columns = int(rows.max()) + 1, int(columns.max()) + 1
    # scipy matches every row. So each gets a column of its own, which stands for no match; and since scipy takes a
    # weight of 0 for no edge, every edge weighs 1 more, which adds the same to all matchings.
    unmatched = np.arange(n_rows)
    data = np.concatenate([1 + weights, np.ones(n_rows)])
    # Older versions of scipy match with indices of four bytes only.
    places = [np.concatenate(parts).astype(np.int32) for parts in ((rows, unmatched), (columns, n_columns + unmatched))]
    edges = sparse.coo_array((data, tuple(places)), (n_rows, n_columns + n_rows))
    matched = min_weight_full_bipartite_matching(edges.tocsr(), maximize=True)[1]
    return int(np.count_nonzero(is_only) + np.count_nonzero(matched < n_columns))
