"""The one way in which every command prints a table."""
import textwrap


def format_cell(value):
    """Returns a value as text: [mean, standard deviation] as 1.234 ± 0.005, [mean, low, high] as an interval."""
    if isinstance(value, (list, tuple)):
        if len(value) == 3:
            return f"{value[0]:+.4f} [{value[1]:+.4f}, {value[2]:+.4f}]"
        return f"{value[0]:.3f} ± {value[1]:.3f}" if value[1] else f"{value[0]:.3f}"  # one seed has no deviation
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(head, rows, title="", width=200):
    """Print rows of cells under their column names. Cells are texts, numbers or what `format_cell` takes.

    The first column stands to the left and is cut where a line would be longer than `width`; the others stand to the
    right.
    """
    table = [[format_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    widths[0] = min(widths[0], width - 2 - sum(w + 2 for w in widths[1:]))
    if title:
        print("\n" + textwrap.fill(title, 80) + "\n")
    for first, *others in table:
        if len(first) > widths[0]:
            first = first[:widths[0] - 1] + "…"
        line = "  " + first.ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(others, widths[1:]))
        print(line.rstrip())
