"""Formula and table to labelled arrays, without JAX.

`parse` reads formulas; `columns` reads tables; `evaluate` computes what a formula names, with `transforms` and
`contrasts`; `matrix` codes terms as columns; `frame` makes a `ModelData` of all of it, which is what others take.
"""
