"""Clean against robust accuracy as a picture: a point a model with both 95 % intervals, and the models that no other
beats in both."""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 330  # of the picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 12, 40  # margins
LETTER, LINE = 6.7, 15  # width and height of a letter of a label
LINKED = 300  # models up to which every point has its interval, name and link; of more, those on the front


@dataclass(frozen=True)
class Point:
    """A model. clean, robust: (value, lower, upper) in percent. path: of its page."""

    name: str
    path: str
    clean: tuple[float, float, float]
    robust: tuple[float, float, float]

    @property
    def words(self) -> str:
        """The point for those who do not see it."""
        return f"{self.name}: clean {_spoken(self.clean)}, robust {_spoken(self.robust)}"


@dataclass(frozen=True)
class Mark:
    """A point in the picture, in pixels.

    Attributes:
        point: the model.
        x, y: its centre.
        left, right, low, high: ends of its intervals.
        label: where its name stands, (x, y, anchor).
        front: whether no other model beats it in both accuracies.
        named: whether the name is always seen.
        linked: whether it leads to the model.
    """

    point: Point
    x: float
    y: float
    left: float
    right: float
    low: float
    high: float
    label: tuple[float, float, str]
    front: bool
    named: bool
    linked: bool


@dataclass(frozen=True)
class Scatter:
    """The picture of a leaderboard. robust: what the vertical axis is; points: in the order of the leaderboard."""

    robust: str
    points: tuple[Point, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        """The models that no other beats or equals in one accuracy and beats in the other, by clean accuracy."""
        found: list[Point] = []
        best = -1.0
        for point in sorted(self.points, key=lambda p: (-p.clean[0], -p.robust[0])):
            if point.robust[0] > best or (found and _same(point, found[-1])):
                found.append(point)
                best = point.robust[0]
        return tuple(reversed(found))

    @property
    def view(self) -> "View":
        """The axes."""
        return View(
            _reach(min(p.clean[1] for p in self.points), max(p.clean[2] for p in self.points)),
            _reach(min(p.robust[1] for p in self.points), max(p.robust[2] for p in self.points)),
        )

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What is drawn, those on the front last: above the others."""
        view, front = self.view, set(self.front)
        few = len(self.points) <= LINKED
        taken = [(view.x(p.clean[0]) - 5, view.y(p.robust[0]) - 5, 10.0, 10.0) for p in front]
        ordered = sorted(self.points, key=lambda point: point in front)
        return tuple(_mark(point, view, point in front, few, taken) for point in ordered)

    @property
    def line(self) -> str:
        """The front as the steps of a path: what is reached by one of its models at least."""
        view = self.view
        corners = [(view.x(p.clean[0]), view.y(p.robust[0])) for p in self.front]
        steps = [f"M{LEFT},{corners[0][1]:.1f}"]
        for number, (x, y) in enumerate(corners):
            following = corners[number + 1][1] if number + 1 < len(corners) else HEIGHT - BOTTOM
            steps.append(f"L{x:.1f},{y:.1f}L{x:.1f},{following:.1f}")
        return "".join(steps)


@dataclass(frozen=True)
class View:
    """What the axes reach, in percent."""

    across: tuple[float, float]
    up: tuple[float, float]

    def x(self, value: float) -> float:
        """Place of a clean accuracy."""
        first, last = self.across
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Place of a robust accuracy."""
        first, last = self.up
        return HEIGHT - BOTTOM - (value - first) / (last - first) * (HEIGHT - TOP - BOTTOM)

    @property
    def ticks_across(self) -> list[tuple[str, float]]:
        """(text, place)."""
        return [(f"{value:g}", self.x(value)) for value in _ticks(self.across)]

    @property
    def ticks_up(self) -> list[tuple[str, float]]:
        """(text, place)."""
        return [(f"{value:g}", self.y(value)) for value in _ticks(self.up)]


def _same(one: Point, other: Point) -> bool:
    return (one.clean[0], one.robust[0]) == (other.clean[0], other.robust[0])


def _spoken(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.1f} % (95 %: {value[1]:.1f} to {value[2]:.1f})"


def _reach(lowest: float, highest: float) -> tuple[float, float]:
    """Whole steps around all values, at least 5 points wide, inside 0 to 100."""
    step = 1 if highest - lowest < 12 else 5 if highest - lowest < 40 else 10
    first = max(0.0, step * ((lowest - step / 5) // step))
    last = min(100.0, -step * ((-highest - step / 5) // step))
    return (first, last) if last - first >= 5 else (max(0.0, last - 5), max(5.0, last))


def _ticks(reach: tuple[float, float]) -> list[float]:
    width = reach[1] - reach[0]
    step = next(step for step in (1, 2, 5, 10, 20) if width / step <= 6)
    start = int(-(-reach[0] // step)) * step
    return [float(value) for value in range(start, int(reach[1]) + 1, step)]


Box = tuple[float, float, float, float]


def _mark(point: Point, view: View, front: bool, few: bool, taken: list[Box]) -> Mark:
    x, y = view.x(point.clean[0]), view.y(point.robust[0])
    label, free = _label(point.name, x, y, taken if front else [])
    if front and free:
        taken.append(_box(point.name, label))
    return Mark(
        point=point,
        x=x,
        y=y,
        left=view.x(point.clean[1]),
        right=view.x(point.clean[2]),
        low=view.y(point.robust[1]),
        high=view.y(point.robust[2]),
        label=label,
        front=front,
        named=front and free,
        linked=front or few,
    )


def _label(name: str, x: float, y: float, taken: Sequence[Box]) -> tuple[tuple[float, float, str], bool]:
    """A place beside the point where no other name stands, and whether there was one."""
    places = (
        (x - 9, y - 5, "end"),
        (x + 9, y - 5, "start"),
        (x - 9, y + 15, "end"),
        (x + 9, y + 15, "start"),
    )
    inside = [place for place in places if _fits(_box(name, place))] or [places[0]]
    free = [place for place in inside if not any(_overlap(_box(name, place), box) for box in taken)]
    return (free or inside)[0], bool(free)


def _box(name: str, label: tuple[float, float, str]) -> Box:
    x, y, anchor = label
    width = LETTER * len(name)
    return (x - width if anchor == "end" else x, y - LINE + 4, width, LINE)


def _fits(box: Box) -> bool:
    return (
        box[0] >= LEFT and box[0] + box[2] <= WIDTH and box[1] >= 0 and box[1] + box[3] <= HEIGHT - BOTTOM + 4
    )


def _overlap(one: Box, other: Box) -> bool:
    return abs(2 * (one[0] - other[0]) + one[2] - other[2]) < one[2] + other[2] and abs(
        2 * (one[1] - other[1]) + one[3] - other[3]
    ) < (one[3] + other[3])


def scatter_of(robust: str, points: Sequence[Point]) -> Scatter | None:
    """The picture; None of fewer than two models."""
    return Scatter(robust, tuple(points)) if len(points) > 1 else None
