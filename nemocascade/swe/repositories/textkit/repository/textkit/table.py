"""Tables of aligned columns."""


def widths(rows):
    """The width of each column: of its longest cell."""
    return [max(len(cell) for cell in column) for column in zip(*rows)]


def table(rows, gap=2):
    """Rows of cells as lines; columns stand `gap` spaces apart, and no line ends with a space."""
    if not rows:
        return []
    space = widths(rows)
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, space)]
        lines.append((" " * gap).join(cells).rstrip())
    return lines
