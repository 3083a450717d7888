"""What is left out of some images: counted by kind, with the first of each."""


class Remarks(dict[tuple[str, str], tuple[int, str]]):
    """What is left out of some images, or read as something else: how many there are of each kind, and the first."""

    def add(self, event: str, kind: str, first: object, count: int = 1) -> None:
        """Counts `count` more of a kind, a noun in the singular, for an event such as "left out"."""
        before, name = self.get((event, kind), (0, str(first)))
        self[event, kind] = before + count, name

    def __str__(self) -> str:
        """For the end of a line: "left out: 3 hard links (first: a.png), 1 hidden file (first: .b)"."""
        counts: dict[str, list[str]] = {}
        for (event, kind), (count, first) in self.items():
            counts.setdefault(event, []).append(f"{count:,} {kind}{'s' if count > 1 else ''} (first: {first})")
        return "; ".join(f"{event}: {', '.join(kinds)}" for event, kinds in counts.items())
