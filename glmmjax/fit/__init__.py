"""From an objective to judged estimates, for one dataset or many at a time.

`optimise` is the search; `problem` the steps of a single fit, with `glmm` and `lmm` its two kinds; `lanes` and `batch`
fit many datasets in one program; `shards` divides one over devices; `implicit` is a fit inside a program;
`separation` finds what the data do not determine; `control` the user's settings.
"""
