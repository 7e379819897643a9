"""The page of all networks: what each is made of and, where it was measured, how fast it trains.

    make results        (python -m fastcnn.benchmarks.gallery)

The page benchmarks/results/models.md and its plot are made here by `fastcnn.study.gallery`, from the networks
themselves and from the result rows. A test compares the names, and the lines of some of them.
"""

from dataclasses import astuple
from pathlib import Path

from fastcnn.benchmarks import plots
from fastcnn.benchmarks.rows import read_rows
from fastcnn.study import gallery

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "models.md"
PLOT = "plots/models.svg"


def page(facts):
    """The text of the page.

    Args:
        facts: of `gallery.gallery`.
    """
    head, *lines = gallery.table(facts)
    return "\n".join(
        [
            f"# The {len(facts)} networks of `fastcnn.models`",
            "",
            f"Counted, with images of the paper's size. {gallery.MEANING} {gallery.SPEEDS}",
            "`fastcnn models` prints this table, `fastcnn study summary NAME` counts a network layer by layer.",
            "",
            f"![networks by multiply-adds, parameters and memory]({PLOT})",
            "",
            line(head),
            f"| :-- |{' --: |' * (len(head) - 1)}",
            *map(line, lines),
            "",
        ]
    )


def line(cells):
    """A line of the page's table."""
    return f"| {' | '.join(cells)} |"


def digest(facts):
    """A hash of what the plot shows, which its file carries."""
    return plots.digest([list(astuple(one)) for one in facts])


def main(folder=RESULTS, pattern="*"):
    """Write page and plot into a folder of result files."""
    facts = gallery.gallery(pattern, read_rows(folder), progress=True)
    (folder / PAGE).write_text(page(facts))
    if plots.digest_in(folder / PLOT) != digest(facts):
        plots.save(gallery.plot(facts), folder / PLOT, digest(facts))
    for name in (PAGE, PLOT):
        print(f"{folder.parent.name}/{folder.name}/{name}")


if __name__ == "__main__":
    main()
