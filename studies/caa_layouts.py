"""Which arrangements of CAA's convolutions have the parameters and MACs that the thesis prints?

    python studies/caa_layouts.py            # those within 1 % of both numbers
    python studies/caa_layouts.py --within 3

Table 3.5 prints what CAA adds to a head with D = 512 on 64 x 64 positions and 150 classes: 3.60 to 3.61 M parameters and, for
three of four hosts, 13.04 to 13.05 G of convolutions. All of 3.6 M on the 4096 positions would be 14.7 G, so some act on the class
centres. Tried is: F' of width D' < D, two convolutions a and b of F, and for each of the two contexts as in OCR's object
attention: up to two convolutions before the association, up to two of the centres, one of the mixed centres (the value), one
after it, one that joins the result with F, with F' or with nothing (the bottleneck); then the fusion with F, and the second
classifier. All projections have width D'. Convolutions have a batch norm; a, b and the classifier have a bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from study import markdown, parser

POSITIONS, CLASSES, WIDTH = 64 * 64, 150, 512
PARAMETERS, MACS = 3.603e6, 13.05e9  # means of the printed differences
NARROW = (32, 64, 128, 256, 512)  # widths of a and b

Layout = tuple[int, int, int, int, bool, bool, str]


def layouts() -> Iterator[Layout]:
    """D', width of a and b, convolutions of a context, of the centres, whether of the value, after, and what joins."""
    for width, narrow, before, centres, value, after, joined in itertools.product(
        range(64, WIDTH, 32), NARROW, range(3), range(3), (False, True), (False, True), ("no", "alone", "F", "F'")
    ):
        if bool(before) == bool(centres):  # both sides of the association live in one space
            yield width, narrow, before, centres, value, after, joined


def size(layout: Layout) -> tuple[int, int]:
    """Parameters and MACs that a layout adds."""
    width, narrow, before, centres, value, after, joined = layout
    beside = {"alone": 0, "F": WIDTH, "F'": width}
    on_positions = [width * width] * (before + after) + ([] if joined == "no" else [(width + beside[joined]) * width])
    on_centres = [width * width] * (centres + value)
    fused, classifier, affinity = (WIDTH + 2 * width) * WIDTH, WIDTH * CLASSES, 2 * WIDTH * narrow
    positions = WIDTH * width + affinity + 2 * sum(on_positions) + fused + classifier
    norms = 2 * (width + 2 * width * (len(on_positions) + len(on_centres)) + WIDTH)
    parameters = positions + 2 * sum(on_centres) + norms + 2 * narrow + CLASSES
    return parameters, POSITIONS * positions + 2 * CLASSES * sum(on_centres)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--within", type=float, default=1, help="percent that either number may be off")
    a = options.parse_args(argv)
    found = []
    tried = list(layouts())
    for layout in tried:
        parameters, macs = size(layout)
        off = [100 * (own / printed - 1) for own, printed in ((parameters, PARAMETERS), (macs, MACS))]
        if max(map(abs, off)) <= a.within:
            found.append((sum(map(abs, off)), layout, parameters, macs, off))
    head = ["D'", "a, b", "before", "centres", "value", "after", "joined with", "M parameters", "off", "GMACs", "off"]
    body = [
        [*layout, f"{parameters / 1e6:.3f}", f"{off[0]:+.2f} %", f"{macs / 1e9:.3f}", f"{off[1]:+.2f} %"]
        for _, layout, parameters, macs, off in sorted(found, key=lambda each: each[0])
    ]
    print("\n".join(markdown(head, body)))
    print(f"\n{len(found)} of {len(tried)} layouts are within {a.within:g} % of both numbers.")


if __name__ == "__main__":
    main()
