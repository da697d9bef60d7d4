"""Lines of a settings file."""


class Broken(ValueError):
    """A line that is none of the known forms."""


def strip_comment(line):
    """The line without its comment, which starts with `#` outside of quotes."""
    quoted = False
    for at, char in enumerate(line):
        if char == '"':
            quoted = not quoted
        elif char == "#" and not quoted:
            return line[:at].rstrip()
    return line.rstrip()


def read_value(text):
    """A number, true or false, or a text; quotes keep a text as it stands."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return text
