"""How every command prints a table, a gate as bars, and a text that was written elsewhere."""
import textwrap
import unicodedata

from lora import EXPERTS


def format_cell(value):
    """Returns a cell as text: [mean, deviation] as 1.234 ± 0.005, [mean, low, high] with its interval in brackets."""
    if isinstance(value, (list, tuple)):
        if len(value) == 3:
            return f"{value[0]:+.4f} [{value[1]:+.4f}, {value[2]:+.4f}]"
        return f"{value[0]:.3f} ± {value[1]:.3f}" if value[1] else f"{value[0]:.3f}"  # one seed has no deviation
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(head, rows, title="", width=200, left=(0,)):
    """Print rows of cells under their column names. A cell is a string, a number or a list that `format_cell` takes.

    The columns whose numbers are in `left` are aligned left, the others right. Where a line would be longer than
    `width`, the first column is cut.
    """
    table = [[format_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    widths[0] = min(widths[0], width - 2 - sum(w + 2 for w in widths[1:]))
    if title:
        print("\n" + textwrap.fill(title, 80) + "\n")
    for first, *others in table:
        if len(first) > widths[0]:
            first = first[:widths[0] - 1] + "…"
        cells = [first, *others]
        line = "".join("  " + (cell.ljust(w) if i in left else cell.rjust(w))
                       for i, (cell, w) in enumerate(zip(cells, widths)))
        print(line.rstrip())


def format_gate(gate, width=16):
    """Returns a gate (E,) as five lines, one for each trait, with bars relative to the largest weight."""
    largest, lines = max(gate.tolist()), []
    for e in range(0, len(EXPERTS), 2):
        trait = EXPERTS[e].partition("_")[2]
        high, low = (f"{pole:>6} {'█' * round(width * weight / largest):<{width}} {weight:.2f}"
                     for pole, weight in zip(("high", "low"), gate[e:e + 2].tolist()))
        lines.append(f"  {trait:<17}{high} {low}")
    return "\n".join(lines)


REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # embeddings, overrides, isolates, ends


def printable(text):
    """Returns a text without control characters, which could change the terminal's state, without those that change the
    direction of writing, and without halves of characters (surrogates), which cannot be written. All others stay:
    no-break spaces, and the joiners of Persian words and of emoji."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")
                   and unicodedata.bidirectional(c) not in REORDERING)
