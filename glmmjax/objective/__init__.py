"""-2 log-likelihood at a point: pure functions of a design, the same alone, in lanes and in the user's programs.

`pirls` finds modes; `laplace` and `quadrature` integrate; `pls` is the exact criterion of linear models.
"""
