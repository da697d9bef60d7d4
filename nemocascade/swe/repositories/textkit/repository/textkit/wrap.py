"""Lines of a limited width."""


def wrap(text, width):
    """Lines of at most `width` characters, broken at spaces; a longer word has its own line."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if len(longer) <= width or not line:
            line = longer
        else:
            lines.append(line)
            line = word
    if line:
        lines.append(line)
    return lines


def indent(lines, depth):
    """The lines with `depth` spaces before each; empty ones stay empty."""
    return [" " * depth + line if line else line for line in lines]
