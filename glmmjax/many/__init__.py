"""One model on many datasets or responses.

`fit_many` is the entry; `data` and `responses` are its sources; `refits` fits a model to many new responses.
"""
