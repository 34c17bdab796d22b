"""Errors a user can cause, each one clear sentence with the remedy."""


class FormulaError(ValueError):
    """The formula cannot be parsed or does not describe a mixed model."""


class DataError(ValueError):
    """The data do not suit the model: the message names the column, what was found and what to do."""
