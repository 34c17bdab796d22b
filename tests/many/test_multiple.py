"""Adjusted p-values against SciPy and by hand."""

from __future__ import annotations

import numpy as np
import scipy.stats

from glmmjax.many.multiple import adjusted


def test_adjusted_p_values():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.2, 0.5])
    known = ~np.isnan(p)
    np.testing.assert_allclose(adjusted(p, "BH")[known], scipy.stats.false_discovery_control(p[known], method="bh"))
    np.testing.assert_allclose(adjusted(p, "bonferroni")[known], np.minimum(5 * p[known], 1.0))
    np.testing.assert_allclose(adjusted(p, "holm")[known], [0.05, 0.12, 0.12, 0.4, 0.5])
    np.testing.assert_array_equal(adjusted(p, "none"), p)
