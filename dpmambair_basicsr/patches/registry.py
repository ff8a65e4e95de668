"""The list of patches of BasicSR, and the decorator that adds to it."""

PATCHES = []  # (owner, attribute, function from the original to its replacement)


def replaces(owner: str, attribute: str):
    """Registers a patch: a function from `owner.attribute` to its replacement. For its docstring, see `patches`."""

    def note(make):
        PATCHES.append((owner, attribute, make))
        return make

    return note
