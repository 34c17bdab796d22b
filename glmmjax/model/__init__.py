"""Arrays, terms and parameters of a model.

`design` holds the arrays (`Design`); `covariance` the structures of random-effects terms; `basis` the internal
coordinates of theta; `parameters` the vector x of all parameters: where each is (`Layout`) and in which units
(`Scaling`); `rows` the sums over rows; `frames` makes a design of a model frame; `buckets` pads designs
to few shapes.
"""
