"""Arrays, terms and parameters of a model.

`design` holds the arrays (`Design`); `covariance` the structures of random-effects terms; `basis` the internal
coordinates of theta; `rows` the sums over rows; `buckets` pads designs to few shapes.
"""
