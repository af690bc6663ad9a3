"""The one exception of this package: it knows no model, so that everything here may import it."""


class ModelError(ValueError):
    """A model that can't be found, read or trusted. The message names the file or key, what was expected and what was found."""
