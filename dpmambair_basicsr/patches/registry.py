"""The list of patches to BasicSR, and the decorator that adds to it."""

PATCHES = []  # (owner, attribute, function from the original to its replacement)


def replaces(owner: str, attribute: str):
    """Marks a patch: it receives `owner.attribute` and returns what to put in its place. Docstrings: see `patches`."""

    def note(make):
        PATCHES.append((owner, attribute, make))
        return make

    return note
