"""Amounts as text and as cents."""


def parse(text):
    """The cents of a text such as `12.50` or `-3`. Raises ValueError for other texts."""
    sign = -1 if text.startswith("-") else 1
    whole, _, part = text.removeprefix("-").partition(".")
    if not whole.isdigit() or (part and (not part.isdigit() or len(part) > 2)):
        raise ValueError(f"{text!r} is no amount")
    return sign * (int(whole) * 100 + int(part.ljust(2, "0") or 0))


def show(cents):
    """The text of an amount, always with two digits after the point."""
    sign = "-" if cents < 0 else ""
    whole, part = divmod(abs(cents), 100)
    return f"{sign}{whole}.{part:02d}"
