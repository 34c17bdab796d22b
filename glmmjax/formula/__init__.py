"""Formula and table to labelled arrays, without JAX.

Each module imports those named before it alone: `syntax` reads text as a tree, `terms` expands right-hand sides,
`parse` makes a `Formula` with bars of both; `columns` reads tables; `expressions` computes what a formula names and
`functions` what it calls, with `transforms` and `contrasts`; `variables` are response, weights, offset and subset;
`matrix` codes terms as columns; `model_data` is the result, which others take, and `frame.build` makes it.
"""
