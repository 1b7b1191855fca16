"""Small charts in SVG, drawn by hand. Their colours are those of a page's style, report.css."""

import html
import math

import run

SIDES = [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)]  # around a point
WIDTH, TOP, BELOW = 360, 22, 36  # of a chart, above its panel and below it
LETTER = 6.6  # the width of one, at report.css's size


def escaped(text):
    """Text that a browser shows as it is, marks of direction included."""
    return html.escape(run.visible(text))


def number(value, digits=3):
    """Three digits or more, the whole part whole, without a 0 before the point."""
    digits = max(digits, len(f"{abs(value):.0f}")) if abs(value) < 1e6 else digits
    text = f"{value:.{digits}g}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and "e" not in text else text


def meet(a, b):
    """Whether two boxes (left, low, right, high) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def free_place(taken, point, size, gap, inside):
    """Where a point's label goes -> the centre (x, y) of a box of this size (width, height) that
    lies inside the box `inside` and meets no box in `taken`, as near as there is one. The box is
    added to `taken`. gap: the least distance from the point."""
    (x, y), (width, height) = point, size
    left, low, right, high = inside
    for distance in range(1, 40):
        for across, up in SIDES:
            far = gap * distance
            centre = x + across * (width / 2 + far), y + up * (height / 2 + far)
            corner = centre[0] - width / 2, centre[1] - height / 2
            box = *corner, corner[0] + width, corner[1] + height
            within = left <= box[0] and low <= box[1] and box[2] <= right and box[3] <= high
            if within and not any(meet(box, other) for other in taken):
                taken.append(box)
                return centre
    return point


def ticks(low, high, most=6):
    """{value: its label} of the multiples from low to high of 1, 2 or 5 times a power of ten: at
    most `most` + 1."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10) if high - low <= 1.0001 * power * k * most)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    digits = 2 + math.floor(math.log10(max(abs(low), abs(high)) / step))  # to tell them apart
    return {i * step: number(i * step, max(3, digits)) for i in range(first, last + 1)}


def reach(values, margin=0.05):
    """The range of an axis that shows all values."""
    low, high = min(values), max(values)
    free = margin * ((high - low) or abs(high) or 1.0)
    return low - free, high + free


class Chart:
    """Marks in data coordinates. x, y: the ranges of the axes; right: of a second y axis; names:
    the words at y = 0, -1, -2, ... in place of numbers; above: what the y axis shows."""

    def __init__(self, x, y, below, above="", right=None, names=(), height=230):
        self.x, self.y, self.height = x, y, height
        names = [run.one_line(name, most=14) for name in names]
        rows = {-i: name for i, name in enumerate(names)} or ticks(*y)
        self.left = 14 + LETTER * max(map(len, rows.values()))
        self.end = WIDTH - (44 if right else 14)
        self.low = height - BELOW
        self.parts, self.points = [], []
        for value, words in ticks(*x).items():
            across, _ = self.place(value, y[0])
            self.parts.append(f'<path class="grid" d="M{across:.1f} {TOP}V{self.low}"/>')
            self.text(across, self.low + 14, words, "middle")
        for value, words in rows.items():
            _, up = self.place(x[0], value)
            self.parts.append(f'<path class="grid" d="M{self.left:.1f} {up:.1f}H{self.end}"/>')
            self.text(self.left - 5, up + 4, words, "end")
        for value, words in ticks(*right).items() if right else ():
            self.text(self.end + 5, self.place(x[0], value, right)[1] + 4, words)
        self.text((self.left + self.end) / 2, height - 5, below, "middle")
        if above:
            self.text(self.left, 13, above)

    def place(self, x, y, axis=None):
        """Data -> a point of the picture. axis: the range of the y axis, if it is another one."""
        low, high = axis or self.y
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - low) / (high - low)
        return self.left + across * (self.end - self.left), self.low - up * (self.low - TOP)

    def text(self, x, y, words, anchor="start", kind="word"):
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{kind}" {place}>{escaped(words)}</text>')

    def line(self, xs, ys, kind, axis=None):
        """A line through points. kind: classes of report.css, such as "c0 pale"."""
        points = [self.place(x, y, axis) for x, y in zip(xs, ys, strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="line {kind}" d="M{path}"/>')

    def dot(self, x, y, kind, label="", across=0.0, up=0.0):
        """A point and its label. across, up: the half-widths of its intervals."""
        for dx, dy in ((across, 0.0), (0.0, up)):
            if dx or dy:
                self.line([x - dx, x + dx], [y - dy, y + dy], f"{kind} bar")
        point = self.place(x, y)
        self.parts.append(f'<circle class="{kind}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="4"/>')
        self.points.append((point, run.one_line(label, most=14), kind))

    def svg(self, summary):
        """The picture. summary: what it says to those who cannot see it."""
        taken = [(x - 5, y - 5, x + 5, y + 5) for (x, y), _, _ in self.points]
        inside = self.left, TOP, self.end, self.low
        for point, label, kind in self.points:
            if label:
                x, y = free_place(taken, point, (LETTER * len(label), 13), 8, inside)
                self.text(x, y + 4, label, "middle", f"word {kind}")
        size = f'viewBox="0 0 {WIDTH} {self.height}"'
        picture = "".join(self.parts)
        return f'<svg {size} role="img" aria-label="{escaped(summary)}">{picture}</svg>'
