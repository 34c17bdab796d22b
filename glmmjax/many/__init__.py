"""One model on many datasets or responses; `fit_many`, at the top, is the entry.

`sources` says where datasets come from, `data` and `responses` make them arrays of one shape; `results` holds the
estimates (`ManyFits`), `partial` their file, `multiple` adjusts p-values; `refits` fits a model to many new responses.
"""
