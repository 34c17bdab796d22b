"""One model on many datasets or responses.

`fit_many` is the entry and `results` what it returns; `sources` are its datasets, of a table (`data`) or of one design
(`responses`); `partial` keeps what is done; `refits` fits a model to many new responses.
"""
