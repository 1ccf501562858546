from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import nn

from framp_core.layout import ParameterLayout
from framp_core.mask_statistics import jaccard_matrix, mask_statistics


@given(arrays(bool, (4, 37)))
def test_jaccard_is_intersection_over_union(masks: np.ndarray) -> None:
    matrix = jaccard_matrix(np.packbits(masks, axis=1))
    for row in range(4):
        for column in range(4):
            ones, others = set(np.flatnonzero(masks[row])), set(np.flatnonzero(masks[column]))
            expected = len(ones & others) / len(ones | others) if ones | others else 1.0
            assert matrix[row, column] == pytest.approx(expected)


def test_statistics_by_hand() -> None:
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))  # 4 + 2 and 2 + 1 parameters
    full = np.ones(9, bool)
    half = np.array([1, 1, 0, 0, 1, 1, 0, 1, 1], bool)
    statistics = mask_statistics(layout, [("b", Fraction(1), full), ("a", Fraction(1, 2), half)])
    assert [layer["size"] for layer in statistics["layers"]] == [4, 2]
    assert statistics["selection"] == {"1/2": [0.5, 0.5], "1": [1.0, 1.0]}
    assert statistics["clients"] == ["a", "b"]
    assert statistics["overlap"] == [[1.0, 0.5], [0.5, 1.0]]
