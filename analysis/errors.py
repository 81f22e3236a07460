"""What goes wrong with a table or a fit, said in one line for the person who asked."""


class TableError(ValueError):
    """The table can't be used as it is: a missing column, a value that isn't a positive number, no rows left."""


class FitRefused(ValueError):
    """A fit that the data can't support, with the reason; the report lists it instead of a number."""
