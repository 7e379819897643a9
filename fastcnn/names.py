"""Names that a user types: look one up, or say what he may have meant."""

import difflib


def check_name(what, name, known):
    """Raise ValueError unless `name` is one of `known`; the message suggests the nearest.

    Args:
        what: what is being named, for the message ("model", "data set").
        name: the name given.
        known: the names there are.
    """
    if name in known:
        return
    nearest = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}there are {', '.join(known)}")
