"""Names in other forms."""


def slug(text):
    """Small letters and digits, other characters become one hyphen, none at the ends."""
    out = ""
    for char in text.lower():
        if char.isalnum():
            out += char
        elif out and not out.endswith("-"):
            out += "-"
    return out.rstrip("-")


def camel(text):
    """The words of a slug joined, each but the first with a capital."""
    first, *rest = slug(text).split("-")
    return first + "".join(word.capitalize() for word in rest)


def unique(names):
    """The names, where one that came before gets a number: `a`, `a-2`, `a-3`."""
    seen, out = {}, []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return out
