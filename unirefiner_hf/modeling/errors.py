"""The one base of every error that is the user's to mend."""


class UniRefinerError(ValueError):
    """Something the user gave cannot be used; the message names it and the fix.

    Every error of this package that a change of input mends is one of these. Anything else
    that is raised is a defect of the package.
    """


class WrongKindError(UniRefinerError, TypeError):
    """An object of another kind than those that are taken."""


class MissingLibraryError(UniRefinerError, ImportError):
    """A library, or a version of one, that has to be installed first."""


__all__ = ["MissingLibraryError", "UniRefinerError", "WrongKindError"]
