"""The one base of every error that is the user's to mend."""


class UniRefinerError(ValueError):
    """Something the user gave cannot be used; the message names it and the fix.

    Every error of this package that a change of input mends is one of these. Anything else
    that is raised is a defect of the package.
    """


__all__ = ["UniRefinerError"]
